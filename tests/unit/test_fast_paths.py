"""The forms that make a training step fast or small against the plain ones: same values, same gradients, less kept."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import modeling_pretrain
import trajectory_attention
from masking_generator import gumbel_noise, uniform_noise
from modeling_finetune import Attention, Block, run_blocks
from modeling_pretrain import reconstruction_target, token_error
from modeling_tats import ATTENTIONS, TATSBlock
from run_mae_pretraining import SAMPLERS, main
from runtime.backend import COMPILE, Backend
from tests.helpers import reference
from tests.helpers.engines import HEADS, NUM_MASKED, NUM_TOKENS, make_batch, make_run, train_step
from tests.helpers.models import make_input, make_mae, randomize
from tests.helpers.runs import naming
from trajectory_attention import TimeAttention, TrajectoryAttention, orthogonal_landmarks

torch.set_num_threads(1)

DOUBLE = dict(rtol=1e-9, atol=1e-11)
all_layers = pytest.mark.parametrize("approx", ["none", "orthoformer"])
all_attentions = pytest.mark.parametrize("attention", ATTENTIONS)
all_queries = pytest.mark.parametrize("num_queries", [None, 1, 3, 7])
with_and_without = pytest.mark.parametrize("use_checkpoint", [False, True])


def kept_for_backward(function, *modules):
    """function()'s result, and what autograd keeps for the backward pass: a tensor a storage, weights left out."""
    weights = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    saved = []
    with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        result = function()
    storages = {x.untyped_storage().data_ptr(): x for x in saved}
    return result, [x for pointer, x in storages.items() if pointer not in weights]


def num_bytes(tensors):
    return sum(x.untyped_storage().nbytes() for x in tensors)


def gradients(output, inputs):
    """Of a random weighting of the output; 0 for inputs it does not depend on."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(output, inputs, weights.to(output.dtype), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def assert_same(one, other, inputs, **tolerance):  # with gradients
    torch.testing.assert_close(one, other, **tolerance)
    for a, b in zip(gradients(one, inputs), gradients(other, inputs), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def state_of(module):
    return dict(module.named_parameters())


# ------------------------------------------------------------------------------------------- single layers


def in_pieces(monkeypatch, size):
    cut = lambda y, heads: [slice(i, i + size) for i in range(0, y.shape[1], size)]  # noqa: E731
    monkeypatch.setattr(trajectory_attention, "_pieces", cut)


def time_inputs(bias, t=3, queries=6, heads=2, width=8):
    torch.manual_seed(0)
    shapes = (t, queries, width), (width, width), (width,), (2 * heads, width // heads, width)
    y, w_q, b_q, w_kv = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return y, w_q, b_q if bias else None, w_kv


@pytest.mark.parametrize("first, frames", [(0, 1), (2, 1), (0, 2), (1, 2), (0, 3)])
@pytest.mark.parametrize("piece", [1, 4, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_eq_2_folded_equals_the_equation(first, frames, piece, bias, monkeypatch):
    in_pieces(monkeypatch, piece)
    y, w_q, b_q, w_kv = time_inputs(bias)
    own = first + torch.arange(frames).repeat_interleave(6 // frames)
    expected = reference.time_attention(y, own, w_q, b_q, *w_kv.chunk(2))
    inputs = [x for x in (y, w_q, b_q, w_kv) if x is not None]
    assert_same(TimeAttention.apply(y, first, frames, w_q, b_q, w_kv), expected, inputs, **DOUBLE)


@pytest.mark.parametrize("piece", [1, 4, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_eq_2_passes_a_finite_difference_check(piece, bias, monkeypatch):
    in_pieces(monkeypatch, piece)
    y, *weights = time_inputs(bias, width=4)
    assert torch.autograd.gradcheck(lambda y, *weights: TimeAttention.apply(y, 1, 2, *weights), (y, *weights))


def test_second_derivatives_are_refused():
    y, *weights = time_inputs(True)
    for output in (TimeAttention.apply(y, 0, 2, *weights), token_error(y, torch.zeros(3, 6, 8), "mse")):
        (gradient,) = torch.autograd.grad(output.square().sum(), y, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.parametrize("queries, heads, width", [(3136, 6, 384), (196, 3, 192), (1, 16, 2**20), (37, 2, 2**17)])
def test_pieces_are_every_query_once_and_fit_the_budget(queries, heads, width):
    pieces = trajectory_attention._pieces(torch.empty(()).expand(8, queries, width), heads)
    assert [i for piece in pieces for i in range(queries)[piece]] == list(range(queries))
    assert max(len(range(queries)[piece]) for piece in pieces) * heads * width < 2**20 + heads * width
    assert len(pieces) <= 1 + queries * heads * width // 2**20


def make_layer(approx="none", dtype=torch.float64, dim=8, recompute=False, **kwargs):
    torch.manual_seed(0)
    layer = TrajectoryAttention(dim, 2, **{"qkv_bias": True, "approx": approx, "num_landmarks": 3, **kwargs}).to(dtype)
    layer.recompute = recompute
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=1.5 * dim**-0.5 if parameter.dim() == 2 else 1.0)
    return layer


def reference_layer(layer, x, num_frames, function=reference.trajectory_attention_at_once):
    landmarks = None if layer.approx == "none" else layer.num_landmarks
    settings = [layer.project_value, landmarks]
    if function is reference.trajectory_attention_at_once:  # the one in loops has values alone
        settings.append(layer.landmark_gradient)
    return function(x, state_of(layer), layer.num_heads, num_frames, *settings)


@all_layers
@pytest.mark.parametrize("project_value", [True, False])
@torch.no_grad()
def test_the_reference_in_einsums_is_the_one_in_loops(approx, project_value):
    layer, x = make_layer(approx, project_value=project_value), torch.randn(2, 6, 8, dtype=torch.float64)
    expected = reference_layer(layer, x, 3, reference.trajectory_attention)
    torch.testing.assert_close(reference_layer(layer, x, 3), expected, **DOUBLE)


@pytest.mark.parametrize("name, extra", [("trajectory_tokens", {}), ("orthoformer_tokens", dict(num_landmarks=3))])
def test_trajectory_tokens_of_several_clips_are_those_of_each(name, extra):
    tokens = functools.partial(getattr(trajectory_attention, name), num_frames=3, **extra)
    qkv = torch.randn(3, 2, 4, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(tokens(*qkv), torch.cat([tokens(*qkv[:, [clip]]) for clip in (0, 1)]), **DOUBLE)


# groups of whole frames with 256 queries a clip or a few more: all, 3 + 1, 2 + 2 + 1, 1 + 1
@all_layers
@pytest.mark.parametrize("frames, size, groups", [(3, 6, 1), (4, 90, 2), (5, 130, 3), (2, 257, 2)])
@pytest.mark.parametrize(
    "kwargs",
    [{}, dict(qkv_bias=False), dict(project_value=False), dict(recompute=True), dict(landmark_gradient=True),
     dict(landmark_gradient=True, recompute=True)], ids=str,
)  # fmt: skip
def test_layer_equals_the_equations_with_all_gradients(approx, frames, size, groups, kwargs, monkeypatch):
    in_pieces(monkeypatch, 200 if size > 6 else 4)
    layer = make_layer(approx, **kwargs)
    x = torch.randn(2, frames * size, 8, dtype=torch.float64, requires_grad=True)
    calls, attend = [], layer._attend
    monkeypatch.setattr(layer, "_attend", lambda *args: calls.append(1) or attend(*args))
    output = layer(x, frames)
    assert len(calls) == groups
    assert_same(output, reference_layer(layer, x, frames), [x, *layer.parameters()], **DOUBLE)
    assert len(calls) == groups * (2 if layer.recompute else 1)


# In units of N D values: t trajectory tokens, x, q, k, v, eq. 2's query, result; t h / D float32 for each softmax;
# 7 D^2 weights in bf16. Eq. 1's weights would be 64 more, copies of queries t, eq. 2's wide tensors h, of x in bf16 2.
@all_layers
@pytest.mark.parametrize("bf16", [False, True])
def test_layer_keeps_little_more_than_the_trajectory_tokens_or_recomputes_them(approx, bf16):
    t, size, width, layer = 16, 64, 32, make_layer(approx, torch.float32, dim=32)
    x, results = torch.randn(1, t * size, width, requires_grad=True), []
    for layer.recompute in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output, kept = kept_for_backward(lambda: layer(x, t), layer)
        results.append([output, *gradients(output, [x, *layer.parameters()])])
        units, softmaxes = (6, 0) if layer.recompute else (t + 6, 2 * t * 2 / width)
        assert num_bytes(kept) <= t * size * width * (units * output.element_size() + softmaxes * 4) + 14 * width**2
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@all_layers
def test_bf16_layer_is_close_and_its_softmaxes_are_float32(approx):
    """Every query a landmark, lest rounding picks others. Errors of norms; bf16 has 8 bits, 0.4 %."""
    layer, x = make_layer(approx, torch.float32, dim=32, num_landmarks=24), torch.randn(2, 24, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, kept = kept_for_backward(lambda: layer(x, 4), layer)
    exact, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    expected = reference_layer(exact, x64, 4)
    results = [output, *gradients(output, [x, *layer.parameters()])]
    references = [expected, *gradients(expected, [x64, *exact.parameters()])]
    for name, a, b in zip(["output", "x", *state_of(layer)], results, references, strict=True):
        assert (a - b).norm() < (0.015 if name == "output" else 0.04) * b.norm(), name
    eq_1, eq_2 = ([x.dtype for x in kept if x.shape == shape] for shape in ((4, 24, 24), (48, 2, 4)))
    assert eq_2 == [torch.float32] and eq_1.count(torch.float32) == (approx == "orthoformer")


def test_bf16_gradients_of_many_pieces_are_added_in_float32(monkeypatch):
    y, *weights = (x.detach().bfloat16().requires_grad_() for x in time_inputs(True, queries=600))
    found = []
    for size in (1, 600):
        in_pieces(monkeypatch, size)
        found += gradients(TimeAttention.apply(y, 0, 3, *weights), weights[-1:])
    assert (found[0] - found[1]).norm() < 0.007 * found[1].norm()


@pytest.mark.parametrize("shape, num_landmarks", [((1, 2, 9, 4), 3), ((2, 1, 5, 3), 8), ((2, 3, 12, 5), 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_landmarks_are_a_proper_operator_for_the_compiler(shape, num_landmarks, dtype):
    q = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.library.opcheck(orthogonal_landmarks, (q, num_landmarks))
    expected = [[reference.greedy_landmarks(h.double(), min(num_landmarks, shape[2])) for h in clip] for clip in q]
    assert orthogonal_landmarks(q, num_landmarks).tolist() == expected


@all_queries
@pytest.mark.parametrize("kwargs", [{}, dict(qkv_bias=True), dict(qkv_bias=True, qk_scale=0.9)], ids=str)
def test_attention_of_the_last_tokens_is_a_part_of_the_whole(num_queries, kwargs):
    attention = randomize(Attention(12, 3, **kwargs)).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    expected = reference.self_attention(x, state_of(attention), 3, kwargs.get("qk_scale"))
    inputs = [x, *attention.parameters()]
    assert_same(attention(x, num_queries), expected[:, -(num_queries or 7) :], inputs, **DOUBLE)


@all_queries
@pytest.mark.parametrize("kwargs", [{}, dict(qkv_bias=True), dict(qkv_bias=True, init_values=0.3)], ids=str)
@with_and_without
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_blocks_for_the_last_tokens_give_a_part_of_the_whole(num_queries, kwargs, use_checkpoint, depth):
    blocks = randomize(nn.ModuleList(Block(12, 3, **kwargs) for _ in range(depth))).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    expected, mixed = x, []
    for block in blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: mixed.append(args[0].shape[1]))
        expected = reference.block(expected, state_of(block), lambda y, s: reference.self_attention(y, s, 3), eps=1e-5)
    output = run_blocks(blocks, x, use_checkpoint, num_queries)
    assert mixed == ([7] * (depth - 1) + [num_queries or 7] if depth else [])
    assert_same(output, expected[:, -(num_queries or 7) :], [x, *blocks.parameters()], **DOUBLE)
    assert len(mixed) == depth * (2 if use_checkpoint else 1)


@pytest.mark.parametrize("depth", [1, 2])
@with_and_without
@pytest.mark.parametrize("spared", [0, 3, 6])
def test_autoencoder_equals_one_that_computes_every_token(depth, use_checkpoint, spared):
    mae, mixed = randomize(make_mae(decoder_depth=depth, use_checkpoint=use_checkpoint)).double(), []
    mae.decoder.blocks[-1].mlp.register_forward_pre_hook(lambda _, args: mixed.append(args[0].shape[1]))
    _, video, mask = make_input()
    mask, video, state = mask._replace(masked=mask.masked[:, spared:]), video.double(), state_of(mae)
    expected = reference.videomae(reference.embed(video, state), *mask[:2], state, (2, 4))
    assert_same(mae(video, mask), expected, list(mae.parameters()), rtol=1e-6, atol=1e-6)  # tables are float32
    assert {*mixed} == {7 - spared}


@pytest.mark.parametrize("loss, function", [("mse", F.mse_loss), ("l1", F.l1_loss)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_token_error_equals_torchs_loss_and_keeps_one_tensor(loss, function, dtype):
    """A bf16 gradient is rounded twice: the tensor that is kept, and the result."""
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 200, 24).to(dtype), torch.randn(2, 200, 24)
    target[0, 0] = prediction[0, 0]  # no error at all: no slope
    target[1, 2, ::2] = prediction[1, 2, ::2]
    prediction.requires_grad_()
    error, kept = kept_for_backward(lambda: token_error(prediction, target, loss))
    assert [(x.shape, x.dtype) for x in kept] == [(prediction.shape, dtype)]
    exact = prediction.detach().double().requires_grad_()
    expected = function(exact, target.double(), reduction="none").mean(dim=-1)
    (ours,), (theirs,) = gradients(error, [prediction]), gradients(expected, [exact])
    assert error.dtype == torch.float32 and ours.dtype == dtype and not ours[0, 0].any()
    torch.testing.assert_close(error.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.double(), theirs, rtol=1.01 * 2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_targets_from_bytes_are_those_from_floats(normalize):
    clips = torch.randint(0, 256, (2, 4, 3, 16, 24), dtype=torch.uint8).transpose(1, 2)  # as a batch has them
    rest = make_input()[2], (2, 2, 3), normalize
    target, expected = (reconstruction_target(x, *rest) for x in (clips, clips.float() / 255))
    assert target.dtype == torch.float32
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-5 if normalize else 0)


@pytest.mark.parametrize("clip_grad", [None, 0.5, 100.0])
def test_gradient_norm_is_torchs_and_gradients_change_by_clipping_alone(clip_grad):
    torch.manual_seed(0)
    module = nn.ModuleList([nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(2, 2)])  # the last one gets no gradient
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    trained, seen = Backend(module, optimizer, torch.device("cpu"), clip_grad=clip_grad), []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in [*module[0].parameters()]))
    trained.backward(module[1](module[0](torch.randn(6, 5))).square().sum())
    expected = copy.deepcopy(module)
    for p, own in zip(expected.parameters(), module.parameters(), strict=True):
        p.grad = None if own.grad is None else own.grad.clone()
    norm = nn.utils.clip_grad_norm_(expected.parameters(), clip_grad or math.inf)
    trained.step()
    assert 1 < norm < 100 and torch.equal(trained.grad_norm, norm)
    assert all(torch.equal(a, p.grad) for a, p in zip(seen, expected[0].parameters(), strict=True))


def make_block(attention, use_checkpoint=False, dtype=torch.float32):
    block, head = randomize(TATSBlock(16, 2, attention, 3, use_checkpoint)).to(dtype), nn.Linear(16, 1)
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    return block, randomize(head).to(dtype), x


@all_attentions
@with_and_without
def test_score_is_the_head_of_the_whole_block(attention, use_checkpoint):
    block, head, x = make_block(attention, use_checkpoint, torch.float64)
    inputs = [x, *block.parameters(), *head.parameters()]
    whole = reference.block(x, state_of(block), reference.tats_attention(attention, 2, 3, 3))
    assert_same(block(x, 3), whole, inputs, **DOUBLE)
    score = block.score(x, 3, head).double()
    assert_same(score, (whole @ head.weight.T + head.bias).squeeze(-1), inputs, rtol=1e-5, atol=1e-5)  # added as float


@all_attentions
@pytest.mark.parametrize("method, num_arguments", [("forward", 2), ("score", 3)])
def test_checkpointed_block_keeps_less_and_is_the_same(attention, method, num_arguments):
    kept, results = [], []
    for use_checkpoint in (False, True):
        block, head, x = make_block(attention, use_checkpoint)
        call = functools.partial(getattr(block, method), *(x, 4, head)[:num_arguments])
        output, tensors = kept_for_backward(call, block, head)
        kept.append([x.untyped_storage().nbytes() for x in tensors])
        results.append([output, *gradients(output, [x, *block.parameters(), *head.parameters()])])
        with torch.no_grad():
            assert torch.equal(call(), output)
    assert sum(kept[1]) < 0.6 * sum(kept[0])
    assert max(kept[1]) < 4 * 24 * 64 <= max(kept[0])  # a hidden layer of the MLP, and 4 trajectory tokens a token
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_mlps_second_matrix_meets_no_tokens():
    block, head, x = make_block("mha")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block._mix_and_score(x, head)
    products = 24 * 16 * 64 + 64 * 16 + 24 * 64 + 24 * 16 + 16  # fc1, folding, two scalar products a token, the bias
    assert 0 < counter.get_total_flops() <= 2 * products


def test_bf16_scores_are_added_in_float32():
    block, head, x = make_block("mha")
    nn.init.zeros_(block.mlp.fc2.bias), nn.init.zeros_(head.bias)
    with torch.autocast("cpu", torch.bfloat16):
        score = block.score(x, 3, head)
    assert score.dtype == torch.float32 and not torch.equal(score, score.bfloat16().float())


# ------------------------------------------------------------------------------------------- whole steps


@pytest.fixture
def tiny(monkeypatch):  # the tiny model even smaller
    monkeypatch.setitem(modeling_pretrain.SIZES, "tiny", dict(embed_dim=32, depth=2, num_heads=HEADS[0]))


def draw_mask(run, seed):
    video = make_batch(0)["video"].transpose(1, 2) / 255
    return run.sampler(video, seed, run.mae.encoder.patch_embed(video))


@pytest.mark.parametrize("mask_type", SAMPLERS)
def test_a_spared_decoder_leaves_the_encoders_mask_as_it_is(mask_type, tiny):
    whole, run = (make_run(f"--mask_type {mask_type} --decoder_mask_ratio {ratio}") for ratio in (0, 0.6))
    seed = torch.tensor([5, 9])
    full, mask = draw_mask(whole, seed), draw_mask(run, seed)
    assert torch.equal(mask.visible, full.visible)
    assert full.masked.shape == (2, 48) and mask.masked.shape == (2, 48 - 28)
    for kept, hidden in zip(mask.masked.tolist(), full.masked.tolist(), strict=True):
        assert kept == sorted(set(kept) & set(hidden))
    torch.manual_seed(1)
    assert torch.equal(draw_mask(run, seed).masked, mask.masked)
    assert not torch.equal(draw_mask(run, seed + 1).masked, mask.masked)
    if run.sampler.needs_tokens:  # without a seed, as phase 2 and pictures ask
        assert draw_mask(run, None).masked.shape == (2, 48)
        assert torch.equal(mask.log_prob, full.log_prob)
    if run.warmup_sampler:
        assert run.warmup_sampler(None, seed).masked.shape == (2, 20)


@pytest.mark.parametrize(
    "flags, steps",
    [
        ("--mask_type tube", 20),
        ("--mask_type random --loss l1 --clip_grad 0.5 --no-normalize_target --decoder_mask_ratio 0.5", 20),
        ("--mask_type adamae --decoder_mask_ratio 0.3", 20),
        ("--mask_type tats --tats_attention trajectory", 20),
        # the plain search for landmarks is slow
        ("--mask_type tats --tats_attention orthoformer --clip_grad 0.3 --decoder_mask_ratio 0.5 --use_checkpoint", 8),
        ("--mask_type tats --landmark_gradient", 8),
    ],
)
def test_steps_follow_plain_training(flags, steps, tiny):
    run = make_run(flags)
    plain = reference.PlainTraining(run.mae, run.sampler, run.args, run.mae.grid, HEADS)
    masks, spare_decoder = [], run.sampler.spare_decoder  # the last step of every draw
    run.sampler.spare_decoder = lambda *drawn: masks.append(spare_decoder(*drawn)) or masks[-1]

    for i in range(steps):
        batch = make_batch(i)
        seed, fixed = batch["seed"], run.args.mask_type in ("tube", "random")
        scores = run.sampler.scores(None, seed) if fixed else gumbel_noise(seed, NUM_TOKENS)
        noise = uniform_noise(seed ^ 0x5DEECE66D, 1 + NUM_MASKED)
        stats, expected = train_step(run, i), plain.step(batch["video"], scores, noise)
        masked, log_prob = expected.pop("masked"), expected.pop("log_prob")
        assert torch.equal(masks[i].masked, masked)
        if not fixed:
            torch.testing.assert_close(masks[i].log_prob.double(), log_prob, rtol=1e-5, atol=1e-5)
        assert {name: stats[name] for name in expected} == pytest.approx(expected, rel=1e-5), i  # measured: 4e-7


slowly = functools.partial(pytest.param, marks=pytest.mark.slow)


# parts that are compiled: autoencoder and error; TATS; its policy without gradient
@pytest.mark.parametrize(
    "flags, parts",
    [
        ("--mask_type tube --loss l1 --decoder_depth 1", 2),
        slowly("--mask_type random --use_checkpoint --no-normalize_target", 2),
        slowly("--mask_type motion --decoder_mask_ratio 0.5", 2),
        slowly("--mask_type frame --amp bf16", 2),
        slowly("--mask_type adamae --decoder_mask_ratio 0.5 --checkpoint_modules sampler", 2),
        ("--mask_type tats --tats_blocks 2 --amp bf16", 3),
        slowly("--mask_type tats --tats_attention trajectory --use_checkpoint --decoder_mask_ratio 0.5", 3),
        slowly("--mask_type tats --tats_attention mha --ppo_epochs 2 --amp bf16", 4),
    ],
)
def test_compiled_training_has_no_graph_break_and_the_same_losses(flags, parts, tiny, monkeypatch):
    torch._dynamo.reset()
    graphs, aot_eager = [], torch._dynamo.lookup_backend("aot_eager")
    assert COMPILE["fullgraph"]  # a graph break is an error
    monkeypatch.setitem(COMPILE, "backend", lambda *args: graphs.append(1) or aot_eager(*args))
    plain, compiled = make_run(flags), make_run(f"{flags} --compile")
    assert plain.mae.state_dict().keys() == compiled.mae.state_dict().keys()
    tolerance = 0.01 if "bf16" in flags else 1e-5  # autocast adds in bf16 what a weight used twice gets
    for i in range(2):
        expected, stats = train_step(plain, i), train_step(compiled, i)
        for name in expected.keys() - {"data_time", "step_time", "peak_memory"}:
            assert stats[name] == pytest.approx(expected[name], rel=tolerance, abs=1e-7, nan_ok=True), name
        assert len(graphs) == parts  # nothing is compiled again in the next epoch


def step_and_bytes_kept(run):
    torch.manual_seed(3)
    result = [torch.tensor(train_step(run, 0)["loss"]), *run.mae.parameters(), *run.sampler.parameters()]
    x, video = torch.randn(2, NUM_TOKENS, 64, requires_grad=True), make_batch(0)["video"].transpose(1, 2) / 255
    tokens = run.mae.encoder.patch_embed(video)
    mask, sampler = kept_for_backward(lambda: run.sampler(video, torch.arange(2), tokens), run.sampler)
    _, encoder = kept_for_backward(lambda: run.mae.encoder(video, mask), run.mae)
    _, decoder = kept_for_backward(lambda: run.mae.decoder(x, NUM_MASKED), run.mae)
    return result, dict(encoder=num_bytes(encoder), decoder=num_bytes(decoder), sampler=num_bytes(sampler))


@pytest.mark.parametrize("mask_type", ["adamae", "tats"])
@pytest.mark.parametrize("chosen", ["encoder", "decoder", "sampler", "decoder sampler", "encoder decoder sampler"])
def test_each_part_can_be_checkpointed_alone_and_changes_nothing(mask_type, chosen, tiny):
    flag = f"--checkpoint_modules {chosen}" if chosen.count(" ") < 2 else "--use_checkpoint"
    flags = f"--mask_type {mask_type} --tats_attention trajectory "
    (plain, whole), (result, kept) = (step_and_bytes_kept(make_run(flags + f, dropout=0.1)) for f in ("", flag))
    assert all(torch.equal(a, b) for a, b in zip(plain, result, strict=True))
    for name in whole:
        assert kept[name] < 0.6 * whole[name] if name in chosen else kept[name] == whole[name], name


@pytest.mark.parametrize(
    "flag, others",
    [
        *((f"--decoder_mask_ratio {x}", []) for x in ("1.0", "-0.1", "nan", "1.5")),
        ("--checkpoint_modules sampler", ["--mask_type tube"]),
    ],
)
def test_flags_that_make_no_sense_get_one_clear_error(flag, others):
    with pytest.raises(SystemExit, match=naming("error: ", flag, *others)) as stop:
        main(flag.split())
    assert "\n" not in str(stop.value)
