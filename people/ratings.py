"""The blind test: does the policy express its feeling more often than the base model?

What is shown names an item by its place in a shuffled order alone. Which arm spoke stands in a file
of its own, out/key-*.json, and is read once a rater has finished.
"""
import hashlib
import json
import math
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model import (GPT, decode_prompts, draw_prompts, fingerprint, load_base_and_reward,
                   load_policies, read_prompts)
from people.agreement import print_agreement
from people.answers import read_answers
from running import fast_dtype, require, write


# ---- What is rated -------------------------------------------------------------------------------
def load_arms(out: Path) -> tuple[dict[str, GPT], dict[str, str], Tokenizer, dict]:
    """-> "base", "happy" and, if there is one, "sad" -> model; target -> fingerprint of the policy;
    tokenizer; the reward model's header."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = fast_dtype(device)
    base, _, tokenizer, about = load_base_and_reward(out, device, dtype)
    policies = load_policies(out, about["inputs"], device, dtype)
    fingerprints = {target: fingerprint(policy) for target, policy in policies.items()}
    return {"base": base, **policies}, fingerprints, tokenizer, about


def items_to_rate(out: Path, n: int, seed: int) -> tuple[list[dict], Path]:
    """n samples of each arm, after the same prompts if there are prompts, shuffled -> the items,
    and the key to them, which is written."""
    require(0 <= seed < 2**31, "--seed must be in [0, 2^31)")
    arms, policies, tokenizer, about = load_arms(out)
    prompts = read_prompts(out / "prompts.json", "held_out") if about["prompted"] else None
    stream = seed << 32 | 5 << 24
    prompt = draw_prompts(prompts, n, stream)                                   # (n, P)
    mixed = []
    for k, (arm, model) in enumerate(arms.items()):
        y, _ = model.generate(n, about["length"], stream + 1 + k, prompts=prompt)
        texts = tokenizer.decode_batch(y.tolist())
        for text, given in zip(texts, decode_prompts(tokenizer, prompt)):
            mixed.append((arm, {"text": text, "prompt": given} if given else {"text": text}))
    # seeded by the policy too: one key tells nothing of another
    g = torch.Generator().manual_seed(int(policies["happy"][:15], 16) ^ stream)
    mixed = [mixed[i] for i in torch.randperm(len(mixed), generator=g).tolist()]
    series = hashlib.sha256(json.dumps(mixed).encode()).hexdigest()[:16]
    items = [{"id": f"{series}-{place}"} | shown for place, (_, shown) in enumerate(mixed)]
    arm_of = {item["id"]: arm for item, (arm, _) in zip(items, mixed)}
    key = out / f"key-{series}.json"
    write(key, json.dumps({"items": items, "arms": arm_of, "policies": policies}))
    return items, key


# ---- What was rated ------------------------------------------------------------------------------
def fisher_exact(a: int, n: int, b: int, m: int) -> float:
    """One-sided p-value that b of m is a higher share than a of n by chance (Fisher 1935)."""
    total = a + b
    ways = (math.comb(m, k) * math.comb(n, total - k) for k in range(b, min(m, total) + 1)
            if total - k <= n)
    return sum(ways) / math.comb(n + m, total)


def fisher_power(p: float, q: float, n: int, level: float = 0.05) -> float:
    """Chance that n against n ratings reach p < level when the true shares are p and q."""
    def binomial(k, p):
        return math.comb(n, k) * p**k * (1 - p) ** (n - k)
    return sum(binomial(a, p) * binomial(b, q) for a in range(n + 1) for b in range(n + 1)
               if fisher_exact(a, n, b, n) < level)


def compare_arms(arm_of: dict[str, str], given: dict[str, dict[str, str]]) -> list[dict]:
    """arm_of: id -> arm; given: rater -> id -> label. -> for each rater, and for the majority of
    several, how often each arm against the base expresses its feeling, with test and power."""
    if len(given) > 1:  # summing over raters would count one sample several times
        majority = {}
        for i in arm_of:
            label, votes = Counter(answers[i] for answers in given.values()).most_common(1)[0]
            majority[i] = label if 2 * votes > len(given) else "none"
        given = given | {"majority": majority}
    results = []
    for rater, answers in given.items():
        for arm, feeling in (("happy", "positive"), ("sad", "negative")):
            if arm not in arm_of.values():
                continue
            felt = Counter(arm_of[i] for i in arm_of if answers[i] == feeling)
            n = Counter(arm_of.values())["base"]
            results.append({"rater": rater, "arm": arm, "feeling": feeling,
                            "base": felt["base"], "other": felt[arm], "n": n,
                            "p": fisher_exact(felt["base"], n, felt[arm], n),
                            "power": fisher_power(felt["base"] / n, felt[arm] / n, n)})
    return results


def unblind(out: Path) -> None:
    """Print the result of every finished rating of the present policies, and write
    out/ratings.json, which 05 puts into the report. Raises UserError if no key fits them."""
    _, policies, _, _ = load_arms(out)
    keys = [json.loads(path.read_text()) for path in sorted(out.glob("key-*.json"))]
    keys = [key for key in keys if key["policies"].items() <= policies.items()]
    require(len(keys) > 0, f"{out}/key-*.json is missing, or belongs to other policies: it is "
                           "written by `python -m people rate`, together with what is rated")
    results = []
    for key in keys:
        given = {}
        for path in sorted(out.glob("ratings-*.jsonl")):
            answers = {i: label for i, label in read_answers(path).items() if i in key["arms"]}
            if len(answers) == len(key["arms"]):
                given[path.stem.removeprefix("ratings-")] = answers
            elif answers:
                print(f"{path}: {len(answers)} of {len(key['arms'])} rated; the key stays hidden "
                      "until all are")
        results += compare_arms(key["arms"], given)
        print_agreement(given, key["items"])
    for r in results:
        print("{rater}: {feeling} {base} of {n} base, {other} of {n} {arm} samples; Fisher's exact "
              "test, one-sided: p = {p:.2g}; power if these are the true shares {power:.2f}"
              .format(**r))
    if results:
        n = results[0]["n"]
        powers = (f"{fisher_power(p, q, n):.2f} for {p:.0%} and {q:.0%}"
                  for p, q in ((0.2, 0.6), (0.3, 0.6), (0.57, 0.93)))
        print(f"power of {n} against {n} if the true shares are otherwise: {', '.join(powers)}")
        rated = {target: policies[target] for target in keys[-1]["policies"]}
        write(out / "ratings.json", json.dumps({"policies": rated, "results": results}))
