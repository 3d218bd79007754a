"""Where the method follows published code, or must not depend on how a run is laid out."""

import copy

import numpy as np
import pytest
import torch

import ppo
from modeling_adamae import AdaMAESampler
from modeling_tats import TATS
from optim_factory import create_optimizer, parameter_groups
from trajectory_attention import TrajectoryAttention
from utils import seed_everything

GRID = (3, 2, 2)


def episodes_of(count: int, size: int = 3, masked: int = 5) -> list[ppo.Episode]:
    torch.manual_seed(0)
    made = []
    for i in range(count):
        reward = torch.randn(size, masked, dtype=torch.float64) * (i + 1) + i
        empty = torch.empty(0)
        made.append(ppo.Episode(empty, empty, empty, reward, torch.randn(size, dtype=torch.float64)))
    return made


def test_scale_of_a_step_is_that_of_all_its_advantages():
    """However they are cut into micro-batches; two ranks: each sums its part, the other's is added."""
    episodes = episodes_of(4)
    everything = np.concatenate([(e.reward - e.value[:, None]).numpy().ravel() for e in episodes])
    mean, deviation = ppo.step_scale(episodes)
    assert mean.item() == pytest.approx(everything.mean(), rel=1e-12)
    assert deviation.item() == pytest.approx(everything.std(ddof=1), rel=1e-12)
    joined = ppo.Episode(*episodes[0][:3], *(torch.cat([e[i] for e in episodes]) for i in (3, 4)))
    torch.testing.assert_close(ppo.step_scale([joined]), (mean, deviation), rtol=1e-12, atol=0)
    calls, ranks = [], (episodes[:1], episodes[1:])

    def sums_of(part):  # what a rank contributes to each sum, given the mean of all
        a = np.concatenate([(e.reward - e.value[:, None]).numpy().ravel() for e in part])
        return [torch.tensor([a.sum(), a.size]), torch.tensor(((a - everything.mean()) ** 2).sum())]

    def total(value):
        calls.append(value)
        return value + sums_of(ranks[1])[len(calls) - 1].to(value.dtype)

    torch.testing.assert_close(ppo.step_scale(ranks[0], total), (mean, deviation), rtol=1e-12, atol=0)


@pytest.mark.parametrize("gradient", [False, True])
def test_landmarks_carry_a_gradient_only_where_asked(gradient):
    """With W_k = 0 the frames' softmaxes are uniform whatever the landmarks: then nothing but q's own side could learn,
    and with one landmark (its softmax is 1) q has no side of its own."""
    torch.manual_seed(0)
    layer = TrajectoryAttention(8, 2, True, "orthoformer", num_landmarks=1, landmark_gradient=gradient).double()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    layer(x, 3).square().sum().backward()
    w_q = layer.qkv.weight.grad[:8]
    assert bool(w_q.abs().max() > 1e-9) == gradient


def gradients_in_float64(module, loss):
    exact = copy.deepcopy(module).double()
    loss(exact).backward()
    return {name: p.grad for name, p in exact.named_parameters()}


@pytest.mark.parametrize("attention", ["orthoformer", "trajectory", "mha"])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_what_cannot_matter_does_not_move(attention, cap):
    """AdamW with eps 1e-12 makes a full step of a gradient of rounding errors: parameters with an exact gradient of 0
    have to stay where they are, to the bit, also where they are not zero, and the others move."""
    torch.manual_seed(0)
    tats = TATS(GRID, 0.5, 16, num_heads=2, attention=attention, num_landmarks=3, logit_cap=cap)
    for parameter in tats.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randn(4, 12, 16)
    masked = torch.stack([torch.randperm(12)[:6] for _ in range(4)])
    reward = torch.rand(4, 6)

    def loss(module):
        dtype = next(module.parameters()).dtype
        mask = module(None, torch.arange(4), tokens.to(dtype))
        old = mask.log_prob.detach().gather(1, masked)
        episode = ppo.Episode(tokens, masked, old, reward.to(dtype), mask.value.detach())
        return ppo.sampling_loss(mask.log_prob, mask.value, episode)[0]

    exact = gradients_in_float64(tats, loss)
    largest = max(g.abs().max() for g in exact.values() if g is not None)
    before = {name: p.detach().clone() for name, p in tats.named_parameters()}
    optimizer = create_optimizer(parameter_groups(tats, 0.0), lr=1e-3, eps=1e-12)
    for _ in range(3):
        loss(tats).backward()
        optimizer.step()
        optimizer.zero_grad()
    still = 0
    for name, parameter in tats.named_parameters():
        moved = parameter.detach() != before[name]
        silent = exact[name].abs() < 1e-9 * largest  # log_softmax is float32 by design: rounding of 1e-7 is left
        if "norm" in name or name.startswith("critic"):
            continue  # a ReLU that is off for all clips has an exact gradient of 0 now and another one later
        assert not moved[silent].any(), name
        still += int(silent.sum())
    assert still >= (1 + 16 if attention == "mha" else 1 + 16 + 16)  # actor's bias, the last fc2's, the keys' in qkv
    assert (tats.blocks[0].attn.qkv.weight != before["blocks.0.attn.qkv.weight"]).all()


def test_adamaes_head_has_no_gradient_of_rounding_errors_in_its_bias():
    torch.manual_seed(0)
    sampler = AdaMAESampler(GRID, 0.5, 16, num_heads=2)
    mask = sampler(None, torch.arange(2), torch.randn(2, 12, 16))
    mask.log_prob.gather(1, mask.masked).mean().backward()
    head = sampler.get_token_probs[1]
    assert head.weight.grad.any() and not head.bias.grad.any()


def test_every_rank_of_every_seed_has_streams_of_its_own():
    drawn = {}
    for seed in (0, 1, 2, 7, 8, 2**40, 2**63 - 1):
        for rank in range(9):
            seed_everything(seed, rank)
            drawn[seed, rank] = torch.rand(4).tolist(), np.random.rand(4).tolist()
            seed_everything(seed, rank)
            assert drawn[seed, rank][0] == torch.rand(4).tolist()
    for library in (0, 1):
        assert len({tuple(numbers[library]) for numbers in drawn.values()}) == len(drawn)
