"""The run in a sentence, and in four: what was done, gained, paid, and what to distrust."""
import math

from report.findings import JUDGES


def headline(rows: list[dict]) -> str:
    """rows: the policies towards happy, the base model first."""
    first, last = rows[0], rows[-1]
    return (f"A small model of Shakespeare was trained by PPO to please a reward model of "
            f"happiness: VADER, a lexicon of sentiment, calls {100 * first['positive']:.1f} % "
            f"of its samples positive before and {100 * last['positive']:.1f} % after.")


def done(rows: list[dict], ppo: list[dict]) -> str:
    last = rows[-1]
    times = float(f"{math.exp(last['kl']):.1g}")
    return ("A language model, pretrained on Shakespeare, wrote samples that were labelled happy "
            "or sad; a copy of it, the reward model, learned to predict these labels; and PPO "
            f"changed the language model in {ppo[-1]['updates']} steps to write what the reward "
            f"model calls happy. The distance from the base model is the KL divergence: "
            f"{last['kl']:.1f} nats at the end, so a text of the final policy is typically some "
            f"{times:,.0f} times (e to the {last['kl']:.1f}) as probable there as in the base "
            "model.")


def gained(rows: list[dict]) -> str:
    last = rows[-1]
    moved = ", ".join(f"{name} {last[key + '_sd']:+.2f}"
                      for key, name in ({"proxy": "reward"} | JUDGES).items())
    return (f"The mean of the final policy's samples lies above that of the base model's by, in "
            f"standard deviations of the base model's samples: {moved}. AFINN and Pattern are "
            "lexicons of other makes that taught nothing, so their word counts for more.")


def paid(rows: list[dict], best_of_n: list[dict], risen: list[dict]) -> str:
    first, last = rows[0], rows[-1]
    parts = []
    if "distinct_2" in first and "distinct_2" in last:
        parts.append(f"Variety: of the pairs of neighbouring words in a text of 4,000, "
                     f"{100 * first['distinct_2']:.0f} % were distinct before, "
                     f"{100 * last['distinct_2']:.0f} % after.")
    kind = ", ".join("“{word}” {before:.1f} to {after:.1f}".format(**row) for row in risen[:3])
    parts.append(f"The words that rose most, of 1,000: {kind}.")
    equal = [row for row in best_of_n if row["proxy"] >= last["proxy"]]
    if equal:
        parts.append("For the reward alone no training was needed: to write "
                     f"{equal[0]['n']} samples with the base model and keep the best gives as much "
                     f"of it, at {equal[0]['kl']:.1f} nats or less.")
    else:
        parts.append(f"No best of up to {best_of_n[-1]['n']} samples of the base model has as high "
                     "a reward.")
    return " ".join(parts)


def distrust(rows: list[dict], over: dict[str, list[str]], ratings: list[dict]) -> str:
    first, last = rows[0], rows[-1]
    aucs = ["{:.2f} [{:.2f}, {:.2f}]".format(row["rm_auc"], *row["rm_auc_interval"])
            for row in (first, last)]
    falls = [f"{JUDGES[judge]} finds {worse} worse than {best} though its reward is not: the "
             "reward is over-optimised." for judge, (best, worse) in over.items()]
    people = "" if ratings else " No person has judged these samples blind."
    return ("Where VADER made the labels, as it does by default, its praise is what was trained "
            "for. The reward model errs: the chance that it puts a sample VADER calls positive "
            f"above one VADER calls negative (AUC) is {aucs[0]} in the base model's samples, "
            f"{aucs[1]} in the final policy's. "
            + (" ".join(falls) or "None of the three judges falls from one checkpoint to a later "
               "one by more than chance, so no over-optimisation was found.")
            + " Happier words need not make a happier scene, or sense: read the samples." + people
            + " All intervals are of the samples of this one run, not of other seeds.")


def in_short(results: dict) -> dict[str, str]:
    rows = results["happy"]
    return {"What was done": done(rows, results["ppo"]), "What was gained": gained(rows),
            "What it cost": paid(rows, results["best_of_n"], results["risen_words"]),
            "What to distrust": distrust(rows, results["over_happy"], results["ratings"])}
