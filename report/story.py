"""Tell the run in a headline and four paragraphs: done, gained, paid, and what to distrust."""
import importlib
import math

JUDGES = importlib.import_module("05_eval").JUDGES


def headline(rows: list[dict]) -> str:
    """Say in three sentences what was trained and what VADER makes of it. rows: the policies
    towards happy, the base model first."""
    first, last = rows[0], rows[-1]
    return ("PPO, a reinforcement learning algorithm, taught a small model of Shakespeare to "
            "please a reward model. The reward model had learned to tell happy samples from sad "
            "ones. VADER, a lexicon that scores sentiment, calls "
            f"{100 * first['positive']:.1f}% of the small model's samples positive before PPO and "
            f"{100 * last['positive']:.1f}% after.")


def done(rows: list[dict], ppo: list[dict], shipped_base: bool) -> str:
    """Tell what each stage did, and how far the final policy went."""
    last = rows[-1]
    updates = [row for row in ppo if "clip_fraction" in row]  # without a policy that went too far
    times = float(f"{math.exp(last['kl']):.2g}")
    whose = "shipped with the project" if shipped_base else "trained by 01_pretrain.py"
    return (f"The base model, a language model of Shakespeare ({whose}), wrote samples that were "
            "labelled happy or sad. A copy of it, the reward model, learned to predict these "
            f"labels. PPO then trained the language model for {updates[-1]['updates']} steps to "
            "write what the reward model calls happy. The model in training is called the policy. "
            "Its distance from the base model is the KL divergence, and the unit is the nat. At "
            f"the end it is {last['kl']:.1f} nats: the final policy finds its own texts about "
            f"{times:,.0f} (e to the {last['kl']:.1f}) times as probable as the base model does, "
            "in geometric mean.")


def gained(rows: list[dict]) -> str:
    """Say how far the mean of each judge moved."""
    last = rows[-1]
    moved = ", ".join(f"{name} {last[key + '_sd']:+.2f}"
                      for key, name in ({"proxy": "reward"} | JUDGES).items())
    return ("Compare the final policy's samples with the base model's. The mean scores moved by "
            f"these amounts, in standard deviations of the base model's samples: {moved}. The "
            "scales differ: the reward (log p(happy)), VADER and Pattern are bounded, while AFINN "
            "is a sum over words. AFINN and Pattern are independent lexicons that were never used "
            "for labels, so they are the better witnesses.")


def paid(rows: list[dict], best_of_n: list[dict], risen: list[dict]) -> str:
    """Say how variety and words changed, and whether best-of-n does as well without training."""
    first, last = rows[0], rows[-1]
    parts = []
    if "distinct_2" in first and "distinct_2" in last:
        parts.append("Variety: distinct-2 is the share of pairs of neighbouring words that are "
                     f"distinct, in texts of 4,000 words. It was {100 * first['distinct_2']:.0f}% "
                     f"before and is {100 * last['distinct_2']:.0f}% after.")
    kind = ", ".join("“{word}” from {before:.1f} to {after:.1f}".format(**row)
                     for row in risen[:3])
    parts.append(f"The words that rose most, per 1,000 words: {kind}.")
    equal = [row for row in best_of_n if row["proxy"] >= last["proxy"]]
    if equal:
        parts.append("You get this reward without training: keep the best of "
                     f"{equal[0]['n']} samples of the base model, and the mean reward is at least "
                     f"as high. That costs no more than {equal[0]['kl']:.1f} nats.")
    else:
        parts.append("Best-of-n from the base model does not reach this reward, even with "
                     f"n = {best_of_n[-1]['n']}.")
    best = best_of_n[-1]
    near = min(rows, key=lambda row: abs(row["kl"] - best["kl"]))
    parts.append(f"By AFINN the best of {best['n']}, at {best['kl']:.1f} nats, gains "
                 f"{best['afinn_sd']:+.2f} standard deviations. The policy at {near['kl']:.1f} "
                 f"nats gains {near['afinn_sd']:+.2f}.")
    return " ".join(parts)


def distrust(results: dict) -> str:
    """Say where the figures may mislead: the labeller, the reward model, the judges, one run."""
    shown = [("base model", results["happy"][0]), ("final policy", results["happy"][-1])]
    if "sad" in results:
        shown.append(("policy towards sad", results["sad"][-1]))
    aucs = ", ".join("{:.2f} [{:.2f}, {:.2f}] on samples of the {}".format(
        row["rm_auc"], *row["rm_auc_interval"], whose) for whose, row in shown)
    held_out = results["reward_model"]["all"]
    words = ("On held-out samples a bag of words, which ignores word order, does better "
             "({bag_of_words_auc:.2f} against {auc:.2f}). ".format(**held_out)
             if held_out["auc_lead_interval"][1] < 0 else "")
    falls = [f"{JUDGES[judge]} finds {worse} worse than {best}, although its reward is no lower: "
             "this reward is over-optimised."
             for judge, (best, worse) in results["over_happy"].items()]
    people = "" if results["ratings"] else " No person has judged these samples blind."
    return ("By default VADER makes the labels, so the policy is trained for VADER's praise, and "
            "that praise proves little. The reward model makes mistakes. AUC is the chance that it "
            "ranks a sample that VADER calls positive above one that VADER calls negative: "
            f"{aucs} (95% intervals). {words}Over-optimisation would mean that a judge's mean "
            "falls while the reward does not. "
            + (" ".join(falls) or "None was found: no judge's mean falls from one checkpoint to a "
               "later one by more than chance.")
            + " Happier words need not make a happier scene, or even sense: read the samples."
            + people + " All intervals describe the samples of this one run, not other seeds.")


def in_short(results: dict) -> dict[str, str]:
    """Write the four paragraphs -> title -> text."""
    rows = results["happy"]
    return {"What was done": done(rows, results["ppo"], results["shipped_base"]),
            "What was gained": gained(rows),
            "What it cost": paid(rows, results["best_of_n"], results["risen_words"]),
            "What to distrust": distrust(results)}
