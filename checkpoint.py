"""Checkpoints: atomic files that load without running code, exact resume, and names from other codebases."""

import argparse
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

ADAMAE_SAMPLER = ("encoder.get_token_probs.", "encoder.pos_embed_probs")


class CheckpointError(RuntimeError):
    """Names the file and what is wrong with it."""


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes to a temporary name, flushes to disk and renames: a killed save leaves the older file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk gets its space back
        raise


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint on the CPU with weights_only=True; of other classes only argparse's Namespace is allowed,
    which VideoMAE stores. Raises CheckpointError."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint (file or folder)") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder; give the checkpoint file inside it") from None
    except Exception as error:  # a damaged or foreign file can make the unpickler raise anything
        raise CheckpointError(
            f"{path}: not a readable checkpoint: damaged, or holding more than tensors, numbers, text and "
            f"argparse.Namespace ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a dictionary of weights")
    return state


def checkpoint_files(folder: str | Path) -> list[Path]:
    """checkpoint-N.pth in a folder, newest (largest N) first."""
    found = [
        (re.fullmatch(r"checkpoint-(\d+)\.pth", path.name), path) for path in Path(folder).glob("checkpoint-*.pth")
    ]
    return [path for match, path in sorted(found, key=lambda x: -int(x[0][1]) if x[0] else 0) if match]


def latest_checkpoint(folder: str | Path) -> tuple[Path, dict] | None:
    """The newest checkpoint of a folder that can be read; an unreadable one is named and passed over."""
    for path in checkpoint_files(folder):
        try:
            return path, load_checkpoint(path)
        except CheckpointError as error:
            print(f"warning: {error}; trying the one before it", flush=True)
    return None


def model_weights(state: dict, path: str | Path) -> dict[str, Tensor]:
    """The autoencoder's weights in a checkpoint of this project, VideoMAE, AdaMAE or Hugging Face, under VideoMAE's
    names."""
    for key in ("model", "module", "state_dict"):
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    weights = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    if not weights:
        raise CheckpointError(f"{path}: holds no weights under 'model', 'module' or at its top level")
    if any(name.startswith("videomae.") for name in weights):
        weights = from_huggingface(weights)
    # AdaMAE keeps its sampler inside the encoder
    return {name: value for name, value in weights.items() if not name.startswith(ADAMAE_SAMPLER)}


def load_weights(module: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Strict load; raises CheckpointError that lists what does not fit."""
    own = module.state_dict()
    missing = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    wrong = [
        f"{name} is {tuple(weights[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if missing or unknown or wrong:
        problems = [
            f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
            if names
        ]
        raise CheckpointError(
            f"{path} does not fit this model (check --model, --decoder_depth, --input_size, --patch_size, "
            f"--tubelet_size, --mask_type): {'; '.join(problems)}"
        )
    module.load_state_dict(weights)


def from_huggingface(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers' VideoMAE models (pre-training or classification) to VideoMAE's own."""
    renames = (
        (r"^videomae\.embeddings\.patch_embeddings\.projection", "encoder.patch_embed.proj"),
        (r"^videomae\.encoder\.layer\.", "encoder.blocks."),
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
    return {name: value for name, value in renamed.items() if not name.endswith("position_embeddings")}
