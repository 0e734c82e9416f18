# make            set up .venv and run the five scripts with their defaults
# make test       set up .venv, check the style, run the tests
# make test-old   the Triton tests once more, with the oldest Triton that is supported
# make seeds      the pipeline on seeds 0, 1, 2 and the table in README
# make experiments  one question each, after make seeds: docs/experiments.md
# make clean      delete .venv and out/, but for labels, comparisons and ratings
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

.PHONY: all test test-old seeds experiments clean help

all: $(OUT)/report.html
	@echo "the report: $(OUT)/report.html"

help:
	@sed -n '/^# /s/^# //p' Makefile

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements.txt
	@touch $@

$(OUT)/base.safetensors: 01_pretrain.py model.py | $(READY)
	$(RUN) 01_pretrain.py --resume --out $(OUT)

$(OUT)/labels-vader.jsonl: 02_sample_label.py $(OUT)/base.safetensors | $(READY)
	$(RUN) 02_sample_label.py --out $(OUT)

$(OUT)/reward.safetensors: 03_reward_model.py $(OUT)/labels-vader.jsonl $(wildcard $(OUT)/labels-*.jsonl) | $(READY)
	$(RUN) 03_reward_model.py --out $(OUT)

$(OUT)/policy-happy.safetensors: 04_ppo.py $(OUT)/reward.safetensors | $(READY)
	$(RUN) 04_ppo.py --resume --out $(OUT)

$(OUT)/report.json: 05_eval.py $(OUT)/policy-happy.safetensors | $(READY)
	$(RUN) 05_eval.py --out $(OUT)

$(OUT)/report.html: $(OUT)/report.json $(wildcard report/*.py report/page.* report/plot.css $(OUT)/ratings.json $(OUT)/curve.json) | $(READY)
	$(RUN) -m report --out $(OUT)

seeds: | $(READY)
	$(RUN) -m benchmarks.seeds

experiments: | $(READY)
	$(RUN) -m experiments

PYTEST := -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal
test: | $(READY)
	$(RUN) -m ruff check .
	$(RUN) $(PYTEST)

# Triton 3.6 is what torch 2.11 brings; its interpreter needs a NumPy of its time
test-old: | $(READY)
	$(RUN) -m pip install -q --no-deps --upgrade --target $(CURDIR)/.triton-3.6 triton==3.6.0 numpy==2.2.6
	PYTHONPATH=$(CURDIR)/.triton-3.6 $(RUN) -c 'import triton; assert triton.__version__ == "3.6.0"'
	PYTHONPATH=$(CURDIR)/.triton-3.6 $(RUN) $(PYTEST) tests/test_triton.py

clean:
	rm -rf $(VENV) .triton-3.6
	find $(OUT) -type f ! -name 'labels-*' ! -name 'comparisons-*' ! -name 'ratings-*' ! -name 'key-*' -delete
