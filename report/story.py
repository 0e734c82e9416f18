"""The run in a sentence, and in four: what was done, gained, paid, and what to distrust."""
import importlib
import math

JUDGES = importlib.import_module("05_eval").JUDGES


def headline(rows: list[dict]) -> str:
    """rows: the policies towards happy, the base model first."""
    first, last = rows[0], rows[-1]
    return ("A small model of Shakespeare was trained by PPO to please a reward model, which had "
            "learned to tell happy samples from sad ones. VADER, a lexicon of sentiment, calls "
            f"{100 * first['positive']:.1f}% of its samples positive before and "
            f"{100 * last['positive']:.1f}% after.")


def done(rows: list[dict], ppo: list[dict], shipped_base: bool) -> str:
    last = rows[-1]
    updates = [row for row in ppo if "clip_fraction" in row]  # not of a policy that went too far
    times = float(f"{math.exp(last['kl']):.2g}")
    whose = "the base model that the project ships" if shipped_base else "trained by 01_pretrain.py"
    return (f"A language model of Shakespeare ({whose}) wrote samples that were labelled happy "
            "or sad; a copy of it, the reward model, learned to predict these labels; and PPO "
            f"changed the language model in {updates[-1]['updates']} steps to write what the "
            f"reward model calls happy. The distance from the base model is the KL divergence: "
            f"{last['kl']:.1f} nats at the end, so the texts of the final policy are, in geometric "
            f"mean, e to the {last['kl']:.1f} or some {times:,.0f} times as probable there as in "
            "the base model.")


def gained(rows: list[dict]) -> str:
    last = rows[-1]
    moved = ", ".join(f"{name} {last[key + '_sd']:+.2f}"
                      for key, name in ({"proxy": "reward"} | JUDGES).items())
    return (f"The mean of the final policy's samples lies above the base model's by, in standard "
            f"deviations of the base model's samples: {moved}. The scales differ: log p(happy), "
            "VADER and Pattern are bounded, AFINN is a sum over words. AFINN and Pattern are "
            "lexicons of other makes that taught nothing, so they are the better witnesses.")


def paid(rows: list[dict], best_of_n: list[dict], risen: list[dict]) -> str:
    first, last = rows[0], rows[-1]
    parts = []
    if "distinct_2" in first and "distinct_2" in last:
        parts.append(f"Variety: of the pairs of neighbouring words in a text of 4,000, "
                     f"{100 * first['distinct_2']:.0f}% were distinct before, "
                     f"{100 * last['distinct_2']:.0f}% after.")
    kind = ", ".join("“{word}” {before:.1f} to {after:.1f}".format(**row) for row in risen[:3])
    parts.append(f"The words that rose most, of 1,000: {kind}.")
    equal = [row for row in best_of_n if row["proxy"] >= last["proxy"]]
    if equal:
        parts.append(f"Training was not needed for the reward: the best of {equal[0]['n']} samples "
                     f"of the base model has as much, at no more than {equal[0]['kl']:.1f} nats.")
    else:
        parts.append(f"No best of up to {best_of_n[-1]['n']} samples of the base model has as high "
                     "a reward.")
    best = best_of_n[-1]
    near = min(rows, key=lambda row: abs(row["kl"] - best["kl"]))
    parts.append(f"By AFINN the best of {best['n']}, at {best['kl']:.1f} nats, has "
                 f"{best['afinn_sd']:+.2f}, the policy at {near['kl']:.1f} nats "
                 f"{near['afinn_sd']:+.2f}.")
    return " ".join(parts)


def distrust(results: dict) -> str:
    shown = [("base model", results["happy"][0]), ("final policy", results["happy"][-1])]
    if "sad" in results:
        shown.append(("policy towards sad", results["sad"][-1]))
    aucs = "; ".join("{:.2f} [{:.2f}, {:.2f}] in samples of the {}".format(
        row["rm_auc"], *row["rm_auc_interval"], whose) for whose, row in shown)
    held_out = results["reward_model"]["all"]
    words = ("In held-out samples a bag of words does better ({bag_of_words_auc:.2f} against "
             "{auc:.2f}). ".format(**held_out) if held_out["auc_lead_interval"][1] < 0 else "")
    falls = [f"{JUDGES[judge]} finds {worse} worse than {best} though its reward is not: the "
             "reward is over-optimised." for judge, (best, worse) in results["over_happy"].items()]
    people = "" if results["ratings"] else " No person has judged these samples blind."
    return ("If VADER made the labels, as it does by default, its praise is what was trained for. "
            "The reward model errs: the chance that it puts a sample VADER calls positive above "
            f"one VADER calls negative (AUC) is {aucs}. {words}"
            + (" ".join(falls) or "No judge's mean falls from one checkpoint to a later one by "
               "more than chance, so no over-optimisation was found.")
            + " Happier words need not make a happier scene, or sense: read the samples." + people
            + " All intervals are of the samples of this one run, not of other seeds.")


def in_short(results: dict) -> dict[str, str]:
    rows = results["happy"]
    return {"What was done": done(rows, results["ppo"], results["shipped_base"]),
            "What was gained": gained(rows),
            "What it cost": paid(rows, results["best_of_n"], results["risen_words"]),
            "What to distrust": distrust(results)}
