# make play       base model and policy side by side, in the terminal: nothing is trained
# make            set up .venv and run the five scripts with their defaults
# make quick      the same from the shipped base model: two thirds of the time
# make test       set up .venv, check the style, run the tests
# make seeds      the pipeline on seeds 0, 1, 2 and the table in README
# make experiments  one question each, after make seeds: docs/experiments.md
# make clean      delete .venv and what the scripts wrote to out/, but keep all labels and ratings
# make help       this list
#
# VENV= PYTHON=python3 make ...   use an existing environment, for example one with a CUDA torch
# OUT=dir make                    write somewhere else than out/
SHELL := /bin/sh
VENV ?= .venv
PYTHON ?= python3
OUT ?= out
RUN := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
READY := $(if $(VENV),$(VENV)/ready)
$(if $(filter 1,$(words $(OUT))),,$(error OUT="$(OUT)": name one folder, without blanks))
$(foreach c,: % ' ",$(if $(findstring $c,$(OUT)),$(error OUT=$(OUT): a folder's name without $c, please)))
$(if $(shell printf %s '$(OUT)' | LC_ALL=C tr -d 'A-Za-z0-9_./~@+,=\200-\377-'),$(error OUT=$(OUT): a folder's name without special characters, please))
# a label file that is newer than the reward model (a wildcard would split names at blanks)
LABELLED := $(shell find -L $(OUT) -maxdepth 1 -name 'labels-*.jsonl' -newer $(OUT)/reward.safetensors 2>/dev/null)

.PHONY: all play quick test seeds experiments clean help FORCE

all: $(OUT)/report.html
	@echo "the report: $(OUT)/report.html"

help:
	@sed -n '/^#/!q; s/^#[ ]*//p' Makefile

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements.txt
	@touch $@

$(OUT)/base.safetensors: 01_pretrain.py model.py | $(READY)
	$(RUN) 01_pretrain.py --resume --out $(OUT)

$(OUT)/labels-vader.jsonl: 02_sample_label.py $(OUT)/base.safetensors | $(READY)
	$(RUN) 02_sample_label.py --out $(OUT)

$(OUT)/reward.safetensors: 03_reward_model.py $(OUT)/labels-vader.jsonl $(if $(LABELLED),FORCE) | $(READY)
	$(RUN) 03_reward_model.py --out $(OUT)

$(OUT)/policy-happy.safetensors: 04_ppo.py $(OUT)/reward.safetensors | $(READY)
	$(RUN) 04_ppo.py --resume --out $(OUT)

$(OUT)/report.json: 05_eval.py $(OUT)/policy-happy.safetensors | $(READY)
	$(RUN) 05_eval.py --out $(OUT)

$(OUT)/report.html: $(OUT)/report.json $(wildcard report/*.py report/page.* report/plot.css $(OUT)/ratings.json $(OUT)/curve.json) | $(READY)
	$(RUN) -m report --out $(OUT)

play: | $(READY)
	@$(RUN) -m report.play --out $(OUT)

# 02 to 05 and the page, from the base model in pretrained/
quick: | $(READY)
	@mkdir -p $(OUT)
	@test -e $(OUT)/base.safetensors || { cp pretrained/base.safetensors $(OUT)/base.tmp && mv $(OUT)/base.tmp $(OUT)/base.safetensors; }
	@$(MAKE) all

seeds: | $(READY)
	$(RUN) -m benchmarks.seeds

experiments: | $(READY)
	$(RUN) -m experiments

PYTEST := -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal
test: .ttsem/ready | $(READY)
	$(RUN) -m ruff check .
	$(RUN) $(PYTEST)

# ttsem executes compiled Triton kernels on a CPU. It needs Triton 3.8. Both go into .ttsem/; without
# them its test is skipped
.ttsem/ready: Makefile | $(READY)
	@$(RUN) -m pip install -q --no-deps --ignore-requires-python --upgrade --target .ttsem ttsem==0.1.0 triton==3.8.0 \
	  && PYTHONPATH=.ttsem $(RUN) -c 'import ttsem.sanitize' && touch $@ || { echo "no ttsem here"; rm -rf .ttsem; }

# what the scripts write, by name
NAMES := happy sad happy-vader sad-vader
KL := kl-[0-9][0-9].[0-9][0-9].safetensors
WRITTEN := base.safetensors reward.safetensors $(NAMES:%=policy-%.safetensors) $(NAMES:%=checkpoints/%-$(KL)) \
  $(NAMES:%=04-%.jsonl) $(NAMES:%=04-%-state.pt) 01.jsonl 01-state.pt 03.jsonl 02.json corpus.txt samples.jsonl \
  pairs.jsonl prompts.json report.json report.html plots/*.svg curve.json ratings.json times.json \
  $(NAMES:%=04-%.jsonl.old*) $(NAMES:%=04-%-state.pt.old*) $(NAMES:%=checkpoints/%-$(KL).old*) 01-state.pt.old* \
  $(patsubst %,experiments/%.*,$(basename $(notdir $(wildcard experiments/[a-z]*.py))))

clean:
	@cd "$(abspath $(OUT))" 2> /dev/null || { echo "$(OUT) is not there: nothing to clean"; exit 0; }; \
	found=$$(ls -d $(WRITTEN) 2> /dev/null); \
	if test -e .git || test "$$(pwd -P)" = "$(CURDIR)/pretrained"; then found=; fi; \
	if test -z "$$found"; then echo "nothing that these scripts wrote is in $(OUT)"; \
	elif ! test -e base.safetensors && ! test -e 01.jsonl && ! test -e samples.jsonl; \
	then echo "error: $(OUT) is not a run of these scripts: nothing is deleted" >&2; exit 2; \
	else rm -f $(WRITTEN) && echo deleted: $$found && ls -A | sed '/\.lock$$/d; s/^/kept: /'; fi
	$(if $(filter file,$(origin VENV)),rm -rf .venv .ttsem)
