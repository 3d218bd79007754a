"""Converts checkpoints of this project, VideoMAE and AdaMAE to a Hugging Face folder, and back.

    python tools/convert_checkpoint.py --input output/ucf101_tats --output tats-ucf101
    python tools/convert_checkpoint.py --input tats-ucf101 --output tats-ucf101.pth

--input is whatever --finetune takes: a checkpoint, a run's folder (its newest checkpoint), a Hugging Face folder. It
has a decoder (pre-training) or a classifier. An --output that ends in .pth becomes a checkpoint with the weights under
VideoMAE's names and a learned sampler beside them, or inside the encoder as AdaMAE has it (--layout adamae). Any other
--output becomes a folder:

    config.json, model.safetensors   for transformers' VideoMAEForPreTraining or VideoMAEForVideoClassification
    preprocessor_config.json         size, mean and deviation, frames, frames between two frames, names of the classes
    README.md                        model card: method, data, settings, and numbers of the run's args.json, test.json
    args.json, sampler.safetensors   the run's flags without paths, and a learned sampler: this project reads them back

Where transformers can be imported, the folder is opened with it: all weights have to arrive, and the outputs for a
random clip are compared. A learned table of positions is refused, because transformers' models have none. Flags of
run_mae_pretraining.py or run_class_finetuning.py (--model, --num_frames, ...) override those in the checkpoint.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import run_class_finetuning
import run_mae_pretraining
from datasets.build import DATA_SETS
from datasets.transforms import mean_and_std
from masking_generator import Mask
from modeling_finetune import is_sinusoid_encoding_table
from runtime.checkpoint import CheckpointError, open_checkpoint, save_checkpoint, saved_args
from runtime.convert import IMAGE, from_huggingface, load_weights, model_weights, split_samplers, to_huggingface
from runtime.foreign_files import ARGS_FILE, SAMPLER_FILE
from runtime.reports import CLASSES, class_names
from runtime.resume import saved_defaults
from tools.common import Formatter, run_tool, write_text
from tools.model_card import PATHS, model_card
from tools.trained import flags_of_config, is_huggingface
from utils import UsageError

PRETRAINING, CLASSIFICATION = "VideoMAEForPreTraining", "VideoMAEForVideoClassification"
SCRIPTS = {PRETRAINING: run_mae_pretraining, CLASSIFICATION: run_class_finetuning}
MODULES = {PRETRAINING: "modeling_pretrain", CLASSIFICATION: "modeling_finetune"}
# Flags that say what the weights are of, whoever trained them.
STRUCTURE = {
    PRETRAINING: "model input_size num_frames patch_size tubelet_size decoder_depth normalize_target".split(),
    CLASSIFICATION: [name for name in run_class_finetuning.TEST_FLAGS if name != "model_ema"],
}


class Checkpoint(NamedTuple):
    """kind: PRETRAINING or CLASSIFICATION; model: ours, with the weights; weights: under the names of VideoMAE's
    autoencoder, the classifier's head and fc_norm without "encoder."; samplers: {name: tensors}; args: all flags of the
    script; saved: those that the checkpoint has or that were given, without paths; names: of the classes, where they
    are known."""

    path: Path
    kind: str
    model: nn.Module
    weights: dict[str, Tensor]
    samplers: dict[str, dict[str, Tensor]]
    args: argparse.Namespace
    saved: dict
    names: list[str] | None


def read_checkpoint(flags: argparse.Namespace, overrides: list[str]) -> Checkpoint:
    """--input, whole. Raises CheckpointError, UsageError."""
    path, state = open_checkpoint(flags.input)
    weights = model_weights(state, path, tuple(flags.model_key.split("|")), (), flags.model_prefix)
    weights, samplers = split_samplers(state, weights, run_mae_pretraining.SAMPLERS)
    for name in ("encoder.pos_embed", "pos_embed"):
        if name in weights and not is_sinusoid_encoding_table(weights.pop(name)):
            raise CheckpointError(f"{path}: has a learned table of positions ({name}), which transformers' has not")
    if any(name.startswith(IMAGE) for name in weights):
        raise CheckpointError(f"{path}: contains image weights; start a run from them with --finetune")
    if any(name.startswith("pool.") for name in weights):
        raise CheckpointError(f"{path}: contains a probe, which transformers has not; convert what its --finetune was")
    inside = ("encoder.head.", "encoder.fc_norm.")
    weights = {n.removeprefix("encoder.") if n.startswith(inside) else n: value for n, value in weights.items()}
    if any(name.startswith("decoder.") for name in weights):
        kind = PRETRAINING
    elif "head.weight" in weights:
        kind = CLASSIFICATION
    else:
        raise CheckpointError(f"{path}: has neither a decoder nor a classifier, so it is neither kind of model")

    saved, names = saved_args(state, path), state.get("class_names")
    if is_huggingface(path):
        in_config, in_labels = flags_of_config(path.parent, MODULES[kind])
        saved, names = in_config | saved, names or in_labels
    args = parse_flags(kind, saved, overrides, weights, samplers, path)
    build = run_mae_pretraining.build_mae if kind == PRETRAINING else build_classifier
    model = build(args).eval()
    load_weights(model, named_as_ours(weights, kind), path)
    folder = flags.lists or lists_folder(saved)
    if kind == CLASSIFICATION and folder is not None and (flags.lists or not names):
        names = class_names(folder, args.nb_classes)
        names = names if names != [str(label) for label in range(args.nb_classes)] else None
    saved = {name: value for name, value in saved.items() if name not in PATHS}
    saved |= {name: getattr(args, name) for name in STRUCTURE[kind]}
    if len(samplers) == 1:
        saved["mask_type"] = args.mask_type if kind == PRETRAINING else next(iter(samplers))
    return Checkpoint(path, kind, model, weights, samplers, args, saved, names)


def parse_flags(
    kind: str, saved: dict, overrides: list[str], weights: dict[str, Tensor], samplers: dict, path: Path
) -> argparse.Namespace:
    """All flags of the script that wrote such a model: the checkpoint's, the user's over them."""
    script: ModuleType = SCRIPTS[kind]
    parser = script.get_parser()
    if kind == PRETRAINING:
        names = [action.dest for action in parser._actions]
        if len(samplers) == 1:  # AdaMAE's file need not say so
            parser.set_defaults(mask_type=next(iter(samplers)))
    else:
        names = STRUCTURE[kind]
        num_classes = len(weights["head.weight"])
        data_set = DATA_SETS.get(saved.get("data_set"))
        if data_set is None or data_set.num_classes != num_classes:
            saved = saved | {"data_set": "custom"}
        saved = saved | {"nb_classes": num_classes, "use_mean_pooling": "fc_norm.weight" in weights}
    described, given = saved_defaults(parser, saved, names, path), [*overrides, "--device", "cpu", "--amp", "none"]
    if kind == PRETRAINING:
        parser.set_defaults(**described)
        args = parser.parse_args(given)
    else:
        args = run_class_finetuning.parse_args(given, described)
    script.check_flags(args)
    return args


def build_classifier(args: argparse.Namespace) -> nn.Module:
    return run_class_finetuning.build_classifier(args, None)


def named_as_ours(weights: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Under the names of our module, and of VideoMAE's files: a classifier's have no "encoder."."""
    return weights if kind == PRETRAINING else {n.removeprefix("encoder."): value for n, value in weights.items()}


def lists_folder(saved: dict) -> str | None:
    """Of the test, validation or training list of a run, where classes.txt is looked for; None where none is named."""
    path = saved.get("test_data_path") or saved.get("eval_data_path") or saved.get("data_path")
    return path if path is None or os.path.isdir(path) else os.path.dirname(path)


# ------------------------------------------------------------------------------------------------ to a .pth file


def write_checkpoint(path: Path, checkpoint: Checkpoint, layout: str) -> None:
    """{"model", "args"} and the sampler: beside them under its name, or in AdaMAE's layout inside the encoder."""
    model = named_as_ours(checkpoint.weights, checkpoint.kind)
    state = {"model": model, "args": checkpoint.saved, **checkpoint.samplers}
    if layout == "adamae":
        if "adamae" not in state:
            raise UsageError(f"--layout adamae: {checkpoint.path} has no AdaMAE sampler")
        state["model"] = model | {f"encoder.{name}": value for name, value in state.pop("adamae").items()}
    if checkpoint.names:
        state["class_names"] = checkpoint.names
    save_checkpoint(path, state)
    print(f"wrote {path}: {len(model)} tensors{with_samplers(checkpoint)}")


def with_samplers(checkpoint: Checkpoint) -> str:
    return "".join(f", {len(tensors)} of the {name} sampler" for name, tensors in checkpoint.samplers.items())


# ------------------------------------------------------------------------------------------------ to a folder


def write_folder(output: Path, checkpoint: Checkpoint, run: Path) -> None:
    """The Hugging Face folder, under a temporary name until transformers has opened it. Raises UsageError."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.") as temporary:
        folder = Path(temporary, output.name)
        folder.mkdir()
        tensors = to_huggingface(checkpoint.weights)
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for name, content in (("config.json", config_of(checkpoint)),
                              ("preprocessor_config.json", processor_of(checkpoint)),
                              (ARGS_FILE, {"args": checkpoint.saved})):  # fmt: skip
            write_text(folder / name, json.dumps(content, indent=2, default=str) + "\n")
        if checkpoint.samplers:
            inside = {
                f"{kind}.{n}": v.contiguous() for kind, own in checkpoint.samplers.items() for n, v in own.items()
            }
            safetensors.torch.save_file(inside, folder / SAMPLER_FILE, metadata={"format": "pt"})
        card = model_card(
            output.name, checkpoint.kind == CLASSIFICATION, checkpoint.path, checkpoint.args, checkpoint.saved, run,
            SAMPLER_FILE if checkpoint.samplers else "",
        )  # fmt: skip
        write_text(folder / "README.md", card)
        said = open_with_transformers(folder, checkpoint)
        if output.is_dir():
            output.rmdir()  # an empty one, see convert
        os.rename(folder, output)
    print(f"wrote {output}: {checkpoint.kind}, {len(checkpoint.weights)} tensors{with_samplers(checkpoint)}\n{said}")


def config_of(checkpoint: Checkpoint) -> dict:
    """transformers' VideoMAEConfig. Its fc_norm and the decoder's last norm have eps 1e-5 whatever it says, ours 1e-6:
    outputs agree to about 1e-4 of the largest, not exactly."""
    model, args = checkpoint.model, checkpoint.args
    encoder = model.encoder if checkpoint.kind == PRETRAINING else model
    embed, block = encoder.patch_embed, encoder.blocks[0]
    config = {
        "architectures": [checkpoint.kind],
        "model_type": "videomae",
        "image_size": embed.img_size[0],
        "patch_size": embed.patch_size[0],
        "num_channels": embed.proj.in_channels,
        "num_frames": embed.num_frames,
        "tubelet_size": embed.tubelet_size,
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": block.norm1.eps,
        "qv_bias": block.attn.q_bias is not None,
        "use_mean_pooling": checkpoint.kind == CLASSIFICATION and model.fc_norm is not None,
    }
    if checkpoint.kind == PRETRAINING:
        block = model.decoder.blocks[0]
        return config | {
            "decoder_hidden_size": block.norm1.normalized_shape[0],
            "decoder_num_hidden_layers": len(model.decoder.blocks),
            "decoder_num_attention_heads": block.attn.num_heads,
            "decoder_intermediate_size": block.mlp.fc1.out_features,
            "norm_pix_loss": args.normalize_target,
        }
    names = checkpoint.names or [f"LABEL_{label}" for label in range(args.nb_classes)]
    labels = [name if names.count(name) == 1 else f"{name} ({label})" for label, name in enumerate(names)]
    problem = args.task if args.task == "regression" else f"{args.task}_classification"
    return config | {
        "problem_type": problem,
        "id2label": {str(label): name for label, name in enumerate(labels)},
        "label2id": {name: label for label, name in enumerate(labels)},
    }


def processor_of(checkpoint: Checkpoint) -> dict:
    """For transformers' VideoMAEImageProcessor; the frames' entries are for the reader, and for this project."""
    args = checkpoint.args
    mean, std = mean_and_std(args.imagenet_default_mean_and_std)
    content = {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": getattr(args, "short_side_size", args.input_size)},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": args.input_size, "width": args.input_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "num_frames": args.num_frames,
        "sampling_rate": args.sampling_rate,
    }
    if checkpoint.kind == CLASSIFICATION:
        content["num_segments"] = args.num_segments
        if checkpoint.names:
            content["labels"] = checkpoint.names
    return content


@torch.no_grad()
def open_with_transformers(folder: Path, checkpoint: Checkpoint) -> str:
    """Whether all weights arrive in transformers' model, and how far its outputs are from ours, in a sentence. Raises
    UsageError where weights do not arrive."""
    try:
        import transformers
    except ImportError as error:
        return f"not opened with transformers, which cannot be imported ({str(error).strip().splitlines()[0]})"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = getattr(transformers, checkpoint.kind).from_pretrained(folder).eval()
    arrived = from_huggingface(theirs.state_dict())
    lost = [n for n, value in checkpoint.weights.items() if n not in arrived or not torch.equal(arrived[n], value)]
    if lost:
        raise UsageError(
            f"transformers {transformers.__version__} does not read {len(lost)} of {len(checkpoint.weights)} tensors "
            f"({', '.join(lost[:3])}), so the folder is not kept. Some releases of version 5 read q_bias and v_bias "
            "as zeros (huggingface/transformers#48675): install a newer one"
        )
    embed = (checkpoint.model.encoder if checkpoint.kind == PRETRAINING else checkpoint.model).patch_embed
    draw = torch.Generator().manual_seed(0)
    clip = torch.randn(1, embed.proj.in_channels, embed.num_frames, *embed.img_size, generator=draw)
    if checkpoint.kind == PRETRAINING:
        order = torch.rand(1, embed.num_patches, generator=draw).argsort(dim=1)
        hidden = order >= max(embed.num_patches // 4, 1)
        ours = checkpoint.model(clip, Mask.from_bool(hidden))
        output = theirs(clip.transpose(1, 2), bool_masked_pos=hidden).logits
    else:
        ours, output = checkpoint.model(clip), theirs(clip.transpose(1, 2)).logits
    difference = ((ours - output).abs().max() / ours.abs().max().clamp(min=1e-30)).item()
    return (
        f"transformers {transformers.__version__} reads all {len(checkpoint.weights)} tensors; its outputs for a "
        f"random clip differ by {difference:.1g} of the largest"
    )


def convert(flags: argparse.Namespace) -> None:
    """Raises UsageError, CheckpointError."""
    output = Path(flags.output)
    if output.exists() and not (output.is_dir() and not os.listdir(output)):
        raise UsageError(f"--output {output}: exists; choose another name, or delete it")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {output.absolute().parent}")
    for name, files in (("run", (ARGS_FILE, "test.json")), ("lists", (CLASSES,))):
        folder = getattr(flags, name)
        if folder and not any(os.path.isfile(os.path.join(folder, file)) for file in files):
            raise UsageError(f"--{name} {folder}: there is no {' or '.join(files)} in it")
    checkpoint = read_checkpoint(flags, flags.overrides)
    if output.suffix == ".pth":
        write_checkpoint(output, checkpoint, flags.layout)
    elif flags.layout != "videomae":
        raise UsageError(f"--layout {flags.layout}: is for an --output that ends in .pth")
    else:
        write_folder(output, checkpoint, Path(flags.run) if flags.run else checkpoint.path.parent)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    parser.add_argument("--input", required=True, help="checkpoint, run's folder or Hugging Face folder")
    parser.add_argument("--output", required=True, help="a new folder, or a new file NAME.pth")
    parser.add_argument("--run", default=None, help="folder of the run's args.json and test.json; default: the input's")
    parser.add_argument("--lists", default=None, help="folder with classes.txt; default: of the run's lists")
    parser.add_argument(
        "--layout", default="videomae", choices=["videomae", "adamae"], help="where a .pth file has AdaMAE's sampler"
    )
    parser.add_argument("--model_key", default="model|module", help="as in the scripts; model_ema: the moving average")
    parser.add_argument("--model_prefix", default="", help="as in the scripts")
    return parser


def main(arguments: list[str] | None = None) -> None:
    flags, overrides = get_parser().parse_known_args(arguments)
    flags.overrides = overrides
    run_tool(convert, flags)


if __name__ == "__main__":
    main()
