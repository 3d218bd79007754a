import copy
import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from modeling_finetune import VisionTransformer
from modeling_pretrain import PretrainVisionTransformer
from modeling_tats import TATS
from optim_factory import cosine_schedule, create_optimizer, parameter_groups
from runtime.backend import Backend
from tests.helpers.runs import naming

torch.set_num_threads(1)

CPU = torch.device("cpu")


def videomae_schedule(base, final, total, warmup, start):
    """VideoMAE's schedule as an array with one value a step."""
    steps = np.arange(total - warmup)
    cosine = [final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / len(steps))) for i in steps]
    return np.concatenate((np.linspace(start, base, warmup), cosine))


@pytest.mark.parametrize("base, final, start", [(1.5e-4, 1e-5, 1e-6), (0.05, 0.4, 0.0), (1.0, 1.0, 0.0)])
@pytest.mark.parametrize("total, warmup", [(20, 0), (20, 1), (20, 2), (20, 7), (20, 19), (20, 20), (1, 0), (1, 1)])
def test_schedule_equals_videomaes_array_at_every_step(total, warmup, base, final, start):
    values = [cosine_schedule(step, total, base, final, warmup, start) for step in range(total)]
    np.testing.assert_allclose(values, videomae_schedule(base, final, total, warmup, start), rtol=1e-12, atol=1e-18)


def test_warmup_longer_than_the_run_is_cut_off():
    values = [cosine_schedule(step, 5, 1.0, 0.0, 8, 0.1) for step in range(5)]
    np.testing.assert_allclose(values, np.linspace(0.1, 1.0, 8)[:5], rtol=1e-12)


def test_schedule_has_a_value_after_the_last_step():
    assert cosine_schedule(20, 20, 1.0, 0.25) == pytest.approx(0.25)
    assert cosine_schedule(0, 0, 1.0, 0.25) == 1.0


def small_classifier():
    return VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=3, qkv_bias=True, all_frames=2,
        use_learnable_pos_emb=True, init_values=0.1,
    )  # fmt: skip


def small_mae():
    return PretrainVisionTransformer(
        img_size=8, patch_size=4, all_frames=2, encoder_embed_dim=8, encoder_depth=1, encoder_num_heads=2,
        decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2, qkv_bias=True,
    )  # fmt: skip


def small_tats():
    return TATS((1, 2, 2), 0.5, 8, 2)


@pytest.mark.parametrize(
    "make, excluded",
    [(small_classifier, "pos_embed"), (small_mae, "mask_token"), (small_tats, "blocks.0.attn.qkv.bias")],
)
def test_matrices_alone_decay(make, excluded):
    model = make()
    for parameter in [p for name, p in model.named_parameters() if "blocks.0.mlp" in name]:
        parameter.requires_grad_(False)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name for name, p in trainable.items() if name.endswith(".weight") and "norm" not in name}
    groups = parameter_groups(model, 0.05)
    name_of = {id(p): name for name, p in trainable.items()}
    decay = {name_of[id(p)] for group in groups if group["weight_decay"] == 0.05 for p in group["params"]}
    plain = {name_of[id(p)] for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    assert decay == expected and plain == trainable.keys() - expected
    assert excluded in plain
    assert sum(len(group["params"]) for group in groups) == len(trainable)


def make_groups(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def run(optimizer, model, steps=10):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


SETTINGS = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-2)


def test_adamw_equals_torchs_unfused_one():
    model = make_groups()
    ours = create_optimizer(parameter_groups(model, 0.3), "adamw", **SETTINGS)
    assert ours.defaults["fused"]
    other = copy.deepcopy(model)
    theirs = torch.optim.AdamW(parameter_groups(other, 0.3), **SETTINGS, foreach=False)
    for a, b in zip(run(ours, model), run(theirs, other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_adamw_equals_its_definition():
    model = make_groups()
    reference = [(p.detach().double(), 0.3 if p.dim() > 1 else 0.0) for p in model.parameters()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p, _ in reference]
    generator = torch.Generator().manual_seed(1)
    lr, (beta1, beta2), eps = SETTINGS.values()
    for step in range(1, 11):
        for (weight, decay), (m, v) in zip(reference, moments, strict=True):
            gradient = torch.randn(weight.shape, generator=generator).double()
            m.copy_(beta1 * m + (1 - beta1) * gradient)
            v.copy_(beta2 * v + (1 - beta2) * gradient**2)
            update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
            weight.copy_(weight - lr * decay * weight - lr * update)
    ours = run(create_optimizer(parameter_groups(model, 0.3), "adamw", **SETTINGS), model)
    for a, (b, _) in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_optimizer_defaults_and_momentum():
    adamw = create_optimizer(parameter_groups(make_groups(), 0.0), "adamw")
    assert adamw.defaults["betas"] == (0.9, 0.999) and adamw.defaults["eps"] == 1e-8 and adamw.defaults["lr"] == 1e-3
    sgd = create_optimizer(parameter_groups(make_groups(), 0.0), "sgd", lr=0.5, momentum=0.7)
    assert sgd.defaults["momentum"] == 0.7 and sgd.defaults["lr"] == 0.5


@pytest.mark.parametrize("opt", ["adam", "adamw", "sgd", "lamb", "lion", "adafactor"])
def test_optimizers_by_name_lower_a_loss(opt):
    model = make_groups()
    optimizer = create_optimizer(parameter_groups(model, 0.01), opt, lr=1e-2)
    x, losses = torch.randn(8, 3), []
    for _ in range(30):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_number_of_betas_is_the_optimizers():
    groups = parameter_groups(make_groups(), 0.0)
    assert create_optimizer(groups, "adan", betas=[0.9, 0.95, 0.99]).defaults["betas"] == (0.9, 0.95, 0.99)
    for opt, betas in (("adan", [0.9, 0.95]), ("adamw", [0.9, 0.95, 0.99]), ("lion", [0.9, 0.95, 0.99])):
        with pytest.raises(ValueError, match=naming("--opt_betas", f"--opt {opt}", 5 - len(betas))):
            create_optimizer(groups, opt, betas=betas)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match=naming("--opt adamww", "adamw")):
        create_optimizer(parameter_groups(make_groups(), 0.0), "adamww")


def make_backend(opt="sgd", lr=0.1, **kwargs):
    model = make_groups()
    optimizer = create_optimizer(parameter_groups(model, 0.01), opt, lr=lr)
    return Backend(model, optimizer, CPU, **kwargs)


def snapshot(backend):
    """Weights, and everything the optimizer remembers."""
    state = [x for s in backend.optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
    return [x.detach().clone() for x in [*backend.unwrapped.parameters(), *state]]


def assert_same(first, second, equal=True):
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) == equal


def train(backend, x, scale=1.0):
    with backend.autocast():
        loss = (backend.module(x).float() - 1).square().mean() * scale
    backend.backward(loss)
    return backend.step()


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_three_micro_batches_equal_one_large_batch(opt):
    x = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(2))
    whole, parts = make_backend(opt), make_backend(opt, accum_iter=3)
    for batch in x:
        assert train(whole, batch)
        before = snapshot(parts)
        assert [train(parts, batch[0:2]), train(parts, batch[2:4])] == [False, False]
        assert_same(snapshot(parts), before)
        assert train(parts, batch[4:6])
        assert whole.grad_norm.item() == pytest.approx(parts.grad_norm.item(), rel=1e-5)
        for a, b in zip(whole.unwrapped.parameters(), parts.unwrapped.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert a.grad is None and b.grad is None


@pytest.mark.parametrize("clip_grad", [None, 0.0, 0.01, 100.0])
def test_clipping_equals_torchs(clip_grad):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    backend = make_backend(clip_grad=clip_grad)
    model = copy.deepcopy(backend.unwrapped)
    (model(x) - 1).square().mean().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf)
    assert 0.01 < norm < 100
    torch.optim.SGD(parameter_groups(model, 0.01), lr=0.1, momentum=0.9, nesterov=True).step()
    train(backend, x)
    assert backend.grad_norm.item() == pytest.approx(norm.item())  # before clipping
    for a, b in zip(backend.unwrapped.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), 1e38])  # 1e38: finite gradients whose norm is infinite
@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(opt, bad, clip_grad):
    backend = make_backend(opt, clip_grad=clip_grad)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    train(backend, x)
    before, norm = snapshot(backend), backend.grad_norm.clone()
    assert len(before) > 4  # the optimizer has a state to spoil
    for count in (1, 2):
        assert train(backend, x, scale=bad)
        assert_same(snapshot(backend), before)
        assert backend.skipped == backend.skipped_in_a_row == count
        assert torch.equal(backend.grad_norm, norm)
    train(backend, x)
    assert_same(snapshot(backend), before, equal=False)
    assert backend.skipped == 2 and backend.skipped_in_a_row == 0
    train(backend, x, scale=bad)
    assert backend.skipped == 3 and backend.skipped_in_a_row == 1


def test_one_bad_micro_batch_skips_its_whole_step_and_no_more():
    backend, clean = make_backend("adamw", accum_iter=2), make_backend("adamw", accum_iter=2)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    for scale in (float("nan"), 1.0, 1.0, 1.0):
        train(backend, x, scale)
    for _ in range(2):
        train(clean, x)
    assert backend.skipped == 1
    assert_same(snapshot(backend), snapshot(clean))


@pytest.mark.parametrize("amp, dtype", [("none", torch.float32), ("bf16", torch.bfloat16)])
def test_mixed_precision_keeps_float32_weights(amp, dtype):
    backend, exact = make_backend("adamw", lr=0.01, amp=amp), make_backend("adamw", lr=0.01)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    with backend.autocast():
        assert backend.module(x).dtype == dtype
    for _ in range(5):
        train(backend, x)
        train(exact, x)
    for a, b in zip(backend.unwrapped.parameters(), exact.unwrapped.parameters(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=5e-3)


def test_fp16_overflow_is_skipped_and_lowers_the_loss_scale():
    backend, exact = make_backend("adamw", amp="fp16"), make_backend("adamw")
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    with backend.autocast():
        assert backend.module(x).dtype == torch.float16
    while not backend.grad_norm and backend.skipped < 10:  # the first scales, from 65536 down, overflow here
        train(backend, x)
    train(exact, x)
    assert backend.grad_norm.item() == pytest.approx(exact.grad_norm.item(), rel=0.01)  # without the loss scale
    before, scale, skipped = snapshot(backend), backend.scaler.get_scale(), backend.skipped.item()
    train(backend, x, scale=1e35)
    assert_same(snapshot(backend), before)
    assert backend.skipped == skipped + 1 and backend.scaler.get_scale() == scale / 2
    train(backend, x)
    assert_same(snapshot(backend), before, equal=False)


def test_schedule_scales_each_group_and_decays_those_that_decay():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = [
        {"params": [weights[0]], "weight_decay": 0.05, "lr_scale": 0.25},
        {"params": [weights[1]], "weight_decay": 0.0, "lr_scale": 0.5},
        {"params": [weights[2]], "weight_decay": 0.05},
    ]
    backend = Backend(nn.ParameterList(weights), torch.optim.SGD(groups, lr=1.0), CPU)
    for lr, weight_decay, decay in ((0.1, 0.2, 0.2), (0.3, None, 0.2)):
        backend.set_schedule(lr, weight_decay)
        assert [group["lr"] for group in backend.optimizer.param_groups] == pytest.approx([lr / 4, lr / 2, lr])
        assert [group["weight_decay"] for group in backend.optimizer.param_groups] == [decay, 0.0, decay]


@pytest.mark.parametrize("opt, amp", [("adamw", "none"), ("adamw", "fp16"), ("lamb", "none"), ("adan", "none")])
def test_training_continues_from_a_saved_state_as_if_never_stopped(opt, amp):
    """lamb and adan count their steps in the groups of parameters."""
    x = torch.randn(6, 6, 3, generator=torch.Generator().manual_seed(2))
    whole, first, second = (make_backend(opt, amp=amp) for _ in range(3))
    for backend in (whole, first):
        train(backend, x[0], scale=1e35)  # skipped; lowers the loss scale, which has to be restored too
    for batch in x:
        train(whole, batch)
    for batch in x[:3]:
        train(first, batch)
    second.unwrapped.load_state_dict(first.unwrapped.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for batch in x[3:]:
        train(second, batch)
    assert_same(snapshot(second), snapshot(whole))
    assert second.scaler.get_scale() == whole.scaler.get_scale()


def test_a_resumed_run_uses_its_own_settings_and_the_saved_moments():
    first, second = make_backend("adamw", lr=0.1), make_backend("adamw", lr=7.0)
    train(first, torch.randn(6, 3))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert {group["lr"] for group in second.optimizer.param_groups} == {7.0}
    moments = [[state["exp_avg"] for state in b.optimizer.state.values()] for b in (first, second)]
    assert_same(*moments)
    saved = copy.deepcopy(first.state_dict())
    for group in saved["optimizer"]["param_groups"]:
        del group["fused"]  # as DeepSpeed's kernel leaves it
    third = make_backend("adamw", lr=7.0)
    with mock.patch.object(third.optimizer, "load_state_dict", wraps=third.optimizer.load_state_dict) as load:
        third.load_state_dict(saved)
    # by this torch decides on which device the step count lies, which a fused kernel needs on the GPU
    assert all(group["fused"] for group in load.call_args[0][0]["param_groups"])
    assert_same(moments[0], [state["exp_avg"] for state in third.optimizer.state.values()])
