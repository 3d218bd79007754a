"""Layer decay, the recipe's schedule, checkpoints into classifiers, position tables, and probes."""

import argparse
import copy
import math
import re

import numpy as np
import pytest
import timm
import torch
from torch import nn
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification

import modeling_finetune  # noqa: F401  registers the models
from engine_for_finetuning import FinetuneRecipe
from masking_generator import Mask
from modeling_finetune import Probe, get_sinusoid_encoding_table
from optim_factory import layer_of, parameter_groups
from runtime.backend import Backend
from runtime.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from runtime.convert import LoadReport, encoder_weights, load_encoder, position_grid, resize_position_table
from tests.helpers import reference
from tests.helpers.models import make_huggingface, random_classifier, random_encoder, random_mae, randomize
from tests.helpers.runs import naming

torch.set_num_threads(1)

KEYS = ("model", "module")


def a_clip(number=2, frames=4, size=16):
    return torch.randn(number, 3, frames, size, size, generator=torch.Generator().manual_seed(2))


def encoder_tokens(mae, video):
    """The pre-training encoder on all tokens, its norm included."""
    number = mae.encoder.patch_embed.num_patches
    everything = torch.arange(number).expand(len(video), -1)
    with torch.no_grad():
        return mae.eval().encoder(video, Mask(everything, everything[:, :0]))


def tokens_of(classifier, video, norm=None):
    with torch.no_grad():
        tokens = classifier.forward_tokens(video)
        return norm(tokens) if norm else tokens


# ------------------------------------------------------------------------------------------------- layer decay


def depth_of(name, blocks):
    """BEiT's assignment, written out."""
    first = name.split(".")[0]
    if first in ("patch_embed", "pos_embed"):
        return 0
    if first == "blocks":
        return 1 + int(name.split(".")[1])
    assert first in ("norm", "fc_norm", "head"), name
    return blocks + 1


def groups_by_name(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs = [(names[id(parameter)], group) for group in groups for parameter in group["params"]]
    assert len(pairs) == len({name for name, _ in pairs})  # each in one group
    return dict(pairs)


NEVER_DECAY = (
    ".bias",
    "q_bias",
    "v_bias",
    "norm1.weight",
    "norm2.weight",
    "norm.weight",
    "pos_embed",
    "gamma_1",
    "gamma_2",
)


@pytest.mark.parametrize("name, blocks", [("vit_base_patch16_224", 12), ("vit_large_patch16_224", 24)])
@pytest.mark.parametrize("settings", [{}, dict(use_learnable_pos_emb=True, init_values=0.1, use_mean_pooling=False)])
def test_layer_decay_of_every_parameter_by_name(name, blocks, settings):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10, **settings)
    groups = parameter_groups(model, 0.05, 0.75)
    found = groups_by_name(model, groups)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for parameter, group in found.items():
        assert group["lr_scale"] == pytest.approx(0.75 ** (blocks + 1 - depth_of(parameter, blocks)), rel=1e-12)
        assert group["weight_decay"] == (0.0 if parameter.endswith(NEVER_DECAY) else 0.05), parameter
        assert layer_of(parameter, blocks) == depth_of(parameter, blocks)
    assert len(groups) == len({(group["lr_scale"], group["weight_decay"]) for group in groups}) == 2 * (blocks + 2)
    assert found["head.weight"]["lr_scale"] == 1 and min(g["lr_scale"] for g in groups) == 0.75 ** (blocks + 1)


@pytest.mark.parametrize("layer_decay", [0.75, 1.0])
def test_frozen_parameters_are_in_no_group(layer_decay):
    model = random_classifier()
    model.blocks[:2].requires_grad_(False)
    model.head.bias.requires_grad_(False)
    found = groups_by_name(model, parameter_groups(model, 0.05, layer_decay))
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert "blocks.2.mlp.fc1.weight" in found and not any(name.startswith(("blocks.0.", "blocks.1.")) for name in found)


def test_no_layer_decay_is_two_groups_of_one_learning_rate():
    model = random_classifier(use_learnable_pos_emb=True)
    groups = parameter_groups(model, 0.05)
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.05]
    assert all("lr_scale" not in group for group in groups)
    decayed = groups_by_name(model, parameter_groups(model, 0.05, 0.5))
    for name, group in groups_by_name(model, groups).items():
        assert group["weight_decay"] == decayed[name]["weight_decay"]


@pytest.mark.parametrize("warmup_steps", [0, 1, 4, 12, 30])
@pytest.mark.parametrize("decay_end", [None, 0.4])
def test_schedule_at_every_step_of_a_run_is_its_formula(warmup_steps, decay_end):
    model = random_classifier()
    backend = Backend(model, torch.optim.SGD(parameter_groups(model, 0.05, 0.5), lr=1.0), torch.device("cpu"))
    half = torch.full((3,), 0.5)
    recipe = FinetuneRecipe(
        mean=half, std=half, lr=0.3, min_lr=0.01, warmup_lr=0.02, weight_decay=0.05, weight_decay_end=decay_end,
        warmup_steps=warmup_steps, steps_per_epoch=4, epochs=3,
    )  # fmt: skip
    rates = []
    for step in range(12):
        if step < warmup_steps:
            lr = np.linspace(0.02, 0.3, warmup_steps)[step] if warmup_steps > 1 else 0.02
        else:
            lr = 0.01 + 0.29 * (1 + math.cos(math.pi * (step - warmup_steps) / (12 - warmup_steps))) / 2
        assert recipe.apply_schedule(backend, step) == pytest.approx(lr, rel=1e-12)
        end = 0.05 if decay_end is None else decay_end
        decay = end + (0.05 - end) * (1 + math.cos(math.pi * step / 12)) / 2
        for name, group in groups_by_name(model, backend.optimizer.param_groups).items():
            assert group["lr"] == pytest.approx(lr * 0.5 ** (4 - depth_of(name, 3)), rel=1e-12)
            assert group["weight_decay"] == pytest.approx(0.0 if name.endswith(NEVER_DECAY) else decay, rel=1e-12)
        rates.append(lr)
    if warmup_steps < 12:
        assert max(rates) == pytest.approx(0.3) and 0.01 < rates[-1] < 0.3


# -------------------------------------------------------------------------------- checkpoints into classifiers


def saved(path, state):
    save_checkpoint(path, state)
    return load_checkpoint(path)


def as_classifier_names(mae):
    """The encoder's tensors without their prefix."""
    return {n.removeprefix("encoder."): w for n, w in mae.state_dict().items() if n.startswith("encoder.")}


def with_prefix(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


VARIANTS = {
    "ours": lambda weights: {"model": weights, "epoch": 3, "args": {"num_frames": 4}},
    "VideoMAE": lambda weights: {"model": weights, "args": argparse.Namespace(model="x", num_frames=16)},
    "DeepSpeed": lambda weights: {"module": weights, "lr_scheduler": None},
    "bare": lambda weights: weights,
    "DDP": lambda weights: {"model": with_prefix(weights, "module.")},
    "backbone": lambda w: {"model": {n.replace("encoder.", "backbone.", 1): v for n, v in w.items()}},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mean_pooling", [True, False])
def test_classifiers_start_from_the_pretrained_encoder(tmp_path, variant, mean_pooling):
    """Their tokens equal the pre-training encoder's on all tokens, and what was taken is said."""
    mae = random_mae()
    state = saved(tmp_path / "checkpoint-3.pth", VARIANTS[variant](mae.state_dict()))
    weights = encoder_weights(state, "x.pth", KEYS)
    classifier = random_classifier(use_mean_pooling=mean_pooling)
    before = copy.deepcopy(classifier.state_dict())
    report = load_encoder(classifier, weights, "x.pth")
    video = a_clip()
    norm = mae.encoder.norm if mean_pooling else None
    torch.testing.assert_close(tokens_of(classifier, video, norm), encoder_tokens(mae, video))

    own, encoder = set(before), set(as_classifier_names(mae))
    taken = own & encoder
    assert (taken >= {"norm.weight", "norm.bias"}) != mean_pooling
    assert set(report.loaded) == taken and len(report.loaded) == len(taken)
    assert set(report.missing) == own - taken and len(report.missing) == len(own - taken)
    fresh = {"head.weight", "head.bias"} | ({"fc_norm.weight", "fc_norm.bias"} if mean_pooling else set())
    assert set(report.missing) == fresh
    outside = {name for name in mae.state_dict() if not name.startswith("encoder.")}
    assert set(report.left_over) == outside | (encoder - own) and len(report.left_over) == len(set(report.left_over))
    after = classifier.state_dict()
    for name in own:
        assert torch.equal(after[name], as_classifier_names(mae)[name] if name in taken else before[name]), name


def test_adamaes_sampler_is_left_over():
    mae = random_mae()
    sampler = {
        "encoder.get_token_probs.0.norm1.weight": torch.ones(24),
        "encoder.pos_embed_probs": torch.ones(1, 8, 24),
    }
    weights = encoder_weights({"model": mae.state_dict() | sampler}, "adamae.pth", KEYS)
    encoder = random_encoder()
    report = load_encoder(encoder, weights, "adamae.pth")
    names = {name.removeprefix("encoder.") for name in sampler}
    assert names <= set(report.left_over) and not report.missing
    torch.testing.assert_close(tokens_of(encoder, a_clip()), encoder_tokens(mae, a_clip()))


def test_huggingfaces_pretraining_model_gives_the_same_tokens():
    theirs = make_huggingface(VideoMAEForPreTraining, use_mean_pooling=False)
    weights = encoder_weights(theirs.state_dict(), "hf", KEYS)
    encoder = random_encoder()
    report = load_encoder(encoder, weights, "hf")
    assert not report.missing and any(name.startswith("decoder.blocks.0.") for name in report.left_over)
    assert "norm.weight" in report.loaded and "mask_token" in report.left_over
    with torch.no_grad():
        expected = theirs.videomae(a_clip().transpose(1, 2)).last_hidden_state
    assert expected.std() > 0.1
    torch.testing.assert_close(tokens_of(encoder, a_clip()), expected, rtol=1e-4, atol=1e-4)


def test_huggingfaces_classifier_gives_the_same_logits_or_lends_its_encoder():
    theirs = make_huggingface(VideoMAEForVideoClassification, use_mean_pooling=True, num_labels=5)
    weights = encoder_weights(theirs.state_dict(), "hf", KEYS)
    ours, other = random_classifier(), random_classifier(num_classes=7)
    report = load_encoder(ours, weights, "hf")
    assert (report.missing, report.left_over) == ([], [])
    with torch.no_grad():
        expected = theirs(a_clip().transpose(1, 2)).logits
        torch.testing.assert_close(ours(a_clip()), expected, rtol=1e-4, atol=1e-4)
    report = load_encoder(other, weights, "hf")
    assert report.missing == ["head.weight", "head.bias"] and set(report.left_over) == {"head.weight", "head.bias"}
    with torch.no_grad():
        torch.testing.assert_close(other.forward_features(a_clip()), ours.forward_features(a_clip()))


@pytest.mark.parametrize("classes", [5, 3])
def test_the_head_is_taken_whole_or_not_at_all(classes):
    source, target = random_classifier(seed=6), random_classifier(num_classes=classes)
    fresh = copy.deepcopy(target.head.state_dict())
    report = load_encoder(target, encoder_weights({"model": source.state_dict()}, "x", KEYS), "x")
    same = classes == 5
    assert report.missing == ([] if same else ["head.weight", "head.bias"]) and report.missing == report.left_over
    for name, value in (source.head.state_dict() if same else fresh).items():
        assert torch.equal(target.head.state_dict()[name], value)
    assert torch.equal(target.fc_norm.weight, source.fc_norm.weight)


PROJECTION = r"patch_embed.proj.weight is \({}, the model has \(24, 3, 2, 8, 8\)"


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(encoder_embed_dim=32), PROJECTION.format(r"32, 3, 2, 8, 8\)")),
        (dict(encoder_depth=2), r"blocks\.2\."),
        (dict(patch_size=4), r"\b1\b.*" + PROJECTION.format(r"24, 3, 2, 4, 4\)")),
        (dict(tubelet_size=1), r"\b1\b.*" + PROJECTION.format(r"24, 3, 1, 8, 8\)")),
        (dict(qkv_bias=False), r"\b6\b.*blocks\.0\.attn\.q_bias, "),
    ],
)
def test_an_encoder_of_another_size_is_refused_with_the_tensors_named(settings, message):
    classifier = random_classifier()
    before = copy.deepcopy(classifier.state_dict())
    weights = encoder_weights({"model": random_mae(**settings).state_dict()}, "mae.pth", KEYS)
    with pytest.raises(CheckpointError, match=f"mae.pth .*{message}"):
        load_encoder(classifier, weights, "mae.pth")
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


def test_a_deeper_encoder_is_refused():
    """Its first blocks alone are no encoder."""
    weights = encoder_weights({"model": random_mae(encoder_depth=4).state_dict()}, "mae.pth", KEYS)
    with pytest.raises(CheckpointError, match=r"mae.pth .*blocks\.3\."):
        load_encoder(random_classifier(), weights, "mae.pth")


def test_a_file_without_an_encoder_is_refused():
    decoder = {name: value for name, value in random_mae().state_dict().items() if not name.startswith("encoder.")}
    with pytest.raises(CheckpointError, match="x.pth .*patch_embed.proj.weight, patch_embed.proj.bias, blocks.0"):
        load_encoder(random_classifier(), encoder_weights({"model": decoder}, "x.pth", KEYS), "x.pth")
    with pytest.raises(CheckpointError, match=naming("x.pth", "'model'", "'module'", "epoch")):
        encoder_weights({"epoch": 3}, "x.pth", KEYS)


def test_keys_and_prefix_say_where_the_encoder_is():
    first, second = random_mae().state_dict(), randomize(random_mae(), seed=11).state_dict()
    name = "blocks.0.attn.proj.weight"
    state = {"model": first, "ema": with_prefix(second, "student."), "module": second}
    assert torch.equal(encoder_weights(state, "x", KEYS)[name], first["encoder." + name])
    assert torch.equal(encoder_weights(state, "x", ("module", "model"))[name], second["encoder." + name])
    chosen = encoder_weights(state, "x", ("ema",), "student.encoder.")
    assert torch.equal(chosen[name], second["encoder." + name]) and "student.mask_token" in chosen
    with pytest.raises(CheckpointError, match=naming("x", "--model_prefix teacher.")):
        encoder_weights(state, "x", KEYS, "teacher.")
    both = {"encoder.norm.weight": torch.ones(2), "norm.weight": torch.zeros(2), "decoder.norm.weight": torch.zeros(2)}
    assert {n: w.tolist() for n, w in encoder_weights(both, "x", KEYS).items()} == {
        "norm.weight": [1, 1], "decoder.norm.weight": [0, 0],
    }  # fmt: skip


def test_a_probes_encoder_is_found_in_its_checkpoint():
    probe, encoder = Probe(random_encoder(), "attentive", 4), random_encoder(seed=8)
    report = load_encoder(encoder, encoder_weights({"model": probe.state_dict()}, "x", KEYS), "x")
    torch.testing.assert_close(tokens_of(encoder, a_clip()), probe.encoder.forward_tokens(a_clip()))
    assert report.missing == [] and {name.split(".")[0] for name in report.left_over} == {"pool", "head"}


def test_report_is_said_in_one_line():
    left = [f"decoder.blocks.{i}" for i in range(46)] + ["mask_token"]
    report = LoadReport(["a", "b", "c"], ["head.weight", "head.bias"], left)
    assert re.fullmatch(r"3\b.* 2\b.* head\.\* \(2\).* 47\b.* decoder\.\* \(46\), mask_token", str(report))
    assert re.fullmatch(r"1\b.* 0\b.* 0\b.*", str(LoadReport(["a"], [], [])))


# ------------------------------------------------------------------------------------------------ position tables


@pytest.mark.parametrize("frames, size", [(4, 16), (8, 16), (2, 24), (4, 32), (12, 8)])
def test_the_fixed_table_is_built_for_the_new_grid(frames, size):
    mae, encoder = random_mae(), random_encoder(all_frames=frames, img_size=size)
    report = load_encoder(encoder, encoder_weights({"model": mae.state_dict()}, "x", KEYS), "x")
    assert not report.missing
    count = frames // 2 * (size // 8) ** 2
    assert torch.equal(encoder.pos_embed, get_sinusoid_encoding_table(count, 24))
    video = a_clip(frames=frames, size=size)
    own_grid = random_mae(all_frames=frames, img_size=size)
    own_grid.load_state_dict(mae.state_dict())
    torch.testing.assert_close(tokens_of(encoder, video), encoder_tokens(own_grid, video))


@pytest.mark.parametrize("old, new", [((2, 2, 2), (4, 3, 3)), ((4, 3, 3), (2, 5, 5)), ((3, 4, 2), (3, 2, 6))])
def test_a_learned_table_is_interpolated(old, new):
    table = torch.randn(1, math.prod(old), 6, generator=torch.Generator().manual_seed(0))
    resized = resize_position_table(table, old, new)
    assert resized.shape == (1, math.prod(new), 6) and resized.dtype == torch.float32
    torch.testing.assert_close(resized.double(), reference.resize_table(table, old, new), rtol=0, atol=1e-5)
    assert resize_position_table(table.half(), old, new).dtype == torch.float16
    assert resize_position_table(table, old, list(old)) is table
    constant = torch.arange(6.0).expand(1, math.prod(old), 6)
    torch.testing.assert_close(resize_position_table(constant, old, new)[0], constant[0, :1].expand(math.prod(new), 6))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_ramp_along_one_axis_stays_one_in_the_interior(axis):
    old, new = (4, 4, 4), [4, 4, 4]
    new[axis] = 8
    places = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in old), indexing="ij"), dim=-1)
    ramp = places[..., axis].reshape(1, -1, 1)
    resized = resize_position_table(ramp, old, tuple(new)).reshape(new).movedim(axis, 0)
    assert (resized == resized[:, :1, :1]).all()  # the other axes have no say
    assert resized[1:-1, 0, 0].tolist() == [0.25, 0.75, 1.25, 1.75, 2.25, 2.75]
    assert resized[[0, -1], 0, 0].tolist() == [0, 3]


def test_a_classifier_with_a_learned_table_takes_it_over():
    mae = random_mae(use_learnable_pos_emb=True)
    state = {"model": mae.state_dict(), "args": {"num_frames": 4}}
    weights = encoder_weights(state, "x", KEYS)
    for frames, size in ((4, 16), (8, 24)):
        encoder = random_encoder(use_learnable_pos_emb=True, all_frames=frames, img_size=size)
        grid = position_grid(state, weights["pos_embed"], encoder.patch_embed.grid, 2, "x")
        assert grid == (2, 2, 2)
        report = load_encoder(encoder, weights, "x", grid)
        assert "pos_embed" in report.loaded and not report.missing
        expected = reference.resize_table(
            mae.encoder.pos_embed.detach(), (2, 2, 2), (frames // 2, size // 8, size // 8)
        )
        torch.testing.assert_close(encoder.pos_embed.detach().double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(weights["pos_embed"], mae.encoder.pos_embed)
    same = random_encoder(use_learnable_pos_emb=True)
    load_encoder(same, weights, "x", (2, 2, 2))
    torch.testing.assert_close(tokens_of(same, a_clip()), encoder_tokens(mae, a_clip()))
    with pytest.raises(CheckpointError, match=naming("x", "pos_embed", "(1, 8, 24)", "(1, 36, 24)")):
        load_encoder(random_encoder(use_learnable_pos_emb=True, all_frames=8, img_size=24), weights, "x")
    del weights["pos_embed"]
    with pytest.raises(CheckpointError, match=naming("x", 1, "pos_embed")):
        load_encoder(same, weights, "x")


@pytest.mark.parametrize(
    "args, tokens, grid, tubelet, expected",
    [
        ({"args": {"num_frames": 16}}, 8 * 14 * 14, (4, 7, 7), 2, (8, 14, 14)),
        ({"args": argparse.Namespace(num_frames=16)}, 16 * 9, (4, 7, 7), 1, (16, 3, 3)),
        ({"args": {"lr": 0.1}}, 4 * 25, (4, 7, 7), 2, (4, 5, 5)),
        ({"args": argparse.Namespace(lr=0.1)}, 4 * 25, (4, 7, 7), 2, (4, 5, 5)),
        ({}, 4 * 49, (4, 7, 7), 2, (4, 7, 7)),
    ],
)
def test_grid_of_a_table(args, tokens, grid, tubelet, expected):
    assert position_grid({"model": {}} | args, torch.zeros(1, tokens, 6), grid, tubelet, "x") == expected


@pytest.mark.parametrize("tokens", [4 * 24, 4 * 25 + 1, 3])
def test_a_table_that_is_no_grid_is_refused(tokens):
    with pytest.raises(CheckpointError, match=naming("x.pth", tokens, 4)):
        position_grid({}, torch.zeros(1, tokens, 6), (4, 7, 7), 2, "x.pth")


# ---------------------------------------------------------------------------------------------------------- probes


def make_probe(kind, drop_path_rate=0.0):
    torch.manual_seed(0)
    return Probe(random_encoder(drop_path_rate=drop_path_rate), kind, 4)


def test_tokens_pooling_and_head_make_the_classifier():
    model, video = random_classifier(), a_clip()
    tokens = tokens_of(model, video)
    assert tokens.shape == (2, 8, 24)
    mean = tokens.double().mean(dim=1)
    spread = ((mean - mean.mean(1, keepdim=True)) ** 2).mean(1, keepdim=True)
    normed = (mean - mean.mean(1, keepdim=True)) / (spread + 1e-6).sqrt()
    state = {name: value.double() for name, value in model.state_dict().items()}
    features = normed * state["fc_norm.weight"] + state["fc_norm.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(video).double(), features, rtol=1e-4, atol=1e-4)
        logits = features @ state["head.weight"].T + state["head.bias"]
        torch.testing.assert_close(model(video).double(), logits, rtol=1e-4, atol=1e-4)
        first = random_classifier(use_mean_pooling=False)
        torch.testing.assert_close(first.forward_features(video), tokens_of(first, video)[:, 0])


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_the_encoder_of_a_probe_is_frozen(kind):
    probe, video = make_probe(kind, drop_path_rate=0.9).train(), a_clip(8)
    assert probe.training and probe.pool.training and probe.head.training
    assert not any(module.training for module in probe.encoder.modules())
    assert not any(parameter.requires_grad for parameter in probe.encoder.parameters())
    nn.functional.cross_entropy(probe(video), torch.arange(8) % 4).backward()
    assert all(parameter.grad is None for parameter in probe.encoder.parameters())
    trained = dict(probe.pool.named_parameters()) | dict(probe.head.named_parameters())
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in trained.values())
    assert (len(dict(probe.pool.named_parameters())) == 0) == (kind == "linear")
    features = probe.features(video)  # the same in training and evaluation, though paths are dropped
    assert not features.requires_grad and not probe.features(video.clone().requires_grad_()).requires_grad
    assert torch.equal(features, probe.features(video)) and torch.equal(features, probe.eval().features(video))
    assert not any(module.training for module in probe.modules())
    still = make_probe(kind)
    torch.testing.assert_close(features, still.features(video))
    groups = parameter_groups(probe, 0.05)
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for p in probe.parameters() if p.requires_grad
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind, shape", [("linear", (6, 24)), ("attentive", (6, 8, 24))])
def test_a_probe_takes_clips_or_their_features(kind, shape, training):
    probe, video = make_probe(kind), a_clip(6)
    features = probe.features(video)
    tokens = tokens_of(probe.encoder, video)
    assert features.shape == shape
    torch.testing.assert_close(features, tokens.mean(dim=1) if kind == "linear" else tokens)
    outputs = [
        call(copy.deepcopy(probe).train(training)).detach()
        for call in (lambda p: p(video), lambda p: p(features), lambda p: p.classify(p.features(video)))
    ]
    assert outputs[0].shape == (6, 4) and outputs[0].std() > 0
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_a_linear_probe_is_batch_norm_and_a_matrix():
    probe, features = make_probe("linear").train(), torch.randn(7, 24) * 3 + 1
    assert 0.005 < probe.head.weight.std() < 0.02 and not probe.head.bias.any()
    randomize(probe.head)
    weight, bias = (p.detach().double() for p in (probe.head.weight, probe.head.bias))
    x = features.double()
    mean, variance = x.mean(0), x.var(0, unbiased=False)
    expected = (x - mean) / (variance + 1e-6).sqrt() @ weight.T + bias
    torch.testing.assert_close(probe(features).detach().double(), expected, rtol=1e-4, atol=1e-4)
    probe.eval()  # running statistics, of one batch
    running_mean, running_variance = 0.1 * mean, 0.9 + 0.1 * x.var(0)
    expected = (x - running_mean) / (running_variance + 1e-6).sqrt() @ weight.T + bias
    torch.testing.assert_close(probe(features).detach().double(), expected, rtol=1e-4, atol=1e-4)


def test_an_attentive_probe_pools_by_a_learned_query():
    """Attention of one query per head, written out; then the MLP with its residual, and the head."""
    probe = make_probe("attentive").eval()
    randomize(probe.pool)
    randomize(probe.head)
    tokens = torch.randn(2, 8, 24)
    state = {name: value.double() for name, value in probe.pool.state_dict().items()}

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    pooled = []
    for clip in tokens.double():
        query = linear(state["latent"][0, 0], "q")
        keys, values = linear(clip, "kv").split(24, dim=-1)
        heads = []
        for head in range(2):
            part = slice(12 * head, 12 * head + 12)
            scores = torch.stack([query[part] @ key[part] for key in keys]) / math.sqrt(12)
            heads.append(sum(w * value[part] for w, value in zip(scores.softmax(0), values, strict=True)))
        x = linear(torch.cat(heads), "proj")
        normed = (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt() * state["norm.weight"] + state["norm.bias"]
        pooled.append(x + linear(nn.functional.gelu(linear(normed, "mlp.fc1")), "mlp.fc2"))
    weight, bias = (p.detach().double() for p in (probe.head.weight, probe.head.bias))
    expected = torch.stack(pooled) @ weight.T + bias
    torch.testing.assert_close(probe(tokens).detach().double(), expected, rtol=1e-4, atol=1e-4)
    shuffled = tokens[:, torch.randperm(8)]
    torch.testing.assert_close(probe(shuffled), probe(tokens), rtol=1e-4, atol=1e-4)  # a set of tokens


def test_an_unknown_probe_is_refused():
    with pytest.raises(ValueError, match=naming("'mlp'", "linear", "attentive")):
        Probe(random_encoder(), "mlp", 4)
