"""Weights of any codebase (VideoMAE, AdaMAE, DeepSpeed, Hugging Face, ours), and how our modules take them."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.checkpoint import MODEL_KEYS, restoring, saved_args
from runtime.foreign_files import CheckpointError

ADAMAE_SAMPLER = ("encoder.get_token_probs.", "encoder.pos_embed_probs")


def model_weights(
    state: dict,
    path: str | Path,
    keys: tuple[str, ...] = MODEL_KEYS,
    drop: tuple[str, ...] = ADAMAE_SAMPLER,
    prefix: str = "",
) -> dict[str, Tensor]:
    """The weights in a checkpoint of this project, VideoMAE, AdaMAE, DeepSpeed or Hugging Face, under the names of
    VideoMAE's autoencoder, float32: "encoder." and the encoder's tensors; the others as they are called.

    keys: where to look, in order, before the top level; drop: beginnings of names to leave out (AdaMAE keeps its
    sampler inside the encoder); prefix: see split_names. Raises CheckpointError.
    """
    encoder, others = split_names(named_weights(state, path, keys), path, prefix)
    weights = others | {f"encoder.{name}": value for name, value in encoder.items()}
    return {name: value for name, value in weights.items() if not name.startswith(drop)}


def encoder_weights(state: dict, path: str | Path, keys: tuple[str, ...], prefix: str = "") -> dict[str, Tensor]:
    """As model_weights, under the classifier's names: the encoder's have no prefix. What lies outside the encoder (a
    decoder, a head) keeps its name; a table of positions there is the decoder's."""
    encoder, others = split_names(named_weights(state, path, keys), path, prefix)
    if encoder and "pos_embed" in others:
        others["decoder.pos_embed"] = others.pop("pos_embed")
    return {name: value for name, value in others.items() if name not in encoder} | encoder


def named_weights(state: dict, path: str | Path, keys: tuple[str, ...] = MODEL_KEYS) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names there, in float32 where they are floating-point numbers.

    Looks under the keys, then at the top level; with the default keys also under "state_dict", then in the only
    dictionary that holds tensors. Raises CheckpointError where there are none, or several dictionaries of them.
    """
    found = _find_weights(state, path, keys)
    if not found:
        holds = ", ".join(f"{str(key)[:40]} ({type(value).__name__})" for key, value in list(state.items())[:5])
        raise CheckpointError(
            f"{path}: has no weights under {', '.join(map(repr, keys))} or at its top level, but {holds or 'nothing'}"
        )
    return {name: _float32(value) for name, value in found.items()}


def _find_weights(state: dict, path: str | Path, keys: tuple[str, ...], depth: int = 0) -> dict[str, Tensor]:
    if depth > 4:
        return {}
    for key in keys:
        if isinstance(state.get(key), dict) and (found := _find_weights(state[key], path, MODEL_KEYS, depth + 1)):
            return found
    own = {name: value for name, value in state.items() if isinstance(name, str) and _is_array(value)}
    if keys != MODEL_KEYS or any("." in name for name in own):  # a loss may lie beside the weights
        return own
    inside = {
        str(key): _find_weights(value, path, MODEL_KEYS, depth + 1)
        for key, value in state.items()
        if isinstance(value, dict) and "optim" not in str(key)
    }
    inside = {key: found for key, found in inside.items() if found}
    if len(inside) > 1 and "state_dict" not in inside:
        raise CheckpointError(f"{path}: contains weights under {', '.join(inside)}: choose one with --model_key")
    return inside.get("state_dict") or next(iter(inside.values()), own)


def _is_array(value) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _float32(value: Tensor | np.ndarray) -> Tensor:
    value = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value.detach()
    return value.float() if value.is_floating_point() else value


# Parts of names that DDP, torch.compile, FSDP, activation checkpointing, DeepSpeed and Lightning's modules put in.
WRAPPERS = {"module", "model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# (what stands before the encoder's names, VideoMAE's or Hugging Face's names of its first layers)
FIRST_LAYER = re.compile(
    r"(|.*\.)(patch_embed\.proj|embeddings\.patch_embeddings\.projection|encoder\.layer\.0\.attention\.attention\.query)\.weight"
)


def split_names(
    weights: dict[str, Tensor], path: str | Path, prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the encoder's tensors under the names of VideoMAE's encoder, all others under theirs). A file without an encoder
    has only others.

    Wrappers' parts of the names are taken off; what stands before the encoder's names is found by its first layer, or
    given as `prefix`; Hugging Face's names are translated. Of an image transformer's weights (from_image_vit) those
    that a video encoder has no use for are among the others, under IMAGE. Raises CheckpointError, for weights of other
    image models too.
    """
    inside, outside = {}, {}
    for name, value in weights.items():
        short = _unwrapped(name)
        if not prefix or name.startswith(prefix) or short.startswith(prefix):
            short = _unwrapped(name.removeprefix(prefix)) if name.startswith(prefix) else short.removeprefix(prefix)
            if short in inside:
                raise CheckpointError(f"{path}: contains {short} twice, once as {name}: choose with --model_prefix")
            inside[short] = value
        else:
            outside[name] = value
    if not inside:
        raise CheckpointError(f"{path}: no weight's name begins with --model_prefix {prefix}")
    first = [match for match in map(FIRST_LAYER.fullmatch, inside) if match]
    image_vit = any(match[2] == "patch_embed.proj" and inside[match[0]].ndim == 4 for match in first)
    if not image_vit:
        _refuse_images([inside[match[0]] for match in first if "query" not in match[0]] or list(inside.values()), path)
    starts = sorted({match[1] for match in first}) or [s for s in ENCODERS if any(n.startswith(s) for n in inside)][:1]
    if len(starts) > 1:
        raise CheckpointError(
            f"{path}: contains {len(starts)} encoders, {', '.join(start + '*' for start in starts)}: choose one with "
            "--model_prefix"
        )
    if not starts and not prefix:
        return {}, inside
    start = starts[0] if starts else ""
    if first and first[0][2] != "patch_embed.proj":
        with restoring("Hugging Face weights", path, "names missing or shapes that do not go together"):
            inside = from_huggingface(_below(inside, start, "videomae.", start.removesuffix("videomae.")))
        start = "encoder."
    encoder = {name.removeprefix(start): value for name, value in inside.items() if name.startswith(start)}
    around = next((start.removesuffix(end) for end in ENCODERS if start.endswith(end)), start)
    others = {name.removeprefix(around): value for name, value in inside.items() if not name.startswith(start)}
    if image_vit:
        encoder, unused = from_image_vit(encoder)
        return encoder, outside | {f"{IMAGE}{name}": value for name, value in (unused | others).items()}
    for table in filter(lambda x: x is not None, (encoder.get("pos_embed"), others.get("pos_embed"))):
        check_position_table(table, path)
    return encoder, outside | others


ENCODERS = ("encoder.", "backbone.")  # what an encoder is called inside a model


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _below(weights: dict[str, Tensor], start: str, new_start: str, around: str) -> dict[str, Tensor]:
    """Names with `start` replaced, and without what is `around` elsewhere."""
    return {
        new_start + name.removeprefix(start) if name.startswith(start) else name.removeprefix(around): value
        for name, value in weights.items()
    }


def _refuse_images(weights: list[Tensor], path: str | Path) -> None:
    """Raises CheckpointError where colours come in without time: a convolution over [D, 3, rows, columns]."""
    flat = [value for value in weights if value.ndim == 4 and value.shape[1] in (1, 3)]
    if flat and not any(value.ndim == 5 for value in weights):
        raise CheckpointError(
            f"{path}: contains image weights (its first layer is {tuple(flat[0].shape)}, without time), not a video "
            "model's; of image models only timm's vit_* and MAE's are read (first layer: patch_embed.proj.weight)"
        )


IMAGE = "image."  # before the names of an image model's weights that a video encoder has no use for


def from_image_vit(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the encoder's tensors, those it has no use for) of timm's vit_* or MAE's image weights, which have a common bias
    of queries, keys and values. The class token, the position table and the head are of no use: a video encoder here
    has no class token and other positions. Nor are the keys' biases: they add the same to all scores of a query, which
    its softmax does not see. patch_embed.proj.weight [D, C, p, p] is left as it is: see inflate."""
    encoder, unused = {}, {}
    for name, value in weights.items():
        if name.startswith("blocks.") and name.endswith(".attn.qkv.bias"):
            before = name.removesuffix("qkv.bias")
            encoder[f"{before}q_bias"], key_bias, encoder[f"{before}v_bias"] = value.tensor_split(3)
            unused[f"key_bias.{name.split('.')[1]}"] = key_bias
        else:
            kept = name.startswith(("patch_embed.", "blocks.", "norm.", "fc_norm."))
            (encoder if kept else unused)[name] = value
    return encoder, unused


INFLATIONS = ("mean", "centre")


def inflate(weight: Tensor, tubelet: int, how: str) -> Tensor:
    """A patch embedding of images [D, C, p, p] over tubelets [D, C, tubelet, p, p], with the same output on a still
    clip. how: "mean", each frame has a share of 1 / tubelet (I3D, Carreira 2017); "centre", the frame tubelet // 2 has
    all (ViViT, Arnab 2021)."""
    share = torch.full((tubelet,), 1 / tubelet) if how == "mean" else torch.eye(tubelet)[tubelet // 2]
    return weight.unsqueeze(2) * share.to(weight).view(-1, 1, 1)


def _inflated(weights: dict[str, Tensor], name: str, tubelet: int, how: str) -> tuple[dict[str, Tensor], str]:
    """The weights with the patch embedding of that name over time, and a note on it: "" where it is a video's."""
    if getattr(weights.get(name), "ndim", 0) != 4:
        return weights, ""
    unused = [key.removeprefix(IMAGE) for key in weights if key.startswith(IMAGE)]
    kept = {key: value for key, value in weights.items() if not key.startswith(IMAGE)}
    note = f"image weights, patch embedding inflated over {tubelet} frames ({how}); not used: {_summary(unused)}"
    return kept | {name: inflate(weights[name], tubelet, how)}, note


def split_samplers(
    state: dict, weights: dict[str, Tensor], names: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """(the autoencoder's of model_weights without drop, {name: the sampler's tensors} of those learned samplers that
    the checkpoint has). This project keeps samplers beside the model under their names, AdaMAE inside the encoder."""
    inside = {name: value for name, value in weights.items() if name.startswith(ADAMAE_SAMPLER)}
    samplers = {"adamae": {n.removeprefix("encoder."): v for n, v in inside.items()}} if inside else {}
    samplers |= {name: state[name] for name in names if isinstance(state.get(name), dict)}
    return {name: value for name, value in weights.items() if name not in inside}, samplers


class LoadReport(NamedTuple):
    """Names of tensors: taken over, missing in the file (they keep their fresh start), and left over in it; and what
    else is to be said."""

    loaded: list[str]
    missing: list[str]
    left_over: list[str]
    note: str = ""

    def __str__(self):
        return f"{self.note}; " * bool(self.note) + (
            f"{len(self.loaded)} tensors loaded; {len(self.missing)} start fresh: {_summary(self.missing)}; "
            f"{len(self.left_over)} left over: {_summary(self.left_over)}"
        )


def _summary(names: list[str]) -> str:
    """Names by their first part: "decoder.* (46), mask_token"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".")[0], []).append(name)
    return ", ".join(f"{first}.* ({len(n)})" if len(n) > 1 else n[0] for first, n in groups.items()) or "none"


def load_encoder(
    encoder: nn.Module, weights: dict[str, Tensor], path: str | Path, grid=None, how: str = "mean"
) -> LoadReport:
    """Loads what a pre-training or fine-tuning checkpoint has for a classifier: all of its patch embedding and blocks;
    norms and the head where they are there and fit.

    encoder: a VisionTransformer; weights: see encoder_weights. A learned position table of another length is
    interpolated between `grid`, its (t, h, w) tokens, and the encoder's. A fixed one is not in checkpoints. how: see
    inflate, for an image transformer's weights.
    Raises CheckpointError where a block is missing, of another shape, or one too many.
    """
    own = encoder.state_dict()
    weights, note = _inflated(weights, "patch_embed.proj.weight", encoder.patch_embed.tubelet_size, how)
    taken = {name: value for name, value in weights.items() if name in own}
    if any(name.startswith("pool.") for name in weights):  # a probe's head reads other features
        taken = {name: value for name, value in taken.items() if not name.startswith("head.")}
    if "pos_embed" in taken and grid is not None:
        taken["pos_embed"] = resize_position_table(taken["pos_embed"], grid, encoder.patch_embed.grid)
    if "head.weight" in taken and taken["head.weight"].shape != own["head.weight"].shape:  # of other classes
        taken = {name: value for name, value in taken.items() if not name.startswith("head.")}
    return _load_part(encoder, weights, taken, (*TRUNK, "pos_embed"), TRUNK, path)._replace(note=note)


TRUNK = ("patch_embed.", "blocks.")
ENCODER_TRUNK = ("encoder.patch_embed.", "encoder.blocks.")


def load_autoencoder(mae: nn.Module, weights: dict[str, Tensor], path: str | Path, how: str = "mean") -> LoadReport:
    """Loads what a checkpoint has for an autoencoder: all of the encoder's patch embedding and blocks, and all of the
    decoder, which only a file without any of it leaves fresh (a classifier's, say).

    mae: a PretrainVisionTransformer; weights: see model_weights; how: see inflate. Raises CheckpointError as
    load_encoder does.
    """
    own = mae.state_dict()
    tubelet = mae.encoder.patch_embed.tubelet_size
    weights, note = _inflated(weights, "encoder.patch_embed.proj.weight", tubelet, how)
    taken = {name: value for name, value in weights.items() if name in own}
    whole = any(not name.startswith("encoder.") for name in taken)
    needed = ("",) if whole else ENCODER_TRUNK
    return _load_part(mae, weights, taken, needed, (*ENCODER_TRUNK, "decoder."), path)._replace(note=note)


def _load_part(
    module: nn.Module,
    weights: dict[str, Tensor],
    taken: dict[str, Tensor],
    needed: tuple[str, ...],
    layers: tuple[str, ...],
    path: str | Path,
) -> LoadReport:
    """Loads `taken`, a part of the weights. All of the module whose names begin with `needed` has to be there, and no
    more names of `layers` than the module has."""
    own = module.state_dict()
    wanted = {name: value for name, value in own.items() if name in taken or name.startswith(needed)}
    beyond = {name: value for name, value in weights.items() if name.startswith(layers) and name not in taken}
    holds = "" if any(name.startswith(layers) for name in taken) else f"; it contains {_summary(list(weights))}"
    _check_fit(wanted, taken | beyond, path, holds)
    module.load_state_dict(taken, strict=False)
    return LoadReport(list(taken), [n for n in own if n not in taken], [n for n in weights if n not in taken])


def resize_position_table(table: Tensor, old_grid: tuple[int, int, int], new_grid: tuple[int, int, int]) -> Tensor:
    """A learned position table [1, N, D] of (t, h, w) tokens for another grid, trilinear."""
    if tuple(old_grid) == tuple(new_grid):
        return table
    volume = table.float().transpose(1, 2).unflatten(2, tuple(old_grid))
    volume = F.interpolate(volume, size=tuple(new_grid), mode="trilinear", align_corners=False)
    return volume.flatten(2).transpose(1, 2).to(table.dtype)


def check_position_table(table: Tensor, path: str | Path) -> None:
    """Raises CheckpointError where it is not one float table [1, N, D] with memory for all its values."""
    if (
        not isinstance(table, Tensor)
        or (table.ndim, table.layout, table.is_floating_point(), table.is_meta) != (3, torch.strided, True, False)
        or len(table) != 1
        or not 0 < table.nbytes <= table.untyped_storage().nbytes()
    ):
        kind = f"{_kind(table)} {tuple(table.shape)}" if isinstance(table, Tensor) else _kind(table)
        raise CheckpointError(f"{path}: its pos_embed is {kind}, not a table of positions [1, N, D]")


def position_grid(state: dict, table: Tensor, grid: tuple[int, int, int], tubelet: int, path: str | Path):
    """(t, h, w) of a position table [1, N, D]: frames from the checkpoint's args where it has them, else as many as
    `grid`; square in space. Raises CheckpointError where that does not come out."""
    frames = saved_args(state, path).get("num_frames", grid[0] * tubelet)
    t = frames // tubelet if isinstance(frames, int) else 0
    side = math.isqrt(table.shape[1] // t) if t > 0 else 0
    if t * side * side != table.shape[1] or not side:
        raise CheckpointError(f"{path}: its {table.shape[1]} positions are not {t or repr(frames)} frames of a square")
    return t, side, side


def load_weights(module: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Strict load; raises CheckpointError that lists what does not fit."""
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path}: contains a {type(weights).__name__} instead of weights by name")
    _check_fit(module.state_dict(), weights, path)
    module.load_state_dict(weights)


def _check_fit(own: dict[str, Tensor], weights: dict[str, Tensor], path: str | Path, note: str = "") -> None:
    both = {name: (weights[name], own[name]) for name in own if name in weights}
    odd = [
        f"{name} is {_kind(value)}, the model has {_kind(mine)}"
        for name, (value, mine) in both.items()
        if not isinstance(value, Tensor)
        or value.is_floating_point() != mine.is_floating_point()
        or value.is_complex()
        or value.is_meta
        or value.layout != mine.layout
    ]
    if odd:
        raise CheckpointError(f"{path}: has values that are no weights of this model: {_few(odd)}")
    missing = [name for name in own if name not in weights]
    unknown = [str(name) for name in weights if name not in own]
    wrong = [
        f"{name} is {tuple(value.shape)}, the model has {tuple(mine.shape)}"
        for name, (value, mine) in both.items()
        if value.shape != mine.shape
    ]
    if missing or unknown or wrong:
        problems = [
            f"{len(names)} {what}: {_few(names)}"
            for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
            if names
        ]
        raise CheckpointError(
            f"{path} does not fit this model (check --model, --input_size, --num_frames, --patch_size, --tubelet_size; "
            "in pre-training --decoder_depth, --mask_type, --tats_attention, --tats_blocks; in fine-tuning "
            f"--nb_classes, --use_cls, --linear_probe, --attentive_probe): {'; '.join(problems)}{note}"
        )
    spoilt = [name for name, (value, mine) in both.items() if not value.to(mine.dtype).isfinite().all()]
    if spoilt:
        raise CheckpointError(
            f"{path}: {len(spoilt)} of its {len(both)} weights are not finite ({_few(spoilt)}): the run that wrote it "
            "had diverged, or the file is damaged; take an earlier one"
        )


def _kind(value) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {value.layout}{' without values (meta)' if value.is_meta else ''}"


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def from_huggingface(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers' VideoMAE models (pre-training or classification) to VideoMAE's own."""
    renames = (
        (r"^videomae\.embeddings\.patch_embeddings\.projection", "encoder.patch_embed.proj"),
        (r"^videomae\.encoder\.layer\.", "encoder.blocks."),
        (r"^videomae\.embeddings\.position_embeddings$", "encoder.pos_embed"),
        (r"^position_embeddings$", "pos_embed"),
        (r"^videomae\.layernorm", "encoder.norm"),
        (r"^decoder\.decoder_layers\.", "decoder.blocks."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.attention\.attention\.", ".attn."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"^classifier\.", "head."),
    )
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    for name in [name for name in renamed if name.endswith("attn.query.weight")]:
        prefix = name.removesuffix("query.weight")
        parts = [renamed.pop(f"{prefix}{part}.weight") for part in ("query", "key", "value")]
        renamed[f"{prefix}qkv.weight"] = torch.cat(parts)
        for part in ("q", "v"):
            full = {"q": "query", "v": "value"}[part]
            if f"{prefix}{full}.bias" in renamed:
                renamed[f"{prefix}{part}_bias"] = renamed.pop(f"{prefix}{full}.bias")
        renamed.pop(f"{prefix}key.bias", None)
    return renamed


def to_huggingface(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of from_huggingface: names of transformers' files, where the biases of queries and values are called
    q_bias and v_bias, as in those of the VideoMAE authors. Keys have none. weights: of a pre-training model or a
    classifier, the encoder's with "encoder." in front."""
    renames = (
        (r"^encoder\.patch_embed\.proj", "videomae.embeddings.patch_embeddings.projection"),
        (r"^encoder\.blocks\.", "videomae.encoder.layer."),
        (r"^encoder\.norm\.", "videomae.layernorm."),
        (r"^decoder\.blocks\.", "decoder.decoder_layers."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.", ".attention.attention."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"^head\.", "classifier."),
    )
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".qkv.weight"):
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            renamed |= {name.replace("qkv", part): piece.contiguous() for part, piece in parts}
        else:
            renamed[name] = value.contiguous()
    return renamed
