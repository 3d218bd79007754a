"""The README.md of a Hugging Face folder: method, data, settings and numbers, from a run's args.json and test.json."""

import argparse
import json
from pathlib import Path

from run_class_finetuning import BEST
from runtime.reports import read_report
from runtime.tasks import TITLES

METHODS = {
    "tube": "VideoMAE's tube masks ([arXiv 2203.12602](https://arxiv.org/abs/2203.12602))",
    "random": "random space-time masks ([arXiv 2205.09113](https://arxiv.org/abs/2205.09113))",
    "frame": "masks of whole frames",
    "motion": "masks drawn by motion, without training",
    "adamae": "AdaMAE's adaptive sampler ([arXiv 2211.09120](https://arxiv.org/abs/2211.09120))",
    "tats": "TATS, a token sampler trained by PPO ([arXiv 2505.08561](https://arxiv.org/abs/2505.08561))",
}
SETTINGS = """model input_size num_frames sampling_rate num_segments tubelet_size mask_type mask_ratio decoder_depth
    decoder_mask_ratio loss normalize_target tats_objective tats_start_epoch tats_lr epochs batch_size accum_iter
    world_size lr min_lr warmup_epochs opt opt_betas weight_decay clip_grad drop_path layer_decay smoothing mixup
    cutmix aa reprob num_sample seed amp""".split()
# What test.json may have, and its name in a card.
CARD = TITLES | {"mean_class_acc1": "mean top-1 over the classes (%)", "macro_f1": "macro F1"}
# Flags whose values are about a machine; of these a card gives no more than the last two parts.
PATHS = "data_path eval_data_path test_data_path finetune resume output_dir log_dir deepspeed_config dist_url".split()


def model_card(
    name: str, classifier: bool, path: Path, args: argparse.Namespace, saved: dict, run: Path, sampler_file: str
) -> str:
    """name: the folder's; path: of the checkpoint; args: flags that describe the model; saved: the checkpoint's flags;
    run: the folder with args.json and test.json; sampler_file: where a learned sampler is, or ""."""
    flags = _described(run) or saved
    mask_type = flags.get("mask_type")
    tags = ["video", "videomae", "masked-autoencoder", *([mask_type] if mask_type else [])]
    head = ["library_name: transformers", *(["pipeline_tag: video-classification"] if classifier else [])]
    if classifier:
        method = f"A vision transformer for clips, fine-tuned as a classifier of {args.nb_classes} classes."
    else:
        masks = METHODS.get(mask_type, mask_type) or "masks that the checkpoint does not name"
        method = f"A vision transformer for clips, pre-trained as a masked autoencoder with {masks}."
    if flags.get("finetune"):
        method += f" It started from {_end(flags['finetune'])}."
    if sampler_file:
        method += f" `{sampler_file}` has its learned sampler, which transformers does not read."
    data = [str(flags["data_set"])] if flags.get("data_set") else []
    data += [_end(flags[flag]) for flag in PATHS[:3] if flags.get(flag)]
    rows = [f"| {flag} | {_shown(flags[flag])} |" for flag in SETTINGS if flags.get(flag) not in (None, "")]
    lines = ["---", *head, "tags:", *(f"- {tag}" for tag in tags), "---", "", f"# {name}", "", method]
    lines += ["", "## Data", "", ", ".join(data) or "Not known."]
    lines += ["", "## Settings", "", *(["| flag | value |", "|---|---|", *rows] if rows else ["Not known."])]
    lines += ["", "## Numbers", "", *_numbers(path, run), "", "## Use", "", *_usage(name, classifier, args)]
    return "\n".join(lines) + "\n"


def _described(run: Path) -> dict:
    """The flags in args.json; {} where there is none."""
    try:
        return dict(json.loads((run / "args.json").read_text())["args"])
    except (OSError, ValueError, KeyError, TypeError):  # a file alone, or someone else's
        return {}


def _end(path: str) -> str:
    return "/".join(Path(str(path)).parts[-2:])


def _shown(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value).replace("|", "\\|")


def _numbers(path: Path, run: Path) -> list[str]:
    """What test.json says of this checkpoint, and of no other."""
    report = read_report(run)
    if not report:
        return ["No test was run."]
    tested = Path(str(report.get("checkpoint", ""))).name
    if tested == path.name:
        found = {title: report.get(name) for name, title in CARD.items()}
    elif path.name == BEST and any(f"{name}_best" in report for name in CARD):
        found = {title: report.get(f"{name}_best") for name, title in CARD.items()}
    else:
        return [f"The run's test is of another checkpoint ({tested})."]
    rows = [
        f"| {title.removesuffix(' (%)')} | {f'{value:.2f} %' if '(%)' in title else f'{value:.4g}'} |"
        for title, value in found.items()
        if isinstance(value, int | float)
    ]
    text = (
        f"{report.get('videos')} videos of {_end(report.get('list', ''))}, {report.get('temporal_clips')} x "
        f"{report.get('spatial_crops')} views per video."
    )
    if tested != path.name and report.get("best_chosen_on_test_videos"):
        text += " The checkpoint was chosen on these videos: too high a figure."
    return ["| measure | value |", "|---|---|", *rows, "", text]


def _usage(name: str, classifier: bool, args: argparse.Namespace) -> list[str]:
    auto = "AutoModelForVideoClassification" if classifier else "VideoMAEForPreTraining"
    last = "features = model.videomae(**inputs).last_hidden_state"
    if classifier:
        last = "print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])"
    clips = f"{args.num_frames} frames, {args.sampling_rate} frames of the video apart"
    if getattr(args, "num_segments", 1) > 1:
        clips = f"{args.num_frames} frames, spread over {args.num_segments} equal parts of the video"
    return [
        f"A clip is {clips}, in RGB.",
        "",
        "```python",
        f"from transformers import AutoImageProcessor, {auto}",
        "",
        f'processor = AutoImageProcessor.from_pretrained("{name}")',
        f'model = {auto}.from_pretrained("{name}").eval()',
        'inputs = processor(clip, return_tensors="pt")  # clip: a list of uint8 frames [3, height, width]',
        last,
        "```",
    ]
