import itertools
import math

import pytest
import torch

import ppo
from masking_generator import draw
from modeling_adamae import AdaMAESampler
from tests.helpers import reference

torch.set_num_threads(1)


def make_batch(batch=3, num_tokens=8, num_masked=5, seed=0, spread=1.0, on_policy=False):
    """Current log_prob and value, and an episode recorded under another policy unless on_policy; all float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    log_prob = torch.log_softmax(normal(batch, num_tokens), dim=-1)
    old = log_prob if on_policy else torch.log_softmax(log_prob + spread * normal(batch, num_tokens), dim=-1)
    masked = torch.stack([torch.randperm(num_tokens, generator=generator)[:num_masked] for _ in range(batch)])
    masked = masked.sort(dim=1).values
    reward = 1 + normal(batch, num_masked)
    episode = ppo.Episode(torch.empty(0), masked, old.gather(1, masked), reward, normal(batch))
    return log_prob, normal(batch), episode


def reference_loss(log_prob, value, episode, **kwargs):
    _, masked, old_log_prob, reward, old_value = episode
    return reference.ppo_loss(log_prob, value, masked, old_log_prob, reward, old_value, **kwargs)


def moments_of(episode):
    """Mean and unbiased deviation of the advantages."""
    advantages = torch.tensor([r - v for row, v in zip(episode.reward, episode.value, strict=True) for r in row])
    return advantages.double().mean(), advantages.double().std()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("clip", [0.05, 0.2, 10.0])
@pytest.mark.parametrize(
    "coef", [(1e-4, 1e-4, 1e-4), (2.0, 0.5, 0.01), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
)
def test_sampling_loss_equals_equations_7_and_8(coef, clip, normalize):
    batch = make_batch()
    names = ("policy_coef", "value_coef", "entropy_coef")
    coefs = dict(zip(names, coef, strict=True))
    loss, _ = ppo.sampling_loss(*batch, clip=clip, moments=moments_of(batch[2]) if normalize else None, **coefs)
    assert loss.item() == pytest.approx(reference_loss(*batch, clip=clip, coef=coef, normalize=normalize), rel=1e-12)


def test_defaults_are_the_papers():
    batch = make_batch()
    assert ppo.sampling_loss(*batch)[0].item() == pytest.approx(reference_loss(*batch), rel=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_sampling_loss_gradient_passes_a_finite_difference_check(normalize):
    log_prob, value, episode = make_batch(spread=0.3)

    def loss(log_prob, value):
        coef = dict(policy_coef=1.0, value_coef=0.7, entropy_coef=0.3)
        return ppo.sampling_loss(log_prob, value, episode, moments=moments_of(episode) if normalize else None, **coef)[
            0
        ]

    assert torch.autograd.gradcheck(loss, (log_prob.requires_grad_(), value.requires_grad_()))


def test_diagnostics_equal_their_definitions_and_carry_no_gradient():
    log_prob, value, episode = make_batch()
    _, diagnostics = ppo.sampling_loss(log_prob.requires_grad_(), value.requires_grad_(), episode, clip=0.3)
    log_ratio = log_prob.gather(1, episode.masked) - episode.old_log_prob
    ratios = log_ratio.exp().flatten().tolist()
    assert any(abs(r - 1) > 0.3 for r in ratios) and any(abs(r - 1) < 0.3 for r in ratios)
    policy, critic = ({"coef": coef, "clip": 0.3} for coef in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)))
    returns = torch.tensor([sum(row) / len(row) for row in episode.reward.tolist()], dtype=torch.float64)
    residual = returns - episode.value
    expected = {
        "policy_loss": reference_loss(log_prob, value, episode, **policy),
        "value_loss": reference_loss(log_prob, value, episode, **critic),
        "approx_kl": sum(r - 1 - math.log(r) for r in ratios) / len(ratios),
        "clip_fraction": sum(abs(r - 1) > 0.3 for r in ratios) / len(ratios),
        "explained_variance": 1 - ((residual - residual.mean()) ** 2).sum() / ((returns - returns.mean()) ** 2).sum(),
    }
    assert diagnostics.keys() == expected.keys()
    for name, value in diagnostics.items():
        assert not value.requires_grad and value.dim() == 0
        assert value.item() == pytest.approx(float(expected[name]), rel=1e-6), name  # clip_fraction is float32


def test_advantage_is_reward_above_the_critic_without_gradient():
    reward = torch.tensor([[1.0, 3.0], [2.0, 2.0]], requires_grad=True)
    advantages = ppo.advantage(reward, torch.tensor([1.0, 5.0], requires_grad=True))
    assert advantages.tolist() == [[0.0, 2.0], [-3.0, -3.0]] and not advantages.requires_grad


def test_normalised_advantages_have_zero_mean_and_unit_deviation():
    _, _, episode = make_batch()
    advantages = ppo.advantage(episode.reward, episode.value, moments_of(episode))
    assert advantages.mean().item() == pytest.approx(0, abs=1e-12) and advantages.std().item() == pytest.approx(1)


def test_on_policy_ratios_are_exactly_one():
    log_prob, value, episode = make_batch(on_policy=True)
    _, diagnostics = ppo.sampling_loss(log_prob, value, episode, clip=1e-12)
    assert diagnostics["clip_fraction"] == 0 and diagnostics["approx_kl"] == 0
    advantages = ppo.advantage(episode.reward, episode.value)
    assert diagnostics["policy_loss"] == -advantages.mean()


@pytest.mark.parametrize("p", [[0.1] * 10, [1.0, 1e-30, 1e-30], [0.5, 0.25, 0.25]])
def test_entropy_of_known_distributions(p):
    log_prob = torch.tensor([p, p], dtype=torch.float64).log()
    assert ppo.entropy(log_prob).item() == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-12)


@pytest.mark.parametrize(
    "value, expected",
    [
        ([1.0, 2.0, 6.0], 1.0),
        ([0.0, 1.0, 5.0], 1.0),
        ([3.0, 3.0, 3.0], 0.0),
        ([5.0, 4.0, 0.0], -3.0),
        ([2.0, 2.5, 4.5], 0.75),
    ],
)
def test_explained_variance_of_known_critics(value, expected):
    """Perfect, perfect up to a constant, constant, mirrored at the mean, half way to the mean."""
    reward = torch.tensor([[0.0, 2.0], [1.0, 3.0], [6.0, 6.0]])  # mean rewards 1, 2, 6
    assert ppo.explained_variance(torch.tensor(value), reward).item() == pytest.approx(expected, abs=1e-6)


def test_explained_variance_of_a_batch_of_one_does_not_claim_a_perfect_critic():
    assert ppo.explained_variance(torch.tensor([2.0]), torch.tensor([[1.0, 2.0]])).isnan()


def test_gradient_on_the_logits_at_ratio_one_is_the_closed_form():
    log_prob, value, episode = make_batch(on_policy=True)
    batch, num_masked = episode.masked.shape
    p, advantages = log_prob.exp(), ppo.advantage(episode.reward, episode.value)
    logits = log_prob.clone().requires_grad_()
    objective = -ppo.sampling_loss(
        logits.log_softmax(dim=-1), value, episode, policy_coef=1.0, value_coef=0.0, entropy_coef=0.0
    )[0]
    (gradient,) = torch.autograd.grad(objective, logits)
    own = torch.zeros_like(p).scatter(1, episode.masked, advantages)  # A_j [j in I_m]
    expected = (own - p * advantages.sum(dim=1, keepdim=True)) / num_masked / batch
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)

    (gradient,) = torch.autograd.grad(ppo.entropy(logits.log_softmax(dim=-1)), logits)
    h = -(p * log_prob).sum(dim=1, keepdim=True)
    torch.testing.assert_close(gradient, -p * (log_prob + h) / batch, rtol=1e-10, atol=1e-12)


def test_a_step_raises_the_probability_of_masked_tokens_above_the_baseline():
    logits = torch.zeros(1, 6, requires_grad=True)
    log_prob = logits.log_softmax(dim=-1)
    masked, reward = torch.tensor([[0, 2, 3, 5]]), torch.tensor([[1.5, 0.5, 1.0, 1.0]])
    old_log_prob = log_prob.detach().gather(1, masked)
    episode = ppo.Episode(torch.empty(0), masked, old_log_prob, reward, torch.ones(1))
    ppo.sampling_loss(log_prob, torch.ones(1), episode)[0].backward()
    with torch.no_grad():
        change = (logits - 1e3 * logits.grad).softmax(dim=-1)[0] - 1 / 6
    assert change[0] > 1e-3 and change[2] < -1e-3
    assert change[[1, 3, 4, 5]].abs().max() < 1e-2 * change[0]  # visible, or masked with an error at the baseline


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0])
def test_ratios_outside_the_clip_have_a_gradient_on_the_worsening_side_alone(ratio, advantage):
    log_ratio = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    ppo.clipped_objective(log_ratio.exp(), torch.tensor([[advantage]]), 0.2).backward()
    improved_enough = ratio > 1.2 if advantage > 0 else ratio < 0.8
    assert log_ratio.grad.item() == pytest.approx(0.0 if improved_enough else ratio * advantage)


# The paper's section 3.3 through its consequence: gradient ascent on the logits of N = 8 tokens of which 2 are visible,
# in exact expectation over all 28 masks, with rewards that do not change and a critic that knows their mean.
def ascend(reward, ratio_of_coefs, steps, num_visible=2):
    """Returns u = N p and E[A_j [j in I_m]] per token after steps from the uniform policy."""
    num_tokens = len(reward)
    masked = [sorted(set(range(num_tokens)) - set(s)) for s in itertools.combinations(range(num_tokens), num_visible)]
    masked = torch.tensor(masked)
    logits = torch.zeros(num_tokens, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        log_prob = logits.log_softmax(dim=-1)
        sets = reference.set_probabilities(log_prob.exp().tolist(), num_visible)
        weight = torch.tensor(list(sets.values()), dtype=torch.float64)
        hidden = torch.zeros(len(masked), num_tokens, dtype=torch.float64).scatter(1, masked, 1.0)
        mask_probability = weight @ hidden
        value = (mask_probability @ reward) / (num_tokens - num_visible)
        losses = []
        for row in masked:
            old = log_prob.detach()[row].unsqueeze(0)
            episode = ppo.Episode(torch.empty(0), row.unsqueeze(0), old, reward[row].unsqueeze(0), value.unsqueeze(0))
            coefs = dict(policy_coef=ratio_of_coefs, value_coef=0.0, entropy_coef=1.0)
            losses.append(ppo.sampling_loss(log_prob.unsqueeze(0), value.unsqueeze(0), episode, **coefs)[0])
        (gradient,) = torch.autograd.grad(weight @ torch.stack(losses), logits)
        with torch.no_grad():
            logits -= num_tokens * gradient
    p = logits.detach().softmax(dim=-1)
    return num_tokens * p, (reward - value) * mask_probability


RELATIVE_REWARD = torch.tensor([1.0, 0.5, 0.25, 0.0, 0.0, -0.25, -0.5, -1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "spread, coef, tolerance", [(0.05, 1.0, 5e-4), (0.1, 0.5, 5e-4), (0.1, 1.0, 2e-3), (0.25, 1.0, 0.016)]
)
def test_fixed_point_near_the_uniform_policy_is_u_log_u(spread, coef, tolerance):
    u, advantage_if_masked = ascend(0.5 + spread * RELATIVE_REWARD, coef, steps=30)
    target = coef * 8 / 6 * advantage_if_masked  # kappa E[A_j [j in I_m]]
    # exact where both gradients cancel and the advantages are centred: u_j (log p_j + H)
    entropy_gap = -(u * u.log()).mean()  # H - log N, of second order in u - 1, and what the rule leaves out
    torch.testing.assert_close(u * (u.log() + entropy_gap), target, rtol=0, atol=1e-6)
    assert (u * u.log() - target).abs().max() < tolerance < 0.07 * target.abs().max()


def test_tokens_far_below_the_baseline_are_driven_to_probability_zero():
    u, advantage_if_masked = ascend(0.5 + 0.5 * RELATIVE_REWARD, 1.0, steps=30)
    target = 8 / 6 * advantage_if_masked
    assert target[7] < -1 / math.e < target[6] < -0.2  # u log u has its minimum, -1/e, at u = 1/e
    assert u[7] < 1e-6 and u[6] > 0.7


def test_sampled_masks_reach_the_same_fixed_point():
    reward = 0.5 + 0.1 * RELATIVE_REWARD
    logits = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    average = torch.zeros(8, dtype=torch.float64)
    for step in range(60):
        log_prob = logits.log_softmax(dim=-1).expand(2000, -1)
        masked = draw(log_prob, 2, torch.arange(2000) + 2000 * step)[1]
        rewards = reward[masked]
        value = rewards.mean().expand(2000)
        episode = ppo.Episode(torch.empty(0), masked, log_prob.detach().gather(1, masked), rewards, value)
        loss = ppo.sampling_loss(log_prob, value, episode, policy_coef=1.0, value_coef=0.0, entropy_coef=1.0)[0]
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= 2 * gradient
            average += logits.softmax(dim=-1) * 8 / 30 * (step >= 30)
    expected, _ = ascend(reward, 1.0, steps=30)
    assert (average - expected).abs().max() < 0.01 < 0.1 * (expected - 1).abs().max() + 0.001


# --- end points (docs/SAMPLER.md) on a table of rewards; all masks of 6 of 8 tokens occur equally often

REWARD = torch.tensor([1.0, 0.8, 0.5, 0.4, 0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
MASKS = torch.tensor(list(itertools.combinations(range(8), 6)))


def end_point(loss_of, steps=1200, lr=0.1):
    """p [8] after Adam on loss_of(log_prob [28, 8], episode of all 28 masks of 6 of 8 tokens)."""
    logits = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=lr)
    for _ in range(steps):
        log_prob = logits.log_softmax(dim=-1).expand(len(MASKS), -1)
        episode = ppo.Episode(None, MASKS, log_prob.detach().gather(1, MASKS), REWARD[MASKS], None)
        optimizer.zero_grad()
        loss_of(log_prob, episode).backward()
        optimizer.step()
    return logits.detach().softmax(dim=-1)


@pytest.mark.parametrize("tau", [0.1, 0.3, 2.0, -0.3])
def test_listwise_ends_where_p_is_proportional_to_exp_of_the_error(tau):
    p = end_point(lambda log_prob, episode: ppo.listwise_loss(log_prob, episode, tau)[0])
    torch.testing.assert_close(p, torch.softmax(REWARD / tau, dim=0), rtol=0.01, atol=1e-6)


def test_listwise_does_so_for_masks_that_the_policy_draws_itself():
    """It is right for any set of masked tokens: the moving policy changes which are seen, not where it ends."""
    logits = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(1500):
        log_prob = logits.log_softmax(dim=-1).expand(64, -1)
        masked = draw(log_prob, 2, torch.arange(64) + 64 * step)[1]
        episode = ppo.Episode(None, masked, log_prob.detach().gather(1, masked), REWARD[masked], None)
        optimizer.zero_grad()
        ppo.listwise_loss(log_prob, episode, 0.3)[0].backward()
        optimizer.step()
    torch.testing.assert_close(
        logits.detach().softmax(dim=-1), torch.softmax(REWARD / 0.3, dim=0), rtol=0.01, atol=1e-4
    )


def test_without_a_baseline_p_is_proportional_to_the_error():
    """AdaMAE's loss: contrast is at most the largest error over the mean one."""
    sampler = AdaMAESampler((2, 2, 2), 0.75, 8, coef=1.0)
    p = end_point(lambda log_prob, episode: sampler.loss(log_prob, None, episode)[0])
    torch.testing.assert_close(p, REWARD / REWARD.sum(), rtol=0.01, atol=0)


def test_uniform_kl_gives_ppo_an_end_point():
    """a_j = (R_j - V) / N here: p_j is proportional to c_p a_j + c_e / N, if that is nowhere negative."""
    value = REWARD.mean()

    def loss(log_prob, episode, coef=1.0):
        baseline = value.expand(len(MASKS))
        coefs = dict(policy_coef=1.0, value_coef=0.0, entropy_coef=coef, entropy_form="uniform_kl")
        return ppo.sampling_loss(log_prob, baseline, episode._replace(value=baseline), **coefs)[0]

    expected = REWARD - value + 1.0
    assert expected.min() > 0
    torch.testing.assert_close(end_point(loss), expected / expected.sum(), rtol=0.01, atol=0)


def test_with_a_baseline_and_entropy_alone_tokens_are_given_up():
    """The paper's objective: half of the a_j are negative, and nothing holds those tokens."""

    def loss(log_prob, episode):
        baseline = REWARD.mean().expand(len(MASKS))
        coefs = dict(policy_coef=1.0, value_coef=0.0, entropy_coef=0.1)
        return ppo.sampling_loss(log_prob, baseline, episode._replace(value=baseline), **coefs)[0]

    half, whole = (end_point(loss, steps=steps) for steps in (600, 1200))
    assert whole.min() < 1e-6 and whole.min() < half.min() / 4  # and still falling


def test_listwise_loss_equals_its_definition():
    log_prob, _, episode = make_batch()
    expected = divergence = 0.0
    for p, masked, reward in zip(
        log_prob.exp().tolist(), episode.masked.tolist(), episode.reward.tolist(), strict=True
    ):
        weights = [math.exp(r / 0.4) for r in reward]
        for token, weight in zip(masked, weights, strict=True):
            share, restricted = weight / sum(weights), p[token] / sum(p[other] for other in masked)
            expected -= share * math.log(restricted) / len(log_prob)
            divergence += share * math.log(share / restricted) / len(log_prob)
    loss, diagnostics = ppo.listwise_loss(log_prob, episode, 0.4)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert diagnostics["policy_loss"].item() == pytest.approx(divergence, rel=1e-9)


def test_uniform_kl_equals_its_definition():
    log_prob = make_batch()[0]
    expected = sum(math.log(1 / 8 / p) / 8 for row in log_prob.exp().tolist() for p in row) / 3
    assert ppo.uniform_kl(log_prob).item() == pytest.approx(expected, rel=1e-12)
    assert ppo.uniform_kl(torch.full((2, 8), -math.log(8))).item() == pytest.approx(0, abs=1e-6)
