"""Checkpoints of anyone for the tools that run a trained encoder or classifier: which flags describe them."""

import argparse
import copy
import json
import os
from pathlib import Path

import timm

from datasets.build import DATA_SETS, start_worker
from datasets.transforms import mean_and_std
from modeling_finetune import SIZES
from run_class_finetuning import BEST, TEST_FLAGS, get_parser, parse_args
from runtime.checkpoint import CheckpointError, open_checkpoint, saved_args
from runtime.convert import encoder_weights
from runtime.resume import saved_defaults
from runtime.tasks import TASKS

# Flags of run_class_finetuning.py that the tools have too.
SHARED_FLAGS = (
    "batch_size", "num_workers", "device", "amp", "decoder", "model_key", "model_prefix", "model", "input_size",
    "num_frames", "patch_size", "tubelet_size", "sampling_rate", "num_segments", "short_side_size", "data_set",
    "imagenet_default_mean_and_std",
)  # fmt: skip
# What our --num_segments and --model_ema mean, VideoMAE's files say in another way.
OURS_ALONE = ("num_segments", "model_ema")


def add_shared_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds SHARED_FLAGS and the further names; a flag that is not given is not in the result."""
    group = parser.add_argument_group(
        "flags of run_class_finetuning.py; default: what the checkpoint says, else theirs"
    )
    for action in get_parser()._actions:
        if action.dest in (*SHARED_FLAGS, *names):
            action = copy.copy(action)
            action.default = argparse.SUPPRESS
            group._add_action(action)


def open_trained(model_path: str, args: argparse.Namespace, **flags) -> tuple[argparse.Namespace, Path, dict]:
    """A checkpoint, and all flags of run_class_finetuning.py for it: those of args that add_shared_flags added, then
    `flags`, then what the checkpoint saved, then what the shapes of its weights say, then the defaults.

    Returns: flags, the file, its content. Raises: CheckpointError, UsageError.
    """
    path, state = open_checkpoint(model_path, BEST)
    parser = get_parser()
    known = {action.dest for action in parser._actions}
    given = flags | {name: value for name, value in vars(args).items() if name in known}
    keys, prefix = given.get("model_key", parser.get_default("model_key")), given.get("model_prefix", "")
    described = flags_of_weights(encoder_weights(state, path, tuple(keys.split("|")), prefix))
    saved = saved_args(state, path)
    if is_huggingface(path):
        in_config, labels = flags_of_config(path.parent)
        described |= {name: value for name, value in in_config.items() if name in known}
        if labels and "class_names" not in state:
            state = state | {"class_names": labels}
    names = [name for name in TEST_FLAGS if isinstance(state.get("args"), dict) or name not in OURS_ALONE]
    if saved.get("model") not in timm.list_models(module="modeling_finetune"):
        names.remove("model")  # of an autoencoder
    data_set = DATA_SETS.get(saved.get("data_set"))
    if data_set is None or data_set.num_classes not in (None, described.get("nb_classes", data_set.num_classes)):
        names.remove("data_set")  # unknown, or its classes were cut
    described |= saved_defaults(parser, {name: saved[name] for name in names if name in saved}, names, path)
    if (described.get("short_side_size") or 0) < given.get("input_size", 0):  # that of the checkpoint's own size
        described.pop("short_side_size", None)
    resolved = parse_args(["--finetune", str(path)], described | given)
    return resolved, path, state


def flags_of_weights(weights: dict) -> dict:
    """Flags that follow from the shapes of an encoder's, or classifier's, weights by their names."""
    flags = {"data_set": "custom"}
    if "patch_embed.proj.weight" in weights:
        width, _, tubelet, patch, _ = weights["patch_embed.proj.weight"].shape
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        flags |= {"tubelet_size": tubelet, "patch_size": patch}
        for size, shape in SIZES.items():
            if (shape["embed_dim"], shape["depth"]) == (width, depth):
                flags["model"] = timm.list_models(f"vit_{size}_*", module="modeling_finetune")[0]
    if "head.weight" in weights:
        flags |= {"nb_classes": len(weights["head.weight"]), "use_mean_pooling": "fc_norm.weight" in weights}
    return flags


def is_huggingface(path: Path) -> bool:
    """Whether the weights of a checkpoint lie in a Hugging Face folder."""
    return path.name.startswith(("model.safetensors", "pytorch_model")) and (path.parent / "config.json").is_file()


def flags_of_config(folder: Path, module: str = "modeling_finetune") -> tuple[dict, list[str] | None]:
    """(flags, names of the classes or None) that a Hugging Face folder's configuration stands for; module: where the
    model's name is looked for. Raises CheckpointError."""
    processor = {}
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
        if (folder / "preprocessor_config.json").is_file():
            processor = dict(json.loads((folder / "preprocessor_config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: its configuration cannot be read ({error})") from error
    flags = {
        flag: config[name]
        for flag, name in (("input_size", "image_size"), ("patch_size", "patch_size"), ("num_frames", "num_frames"),
                           ("tubelet_size", "tubelet_size"), ("decoder_depth", "decoder_num_hidden_layers"),
                           ("normalize_target", "norm_pix_loss"))
        if name in config
    }  # fmt: skip
    sizes = tuple(config.get(name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    for size, values in SIZES.items():
        if sizes == (values["embed_dim"], values["depth"], values["num_heads"]):
            flags["model"] = timm.list_models(f"*{size}_patch*", module=module)[0]
    statistics = tuple(tuple(processor.get(name, ())) for name in ("image_mean", "image_std"))
    for is_imagenet in (True, False):
        if statistics == mean_and_std(is_imagenet):
            flags["imagenet_default_mean_and_std"] = is_imagenet
    flags |= {name: processor[name] for name in ("sampling_rate", "num_segments") if name in processor}
    labels = config.get("id2label") if "ForVideoClassification" in str(config.get("architectures")) else None
    task = str(config.get("problem_type")).removesuffix("_classification")
    if labels and task in TASKS:
        flags["task"] = task
    names = [labels.get(str(label)) for label in range(len(labels))] if isinstance(labels, dict) else []
    named = names and all(isinstance(name, str) for name in names) and names[0] != "LABEL_0"
    return flags, names if named else None


def quiet_worker(worker_id: int) -> None:
    """Starts a loader process whose decoders do not write about every damaged packet on the standard error."""
    start_worker(worker_id)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
