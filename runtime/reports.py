"""The files a test leaves: accuracies, predictions, the per-class table, and the picture of confusions."""

import csv
import json
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from utils import log, picture_text

BEST_ENTRIES = ("best_epoch", "acc1_best", "acc5_best", "best_chosen_on_test_videos")


def class_names(folder: str | Path, num_classes: int) -> list[str]:
    """classes.txt of a folder, a line a label (tools/make_lists.py writes it); else numbers. Blank lines are skipped. A
    file that is not UTF-8 is read as latin-1, one that cannot be used is named: a test does not end for a name."""
    path, numbers = Path(folder) / "classes.txt", [str(label) for label in range(num_classes)]
    if not path.is_file():
        return numbers
    try:
        data = path.read_bytes()
    except OSError as error:
        log(f"warning: {path} cannot be read ({error.strerror}): classes are called by their numbers")
        return numbers
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        log(f"warning: {path} is not UTF-8: read as latin-1")
        text = data.decode("latin-1")
    names = [line.strip() for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
    if len(names) != num_classes:
        log(f"warning: {path} names {len(names)} classes, not {num_classes}: they are called by their numbers")
        return numbers
    return names


def confusion_matrix(scores, num_classes: int) -> Tensor:
    """int64 [K, K]: videos of class (row) taken for class (column); unreadable videos are in no column."""
    predicted = scores.ranking()[:, 0][scores.found]
    cells = scores.label[scores.found] * num_classes + predicted
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def write_report(folder: Path, scores, paths: list[str], names: list[str], settings: dict) -> dict:
    """Writes test.json (accuracies, settings), per_class.csv, predictions.csv (the five most probable classes of each
    video), scores.npz (probability float32 [n, K], label, in the list's order) and confusion.png.

    Returns: what test.json holds.

    scores: engine_for_finetuning.Scores; names: of the K classes.
    """
    num_classes = len(names)
    per_class = per_class_accuracy(scores, num_classes)
    present = [accuracy for count, accuracy in per_class if count]
    result = {
        "acc1": scores.accuracy(1),
        "acc5": scores.accuracy(5),
        "mean_class_acc1": sum(present) / len(present),
        "loss": scores.loss(),
        "videos": len(scores.label),
        "unreadable": len(scores.failed),
        **settings,
    }
    _write(folder / "per_class.csv", ["label", "class", "videos", "acc1"],
           ([label, name, count, f"{accuracy:.2f}" if count else ""]
            for label, (name, (count, accuracy)) in enumerate(zip(names, per_class, strict=True))))  # fmt: skip
    k = min(5, num_classes)
    classes = scores.ranking()[:, :k]
    probability = scores.probability.gather(1, classes)
    header = ["path", "label", "correct"] + [f"{what}{i}" for i in range(1, k + 1) for what in ("top", "probability")]
    correct = scores.correct(1).int().tolist()
    _write(folder / "predictions.csv", header,
           ([path, int(label), right]
            + ([x for pair in zip(chosen.tolist(), (f"{p:.4f}" for p in probability), strict=True) for x in pair]
               if found else [])
            for path, label, right, found, chosen, probability in zip(
                paths, scores.label, correct, scores.found, classes, probability, strict=True)))  # fmt: skip
    import numpy as np

    with open(folder / "scores.npz.tmp", "wb") as file:
        np.savez_compressed(file, probability=scores.probability.numpy(), label=scores.label.numpy())
    os.replace(folder / "scores.npz.tmp", folder / "scores.npz")
    before = read_report(folder)
    if settings.items() <= before.items():  # the same test once more, by --eval
        result |= {name: before[name] for name in BEST_ENTRIES if name in before}
    _write_json(folder / "test.json", result)  # after the tables: its presence says that the test is finished
    title = f"top-1 {result['acc1']:.2f} %, {result['videos']} videos"
    try:
        draw_confusion(folder / "confusion.png", confusion_matrix(scores, num_classes), names, title)
    except Exception as error:  # fonts, memory, whatever a picture meets: the results are written
        log(f"warning: {folder / 'confusion.png'} cannot be drawn ({type(error).__name__}: {error})")
    return result


def read_report(folder: Path) -> dict:
    """What test.json of a folder holds; {} where there is none that can be read."""
    try:
        return dict(json.loads((folder / "test.json").read_text()))
    except (OSError, ValueError, TypeError):  # absent, cut off, or something else
        return {}


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def add_best_epoch(folder: Path, scores, epoch: int, chosen_on_test: bool) -> None:
    """Adds to test.json what the best epoch of the validation reached; its own entries are of the last epoch."""
    entries = (epoch, scores.accuracy(1), scores.accuracy(5), chosen_on_test)
    _write_json(folder / "test.json", read_report(folder) | dict(zip(BEST_ENTRIES, entries, strict=True)))


def per_class_accuracy(scores, num_classes: int) -> list[tuple[int, float]]:
    """Of each class: number of videos, and top-1 in % (0 where there is none)."""
    videos = torch.bincount(scores.label, minlength=num_classes)
    right = torch.bincount(scores.label[scores.correct(1)], minlength=num_classes)
    return list(zip(videos.tolist(), (100 * right / videos.clamp(min=1)).tolist(), strict=True))


def draw_confusion(path: Path, matrix: Tensor, names: list[str], title: str) -> None:
    """Rows (true classes) as shares of their videos; numbers in the cells of up to 20 classes, names of up to 60."""
    from matplotlib.figure import Figure

    num_classes, names = len(names), [picture_text(name) for name in names]
    share = (matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    side = min(max(4.5, 0.32 * num_classes), 16)
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, label="share of the class's videos", shrink=0.8)
    if num_classes <= 60:
        size = 9 if num_classes <= 20 else 6
        axes.set_xticks(range(num_classes), names, rotation=90, fontsize=size)
        axes.set_yticks(range(num_classes), names, fontsize=size)
    if num_classes <= 20:
        for row, counts in enumerate(matrix.tolist()):
            for column, count in enumerate(counts):
                if count:
                    color = "white" if share[row, column] > 0.5 else "black"
                    axes.text(column, row, count, ha="center", va="center", fontsize=8, color=color)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    figure.savefig(path, dpi=110)


def _write(path: Path, header: list[str], rows) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    os.replace(temporary, path)
