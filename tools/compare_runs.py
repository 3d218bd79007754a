"""Compare runs: one table, one picture of curves and one of accuracies, from the folders that training left.

    python tools/compare_runs.py output/compare/embedded --output output/compare/embedded

Folders are searched for runs (args.json and log.txt beside each other). Pre-trainings that agree in the --by flags are
one row, and their seeds are its repetitions; fine-tunings and probes belong to the pre-training whose checkpoint they
started from. What else differs between runs is named, and unfinished runs are named and left out.

OUTPUT gets table.md, table.csv (one line a row, all digits), runs.csv (one line a run), curves.png and accuracy.png.
Intervals are 95 % of Student's t over seeds; with one seed, Wilson's interval of the tested videos instead. The paired
test compares with --baseline over the seeds both have (scipy.stats.ttest_rel).
"""

import argparse
import csv
import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from scipy import stats

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools import paper_tables
from tools.common import Formatter, run_tool
from utils import UsageError

EVALUATIONS = {"finetune": "fine-tuned", "linear_probe": "linear probe", "attentive_probe": "attentive probe"}
SCRATCH = "scratch"
METHOD_TABLES = ("table1", "table2", "table9")  # of the paper, with rows by method and mask ratio
# No difference between runs: where and on what they ran, and what they started from.
FREE = set(
    """seed output_dir log_dir finetune resume auto_resume start_epoch rank local_rank world_size distributed dist_url
    dist_on_itp dist_backend num_workers pin_mem print_freq save_ckpt save_ckpt_freq save_ckpt_minutes keep_last device
    picture_freq eval""".split()
)
# Read by one mask type alone.
OWN = {"adamae_coef": "adamae"} | dict.fromkeys(
    """tats_attention tats_blocks num_landmarks softmax_temp tats_lr tats_eps tats_start_epoch tats_rollout_steps
    ppo_epochs ppo_clip policy_coef value_coef entropy_coef normalize_advantage""".split(),
    "tats",
)
LEARNED_METRICS = {"entropy": "entropy / log N", "explained_variance": "explained variance"}


@dataclass
class Run:
    folder: Path
    args: dict
    log: list[dict]  # an entry an epoch
    test: dict | None  # test.json
    git: str

    @property
    def kind(self) -> str:
        if "mask_type" in self.args:
            return "pretrain"
        return next((name for name in ("linear_probe", "attentive_probe") if self.args.get(name)), "finetune")

    @property
    def finished(self) -> bool:
        if self.kind != "pretrain":
            return self.test is not None
        return bool(self.log) and self.log[-1]["epoch"] + 1 >= self.args["epochs"]

    def last(self, name: str) -> float | None:
        return self.log[-1].get(f"train_{name}")

    def data(self) -> Path:
        path = Path(self.args["data_path"])
        return path.parent if path.suffix else path

    def flag(self, name: str):
        """None where the run's mask type does not read the flag."""
        if OWN.get(name, self.args.get("mask_type")) != self.args.get("mask_type"):
            return None
        return self.args.get(name)


def get_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("folders", nargs="+", help="searched for runs, with all that is below")
    parser.add_argument("--output", required=True, help="folder for the table and the pictures")
    parser.add_argument("--by", nargs="+", default=["mask_type", "mask_ratio"], metavar="FLAG",
                        help="flags of pre-training that make a row")  # fmt: skip
    parser.add_argument("--baseline", default="", help="value of the first --by flag the others are compared with")
    parser.add_argument("--paper", choices=["table1", "table2", "table3", "table5", "table6", "table9"],
                        help="adds the columns the paper reports")  # fmt: skip
    parser.add_argument(
        "--data_set", default="", help="the paper's name of it, for table1, table2 (K400 to UCF101), table9"
    )
    return parser.parse_args(arguments)


# ------------------------------------------------------------------------------------------------------- reading


def read_run(folder: Path) -> Run:
    """Raises UsageError for a damaged file."""
    path = folder / "args.json"
    try:
        description = json.loads(path.read_text())
        path = folder / "log.txt"
        log = [json.loads(line) for line in path.read_text().splitlines()]
        path = folder / "test.json"
        test = json.loads(path.read_text()) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); delete the folder or leave it out") from error
    if not isinstance(description, dict) or not isinstance(description.get("args"), dict):
        raise UsageError(f"{folder / 'args.json'}: has no flags, it is not of a run of this project")
    return Run(folder, description["args"], log, test, str(description.get("git", "")))


def find_runs(folders: list[str]) -> list[Run]:
    """Raises UsageError for a folder that is missing or holds no run."""
    found = {}
    for folder in map(Path, folders):
        below = sorted(path.parent for path in folder.rglob("args.json") if (path.parent / "log.txt").is_file())
        if not below:
            raise UsageError(f"{folder}: no run in it (a folder with args.json and log.txt)")
        found |= {path.resolve(): path for path in below}
    return [read_run(path) for path in found.values()]


def step_time(run: Run) -> float:
    """Seconds a micro-batch: median over the later half of the epochs, those of TATS after its warm-up."""
    return median(entry["train_step_time"] for entry in run.log[len(run.log) // 2 :])


@dataclass
class Row:
    """Runs that differ in nothing but the seed. key: values of the --by flags, or ("scratch",)."""

    key: tuple
    to: str  # data set of the fine-tuning where it is another
    runs: dict[str, dict[int, Run]]  # kind -> seed -> run

    def values(self, kind: str, name: str) -> dict[int, float]:
        """By seed. name: acc1, acc5 of a test; step_time; or a metric of the last epoch of pre-training."""
        runs = self.runs.get(kind, {})
        if name in ("acc1", "acc5"):
            found = {seed: run.test.get(name) for seed, run in runs.items()}
        elif name == "step_time":
            found = {seed: step_time(run) for seed, run in runs.items()}
        elif name == "peak_memory":
            found = {
                seed: max(entry.get("train_peak_memory", 0) for entry in run.log) or None for seed, run in runs.items()
            }
        else:
            found = {seed: run.last(name) for seed, run in runs.items()}
        return {seed: value for seed, value in sorted(found.items()) if value is not None}


def pretraining_of(run: Run, pretrainings: list[Run]) -> Run | None:
    """The one whose checkpoint a fine-tuning started from; by the last two names of its path in a moved tree."""
    folder = Path(run.args["finetune"]).parent
    same = [other for other in pretrainings if other.folder.resolve() == folder.resolve()]
    if not same:
        same = [other for other in pretrainings if other.folder.resolve().parts[-2:] == folder.parts[-2:]]
    return same[0] if len(same) == 1 else None


def make_rows(runs: list[Run], by: list[str]) -> tuple[list[Row], list[str]]:
    """Rows and notes on what was left out. Raises UsageError for two runs with the same place in the table."""
    notes = []
    rows: dict[tuple, Row] = {}
    pretrainings = [run for run in runs if run.kind == "pretrain"]
    for run in pretrainings:
        unknown = [flag for flag in by if flag not in run.args]
        if unknown:
            raise UsageError(f"--by {unknown[0]}: {run.folder} has no such flag")

    def place(row: Row, run: Run) -> None:
        other = row.runs.setdefault(run.kind, {}).setdefault(run.args["seed"], run)
        if other is not run:
            what = ", ".join(map(str, row.key))
            raise UsageError(f"{other.folder} and {run.folder}: both are {run.kind}, {what}, seed {run.args['seed']}; "
                             "leave one out, or name the flag they differ in with --by")  # fmt: skip

    def row_of(key: tuple, to: str) -> Row:
        return rows.setdefault((key, to), Row(key, to, {}))

    evaluations = []
    for run in runs:
        if not run.finished:
            notes.append(f"left out, unfinished: {run.folder}")
        elif run.kind != "pretrain":
            source = pretraining_of(run, pretrainings) if run.args.get("finetune") else None
            if run.args.get("finetune") and (source is None or not source.finished):
                notes.append(
                    f"left out: {run.folder} started from {run.args['finetune']}, a run that is not among these"
                )
                continue
            evaluations.append((run, source))
    for run, source in evaluations:
        if source is None:
            place(row_of((SCRATCH,), run.data().name), run)
            continue
        inside = run.data().resolve().is_relative_to(source.data().resolve())
        row = row_of(tuple(source.args[flag] for flag in by), "" if inside else run.data().name)
        place(row, run)
        row.runs.setdefault("pretrain", {})[source.args["seed"]] = source
    for run in filter(lambda run: run.finished, pretrainings):
        key = tuple(run.args[flag] for flag in by)
        matching = [row for row in rows.values() if row.key == key] or [row_of(key, "")]
        for row in matching:
            if row.runs.get("pretrain", {}).get(run.args["seed"]) is not run:
                place(row, run)
    order = {"tube": 0, "random": 1, "frame": 2, "motion": 3, "adamae": 4, "tats": 5}

    def place_of(row: Row) -> tuple:
        ranked = [(order.get(v, 9), str(v)) if isinstance(v, str) else (0, float(v)) for v in row.key]
        return row.key == (SCRATCH,), row.to, ranked[1:], ranked[:1]

    targets = {row.to for row in rows.values() if row.key != (SCRATCH,)}
    for row in rows.values():
        if row.key == (SCRATCH,) and targets == {""}:
            row.to = ""
    return sorted(rows.values(), key=place_of), notes


def differences(rows: list[Row], by: list[str]) -> list[str]:
    """Flags, beside --by and seeds, in which runs of one kind (and one data set) differ; and code and versions."""
    notes = []
    groups = defaultdict(list)
    for row in rows:
        for kind, runs in row.runs.items():
            groups[kind, row.to if kind != "pretrain" else ""] += [
                run for run in runs.values() if run not in groups[kind, ""]
            ]
    for (kind, to), runs in groups.items():
        where = kind + (f" on {to}" if to else "")
        for flag in sorted({flag for run in runs for flag in run.args} - FREE - set(by)):
            values = defaultdict(list)
            for run in runs:
                if OWN.get(flag) in (None, run.args.get("mask_type")):
                    values[json.dumps(run.args.get(flag))].append(run)
            if len(values) > 1:
                shown = "; ".join(f"{value} in {_some(found)}" for value, found in values.items())
                notes.append(f"{where}: --{flag} differs: {shown}")
        revisions = defaultdict(list)
        for run in runs:
            revisions[run.git].append(run)
        if len(revisions) > 1:
            shown = "; ".join(f"{git or 'unknown'}: {len(found)} runs" for git, found in revisions.items())
            notes.append(f"{where}: git revisions differ: {shown}")
    return notes


def _some(runs: list[Run]) -> str:
    names = [f"{run.folder.parent.name}/{run.folder.name}" for run in runs]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---------------------------------------------------------------------------------------------------- statistics


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t; nan for one value."""
    if len(values) < 2:
        return values[0], math.nan
    return mean(values), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def paired(values: dict[int, float], baseline: dict[int, float]) -> tuple[float, float, float] | None:
    """Mean difference over common seeds, half width of its 95 % interval, p of the paired t-test; None for under 2."""
    common = sorted(values.keys() & baseline.keys())
    if len(common) < 2:
        return None
    difference, half = interval([values[seed] - baseline[seed] for seed in common])
    p = stats.ttest_rel([values[s] for s in common], [baseline[s] for s in common]).pvalue if half > 0 else math.nan
    return difference, half, float(p)


def wilson(accuracy: float, videos: int) -> tuple[float, float]:
    """95 % interval in % of one test of so many videos."""
    test = stats.binomtest(min(videos, round(accuracy * videos / 100)), videos).proportion_ci(0.95, method="wilson")
    return 100 * test.low, 100 * test.high


# ------------------------------------------------------------------------------------------------------- the table


def baseline_of(row: Row, rows: list[Row], baseline: str) -> Row | None:
    """The row with the baseline as its first value and the same others."""
    for other in rows:
        if (
            row.key != (SCRATCH,)
            and str(other.key[0]) == baseline
            and (other.key[1:], other.to) == (row.key[1:], row.to)
        ):
            return None if other is row else other
    return None


def table(rows: list[Row], args: argparse.Namespace) -> tuple[list[str], list[list[str]], list[dict]]:
    """Header and cells for Markdown, and the same as numbers for CSV. Columns without any value are left out."""
    columns = [*args.by] + (["fine-tuned on"] if any(row.to for row in rows) else [])
    cells, numbers = [], []
    reported = reported_figures(args)
    missing = set(reported)
    for row in rows:
        key = [str(value) for value in row.key] + [""] * (len(args.by) - len(row.key))
        cell = dict(zip(columns, [*key, row.to], strict=False))
        number = dict(cell)
        reference = baseline_of(row, rows, args.baseline)

        def put(
            title: str, name: str, kind: str, digits: int, unit: float = 1, row=row, cell=cell, number=number
        ) -> None:
            values = {seed: value * unit for seed, value in row.values(kind, name).items()}
            if not values:
                return
            middle, half = interval(list(values.values()))
            number |= {title: middle, f"{title} half width": half, f"{title} seeds": len(values)}
            cell[title] = f"{middle:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")
            if math.isnan(half) and name == "acc1":
                run = next(iter(row.runs[kind].values()))
                low, high = wilson(middle, run.test["videos"])
                cell[title] += f" ({low:.0f} to {high:.0f})"

        cell["seeds"] = number["seeds"] = str(max(len(runs) for runs in row.runs.values()))
        put("error", "loss", "pretrain", 3)
        put("motion lift", "motion_lift", "pretrain", 2)
        for name, title in LEARNED_METRICS.items():
            put(title, name, "pretrain", 3)
        for kind, title in EVALUATIONS.items():
            put(f"{title} top-1", "acc1", kind, 1)
            put(f"{title} top-5", "acc5", kind, 1)
            against = reference and paired(row.values(kind, "acc1"), reference.values(kind, "acc1"))
            if against:
                difference, half, p = against
                head = f"{title} - {args.baseline}"
                number |= {head: difference, f"{head} half width": half, f"{head} p": p}
                cell[head] = f"{difference:+.1f} ± {half:.1f} (p {p:.2f})"
        put("ms a step", "step_time", "pretrain", 0, unit=1000)
        put("peak GiB", "peak_memory", "pretrain", 2)
        if reference and "ms a step" in number:
            times = reference.values("pretrain", "step_time").values()
            if times:
                number[f"time / {args.baseline}"] = number["ms a step"] / 1000 / mean(times)
                cell[f"time / {args.baseline}"] = f"{number[f'time / {args.baseline}']:.2f}"
        paper_key = paper_key_of(row.key, args)
        missing.discard(paper_key)
        _add_reported(cell, number, reported.get(paper_key, {}))
        cells.append(cell)
        numbers.append(number)
    for key in (key for key in reported if key in missing):
        cell = dict(zip(_paper_flags(args), (f"{v:g}" if isinstance(v, float) else str(v) for v in key), strict=True))
        number = dict(cell)
        _add_reported(cell, number, reported[key])
        cells.append(cell)
        numbers.append(number)
    header = list(dict.fromkeys(title for title in _in_order(cells)))
    constant = [t for t in header if t.endswith("top-5") and all(c.get(t, "100.0").startswith("100.0") for c in cells)]
    header = [title for title in header if title not in constant]  # of fewer than six classes
    return header, [[cell.get(title, "-") for title in header] for cell in cells], numbers


def _in_order(cells: list[dict]) -> list[str]:
    """All titles, each after those that precede it in some row."""
    order: list[str] = []
    for cell in cells:
        position = 0
        for title in cell:
            if title in order:
                position = order.index(title) + 1
            else:
                order.insert(position, title)
                position += 1
    return order


def _add_reported(cell: dict, number: dict, figures: dict[str, float]) -> None:
    for name, figure in figures.items():
        title = f"{name}, reported by the paper, not measured here"
        cell[title], number[title] = f"{figure}", figure


def _comparable(key: tuple) -> tuple:
    return tuple(value if isinstance(value, str | bool) else float(value) for value in key)


def _paper_flags(args: argparse.Namespace) -> list[str]:
    """The --by flags that tell the rows of the paper's table apart: all its ablations are at one mask ratio."""
    return args.by if args.paper in METHOD_TABLES else [flag for flag in args.by if flag != "mask_ratio"]


def paper_key_of(key: tuple, args: argparse.Namespace) -> tuple:
    if not args.paper or key == (SCRATCH,):
        return ()
    values = dict(zip(args.by, key, strict=True))
    return _comparable(tuple(values[flag] for flag in _paper_flags(args)))


def reported_figures(args: argparse.Namespace) -> dict[tuple, dict[str, float]]:
    """{values of --by: {column: figure}} of --paper. Raises UsageError where the paper has no such table."""
    if not args.paper:
        return {}
    tables = getattr(paper_tables, args.paper.upper())
    if args.paper in METHOD_TABLES:
        if args.by != ["mask_type", "mask_ratio"]:
            raise UsageError(f"--paper {args.paper} has rows by mask_type and mask_ratio, not --by {' '.join(args.by)}")
        if args.data_set not in tables:
            raise UsageError(
                f"--data_set {args.data_set or '(none)'}: {args.paper} of the paper has {', '.join(tables)}"
            )
        return {_comparable(key): figures for key, figures in tables[args.data_set].items()}
    flags = tuple(_paper_flags(args))
    if flags not in tables:
        raise UsageError(f"--by {' '.join(args.by)}: {args.paper} of the paper has {'; '.join(map(' '.join, tables))}")
    return {_comparable(key): figures for key, figures in tables[flags].items()}


def write_tables(output: Path, rows: list[Row], notes: list[str], args: argparse.Namespace) -> str:
    """table.md, table.csv and runs.csv; returns the Markdown."""
    header, cells, numbers = table(rows, args)
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(c) + " |" for c in cells),
    ]
    explanation = [
        "",
        "error: mean reconstruction error of the masked tokens in the last epoch; under different masks these are "
        "errors of different tokens. motion lift: frame difference of the visible tokens over that of all, 1 = blind.",
        "± is half of a 95 % interval over seeds (Student's t), (a to b) Wilson's of the tested videos at one seed.",
    ]
    text = "\n".join([*lines, *explanation, *(f"- {note}" for note in notes)]) + "\n"
    (output / "table.md").write_text(text)
    titles = list(dict.fromkeys(title for number in numbers for title in number))
    _write_csv(output / "table.csv", titles, numbers)
    records = []
    for row in rows:
        for kind, runs in row.runs.items():
            for seed, run in sorted(runs.items()):
                record = {"row": " ".join(map(str, row.key)), "fine-tuned on": row.to, "kind": kind, "seed": seed}
                if kind == "pretrain":
                    record |= {name: run.last(name) for name in ("loss", "motion_lift", *LEARNED_METRICS)}
                    record["step_time"] = step_time(run)
                else:
                    record |= {name: run.test.get(name) for name in ("acc1", "acc5", "videos")}
                records.append(record | {"folder": str(run.folder), "git": run.git})
    _write_csv(output / "runs.csv", list(dict.fromkeys(title for record in records for title in record)), records)
    return text


def _write_csv(path: Path, titles: list[str], records: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, titles)
        writer.writeheader()
        writer.writerows(records)


# ---------------------------------------------------------------------------------------------------- the pictures


def label_of(row: Row) -> str:
    return ", ".join(map(str, row.key)) + (f" -> {row.to}" if row.to else "")


def draw_curves(path: Path, rows: list[Row]) -> None:
    """Mean over seeds and the range of them, over epochs: a panel a quantity, a colour a row."""
    panels = [
        ("pretrain", "train_loss", "reconstruction error"),
        ("pretrain", "train_motion_lift", "motion lift"),
        ("pretrain", "train_entropy", "entropy / log N"),
        ("pretrain", "train_explained_variance", "explained variance of the critic"),
        ("finetune", "val_acc1", "fine-tuning: validation top-1 (%)"),
        ("linear_probe", "val_acc1", "linear probe: validation top-1 (%)"),
    ]
    drawn = [(kind, name, title) for kind, name, title in panels if any(_curves(row, kind, name) for row in rows)]
    figure, axes = _figure(len(drawn), len(rows))
    for axis, (kind, name, title) in zip(axes, drawn, strict=True):
        for number, row in enumerate(rows):
            curves = _curves(row, kind, name)
            if not curves:
                continue
            epochs = sorted({epoch for curve in curves for epoch in curve})
            columns = [[curve[epoch] for curve in curves if epoch in curve] for epoch in epochs]
            colour = _colour(number, len(rows))
            axis.plot(epochs, [mean(column) for column in columns], color=colour, label=label_of(row), marker=".", ms=3)
            axis.fill_between(epochs, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.15, lw=0)
        axis.set(title=title, xlabel="epoch")
    handles = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def _curves(row: Row, kind: str, name: str) -> list[dict[int, float]]:
    curves = [
        {entry["epoch"]: entry[name] for entry in run.log if entry.get(name) is not None}
        for run in row.runs.get(kind, {}).values()
    ]
    return [curve for curve in curves if curve]


def draw_accuracy(path: Path, rows: list[Row]) -> bool:
    """A dot a seed and the mean with its interval; returns whether there is anything to draw."""
    kinds = [kind for kind in EVALUATIONS if any(row.runs.get(kind) for row in rows)]
    if not kinds:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4 * len(kinds), 1.2 + 0.32 * len(rows)), layout="constrained")
    for axis, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        for number, row in enumerate(rows):
            values = list(row.values(kind, "acc1").values())
            if not values:
                continue
            middle, half = interval(values)
            colour = _colour(number, len(rows))
            axis.errorbar(
                [middle], [number], xerr=None if math.isnan(half) else [half], fmt="o", color=colour, capsize=3
            )
            axis.plot(values, [number + 0.2] * len(values), ".", color=colour, alpha=0.5)
        axis.set(title=f"{EVALUATIONS[kind]}: top-1 of the test (%)")
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks(range(len(rows)), [label_of(row) for row in rows], fontsize=8)
    axis.invert_yaxis()
    figure.savefig(path, dpi=110)
    return True


def _figure(panels: int, num_rows: int):
    from matplotlib.figure import Figure

    columns = min(panels, 3)
    lines = -(-panels // columns)
    figure = Figure(figsize=(4.2 * columns + 2, max(3.0 * lines, 0.2 * num_rows)), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[panels:]:
        axis.axis("off")
    return figure, axes[:panels]


def _colour(number: int, count: int):
    from matplotlib import colormaps

    return colormaps["tab10"](number) if count <= 10 else colormaps["turbo"](number / (count - 1))


def compare(args: argparse.Namespace) -> int:
    reported_figures(args)  # its errors first
    rows, notes = make_rows(find_runs(args.folders), args.by)
    if not rows:
        raise UsageError(f"{' '.join(args.folders)}: no finished run among {len(notes)}: {notes[0]}")
    if args.baseline and not any(str(row.key[0]) == args.baseline for row in rows):
        raise UsageError(f"--baseline {args.baseline}: no finished run has it as --{args.by[0]}")
    notes = differences(rows, args.by) + notes
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    print(write_tables(output, rows, notes, args))
    draw_curves(output / "curves.png", rows)
    written = ["table.md", "table.csv", "runs.csv", "curves.png"]
    if draw_accuracy(output / "accuracy.png", rows):
        written.append("accuracy.png")
    print(f"wrote {', '.join(written)} to {output}")
    return 0


def main(arguments: list[str] | None = None) -> None:
    run_tool(compare, get_args(arguments))


if __name__ == "__main__":
    main()
