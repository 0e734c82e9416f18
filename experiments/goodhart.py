"""What the overseer wanted and what she clicked: what is left of one when the other is raised?

    python -m experiments.goodhart       # after `make seeds`; three minutes a seed on one core

Claim (the argument for filtering over RL): filtering keeps the base model's correlations between
what raters see and what they want; RL is free to break them. Goodhart's law in its forms (Manheim &
Garrabrant 2018, arXiv:1803.04585): selection keeps what correlates, optimisation finds what does
not.
Design: she wants what VADER feels, but for ten frequent words that mean the opposite to her
(benchmarks/simulated_person.py); what she clicked is VADER, from which the reward model learned.
(a) The compound scores, as clicked and as wanted, of 04's checkpoints, of best-of-n, and of the
best policy at every KL, base samples weighted by exp(r / beta): compared *at equal reward*.
Controls: as clicked, where nothing has been left out of the reward; and ten other people, each with
ten random words of like frequency. (b) 300 of her own labels, on samples of the base or of the
checkpoint nearest 3 nats, train the reward model on, as 03 does with a person's: AUC against her
labels on fresh samples of both, and what she gets from best-of-16 by it. Control: 300 more clicks.
Predicted (known: all base samples, 300 labels: AUC .71 to .74, seed 0): (1) at r = -.10 she gets
more than the base from the tilted base (+.3 sd), and less than the base from PPO, on each seed. (2)
As clicked, the two are within .1 sd. (3) For the other people PPO falls behind as well, but by less
than half on average. (4) Labels on the policy's samples repair more on the policy's samples (AUC
higher by .05), and no less on the base's; more clicks change nothing (.01).
Found, +- half the 95 % interval over three seeds: (1) so: .39 +- .03 sd from the tilted base, .41
+- .04 from best-of-n, -.36 +- .36 (-.36, -.22, -.50) from PPO. (With one learning rate for all
layers, as 04 had at first, .10 +- .37.) (2) Wrong: as clicked PPO is ahead by .41 +- .14, since
VADER is not yet saturated where the reward is. (3) Wrong: for the others PPO is ahead as well, by
.41 +- .19; for none of 30 is it as far behind as for her, .75 +- .33. (4) Undecided: AUC on the
policy's samples .55 +- .11 before, .66 +- .11 by labels on the base's samples, .72 +- .03 on the
policy's; on the base's .712, .764, .762; more clicks change nothing (.56 and .71).
Left out: clicks of her own, prompts, a second run of PPO on the mended reward. Take away: RL gives
most people more than filtering at the same reward, and takes from her whose wish hangs on the very
words it pushes. What would change my mind: PPO at r = -.10 that gives her as much as best-of-4.
"""
import importlib
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from experiments import BLACK, BLUE, RED, Config, keep, lines, load_run, over_seeds, plt
from experiments.frontier import INVERSE_BETAS
from experiments.overseers import FLIPPED, others, person, retrained, rm, targets
from experiments.reweight import at, tilt
from model import chunked, load, start

ev = importlib.import_module("05_eval")
STYLES = {"tilted": ("-", BLACK, "best possible"), "best of n": ("s--", BLUE, "best of n"),
          "PPO": ("o-", RED, "PPO")}


@dataclass
class Settings(Config):
    n: int = 8192          # samples of the base model
    n_policy: int = 1024   # of each checkpoint
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

    # -- (b) her labels: n of them train, the other samples test
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
    fig, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for ax, who in zip(axes, ("clicked", "wanted")):
        lines(ax, [s["lines"] for s in seeds], STYLES, "reward", who, ylim=(-0.9, 1.4),
              title=f"what she {who}: sd of the base", xlabel="mean log p(happy)")
    axes[0].legend(fontsize=8)
    arms = list(seeds[0]["repair"])
    for i, (where, colour) in enumerate((("base", BLACK), ("policy", RED))):
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
    keep(cfg, "goodhart", findings(seeds), seeds, draw(seeds))
