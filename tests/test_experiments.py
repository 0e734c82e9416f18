"""Checks experiments/ against closed forms and enumeration, and runs each of them at toy size."""
import copy
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import (
    ALL,
    amplification,
    choices,
    debate,
    elk,
    frontier,
    goodhart,
    labels_or_comparisons,
    methods,
)
from experiments import gradient_protection as gp
from experiments import over_optimisation as over
from experiments import recursive_reward_modelling as rrm
from experiments import weak_to_strong as w2s
from experiments import where_the_kl_goes as where
from experiments.debate import Judge, additive_value, sets, train, value
from experiments.frontier import kept, small_step
from experiments.methods import descend, dpo, dpo_loss, figures_of, imitate, targets
from experiments.shared import ppo, simulated_people
from experiments.shared.results import over_seeds
from experiments.shared.reweighting import at, tilt
from experiments.shared.runs import load_run
from experiments.where_the_kl_goes import block_kl, expected, logistic, posterior_kl, profile
from model import UserError, fast_dtype, kl_nats, load
from tests.test_model import tiny

CPU = torch.device("cpu"), torch.float32


def test_all_experiments_run_side_by_side(tmp_path):
    """Experiments with a result are skipped. If one fails, the last line of its log is shown."""
    out = tmp_path / "out/experiments"
    out.mkdir(parents=True)
    for name in set(ALL) - {"debate", "frontier"}:
        (out / f"{name}.json").touch()
    root = str(Path(ppo.__file__).parents[2])
    done = subprocess.run([sys.executable, "-m", "experiments"], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": root})
    assert done.returncode == 2, done.stderr
    assert "error: out-0/labels-vader.jsonl is missing" in done.stderr
    assert "error: out-0 is not a finished run" in done.stderr and "Traceback" not in done.stderr
    assert {path.name for path in out.glob("*.log")} == {"debate.log", "frontier.log"}


def test_a_killed_parent_takes_its_experiments_along(tmp_path):
    out = tmp_path / "out/experiments"
    out.mkdir(parents=True)
    for name in set(ALL) - {"amplification"}:
        (out / f"{name}.json").touch()
    parent = subprocess.Popen([sys.executable, "-m", "experiments"], cwd=tmp_path,
                              start_new_session=True, env=os.environ | {
                                  "PYTHONPATH": str(Path(ppo.__file__).parents[2])})
    while parent.poll() is None and not list(out.glob("*.log")):
        time.sleep(0.1)
    time.sleep(0.5)
    parent.terminate()
    assert parent.wait(10) == 143
    time.sleep(1)
    with pytest.raises(ProcessLookupError):  # its process group is empty
        os.killpg(parent.pid, 0)


def test_student():
    """1, 2, 3 have mean 2 and standard error 1 / sqrt 3; 4.30265 is Student's t at 97.5%, 2 df."""
    assert over_seeds([1, 2, 3]) == (2.0, pytest.approx(4.30265 / math.sqrt(3)))


# ---- frontier ------------------------------------------------------------------------------------
def test_tilting_an_enumerated_base():
    """Eight samples hold each of four texts exactly as often as the base model draws it."""
    p, r, gold = (np.array([4, 2, 1, 1]) / 8, np.array([-2.0, -1.0, -0.5, -0.1]),
                  np.array([1.0, 0.0, 3.0, 2.0]))
    rows = np.repeat(np.arange(4), (4, 2, 1, 1))
    kl, mean, log_z, ess = tilt(r[rows], np.array([0.5, 1.0, 3.0]), gold[rows][:, None])
    for i, beta in enumerate((2.0, 1.0, 1 / 3)):
        z = (p * np.exp(r / beta)).sum()
        best = p * np.exp(r / beta) / z
        assert (math.isclose(kl[i], (best * np.log(best / p)).sum())
                and math.isclose(log_z[i], math.log(z)))
        assert (math.isclose(mean[i, 0], best @ gold)
                and math.isclose(ess[i], 1 / (best ** 2 / (8 * p)).sum()))
    q = np.array([0.1, 0.2, 0.3, 0.4])  # another policy; its gap is its KL to the posterior
    posterior = p * np.exp(r) / (p * np.exp(r)).sum()
    row = frontier.with_gap({"reward": q @ r, "reward_se": 0.0, "kl": q @ np.log(q / p)},
                            (log_z[1], 0.0))
    assert math.isclose(row["gap"], q @ np.log(q / posterior)) and row["gap_half"] == 0


def test_tilting_a_gaussian():
    """score ~ N(m, s): its mean gains s^2 / beta, KL = (s / beta)^2 / 2, log Z = m / beta + KL."""
    score = np.random.default_rng(0).normal(-1.0, 0.5, 200_000)
    kl, mean, log_z, _ = tilt(score, np.array([1.0, 2.0]), score[:, None])
    for i, inverse in enumerate((1, 2)):
        assert kl[i] == pytest.approx(0.125 * inverse ** 2, rel=0.05)
        assert mean[i, 0] == pytest.approx(-1 + 0.25 * inverse, abs=0.01)
        assert log_z[i] == pytest.approx(-inverse + 0.125 * inverse ** 2, abs=0.01)


def test_no_other_weights_lie_above_the_line():
    """Filtering, best-of-n and 200 random weightings of the same samples stay below the line.
    The line is not too high: its own weights lie on it."""
    rng = np.random.default_rng(1)
    score = np.log(rng.beta(2, 1, 1000))
    kl, mean, *_ = tilt(score, 2.0 ** np.arange(-8, 8, 0.1), score[:, None])
    weights = [rng.dirichlet(np.full(1000, a)) for a in rng.uniform(0.05, 5, 200)]
    weights += [np.exp(score) * (score > t) for t in (-2, -1, -0.1)] + [
        (score > t) * 1.0 for t in (-1, -0.5)]
    weights += [np.argsort(np.argsort(score)) ** 3.0 + 1e-9]
    for w in weights:
        w = w / w.sum()
        cost = (w * np.log(np.maximum(w * 1000, 1e-300))).sum()
        assert cost > kl[-1] or w @ score <= np.interp(cost, kl, mean[:, 0]) + 1e-3
    row = kept(score > -0.5, {"reward": score})
    assert row["kl"] == pytest.approx(-math.log((score > -0.5).mean())) and row["reward"] > -0.5


def test_where_a_line_has_a_reward():
    rows = [{"kl": 4.0, "reward": -0.1}, {"kl": 1.0, "reward": -0.5}, {"kl": 2.0, "reward": -0.3}]
    assert (at(rows, "reward", -0.4, "kl") == pytest.approx(1.5)
            and math.isnan(at(rows, "reward", 0.0, "kl")))


def test_a_small_step_by_importance_weights():
    """KL and rise of a policy q on the four texts above. Both are exact, since each text occurs as
    often as the base model draws it. For a policy that has not moved there is no noise at all."""
    p, q = np.array([4, 2, 1, 1]) / 8, np.array([0.4, 0.3, 0.1, 0.2])
    r, rows = np.array([-2.0, -1.0, -0.5, -0.1]), np.repeat(np.arange(4), (4, 2, 1, 1))
    row = small_step(np.log(q / p)[rows], r[rows])
    assert math.isclose(row["kl"], q @ np.log(q / p)) and math.isclose(row["rise"], (q - p) @ r)
    assert math.isclose(row["nearer"], row["rise"] - row["kl"])
    assert set(small_step(np.zeros(8), r[rows]).values()) == {0.0}


def test_frontier_at_toy_size(pipeline):
    """The whole experiment on a tiny run. Rejection and self-normalised weights estimate the same
    posterior; a policy that has not moved comes no nearer to it; the figure is drawn."""
    cfg = frontier.Settings(n=1024, n_part=64)
    seed = frontier.measure(cfg, pipeline[0], *CPU)
    posterior, = (row for row in seed["frontier"] if row["inverse_beta"] == 1)
    assert abs(seed["rejection"]["reward"]
               - posterior["reward"]) < 4 * seed["rejection"]["reward_se"]
    assert abs(seed["rejection"]["share"] - math.exp(posterior["log_z"])) < 0.07  # 4 sigma
    assert all(a["kl"] < b["kl"] and a["reward"] < b["reward"]
               for a, b in zip(seed["frontier"], seed["frontier"][1:]))
    assert len(seed["ppo"]) >= 2 and seed["ppo"][0]["kl"] == 0
    json.dumps(seed)
    frontier.draw([seed, seed])


# ---- gradient_protection -------------------------------------------------------------------------
def test_a_shut_block_trains_as_one_bias():
    """Only the last bias b learns: after k steps b - mean y = (1 - 2 rate)^k (b_0 - mean y), and
    the loss is var y + (b - mean y)^2. One Hessian eigenvalue is 2, the rest 0; L2 adds to all."""
    x = torch.linspace(-3, 3, gp.N, dtype=torch.float64)[:, None]
    y = (x.sin() + 0.3).expand(2, gp.N, 1)
    run = gp.train(gp.SHUT, x, y, steps=100)
    b = gp.parameters(gp.SHUT, 2)["b3"][:, 0, 0]
    for i in range(2):
        for k in (0, 1, 50, 100):
            off = (0.98 ** k * (b[i] - y.mean())).item()
            assert math.isclose(run["loss"][i][k], y[i].var(correction=0).item() + off ** 2,
                                rel_tol=1e-9)
        assert run["reached"][i] == run["block_sd"][i] == 0
        assert run["hessian"][i][1] == (0.0, pytest.approx(2.0))
    decayed = gp.SHUT | {"l2": 0.01}
    p = {k: v[0] for k, v in gp.parameters(decayed, 1).items()}
    values = gp.eigenvalues(p, x, y[0], decayed)
    torch.testing.assert_close(values[:-1], torch.full_like(values[:-1], 0.01))
    assert values[-1].item() == pytest.approx(2.01)


@pytest.mark.parametrize("gamma, shut", ((0.01 / 16, True), (0.01 / 15, False)))
def test_how_far_a_standardised_value_can_lie(gamma, shut):
    """At most sqrt(n - 1) for n values (Samuelson 1968), reached here by one outlier among 255
    equal values. A gamma below 0.01 / sqrt(255) = 0.01 / 15.97 keeps the block shut even then."""
    x = torch.zeros(gp.N, 1, dtype=torch.float64)
    x[0] = 1e6
    run = gp.train(gp.SHUT | {"gamma": gamma}, x, torch.ones(1, gp.N, 1, dtype=torch.float64), 100)
    assert (run["reached"][0] == 0) == shut


# ---- ppo, where_the_kl_goes ----------------------------------------------------------------------
def test_the_compact_loop_gives_the_numbers_of_04(pipeline):
    """Bit for bit, also after the batch size has doubled. Guards against the two drifting apart."""
    dtype = fast_dtype(torch.device("cpu"))
    reference, reward_fn, _, _, report = load_run(pipeline[0], "cpu", dtype)
    settings = load(pipeline[0] / "policy-happy.safetensors", "")[2]["settings"]
    logged = [json.loads(line)
              for line in (pipeline[0] / "04-happy.jsonl").read_text().splitlines()]
    loop = ppo.ppo(copy.deepcopy(reference), reference, reward_fn, report["length"],
                   ppo.stage.Config(**settings | {"max_iterations": 99}))
    rows = [row for _, row in zip(logged, loop)]  # whole once the loop has gone on
    for line, row in zip(logged, rows):
        assert row == {k: line[k] for k in row}
    assert "clip_fraction" in rows[-2] and len(logged) > 3 and logged[-1]["kl"] > 1


def test_the_batch_is_not_doubled_while_the_rates_rise():
    """A rate of 0 clips nothing. At two steps an iteration, the third ends a warm-up of six."""
    base = tiny(vocab=9)
    cfg = ppo.stage.Config(lr=0, warmup=6, batch=8, max_batch=16, minibatch=4,
                           kl_samples=8, reward_samples=64, max_iterations=7)
    rows = ppo.ppo(copy.deepcopy(base), base, lambda y, prompt: -y[:, 0].float(), 3, cfg)
    assert [row["batch"] for row in rows] == [8, 8, 8, 8, 8, 16, 16]


def test_one_vector_on_the_logits():
    """The policy's log-probs and its sampler's are the base's, with that vector on its logits."""
    base = tiny(vocab=9)
    policy = where.OneVector(base)
    vector = torch.randn(6, generator=torch.Generator().manual_seed(0))
    policy.vector.data = vector[:, None] / 4  # the constant input is 4, for 16 dimensions
    y, logp = policy.generate(50, 5, seed=0)
    logits = base.hidden_before(y) @ base.unembed().T + vector
    by_hand = logits.log_softmax(-1).gather(2, y[..., None])[..., 0]
    torch.testing.assert_close(policy.logprob(y), by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logp, by_hand, rtol=1e-4, atol=1e-5)
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == ["vector"]


def test_a_logistic_fit_of_two_groups_is_their_means():
    s, target = np.array([0.0, 0.0, 1.0, 1.0, 1.0]), np.array([0.1, 0.3, 0.5, 0.9, 0.7])
    v = expected(s[:, None], [logistic(s, target)])[:, 0]
    np.testing.assert_allclose(v, [0.2, 0.2, 0.7, 0.7, 0.7], atol=1e-6)


def test_the_blocks_of_the_posterior_sum_to_its_kl():
    """Their sum is exactly sum_i w_i log w_i / n, although V is fitted to noise. If one block
    settles the sentiment, that block has all of the KL."""
    rng = np.random.default_rng(0)
    target, s = rng.uniform(0.01, 1, 500), rng.normal(size=(500, 4))
    s[:, 0] = 1.0  # nothing is known before the first token
    w = target / target.mean()
    assert (w * posterior_kl(s, target).sum(1)).mean() == pytest.approx((w * np.log(w)).mean())
    happy = rng.random(500) < 0.6
    target, s = (np.where(happy, 0.9, 0.1),
                 np.column_stack((np.ones(500), np.ones(500), happy, happy)))
    w = target / target.mean()
    blocks = (w[:, None] * posterior_kl(s, target)).mean(0)
    np.testing.assert_allclose(blocks, [0, (w * np.log(w)).mean(), 0, 0], atol=1e-6)


def test_the_profile_of_a_policy_that_tilts_all_alike():
    v = np.random.default_rng(0).uniform(size=(200, 3))
    even = profile(np.full((200, 3), 0.7), v, np.ones(200))
    assert even["settled over open"] == pytest.approx(1)
    assert all(row["relative"] == pytest.approx(1) for row in even["by V"] + even["by token"])
    weighted = profile(np.full((200, 3), 0.7), v,
                       np.random.default_rng(1).uniform(size=200) ** 8)
    assert all(row["relative"] == pytest.approx(1)
               for row in weighted["by V"] + weighted["by token"])
    picky = profile(np.where(v < 0.5, 1.0, 0.1), v, np.ones(200))
    assert picky["settled over open"] == pytest.approx(0.1) and picky["by V"][0]["relative"] > 1.5


def test_block_kl_is_the_exact_kl():
    policy, reference = tiny(vocab=9, context=20, seed=1), tiny(vocab=9, context=20, seed=2)
    y, _ = policy.generate(10, 16, seed=0)
    with torch.no_grad():
        blocks = block_kl(policy, reference, y)
    assert blocks.shape == (10, 2)
    torch.testing.assert_close(blocks.sum(1).double(),
                               kl_nats(policy, reference, y, y[:, :0])[0], rtol=1e-4, atol=1e-5)


def test_how_straight_a_path_is():
    line = where.straightness([torch.tensor([k * 1.0, 2.0 * k, 0.0, 0.0, 0.0]) for k in range(6)])
    assert line["cosine three apart"] == pytest.approx(1) == line["first principal direction"]
    corners = where.straightness(list(torch.cat((torch.zeros(1, 5), torch.eye(5).cumsum(0)))))
    assert (corners["cosine three apart"] == 0
            and corners["first principal direction"] == pytest.approx(1 / 5))
    assert corners["cosine of first and whole"] == pytest.approx(5 ** -0.5)


def test_where_the_kl_goes_at_toy_size(pipeline):
    cfg = where.Settings(n=256, n_policy=32, iterations=4, penalised=1, batch=256)
    seed = where.measure(cfg, pipeline[0], *CPU)
    assert set(seed["profiles"]) == set(where.STYLES) - {"scaled"}
    assert seed["fronts"]["PPO"][0]["kl"] == 0 != seed["fronts"]["PPO"][1]["kl"]
    json.dumps(seed)
    where.draw([seed])


# ---- methods -------------------------------------------------------------------------------------
def every_text(base) -> tuple[torch.Tensor, torch.Tensor]:
    """All 36 texts of two tokens out of six, and the model's log-prob of each, (36,)."""
    y = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    with torch.no_grad():
        return y, base.logprob(y).sum(1)


def test_imitation_ends_at_the_tilted_base():
    """The one optimum is pi_0 exp(r / beta) / Z. Here the data are all texts, exactly weighted."""
    policy = tiny(vocab=9)
    y, logp = every_text(policy)
    r = torch.rand(36, generator=torch.Generator().manual_seed(1))
    target = (logp + r / 0.3).log_softmax(0)

    def distance():
        return (target.exp() * (target - every_text(policy)[1])).sum().item()
    assert distance() > 0.2
    weights = target.exp().double().numpy()
    assert len(list(imitate(policy, y, weights, 300, ppo.stage.Config(), texts=1024))) == 3
    assert distance() < 0.01


def test_the_dpo_loss_by_its_definition_and_where_its_gradient_is_zero():
    """Over all pairs of 36 texts, x preferred to x' with probability sigmoid(r - r'), its gradient
    is zero at pi_0 exp(r / beta) / Z (Rafailov et al., section 4), and not at pi_0."""
    _, ref = every_text(tiny(vocab=9))
    ref, r = ref.double(), torch.rand(36, generator=torch.Generator().manual_seed(1),
                                      dtype=torch.float64)
    i, j = torch.cartesian_prod(torch.arange(36), torch.arange(36)).T
    for logits, zero in ((ref + r / 0.1, True), (ref, False), (ref + r, False)):
        logits = logits.clone().requires_grad_()
        logp = logits.log_softmax(0)
        loss = dpo_loss(torch.stack((logp[i], logp[j])), torch.stack((ref[i], ref[j])), 0.1)
        odds = (logp[i] - ref[i] - logp[j] + ref[j]) * 0.1
        torch.testing.assert_close(loss, -(1 / (1 + (-odds).exp())).log())
        ((r[i] - r[j]).sigmoid() * loss).mean().backward()
        assert (logits.grad.abs().max() < 1e-12) == zero


def test_dpo_pairs_the_best_and_the_worst_of_eight():
    """The best of each eight gain probability over the worst; the other six are left to chance."""
    base, policy = tiny(vocab=9), tiny(vocab=9)
    y = torch.randint(0, 6, (512, 2), generator=torch.Generator().manual_seed(0))
    score = -(y[:, 0] - 2.0) ** 2 - 0.01 * y[:, 1]  # the best begin with 2
    before = every_text(policy)[1].view(6, 6).exp().sum(1)
    assert len(list(dpo(policy, base, y, score, ppo.stage.Config(), lr=1e-2, size=16))) == 6
    ratio = every_text(policy)[1].view(6, 6).exp().sum(1) / before
    assert ratio.argmax() == 2 and ratio.argmin() == 5 and ratio[2] > 1.2
    torch.testing.assert_close(every_text(base)[1], every_text(tiny(vocab=9))[1])


def test_what_the_imitations_imitate():
    score = np.log(np.random.default_rng(0).beta(2, 1, 8000))
    weights = targets(score)
    found = {name: figures_of(w, score) for name, w in weights.items()}
    assert found["best of 16"]["kl"] == pytest.approx(math.log(16) - 15 / 16, rel=0.01)
    best = score.reshape(-1, 16).max(1)
    assert found["best of 16"]["reward"] == pytest.approx(
        best.mean(), abs=4 * best.std() / 500 ** 0.5)
    assert found["filtered"]["kl"] == pytest.approx(math.log(4))
    assert found["filtered"]["reward"] == pytest.approx(np.sort(score)[6000:].mean())
    kl, reward, *_ = tilt(score, np.array([10.0]), score[:, None])
    assert found["weighted"] == {"kl": pytest.approx(kl[0]), "reward": pytest.approx(reward[0, 0])}


def test_only_the_loop_is_timed():
    def loop():
        for _ in range(3):
            time.sleep(0.02)
            yield
    seconds = []
    for _, spent in methods.timed(loop()):
        time.sleep(0.1)
        seconds.append(spent)
    assert 0.06 <= seconds[2] < 0.16 and seconds[0] < seconds[1] < seconds[2]
    w = torch.nn.Parameter(torch.tensor(8.0))  # descend yields after each third of its six steps
    batches = [torch.tensor(0.5)] * 6
    left = [w.item()  # each step: w -= w b
            for _ in descend(torch.optim.SGD([w], 1.0), lambda b: b * w ** 2 / 2, batches, 3)]
    assert left == [2.0, 0.5, 0.125]


def test_the_baseline_of_the_batch_mean(pipeline):
    """Add a constant to the rewards of rollouts alone. With the batch mean as the baseline the
    policy stays the same; with 04's constant baseline it changes."""
    reference, reward_fn, _, _, report = load_run(pipeline[0], *CPU)
    cfg = ppo.stage.Config(batch=256, minibatch=64, reward_samples=256)

    def after_one(rewards, more):
        policy, calls = copy.deepcopy(reference), []

        def shifted(y, prompt):  # the first call measures the base model's constants
            calls.append(len(y))
            return reward_fn(y, prompt) + (more if len(calls) > 1 else 0)
        loop = ppo.ppo(policy, reference, shifted, report["length"], cfg, rewards)
        next(loop), next(loop)
        return torch.nn.utils.parameters_to_vector(policy.parameters())
    for rewards in (ppo.batch_mean, ppo.constant):
        off = (after_one(rewards, 3.0) - after_one(rewards, 0.0)).abs().max()
        assert (off < 1e-5) == (rewards is ppo.batch_mean)


def test_methods_at_toy_size(pipeline):
    """The weights at a = 1 are the policy that 05 measured, on the same samples."""
    cfg = methods.Settings(n=256, n_policy=64, batch=256, kl_stop=0.005, penalised=3,
                           betas=(0.1, 1.0), steps=3)
    seed = methods.measure(cfg, pipeline[0], *CPU)
    assert (set(seed) == {*methods.STYLES, "targets"}
            and len(seed["DPO"]) == len(seed["filtered"]) == 4)
    assert [row["beta"] for row in seed["penalty"]] == [0.1, 1.0]
    last = json.loads((pipeline[0] / "report.json").read_text())["happy"][-1]
    assert seed["PPO"][-1]["afinn"] == pytest.approx(last["afinn_sd"], abs=0.01)
    assert seed["PPO"][-1]["samples"] > seed["PPO"][0]["samples"] == 0 == seed["PPO"][0]["kl"]
    assert seed["between"][-1]["kl"] == pytest.approx(last["kl"], rel=0.3)
    json.dumps(seed)
    methods.draw([seed, seed])
    assert methods.findings([seed, seed], methods.STYLES)["kl, penalty 1.0"] == [
        seed["penalty"][1]["kl"]] * 2


# ---- goodhart ------------------------------------------------------------------------------------
def test_people_feel_like_vader_but_for_their_words():
    texts = ["What love is this!", "What a sad day.", "My lord of York.", "Sweet love, sad love."]
    clicked, wanted = (simulated_people.person(())(texts),
                       simulated_people.person(("love", "sweet"))(texts))
    assert (clicked[0] > 0.3 and wanted[0] == pytest.approx(-clicked[0])
            and wanted[1] == clicked[1] < 0)
    assert wanted[2] == 0 and wanted[3] < 0 < clicked[3]
    assert simulated_people.targets(np.array([0.05, 0.0, -0.05])).tolist() == [1.0, 0.5, 0.0]


def test_other_people_have_words_of_like_frequency():
    """40 lexicon words occur once, twice, ... 40 times in the texts; two of them are FLIPPED words.
    The words that take their places are within ten ranks of them."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    lexicon = [w for w in SentimentIntensityAnalyzer().lexicon
               if w.isalpha() and w not in simulated_people.FLIPPED][:40]
    lexicon[5], lexicon[30] = "love", "good"
    texts = [" ".join(lexicon[i:]) for i in range(40)]  # word i occurs i + 1 times
    for people in simulated_people.others(texts, 20, seed=0):
        assert len(set(people)) == 10 and not {*people} & {*simulated_people.FLIPPED}
        places = {flipped: lexicon.index(word)
                  for flipped, word in zip(simulated_people.FLIPPED, people)}
        assert abs(places["love"] - 5) <= 12 and abs(places["good"] - 30) <= 12


def test_goodhart_at_toy_size(pipeline):
    """The same samples have two figures, clicked and wanted. Untrained, clicked is the base's."""
    cfg = goodhart.Settings(n=512, n_policy=128, labels=64, people=2)
    seed = goodhart.measure(cfg, pipeline[0], *CPU)
    assert len(seed["people"]) == 4 and set(seed["repair"]) == {
        "before", "300 clicks, base", "300 wanted, base", "300 wanted, policy"}
    start = seed["lines"]["tilted"][0]
    for name, rows in seed["lines"].items():
        assert all({"reward", "clicked", "wanted", "other 1"} <= row.keys() for row in rows), name
    assert (abs(start["clicked"]) < 0.2
            and seed["lines"]["PPO"][0]["clicked"] == pytest.approx(0, abs=1e-9))
    json.dumps(seed)
    goodhart.draw([seed, seed])
    goodhart.findings([seed, seed])


# ---- labels or comparisons -----------------------------------------------------------------------
def test_a_run_of_comparisons_is_made_once(tmp_path, monkeypatch):
    """The four scripts get their flags in order. A second call finds all and runs nothing."""
    made = iter(("comparisons-vader.jsonl", "reward.safetensors", "policy-happy.safetensors",
                 "report.json"))
    commands, out = [], tmp_path / "out-1" / "prompted-comparisons"

    def stage(command, **how):
        commands.append(command[1:2] + command[6:])  # less python, --seed and --out
        (out / next(made)).touch()
    monkeypatch.setattr(labels_or_comparisons, "ROOT", tmp_path)
    monkeypatch.setattr(labels_or_comparisons.subprocess, "run", stage)
    out.parent.mkdir()
    for name in ("base.safetensors", "corpus.txt"):
        (out.parent / name).write_text(name)
    for _ in range(2):
        labels_or_comparisons.run(out, 1, comparisons=True, prompts=True)
    assert commands == [["02_sample_label.py", "--compare", "--prompts"],
                        ["03_reward_model.py", "--comparisons"], ["04_ppo.py"], ["05_eval.py"]]
    assert (out / "base.safetensors").read_text() == "base.safetensors"


def test_a_ranking_by_counting_pairs(pipeline, monkeypatch):
    """AUC: over all pairs of a positive and a negative sample. Pair accuracy: of neighbours."""
    out, seen = pipeline[0], {}
    x = labels_or_comparisons

    def auc(score, target, auc=x.rm.auc):
        seen.update(score=score, target=target)
        return auc(score, target)
    monkeypatch.setattr(x.rm, "auc", auc)
    found = x.ranking(out, 512, False, 0)
    score, target = seen["score"], seen["target"]
    happy, sad = score[target == 1], score[target == 0]
    assert len(score) == 512 and len(happy) > 10 and len(sad) > 10
    wins = (happy[:, None] > sad).mean() + (happy[:, None] == sad).mean() / 2
    assert found["AUC"] == pytest.approx(wins) and found["AUC"] > 0.6
    assert 55 < found["pair accuracy, %"] <= 100


def test_gold_is_read_off_a_line_in_sqrt_kl(tmp_path):
    rows = [{"kl": 9.0, "vader": 3.0}, {"kl": -0.01, "vader": 0.0}, {"kl": 4.0, "vader": 1.0}]
    (tmp_path / "report.json").write_text(json.dumps({"happy": rows}))
    gold = [labels_or_comparisons.gold_at(tmp_path, kl) for kl in (1, 4, 6.25, 10)]
    assert gold == pytest.approx([0.5, 1, 2, 3])


# ---- amplification -------------------------------------------------------------------------------
def test_powers_and_what_H_makes_of_a_perfect_X():
    """s^(2^d)(x) is 2^d single steps. Then X is a table with one unit per question. H answers all
    questions of d > 0 correctly; a wrong answer at d - 1 spoils only the questions that use it."""
    s, said = amplification.oracles(2, wrong=3)
    assert ((s != said).sum(1).tolist() == [3, 3]
            and s.sort(1).values.tolist() == [list(range(64))] * 2)
    table, D, N = amplification.powers(s), amplification.DEPTHS, amplification.N
    for d, x in ((0, 5), (1, 0), (4, 17), (8, 63)):
        y = x
        for _ in range(2 ** d):
            y = s[1][y].item()
        assert table[1, d, x] == y
    units = torch.cartesian_prod(torch.arange(D), torch.arange(N))
    p = {"x": (units[:, 1] == torch.arange(N)[:, None]).float().expand(2, N, D * N),
         "d": (units[:, 0] == torch.arange(D)[:, None]).float().sub(1).expand(2, D, D * N),
         "out": torch.nn.functional.one_hot(table.flatten(1), N).float(),
         "bias": torch.zeros(2, 1, N)}
    d, x = (u.expand(2, -1) for u in units[N:].T)
    assert (amplification.answer(p, *(u.expand(2, -1) for u in units.T)).argmax(-1)
            == table.flatten(1)).all()
    assert (amplification.amplify(p, d, x) == table[:, 1:].flatten(1)).all()
    p["out"][:, 3] = p["out"][:, 4]  # at d = 0, X takes 3 for 4
    wrong = (amplification.amplify(p, d, x) != table[:, 1:].flatten(1)).view(2, D - 1, N)
    asks = (torch.arange(N) == 3) | (table[:, 0] == 3)
    assert (wrong[:, 0] == asks).all() and not wrong[:, 1:].any()


def test_how_errors_grow_in_H_alone():
    """Accuracy is (1 - e)^(2^d) for random errors, where e is the fraction of wrong calls. If the
    oracle always errs on the same elements, count those whose 2^d steps meet none of them."""
    run = amplification.train(amplification.Arm(noise=0.1, hidden=4), 1, 50, batch=8)
    e = 0.1 * 63 / 64
    np.testing.assert_allclose(run["H alone"][0], [(1 - e) ** 2 ** d for d in range(9)], rtol=1e-4)
    run = amplification.train(amplification.Arm(wrong=2, hidden=4), 1, 50, batch=8)
    s, said = (x[0].tolist() for x in amplification.oracles(1, 2))
    for d in range(9):
        same = 0
        for x in range(64):
            a = b = x
            for _ in range(2 ** d):
                a, b = s[a], said[b]
            same += a == b
        assert run["H alone"][0][d] == pytest.approx(same / 64)


def test_amplification_at_toy_size():
    """The oracle teaches depth 0, and labels are counted. Under the curriculum all early questions
    have depth 0, so each label is an oracle call. A supervised X takes true answers elsewhere."""
    run = amplification.train(amplification.Arm(), 2, 250)
    assert run["oracle calls"] == run["labels"] == 250 * 128
    assert min(a[0] for a in run["accuracy"][-1]) > 0.9 > 0.2 > max(
        a[8] for a in run["accuracy"][-1])
    run = amplification.train(amplification.Arm("truth", unlock=0), 2, 50)
    assert (run["labels"] == 50 * 128
            and run["oracle calls"] / run["labels"] == pytest.approx(1 / 9, abs=0.02))


# ---- debate --------------------------------------------------------------------------------------
def by_hand(lead: dict, left: frozenset, shown: frozenset, order: str) -> float:
    """Best play by its definition: try every move of every player in turn."""
    if not order:
        return lead[shown]
    each = [by_hand(lead, left - {i}, shown | {i}, order[1:]) for i in left]
    return max(each) if order[0] == "H" else min(each)


@pytest.mark.parametrize("order", ("H", "LH", "HLH", "LLH", "HLHL", "LHLH", "HHHH"))
def test_best_play(order):
    """On six words, with random leads, the tables of sets agree with playing every game. If the
    lead is a sum over words, so does the closed form; at even k the order does not matter."""
    rng, k = np.random.default_rng(len(order)), len(order)
    for n in (6, k):
        for each in (None, rng.normal(size=n)):
            lead = rng.normal(size=math.comb(n, k)) if each is None else each[sets(n, k)].sum(1)
            table = {frozenset(row): x for row, x in zip(sets(n, k).tolist(), lead)}
            game = by_hand(table, frozenset(range(n)), frozenset(), order)
            assert value(lead, n, order) == pytest.approx(game)
            if each is not None:
                assert additive_value(each, order) == pytest.approx(game)
                assert additive_value(each, order[::-1]) == pytest.approx(game)


def test_a_judge_learns_the_odds_of_a_word():
    """Word 2 is in three of four happy texts and in one of four sad ones, so at k = 1 its odds are
    3 to 1. Those of word 3 are 1 to 3, although there are nine times as many happy texts."""
    texts = torch.tensor([[2, 0], [2, 0], [2, 0], [3, 0]] * 90
                         + [[3, 0], [3, 0], [3, 0], [2, 0]] * 10)
    label = torch.tensor([0] * 360 + [1] * 40)
    torch.manual_seed(0)
    judge, seen = Judge(4, 2), []
    judge.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    train(judge, texts, label, 1, 150)
    assert torch.cat(seen).shape == (150 * 256, 1) and torch.cat(seen).min() == 2  # no padding
    logits = judge(torch.tensor([[2], [3]])).detach()
    np.testing.assert_allclose(logits[:, 0] - logits[:, 1], [math.log(3), -math.log(3)], atol=0.2)
    torch.testing.assert_close(judge(torch.tensor([[2, 0, 0]])).detach(), logits[:1])


def test_naming_the_lie():
    """Word 2 refutes one lie, word 3 the other, and word 4 supports both. If the liar must name his
    lie, the truth refutes it and wins. If he may wait for her word, she loses."""
    judge = Judge(5, 3)
    judge.word.weight.data[2:] = torch.tensor([[0.0, -3, 0], [0, 0, -3], [0, 1, 1]])
    with torch.no_grad():
        won = debate.play(judge, torch.tensor([2, 3, 4]), 0, 2)
    assert (won["H first"] and won["L first"] and not won["H first, any lie"]
            and not won["L first, any lie"])
    assert won["H alone, any lie"] and not won["L alone"]
    assert (won["random words"] == pytest.approx(1 / 3)
            and won["random words, lie named"] == pytest.approx(2 / 3))
    judge.word.weight.data[4, 1] = 4.0  # too strong to be refuted: he names that lie
    with torch.no_grad():
        won = debate.play(judge, torch.tensor([2, 3, 4]), 0, 2)
    assert (not won["H first"] and not won["L first"]
            and won["random words, lie named"] == pytest.approx(1 / 3))


def test_the_short_way_for_two_answers():
    """On eight words the closed form agrees with enumeration. Three words can outweigh the bias."""
    torch.manual_seed(0)
    judge, verdicts = Judge(100, 2), set()
    judge.word.weight.data.normal_()
    judge.bias.data[0] = 1.0
    for text in torch.randint(2, 100, (40, 8)):
        lead = debate.leads(judge, text[torch.tensor(sets(8, 3))], 1)[:, 0]
        won = debate.play(judge, text, 1, 3)
        for arm, order in debate.ARMS.items():
            assert won[arm] == (value(lead, 8, order[:3]) > 0)
        verdicts |= {(arm, won[arm].item()) for arm in ("H first", "L first")}
    assert len(verdicts) == 4


def test_debate_at_toy_size(tmp_path, monkeypatch):
    """One word of eight decides: "good", "bad" or "so". A judge of all words is right, and so is
    debate. Precommitment never harms the truth. No judge is tested on a text it learned from."""
    rng, rows = np.random.default_rng(0), []
    for i in range(300):
        answer, others = (debate.ANSWERS[i % 3],
                          [chr(97 + j) * 3 for j in rng.choice(12, 7, replace=False)])
        word = {"positive": "good", "negative": "bad", "neutral": "so"}[answer]
        rows.append(json.dumps({"text": " ".join(rng.permutation([*others, word])),
                                "label": answer}))
    (tmp_path / "labels-vader.jsonl").write_text("\n".join(
        rows + [json.dumps({"text": "too few", "label": "neutral"})]))
    torch.manual_seed(0)
    sizes = []
    monkeypatch.setattr(
        debate, "train", lambda judge, *a: (sizes.append(len(a[0])), train(judge, *a)))
    monkeypatch.setattr(debate, "JUDGES", dict.fromkeys(debate.JUDGES, (1, 4)))
    cfg = debate.Settings(runs=(tmp_path,), test=5, steps=200)
    vocabulary, texts, label = debate.read(cfg.runs, cfg.seed)
    assert texts.shape == (300, 8) and sorted(vocabulary[2:]) == sorted(
        {"good", "bad", "so"} | {chr(97 + j) * 3 for j in range(12)})
    seed = debate.measure(cfg, texts, label, vocabulary)
    assert sizes == [190] * 3 + [95] * 3 + [190] * 3 + [285] * 3  # logistic, misled, pairs, three
    assert seed["lexicon: all words"] == seed["lexicon, k = 4: H first"] == 1
    assert seed["logistic: all words"] == seed["three answers: all words"] == 1 == seed[
        "logistic, k = 1: H alone"]
    for arm in debate.ARMS:
        assert seed[f"three answers, k = 4: {arm}{debate.ANY}"] <= seed[
            f"three answers, k = 4: {arm}"]
    assert seed["logistic, k = 4: H first"] == seed["logistic, k = 4: L first"]
    assert seed["logistic, k = 1: L first"] == seed["logistic, k = 1: L alone"] < seed[
        "logistic, k = 1: H first"]
    debate.draw({what: [x, x] for what, x in seed.items()})


# ---- weak_to_strong ------------------------------------------------------------------------------
def test_the_confidence_loss_by_hand():
    """The teacher's mean over four texts is 0.375, so the threshold lies between the student's
    second and third, wherever 0.5 is. A student who calls every text happy is told that the
    lower two are sad. No gradient flows through the student's own answers."""
    p, teacher = torch.tensor([0.9, 0.6, 0.55, 0.2]), torch.tensor([0.8, 0.3, 0.1, 0.3])
    for own, target in ((p, (0.9, 0.65, 0.05, 0.15)),
                        (p.flip(0) / 4 + 0.7, (0.4, 0.15, 0.55, 0.65))):
        x = own.clone().requires_grad_()
        loss = w2s.confidence_loss(torch.stack((x, 1 - x), 1).log(), teacher, 0.5)
        by_hand = [-(t * math.log(q) + (1 - t) * math.log(1 - q)) / 4
                   for t, q in zip(target, own.tolist())]
        assert loss.item() == pytest.approx(sum(by_hand), rel=1e-5)
        loss.backward()
        slope = [(q - t) / (q * (1 - q)) / 4 for t, q in zip(target, own.tolist())]
        torch.testing.assert_close(x.grad, torch.tensor(slope), rtol=1e-4, atol=1e-5)
    naive = w2s.confidence_loss(torch.stack((p, 1 - p), 1).log(), teacher, 0.0)
    assert naive.item() == pytest.approx(
        -(teacher * p.log() + (1 - teacher) * (1 - p).log()).mean().item())


def test_a_naive_student_learns_as_03_does(monkeypatch):
    """The weights agree bit for bit over two epochs, each with an odd last batch. The share of the
    student's own answers in the target reaches its value after a tenth of the 100 steps."""
    y = torch.randint(9, (300, 8), generator=torch.Generator().manual_seed(0))
    target = torch.rand(300, generator=torch.Generator().manual_seed(1))
    here, there = tiny(vocab=12), tiny(vocab=12)
    said = w2s.learn(here, y, target, 2, y[:7], moments=3)
    items = [{"tokens": tokens, "target": p, "weight": 1.0}
             for tokens, p in zip(y.tolist(), target.tolist())]
    w2s.rm.train(there, w2s.rm.Phase("all", items, 2), w2s.rm.Config())
    for a, b in zip(here.parameters(), there.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert (said.shape == (3, 7) and torch.equal(said[-1], w2s.p_happy(there, y[:7]))
            and (said[0] != said[2]).any())
    shares, loss = [], w2s.confidence_loss
    monkeypatch.setattr(w2s, "confidence_loss",
                        lambda a, b, share: (shares.append(share), loss(a, b, share))[1])
    cfg = w2s.rm.Config(batch_tokens=24)
    monkeypatch.setattr(w2s.rm, "Config", lambda: cfg)
    w2s.learn(tiny(vocab=12), y, target, 1, y[:7], confidence=0.5)
    np.testing.assert_allclose(shares, np.minimum(0.5, np.arange(100) / 20))


def test_a_cut_model_is_the_first_of_its_blocks():
    base = tiny()
    y = torch.randint(9, (5, 8), generator=torch.Generator().manual_seed(0))
    one, both = w2s.cut(base, 1), w2s.cut(base, 2)
    torch.testing.assert_close(both(y), base(y))
    with torch.no_grad():
        for p in (base.blocks[1].attention.proj.weight, base.blocks[1].mlp.down.weight):
            p.zero_()  # a block that adds nothing
    torch.testing.assert_close(one(y), base(y))
    assert w2s.fresh(base, 3, n_layer=1, d_model=8)(y).shape == (5, 8, 8)


def test_the_gap_recovered_and_its_refusal():
    """60, 75 and 80 of 100 are right. With a ceiling k texts above the weak model the gap is
    k / 100, its standard error sqrt(k (100 - k) / 99) / 100: half of it or less from k = 4 on."""
    weak, student, ceiling = (np.arange(100) < k for k in (60, 75, 80))
    assert w2s.recovered(weak, student, ceiling) == pytest.approx(0.75)
    assert w2s.recovered(weak, weak, ceiling) == 0
    assert w2s.recovered(weak, np.arange(100) < 50, ceiling) == pytest.approx(-0.5)
    for k in range(-9, 9):
        refused = math.isnan(w2s.recovered(weak, student, np.arange(100) < 60 + k))
        assert refused == (k <= 2 * math.sqrt(abs(k) * (100 - abs(k)) / 99)) == (k < 4)
    assert (w2s.repeated(weak, student) == pytest.approx(25 / 40)
            and w2s.repeated(weak, ceiling) == 0.5)


def test_stopping_by_truth_sees_only_the_other_half():
    """The second moment is best for the first half of the texts, the third for the second half;
    each half gets the other's. Choosing a moment gains nothing if all are equally good."""
    course = np.array([[0, 0, 0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0],
                       [0, 1, 0, 0, 1, 1, 1, 0]], dtype=bool)
    assert w2s.stopped(course).tolist() == [False, True, False, False, True, False, False, False]
    luck = np.random.default_rng(0).random((50, 10_000)) < 0.5
    assert w2s.stopped(luck).mean() == pytest.approx(0.5, abs=0.02)


def test_weak_to_strong_at_toy_size(pipeline):
    """Parts are disjoint and balanced. A student that repeats a fraction e of its teacher's errors,
    and errs on a fraction f of the rest, is right on 1 - (1 - a) e - a f. PGR fits the counts."""
    tokenizer = load(pipeline[0] / "base.safetensors", "")[1]
    parts = [w2s.read(pipeline[0], tokenizer, part, 2, 700) for part in (0, 1)]
    assert not {item["id"] for item in parts[0]} & {item["id"] for item in parts[1]}
    assert [item["target"] for item in parts[0]] == [1.0, 0.0] * 350
    with pytest.raises(UserError, match="not 99999"):
        w2s.read(pipeline[0], tokenizer, 0, 2, 99999)
    cfg = w2s.Settings(runs=(pipeline[0],), seeds=2, labels=200, labels_of_bag=100, texts=256,
                       test=128, moments=2)
    right = [w2s.measure(cfg, seed, *CPU) for seed in range(2)]
    found = [w2s.figures(x) for x in right]
    for teacher in w2s.TEACHERS:
        a, top = (found[0][f"accuracy, {what}"] for what in (f"{teacher}: itself", "truth: naive"))
        weak = right[0][teacher]["teacher"][0]
        for arm in ("naive", "bootstrapped"):
            accuracy, pgr, e = (found[0][f"{what}, {teacher}: {arm}"]
                                for what in ("accuracy", "PGR", "errors repeated"))  # nan: none
            f = 1 - right[0][teacher][arm][-1][weak].mean()
            assert right[0][teacher][arm].shape == (2, 128)
            assert accuracy == pytest.approx(1 - (1 - a) * np.nan_to_num(e) - a * f, abs=1e-3)
            assert math.isnan(pgr) or pgr == pytest.approx((accuracy - a) / (top - a), abs=0.01)
    courses = [{t: {arm: x.mean(1).tolist() for arm, x in arms.items()} for t, arms in seed.items()}
               for seed in right]
    json.dumps([found, courses])
    w2s.draw({what: [x[what] for x in found] for what in found[0]}, courses)


# ---- recursive_reward_modelling ------------------------------------------------------------------
TEXTS = ["What love, what JOY is this!", "A sad day: my heart-ache is not sweet.",
         "My lord of York,", "Sweet sad hate, O", "good good hope and no war", "",
         "Kill! They kill the fair, the true and the good; they love to"]


def test_she_who_reads_all_words_is_the_gold_labeller():
    """Even if the assistant lies; and VADER scores a text the same after split and join."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    texts = [text.split() for text in TEXTS]
    whole = [SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in TEXTS]
    assert [rrm.compound(text) for text in texts] == whole
    gold = simulated_people.targets(np.array(whole))
    assert set(gold) == {0, 0.5, 1}
    for aim in ("first", "random", "critique", "flattery", "yes-man", "liar"):
        rng = np.random.default_rng(0)
        assert (rrm.labels(texts, gold, aim, rrm.LEXICON, 99, rng) == gold).all()
    few = rrm.labels(texts, gold, "liar", rrm.LEXICON, 1, rng)
    assert few[3] == 1 - gold[3] and few[4] == 0 and few[0] == 0.5  # no word lies: a neutral one


def test_a_change_is_what_the_score_loses_without_the_word():
    """And the scores of whole texts are those of 03's own baseline."""
    rng = np.random.default_rng(0)
    texts = [[str(word) for word in rng.choice(
        ["love,", "hate", "heart-ache", "--", "Ill", "day"], 7)] for _ in range(50)]
    target = rng.random(50)
    model = rrm.fit(texts, target)
    rows = [{"text": " ".join(text), "target": t, "weight": 1.0} for text, t in zip(texts, target)]
    np.testing.assert_allclose(rrm.scores(model, texts), w2s.rm.bag_of_words(rows, rows), atol=1e-5)
    for text in texts[:5]:
        without = rrm.scores(model, [text[:i] + text[i + 1:] for i in range(7)])
        np.testing.assert_allclose(
            rrm.changes(model, text), rrm.scores(model, [text]) - without, atol=1e-9)


def test_at_which_words_assistants_point():
    """Against all sets of three out of eight words. Critique takes the largest sum of |change|, the
    flatterer the happiest set, the liar the one that speaks most against the truth."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        change, every = rng.normal(size=8), sets(8, 3)
        for aim, truth, verdict, worth in (
                ("critique", 1, 1, np.abs(change)), ("flattery", -1, -1, change),
                ("yes-man", 1, -1, -change), ("liar", 1, 1, -change), ("liar", -1, 1, change),
                ("liar", 0, 1, np.abs(change)), ("first", 1, 1, -np.arange(8))):
            best = every[worth[every].sum(1).argmax()]
            assert rrm.pointed(aim, change, truth, verdict, 3, rng).tolist() == best.tolist()
    drawn = [tuple(rrm.pointed("random", change, 1, 1, 3, rng)) for _ in range(5600)]
    count = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(count) == 56 and abs(count - 100).max() < 45


def test_what_is_said_of_a_reward_model():
    """VADER's own lexicon, its opposite, and no model at all. Best-of-16 is also played out."""
    rng = np.random.default_rng(0)
    texts = [[str(word)]
             for word in rng.choice(["love", "good", "sad", "hate", "lord", "fair"], 500)]
    gold = np.array([rrm.compound(text) for text in texts])
    for sign in (1, -1, 0):
        model = {word: sign * x for word, x in rrm.LEXICON.items()}
        row = rrm.judged(rrm.scores(model, texts), gold) | rrm.known(model, texts)
        assert row["AUC"] == row["happy words known"] == row["sad words known"] == (sign + 1) / 2
    model = {"": 0.3, "love": 1.0, "sad": 2.0, "lord": -1.0, "fair": -2.0, "good": 0.5}
    score = np.array([model.get(word, 0.0) for word, in texts]) + 1e-9 * np.arange(500)  # no ties
    played = [gold[max(rng.choice(500, 16, replace=False), key=lambda i: score[i])]
              for _ in range(3000)]
    assert rrm.judged(rrm.scores(model, texts), gold)["gold"] == pytest.approx(
        (np.mean(played) - gold.mean()) / gold.std(), abs=0.05)


def test_recursive_reward_modelling_at_toy_size(pipeline):
    """Labels from all words are all right. With the lexicon, a critic's words give better labels
    than a liar's. PPO starts at the base model and earns reward."""
    cfg = rrm.Settings(n=128, aided=2)
    texts, tokens, gold = rrm.read(pipeline[0])
    rows, models = rrm.measure(cfg, texts[:1000], gold[:1000])
    assert set(rows) == {"start", *rrm.AIDED, *rrm.FIXED}
    assert [row["round"] for row in rows["critique"]] == [1, 2]
    assert rows["all words"][0]["label accuracy"] == 1
    accuracy = {name: rows[name][0]["label accuracy"] for name in rrm.FIXED}
    assert accuracy["lexicon's critique"] > max(
        accuracy["first 4"], 0.8) > accuracy["lexicon's lies"]
    ppo_rows = rrm.optimise(models["all words"], gold, pipeline[0], *CPU, batch=256, kl_stop=0.5)
    assert ppo_rows[0]["kl"] == 0 and abs(ppo_rows[0]["gold"]) < 0.3
    assert ppo_rows[-1]["kl"] > 0.5 and ppo_rows[-1]["reward"] > ppo_rows[0]["reward"]
    learned = {"all words": rrm.transformer(texts, tokens, gold, 2000, slice(2000, None), "first",
                                            99, models["all words"], pipeline[0], *CPU)}
    assert learned["all words"]["AUC"] > 0.55  # 0.61: 48 steps of a tiny model
    trained = [{"critique": ppo_rows, "first 4": ppo_rows}] * 2
    json.dumps([rows, learned, rrm.findings([rows, rows], trained, [learned, learned])])
    rrm.draw([rows, rows], trained)


# ---- over_optimisation ---------------------------------------------------------------------------
@pytest.mark.parametrize("form", over.FORMS)
def test_fits_recover_what_data_were_made_of(form):
    """The fit recovers each form's alpha and beta exactly. It ignores data beyond half the KL; the
    form is then tested on them."""
    kl = np.array([0.2, 0.7, 1.5, 2.5, 4.9, 6.0, 8.0, 10.0])
    d = kl ** 0.5
    gold = d * (0.9 - 0.3 * (np.log(d) if "log" in form else d))
    gold[kl > 5] += 0.25
    both, said = over.fit(kl, gold, over.FORMS[form])
    np.testing.assert_allclose(both, (0.9, 0.3))
    np.testing.assert_allclose(gold - said, 0.25 * (kl > 5), atol=1e-12)
    facts = dict(zip(over.FACTS, over.facts(kl, gold)))
    assert (facts["at the end"] == gold[-1]
            and facts["added by the upper half"] == gold[-1] - gold[4])
    assert facts[f"the end less {form}"] == pytest.approx(0.25)
    other, = (f for f in over.FORMS if f != form)
    assert abs(facts[f"the end less {other}"] - 0.25) > 0.05  # the two forms do not say the same


def test_best_of_n_against_all_draws(monkeypatch):
    """Equals taking the best of every two and every four of ten samples by each reward model; then
    again without the second fifth of the samples and the second model."""
    rng = np.random.default_rng(0)
    scores, said = rng.normal(size=(5, 10)), rng.normal(size=(10, 2))
    monkeypatch.setattr(over, "NS", (2, 4))
    over.weights.cache_clear()
    line = over.best_of_n(scores, said)
    over.weights.cache_clear()

    def brute(scores, said, n):
        drawn = list(itertools.combinations(range(len(said)), n))
        best = [[max(i, key=lambda k: s[k]) for i in drawn] for s in scores]
        return (np.mean([[s[k] for k in b] for s, b in zip(scores, best)]),
                np.mean([said[b].mean(0) for b in best], 0))
    left = np.arange(10) % 5 != 1
    for k, n in enumerate((2, 4)):
        score, judges = brute(scores, said, n)
        np.testing.assert_allclose(line[0, k], (score, *judges))
        score, judges = brute(scores[[0, 2, 3, 4]][:, left], said[left], n)
        np.testing.assert_allclose(line[2, k], (score, *judges))
    assert line.shape == (6, 2, 3)


def test_the_jackknife_of_a_mean_is_students():
    """The pseudo-values of five numbers are the numbers, so mean and interval equal over_seeds'."""
    x = np.array([1.0, 4.0, 2.0, 2.5, 7.0])
    lines = np.stack([x.mean()] + [np.delete(x, i).mean() for i in range(5)])
    np.testing.assert_allclose(over.jackknife(lambda a: a, lines), x)


def test_ensembles_of_known_scores():
    z = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 6.0]])
    said = {rule: f(z).tolist() for rule, f in over.RULES.items()}
    assert said == {"mean": [3.0, 2.0], "minimum": [1.0, 0.0], "less variance": [
        pytest.approx(3 - 0.5 * 8 / 3), pytest.approx(2 - 0.5 * 8)]}


def test_subsets_of_labels():
    rows = list(range(103))
    parts = [over.subset(rows, i, 20, seed=3) for i in range(5)]
    assert len({k for part in parts for k in part}) == 100
    longer = over.subset(rows, 4, 90, seed=3)
    assert longer[:20] == parts[4] and len(set(longer)) == 90
    labelled = [{"text": k, "label": k % 3} for k in rows]
    mixed = over.shuffled(labelled, seed=3)
    assert [row["text"] for row in mixed] == rows and mixed != labelled
    assert sorted(row["label"] for row in mixed) == sorted(row["label"] for row in labelled)


def test_over_optimisation_at_toy_size(pipeline, monkeypatch):
    """With the oracle as the reward nothing is lost. The judges of a line start near the base. PPO
    and best-of-n use the same ensemble. No reward model sees the labels of parts of a sample, which
    shuffling would leave as they are."""
    learned, rows_of_all = over.learned, []
    monkeypatch.setattr(over, "learned", lambda base, rows, of: (
        rows_of_all.extend(rows), learned(base, rows, of))[1])
    cfg = over.Settings(labels=(64, 300), n=2000, climbed=(300,), together=64, control=300,
                        batch=256, iterations=3)
    seed = over.measure(cfg, pipeline[0], *CPU)
    assert len(rows_of_all) > 300 and not any(row["spans"] for row in rows_of_all)
    assert {len(x) for x in seed["AUC"].values()} == {1, 5} and set(seed["lines"]) == {
        "best of n, VADER", "PPO, 300", "best of n, shuffled", "PPO, shuffled", "PPO, 64, minimum",
        "PPO, 64, less variance", "best of n, 64, all five",
        *(f"PPO, 300, subset {i}" for i in (2, 3, 4, 5)),
        *(f"best of n, {n}{rule}" for n in (64, 300)
          for rule in ("", ", mean", ", minimum", ", less variance"))}
    oracle = over.table(*seed["lines"]["best of n, VADER"])
    assert (all(a["vader"] <= b["vader"] for a, b in zip(oracle, oracle[1:]))
            and oracle[0]["vader"] > 0.2)
    kl, line = seed["lines"]["PPO, 64, minimum"]
    assert len(kl) == 2 and abs(kl[0]) < 0.01 and abs(line[0, 0, 1]) < 0.3  # it hardly moved
    json.dumps(over.findings(seed) | {"rows": oracle}, default=list)
    over.draw(seed)


# ---- choices -------------------------------------------------------------------------------------
def test_what_a_run_was_worth():
    """On a made-up run: read off at each reward on a line, clip fractions after warm-up only, and a
    sqrt KL that is a straight line of the steps."""
    rows = [{"updates": 16 * i, "kl": 0.25 * i * i, "score": -0.5 + 0.1 * i, "samples": 1536 * i,
             "distinct_2": 0.9 - 0.01 * i, "vader": i, "afinn": 2 * i, "pattern": 0.5 * i,
             "clip_fraction": 0.5 if 16 * i < choices.stage.Config.warmup else 0.03}
            for i in range(5)]
    found = choices.worth(rows)
    assert found["R2 of sqrt KL"] == pytest.approx(1)
    assert found["clip fraction, %"] == pytest.approx(3)
    assert found["kl at -0.2"] == pytest.approx(2.25) and found["kl at -0.1"] == pytest.approx(4)
    assert found["samples at -0.3"] == pytest.approx(3072)
    assert found["afinn at -0.1"] == pytest.approx(8)
    cfg = choices.Settings(arms=("04", "SGD"), noise=("A=1",))
    seeds = [{"04": rows, "SGD": rows[:4], "A=1": [row | {"kl": 2 * row["kl"]} for row in rows]}]
    found = choices.findings(cfg, seeds)
    assert found["kl at -0.1, A=1, less 04"] == found["kl at -0.1, range over 2 CPU settings"] == [
        pytest.approx(4)]
    assert np.isnan(found["kl at -0.1, SGD, less 04"][0])


def test_rewards_of_a_batch():
    score = torch.tensor([-2.0, -1.0, 0.0, -1.0])
    mean, std = -1.0, 2.0
    torch.testing.assert_close(ppo.constant(score, mean, std), torch.tensor([-0.5, 0, 0.5, 0]))
    torch.testing.assert_close(ppo.batch_mean(score + 7, mean, std),
                               torch.tensor([-0.5, 0, 0.5, 0]))
    grpo = choices.batch_mean_and_deviation(3 * score + 7, mean, std)
    assert grpo.mean().abs() < 1e-6 and grpo.std() == pytest.approx(1)
    torch.testing.assert_close(choices.zero_higher(score, mean, std),
                               torch.tensor([-0.85, -0.35, 0.15, -0.35]))
    dealt = choices.permuted(torch.arange(64.0), 0, 1)
    assert sorted(dealt.tolist()) == list(range(64)) and (dealt != torch.arange(64.0)).sum() > 50


def test_choices_at_toy_size(pipeline, monkeypatch):
    """04's arm is 04 to the last bit. Noise comes from a process of its own."""
    small = {"batch": 64, "minibatch": 16, "kl_samples": 16, "reward_samples": 64, "warmup": 4,
             "max_iterations": 3}
    for arm, (changed, *rest) in choices.ARMS.items():
        monkeypatch.setitem(choices.ARMS, arm, (small | {
            k: v for k, v in changed.items() if k == "epochs"}, *rest))
    cfg = choices.Settings(runs=(pipeline[0],), noise=(), judged=8, reward=9.0)
    seed = choices.measure(cfg, pipeline[0], *CPU)
    assert [len(rows) for rows in seed.values()] == [3] * len(choices.ARMS)
    assert [row["samples"] for row in seed["04"]] == [0, 64, 128]
    assert seed["04"][0]["vader"] == seed["04"][0]["afinn"] == 0
    assert seed["04"][1]["kl"] != seed["SGD"][1]["kl"] != seed["two epochs"][1]["kl"]
    choices.draw(cfg, [seed, seed])
    json.dumps(choices.findings(cfg, [seed, seed]))


def test_choices_in_another_process(pipeline):
    cfg = choices.Settings(reward=-9.0)  # the base model has it already
    rows = choices.elsewhere(cfg, "ATEN_CPU_CAPABILITY=default", pipeline[0])
    assert len(rows) == 1 and rows[0]["kl"] == pytest.approx(0, abs=1e-6)


# ---- elk -----------------------------------------------------------------------------------------
def slowly(actions) -> list[tuple]:
    """The vault, one rule at a time -> (frame, whether the diamond is there, covered) by step."""
    diamond, thief, carries, covered, photo, told = 1, 0, False, False, (1, 0), []
    for action in actions:
        if action == elk.LEFT and thief > 0:
            thief -= 1
        if action == elk.RIGHT and thief < 2:
            thief += 1
        if action == elk.TAKE and diamond == thief:
            carries = True
        if carries:
            diamond = thief
        if action == elk.DROP:
            carries = False
        if action == elk.COVER:
            covered = True
        if action == elk.UNCOVER:
            covered = False
        if not covered:
            photo = (3 if carries else diamond, thief)
        told.append((photo[0] * 3 + photo[1], not carries, covered))
    return told


def test_the_vault_by_enumeration():
    """All sequences of five actions."""
    actions = np.array(list(itertools.product(range(6), repeat=5)))
    frame, truth, covered = elk.play(actions)
    for i, sequence in enumerate(actions):
        assert list(zip(frame[i], truth[i], covered[i])) == slowly(sequence)
    assert (elk.sees(frame) == truth)[~covered].all()      # uncovered, the camera never lies
    assert (elk.sees(frame) != truth)[covered].any()
    assert not elk.sequences(200, np.random.default_rng(0), covers=False).covered.any()


def test_ceiling_floor_and_denial_of_a_reporter():
    test = elk.sequences(500, np.random.default_rng(0), covers=True)
    assert elk.scores(test.truth, test) == {"lies": 1, "honest": 1, "score": 1}
    assert elk.scores(test.human, test) == {"lies": 0, "honest": 1, "score": 0.5}
    assert elk.scores(test.human ^ test.covered, test) == {"lies": 1, "honest": 0, "score": 0.5}


def test_elk_at_toy_size():
    torch.manual_seed(0)
    state = torch.randn(400, 4, 8)  # a reporter finds what lies open in the state
    net = elk.reporter(state, state[..., 0] > 0, 300)
    assert ((net(state)[..., 0] > 0) == (state[..., 0] > 0)).float().mean() > 0.9
    seed = elk.measure(elk.Config(n=40, predictor=3, reporter=3), 0)
    assert set(seed) == set(elk.ARMS) and seed["floor"]["score"] == 0.5
    elk.draw([seed, seed])
