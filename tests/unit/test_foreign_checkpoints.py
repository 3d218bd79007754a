"""Other people's checkpoints: loaded whole with a report, or refused by one line that says what they are."""

import argparse
import json
import os
import re
import shutil
import sys
import types
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from transformers import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

import run_class_finetuning
import run_mae_pretraining
import run_mae_vis
from datasets.moving_shapes import write_dataset
from masking_generator import Mask
from modeling_adamae import AdaMAESampler
from modeling_finetune import get_sinusoid_encoding_table, is_sinusoid_encoding_table
from runtime import foreign_files
from runtime.checkpoint import CheckpointError, load_checkpoint, open_checkpoint, saved_args
from runtime.convert import (
    INFLATIONS,
    encoder_weights,
    load_autoencoder,
    load_encoder,
    load_weights,
    model_weights,
)
from runtime.resume import find_resume
from tests.helpers import reference
from tests.helpers.models import make_huggingface, random_classifier, random_encoder, random_mae, randomize
from tests.helpers.runs import assert_names, naming
from tools import run_folders

torch.set_num_threads(1)

KEYS = ("model", "module")


def a_clip(frames=4, size=16):
    return torch.randn(2, 3, frames, size, size, generator=torch.Generator().manual_seed(2))


def a_mask(tokens=8, visible=3):
    order = torch.stack([torch.randperm(tokens, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    return Mask(order[:, :visible].sort(dim=1).values, order[:, visible:].sort(dim=1).values)


def saved(path, content) -> Path:
    torch.save(content, path)
    return path


def refused(path, *words) -> str:
    with pytest.raises(CheckpointError) as error:
        model_weights(open_checkpoint(path)[1], path)
    message = str(error.value)
    assert "\n" not in message
    assert_names(message, *words)
    return message


# --- Hugging Face ------------------------------------------------------------------------------------------------


def check_tokens(theirs, path, key="", prefix=""):
    """An encoder here, from the file or folder, gives the tokens of transformers' VideoMAEModel."""
    path, state = open_checkpoint(path)
    encoder = random_encoder()
    report = load_encoder(encoder, encoder_weights(state, path, (key,) if key else KEYS, prefix), path)
    assert not report.missing and len(report.loaded) == len(encoder.state_dict())
    with torch.no_grad():
        expected = theirs(a_clip().transpose(1, 2)).last_hidden_state
        assert expected.std() > 0.1
        torch.testing.assert_close(encoder.forward_tokens(a_clip()), expected, rtol=1e-4, atol=1e-4)


def check_pixels(theirs, path):
    path, state = open_checkpoint(path)
    mae = random_mae()
    report = load_autoencoder(mae, model_weights(state, path), path)
    assert (report.missing, report.left_over) == ([], []) and set(report.loaded) == set(mae.state_dict())
    mask = a_mask()
    with torch.no_grad():
        expected = theirs(a_clip().transpose(1, 2), bool_masked_pos=mask.hidden()).logits
        torch.testing.assert_close(mae.eval()(a_clip(), mask), expected, rtol=1e-4, atol=1e-4)


def check_logits(theirs, path):
    path, state = open_checkpoint(path)
    ours = random_classifier()
    load_weights(ours, encoder_weights(state, path, KEYS), path)
    with torch.no_grad():
        torch.testing.assert_close(ours(a_clip()), theirs(a_clip().transpose(1, 2)).logits, rtol=1e-4, atol=1e-4)


THEIRS = {
    "encoder": (VideoMAEModel, dict(use_mean_pooling=False), check_tokens),
    "pre-training": (VideoMAEForPreTraining, dict(use_mean_pooling=False), check_pixels),
    "classifier": (VideoMAEForVideoClassification, dict(num_labels=5), check_logits),
}
SHARD = {"whole": "1GB", "shards": "20KB"}


@pytest.mark.parametrize("size", SHARD)
@pytest.mark.parametrize("kind", THEIRS)
def test_folders_of_save_pretrained_give_transformers_outputs(kind, size, tmp_path):
    model_class, settings, check = THEIRS[kind]
    theirs = make_huggingface(model_class, **settings)
    theirs.save_pretrained(tmp_path, max_shard_size=SHARD[size])
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (size == "shards")
    check(theirs, tmp_path)
    check(theirs, next(iter(tmp_path.glob("*.index.json")), tmp_path / "model.safetensors"))  # the file itself


def shards_of_torch(weights: dict, folder: Path) -> None:
    """pytorch_model.bin in two shards, as older versions of transformers write them."""
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    places = {name: names[i % 2] for i, name in enumerate(weights)}
    for shard in names:
        torch.save({name: weights[name] for name in weights if places[name] == shard}, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_shards_of_torch_and_a_missing_one(tmp_path):
    theirs = make_huggingface(VideoMAEForPreTraining, use_mean_pooling=False)
    shards_of_torch(theirs.state_dict(), tmp_path)
    check_pixels(theirs, tmp_path)
    refused(tmp_path / "pytorch_model-00002-of-00002.bin", "2", "folder")
    (tmp_path / "pytorch_model-00002-of-00002.bin").rename(tmp_path / "elsewhere")
    refused(tmp_path, "pytorch_model-00002-of-00002.bin", "missing")
    index = tmp_path / "pytorch_model.bin.index.json"
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../elsewhere"}}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        refused(tmp_path, index)
    index.write_text(json.dumps({"weight_map": {"never.there": "pytorch_model-00001-of-00002.bin"}}))
    refused(tmp_path, index, "never.there")


PREFIXES = ["model.", "module.", "_orig_mod.", "net.", "backbone.", "encoder.", "model.module._orig_mod.",
            "_orig_mod.module.model.backbone.", "backbone.model.encoder.", "encoder.model."]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("key", ["", "model", "state_dict"])
def test_the_prefix_of_huggingface_names_is_found(prefix, key, tmp_path):
    theirs = make_huggingface(VideoMAEModel, use_mean_pooling=False)
    weights = {prefix + name: value for name, value in theirs.state_dict().items()}
    content = {key: weights, "optimizer_states": [], "epoch": 3} if key else weights
    check_tokens(theirs, saved(tmp_path / "x.pth", content))
    whole = make_huggingface(VideoMAEForPreTraining, use_mean_pooling=False)
    weights = {prefix + name: value for name, value in whole.state_dict().items()}
    check_pixels(whole, saved(tmp_path / "y.pth", {key: weights} if key else weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(dtype, tmp_path):
    theirs = make_huggingface(VideoMAEModel, use_mean_pooling=False).to(dtype)
    theirs.save_pretrained(tmp_path)
    weights = model_weights(open_checkpoint(tmp_path)[1], tmp_path)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    check_tokens(theirs.float(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_stored_fixed_table_is_known_in_every_precision(dtype, tmp_path):
    fixed = get_sinusoid_encoding_table(8, 24)
    assert is_sinusoid_encoding_table(fixed.to(dtype)) and is_sinusoid_encoding_table(fixed.to(dtype).float())
    noise = 0.02 * torch.randn(fixed.shape, generator=torch.Generator().manual_seed(0))
    assert not is_sinusoid_encoding_table((fixed + noise).to(dtype))
    theirs = make_huggingface(VideoMAEModel, use_mean_pooling=False).to(dtype)
    weights = theirs.state_dict() | {"embeddings.position_embeddings": fixed.to(dtype)}
    weights = encoder_weights({"model": weights}, "x", KEYS)
    assert torch.equal(weights["pos_embed"], fixed.to(dtype).float())
    report = load_encoder(random_encoder(), weights, "x")
    assert report.left_over == ["pos_embed"] and not report.missing


# --- names of other wrappers -------------------------------------------------------------------------------------


def wrapped(mae) -> dict[str, dict]:
    plain = mae.state_dict()
    inner = {n.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): v for n, v in plain.items()}
    compiled = {n.replace("coder.", "coder._orig_mod."): v for n, v in plain.items()}
    return {
        "torch.compile": {"model": torch.compile(mae, backend="eager").state_dict()},  # the names alone
        "an average": {"state_dict_ema": nn.ModuleDict({"module": mae}).state_dict(), "args": {}},
        "DataParallel": nn.DataParallel(mae).state_dict(),
        "DDP of torch.compile": {"model": {f"module._orig_mod.{n}": v for n, v in plain.items()}},
        "parts compiled": {"model": compiled},
        "activation checkpointing": {"model": {f"_fsdp_wrapped_module.{n}": v for n, v in inner.items()}},
        "Lightning": {"state_dict": {f"net.{n}": v for n, v in plain.items()}, "hyper_parameters": {"lr": 1.0}},
        "two levels": {"checkpoint": {"model": plain, "epoch": 3}, "hash": "x"},
        "three levels": {"a": {"b": {"c": plain}}},
        "params": {"params": plain, "optimizer": {"state": {"x.y": torch.ones(2)}}},
        "a loss beside it": {"weights": plain, "loss": torch.tensor(0.3)},
        "an empty model": {"model": {}, "module": None, "state_dict": plain},
        "a name": {"model": "pretrain_videomae", "net": plain},
        "mixed": {"model": {("module." if i % 2 else "") + n: v for i, (n, v) in enumerate(plain.items())}},
        "parameters": {"model": dict(mae.named_parameters())},
        "half of it half": {"model": {n: v.half().float().half() if i % 2 else v.half().float()
                                      for i, (n, v) in enumerate(plain.items())}},
        "numpy": {"model": {n: v.numpy() for n, v in plain.items()}},
    }  # fmt: skip


WRAPPED = list(wrapped(random_mae()))


@pytest.mark.parametrize("name", WRAPPED)
def test_an_autoencoder_in_every_wrapping_loads_whole(name, tmp_path):
    mae, target, encoder = random_mae(), randomize(random_mae(), seed=3), random_encoder()
    path, state = open_checkpoint(saved(tmp_path / "x.pth", wrapped(mae)[name]))
    report = load_autoencoder(target, model_weights(state, path), path)
    assert set(report.loaded) == set(mae.state_dict()) and (report.missing, report.left_over) == ([], [])
    atol = 1e-2 if "half" in name else 0
    for tensor, value in mae.state_dict().items():
        torch.testing.assert_close(target.state_dict()[tensor], value, rtol=0, atol=atol)
    assert not load_encoder(encoder, encoder_weights(state, path, KEYS), path).missing
    torch.testing.assert_close(encoder.state_dict()["norm.bias"], mae.encoder.norm.bias, rtol=0, atol=atol)


def test_videomaev2s_hub_file(tmp_path):
    """model.safetensors of its classifier without a head; "model." before each name."""
    theirs = random_classifier(num_classes=0)
    weights = {f"model.{name}": value for name, value in theirs.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    ours = random_classifier(num_classes=0, seed=7)
    load_weights(ours, encoder_weights(open_checkpoint(tmp_path)[1], "x", KEYS), "x")
    assert torch.equal(ours(a_clip()), theirs(a_clip()))
    mae = random_mae()
    report = load_autoencoder(mae, model_weights(open_checkpoint(tmp_path)[1], "x"), "x")
    fresh = {name for name in mae.state_dict() if not name.startswith(("encoder.patch", "encoder.blocks"))}
    assert set(report.missing) == fresh and set(report.left_over) == {"encoder.fc_norm.weight", "encoder.fc_norm.bias"}


def test_files_renamed_are_known_by_their_content(tmp_path):
    weights = random_mae().state_dict()
    safetensors.torch.save_file(weights, tmp_path / "x.pth")
    torch.save(weights, tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        assert model_weights(load_checkpoint(tmp_path / name), name).keys() == weights.keys()


def two(first, second):
    return {f"student.{n}": v for n, v in first.items()} | {f"teacher.{n}": v for n, v in second.items()}


def test_what_is_ambiguous_is_chosen_by_a_flag():
    first, second = random_mae().state_dict(), randomize(random_mae(), seed=4).state_dict()
    state = {"model": two(first, second)}
    named = naming("x", "2", "student.encoder.*", "teacher.encoder.*", "--model_prefix")
    with pytest.raises(CheckpointError, match=named):
        model_weights(state, "x")
    for prefix in ("teacher.", "teacher.encoder."):
        found = encoder_weights(state, "x", KEYS, prefix)
        assert torch.equal(found["norm.bias"], second["encoder.norm.bias"])
    assert torch.equal(model_weights(state, "x", prefix="teacher.")["mask_token"], second["mask_token"])
    with pytest.raises(CheckpointError, match=naming("x", "net", "ema", "--model_key")):
        model_weights({"net": first, "ema": second, "epoch": 1}, "x")
    assert torch.equal(model_weights({"net": first, "ema": second}, "x", ("ema",))["mask_token"], second["mask_token"])
    with pytest.raises(CheckpointError, match=naming("x", "'teacher'")):  # a key that is given is not guessed at
        model_weights({"net": first}, "x", ("teacher",))
    with pytest.raises(CheckpointError, match=naming("x", "module.encoder.norm.bias")):
        model_weights({"model": first | {"module.encoder.norm.bias": torch.ones(24)}}, "x")


def test_parsers_agree_on_where_weights_are():
    defaults = [script.get_parser().parse_args([]) for script in (run_mae_pretraining, run_class_finetuning)]
    assert [(args.model_key, args.model_prefix) for args in defaults] == 2 * [("model|module", "")]


# --- image weights -----------------------------------------------------------------------------------------------


def image_vit(**settings):
    """timm's, with random weights: the keys' biases too are not 0."""
    sizes = dict(img_size=16, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=7) | settings
    return randomize(timm.models.vision_transformer.VisionTransformer(**sizes), seed=11).eval()


def image_mae(vit: dict) -> dict:
    """MAE's checkpoint of pre-training, which has its own decoder and no head."""
    decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 5, 8),
               "decoder_blocks.0.norm1.weight": torch.ones(8), "decoder_pred.weight": torch.ones(192, 8)}  # fmt: skip
    return {"model": {name: value for name, value in vit.items() if not name.startswith("head.")} | decoder}


def in_wrappings(vit: dict) -> dict[str, dict]:
    return {
        "timm": vit,
        "MAE": image_mae(vit),
        "wrapped": {"state_dict": {f"module.backbone.{name}": value for name, value in vit.items()}},
    }


@pytest.mark.parametrize("name", ["timm", "MAE", "wrapped"])
@pytest.mark.parametrize("pretraining", [True, False])
def test_blocks_of_image_weights_give_timms_tokens(name, pretraining, tmp_path):
    """The same tokens through timm's blocks and norm, and through ours without the keys' biases."""
    vit = image_vit()
    assert min(block.attn.qkv.bias[24:48].abs().max() for block in vit.blocks) > 0.1
    path = saved(tmp_path / "vit.pth", in_wrappings(vit.state_dict())[name])
    state = open_checkpoint(path)[1]
    if pretraining:
        mae = random_mae().eval()
        fresh = {name: value.clone() for name, value in mae.state_dict().items()}
        report = load_autoencoder(mae, model_weights(state, path), path)
        encoder = mae.encoder
        decoder = [name for name in fresh if not name.startswith("encoder.")]
        assert report.missing == decoder and all(torch.equal(mae.state_dict()[name], fresh[name]) for name in decoder)
    else:
        encoder = random_encoder()
        report = load_encoder(encoder, encoder_weights(state, path, KEYS), path)
        assert report.missing == []
    assert len(report.loaded) == len(encoder.state_dict()) and report.left_over == []
    tokens = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        ours, theirs = tokens, tokens
        for mine, block in zip(encoder.blocks, vit.blocks, strict=True):
            ours, theirs = mine(ours), block(theirs)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert theirs.std() > 0.5
        torch.testing.assert_close(encoder.norm(ours), vit.norm(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tubelet", [1, 2, 4])
@pytest.mark.parametrize("how", INFLATIONS)
def test_the_inflated_patch_embedding_is_timms(how, tubelet, tmp_path):
    """On a still clip; on a moving one it sees the mean of a token's frames, or the centre one."""
    vit = image_vit()
    path = saved(tmp_path / "vit.pth", vit.state_dict())
    encoder = random_encoder(tubelet_size=tubelet)
    load_encoder(encoder, encoder_weights(open_checkpoint(path)[1], path, KEYS), path, how=how)
    clip = a_clip()
    still = clip[:, :, :1].expand(-1, -1, 4, -1, -1)
    groups = clip.unflatten(2, (4 // tubelet, tubelet))
    seen = groups.mean(dim=3) if how == "mean" else groups[:, :, :, tubelet // 2]
    with torch.no_grad():
        expected = vit.patch_embed(still[:, :, 0])
        for tokens in encoder.patch_embed(still).chunk(4 // tubelet, dim=1):
            torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
        expected = torch.cat([vit.patch_embed(frame) for frame in seen.unbind(2)], dim=1)
        torch.testing.assert_close(encoder.patch_embed(clip), expected, rtol=1e-5, atol=1e-5)


def test_keys_biases_change_nothing():
    """Why they may be left out: timm's own attention is the same without them."""
    attention, tokens = image_vit().blocks[0].attn, torch.randn(2, 9, 24)
    with torch.no_grad():
        before = attention(tokens)
        attention.qkv.bias[24:48] = 0
        torch.testing.assert_close(attention(tokens), before, rtol=1e-5, atol=1e-6)
        attention.qkv.bias[:24] = 0
        assert (attention(tokens) - before).abs().max() > 0.05  # the queries' do


@pytest.mark.parametrize("name", ["timm", "MAE"])
def test_scripts_start_from_image_weights_and_say_what_is_left(name, tmp_path, capsys):
    vit = image_vit(img_size=32, embed_dim=96, depth=4, num_heads=4, num_classes=10, global_pool="avg").state_dict()
    path = saved(tmp_path / "vit.pth", in_wrappings(vit)[name])
    weight = vit["patch_embed.proj.weight"]
    unused = ["cls_token", "pos_embed", "key_bias", "head" if name == "timm" else "mask_token"]
    mae = started(path, "--inflate", "centre").mae
    assert_names(capsys.readouterr().out, path, "centre", *unused)
    projection = mae.encoder.patch_embed.proj.weight
    assert torch.equal(projection[:, :, 1], weight) and not projection[:, :, 0].any()
    classifier = finetuned(path)
    assert_names(capsys.readouterr().out, path, "mean", *unused)
    assert torch.equal(classifier.patch_embed.proj.weight, weight.unsqueeze(2).expand(-1, -1, 2, -1, -1) / 2)
    assert torch.equal(classifier.fc_norm.weight, vit["fc_norm.weight"])
    assert classifier.head.weight.abs().max() < 0.01  # 10 classes too, but of images


def test_a_hub_file_of_image_weights_needs_no_code(tmp_path):
    vit = image_vit(img_size=32, embed_dim=96, depth=4, num_heads=4)
    safetensors.torch.save_file(vit.state_dict(), tmp_path / "model.safetensors")
    model = finetuned(tmp_path)
    assert torch.equal(model.blocks[3].attn.q_bias, vit.blocks[3].attn.qkv.bias[:96])
    assert torch.equal(model.blocks[3].attn.v_bias, vit.blocks[3].attn.qkv.bias[192:])


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(patch_size=4), ["patch_embed.proj.weight", "--patch_size"]),
        (dict(init_values=0.1), ["blocks.0.ls1.gamma"]),
        (dict(depth=4), ["blocks.3.norm1.weight"]),
    ],
)
def test_image_weights_that_do_not_fit_are_refused(settings, words, tmp_path):
    path = saved(tmp_path / "vit.pth", image_vit(**settings).state_dict())
    with pytest.raises(CheckpointError, match=naming("vit.pth", *words)):
        load_encoder(random_encoder(), encoder_weights(open_checkpoint(path)[1], path, KEYS), path)


def other_image_models():
    mae = ViTMAEForPreTraining(
        ViTMAEConfig(image_size=16, patch_size=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
                     intermediate_size=32, decoder_hidden_size=16, decoder_num_hidden_layers=1,
                     decoder_num_attention_heads=2, decoder_intermediate_size=32)
    ).state_dict()  # fmt: skip
    return {"transformers": mae, "ResNet": {"conv1.weight": torch.ones(8, 3, 7, 7), "bn1.weight": torch.ones(8)}}


@pytest.mark.parametrize("name", list(other_image_models()))
def test_other_image_weights_are_called_that(name, tmp_path):
    path = saved(tmp_path / "vit.pth", other_image_models()[name])
    refused(path, path, "image")
    with pytest.raises(CheckpointError, match=naming("vit.pth", "image")):
        finetuned(path)
    with pytest.raises(CheckpointError, match=naming("vit.pth", "image")):
        started(path)


# --- files -------------------------------------------------------------------------------------------------------


class Settings:
    def __init__(self):
        self.lr = 1.0


def with_names(path, content, *pairs):
    """The same file as another version writes it, with other names of modules."""
    torch.save(content, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for old, new in pairs:
        assert old in data
        data = data.replace(old, new)
    path.write_bytes(data)


ODDMENTS = {
    "acc": np.float64(81.5), "epoch": np.int64(3), "small": np.float32(0.5), "flag": np.bool_(True),
    "text": np.str_("ä"),
    "big": np.dtype(">f8").type(2.5), "list": [np.uint8(7)], "array": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "empty": np.zeros((0, 3)), "names": np.array(["a", "bc"]), "random": np.random.RandomState(0).get_state(),
}  # fmt: skip


@pytest.mark.parametrize("old_numpy", [False, True])
def test_numpys_numbers_and_arrays_are_read(old_numpy, tmp_path):
    path = tmp_path / "x.pth"
    core = b"numpy._core.multiarray"
    with_names(path, {"model": {"w": torch.ones(2)}, **ODDMENTS},
               *([(core, b"numpy.core.multiarray")] if old_numpy else []))  # fmt: skip
    for found in [load_checkpoint(path)] + ([load_checkpoint(saved(path, ODDMENTS))] if not old_numpy else []):
        for name, value in ODDMENTS.items():
            if name == "random":
                assert np.array_equal(found[name][1], value[1]) and found[name][2:] == value[2:]
            elif isinstance(value, np.ndarray):
                assert np.array_equal(found[name], value) and found[name].dtype == value.dtype
            else:
                assert found[name] == value and not isinstance(found[name], np.generic)


@pytest.mark.parametrize(
    "value, code", [(np.datetime64("2020-01-01"), "M8"), (np.array([Settings()]), "O8"), (np.void(b"xy"), "V2")]
)
def test_numpys_other_types_are_refused(value, code, tmp_path):
    path = saved(tmp_path / "x.pth", {"model": {"w": torch.ones(2)}, "odd": value})
    assert "damaged" not in refused(path, path, "numpy", code)


def test_paths_and_other_plain_values_are_read(tmp_path):
    factory = defaultdict(list, a=[1])
    args = argparse.Namespace(output_dir=Path("/data/run"), lr=np.float64(0.1), num_frames=np.int64(4))
    content = {"args": args, "more": factory, "torch_version": torch.__version__, "model": OrderedDict(w=torch.ones(2))}
    path = tmp_path / "x.pth"
    own, other = sorted((b"pathlib", b"pathlib._local"), key=lambda name: name != type(Path()).__module__.encode())
    for pairs in ([], [(b"c%s\n" % own, b"c%s\n" % other)]):  # python 3.13 calls it pathlib._local
        with_names(path, content, *pairs)
        found = load_checkpoint(path)
        assert found["args"].output_dir == Path("/data/run") and found["more"] == {"a": [1]}
        assert found["torch_version"] == str(torch.__version__)
        assert saved_args(found, path) == {"output_dir": "/data/run", "lr": 0.1, "num_frames": 4}
    with_names(path, {"p": PureWindowsPath("c:/x")}, (b"PureWindowsPath", b"WindowsPath"))
    assert load_checkpoint(path)["p"] == PureWindowsPath("c:/x")
    assert load_checkpoint(saved(path, {"p": PurePosixPath("x/y")}))["p"] == PurePosixPath("x/y")


def script(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated
        torch.jit.script(nn.Linear(2, 2)).save(str(path))


def legacy(content):
    return lambda path: torch.save(content, path, _use_new_zipfile_serialization=False)


def cut(path):
    torch.save({"model": {"w": torch.ones(500)}}, path)
    path.write_bytes(path.read_bytes()[:-300])


def a_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "no checkpoint")


def a_class(path):
    torch.save({"model": random_mae().state_dict(), "cfg": Settings()}, path)


WHOLE_FILES = {  # written whole; what names each
    "class": (a_class, ["tests.unit.test_foreign_checkpoints.Settings", "weights_only=False"]),
    "class, legacy": (legacy({"cfg": Settings()}), ["tests.unit.test_foreign_checkpoints.Settings"]),
    "module": (lambda path: torch.save(random_mae(), path),
               ["modeling_pretrain.PretrainVisionTransformer", "state_dict"]),
    "module in a dict": (lambda path: torch.save({"model": nn.Linear(2, 2)}, path),
                         ["torch.nn.modules.linear.Linear", "state_dict"]),
    "module, legacy": (legacy(nn.Linear(2, 2)), ["torch.nn.modules.linear.Linear", "state_dict"]),
    "TorchScript": (script, ["TorchScript", "torch.jit.load", "state_dict"]),
    "npz": (lambda path: np.savez(path.open("wb"), a=np.ones(3)), [".npz"]),
    "npy": (lambda path: np.save(path.open("wb"), np.ones(3)), [".npy"]),
    "zip": (a_zip, ["zip", "readme.txt"]),
    "protocol 4": (lambda path: torch.save({"model": {"w": torch.ones(2)}}, path, pickle_protocol=4), ["protocol 4"]),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html><html>404</html>"), ["web"]),
    "LFS": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid 1\n"), ["git lfs pull"]),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(50)), ["gzip"]),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50)), ["HDF5"]),
    "json": (lambda path: path.write_text('{"a": 1}'), ["JSON"]),
    "list": (lambda path: torch.save([{"w": torch.ones(2)}], path), ["list"]),
    "tensor": (lambda path: torch.save(torch.ones(2), path), ["Tensor"]),
    "empty dictionary": (lambda path: torch.save({}, path), ["weights"]),
    "no weights": (lambda path: torch.save({"epoch": 3, "arch": "x"}, path), ["weights", "epoch (int)", "arch (str)"]),
    "metadata alone": (lambda path: safetensors.torch.save_file({}, path, {"format": "pt"}), ["weights"]),
}  # fmt: skip
DAMAGED = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(3000)),
    "legacy, cut": lambda path: (legacy({"w": torch.ones(99)})(path), path.write_bytes(path.read_bytes()[:300])),
    "safetensors, cut": lambda path: (safetensors.torch.save_file({"w": torch.ones(99)}, path),
                                      path.write_bytes(path.read_bytes()[:200])),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_a_whole_file_is_said_for_what_it_is(name, tmp_path):
    path = tmp_path / "x.pth"
    write, words = WHOLE_FILES[name]
    write(path)
    assert "damaged" not in refused(path, str(path), *words)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_called_damaged(name, tmp_path):
    DAMAGED[name](tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "x.pth", "damaged")


def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.pth", {"model": {"w": torch.ones(2)}})

    def denied(*arguments, **settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(foreign_files.torch, "load", denied)
    assert "damaged" not in refused(path, path, "Permission denied")


def test_weights_without_memory_are_refused(tmp_path):
    weights = random_mae().to("meta").state_dict()
    with pytest.raises(CheckpointError, match=naming("x.pth", "mask_token", "meta")):
        load_autoencoder(random_mae(), model_weights({"model": weights}, "x.pth"), "x.pth")


# --- DeepSpeed ---------------------------------------------------------------------------------------------------


def deepspeed_state(weights: dict, stage: int) -> dict:
    """What DeepSpeed 0.19.8 writes as *_model_states.pt."""
    return {
        "module": OrderedDict((n, v.bfloat16() if stage < 3 else v.new_empty(0)) for n, v in weights.items()),
        "buffer_names": [], "optimizer": None, "param_shapes": [OrderedDict((n, v.shape) for n, v in weights.items())],
        "frozen_param_shapes": None, "shared_params": {}, "lr_scheduler": None, "skipped_steps": 0, "global_steps": 1,
        "dp_world_size": 1, "ds_config": {"zero_optimization": {"stage": stage}}, "ds_version": "0.19.8", "epoch": 1,
    }  # fmt: skip


class LossScaler:
    """As DeepSpeed's, by its name."""


LossScaler.__module__ = "deepspeed.runtime.fp16.loss_scaler"


def test_deepspeeds_folders(tmp_path, monkeypatch):
    """VideoMAE's --enable_deepspeed leaves RUN/checkpoint-N/mp_rank_00_model_states.pt and RUN/latest."""
    mae = random_mae()
    weights = mae.state_dict()
    for epoch in (9, 19):
        (tmp_path / f"checkpoint-{epoch}").mkdir()
        scaled = {name: value + epoch for name, value in weights.items()}
        saved(tmp_path / f"checkpoint-{epoch}/mp_rank_00_model_states.pt", deepspeed_state(scaled, 1))
    expected = {name: (value + 19).bfloat16().float() for name, value in weights.items()}
    for place in (tmp_path, tmp_path / "checkpoint-19", tmp_path / "checkpoint-19/mp_rank_00_model_states.pt"):
        found = model_weights(open_checkpoint(place)[1], place)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    (tmp_path / "latest").write_text("checkpoint-9\n")
    assert open_checkpoint(tmp_path)[0].parent.name == "checkpoint-9"

    module = types.ModuleType(LossScaler.__module__)
    module.LossScaler = LossScaler
    for name in (LossScaler.__module__, "deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16"):
        monkeypatch.setitem(sys.modules, name, module)
    path = tmp_path / "checkpoint-9/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = {"optimizer_state_dict": {"loss_scaler": LossScaler()}, "ds_version": "0.19.8"}
    refused(saved(path, content), path, "mp_rank_00_model_states.pt", "deepspeed.runtime.fp16.loss_scaler.LossScaler")
    refused(saved(path, content | {"optimizer_state_dict": {}}), path, "mp_rank_00_model_states.pt", "zero_to_fp32.py")


def test_zero_3_is_told_to_join_its_parts(tmp_path):
    weights = random_mae().state_dict()
    path = saved(tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt", deepspeed_state(weights, 3))
    assert "damaged" not in refused(path, path, "zero_to_fp32.py")
    refused(tmp_path, "zero_to_fp32.py")  # the folder
    torch.save(weights, tmp_path / "pytorch_model.bin")  # what zero_to_fp32.py makes
    assert model_weights(open_checkpoint(tmp_path)[1], "x").keys() == weights.keys()


# --- folders -----------------------------------------------------------------------------------------------------


def test_folders_with_nothing_to_choose_are_refused(tmp_path):
    refused(tmp_path, f"{tmp_path}:")
    os.mkfifo(tmp_path / "latest")  # would be waited for
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    refused(tmp_path, tmp_path / "model.safetensors.index.json")
    for name in ("latest", "model.safetensors.index.json"):
        os.unlink(tmp_path / name)
    (tmp_path / "checkpoint-1").symlink_to(tmp_path)
    refused(tmp_path, tmp_path, "checkpoint-1")
    (tmp_path / "notes.txt").touch()
    for name in ("a.pth", "b.safetensors"):
        (tmp_path / name).touch()
    os.unlink(tmp_path / "checkpoint-1")
    refused(tmp_path, tmp_path, "2", "a.pth", "b.safetensors")
    os.unlink(tmp_path / "a.pth")
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "b.safetensors")
    assert open_checkpoint(tmp_path)[0].name == "b.safetensors"
    assert open_checkpoint(str(tmp_path / "b.safetensors"))[0].name == "b.safetensors"


# --- the scripts -------------------------------------------------------------------------------------------------

SMALL = ["--input_size", "32", "--num_frames", "4", "--sampling_rate", "2", "--batch_size", "4", "--num_workers", "0",
         "--device", "cpu", "--epochs", "1", "--warmup_epochs", "0", "--lr", "1e-12", "--warmup_lr", "0",
         "--min_lr", "0"]  # fmt: skip
PRETRAIN = ["--model", "pretrain_videomae_tiny_patch8_64", "--decoder_depth", "1", "--tats_start_epoch", "0",
            "--tats_lr", "1e-12", *SMALL]  # fmt: skip
FINETUNE = ["--data_set", "custom", "--nb_classes", "10", "--model", "vit_tiny_patch8_64", "--test_num_segment", "1",
            "--test_num_crop", "1", *SMALL]  # fmt: skip


def parsed(script, flags, *more):
    args = script.get_parser().parse_args([*flags, *map(str, more)])
    script.check_flags(args)
    args.rank, args.world_size, args.distributed, args.amp = 0, 1, False, "none"
    return args


def started(path, *flags) -> run_mae_pretraining.Run:
    """A pre-training run that begins with --finetune."""
    return run_mae_pretraining.Run(
        parsed(run_mae_pretraining, PRETRAIN, "--finetune", path, *flags), torch.device("cpu")
    )


def finetuned(path, *flags) -> nn.Module:
    return run_class_finetuning.load_finetune(parsed(run_class_finetuning, FINETUNE, "--finetune", path, *flags))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("shapes"), train=10, val=10, size=32, frames=12)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of pre-training with every weight random, as if it had been trained."""
    folder = tmp_path_factory.mktemp("runs")
    for mask_type in ("tats", "adamae", "tube"):
        run = run_mae_pretraining.Run(
            parsed(run_mae_pretraining, PRETRAIN, "--mask_type", mask_type), torch.device("cpu")
        )
        randomize(run.mae, seed=21)
        randomize(run.sampler, seed=22)
        (folder / mask_type).mkdir()
        torch.save(run.state(0, 2), folder / mask_type / "checkpoint-0.pth")
    return {path.name: path / "checkpoint-0.pth" for path in folder.iterdir()}


def adamaes_own(source: Path, path: Path, **args) -> Path:
    """The same weights as AdaMAE's code stores them: its sampler inside the encoder, a Namespace of its flags."""
    state = torch.load(source, weights_only=True)
    inside = {f"encoder.{name}": value for name, value in state["adamae"].items()}
    ada = dict(model="pretrain_videomae_tiny_patch8_64", decoder_depth=1, mask_type="learnable", mask_ratio=0.9,
               input_size=32, normlize_target=True, num_frames=4, sampling_rate=2, lr=1.5e-4, opt_betas=[0.9, 0.95],
               patch_size=(8, 8), window_size=(2, 4, 4), softmax_temp=1e-2, auto_resume=True, gpu=0)  # fmt: skip
    content = {"model": state["model"] | inside, "epoch": 3, "optimizer": {}, "scaler": {}}
    return saved(path, content | ({"args": argparse.Namespace(**ada | args)} if args.pop("with_args", True) else {}))


def same(sampler, path, key) -> bool:
    wanted = torch.load(path, weights_only=True)[key]
    own = sampler.state_dict()
    return own.keys() == wanted.keys() and all(torch.equal(own[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("kind", ["tats", "adamae"])
def test_the_sampler_is_taken_over_with_a_report(kind, runs, capsys):
    run = started(runs[kind], "--mask_type", kind)
    assert same(run.mae, runs[kind], "model") and same(run.sampler, runs[kind], kind)
    said = capsys.readouterr().out
    number = len(run.sampler.state_dict())
    assert re.search(rf"autoencoder: \b{len(run.mae.state_dict())}\b.*\b0\b.*\b0\b", said)
    assert re.search(rf"{kind} .*\b{number}\b.*\b0\b.*\b0\b", said)


@pytest.mark.parametrize("nested", [False, True])
def test_adamaes_own_file_brings_its_sampler(nested, runs, tmp_path, capsys):
    path = adamaes_own(runs["adamae"], tmp_path / "ada.pth")
    if nested:
        torch.save({"checkpoint": load_checkpoint(path), "hash": "x"}, path)
    run = started(path, "--mask_type", "learnable")
    assert same(run.mae, runs["adamae"], "model") and same(run.sampler, runs["adamae"], "adamae")
    said = capsys.readouterr().out
    number = len(run.sampler.state_dict())
    assert re.search(rf"adamae .*\b{number}\b.*\b0\b.*\b0\b", said)
    assert "get_token_probs" not in said


def test_samplers_are_trained_on_from_the_file_by_the_script(shapes, runs, tmp_path):
    path = adamaes_own(runs["adamae"], tmp_path / "ada.pth")
    for source, kind in ((path, "adamae"), (runs["tats"].parent, "tats")):
        flags = ["--mask_type", kind, "--finetune", source, "--weight_decay", "0", "--output_dir", tmp_path / kind]
        run_mae_pretraining.main([*PRETRAIN, "--data_path", f"{shapes}/train.csv", *map(str, flags)])
        before, after = (
            torch.load(p, weights_only=True)[kind] for p in (runs[kind], tmp_path / kind / "checkpoint-0.pth")
        )
        assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_what_a_file_lacks_or_a_mask_does_not_use_is_said(runs, tmp_path, capsys):
    path = adamaes_own(runs["adamae"], tmp_path / "ada.pth")
    for source, flags, words in [
        (runs["tube"], ["--mask_type", "tats"], ["tats .*fresh"]),
        (runs["tube"], ["--mask_type", "adamae"], ["adamae .*fresh"]),
        (path, ["--mask_type", "tube"], ["adamae .*left.*--mask_type tube"]),
        (runs["tats"], ["--mask_type", "tube"], ["tats .*left.*--mask_type tube"]),
        (path, ["--mask_type", "tats"], ["tats .*fresh", "adamae .*left.*--mask_type tats"]),
        (runs["tats"], ["--mask_type", "adamae"], ["adamae .*fresh", "tats .*left.*--mask_type adamae"]),
        (runs["tats"], ["--mask_type", "tats", "--no-finetune_sampler"],
         ["tats .*fresh.*--no-finetune_sampler", "tats .*left"]),
    ]:  # fmt: skip
        run = started(source, *flags)
        said = capsys.readouterr().out
        assert all(re.search(line, said) for line in words), said
        assert same(run.mae, runs["tube"], "model")
        assert run.learned == "" or not same(run.sampler, runs[run.learned], run.learned)


def test_a_sampler_that_does_not_fit_is_an_error_with_a_way_out(runs, capsys):
    for flags in (["--tats_attention", "mha"], ["--tats_blocks", 2]):
        named = naming(runs["tats"], "tats sampler", "--tats_attention", "--tats_blocks", "--no-finetune_sampler")
        with pytest.raises(CheckpointError, match=named):
            started(runs["tats"], "--mask_type", "tats", *flags)
        started(runs["tats"], "--mask_type", "tats", *flags, "--no-finetune_sampler")
    capsys.readouterr()
    started(runs["tats"], "--mask_type", "tats", "--tats_attention", "trajectory", "--tats_logit_cap", 2)
    said = capsys.readouterr().out
    assert re.search(r"--tats_attention orthoformer .*trajectory.*--tats_logit_cap 0\.0 .*2\.0", said)


def test_a_sampler_goes_onto_another_grid(runs, tmp_path):
    """TATS has no weights of the grid; AdaMAE's table is interpolated as a learned table of positions is."""
    flags = ["--num_frames", 8, "--input_size", 40]
    assert same(started(runs["tats"], "--mask_type", "tats", *flags).sampler, runs["tats"], "tats")
    path = adamaes_own(runs["adamae"], tmp_path / "ada.pth")
    table = torch.load(runs["adamae"], weights_only=True)["adamae"]["pos_embed_probs"]
    sampler = started(path, "--mask_type", "adamae", *flags).sampler
    expected = reference.resize_table(table, (2, 4, 4), (4, 5, 5))
    torch.testing.assert_close(sampler.pos_embed_probs.double(), expected, rtol=0, atol=1e-5)


def test_an_encoder_alone_starts_an_autoencoder_with_a_fresh_decoder(runs, tmp_path, capsys):
    state = torch.load(runs["tube"], weights_only=True)["model"]
    classifier = {n.removeprefix("encoder."): v for n, v in state.items() if n.startswith("encoder.")}
    path = saved(tmp_path / "vit.pth", {"model": classifier | {"head.weight": torch.ones(5, 96)}})
    run = started(path)
    assert all(torch.equal(run.mae.state_dict()[n], v) for n, v in state.items() if n.startswith("encoder."))
    assert not torch.equal(run.mae.encoder_to_decoder.weight, state["encoder_to_decoder.weight"])
    said = capsys.readouterr().out
    assert re.search(r"fresh.*mask_token, decoder\.\*.*\b1\b.*left.*encoder\.head\.weight", said)


@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop("decoder.norm.bias"), ["1", "decoder.norm.bias"]),
    (lambda w: w.pop("encoder.norm.bias"), ["1", "encoder.norm.bias"]),
    (lambda w: w.update({"decoder.blocks.1.norm1.bias": torch.ones(2)}), ["1", "decoder.blocks.1.norm1.bias"]),
    (lambda w: w.update({"encoder.blocks.0.gamma_1": torch.ones(2)}), ["1", "encoder.blocks.0.gamma_1"]),
    (lambda w: w.update({"mask_token": torch.ones(1, 1, 7)}), ["mask_token", "(1, 1, 7)", "(1, 1, 64)"]),
    (lambda w: w.update({"encoder.pos_embed": torch.randn(1, 32, 96)}), ["pos_embed"]),
])  # fmt: skip
def test_a_part_of_an_autoencoder_is_refused(change, words, runs, tmp_path):
    weights = torch.load(runs["tube"], weights_only=True)["model"]
    change(weights)
    with pytest.raises(CheckpointError, match=naming(tmp_path / "x.pth", *words)):
        started(saved(tmp_path / "x.pth", {"model": weights}))


def test_a_file_of_something_else_says_what_it_holds(tmp_path):
    path = saved(tmp_path / "bert.pth", {"bert.pooler.weight": torch.ones(3, 3), "cls.bias": torch.ones(3)})
    for start in (started, finetuned):
        with pytest.raises(CheckpointError, match=naming("bert.pth", "bert.pooler.weight", "cls.bias")):
            start(path)


def test_a_fixed_table_in_the_file_changes_nothing(runs, tmp_path):
    weights = torch.load(runs["tube"], weights_only=True)["model"]
    tables = {
        "encoder.pos_embed": get_sinusoid_encoding_table(32, 96),
        "pos_embed": get_sinusoid_encoding_table(32, 64),
    }
    path = saved(tmp_path / "x.pth", {"model": {n: v.half() for n, v in (weights | tables).items()}})
    started(path)
    model = finetuned(path)
    assert "pos_embed" not in model.state_dict() and torch.equal(model.pos_embed, tables["encoder.pos_embed"])
    del tables["encoder.pos_embed"]  # the decoder's alone is not taken for the encoder's
    finetuned(saved(path, {"model": weights | tables}))


def test_finetuning_names_the_sampler_it_leaves(runs, capsys):
    finetuned(runs["tats"])
    assert re.search(r"left .*tats\.\* \(", capsys.readouterr().out)


def test_a_runs_folder_is_taken_wherever_a_checkpoint_is(shapes, runs, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(runs["tats"], folder / "checkpoint-3.pth")
    state = torch.load(runs["tats"], weights_only=True)
    state["model"]["encoder.norm.bias"] += 1
    torch.save(state | {"epoch": 10}, folder / "checkpoint-10.pth")
    assert torch.equal(started(folder).mae.encoder.norm.bias, state["model"]["encoder.norm.bias"])
    assert_names(capsys.readouterr().out, folder / "checkpoint-10.pth", "autoencoder")
    finetuned(folder)
    assert_names(capsys.readouterr().out, folder / "checkpoint-10.pth")
    args = parsed(run_mae_pretraining, PRETRAIN, "--mask_type", "tats", "--resume", folder)
    assert find_resume(args)[0] == folder / "checkpoint-10.pth"
    (folder / "checkpoint-10.pth").write_bytes(b"cut")
    assert find_resume(args)[0] == folder / "checkpoint-3.pth" == open_checkpoint(folder)[0]
    with pytest.raises(CheckpointError, match=naming(shapes, "checkpoint-N.pth")):
        find_resume(parsed(run_mae_pretraining, PRETRAIN, "--resume", shapes))


def test_the_run_of_a_folder_is_found_by_compare_runs(runs, tmp_path):
    def run(folder, kind, **args):
        return run_folders.Run(folder, kind, {"output_dir": str(folder), "seed": 0, **args}, {}, {}, None)

    source = run(tmp_path / "pretrained", run_folders.PRETRAINING)
    for given in (tmp_path / "pretrained", f"{tmp_path}/pretrained/", tmp_path / "pretrained/checkpoint-3.pth"):
        tuned = run(tmp_path / "tuned", run_folders.KINDS[0], finetune=str(given))
        assert run_folders.source_of(tuned, [source]) is source


def test_eval_takes_folders(shapes, runs, tmp_path):
    """Of a fine-tuning run, and transformers' classifier, whose test here gives transformers' probabilities."""
    common = ["--data_path", str(shapes), *FINETUNE]
    run_class_finetuning.main([*common, "--finetune", str(runs["tats"].parent), "--output_dir", str(tmp_path / "fine")])
    run_class_finetuning.main(
        [*common, "--eval", "--finetune", str(tmp_path / "fine"), "--output_dir", str(tmp_path / "a")]
    )
    first, again = (np.load(tmp_path / name / "scores.npz")["probability"] for name in ("fine", "a"))
    assert np.array_equal(first, again)

    config = VideoMAEConfig(image_size=32, patch_size=8, num_frames=4, hidden_size=96, num_hidden_layers=4,
                            num_attention_heads=4, intermediate_size=384, num_labels=10,
                            layer_norm_eps=1e-6)  # fmt: skip
    theirs = randomize(VideoMAEForVideoClassification(config), seed=5).eval()
    theirs.fc_norm.eps = 1e-6
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="500KB")
    flags = [*common, "--eval", "--finetune", str(tmp_path / "hf")]
    args = run_class_finetuning.parse_args(flags)
    run_class_finetuning.check_flags(args)
    model = run_class_finetuning.load_finished(args, *run_class_finetuning.find_finished(args), args.model_key).eval()
    with torch.no_grad():
        expected = theirs(a_clip(4, 32).transpose(1, 2)).logits
        torch.testing.assert_close(model(a_clip(4, 32)), expected, rtol=1e-4, atol=1e-4)


# --- pictures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_args", [True, False])
def test_pictures_of_adamaes_own_file(with_args, runs, tmp_path):
    overrides = [] if with_args else ["--model", "pretrain_videomae_tiny_patch8_64", "--decoder_depth", "1",
                                      "--input_size", "32", "--num_frames", "4", "--mask_ratio", "0.9"]  # fmt: skip
    path = adamaes_own(runs["adamae"], tmp_path / "ada.pth", with_args=with_args, normlize_target=False)
    vis = run_mae_vis.Trained(str(path), overrides)
    assert isinstance(vis.sampler, AdaMAESampler) and (vis.args.mask_type, vis.args.mask_ratio) == ("adamae", 0.9)
    assert vis.args.normalize_target == (not with_args)
    assert same(vis.sampler, runs["adamae"], "adamae") and same(vis.mae, runs["adamae"], "model")
    clip = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    mask = vis.mask(clip, 0, top_k=False)[2]
    assert mask.log_prob.exp().sum().item() == pytest.approx(1, abs=1e-4) and mask.visible.shape == (1, 3)


def test_pictures_of_wrapped_files_and_of_files_without_a_decoder(runs, tmp_path):
    state = torch.load(runs["tats"], weights_only=True)
    twice = saved(tmp_path / "two.pth", state | {"model": two(state["model"], state["model"])})
    with pytest.raises(CheckpointError, match="--model_prefix"):
        run_mae_vis.Trained(str(twice), [])
    assert same(run_mae_vis.Trained(str(twice), ["--model_prefix", "teacher."]).mae, runs["tats"], "model")
    encoder = {name: value for name, value in state["model"].items() if name.startswith("encoder.")}
    with pytest.raises(CheckpointError, match=naming("x.pth", "mask_token")):
        run_mae_vis.Trained(str(saved(tmp_path / "x.pth", state | {"model": encoder})), [])
