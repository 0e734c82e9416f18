"""Models of several sizes that say whether a text is happy; how one learns from another, and what.
"""
import copy
import importlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from experiments.reweight import mean_se
from model import GPT, chunked, require

rm = importlib.import_module("03_reward_model")
STOPPED = ", stopped by truth"


def read(run: Path, part: int, parts: int, n: int) -> list[dict]:
    """The first n pieces, happy and sad in turn, of this part of a run's."""
    path = run / "labels-vader-pieces.jsonl"
    rows = rm.read_labels(path)
    size = len(rows) // parts
    rows = [row | {"target": rm.TARGET[row["label"]], "weight": 1.0}
            for row in rows[part * size:(part + 1) * size]]
    happy, sad = ([row for row in rows if row["target"] == target] for target in (1.0, 0.0))
    items = [item for pair in zip(happy, sad) for item in pair]
    require(len(items) >= n, f"{path} has {len(items)} happy and sad pieces a seed, not {n}: "
                             "use fewer --seeds, --texts or --labels")
    return items[:n]


# ---- Models --------------------------------------------------------------------------------------
def fresh(base: GPT, seed: int, **size: int) -> GPT:
    """A model without pretraining, of the base model's size but for these fields of its config."""
    torch.manual_seed(seed)
    model = GPT(replace(base.config, **size)).to(base.head.device)
    model.dtype = base.dtype
    return model


def cut(base: GPT, blocks: int) -> GPT:
    """The base model up to its first few blocks: a smaller pretrained one."""
    model = copy.deepcopy(base)
    model.blocks = model.blocks[:blocks]
    return model


def p_happy(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """tokens (N, T) -> (N,)."""
    return chunked(model.sentiment, 256, tokens)[:, 0].exp()


# ---- Learning ------------------------------------------------------------------------------------
def confidence_loss(log_p: torch.Tensor, target: torch.Tensor, share: float) -> torch.Tensor:
    """Cross-entropy, nats; log_p (B, 2) of happy and sad, target (B,): p(happy) by the teacher. A
    `share` of the target is the student's own answer, made hard at the threshold by which it says
    happy as often as the teacher does (Burns et al. 2023, section 4.3.2)."""
    own = log_p[:, 0].detach()
    hard = (own >= own.quantile(1 - target.mean())).float()
    return rm.sentiment_loss(log_p, (1 - share) * target + share * hard, torch.ones_like(target))


def learn(model: GPT, tokens: torch.Tensor, target: torch.Tensor, epochs: int, test: torch.Tensor,
          confidence: float = 0.0, moments: int = 1) -> torch.Tensor:
    """Trains model, in place, as 03 does, on texts (N, T) with p(happy) (N,). confidence: its own
    answers' share of the target, reached after a tenth of the steps. -> p(happy) of the test texts
    at as many evenly spaced moments, the last of them the end: (moments, n)."""
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


# ---- Measures, of which texts a model gets right, (n,) bool --------------------------------------
def recovered(weak: np.ndarray, student: np.ndarray, ceiling: np.ndarray) -> float:
    """Performance gap recovered, (student - weak) / (ceiling - weak); nan where the gap is below
    two of its standard errors."""
    gap, se = mean_se(ceiling.astype(float) - weak)
    return (student.mean() - weak.mean()) / gap if gap > 2 * se else math.nan


def repeated(weak: np.ndarray, student: np.ndarray) -> float:
    """Of the texts that the weak model gets wrong, the share that the student does."""
    return float((~student)[~weak].mean())


def stopped(course: np.ndarray) -> np.ndarray:
    """What is right at each of several moments, (moments, n) -> at the best one, (n,), which is
    chosen for each half of the texts by the other."""
    half = course.shape[1] // 2
    first, second = course[:, :half], course[:, half:]
    return np.append(first[second.mean(1).argmax()], second[first.mean(1).argmax()])


def figures(right: dict[str, dict[str, np.ndarray]]) -> dict[str, float]:
    """right: teacher, one of them "truth" -> arm -> (moments, n) -> accuracies, PGR, and what of a
    teacher's errors is repeated. The ceiling is the arm's own on true labels, or the naive one."""
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
