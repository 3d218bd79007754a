"""Names what videos show, by a fine-tuned classifier: the most probable labels of each video.

    python tools/predict.py a.mp4 b.mp4 --model_path output/ssv2_finetune_from_ssv2_tats
    python tools/predict.py a.mp4 --model_path videomae_k400.pth --class_names lists/k400/classes.txt

The scores are those of the test (run_class_finetuning.py --eval) for the same video, the mean over all views. A
checkpoint has the names of its classes where classes.txt lay beside its lists. A video that cannot be read is one line
on the standard error, the others are predicted, and the exit status is 1. With --task multi_label each score is a
probability of its own, with --task regression the values are printed.
"""

import argparse
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from datasets.build import build_evaluation_loader
from engine_for_finetuning import predict
from run_class_finetuning import build_recipe, check_flags, load_finished
from runtime.checkpoint import CheckpointError
from runtime.flags import resolve_amp
from runtime.reports import read_class_names, saved_class_names
from tools.common import Formatter, replacing, run_tool
from tools.trained import add_shared_flags, open_trained, quiet_worker
from utils import UsageError, picture_text

MOST_PICTURED = 50  # videos in a picture
FRAMES_PICTURED = 8


def predict_videos(args: argparse.Namespace) -> int:
    """Prints the labels of args.videos; returns 1 if a video could not be read, else 0. Raises: UsageError,
    CheckpointError."""
    if args.top_k < 1:
        raise UsageError(f"--top_k {args.top_k}: must be at least 1")
    videos = list(dict.fromkeys(args.videos))
    flags, path, state = open_trained(args.model_path, args, eval=True, num_workers=min(4, os.cpu_count() or 1))
    if flags.nb_classes is None:
        raise CheckpointError(f"{path}: has no classifier (a pre-training checkpoint?): fine-tune it first")
    check_flags(flags)
    resolve_amp(flags)
    device = torch.device(flags.device)
    model = load_finished(flags, path, state, flags.model_key).to(device)
    loader = build_evaluation_loader(flags, "test", paths=videos)
    loader.worker_init_fn = quiet_worker
    recipe = build_recipe(flags, device, {})
    index, scores, failed = predict(model, loader, recipe, flags.amp, flags.batch_size)
    found = dict(zip(index.tolist(), scores, strict=True))
    names = names_of(args, state, flags.nb_classes)
    answers = []
    for number, video in enumerate(videos):
        if number in found:
            answers.append({"video": video, **answer(found[number], names, flags.task, args.top_k)})
        else:
            reason = next(text for text in failed if text.startswith(f"{video}: "))
            answers.append({"video": video, "error": reason.removeprefix(f"{video}: ")})
            print(f"error: {reason}", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(answers, indent=1))
    else:
        for entry in answers:
            if "error" not in entry:
                print(f"{entry['video']}\n" + "".join(f"  {line}\n" for line in lines_of(entry)), end="")
    if args.picture and found:
        draw_sheet(args.picture, [(answers[n], loader.dataset[n]["video"]) for n in sorted(found)[:MOST_PICTURED]])
        more = f", the first {MOST_PICTURED} of {len(found)} videos" if len(found) > MOST_PICTURED else ""
        print(f"wrote {args.picture}{more}", file=sys.stderr)
    return 1 if failed else 0


def names_of(args: argparse.Namespace, state: dict, num_classes: int) -> list[str]:
    """Of --class_names, else of the checkpoint, else numbers. Raises: UsageError."""
    if args.class_names:
        if not Path(args.class_names).is_file():
            raise UsageError(f"--class_names {args.class_names}: no such file")
        return read_class_names(Path(args.class_names), num_classes)
    return saved_class_names(state, num_classes)


def answer(scores: Tensor, names: list[str], task: str, top_k: int) -> dict:
    """What --json says of a video. scores: float32 [K]."""
    if task == "regression":
        return {"values": [{"name": n, "value": v} for n, v in zip(names, scores.tolist(), strict=True)]}
    best = scores.sort(descending=True, stable=True)
    chosen = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return {"labels": [{"label": k, "name": names[k], "score": score} for k, score in list(chosen)[:top_k]]}


def lines_of(entry: dict) -> list[str]:
    """An answer as lines of text."""
    if "values" in entry:
        return [f"{value['name']}: {value['value']:.6g}" for value in entry["values"]]
    return [f"{100 * label['score']:5.1f} %  {label['name']}" for label in entry["labels"]]


def draw_sheet(path: str, rows: list[tuple[dict, Tensor]]) -> None:
    """A PNG with a row for each video: its labels, and frames of its middle view. rows: (answer, views uint8
    [V, T, 3, S, S])."""
    from matplotlib.figure import Figure

    clips = [views[len(views) // 2] for _, views in rows]
    columns = min(FRAMES_PICTURED, len(clips[0]))
    shown = torch.linspace(0, len(clips[0]) - 1, columns).round().long()
    figure = Figure(figsize=(3.2 + 1.3 * columns, 1.3 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns + 1, squeeze=False, width_ratios=[2.4] + [1] * columns)
    for axes, (entry, _), clip in zip(grid, rows, clips, strict=True):
        title = Path(entry["video"]).name
        text = [title if len(title) <= 34 else f"{title[:16]}...{title[-15:]}", *lines_of(entry)[:5]]
        axes[0].text(0, 0.5, picture_text("\n".join(text)), va="center", fontsize=8, transform=axes[0].transAxes)
        for axis, frame in zip(axes[1:], clip[shown], strict=True):
            axis.imshow(frame.permute(1, 2, 0).numpy())
        for axis in axes:
            axis.axis("off")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    parser.add_argument("videos", nargs="+", metavar="VIDEO")
    parser.add_argument("--model_path", required=True, help="fine-tuned checkpoint, a run's folder, or Hugging Face's")
    parser.add_argument("--top_k", type=int, default=5, help="labels per video")
    parser.add_argument("--class_names", metavar="FILE", help="a line per class, where the checkpoint has no names")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of lines")
    parser.add_argument("--picture", metavar="PNG", help="also write a contact sheet with frames and labels")
    add_shared_flags(parser, "test_num_segment", "test_num_crop", "task", "nb_classes", "use_mean_pooling", "model_ema")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = get_parser().parse_args(arguments)
    run_tool(predict_videos, args)


if __name__ == "__main__":
    main()
