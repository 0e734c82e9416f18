"""The arithmetic of experiments/, against closed forms and enumeration, and each once at toy size."""
import json
import math

import numpy as np
import pytest
import torch

from experiments import frontier, over_seeds
from experiments import gradient_protection as gp
from experiments.reweight import at, kept, small_step, tilt

CPU = torch.device("cpu"), torch.float32


def test_student():
    """Of 1, 2, 3: mean 2, standard error 1/sqrt 3, and the 97.5 % point of two degrees of freedom."""
    assert over_seeds([1, 2, 3]) == (2.0, pytest.approx(4.303 / math.sqrt(3)))


# ---- frontier ------------------------------------------------------------------------------------
def test_tilting_an_enumerated_base():
    """Eight samples that hold each of four texts as often as the base model draws it."""
    p, r, gold = np.array([4, 2, 1, 1]) / 8, np.array([-2.0, -1.0, -0.5, -0.1]), np.array([1.0, 0.0, 3.0, 2.0])
    rows = np.repeat(np.arange(4), (4, 2, 1, 1))
    kl, mean, log_z, ess = tilt(r[rows], np.array([0.5, 1.0, 3.0]), gold[rows][:, None])
    for i, beta in enumerate((2.0, 1.0, 1 / 3)):
        z = (p * np.exp(r / beta)).sum()
        best = p * np.exp(r / beta) / z
        assert math.isclose(kl[i], (best * np.log(best / p)).sum()) and math.isclose(log_z[i], math.log(z))
        assert math.isclose(mean[i, 0], best @ gold) and math.isclose(ess[i], 1 / (best ** 2 / (8 * p)).sum())
    q = np.array([0.1, 0.2, 0.3, 0.4])  # another policy: its gap to the posterior, and by the definition
    posterior = p * np.exp(r) / (p * np.exp(r)).sum()
    row = frontier.with_gap({"reward": q @ r, "reward_se": 0.0, "kl": q @ np.log(q / p)}, (log_z[1], 0.0))
    assert math.isclose(row["gap"], q @ np.log(q / posterior)) and row["gap_half"] == 0


def test_tilting_a_gaussian():
    """score ~ N(m, s): the mean rises by s^2 / beta, KL = s^2 / (2 beta^2), log Z = m / beta + KL."""
    score = np.random.default_rng(0).normal(-1.0, 0.5, 200_000)
    kl, mean, log_z, _ = tilt(score, np.array([1.0, 2.0]), score[:, None])
    for i, inverse in enumerate((1, 2)):
        assert kl[i] == pytest.approx(0.125 * inverse ** 2, rel=0.05)
        assert mean[i, 0] == pytest.approx(-1 + 0.25 * inverse, abs=0.01)
        assert log_z[i] == pytest.approx(-inverse + 0.125 * inverse ** 2, abs=0.01)


def test_no_other_weights_lie_above_the_line():
    """Filtering, best-of-n and 200 random weightings of the same samples; and the line is no straw man:
    its own weights do lie on it."""
    rng = np.random.default_rng(1)
    score = np.log(rng.beta(2, 1, 1000))
    kl, mean, *_ = tilt(score, 2.0 ** np.arange(-8, 8, 0.1), score[:, None])
    weights = [rng.dirichlet(np.full(1000, a)) for a in rng.uniform(0.05, 5, 200)]
    weights += [np.exp(score) * (score > t) for t in (-2, -1, -0.1)] + [(score > t) * 1.0 for t in (-1, -0.5)]
    weights += [np.argsort(np.argsort(score)) ** 3.0 + 1e-9]
    for w in weights:
        w = w / w.sum()
        cost = (w * np.log(np.maximum(w * 1000, 1e-300))).sum()
        assert cost > kl[-1] or w @ score <= np.interp(cost, kl, mean[:, 0]) + 1e-3
    row = kept(score > -0.5, {"reward": score})
    assert row["kl"] == pytest.approx(-math.log((score > -0.5).mean())) and row["reward"] > -0.5


def test_where_a_line_has_a_reward():
    rows = [{"kl": 4.0, "reward": -0.1}, {"kl": 1.0, "reward": -0.5}, {"kl": 2.0, "reward": -0.3}]
    assert at(rows, "reward", -0.4, "kl") == pytest.approx(1.5) and math.isnan(at(rows, "reward", 0.0, "kl"))


def test_a_small_step_by_importance_weights():
    """Four texts as above: KL and rise of a policy q, exact here since the samples hold each as often as it is
    drawn; and no noise at all for the policy that has not moved."""
    p, q = np.array([4, 2, 1, 1]) / 8, np.array([0.4, 0.3, 0.1, 0.2])
    r, rows = np.array([-2.0, -1.0, -0.5, -0.1]), np.repeat(np.arange(4), (4, 2, 1, 1))
    row = small_step(np.log(q / p)[rows], r[rows])
    assert math.isclose(row["kl"], q @ np.log(q / p)) and math.isclose(row["rise"], (q - p) @ r)
    assert math.isclose(row["nearer"], row["rise"] - row["kl"])
    assert set(small_step(np.zeros(8), r[rows]).values()) == {0.0}


def test_frontier_at_toy_size(pipeline):
    """All of it on a tiny run: rejection and self-normalised weights are two estimates of one posterior, the
    policy that has not moved is no nearer, and the figure is drawn."""
    cfg = frontier.Settings(n=1024, n_part=64)
    seed = frontier.measure(cfg, pipeline[0], *CPU)
    posterior, = (row for row in seed["frontier"] if row["inverse_beta"] == 1)
    assert abs(seed["rejection"]["reward"] - posterior["reward"]) < 4 * seed["rejection"]["reward_se"]
    assert abs(seed["rejection"]["share"] - math.exp(posterior["log_z"])) < 0.07  # four standard errors
    assert all(a["kl"] < b["kl"] and a["reward"] < b["reward"] for a, b in zip(seed["frontier"], seed["frontier"][1:]))
    assert len(seed["ppo"]) >= 2 and seed["ppo"][0]["kl"] == 0
    json.dumps(seed)
    frontier.draw([seed, seed])


# ---- gradient_protection -------------------------------------------------------------------------
def test_a_shut_block_trains_as_one_bias():
    """All that is left is the last bias b: after k steps b - mean y = (1 - 2 rate)^k (b_0 - mean y), and the
    loss var y + (b - mean y)^2. The Hessian has one eigenvalue 2 and else 0; with L2, that much more."""
    x = torch.linspace(-3, 3, gp.N, dtype=torch.float64)[:, None]
    y = (x.sin() + 0.3).expand(2, gp.N, 1)
    run = gp.train(gp.SHUT, x, y, steps=100)
    b = gp.parameters(gp.SHUT, 2)["b3"][:, 0, 0]
    for i in range(2):
        for k in (0, 1, 50, 100):
            off = (0.98 ** k * (b[i] - y.mean())).item()
            assert math.isclose(run["loss"][i][k], y[i].var(correction=0).item() + off ** 2, rel_tol=1e-9)
        assert run["reached"][i] == run["block_sd"][i] == 0
        assert run["hessian"][i][1] == (0.0, pytest.approx(2.0))
    decayed = gp.SHUT | {"l2": 0.01}
    p = {k: v[0] for k, v in gp.parameters(decayed, 1).items()}
    values = gp.eigenvalues(p, x, y[0], decayed)
    torch.testing.assert_close(values[:-1], torch.full_like(values[:-1], 0.01))
    assert values[-1].item() == pytest.approx(2.01)


@pytest.mark.parametrize("gamma, shut", ((0.01 / 16, True), (0.01 / 15, False)))
def test_how_far_a_standardised_value_can_lie(gamma, shut):
    """Samuelson 1968: at most sqrt(n - 1) of n; one value apart from 255 equal ones is exactly there. A gamma
    below .01 / sqrt(255) = .01 / 15.97 keeps even that shut, a larger one does not, and then it is reached."""
    x = torch.zeros(gp.N, 1, dtype=torch.float64)
    x[0] = 1e6
    run = gp.train(gp.SHUT | {"gamma": gamma}, x, torch.ones(1, gp.N, 1, dtype=torch.float64), 100)
    assert (run["reached"][0] == 0) == shut
