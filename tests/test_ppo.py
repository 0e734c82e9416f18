import importlib
import math

import pytest
import torch

from model import UserError

ppo = importlib.import_module("04_ppo")


def test_loss_by_hand_and_no_gradient_where_clipped():
    """Four tokens: ratio 1; too high with a good and with a bad reward; too low with a good one."""
    logp_old = torch.zeros(1, 4)
    ratio, adv = torch.tensor([[1.0, 1.5, 1.5, 0.5]]), torch.tensor([[2.0, 1.0, -1.0, 3.0]])
    logp = ratio.log().requires_grad_()
    loss, stats = ppo.ppo_loss(logp, logp_old, adv, 0.2)
    assert math.isclose(loss.item(), -(2.0 + 1.2 - 1.5 + 1.5) / 4, rel_tol=1e-6)
    loss.backward()
    # d(-ratio adv / 4)/dlogp = -ratio adv / 4; 0 only if the clipped term is the smaller one
    torch.testing.assert_close(logp.grad, torch.tensor([[-0.5, 0.0, 0.375, -0.375]]))
    assert stats["clip_fraction"] == 0.75 and stats["clip_binding"] == 0.25
    assert math.isclose(stats["ratio_off"].item(), 0.5, rel_tol=1e-6)
    assert math.isclose(stats["approx_kl"].item(), (logp.detach() ** 2).mean().item() / 2,
                        rel_tol=1e-6)


def test_ratio_one_gives_the_policy_gradient():
    logp = torch.randn(3, 5, requires_grad=True)
    adv = torch.randn(3, 1).expand(3, 5)
    loss, stats = ppo.ppo_loss(logp, logp.detach(), adv, 0.2)
    loss.backward()
    torch.testing.assert_close(logp.grad, -adv / 15)
    assert stats["ratio_off"] == stats["clip_fraction"] == stats["clip_binding"] == 0


def test_reward_is_the_advantage_of_every_token():
    reward, logp, ref = torch.tensor([1.0, -2.0]), torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(ppo.advantage(reward, logp, ref, 0.0, 2.0), reward[:, None].expand(2, 3))


def test_the_penalty_maximises_score_less_kl():
    """The expected gradient of PPO's surrogate at ratio 1, over all 36 completions of two tokens,
    equals autograd of E[score] - beta KL(policy || reference). Guards against an old bug: if each
    token pays only for its own log-ratio, the gradient is a different one."""
    from tests.test_model import tiny
    policy, reference = tiny(vocab=9, seed=1, noise=0.4), tiny(vocab=9, seed=2, noise=0.4)
    y = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    score, beta, std = torch.randn(36, generator=torch.Generator().manual_seed(0)), 0.7, 2.0

    def gradient(objective):
        policy.zero_grad()
        objective.backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])
    logp, logp_ref = policy.logprob(y), reference.logprob(y).detach()
    p = logp.sum(1).exp()
    exact = gradient((p * (score - beta * (logp - logp_ref).sum(1))).sum())

    def surrogate(adv):
        logp = policy.logprob(y)
        loss = [ppo.ppo_loss(logp[i:i + 1], logp[i:i + 1].detach(), adv[i:i + 1], 0.2)[0]
                for i in range(36)]
        return -2 * std * (p.detach() * torch.stack(loss)).sum()  # undo mean of 2, and / std
    adv = ppo.advantage(score / std, logp.detach(), logp_ref, beta, std)
    own = score[:, None] / std - beta / std * (logp.detach() - logp_ref)
    torch.testing.assert_close(gradient(surrogate(adv)), exact, rtol=1e-4, atol=1e-6)
    assert (gradient(surrogate(own)) - exact).norm() > 0.05 * exact.norm()


def test_both_kl_estimators_against_an_enumerated_model():
    """The exact KL(policy || reference) is summed over all 6^3 completions. k1 and the
    full-vocabulary estimate, on samples, are within four of their own standard errors of it; the
    second has the smaller error. Guards against a per-token mean called KL, and a swapped sign."""
    from model import kl_nats
    from tests.test_model import tiny
    policy, ref = tiny(vocab=9, seed=1, noise=0.4), tiny(vocab=9, seed=2, noise=0.4)
    every = torch.cartesian_prod(*[torch.arange(6)] * 3)
    with torch.no_grad():
        lp, lq = (x.logprob(every).double().sum(1) for x in (policy, ref))
        exact = float((lp.exp() * (lp - lq)).sum())
        y, _ = policy.generate(8000, 3, seed=0)
        full, k1, logp, entropy = kl_nats(policy, ref, y, y[:, :0])
        (full, full_se), (k1, k1_se) = ((ppo.mean(x), ppo.standard_error(x)) for x in (full, k1))
        assert math.isclose(
            k1_se, (policy.logprob(y) - ref.logprob(y)).sum(1).std() / 8000**0.5, rel_tol=1e-4)
        log_p = (policy.hidden_before(y) @ policy.unembed().T).log_softmax(-1)
        torch.testing.assert_close(logp, policy.logprob(y), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
    assert exact > 0.05
    assert abs(k1 - exact) < 4 * k1_se and abs(full - exact) < 4 * full_se and full_se < k1_se / 2
    same, same_k1, *_ = kl_nats(policy, policy, y, y[:, :0])
    assert same.abs().max() == same_k1.abs().max() == 0


def test_vader_as_the_reward():
    """Without an emotional word it is one half. The two targets' probabilities sum to 1."""
    texts = ["the table", "I love thee, sweet and happy", "hate and murder, vile death"]
    happy, sad = (ppo.vader_score(texts, target).exp() for target in ("happy", "sad"))
    assert happy[0] == 0.5 and happy[1] > 0.9 and happy[2] < 0.1
    torch.testing.assert_close(happy + sad, torch.ones(3))


def test_batch_rule():
    rule = ppo.next_batch
    assert rule([0.0, 0.0], 2048, 8192) == (2048, [0.0, 0.0])            # two iterations: too early
    assert rule([0.001, 0.002, 0.003], 2048, 8192) == (4096, [])         # doubled: start again
    assert rule([0.001, 0.002, 0.03], 2048, 8192)[0] == 2048             # the mean is above 1%
    assert rule([0.5, 0.0, 0.0, 0.0], 2048, 8192)[0] == 4096             # only the last three count
    assert (rule([0.0] * 3, 8192, 8192) == (8192, [0.0] * 3)
            and rule([0.0] * 3, 6000, 8192)[0] == 8192)


def test_the_constants_are_those_of_the_reward_on_the_base_model(capsys):
    """They are the mean and the sample standard deviation of the reward function, whatever it is.
    """
    from tests.test_model import tiny
    base, cfg = tiny(vocab=9), ppo.Config(reward_samples=300, seed=2)
    mean, std = ppo.reward_constants(lambda y, prompt: y[:, 0].float(), base, None, 3, cfg)
    first = base.generate(300, 3, seed=2 << 32 | 3 << 24)[0][:, 0].double()
    assert math.isclose(std, first.std()) and 0.5 < std < 3
    assert math.isclose(mean, first.mean())
    with pytest.raises(UserError, match="all samples .* get the same reward"):
        ppo.reward_constants(lambda y, prompt: torch.zeros(len(y)), base, None, 3, cfg)
