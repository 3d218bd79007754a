"""Compares finished runs: one table, the learning curves and the accuracies of every method, with intervals over seeds.

    python tools/compare_runs.py output --output comparison --baseline tube
    python tools/compare_runs.py output --output ablation --by tats_attention --baseline mha
    python tools/compare_runs.py output --output rollout --by tats_start_epoch tats_rollout_steps --baseline 10,1
    python tools/compare_runs.py output --output beside_paper --paper table1 --data_set UCF101

FOLDERs are searched for folders of run_mae_pretraining.py and run_class_finetuning.py (args.json, log.txt, test.json).
A fine-tuning run or probe counts for the pre-training run whose checkpoint it started from; the ones from random
weights are the row `scratch`. A row is a combination of the --by flags, its seeds are the replicates. Where several
lists were pre-trained or fine-tuned on, the rows tell them apart.

A cell is the mean over seeds and half the width of its 95 % interval (Student's t). With --baseline, the top-1 of
equal seeds are compared by a paired t test: "ahead" or "behind" where the interval of the difference, over seeds and
with the error of the test set, excludes 0; else "not decided", with the smallest difference that so many seeds find
with a power of 80 %. Compared in the same way: "mean val", the mean validation top-1 over the epochs of a fine-tuning
(how fast it learns), and two measures of tools/measure.py, where it was run: motion_auc (does the frozen encoder tell
what moves?) and error_moving (of hidden moving tokens, under the same masks for all).
With --level 30, "epochs to 30 %" is how long it takes to reach that validation top-1; where a run never does, the mean
is a lower bound, shown with >. Measures of tools/measure.py are shown where they were made. Flags that differ beside
--by and the seed are named under the table, and so are runs that are left out.

Written: table.md, table.csv (all digits), runs.csv, curves.png, accuracy.png; map.png with the differences from
--baseline of fine-tuning and of measures, where there are several data sets or mask ratios.
"""

import argparse
import csv
import io
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from run_mae_pretraining import SAMPLERS
from runtime.tasks import SINGLE_LABEL, TITLES, Task
from tools import paper_tables
from tools.common import Formatter, run_tool, write_text
from tools.compare_pictures import draw_accuracies, draw_curves, draw_map
from tools.run_folders import (
    KINDS,
    PRETRAINING,
    SCRATCH,
    UNREAD,
    Quantity,
    Run,
    differences,
    find_runs,
    settings,
    value_of,
)
from tools.seed_statistics import UNDECIDED, Paired, interval, paired, wilson
from utils import UsageError

METRICS = {
    "loss": "reconstruction error",
    "motion_lift": "motion lift",
    "entropy": "entropy / log N",
    "explained_variance": "explained variance",
}
COMPARED = {"motion_auc": False, "error_moving": True}  # measures of tools/measure.py: whether less is better
ORDER = (*SAMPLERS, SCRATCH)  # of the rows
WARNING = (
    "Reconstruction errors are means over the masked tokens: under different masks they are errors of different "
    "tokens, and do not rank methods."
)


@dataclass
class Row:
    by: tuple  # values of the --by flags
    source: str | None = None  # what was pre-trained on; None: nothing, or it is not known
    target: str | None = None  # what was fine-tuned on
    runs: dict[str, list[Run]] = field(default_factory=dict)  # of each kind
    paper: dict[str, list[float]] = field(default_factory=dict)  # figures of each column

    @property
    def scratch(self) -> bool:
        return SCRATCH in self.by


def sort_key(row: Row) -> tuple:
    """Numbers by size, mask types in ORDER, other text by the alphabet; from scratch last."""

    def part(value: Hashable) -> tuple[int, float, str]:
        if isinstance(value, int | float):
            return 0, value, ""
        return 1, ORDER.index(value) if value in ORDER else -1, str(value)

    return row.scratch, [part(value) for value in row.by], row.source or "", row.target or ""


def build_rows(runs: list[Run], by: tuple[str, ...]) -> list[Row]:
    """Rows of the runs without a problem, in order. Raises UsageError where two runs are one replicate."""
    scratch = [UNREAD] * len(by)
    scratch[by.index("mask_type") if "mask_type" in by else 0] = SCRATCH
    pretraining, followed = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for run in runs:
        first = run if run.kind == PRETRAINING else run.source
        if first:
            key = first.args["data_path"], tuple(value_of(first, flag) for flag in by)
        else:
            key = None, tuple(scratch)
        if run is first:
            pretraining[key].append(run)
        else:
            followed[key][run.args["data_path"]].append(run)
    rows = []
    for key in pretraining.keys() | followed.keys():
        for target in followed[key] or [None]:
            row = Row(key[1], key[0], target, {PRETRAINING: pretraining[key]} if key in pretraining else {})
            for run in followed[key][target] if target is not None else []:
                row.runs.setdefault(run.kind, []).append(run)
            check_replicates(row, by)
            rows.append(row)
    return sorted(rows, key=sort_key)


def check_replicates(row: Row, by: tuple[str, ...]) -> None:
    """Sorts the runs of a row by seed. Raises UsageError where two of one kind have one seed."""
    for kind, runs in row.runs.items():
        first = {}
        for run in sorted(runs, key=lambda run: str(run.folder)):
            other = first.setdefault(run.seed, run)
            if other is not run:
                one, two = settings(other, by), settings(run, by)
                both = [name for name in one if UNREAD not in (one[name], two.get(name))]
                differ = [name for name in both if one[name] != two.get(name)]
                apart = f"they differ in {', '.join(differ[:4])}" if differ else "nothing tells them apart"
                use = "leave one out"
                if kind == PRETRAINING and differ:
                    use += ", or tell the rows apart with --by"
                raise UsageError(
                    f"{other.folder} and {run.folder}: two {kind} runs of one row with one seed ({apart}): {use}"
                )
        runs.sort(key=lambda run: [-1 if seed is None else seed for seed in run.seed])


def shared_sources(rows: list[Row]) -> Iterator[str]:
    """A line for each row and kind where several runs started from one pre-training run."""
    for row in rows:
        for kind, runs in row.runs.items():
            sources = {run.source for run in runs if run.source}
            if kind != PRETRAINING and sources and len(sources) < len(runs):
                yield (
                    f"{', '.join(map(shown_value, row.by))}: {len(runs)} {kind} runs started from {len(sources)} "
                    "pre-training run(s): their interval does not tell how pre-training varies"
                )


def tested_best(runs: list[Run]) -> Iterator[str]:
    """A line where runs of earlier revisions report the best epoch of the validation and not the last one."""
    old = [run for run in runs if str((run.test or {}).get("checkpoint", "")).endswith("checkpoint-best.pth")]
    if old:
        names = ", ".join(str(run.folder) for run in old[:3]) + (" and others" if len(old) > 3 else "")
        yield f"{len(old)} run(s) report the best epoch of the validation, not the last: test them again ({names})"


def mean_val(run: Run) -> float | None:
    """Mean of the task's metric over the epochs' validations, or None where it was not logged."""
    return average(run.curve(f"val_{run.task.metric}")[1])


def quantities(kind: str, task: Task) -> list[Quantity]:
    """What runs of a kind are compared by; the end of a training comes first."""
    if kind == PRETRAINING:
        return [
            Quantity(name.replace("_", " "), name, lambda run, name=name: run.measures.get(name), least, 3)
            for name, least in COMPARED.items()
        ]
    title, name = TITLES[task.metric].removesuffix(" (%)"), column_of(kind)
    return [
        Quantity(f"{kind} {title}", name, lambda run: run.test[run.task.metric], task.least, 2),
        Quantity(f"{kind} mean val", f"{name}_mean_val", mean_val, task.least, 2),
    ]


def column_of(kind: str) -> str:
    """A kind of run as the columns of table.csv name it."""
    return kind.replace("-", "_").replace(" ", "_")


def compared(row: Row, base: Row, kind: str, quantity: Quantity) -> Paired | None:
    """The paired comparison of the runs of a kind with common seeds, or None where there are fewer than two of them.

    Runs from scratch have no pre-training seed: there, the seed of what follows decides, if it tells the runs apart.
    """
    sides = []
    for runs in (row.runs.get(kind, []), base.runs.get(kind, [])):
        keys = [run.seed[1:] if row.scratch or base.scratch else run.seed for run in runs]
        if len(set(keys)) < len(keys):
            return None
        values = {key: quantity.value(run) for key, run in zip(keys, runs, strict=True)}
        sides.append({key: number for key, number in values.items() if number is not None})
    common = sorted(set(sides[0]) & set(sides[1]))
    if row is base or len(common) < 2:
        return None
    videos = videos_of_test(row.runs[kind], row.runs[kind][0].task.metric)
    return paired(*([side[key] for key in common] for side in sides), videos)


def videos_of_test(runs: list[Run], metric: str) -> int | None:
    """How many videos the test had, which bounds what one test says of a share of them; None where that is not known,
    or for other metrics."""
    if not metric.startswith("acc"):
        return None
    return min((run.test["videos"] for run in runs if run.test and run.test.get("videos")), default=None)


def task_of_runs(runs: list[Run]) -> Task:
    """The --task of all runs of KINDS. Raises UsageError where they have several."""
    first = {run.task: run for run in reversed(runs) if run.kind in KINDS}
    if len(first) > 1:
        folders = " and ".join(f"{run.folder} (--task {task.name})" for task, run in first.items())
        raise UsageError(f"{folders} measure different things: compare them apart")
    return next(iter(first), SINGLE_LABEL)


def is_value(value: Hashable, text: str) -> bool:
    """Whether text, of the command line, means a flag's value."""
    try:
        return value == float(text) or str(value) == text
    except ValueError:
        return str(value) == text


def places_of_baseline(by: tuple[str, ...], values: list[str]) -> list[int]:
    """Of the --by flags that --baseline gives a value of: mask_type first, where it is in --by."""
    return sorted(range(len(by)), key=lambda place: by[place] != "mask_type")[: len(values)]


def is_baseline(row: Row, by: tuple[str, ...], values: list[str]) -> bool:
    """Whether the row has the values of --baseline."""
    return all(
        is_value(row.by[place], value) for place, value in zip(places_of_baseline(by, values), values, strict=True)
    )


def find_baseline(row: Row, rows: list[Row], by: tuple[str, ...], values: list[str]) -> Row | None:
    """The row of the baseline that a row is compared with, or None: the one with equal other flags, as far as the
    baseline's method reads them."""
    others = set(range(len(by))) - set(places_of_baseline(by, values))
    fitting = []
    for other in rows:
        alike = other.source == row.source and all(other.by[i] in (row.by[i], UNREAD) for i in others)
        fits = other.scratch or row.scratch or alike
        if is_baseline(other, by, values) and fits and other.target == row.target and other.runs:
            fitting.append(other)
    if fitting and (len(fitting) == 1 or not row.scratch):  # scratch has no flags that would choose one of several
        return fitting[0]
    return None


def shown_value(value: Hashable) -> str:
    """A flag's value as the tables show it."""
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def short_paths(paths: list[str | None]) -> dict[str, str]:
    """{path: what tells it from the others}."""
    paths = sorted(path for path in set(paths) if path)
    same_kind = len({os.path.isabs(path) for path in paths}) == 1
    root = os.path.commonpath([os.path.dirname(path) for path in paths]) if same_kind else ""
    return {path: os.path.relpath(path, root) if root else path for path in paths}


class Cells:
    """A row of the table: `text` for table.md, `numbers` for table.csv."""

    def __init__(self):
        self.text: dict[str, str] = {}
        self.numbers: dict[str, float | str | None] = {}

    def add(self, heading: str, name: str, text: str, **numbers: float | str | None) -> None:
        """A cell under a heading; its numbers are the columns NAME_PART, and NAME for the part ""."""
        self.text[heading] = text
        self.numbers |= {f"{name}_{part}" if part else name: value for part, value in numbers.items()}

    def add_number(self, heading: str, name: str, value: float | None, form: str) -> None:
        """A cell with one number, in a format such as ".3f"."""
        self.add(heading, name, "-" if value is None else format(value, form), **{"": value})

    def estimate(
        self, heading: str, name: str, values: list[float | None], digits: int, num_runs: int, videos: int | None = None
    ) -> None:
        """Mean ± half width over seeds, of the values that are not None. For accuracies also the error of the test set:
        what one test on that many videos leaves open. All seeds are tested on the same videos, so that more seeds do
        not make it smaller."""
        values = [value for value in values if value is not None]
        mean, half = interval(values) if values else (None, None)
        low, high = wilson(mean, videos) if values and videos else (None, None)
        text = "-" if mean is None else f"{mean:.{digits}f}"
        if half is not None:
            text += f" ± {half:.{digits}f}" + (f" (n = {len(values)})" if len(values) != num_runs else "")
        if low is not None:
            one = "one run; " if len(values) == 1 else ""
            text += f" ({one}{videos} test videos alone leave {low:.1f} to {high:.1f})"
        self.add(heading, name, text, mean=mean, half_width=half, n=len(values))
        if videos is not None or name.endswith(("acc1", "acc5")):
            self.numbers |= {f"{name}_wilson_low": low, f"{name}_wilson_high": high}


def epochs_to(run: Run, level: float) -> float | None:
    """Epochs of training until the validation's metric reached the level, on the line between two validations, or None
    where it never did."""
    before, reached = 0.0, 0.0  # training ends an epoch of number e after e + 1 epochs
    for epoch, value in zip(*run.curve(f"val_{run.task.metric}"), strict=True):
        if value == level or run.task.better(value, level):
            part = (level - reached) / (value - reached) if before else 1.0
            return before + part * (epoch + 1 - before)
        before, reached = epoch + 1, value
    return None


def add_epochs_to(cells: Cells, heading: str, name: str, runs: list[Run], level: float) -> None:
    """The mean of epochs_to; a run that never got there counts with all its epochs, and makes the mean a bound."""
    found = [epochs_to(run, level) for run in runs]
    if None not in found:
        cells.estimate(heading, name, found, 2, len(runs))
        return
    bound = average([run.args["epochs"] if epochs is None else epochs for run, epochs in zip(runs, found, strict=True)])
    cells.add(heading, name, f"> {bound:.2f}", mean=bound, half_width=None, n=len(runs) - found.count(None))


def summarise(
    row: Row, base: Row | None, kinds: list[str], baseline: str | None, task: Task = SINGLE_LABEL,
    level: float | None = None,
) -> Cells:  # fmt: skip
    """Cells of a row but for its name. base: the baseline's row or None; task: of the runs; level: see epochs_to."""
    cells = Cells()
    first = row.runs.get(PRETRAINING, [])
    num_runs = len(first) or max(map(len, row.runs.values()), default=0)
    cells.add("runs", "runs", str(num_runs or "-"), **{"": num_runs})
    for name, heading in METRICS.items():
        values = [run.last(f"train_{name}") for run in first]
        cells.estimate(heading, name, values, 4 if name == "loss" else 3, num_runs)
    for name in dict.fromkeys(name for run in first for name in run.measures if name != "mask_ratio"):
        values = [run.measures.get(name) for run in first]
        cells.estimate(name.replace("_", " "), name, values, 1 if name.startswith(("ridge", "knn")) else 3, num_runs)
    for quantity in quantities(PRETRAINING, task):
        if baseline and any(quantity.value(run) is not None for run in first):
            add_paired(cells, quantity, baseline, compared(row, base, PRETRAINING, quantity) if base else None)
    for kind in kinds:
        runs = row.runs.get(kind, [])
        name = column_of(kind)
        for metric in task.metrics:
            digits = 2 if "(%)" in TITLES[metric] else 4
            values = [run.test[metric] for run in runs]
            videos = videos_of_test(runs, metric)
            cells.estimate(f"{kind} {TITLES[metric]}", f"{name}_{metric}", values, digits, num_runs, videos)
            if metric == task.metric:
                cells.estimate(f"{kind} mean val", f"{name}_mean_val", list(map(mean_val, runs)), digits, num_runs)
        if level is not None:
            unit = " %" if "(%)" in TITLES[task.metric] else ""
            add_epochs_to(cells, f"{kind} epochs to {level:g}{unit}", f"{name}_epochs_to_level", runs, level)
        for quantity in quantities(kind, task) if baseline else ():
            add_paired(cells, quantity, baseline, compared(row, base, kind, quantity) if base else None)
    add_costs(cells, first, base.runs.get(PRETRAINING, []) if base else [], baseline)
    return cells


def add_paired(cells: Cells, quantity: Quantity, baseline: str, result: Paired | None) -> None:
    """The cell of what `compared` returned, with its verdict."""
    heading, name, digits = f"{quantity.title} - {baseline}'s", f"{quantity.name}_minus_baseline", quantity.digits
    if result is None:
        parts = ("difference", "low", "high", "p", "pairs", "test_error", "detectable", "verdict")
        cells.add(heading, name, "-", **dict.fromkeys(parts))
        return
    low, high = result.difference - result.half, result.difference + result.half
    verdict = result.verdict(quantity.least)
    text = f"{result.difference:+.{digits}f} ({low:.{digits}f} to {high:.{digits}f}"
    text += f"; p {'-' if result.p is None else f'{result.p:.2g}'}, {result.pairs} pairs"
    text += f"; test set ± {result.test_error:.1f})" if result.test_error else ")"
    text += f": {verdict}"
    if verdict == UNDECIDED:
        text += f", {result.detectable:.{digits - 1}f} would be found"
    cells.add(
        heading, name, text, difference=result.difference, low=low, high=high, p=result.p, pairs=result.pairs,
        test_error=result.test_error, detectable=result.detectable, verdict=verdict,
    )  # fmt: skip


def add_costs(cells: Cells, runs: list[Run], base: list[Run], baseline: str | None) -> None:
    """Seconds per step, their ratio to the baseline's, peak memory in GiB."""
    seconds, theirs = (average([run.step_time() for run in side]) for side in (runs, base))
    cells.add_number("step (s)", "step_time", seconds, ".3f")
    if baseline:
        ratio = seconds / theirs if seconds and theirs else None
        cells.add_number(f"step / {baseline}'s", "step_ratio", ratio, ".2f")
    memory = max((run.memory() for run in runs if run.memory() is not None), default=None)
    cells.add_number("peak memory (GiB)", "peak_memory", memory, ".4g")


def average(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None."""
    values = [value for value in values if value is not None]
    return statistics.fmean(values) if values else None


def add_paper(rows: list[Row], table: str, by: tuple[str, ...], data_set: str | None) -> None:
    """Puts the paper's figures beside the rows they are about, and adds rows for the others."""

    def about(row: Row, values: tuple, source: str | None, target: str | None) -> bool:
        methods = {run.args["mask_type"] for run in row.runs.get(PRETRAINING, [])}  # an ablation is TATS's
        data_sets = paper_name(row.source), paper_name(row.target)
        return (
            row.by == values
            and ("mask_type" in by or methods == {"tats"})
            and (source is None or data_sets == (source, target))
        )

    for key, figures in paper_tables.reported(table, by, data_set).items():
        matching = [row for row in rows if about(row, *key)]
        for row in matching:
            row.paper = figures
        if not matching:
            rows.append(Row(*key, paper=figures))
    rows.sort(key=sort_key)


def paper_name(path: str | None) -> str | None:
    """The paper's name of the data set, where the path tells it, else the path."""
    return path and (paper_tables.data_set_of(path) or path)


def name_rows(rows: list[Row], by: tuple[str, ...], transfer: bool) -> list[dict[str, str]]:
    """[{column: text}] that tells the rows apart; from and to where there are several, or transfer."""
    named = [dict(zip(by, map(shown_value, row.by), strict=True)) for row in rows]
    for column, paths in (("to", [row.target for row in rows]), ("from", [row.source for row in rows])):
        if transfer or len(set(filter(None, paths))) > 1:
            short = short_paths(paths) if not transfer else {path: paper_name(path) for path in paths if path}
            named = [{column: short.get(path, UNREAD)} | names for path, names in zip(paths, named, strict=True)]
    return named


def labels_of(named: list[dict[str, str]]) -> list[str]:
    """A short name of each row, for the pictures."""
    varying = [column for column in named[0] if len({names[column] for names in named}) > 1] or list(named[0])
    return [
        ", ".join(
            names[column] if column == "mask_type" or names[column] == SCRATCH else f"{column} {names[column]}"
            for column in varying
            if names[column] != UNREAD
        )
        for names in named
    ]


def markdown(title: str, lines: list[str], cells: list[dict[str, str]], notes: dict[str, list[str]]) -> str:
    """table.md: a title, lines of text, a table with a dictionary {heading: text} per row, lists of notes."""
    headings = list(dict.fromkeys(heading for row in cells for heading in row))
    table = [headings, ["---"] * len(headings)] + [[row.get(heading, "-") for heading in headings] for row in cells]
    text = [f"# {title}", "", *lines, "", *("| " + " | ".join(row) + " |" for row in table), ""]
    for heading, items in notes.items():
        text += [f"{heading}:", "", *(f"- {item}" for item in items), ""] if items else []
    return "\n".join(text)


def write_csv(path: Path, rows: list[dict]) -> None:
    """The columns are those of all rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def describe_run(run: Run, by: tuple[str, ...]) -> dict:
    """A row of runs.csv."""
    first = run if run.kind == PRETRAINING else run.source
    finished = run.args["epochs"] - 1 in run.log
    described = {"folder": run.folder, "kind": run.kind, "left_out": run.problem, "seed": run.args["seed"]}
    described |= {"pretraining": run.source.folder if run.source else "", "data_path": run.args["data_path"]}
    for flag in by:
        known = first is not None and flag in first.args
        if known:
            described[flag] = value_of(first, flag)
        else:
            described[flag] = SCRATCH if run.scratch else ""
    if run.kind == PRETRAINING and finished:
        described |= {name: run.last(f"train_{name}") for name in METRICS}
    described |= {"step_time": run.step_time(), "peak_memory": run.memory()}
    return described | {name: (run.test or {}).get(name) for name in (*run.task.metrics, "videos")}


def check_flags(args: argparse.Namespace) -> None:
    """Fills in --by. Raises UsageError."""
    if args.paper:
        choices = paper_tables.BY[args.paper]
        if args.by is None and len(choices) == 1:
            args.by = choices[0]
        if tuple(args.by or ()) not in choices:
            fitting = ", or ".join(f"--by {' '.join(flags)}" for flags in choices)
            raise UsageError(f"--paper {args.paper} needs {fitting}")
    sets = paper_tables.DATA_SETS.get(args.paper, ())
    if (args.data_set or None) not in (sets or (None,)):
        use = f"give one of {', '.join(sets)}" if sets else "leave it out"
        with_paper = f" with --paper {args.paper}" if args.paper else ", without --paper"
        raise UsageError(f"--data_set {args.data_set or 'is missing'}{with_paper}: {use}")
    args.by = tuple(dict.fromkeys(args.by or ("mask_type", "mask_ratio")))
    if args.baseline and len(args.baseline) > len(args.by):
        raise UsageError(f"--baseline {','.join(args.baseline)}: more values than flags of --by, {' '.join(args.by)}")


def compare(args: argparse.Namespace) -> None:
    """Raises UsageError."""
    check_flags(args)
    runs = find_runs(args.folders)
    left_out = [f"{run.folder}: {run.problem}" for run in runs if run.problem]
    used = [run for run in runs if not run.problem]
    if not used:
        reason = f"; {left_out[0]}" if left_out else ""
        raise UsageError(f"{', '.join(args.folders)}: no finished run (args.json, log.txt, test.json) is there{reason}")
    task, rows = task_of_runs(used), build_rows(used, args.by)
    if args.baseline and not any(is_baseline(row, args.by, args.baseline) for row in rows):
        places = places_of_baseline(args.by, args.baseline)
        values = [[row.by[place] for place in places] for row in rows]
        present = dict.fromkeys(",".join(map(shown_value, row)) for row in values if UNREAD not in row)
        flags = ",".join(args.by[place] for place in places)
        raise UsageError(f"--baseline {','.join(args.baseline)}: no row has it; {flags} is {' or '.join(present)}")
    if args.paper:
        add_paper(rows, args.paper, args.by, args.data_set)
    kinds = [kind for kind in KINDS if any(kind in row.runs for row in rows)] or list(KINDS[:1])
    cells = [
        summarise(
            row,
            args.baseline and find_baseline(row, rows, args.by, args.baseline),
            kinds,
            args.baseline and ",".join(args.baseline),
            task,
            args.level,
        )  # fmt: skip
        for row in rows
    ]
    write_tables(args, rows, cells, used, runs, left_out)
    named = name_rows(rows, args.by, args.paper == "table2")
    write_pictures(args, rows, named, task)


def write_tables(
    args: argparse.Namespace, rows: list[Row], cells: list[Cells], used: list[Run], runs: list[Run], left_out: list[str]
) -> None:
    """table.md, table.csv and runs.csv. used: the runs of the rows; left_out: a line for each other run."""
    columns = list(dict.fromkeys(column for row in rows for column in row.paper))
    for row, cell in zip(rows, cells, strict=True):
        for column in columns:
            figures = row.paper.get(column, [])
            name = f"paper_{column.split()[0].replace('-', '')}"
            text = " / ".join(f"{figure:g}" for figure in figures) or "-"
            number = figures[0] if len(figures) == 1 else " / ".join(map(str, figures)) or None
            cell.add(f"{column}, reported by the paper, not measured here", name, text, **{"": number})
    lines = [WARNING, f"Cells are mean ± half width of the 95 % interval over seeds; {len(used)} runs."]
    if args.paper:
        place = f", {args.data_set}" if args.data_set else ""
        lines.append(f"The paper's figures are its {args.paper}{place}: {paper_tables.ABOUT[args.paper]}, at ViT-B.")
    differ = [*differences(used, args.by), *shared_sources(rows), *tested_best(used)]
    notes = {"Differs between runs, beside --by and the seed": differ, "Left out": left_out}
    named = name_rows(rows, args.by, args.paper == "table2")
    text = markdown(args.title, lines, [n | cell.text for n, cell in zip(named, cells, strict=True)], notes)
    os.makedirs(args.output, exist_ok=True)
    output = Path(args.output)
    write_text(output / "table.md", text)
    by_rows = [dict(zip(args.by, row.by, strict=True)) | {"from": row.source, "to": row.target} for row in rows]
    write_csv(output / "table.csv", [by | cell.numbers for by, cell in zip(by_rows, cells, strict=True)])
    write_csv(output / "runs.csv", [describe_run(run, args.by) for run in runs if run.kind])
    print(text)
    print(f"wrote table.md, table.csv and runs.csv to {output}")


def differences_by_place(
    rows: list[Row], named: list[dict[str, str]], args: argparse.Namespace, task: Task
) -> dict[Quantity, dict[str, dict[tuple[str, str], Paired]]]:
    """{quantity: {method: {(data set, mask ratio): comparison with the baseline}}}, of fine-tuning and of measures;
    empty for a single place."""
    asked = [(kind, quantity) for kind in (KINDS[0], PRETRAINING) for quantity in quantities(kind, task)]
    found = defaultdict(lambda: defaultdict(dict))
    for row, names in zip(rows, named, strict=True) if args.baseline else ():
        base = find_baseline(row, rows, args.by, args.baseline)
        if not base or row.scratch:  # scratch has no mask ratio
            continue
        method = ", ".join(
            value for name, value in names.items() if name not in ("to", "from", "mask_ratio") and value != UNREAD
        )
        for kind, quantity in asked:
            data_set = names.get("from" if kind == PRETRAINING else "to", names.get("from", ""))
            result = compared(row, base, kind, quantity)
            if result:
                found[quantity][method][data_set, names.get("mask_ratio", "")] = result
    places = {place for methods in found.values() for cells in methods.values() for place in cells}
    return {quantity: dict(methods) for quantity, methods in found.items()} if len(places) > 1 else {}


def write_pictures(args: argparse.Namespace, rows: list[Row], named: list[dict[str, str]], task: Task) -> None:
    """curves.png, accuracy.png and map.png, each where there is something to draw. named: see name_rows."""
    output, labels, runs = Path(args.output), labels_of(named), [row.runs for row in rows]
    kinds = [kind for kind in KINDS if any(kind in of_row for of_row in runs)]
    written = ["curves.png"] if draw_curves(output / "curves.png", runs, labels, task) else []
    if kinds:
        draw_accuracies(output / "accuracy.png", runs, labels, kinds, task)
        written.append("accuracy.png")
    differences = differences_by_place(rows, named, args, task)
    if differences:
        draw_map(output / "map.png", differences, ",".join(args.baseline))
        written.append("map.png")
    print(f"wrote {' and '.join(written)} to {output}")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="searched for runs, with all below it")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--by",
        nargs="+",
        metavar="FLAG",
        help="pre-training flags whose combinations are the rows (default: mask_type mask_ratio, or "
        "what the paper's table has)",
    )
    parser.add_argument(
        "--baseline",
        type=lambda text: text.split(","),
        metavar="VALUE",
        help="the rows that others are compared with, all else in --by being equal: a value of mask_type, where it is "
        "in --by (or scratch), else of the first flag there; VALUE,VALUE: of the next flags too",
    )
    parser.add_argument("--paper", choices=list(paper_tables.BY), help="put the paper's figures beside the rows")
    parser.add_argument("--data_set", metavar="NAME", help="whose figures, of tables 1 and 5")
    parser.add_argument(
        "--level", type=float, metavar="TOP1", help="add the epochs of fine-tuning to this accuracy (%%)"
    )
    parser.add_argument("--title", default="Comparison of runs", help="of table.md")
    return parser


def main(arguments: list[str] | None = None) -> None:
    run_tool(compare, get_parser().parse_args(arguments))


if __name__ == "__main__":
    main()
