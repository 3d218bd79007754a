"""The method as published where the paper leaves a choice: landmarks, random streams of ranks, what Adam must not move.

Normalised advantages: tests/unit/test_engines.py, tests/runs/test_distributed.py.
"""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ppo
from modeling_adamae import AdaMAESampler
from modeling_finetune import Probe, VisionTransformer
from modeling_pretrain import JointModel, PretrainVisionTransformer, reconstruction_target, token_error
from modeling_tats import ATTENTIONS, TATS
from optim_factory import create_optimizer, parameter_groups
from run_mae_pretraining import get_parser
from runtime import resume as runtime_resume
from tests.helpers import reference
from trajectory_attention import TrajectoryAttention
from utils import mean_and_deviation, seed_everything

torch.set_num_threads(1)

# ------------------------------------------------------------------------------------------------------- landmarks


def attention_in_loops(x, state, num_frames, num_landmarks, detached):
    """One clip [N, D], one head, of Orthoformer's layer by its definition: differentiable, with no fused kernel.

    detached: the landmarks are constants, as after torch.no_grad in Motionformer's released code.
    """
    width = x.shape[1]
    q, k, v = reference.linear(x, state, "qkv").split(width, dim=1)
    picked = q[reference.greedy_landmarks(q.detach(), num_landmarks)]
    picked = picked.detach() if detached else picked
    share = (q @ picked.T / width**0.5).softmax(dim=1)
    frames = zip(k.chunk(num_frames), v.chunk(num_frames), strict=True)
    y = torch.stack([share @ ((picked @ k_t.T / width**0.5).softmax(dim=1) @ v_t) for k_t, v_t in frames], dim=1)
    k2, v2 = reference.linear(y, state, "proj_kv").split(width, dim=2)
    own = torch.arange(len(x)) // (len(x) // num_frames)
    q2 = reference.linear(y[torch.arange(len(x)), own], state, "proj_q")
    weights = ((k2 * q2[:, None]).sum(dim=2) / width**0.5).softmax(dim=1)
    return reference.linear((weights[:, :, None] * v2).sum(dim=1), state, "proj")


def make_layer(**kwargs):
    torch.manual_seed(0)
    layer = TrajectoryAttention(6, 1, True, "orthoformer", num_landmarks=3, **kwargs).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.6 if parameter.dim() == 2 else 1.0)
    return layer, torch.randn(1, 12, 6, dtype=torch.float64)


def gradients(output, layer):
    parameters = dict(layer.named_parameters())
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return dict(zip(parameters, torch.autograd.grad(output, parameters.values(), weights), strict=True))


def run_layer(layer, x, how):
    if how == "compiled":
        torch._dynamo.reset()
        return torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")(x, 3)
    layer.recompute = how == "recomputed"
    return layer(x, 3)


@pytest.mark.parametrize("how", ["plain", "recomputed", "compiled"])
@pytest.mark.parametrize("kwargs, detached", [({}, True), (dict(landmark_gradient=True), False)])
def test_landmarks_are_constants_unless_said_otherwise(kwargs, detached, how):
    layer, x = make_layer(**kwargs)
    output, state = run_layer(layer, x, how), dict(layer.named_parameters())
    expected = attention_in_loops(x[0], state, 3, 3, detached)
    torch.testing.assert_close(output[0], expected, rtol=1e-10, atol=1e-10)
    found, right = gradients(output, layer), gradients(expected.unsqueeze(0), layer)
    for name, gradient in right.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n} {text}")
    other = gradients(attention_in_loops(x[0], state, 3, 3, not detached).unsqueeze(0), layer)["qkv.weight"][:6]
    assert (other - found["qkv.weight"][:6]).norm() > 0.3 * other.norm()  # the choice matters to W_q


# -------------------------------------------------------------------------------------------------- random streams

SEEDS = [0, 1, 2, 3, 7, 41, 2**31, 2**32, 2**32 + 1, 2**33, 2**63 - 1]
RANKS = [0, 1, 2, 3, 6, 7, 8, 63]


def draws():
    """Some numbers of each generator that training draws from."""
    return (
        tuple(torch.rand(4).tolist()),
        tuple(np.random.rand(4).tolist()),
        tuple(random.random() for _ in range(4)),
    )


def test_each_seed_and_rank_has_streams_of_its_own():
    """seed + rank made rank 1 of seed 0 the same as rank 0 of seed 1."""
    streams = {}
    for pair in itertools.product(SEEDS, RANKS):
        seed_everything(*pair)
        streams[pair] = draws()
    for seed in SEEDS[:7]:  # of the weights at the start, alike on all ranks; numpy and torch read 32 bits of it
        seed_everything(seed)
        streams[seed] = draws()
    for numbers in zip(*streams.values(), strict=True):  # of one generator
        assert len(set(numbers)) == len(streams)
    seed_everything(3, 2)
    assert draws() == streams[3, 2]


# ---------------------------------------------------------------- a step's mean and deviation, ranks: test_distributed


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e4])
def test_mean_and_deviation_keep_their_digits(mean):
    values = mean + torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    found = mean_and_deviation(values)
    exact = values.double().numpy()
    assert [float(x) for x in found] == pytest.approx([exact.mean(), exact.std(ddof=1)], rel=1e-12)
    assert [x.dtype for x in found] == [torch.float64] * 2


# ------------------------------------------------------------------------------ what a softmax cannot see stays put

GRID, DIM, BATCH = (3, 2, 2), 16, 2
NUM_TOKENS = 12


def make_mae():
    return PretrainVisionTransformer(
        img_size=8, patch_size=4, all_frames=6, encoder_embed_dim=DIM, encoder_depth=2, encoder_num_heads=2,
        decoder_embed_dim=DIM, decoder_depth=1, decoder_num_heads=2, qkv_bias=True,
    )  # fmt: skip


def make_encoder(**kwargs):
    return VisionTransformer(
        img_size=8, patch_size=4, all_frames=6, embed_dim=DIM, depth=2, num_heads=2, qkv_bias=True, **kwargs
    )


def video_like(module):
    video = torch.rand(BATCH, 3, 6, 8, 8, generator=torch.Generator().manual_seed(2))
    return video.to(next(module.parameters()).dtype)


def tats_loss(tats):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(BATCH, NUM_TOKENS, DIM, generator=generator).to(tats.actor.weight.dtype)
    reward = torch.rand(BATCH, 9, generator=generator).to(tokens.dtype)
    mask = tats(None, torch.arange(BATCH), tokens)
    old = mask.log_prob.detach().gather(1, mask.masked)
    episode = ppo.Episode(tokens, mask.masked, old, reward, mask.value.detach())
    return ppo.sampling_loss(mask.log_prob, mask.value, episode)[0]


def adamae_loss(model):
    """With a weight of the sampling loss that shows in the sampler's gradients."""
    video = video_like(model)
    prediction, mask = model(video, torch.arange(BATCH))
    error = token_error(prediction, reconstruction_target(video, mask, GRID, True), "mse")
    return error.mean() + model.sampler.loss(mask.log_prob, None, ppo.record(None, mask, error))[0]


def classifier_loss(model):
    return F.cross_entropy(model(video_like(model)), torch.arange(BATCH))


CASES = {
    **{
        f"tats {attention} {blocks} {cap}": (
            lambda attention=attention, blocks=blocks, cap=cap: TATS(
                GRID, 0.75, DIM, 2, attention, blocks, num_landmarks=4, logit_cap=cap
            ),
            tats_loss,
            {"actor.bias", f"blocks.{blocks - 1}.mlp.fc2.bias"}
            | (set() if attention == "mha" else {f"blocks.{i}.attn.{n}.bias" for i in range(blocks) for n in
                                                 ("qkv", "proj_kv")}),
        )
        for attention, (blocks, cap) in itertools.product(ATTENTIONS, [(1, 0.0), (2, 2.0)])
    },
    "adamae": (
        lambda: JointModel(make_mae(), AdaMAESampler(GRID, 0.75, DIM, coef=1.0)),
        adamae_loss,
        {"sampler.get_token_probs.1.bias"},
    ),
    "classifier": (lambda: make_encoder(num_classes=5), classifier_loss, set()),
    "attentive probe": (
        lambda: Probe(make_encoder(num_classes=0, use_mean_pooling=False), "attentive", 5),
        classifier_loss,
        {"pool.kv.bias"},
    ),
}  # fmt: skip


def make_case(name):
    torch.manual_seed(0)
    model = CASES[name][0]()
    for parameter in model.parameters():  # away from zeros, behind which all gradients are 0
        noise = torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else 1.5 * parameter[0].numel() ** -0.5)
        parameter.data.add_(noise)
    return model


def float64_gradients(name):
    """The model, and the size of every trained parameter's gradient before the model changes it. The critic is left
    out: units of its ReLU that are off have none."""
    model = make_case(name).double()
    for parameter in model.parameters():
        if parameter._backward_hooks:
            parameter._backward_hooks.clear()
    largest = {n: 0.0 for n, p in model.named_parameters() if p.requires_grad and not n.startswith("critic.")}
    for draw in range(4):  # of AdaMAE's dropout: what it spares by chance has no gradient in that draw
        torch.manual_seed(draw)
        model.zero_grad()
        CASES[name][1](model).backward()
        largest = {n: p.grad.abs().clamp(min=largest[n]) for n, p in model.named_parameters() if n in largest}
    return model, largest


@pytest.mark.parametrize("name", CASES)
def test_parameters_that_cannot_matter_do_not_move(name, monkeypatch):
    """Elements whose gradient is 0 in exact arithmetic, rounding noise in float64: AdamW with --tats_eps 1e-12 moved
    them by its learning rate in float32. All others move, as published."""
    with monkeypatch.context() as exactly:
        exactly.setattr(torch.Tensor, "float", torch.Tensor.double)  # of the logits
        exact_model, exact = float64_gradients(name)
        scale = max(gradient.max().item() for gradient in exact.values())
        unseen = {n: gradient < 1e-13 * scale for n, gradient in exact.items()}
        unseen = {n: elements for n, elements in unseen.items() if elements.any()}
        assert unseen.keys() == CASES[name][2]
        before = exact_model_output(name, exact_model)
        with torch.no_grad():
            for n, parameter in exact_model.named_parameters():
                if n in unseen:
                    parameter[unseen[n]] += 3.0
        torch.testing.assert_close(exact_model_output(name, exact_model), before, rtol=1e-9, atol=1e-11)

    model = make_case(name).train()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = create_optimizer(parameter_groups(model, 0.05), "adamw", lr=1e-3, eps=1e-12)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)  # older states load
    for step in range(4):
        torch.manual_seed(step)
        CASES[name][1](model).backward()
        optimizer.step()
        optimizer.zero_grad()
    for n, parameter in model.named_parameters():
        if n in unseen:
            assert torch.equal(parameter[unseen[n]], start[n][unseen[n]]), n
        if n in exact and n not in unseen:
            assert (parameter != start[n]).float().mean() > 0.9, n


@torch.no_grad()
def exact_model_output(name, model):
    model.eval()
    if name.startswith("tats"):
        generator = torch.Generator().manual_seed(1)
        mask = model(None, None, torch.randn(BATCH, NUM_TOKENS, DIM, generator=generator).double())
        return torch.cat((mask.log_prob.flatten(), mask.value))
    if name == "adamae":
        return model(video_like(model), torch.arange(BATCH))[1].log_prob
    return model(video_like(model))


def test_a_resume_names_flags_that_the_older_run_did_not_have(tmp_path, capsys):
    """Such as --landmark_gradient: a run of an older version had what is off today."""
    (tmp_path / "train.csv").write_text("a.mp4 0\n" * 8)
    args = get_parser().parse_args(["--data_path", str(tmp_path / "train.csv")])
    args.world_size, args.rank = 1, 0
    saved = {name: value for name, value in vars(args).items() if name != "landmark_gradient"}
    run = SimpleNamespace(load=lambda path, state: 1)
    assert runtime_resume.resume(run, args, (tmp_path / "checkpoint-0.pth", {"args": saved, "epoch": 0}), 1) == (
        1,
        None,
    )
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(notes) == 1 and "--landmark_gradient False" in notes[0] and "--lr" not in notes[0]
