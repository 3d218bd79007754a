"""The pictures of tools/compare_runs.py: learning curves, and accuracies with their intervals."""

import itertools
import statistics
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.tasks import SINGLE_LABEL, TITLES, Task
from tools.common import replacing
from tools.run_folders import KINDS, PRETRAINING, Quantity, Run
from tools.seed_statistics import UNDECIDED, Paired, interval
from utils import picture_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

LOGGED = {"loss": "reconstruction error", "motion_lift": "motion lift", "entropy": "entropy / log N"}


def draw_curves(path: Path, rows: list[dict[str, list[Run]]], labels: list[str], task: Task = SINGLE_LABEL) -> bool:
    """Mean of the seeds over epochs and a band from the least to the greatest, a panel for each of what was logged.

    Args: rows, the runs of each kind, a dictionary for each row; labels, one per row; task, of the runs.
    Returns whether there was anything to draw.
    """
    panels = [(PRETRAINING, f"train_{name}", title) for name, title in LOGGED.items()]
    panels += [(kind, f"val_{task.metric}", f"{kind}: validation {TITLES[task.metric]}") for kind in KINDS]
    panels = [panel for panel in panels if any(run.curve(panel[1])[0] for row in rows for run in row.get(panel[0], []))]
    if not panels:
        return False
    figure, grid = new_figure(len(panels), len(rows))
    handles = {}
    for axes, (kind, name, title) in zip(grid, panels, strict=True):
        drawn = []
        for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
            runs = row.get(kind, [])
            if runs and runs not in drawn:  # one pre-training may have several rows, one for each data set it served
                drawn.append(runs)
                line = draw_band(axes, [run.curve(name) for run in runs], **style_of(index))
                if line:
                    handles.setdefault(wrap(label), line)
        axes.set(title=title, xlabel="epoch")
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
    finish(figure, path, handles)
    return True


def draw_band(axes: "Axes", curves: list[tuple[list[int], list[float]]], **style: str) -> "Line2D | None":
    """The handle of the mean's line, or None where there is nothing to draw."""
    values = defaultdict(list)
    for epochs, numbers in curves:
        for epoch, number in zip(epochs, numbers, strict=True):
            values[epoch].append(number)
    epochs = sorted(values)
    if not epochs:
        return None
    marker = "o" if len(epochs) == 1 else None
    (line,) = axes.plot(epochs, [statistics.fmean(values[epoch]) for epoch in epochs], marker=marker, **style)
    low, high = [min(values[epoch]) for epoch in epochs], [max(values[epoch]) for epoch in epochs]
    axes.fill_between(epochs, low, high, color=style["color"], alpha=0.2, linewidth=0)
    return line


def draw_accuracies(
    path: Path, rows: list[dict[str, list[Run]]], labels: list[str], kinds: list[str], task: Task = SINGLE_LABEL
) -> None:
    """A dot for each seed, beside it the mean with its interval, a panel for each kind. Args as in draw_curves."""
    figure, grid = new_figure(len(kinds))
    for axes, kind in zip(grid, kinds, strict=True):
        shown = [(index, row[kind]) for index, row in enumerate(rows) if row.get(kind)]
        for place, (index, runs) in enumerate(shown):
            values = [run.test[task.metric] for run in runs]
            color = style_of(index)["color"]
            axes.plot([place - 0.12] * len(values), values, "o", color=color, alpha=0.6, markersize=5)
            mean, half = interval(values)
            axes.errorbar(place + 0.12, mean, half, fmt="_", color=color, capsize=5, markersize=14)
        axes.set_xticks(range(len(shown)), [wrap(labels[index]) for index, _ in shown], rotation=30, ha="right")
        axes.set(title=f"{kind}: test {TITLES[task.metric]}", xlim=(-0.5, len(shown) - 0.5))
        if "(%)" in TITLES[task.metric]:  # two seeds may leave more than there is
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -2), min(high, 102))
        axes.grid(axis="y", alpha=0.3)
    finish(figure, path, {})


def draw_map(path: Path, found: dict[Quantity, dict[str, dict[tuple[str, str], Paired]]], baseline: str) -> None:
    """Where methods differ from the baseline: a line of panels for each quantity, in it a panel for each method with a
    cell for each (data set, mask ratio): the difference and half of its interval, bold where it is decided, on blue
    where the method is better.

    Args: found, {quantity: {method: {(row, column): paired comparison}}}; baseline, its name.
    """
    methods = list(dict.fromkeys(method for panels in found.values() for method in panels))
    columns = sorted({ratio for panels in found.values() for cells in panels.values() for _, ratio in cells})
    figure, grid = new_figure(len(found) * len(methods), columns=len(methods))
    pairs = itertools.product(found.items(), methods)
    for axes, ((quantity, panels), method) in zip(grid, pairs, strict=True):
        bound = max(abs(result.difference) for cells in panels.values() for result in cells.values()) or 1.0
        lines = sorted({line for cells in panels.values() for line, _ in cells})
        cells = panels.get(method, {})
        values = [[cells[y, x].difference if (y, x) in cells else float("nan") for x in columns] for y in lines]
        axes.imshow(values, cmap="RdBu_r" if quantity.least else "RdBu", vmin=-bound, vmax=bound, aspect="auto")
        for (y, x), result in cells.items():
            text = f"{result.difference:+.{quantity.digits}f}\n± {result.width:.2g}\n{result.pairs} pairs"
            pale = abs(result.difference) < 0.6 * bound
            axes.text(
                columns.index(x), lines.index(y), text, ha="center", va="center", color="black" if pale else "white",
                weight="bold" if result.verdict() != UNDECIDED else "normal", fontsize=8,
            )  # fmt: skip
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(lines)), [wrap(line) for line in lines])
        axes.set_title(f"{wrap(method)}\n{wrap(quantity.title)}\n- {baseline}'s", fontsize=10)
        axes.set_xlabel("mask ratio")
    finish(figure, path, {})


def style_of(index: int) -> dict[str, str]:
    """Ten colours, then the same ones with other lines."""
    return {"color": f"C{index % 10}", "linestyle": ("-", "--", ":", "-.")[index // 10 % 4]}


def wrap(label: str) -> str:
    """A label in at most three lines."""
    return textwrap.fill(picture_text(label), 36, max_lines=3, placeholder=" ...")


def new_figure(num_panels: int, num_handles: int = 0, columns: int = 0) -> "tuple[Figure, list[Axes]]":
    """num_handles: of the legend that will need a place below; columns: of panels, by default up to 3."""
    from matplotlib.figure import Figure

    columns = columns or (2 if num_panels == 4 else min(num_panels, 3))
    lines = -(-num_panels // columns)
    below = 0.5 * -(-num_handles // columns)
    figure = Figure(figsize=(4.6 * columns + 0.4, 3.6 * lines + 0.9 + below), layout="constrained")
    return figure, list(figure.subplots(lines, columns, squeeze=False).flat)[:num_panels]


def finish(figure: "Figure", path: Path, handles: dict[str, "Line2D"]) -> None:
    """Writes a figure, with a legend of {label: line} below its panels; panels without data are left out."""
    for axes in figure.axes:
        axes.set_visible(axes.has_data())
    if handles:
        columns = min(len(handles), round(figure.get_figwidth() // 4.6))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
