"""When training raises what the overseer clicked, what is left of what she wanted?

    python -m experiments.goodhart       # after `make seeds`; three minutes a seed on one core

Claim: This is the argument for filtering over RL. Filtering keeps the base model's correlations
between what raters see and what they want. RL is free to break them. The forms of Goodhart's law
say so too (Manheim & Garrabrant 2018, arXiv:1803.04585): selection keeps what correlates,
optimisation finds what does not.

Design: The overseer is simulated (experiments/simulated_person.py). She *wants* what VADER, a
lexicon, feels, except that ten frequent words mean the opposite to her. What she *clicked* is plain
VADER, and the reward model learned from that.
(a) We score texts as clicked and as wanted, by VADER's compound score. They come from 04's
checkpoints, from best-of-n, and from the best policy at every KL: the tilted base, which is the
base model's samples weighted by exp(r / beta). We compare them *at equal reward* r, the mean log
p(happy).
(b) 300 of her own labels train the reward model further, as 03 does with a person's labels. They
are of samples of the base model, or of the checkpoint nearest 3 nats (of KL, the distance from the
base model). We measure what she gets from best-of-16 by that model, and its AUC against her labels
on fresh samples of both. AUC is the chance that a text she calls positive scores above one she
calls negative.

Controls: For (a), the scores as clicked, where nothing has been left out of the reward; and ten
other people, each with ten random words of like frequency. For (b), 300 more clicks.

Predicted (known before: on seed 0, 300 labels raise the AUC on all base samples from 0.71 to 0.74):
1. At r = -0.10, on each seed, the tilted base gives her more than the base model does, by 0.3
   standard deviations (sd) of the base model. PPO gives her less than the base model.
2. As clicked, the two are within 0.1 sd.
3. For the other people PPO falls behind too, but by less than half as much on average.
4. Labels on the policy's samples repair more on the policy's samples (an AUC higher by 0.05), and
   no less on the base model's. More clicks change nothing (0.01).

Found (+- half the 95% interval over three seeds):
1. Half right. She gets 0.38 +- 0.08 sd from the tilted base, 0.42 +- 0.05 from best-of-n, and
   0.14 +- 0.20 from PPO (by seed: 0.16, 0.22, 0.06): less, but not less than the base model gives.
2. Wrong. As clicked, PPO is ahead by 0.32 +- 0.06, because VADER is not yet saturated where the
   reward is.
3. Wrong. For the others PPO is ahead too, by 0.30 +- 0.04. For her it is behind by 0.24 +- 0.16,
   and for none of the 30 others is it as far behind.
4. Right on two seeds of three for the policy's samples. More clicks change nothing. The AUC against
   her labels:

       trained further on               policy's samples    base model's samples
       nothing                          0.63 +- 0.06        0.74 +- 0.01
       300 more clicks                  0.63 +- 0.05        0.74 +- 0.03
       her labels, base's samples       0.69 +- 0.04        0.78 +- 0.00
       her labels, policy's samples     0.76 +- 0.06        0.79 +- 0.04

Left out: Clicks of her own, prompts, a second run of PPO on the repaired reward.
Take away: At the same reward, RL gives most people more than filtering does. It gives less to the
one person whose wish hangs on the very words that it pushes.
What would change my mind: PPO at r = -0.10 that gives her as much as best-of-4.
"""
import importlib
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from experiments.shared.results import ink, lines, over_seeds, panels, save_results
from experiments.shared.reweighting import INVERSE_BETAS, at, tilt
from experiments.shared.runs import Config, load_run
from experiments.shared.simulated_people import FLIPPED, others, person, retrained, rm, targets
from model import chunked, load, start

ev = importlib.import_module("05_eval")
STYLES = {"tilted": ("-", ink.black, "best possible"), "best of n": ("s--", ink.blue, "best of n"),
          "PPO": ("o-", ink.red, "PPO")}


@dataclass
class Settings(Config):
    n: int = 8192          # samples of the base model
    n_policy: int = 1024   # samples of each checkpoint
    labels: int = 300
    people: int = 10


def measure(cfg: Settings, run, device, dtype) -> dict:
    reference, reward_fn, reward_model, tokenizer, report = load_run(run, device, dtype)

    def draw(model, n):
        y, _ = model.generate(n, report["length"], report["seed"] << 32 | 7 << 24)
        score = chunked(reward_fn, 256, y, y[:, :0]).double().numpy(force=True)
        return y, tokenizer.decode_batch(y.tolist()), score

    y, texts, score = draw(reference, cfg.n)
    people = {"clicked": (), "wanted": FLIPPED}
    people |= {f"other {i}": x for i, x in enumerate(others(texts, cfg.people, report["seed"]))}
    feels = {name: person(flipped) for name, flipped in people.items()}
    scale = {name: (x.mean(), x.std()) for name, x in ((k, f(texts)) for k, f in feels.items())}

    def judged(texts, score):  # in standard deviations of the base
        return {"reward": score} | {
            k: (f(texts) - scale[k][0]) / scale[k][1] for k, f in feels.items()}
    figures = judged(texts, score)
    kl, means, _, ess = tilt(score, INVERSE_BETAS, np.stack(list(figures.values()), 1))
    tilted = [{"kl": a} | dict(zip(figures, b)) for a, b, c in zip(kl, means, ess) if c > 200]

    # -- (a) the checkpoints
    rows = report["happy"][1:-1]
    nearest = min(rows, key=lambda row: abs(row["kl"] - 3))["name"]
    ppo = [{"kl": 0.0} | {k: x.mean() for k, x in figures.items()}]
    for row in rows:
        path = run / "checkpoints" / f"{row['name']}.safetensors"
        drawn = draw(load(path, "04_ppo.py", device, dtype)[0], cfg.n_policy)
        ppo.append({"kl": row["kl"]} | {k: x.mean() for k, x in judged(*drawn[1:]).items()})
        if row["name"] == nearest:
            near = drawn

    # -- (b) her labels: the first n samples train, the rest test
    n, repair = cfg.labels, {}
    for arm, who, (tokens, said, _) in (("before", None, (y, texts, score)),
                                        ("300 clicks, base", "clicked", (y, texts, score)),
                                        ("300 wanted, base", "wanted", (y, texts, score)),
                                        ("300 wanted, policy", "wanted", near)):
        model = reward_model
        if who:
            model = retrained(reward_model, tokens[:n], said[:n], feels[who](said[:n]))
        repair[arm] = row = {}
        for where, (tokens, said, _) in (("base", (y, texts, score)), ("policy", near)):
            p = chunked(model.sentiment, 256, tokens[n:])[:, 0].float().numpy(force=True)
            wanted = feels["wanted"](said[n:])
            row[f"AUC, {where}"] = rm.auc(p, targets(wanted))
            best = ev.best_of_n_weights(len(p), 16) @ wanted[np.argsort(p, kind="stable")]
            row[f"best of 16, {where}"] = (best - scale["wanted"][0]) / scale["wanted"][1]
    best = ev.best_of_n(score, figures, texts)
    return {"lines": {"tilted": tilted, "PPO": ppo, "best of n": best}, "repair": repair,
            "people": people, "labelled": nearest}


def findings(seeds: list[dict]) -> dict[str, list]:
    found = {}
    for r in (-0.20, -0.10):
        for who in ("clicked", "wanted"):
            for name in STYLES:
                found[f"{who} at reward {r}, {name}"] = [
                    at(s["lines"][name], "reward", r, who) for s in seeds]
    behind = {who: [at(s["lines"]["tilted"], "reward", -0.10, who)
                    - at(s["lines"]["PPO"], "reward", -0.10, who) for s in seeds]
              for who in seeds[0]["people"]}
    found |= {f"PPO behind at -.10, {who}": behind[who] for who in ("clicked", "wanted")}
    rest = [behind[who] for who in behind if who.startswith("other")]
    found["PPO behind at -.10, other people, mean"] = np.mean(rest, 0)
    found["other people for whom as far"] = np.sum(np.array(rest) >= behind["wanted"], 0)
    return found | {f"{what}, {arm}": [s["repair"][arm][what] for s in seeds]
                    for what in seeds[0]["repair"]["before"] for arm in seeds[0]["repair"]}


def draw(seeds: list[dict]):
    fig, axes = panels(1, 3, 13, 4.2)
    for ax, who in zip(axes, ("clicked", "wanted")):
        lines(ax, [s["lines"] for s in seeds], STYLES, "reward", who, ylim=(-0.9, 1.4),
              title=f"what she {who}: sd of the base", xlabel="mean log p(happy)")
    axes[0].legend(fontsize=8)
    arms = list(seeds[0]["repair"])
    for i, (where, colour) in enumerate((("base", ink.black), ("policy", ink.red))):
        mean, half = zip(*[over_seeds(s["repair"][arm][f"AUC, {where}"] for s in seeds)
                           for arm in arms])
        axes[2].errorbar(mean, np.arange(len(arms)) + 0.15 * i, xerr=half, fmt="o", color=colour,
                         capsize=3, label=f"on samples of the {where}")
    axes[2].set(yticks=range(len(arms)), yticklabels=arms, title="AUC against what she wanted")
    axes[2].legend(fontsize=8, loc="center left")
    return fig


if __name__ == "__main__":
    cfg, device, dtype = start(Settings, __doc__)
    seeds = [measure(cfg, run, device, dtype) for run in tqdm(cfg.runs, desc="seeds")]
    save_results(cfg, "goodhart", findings(seeds), seeds, draw(seeds))
