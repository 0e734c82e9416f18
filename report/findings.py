"""What the measured rows say: how far, who is the best, which words, and all that in a sentence.

Judges are compared in standard deviations of the base model's samples. Over-optimisation by a judge
starts at the first checkpoint that it finds worse than the best before, though the reward is not,
by a rule with a known rate of false alarms, over all judges together.
"""
import math

import numpy as np

JUDGES = {"vader": "VADER", "afinn": "AFINN", "pattern": "Pattern"}
OUTSIDE = ("afinn", "pattern")  # those that did not make the labels of the default run


def fit_line(x, y) -> tuple[float, float, float]:
    """Least squares y = slope x + intercept -> slope, intercept, R^2."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (slope * np.asarray(x) + intercept)
    return float(slope), float(intercept), float(1 - residual.var() / np.var(y))


def risen_words(before: dict[str, int], after: dict[str, int], top: int = 12) -> list[dict]:
    """Word counts of two policies -> the words whose share rose most, per 1,000 words."""
    n_before, n_after = sum(before.values()), sum(after.values())
    rows = [{"word": word, "before": 1000 * before.get(word, 0) / n_before,
             "after": 1000 * n / n_after} for word, n in after.items()]
    return sorted(rows, key=lambda row: row["before"] - row["after"])[:top]


def holm(p_values: list[float], level: float = 0.05) -> list[bool]:
    """Which hypotheses are rejected, so that the chance of any false rejection is at most `level`
    (Holm 1979): the smallest of m p-values is held against level / m, the next against
    level / (m - 1), ..., up to the first that fails."""
    order = np.argsort(p_values, kind="stable")
    rejected = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > level / (len(p_values) - rank):
            break
        rejected[i] = True
    return rejected


def over_optimisation(rows: list[dict], judge: str, sign: int = 1) -> tuple[dict, dict | None]:
    """rows by rising KL, each with "each"[judge], the score of every sample (sample i of all
    policies has the same noise; at least 4), and "proxy", the mean reward -> the row that the judge
    likes best, and the first later one that it finds worse though the reward is not, or None.

    The best is the one of highest sign * score on the samples of even number; the later rows are
    tested on those of odd number, by paired differences, one-sided, with Holm's correction at 5 %
    over the number of judges. So in at most 5 % of runs any of them gives a false alarm. Of 1,000
    runs simulated in tests/test_eval.py (12 checkpoints, 1,024 samples, standard deviation .5,
    correlation .3) one judge gives it
    in 0.8 % where the score is flat; falls by .05, .075 and .1 at
    the last checkpoint are found in 22, 56.5 and 87 %.
    """
    score = sign * np.array([row["each"][judge] for row in rows])                 # (rows, n)
    best = int(score[:, ::2].mean(1).argmax())
    later = range(best + 1, len(rows))
    p_values = []
    for k in later:
        fall = score[best, 1::2] - score[k, 1::2]
        error = fall.std(ddof=1) / math.sqrt(len(fall))
        p_values.append(0.5 * math.erfc(fall.mean() / max(error, 1e-12) / math.sqrt(2)))
    for k, lower in zip(later, holm(p_values, 0.05 / len(JUDGES))):
        if lower and rows[k]["proxy"] >= rows[best]["proxy"]:
            return rows[best], rows[k]
    return rows[best], None


def standardise(rows: list[dict], base: dict) -> None:
    """Adds to each row NAME_sd: how far the mean of each judge, and of the reward ("proxy"), has
    moved from the base model's, in standard deviations of the base model's samples; and the error
    or interval of that mean in the same unit."""
    for name in ("proxy", *JUDGES):
        mean, std = base[name], max(base[f"{name}_se"] * math.sqrt(base["n"]), 1e-12)
        for row in rows:
            row[f"{name}_sd"] = (row[name] - mean) / std
            if f"{name}_se" in row:
                row[f"{name}_sd_se"] = row[f"{name}_se"] / std
            if f"{name}_interval" in row:
                row[f"{name}_sd_interval"] = [(x - mean) / std for x in row[f"{name}_interval"]]


def preferred(rows: list[dict], sign: int = 1, keep: float = 0.8) -> tuple[dict, str]:
    """rows by rising KL, the base model first -> the preferred checkpoint, and why: of those that
    keep the share `keep` of the base model's distinct-2, the one that the outside judges like best,
    in standard deviations, on average."""
    def liked(row):
        return sign * sum(row[f"{judge}_sd"] for judge in OUTSIDE) / len(OUTSIDE)

    def kept(row):
        return row.get("distinct_2", 1) / rows[0].get("distinct_2", 1)
    varied = [row for row in rows if kept(row) >= keep]
    row = max(varied, key=liked)
    variety = (f"{len(varied)} of {len(rows)} policies keep at least {keep:.0%} of the base "
               f"model's distinct-2 (this one {kept(row):.0%}); of these "
               if "distinct_2" in row else "")
    return row, (f"Preferred: {row['name']}, {row['kl']:.2f} nats: {variety}AFINN and Pattern, "
                 f"which taught nothing, like it best, by {liked(row):+.2f} standard deviations of "
                 f"the base model's samples on average (the reward: {row['proxy_sd']:+.2f}).")


def summary(rows: list[dict], over: dict[str, list[str]]) -> str:
    """In words: what the run towards happy has come to. over: judge -> the policy it likes best and
    the first later one that it finds worse."""
    first, last = rows[0], rows[-1]
    falls = [f"{JUDGES[judge]} finds {worse} worse than {best}, though its reward is not: "
             "over-optimisation." for judge, (best, worse) in over.items()]
    turn = " ".join(falls) or "No judge falls significantly: no over-optimisation was found."
    moved = ", ".join(f"{name} {last[key + '_sd']:+.2f}"
                      for key, name in ({"proxy": "reward"} | JUDGES).items())
    return (f"VADER calls {first['positive']:.1%} of the base model's samples positive, and "
            f"{last['positive']:.1%} of the final policy's, {last['kl']:.2f} nats per completion "
            f"away. In standard deviations of the base: {moved}. {turn}")


def conclusions(results: dict) -> dict:
    """results: what 05_eval.py measured -> what it says. Adds NAME_sd to the rows of "happy", "sad"
    (the base model first in both) and "best_of_n"."""
    run = [row for row in results["ppo"] if not row.get("taken_back")]
    sqrt_kl = [math.sqrt(max(row["kl"], 0)) for row in run]
    slope, intercept, r2 = fit_line([row["updates"] for row in run], sqrt_kl)
    found = {"sqrt_kl_fit": {"slope": slope, "intercept": intercept, "r2": r2}}
    for target, sign in (("happy", 1), ("sad", -1)):
        if target in results:
            standardise(results[target], results[target][0])
            by_kl = sorted(results[target], key=lambda row: row["kl"])
            best, because = preferred(by_kl, sign)
            over = {}
            for judge in JUDGES:
                liked, worse = over_optimisation(by_kl, judge, sign)
                if worse:
                    over[judge] = [liked["name"], worse["name"]]
            found[f"preferred_{target}"] = best["name"]
            found[f"over_{target}"] = over
            if target == "happy":
                found["summary"] = summary(results["happy"], over)
                found["preferred_because"] = because
    standardise(results["best_of_n"], results["happy"][0])
    first, *_, last = results["happy"]
    fallen = risen_words(last["words"], first["words"])  # before and after exchanged
    return found | {
        "risen_words": risen_words(first["words"], last["words"]),
        "fallen_words": [row | {"before": row["after"], "after": row["before"]} for row in fallen]}
