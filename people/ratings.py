"""The blind test asks raters whether a policy expresses its feeling more often than the base model.

A rater sees numbered samples in random order. Only out/key-*.json says which model wrote which, and
nobody sees a result before that rater has finished.
"""
import hashlib
import importlib
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binom, binomtest
from scipy.stats import fisher_exact as fisher_test
from tokenizers import Tokenizer

from model import (
    GPT,
    as_json,
    command,
    decode_prompts,
    draw_prompts,
    fast_dtype,
    fingerprint,
    load,
    read_json,
    read_prompts,
    require,
    write,
)
from people.agreement import print_agreement
from people.answers import answers_in, is_item

ev = importlib.import_module("05_eval")


# ---- Samples to rate -----------------------------------------------------------------------------
def preferred(out: Path) -> Path:
    """Find the happy policy that the report prefers. Take the final one if there is no report on
    this run of 04, or if the report prefers the base model."""
    final, report = out / "policy-happy.safetensors", out / "report.json"
    fresh = report.exists() and final.exists() and report.stat().st_mtime >= final.stat().st_mtime
    if not fresh:
        return final
    name = read_json(report, "05_eval.py", lambda r: isinstance(r, dict)).get("preferred_happy")
    path = out / "checkpoints" / f"{name}.safetensors"
    return path if path.exists() else final


def load_arms(out: Path, policy: Path | None) -> tuple[dict[str, GPT], dict, Tokenizer, dict]:
    """Load the models to rate. policy: the happy one; None means the one that the report prefers.

    Returns the models by name ("base", "happy", and "sad" if there is one), the name and
    fingerprint of each policy, the tokenizer, and the reward model's header. Raises UserError if
    the policy does not belong to this run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = fast_dtype(device)
    base, _, tokenizer, about = ev.load_run(out, device, dtype)
    path = policy or preferred(out)
    happy, _, header = load(path, "04_ppo.py", device, dtype)
    policies = {"happy": happy}
    require("target" in header["settings"], f"{path} is not a policy: name a checkpoint of 04")
    require(header.get("inputs") == about["made_from"],
            f"{path} was made from another base model or reward model: run {command('04_ppo.py')} "
            "again")
    if (out / "policy-sad.safetensors").exists():
        sad, _, about_sad = load(out / "policy-sad.safetensors", "04_ppo.py", device, dtype)
        policies |= {"sad": sad} if about_sad.get("inputs") == about["made_from"] else {}
    require(path.resolve().parent in (out.resolve(), (out / "checkpoints").resolve()),
            f"{path} is not in the folder of this run: copy it into {out / 'checkpoints'}")
    require(header["settings"]["target"] == "happy", f"{path} is not a policy towards happy")
    names = {"happy": path.stem, "sad": "policy-sad"}
    described = {target: {"name": names[target], "fingerprint": fingerprint(policy)}
                 for target, policy in policies.items()}
    return {"base": base, **policies}, described, tokenizer, about


def items_to_rate(out: Path, n: int, seed: int, policy: Path | None) -> tuple[list[dict], Path]:
    """Draw n samples of each model, shuffle them, and write the key -> the items, and the path of
    the key. All models get the same prompts, if there are prompts."""
    require(0 <= seed < 2**31, "--seed must be in [0, 2^31)")
    arms, policies, tokenizer, about = load_arms(out, policy)
    prompts = None
    if about["prompted"]:
        prompts = read_prompts(out / "prompts.json", "held_out", arms["base"].n_text)
    stream = seed << 32 | 5 << 24
    prompt = draw_prompts(prompts, n, stream)                                   # (n, P)
    mixed = []
    for k, (arm, model) in enumerate(arms.items()):
        y, _ = model.generate(n, about["length"], stream + 1 + k, prompts=prompt)
        texts = tokenizer.decode_batch(y.tolist())
        for text, given in zip(texts, decode_prompts(tokenizer, prompt)):
            mixed.append((arm, {"text": text, "prompt": given} if given else {"text": text}))
    # the policy is part of the seed, so one key reveals nothing about another
    g = torch.Generator().manual_seed(int(policies["happy"]["fingerprint"][:15], 16) ^ stream)
    mixed = [mixed[i] for i in torch.randperm(len(mixed), generator=g).tolist()]
    series = hashlib.sha256(json.dumps(mixed).encode()).hexdigest()[:16]
    items = [{"id": f"{series}-{place}"} | shown for place, (_, shown) in enumerate(mixed)]
    arm_of = {item["id"]: arm for item, (arm, _) in zip(items, mixed)}
    key = out / f"key-{series}.json"
    write(key, json.dumps({"items": items, "arms": arm_of, "policies": policies}))
    return items, key


# ---- Results -------------------------------------------------------------------------------------
def newcombe(a: int, n: int, b: int, m: int) -> tuple[float, float]:
    """Compute a 95% interval of the difference of two fractions, b / m - a / n, from their Wilson
    intervals (Newcombe 1998, Statistics in Medicine 17:873, method 10)."""
    if not n or not m:
        return float("nan"), float("nan")
    low_a, high_a = binomtest(a, n).proportion_ci(method="wilson")
    low_b, high_b = binomtest(b, m).proportion_ci(method="wilson")
    p, q = a / n, b / m
    return q - p - math.hypot(q - low_b, high_a - p), q - p + math.hypot(high_b - q, p - low_a)


def fisher_exact(a: int, n: int, b: int, m: int) -> float:
    """Test whether b of m is a higher fraction than a of n -> one-sided p-value (Fisher 1935)."""
    return float(fisher_test([[b, m - b], [a, n - a]], "greater").pvalue)


def fisher_power(p: float, q: float, n: int, level: float = 0.05) -> float:
    """Compute the chance that n ratings against n reach significance at `level`, if the true
    fractions are p and q."""
    every = range(n + 1)
    chance = np.outer(binom.pmf(every, n, p), binom.pmf(every, n, q))              # (n + 1, n + 1)
    reached = [[fisher_exact(a, n, b, n) < level for b in every] for a in every]
    return float(chance[reached].sum())


def compare_arms(key: dict, given: dict[str, dict[str, str]]) -> list[dict]:
    """Compare how often each policy and the base model express the feeling, skipped items left out.

    key: from `items_to_rate`; given: rater -> id -> label. Returns a row for each rater, and one
    for the majority if there are several: counts, 95% interval of the difference, p-value.
    """
    arm_of = key["arms"]
    if len(given) > 1:  # adding up raters would count one sample several times
        majority = {}
        for i in arm_of:
            votes = Counter(answers[i] for answers in given.values() if answers[i] != "skip")
            label, most = votes.most_common(1)[0] if votes else ("skip", 1)
            majority[i] = label if 2 * most > votes.total() else "none"
        given = given | {"majority": majority}
    results = []
    for rater, answers in given.items():
        judged = Counter(arm for i, arm in arm_of.items() if answers[i] != "skip")
        for arm, feeling in (("happy", "positive"), ("sad", "negative")):
            if arm not in arm_of.values():
                continue
            felt = Counter(arm_of[i] for i in arm_of if answers[i] == feeling)
            counts = felt["base"], judged["base"], felt[arm], judged[arm]
            results.append({
                "rater": rater, "arm": arm, "policy": key["policies"][arm]["name"],
                "feeling": feeling, "base": felt["base"], "of_base": judged["base"],
                "other": felt[arm], "of_other": judged[arm],
                "difference_interval": newcombe(*counts), "p": fisher_exact(*counts)})
    return results


def is_key(key) -> bool:
    """Say whether this is what `items_to_rate` wrote. May raise KeyError or TypeError."""
    return (all(policy["fingerprint"] + policy["name"] for policy in key["policies"].values())
            and all(map(is_item, key["items"]))
            and {item["id"] for item in key["items"]} == key["arms"].keys()
            and {*key["arms"].values()} <= {"base", *key["policies"]})


def keys_of(out: Path) -> list[dict]:
    """Read the keys whose policies are all in `out`. Raises UserError if no key is left."""
    about = ev.load_run(out, "cpu", torch.float32)[3]
    paths = [*out.glob("policy-*.safetensors"), *(out / "checkpoints").glob("*.safetensors")]
    there = [load(path, "04_ppo.py") for path in paths]
    known = {fingerprint(model) for model, _, header in there
             if header.get("inputs") == about["made_from"]}
    keys = [read_json(path, "-m people rate", is_key) for path in sorted(out.glob("key-*.json"))]
    keys = list({str(sorted(key["arms"])): key for key in keys}.values())  # a copy counts once
    keys = [key for key in keys
            if {policy["fingerprint"] for policy in key["policies"].values()} <= known]
    require(len(keys) > 0, f"{out}/key-*.json is missing, or belongs to other policies: run "
                           f"{command('-m people rate NAME')} first")
    return keys


def unblind(out: Path) -> None:
    """Print the results of all finished ratings of the present policies, and write them to
    out/ratings.json, which `python -m report` reads. Raises UserError if no key fits."""
    results, policies, sizes = [], {}, set()
    for key in keys_of(out):
        given = {}
        for rater, labels in answers_in(out, "ratings").items():
            answers = {i: label for i, label in labels.items() if i in key["arms"]}
            if len(answers) == len(key["arms"]):
                given[rater] = answers
            elif answers:
                print(f"{rater}: {len(answers)} of {len(key['arms'])} rated; the key stays hidden "
                      "until all are")
        results += compare_arms(key, given)
        if given:
            for policy in key["policies"].values():
                policies[policy["name"]] = policy["fingerprint"]
            sizes.add(Counter(key["arms"].values())["base"])
        print_agreement(given, key["items"])
    for r in results:
        low, high = (100 * x for x in r["difference_interval"])
        print("{rater}: {feeling} {base} of {of_base} base, {other} of {of_other} {arm} samples "
              "({policy}); difference {low:+.0f} to {high:+.0f} points (95%); Fisher's exact "
              "test, one-sided: p = {p:.2g}".format(low=low, high=high, **r))
    for n in sorted(sizes):
        powers = (f"from {p:.0%} to {q:.0%} in {fisher_power(p, q, n):.0%}"
                  for p, q in ((0.2, 0.6), (0.3, 0.6), (0.58, 0.96)))
        print(f"with {n} samples of each, such a test finds a rise {', '.join(powers)} of cases")
    if not results:
        return print(f"no rating is finished: run {command('-m people rate NAME')}")
    write(out / "ratings.json", as_json({"policies": policies, "results": results}))
    print(f"next: {command('-m report')}")
