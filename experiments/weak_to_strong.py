"""Does a strong student learn what its weak teacher says, or what the teacher means?

    python -m experiments.weak_to_strong       # after `make seeds`; five minutes a seed on one core

Claim (Burns et al. 2023, arXiv:2312.09390): a strong pretrained model, fine-tuned on the labels of
a weak one, does better than its teacher. It knows the task already and only needs to be asked. The
performance gap recovered is PGR = (student - weak) / (ceiling - weak). It is 20 to 50% on NLP
tasks, 80% with a confidence loss, and 10% for reward models.

Design: the texts are pieces of 16 tokens from the base model's samples, as many happy as sad by
VADER. We leave out neutral ones, so we can measure accuracy, as in the paper, with chance at 50%.
(From 6,400 true labels of whole samples the base model learns an AUC of only 0.79; AUC is the
chance that a happy text scores above a sad one.) The weak teacher is a transformer with one block,
d 48 and no pretraining, from 4,000 true labels; or a bag of words, from 1,000. Each gives 6,000
other texts its probabilities. The student is the base model, trained for two epochs at 03's rates.
Its ceiling comes from true labels of the 6,000. The arms:
- naive: just that;
- confidence loss: half of the target is the student's own answer, made hard (0 or 1) so that it
  says happy as often as the teacher;
- bootstrapping: the teacher teaches the base model's first block, which teaches its first two,
  which teach the student;
- stopping by truth: one half of the 2,500 test texts chooses when to stop for the other half.
We give no PGR where the gap is below two standard errors. Imitation is the fraction of the
teacher's errors that the student makes too. The five seeds are disjoint parts of the samples of
three runs.

Controls: a student without pretraining, against its own ceiling; one as small as the weak model.

Predicted (known from other texts: weak 0.63, bag 0.72; with true labels: base 0.84, without
pretraining 0.78, first block 0.80, first two 0.83, small model 0.66, bag of 8,000 0.86):
1. Naive: the PGR is 15% (5 to 25) with the weak model, 0% (-10 to 10) with the bag.
2. The confidence loss changes that by less than 10 points.
3. So does bootstrapping.
4. Stopping by truth changes it by less than 5.
5. Without pretraining the student is below its teacher, and 3 points below the pretrained one on
   every seed: what generalises is pretraining.
6. The small student is 2 points below its teacher.
7. The naive student repeats 60% of the weak model's errors and 80% of the bag's. A student of true
   labels makes 20% of them.

Found (+- half the 95% interval over five seeds; pairs are weak transformer, then bag): the weak
transformer is right on 61.6 +- 1.8%, the bag on 72.6 +- 1.4%, the ceiling on 80.9 +- 1.4%.
1. Wrong: the PGR is -1 +- 13% and -34 +- 12%.
2. Right for the transformer: the PGR is 5 +- 4 points less. With the bag it is 11 +- 21 less.
3. Right, but it is worse: 9 +- 6 and 9 +- 15 points less.
4. Right: it changes by -2 +- 2 and -3 +- 2 points.
5. Wrong: without pretraining, accuracy is only 0.7 +- 0.4 and 0.3 +- 0.9 points below that of the
   pretrained student, and 0.8 +- 2.1 and 3.0 +- 0.6 below the teacher's. With true labels
   pretraining is worth 5.7 +- 1.3 points.
6. The prediction was too modest. The small student is 6.0 +- 1.7 points below its teacher and
   5.8 +- 1.1 below the strong student. The gap is too small for a PGR.
7. Right: 63 +- 3% and 77 +- 2%; from true labels 25% and 33%; without pretraining 65% and 74%. The
   naive student also errs on 23 +- 2% and 12 +- 0% of what its teacher gets right.

Left out: a weak model as pretrained as the strong one; as many labels for both; a task that the
base model knows beforehand, as the paper's models do; more steps (the confidence loss counts the
student's own answers in full from the 19th of 188 steps). With the 6,000 true labels a bag of words
has 84.6 +- 1.0%, more than the ceiling: it lacks labels, not strength.

Take away: the strong student follows its teacher and adds mistakes of its own. Pretraining is worth
6 points with true labels, and next to nothing with the teacher's.

What would change my mind: a PGR above 20% on each seed.
"""
import copy
import importlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import sem
from tqdm import tqdm

from experiments.shared.results import ink, over_seeds, panels, save_results
from experiments.shared.runs import Config, labelled, load_run
from model import GPT, chunked, require, start

rm = importlib.import_module("03_reward_model")
STOPPED = ", stopped by truth"
SMALL = {"n_layer": 1, "n_head": 1, "n_kv_head": 1, "d_model": 48}
TEACHERS = {"weak transformer": ink.red, "bag of words": ink.blue}
COURSES = {"naive": ink.green, "confidence": ink.orange, "no pretraining": ink.blue}
ARMS = ("naive", "naive" + STOPPED, "confidence", "confidence" + STOPPED, "bootstrapped",
        "no pretraining", "no pretraining, confidence", "no stronger")


def read(run: Path, tokenizer, part: int, parts: int, n: int) -> list[dict]:
    """Read the first n quarters of samples of one part of a run, happy and sad in turn."""
    samples = labelled(run, spans=True)
    size = len(samples) // parts
    rows = [quarter for row in samples[part * size:(part + 1) * size]
            for quarter in rm.quarters(row | {"weight": 1.0}, tokenizer)]
    rows = [row | {"spans": ()} for row in rows]
    happy, sad = ([row for row in rows if row["target"] == target] for target in (1.0, 0.0))
    items = [item for pair in zip(happy, sad) for item in pair]
    require(len(items) >= n, f"{run} has {len(items)} happy and sad quarters a seed, not {n}: "
                             "use fewer --seeds, --texts or --labels")
    return items[:n]


# ---- Models --------------------------------------------------------------------------------------
def fresh(base: GPT, seed: int, **size: int) -> GPT:
    """Make a model without pretraining, of the base model's size except for these fields."""
    torch.manual_seed(seed)
    model = GPT(replace(base.config, **size)).to(base.head.device)
    model.dtype = base.dtype
    return model


def cut(base: GPT, blocks: int) -> GPT:
    """Copy the base model with its first few blocks only: a smaller pretrained model."""
    model = copy.deepcopy(base)
    model.blocks = model.blocks[:blocks]
    return model


def p_happy(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Return p(happy) of each text: tokens (N, T) -> (N,)."""
    return chunked(model.sentiment, 256, tokens)[:, 0].exp()


# ---- Learning ------------------------------------------------------------------------------------
def confidence_loss(log_p: torch.Tensor, target: torch.Tensor, share: float) -> torch.Tensor:
    """Cross-entropy in nats of log_p (B, 2), happy and sad, against the teacher's p(happy), (B,). A
    `share` of the target is the student's own answer, made 0 or 1 at the threshold where it says
    happy as often as the teacher does (Burns et al. 2023, section 4.3.2)."""
    own = log_p[:, 0].detach()
    hard = (own >= own.quantile(1 - target.mean())).float()
    return rm.sentiment_loss(log_p, (1 - share) * target + share * hard, torch.ones_like(target))


def learn(model: GPT, tokens: torch.Tensor, target: torch.Tensor, epochs: int, test: torch.Tensor,
          confidence: float = 0.0, moments: int = 1) -> torch.Tensor:
    """Train model in place, as 03 does, on texts (N, T) with target p(happy) (N,) -> p(happy) of
    the test texts at evenly spaced moments, the last one at the end, (moments, n). confidence: the
    share of its own answers in the target, reached after a tenth of the steps."""
    cfg, said = rm.Config(), []
    batch = cfg.batch_tokens // tokens.shape[1]
    orders = [torch.randperm(len(tokens), generator=torch.Generator().manual_seed(epoch))
              for epoch in range(epochs)]
    rows = [b.to(tokens.device) for order in orders for b in order.split(batch)]
    matrices = {"params": list(model.blocks.parameters()), "peak_lr": cfg.lr}
    embedding = {"params": [model.embed.weight], "peak_lr": cfg.embed_lr}
    head = {"params": [model.head], "peak_lr": cfg.head_lr}
    optimizer = torch.optim.AdamW([matrices, embedding, head], betas=(0.9, 0.98), weight_decay=0)
    for step, b in enumerate(rows):
        share = confidence * min(1.0, step / (0.1 * len(rows)))
        confidence_loss(model.sentiment(tokens[b]), target[b], share).backward()
        scale = min(1.0, (step + 1) / cfg.warmup) * (1 - step / len(rows))
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) * moments // len(rows) > step * moments // len(rows):
            said.append(p_happy(model, test))
    return torch.stack(said)


# ---- Measures. Arguments: which texts a model gets right, (n,) bool ------------------------------
def recovered(weak: np.ndarray, student: np.ndarray, ceiling: np.ndarray) -> float:
    """Return the performance gap recovered, (student - weak) / (ceiling - weak), or NaN where the
    gap is below two of its standard errors."""
    gap = ceiling.astype(float) - weak
    wide = gap.mean() > 2 * sem(gap)
    return (student.mean() - weak.mean()) / gap.mean() if wide else math.nan


def repeated(weak: np.ndarray, student: np.ndarray) -> float:
    """Return the fraction of the weak model's errors that the student makes too."""
    return float((~student)[~weak].mean())


def stopped(course: np.ndarray) -> np.ndarray:
    """Choose the best moment for each half of the texts by the other half: what is right at each
    moment, (moments, n) -> at the chosen ones, (n,)."""
    half = course.shape[1] // 2
    first, second = course[:, :half], course[:, half:]
    return np.append(first[second.mean(1).argmax()], second[first.mean(1).argmax()])


def figures(right: dict[str, dict[str, np.ndarray]]) -> dict[str, float]:
    """Compute accuracies, PGR and repeated errors from right: teacher (or "truth") -> arm ->
    (moments, n). The ceiling is the same arm on true labels if there is one, else the naive arm."""
    ceiling = {arm: x[-1] for arm, x in right["truth"].items()}
    found = {f"accuracy, truth: {arm}": x.mean() for arm, x in ceiling.items()}
    for teacher in [teacher for teacher in right if teacher != "truth"]:
        arms = {arm: x[-1] for arm, x in right[teacher].items()}
        arms |= {arm + STOPPED: stopped(right[teacher][arm]) for arm in ("naive", "confidence")}
        weak = arms.pop("teacher")
        found[f"accuracy, {teacher}: itself"] = weak.mean()
        found[f"errors repeated, {teacher}: true labels"] = repeated(weak, ceiling["naive"])
        for arm, x in arms.items():
            own = ceiling.get(arm.removesuffix(", confidence"), ceiling["naive"])
            found[f"accuracy, {teacher}: {arm}"] = x.mean()
            found[f"PGR, {teacher}: {arm}"] = recovered(weak, x, own)
            found[f"errors repeated, {teacher}: {arm}"] = repeated(weak, x)
        found[f"pretraining ahead, {teacher}"] = (
            arms["naive"].mean() - arms["no pretraining"].mean())
    return {what: round(float(x), 4) for what, x in found.items()}


# ---- The experiment ------------------------------------------------------------------------------
@dataclass
class Settings(Config):
    seeds: int = 5           # disjoint parts of the samples of all runs
    labels: int = 4000       # true labels for the weak transformer
    labels_of_bag: int = 1000
    texts: int = 6000        # texts that the teachers label
    test: int = 2500         # texts
    epochs: int = 2          # for students; twice as many for the weak transformer
    moments: int = 8         # how often students are tested during training


def measure(cfg: Settings, seed: int, device, dtype) -> dict[str, dict[str, np.ndarray]]:
    """Run one seed -> teacher -> arm -> which test texts are right at each moment, (moments, n)."""
    run, part = cfg.runs[seed % len(cfg.runs)], seed // len(cfg.runs)
    base, _, _, tokenizer, _ = load_run(run, device, dtype)
    parts, n = math.ceil(cfg.seeds / len(cfg.runs)), cfg.labels + cfg.texts + cfg.test
    items = read(run, tokenizer, part, parts, n)
    y = torch.tensor([item["tokens"] for item in items], device=device)
    truth = torch.tensor([item["target"] for item in items], device=device)
    texts, test, rest = y[cfg.labels:-cfg.test], y[-cfg.test:], slice(cfg.labels, -cfg.test)

    def bag(train, test):
        return torch.tensor(rm.bag_of_words(train, test), device=device).float().sigmoid()

    def taught(student, labels, confidence=0.0):
        return learn(student, texts, labels, cfg.epochs, test, confidence, cfg.moments)
    weak = fresh(base, seed, **SMALL)
    learn(weak, y[:cfg.labels], truth[:cfg.labels], 2 * cfg.epochs, test)
    labels = {"weak transformer": p_happy(weak, y[cfg.labels:]),
              "bag of words": bag(items[:cfg.labels_of_bag], items[cfg.labels:])}
    new = {"naive": lambda: copy.deepcopy(base), "no pretraining": lambda: fresh(base, seed),
           "no stronger": lambda: fresh(base, seed + 100, **SMALL)}
    said = {"truth": {arm: taught(student(), truth[rest]) for arm, student in new.items()}}
    said["truth"]["bag of words"] = bag(items[rest], items[-cfg.test:])[None]
    for teacher, p in labels.items():
        p, own = p.split((cfg.texts, cfg.test))
        said[teacher] = {"teacher": own[None]} | {
            arm: taught(student(), p) for arm, student in new.items()}
        said[teacher]["confidence"] = taught(new["naive"](), p, 0.5)
        said[teacher]["no pretraining, confidence"] = taught(new["no pretraining"](), p, 0.5)
        for arm, student in (("its first block", cut(base, 1)), ("its first two", cut(base, 2)),
                             ("bootstrapped", new["naive"]())):
            said[teacher][arm] = taught(student, p)
            p = p_happy(student, texts)
    return {teacher: {arm: ((p > 0.5) == (truth[-cfg.test:] > 0.5)).numpy(force=True)
                      for arm, p in arms.items()} for teacher, arms in said.items()}


def draw(found: dict[str, list[float]], courses: list[dict]):
    fig, axes = panels(1, 4, 15, 4)

    def dots(ax, what, colour):
        mean, half = zip(*(over_seeds(found[f"{what}: {arm}"]) for arm in ARMS[::-1]))
        ax.errorbar(mean, ARMS[::-1], xerr=half, fmt="o", color=colour, capsize=3)
        ax.grid(alpha=0.3)
    for ax, style, (teacher, colour) in zip(axes, ("-", ":"), TEACHERS.items()):
        for line, what in ((":", f"{teacher}: itself"), ("-", "truth: naive")):
            ax.axvline(np.mean(found[f"accuracy, {what}"]), color="grey", ls=line)
        dots(ax, f"accuracy, {teacher}", colour)
        ax.set(title=f"accuracy: {teacher}", xlabel="dotted: teacher; line: ceiling")
        dots(axes[2], f"errors repeated, {teacher}", colour)
        true_labels = np.mean(found[f"errors repeated, {teacher}: true labels"])
        axes[2].axvline(true_labels, color=colour)
        for arm, colour in COURSES.items():
            course = np.array([seed[teacher][arm] for seed in courses]).mean(0)
            axes[3].plot(np.arange(1, len(course) + 1) / len(course), course, style, color=colour,
                         label=arm if style == "-" else None)
    for ax in axes[1:3]:
        ax.tick_params(labelleft=False)
    axes[2].set(title="teacher's errors repeated", xlim=(0, 1), xlabel="line: after true labels")
    axes[3].set(title="accuracy in training", xlabel="share of the steps; dotted: bag of words")
    axes[3].legend(fontsize=8, loc="lower right")
    return fig


if __name__ == "__main__":
    cfg, device, dtype = start(Settings, __doc__)
    right = [measure(cfg, seed, device, dtype) for seed in tqdm(range(cfg.seeds), desc="seeds")]
    seeds = [figures(x) for x in right]
    found = {what: [seed[what] for seed in seeds] for what in seeds[0]}
    courses = [{teacher: {arm: x.mean(1).round(4).tolist() for arm, x in arms.items()}
                for teacher, arms in seed.items()} for seed in right]
    save_results(cfg, "weak_to_strong", found, courses, draw(found, courses))
