import importlib
import itertools
import math
import random
import re

import numpy as np
import pytest
from afinn import Afinn

from people import ratings

ev = importlib.import_module("05_eval")


def test_distinct_and_self_similarity():
    assert (ev.distinct(["a b a", "a b"], 1, n_words=5) == 2 / 5
            and ev.distinct(["a b a", "a b"], 2, n_words=5) == 2 / 3)
    assert ev.distinct(["a b a", "a", "c d", "e f", "g"], 1,
                       n_words=4) == (2 / 4 + 4 / 4) / 2  # two runs of four words
    assert ev.variety(["too few"]) == {}
    assert math.isclose(ev.self_similarity(["a b", "a b"]), 1, rel_tol=1e-6)
    assert abs(ev.self_similarity(["a", "b"])) < 1e-6 and ev.self_similarity(["a", "b", "?"]) == 0
    assert math.isclose(ev.self_similarity(["a b", "a c"]), 0.5, rel_tol=1e-6)


def test_longest_copied_run_against_substring_search():
    rng = np.random.default_rng(0)
    alphabet = np.array(["ay", "be", "cee", "dee", "ee"])
    corpus = " ".join(alphabet[rng.integers(0, 4, 400)])
    texts = [" ".join(alphabet[rng.integers(0, 5, 12)]) for _ in range(40)] + [
        "", "never", corpus[:200]]

    def brute(text):
        w = text.split()
        runs = (n for n in range(len(w), 0, -1) for i in range(len(w) - n + 1)
                if f" {' '.join(w[i:i + n])} " in f" {corpus} ")
        return next(runs, 0)
    expected = [brute(t) for t in texts[:-1]]
    assert ev.copied_runs(texts[:-1], corpus).tolist() == expected and max(expected) > 3
    assert ev.copied_runs([texts[-1]], corpus)[0] >= len(texts[-1].split()) - 1
    assert ev.copied_runs([corpus], corpus).tolist() == [400]


def test_best_of_n_by_enumerating_subsets():
    proxy, gold = np.array([0.3, -1.0, 2.0, 0.5, 0.1]), np.array([1.0, 5.0, -2.0, 0.0, 3.0])
    order = np.argsort(proxy)
    for n in range(1, 6):
        best = [gold[max(s, key=lambda i: proxy[i])] for s in itertools.combinations(range(5), n)]
        assert math.isclose(ev.best_of_n_weights(5, n) @ gold[order], np.mean(best), abs_tol=1e-9)
    rows = ev.best_of_n(proxy, {"proxy": proxy, "gold": gold}, ["a"] * 5)
    assert [r["n"] for r in rows] == [1, 2, 4] and rows[0]["gold"] == pytest.approx(gold.mean())
    low, high = rows[0]["gold_interval"]  # each resample's mean lies between the extremes
    assert -2 < low < gold.mean() < high < 5 and "distinct_2" not in rows[0]
    assert math.isclose(ev.best_of_n_kl(4), 0.636, abs_tol=1e-3) and ev.best_of_n_kl(1) == 0


def test_fisher_and_its_power():
    """The lady tasting tea: 3 of 4 against 1 of 4 gives p = 17/70. Then the power of 20 v 20."""
    assert math.isclose(ratings.fisher_exact(1, 4, 3, 4), 17 / 70)
    assert math.isclose(ratings.fisher_exact(0, 4, 4, 4), 1 / 70)
    assert (abs(ratings.fisher_power(0.2, 0.6, 20) - 0.75) < 0.02
            and abs(ratings.fisher_power(0.3, 0.6, 20) - 0.46) < 0.02)
    assert ratings.fisher_power(0.5, 0.5, 20) < 0.05


def test_risen_words():
    risen = ev.risen_words(["woe the woe, woe", "the woe the woe the woe"],
                           ["joy the woe joy the"] * 2 + ["Joy the joy the"] * 2 + ["joy joy"])[:2]
    assert risen == [{"word": "joy", "before": 0.0, "after": 500.0},
                     {"word": "the", "before": 400.0, "after": 400.0}]


def test_holm_by_hand():
    """Holm 1979: 0.01 <= 0.05/4 passes. 0.02 > 0.05/3 fails, and so do all that are larger."""
    assert ev.holm([0.04, 0.01, 0.03, 0.02]) == [False, True, False, False]
    assert ev.holm([0.04, 0.01, 0.012, 0.02]) == [True, True, True, True]
    assert ev.holm([]) == []


def simulated(rng, means, n=1024, sd=0.5, correlation=0.3):
    """Checkpoints whose samples share part of their noise. The reward rises at each one."""
    shared = rng.normal(size=n)
    return [{"each": {"vader": m + sd * (correlation**0.5 * shared
                                         + (1 - correlation)**0.5 * rng.normal(size=n))},
             "proxy": k} for k, m in enumerate(means)]


def test_where_over_optimisation_starts():
    rng = np.random.default_rng(0)
    rows = simulated(rng, [0, 0.5, 0.9, 0.85, 0.5])
    best, over = ev.over_optimisation(rows, "vader")
    assert best is rows[2] and any(over is row for row in rows[3:])
    rows = simulated(rng, [0.9, 0.2])
    best, over = ev.over_optimisation(rows, "vader")
    assert best is rows[0] and over is rows[1]
    best, over = ev.over_optimisation(rows, "vader", sign=-1)
    assert best is rows[1] and over is None
    rows[1]["proxy"] = -1  # the reward falls as well, so this is no over-optimisation
    assert ev.over_optimisation(rows, "vader")[1] is None


def test_the_rate_of_false_alarms_and_the_power():
    """With flat scores over 12 checkpoints, at most 5% of runs give a false alarm (comparing each
    with the overall maximum gave 45%). A known fall is found as often as the docstring says."""
    rng, runs = np.random.default_rng(1), 1000

    def found(fall):
        return sum(ev.over_optimisation(simulated(rng, [0.5] * 11 + [0.5 - fall]), "vader")[1]
                   is not None for _ in range(runs)) / runs
    flat, *power = [found(fall) for fall in (0, 0.05, 0.075, 0.1)]
    assert flat <= 0.05 / 3 + 0.01 and power == sorted(power)  # 5% / 3 judges + 3 standard errors
    said = re.search(r"in (\S+)% where the score is flat; falls by 0.05, 0.075 and 0.1 at "
                     r"the last checkpoint are found in (\S+)%, (\S+)% and (\S+)%",
                     " ".join(ev.over_optimisation.__doc__.split()))
    assert [100 * x for x in (flat, *power)] == pytest.approx(
        [float(x) for x in said.groups()], abs=0.5)


def policy(name, kl, proxy, afinn, pattern, distinct):
    return {"name": name, "kl": kl, "proxy": proxy, "proxy_se": 0.1, "vader": 0.0, "vader_se": 0.1,
            "afinn": afinn, "afinn_se": 0.2, "pattern": pattern, "pattern_se": 0.1,
            "distinct_2": distinct, "n": 100}


def test_the_preferred_policy_is_liked_by_the_outside_judges_and_varied():
    """In the base's standard deviations (AFINN: 2). The most liked policy has lost its variety."""
    rows = [policy("base", 0, -1, 0, 0, 0.9), policy("a", 2, -0.5, 1, 0.5, 0.8),
            policy("b", 5, -0.2, 3, 1, 0.73), policy("c", 9, -0.1, 6, 2, 0.7)]
    ev.standardise(rows, rows[0])
    assert ([row["afinn_sd"] for row in rows] == [0, 0.5, 1.5, 3]
            and rows[3]["proxy_sd"] == pytest.approx(0.9))
    best, because = ev.preferred(rows)
    assert (best is rows[2] and "3 of 4 policies keep at least 80%" in because
            and "+1.25 standard deviations" in because)
    assert ev.preferred(rows, keep=0.5)[0] is rows[3] and ev.preferred(rows, sign=-1)[0] is rows[0]
    del rows[2]["distinct_2"]  # too few words are left to measure it
    assert ev.preferred(rows)[0] is rows[1]


def test_a_skipped_item_is_not_an_answer():
    """Guards against a skip that counts as not positive: 3 items with 1 skipped are 2 answers."""
    arms = {"1": "base", "2": "base", "3": "base", "4": "happy", "5": "happy", "6": "happy"}
    key = {"arms": arms, "policies": {"happy": {"name": "p"}}}
    answers = dict(zip(arms, ["positive", "skip", "neutral", "positive", "positive", "skip"]))
    row, = ratings.compare_arms(key, {"anna": answers})
    assert (row["base"], row["of_base"], row["other"], row["of_other"]) == (1, 2, 2, 2)
    assert (row["p"] == ratings.fisher_exact(1, 2, 2, 2)
            and row["difference_interval"][0] < 0.5 < row["difference_interval"][1])
    bo = dict(zip(arms, ["skip", "skip", "positive", "neutral", "positive", "positive"]))
    majority = ratings.compare_arms(key, {"anna": answers, "bo": bo})[-1]
    assert [majority[k] for k in ("base", "of_base", "other", "of_other")] == [1, 2, 2, 3]


def test_the_quick_afinn_finds_what_afinn_finds():
    """Guards against a regex in which a short word wins over a longer one or over a phrase such as
    "can't stand". Tries all known words in a row, and words that only begin like a known one."""
    slow, quick, rng = Afinn(), ev.QuickAfinn(), random.Random(0)
    known = [*slow._dict]
    texts = [" ".join(known), " ".join(reversed(known)), "-".join(known),
             "It does not  work; I can't\nstand GOOD good's goods"]
    texts += [" ".join(w[:rng.randint(1, len(w))] for w in rng.choices(known, k=60))
              for _ in range(50)]
    assert all(slow.find_all(x) == quick.find_all(x) for x in texts)
    assert ([slow.score(x) for x in texts] == [quick.score(x) for x in texts]
            and len(quick.find_all(texts[0])) > 3000)


def test_three_judges():
    """VADER and Pattern score in [-1, 1]. AFINN sums the valences of words (love 3, hate -3)."""
    judged = ev.judge(["I love this love", "hate", "the"])
    assert judged["afinn"].tolist() == [6, -3, 0]
    for name in ("vader", "pattern"):
        assert 0 < judged[name][0] <= 1 and -1 <= judged[name][1] < 0 == judged[name][2]
