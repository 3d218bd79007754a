"""The files a test leaves: accuracies, predictions, the per-class table, and the picture of confusions."""

import csv
import json
import math
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from runtime.tasks import SINGLE_LABEL, Task, average_precision, macro_f1
from utils import log, picture_text, replace_text

CLASSES = "classes.txt"


def class_names(folder: str | Path, num_classes: int) -> list[str]:
    """read_class_names of a folder's classes.txt; numbers where there is none."""
    path = Path(folder) / CLASSES
    return read_class_names(path, num_classes) if path.is_file() else [str(label) for label in range(num_classes)]


def read_class_names(path: Path, num_classes: int) -> list[str]:
    """Names of the classes, a line per label (tools/make_lists.py writes such a file). Blank lines are skipped. A file
    that is not UTF-8 is read as latin-1, one that cannot be used is named: a test does not end for a name."""
    numbers = [str(label) for label in range(num_classes)]
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


def saved_class_names(state: dict, num_classes: int) -> list[str]:
    """Names of the classes that a checkpoint of any origin has; numbers where it has none that fit."""
    saved = state.get("class_names")
    if isinstance(saved, list) and len(saved) == num_classes and all(isinstance(name, str) for name in saved):
        return saved
    return [str(label) for label in range(num_classes)]


def confusion_matrix(scores, num_classes: int) -> Tensor:
    """int64 [K, K]: videos of class (row) taken for class (column); unreadable videos are in no column."""
    predicted = scores.ranking()[:, 0][scores.found]
    cells = scores.label[scores.found] * num_classes + predicted
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def write_report(
    folder: Path, scores, paths: list[str], names: list[str], settings: dict, task: Task = SINGLE_LABEL
) -> dict:
    """Writes test.json (the task's measures, settings), predictions.csv (the five most probable classes of each video,
    or its values), scores.npz (probability float32 [n, K], label, in the list's order). Where there are classes also
    per_class.csv, and confusion.png where a video has one.

    Returns: what test.json holds.

    scores: engine_for_finetuning.Scores; names: of the K classes or values.
    """
    result = scores.measures(task)
    if task is SINGLE_LABEL:
        result |= _write_single_label(folder, scores, names)
    if task.name == "multi_label":
        _write_average_precision(folder, scores, names)
    result |= {"videos": len(scores.label), "unreadable": len(scores.failed), **settings}
    _write_predictions(folder, scores, paths, names, task)
    import numpy as np

    with open(folder / "scores.npz.tmp", "wb") as file:
        np.savez_compressed(file, probability=scores.probability.numpy(), label=scores.label.numpy())
    os.replace(folder / "scores.npz.tmp", folder / "scores.npz")
    before = read_report(folder)
    if settings.items() <= before.items():  # the same test once more, by --eval
        result |= {name: before[name] for name in best_entries(task) if name in before}
    _write_json(folder / "test.json", result)  # after the tables: its presence says that the test is finished
    if task is SINGLE_LABEL:
        title = f"top-1 {result['acc1']:.2f} %, {result['videos']} videos"
        try:
            draw_confusion(folder / "confusion.png", confusion_matrix(scores, len(names)), names, title)
        except Exception as error:  # fonts, memory, whatever a picture meets: the results are written
            log(f"warning: {folder / 'confusion.png'} cannot be drawn ({type(error).__name__}: {error})")
    return result


def _write_single_label(folder: Path, scores, names: list[str]) -> dict[str, float]:
    """per_class.csv; returns the measures beside the task's own."""
    per_class = per_class_accuracy(scores, len(names))
    present = [accuracy for count, accuracy in per_class if count]
    _write(folder / "per_class.csv", ["label", "class", "videos", "acc1"],
           ([label, name, count, f"{accuracy:.2f}" if count else ""]
            for label, (name, (count, accuracy)) in enumerate(zip(names, per_class, strict=True))))  # fmt: skip
    return {
        "mean_class_acc1": sum(present) / len(present),
        "macro_f1": macro_f1(scores.predicted(), scores.label, len(names)),
    }


def _write_average_precision(folder: Path, scores, names: list[str]) -> None:
    """per_class.csv of several labels per video."""
    rows = []
    for label, name in enumerate(names):
        positive = scores.label[:, label] > 0
        value = f"{100 * average_precision(scores.probability[:, label], positive):.2f}" if positive.any() else ""
        rows.append([label, name, int(positive.sum()), value])
    _write(folder / "per_class.csv", ["label", "class", "videos", "average_precision"], rows)


def _write_predictions(folder: Path, scores, paths: list[str], names: list[str], task: Task) -> None:
    if task.name == "regression":
        header = ["path", *(f"value{i}" for i in range(len(names))), *(f"predicted{i}" for i in range(len(names)))]
        rows = (
            [path, *map(_short, label), *(map(_short, values) if found else [])]
            for path, label, found, values in zip(
                paths, scores.label.tolist(), scores.found, scores.probability.tolist(), strict=True
            )
        )
        return _write(folder / "predictions.csv", header, rows)
    k = min(5, len(names))
    classes = scores.ranking()[:, :k]
    probability = scores.probability.gather(1, classes)
    header = [f"{what}{i}" for i in range(1, k + 1) for what in ("top", "probability")]
    if task is SINGLE_LABEL:
        header = ["path", "label", "correct", *header]
        known = zip(scores.label.tolist(), scores.correct(1).int().tolist(), strict=True)
    else:
        header = ["path", "labels", *header]
        known = ([",".join(str(k) for k, there in enumerate(row) if there)] for row in scores.label.tolist())
    _write(folder / "predictions.csv", header,
           ([path, *of_list]
            + ([x for pair in zip(chosen.tolist(), (f"{p:.4f}" for p in probability), strict=True) for x in pair]
               if found else [])
            for path, of_list, found, chosen, probability in zip(
                paths, known, scores.found, classes, probability, strict=True)))  # fmt: skip


def _short(value: float) -> str:
    return f"{value:.6g}"


def read_report(folder: Path) -> dict:
    """What test.json of a folder says; {} where there is none that can be read."""
    try:
        return dict(json.loads((folder / "test.json").read_text()))
    except (OSError, ValueError, TypeError):  # absent, cut off, or something else
        return {}


def _write_json(path: Path, content: dict) -> None:
    """Numbers that are not finite (a measure that is not defined) become null."""
    content = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in content.items()}
    replace_text(path, json.dumps(content, indent=2) + "\n")


def best_entries(task: Task) -> list[str]:
    """What test.json has of the best epoch of the validation."""
    return ["best_epoch", *(f"{name}_best" for name in task.metrics), "best_chosen_on_test_videos"]


def add_best_epoch(
    folder: Path, measures: dict[str, float], epoch: int, chosen_on_test: bool, task: Task = SINGLE_LABEL
) -> None:
    """Adds to test.json what the best epoch of the validation reached; its own entries are of the last epoch."""
    entries = (epoch, *(measures[name] for name in task.metrics), chosen_on_test)
    _write_json(folder / "test.json", read_report(folder) | dict(zip(best_entries(task), entries, strict=True)))


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
