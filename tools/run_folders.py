"""Folders that runs leave (args.json, log.txt, test.json): reading them, which belong together, and how they differ."""

import functools
import json
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from run_mae_pretraining import get_parser
from runtime.resume import FREE_ON_RESUME
from runtime.tasks import SINGLE_LABEL, TASKS, Task
from utils import UsageError

PRETRAINING, SCRATCH = "pre-training", "scratch"
KINDS = ("fine-tuning", "linear probe", "attentive probe", "kNN")  # what yields accuracies
CHECKPOINTS = (".pth", ".pt", ".bin", ".safetensors", ".ckpt")  # a --finetune of another name is a folder
MEASURES = "measures.json"  # written by tools/measure.py
UNREAD = "-"  # the value of a flag that a run's method does not read
# May differ without a note. The rows of the table tell data_path and seed; the source of --finetune, the clips per step
# and the settings of the test are compared on their own (settings).
FREE = FREE_ON_RESUME | {"device", "data_path", "seed"}


# {flag: the only --tats_objective that reads it}
READ_BY_OBJECTIVE = {"tats_tau": "listwise"} | dict.fromkeys(
    ("ppo_clip", "policy_coef", "value_coef", "entropy_coef", "entropy", "normalize_advantage"), "ppo"
)


@functools.cache
def read_by() -> dict[str, str]:
    """{flag: the only mask type that reads it}."""
    (group,) = (group for group in get_parser()._action_groups if group.title == "TATS and PPO")
    return {action.dest: "tats" for action in group._group_actions} | {"adamae_coef": "adamae"}


def unread(args: dict) -> set[str]:
    """The flags that a pre-training's mask type, or its objective, does not read."""
    flags = {flag for flag, method in read_by().items() if method != args.get("mask_type")}
    objective = args.get("tats_objective", "ppo")  # the only one that earlier runs had
    return flags | {flag for flag, reader in READ_BY_OBJECTIVE.items() if reader != objective}


@dataclass(eq=False)
class Run:
    folder: Path
    kind: str  # PRETRAINING, one of KINDS, or ""
    args: dict
    made_with: dict  # what args.json says of torch and git
    log: dict[int, dict]  # of each epoch
    test: dict | None
    measures: dict = field(default_factory=dict)  # of tools/measure.py
    source: "Run | None" = None  # the pre-training run that it started from
    problem: str = ""  # why it is left out

    @property
    def task(self) -> Task:
        return task_of(self.args, self.folder)

    @property
    def scratch(self) -> bool:
        """Whether training began with random weights."""
        return self.kind in KINDS and not self.args["finetune"]

    @property
    def seed(self) -> tuple[int | None, int | None]:
        """What tells replicates apart: (seed of the pre-training or None, seed of what followed or None)."""
        if self.kind == PRETRAINING:
            return self.args["seed"], None
        return self.source.args["seed"] if self.source else None, self.args["seed"]

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Epochs that logged it, and its values."""
        found = [(epoch, record[name]) for epoch, record in sorted(self.log.items()) if record.get(name) is not None]
        return [epoch for epoch, _ in found], [value for _, value in found]

    def last(self, name: str) -> Any:
        """What the last epoch logged, or None."""
        return self.log[self.args["epochs"] - 1].get(name)

    def step_time(self) -> float | None:
        """Seconds per step: the median over epochs, for TATS over the epochs that trained it. None: not logged."""
        epochs, seconds = self.curve("train_step_time")
        start = self.args.get("tats_start_epoch", 0) if self.args.get("mask_type") == "tats" else 0
        seconds = [value for epoch, value in zip(epochs, seconds, strict=True) if epoch >= start] or seconds
        return statistics.median(seconds) if seconds else None

    def memory(self) -> float | None:
        """The most that a process held, in GiB, or None where that was not logged."""
        return max(self.curve("train_peak_memory")[1], default=None)


class Quantity(NamedTuple):
    """What two methods are compared by, seed by seed."""

    title: str
    name: str  # its columns in table.csv begin with it
    value: Callable[[Run], float | None]
    least: bool  # whether less is better
    digits: int


def read_json(path: Path) -> dict:
    """Raises UsageError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: is not JSON ({error}): repair it, or leave its folder out") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: is not what a run writes: leave its folder out")
    return content


def read_log(path: Path) -> dict[int, dict]:
    """{epoch: record}; a line that a crash cut off is skipped."""
    records = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("epoch"), int):
            records[record["epoch"]] = record
    return records


def kind_of(args: dict) -> str:
    """Run.kind by the flags that args.json has."""
    if "mask_type" in args:
        return PRETRAINING
    if "nb_classes" not in args:
        return ""
    fine_tuning, linear_probe, attentive_probe, knn = KINDS
    if args.get("knn"):
        return knn
    if args.get("linear_probe"):
        return linear_probe
    return attentive_probe if args.get("attentive_probe") else fine_tuning


def task_of(args: dict, place: Path) -> Task:
    """Of the flags in args.json; earlier runs do not say it. Raises UsageError."""
    name = args.get("task", SINGLE_LABEL.name)
    if not isinstance(name, str) or name not in TASKS:
        raise UsageError(f"{place}: --task {name} is none of {', '.join(TASKS)}: leave its folder out")
    return TASKS[name]


def args_of(path: Path) -> dict:
    """The flags in an args.json, none where it is of something else. Raises UsageError."""
    args = read_json(path).get("args")
    return args if isinstance(args, dict) else {}


def read_run(folder: Path) -> Run:
    """Raises UsageError."""
    path = folder / "args.json"
    content, args = read_json(path), args_of(path)
    needed = {"seed": int, "epochs": int, "data_path": str, "finetune": str, "output_dir": str}
    if not all(isinstance(args.get(name), kind) for name, kind in needed.items()):
        raise UsageError(f"{path}: args lacks one of the flags {', '.join(needed)}: leave its folder out")
    args["data_path"] = os.path.normpath(args["data_path"])
    made_with = {"version of torch": (content.get("versions") or {}).get("torch"), "git revision": content.get("git")}
    test_path = folder / "test.json"
    test = read_json(test_path) if test_path.is_file() else None
    metrics = task_of(args, path).metrics
    undefined = {name for name in metrics[1:] if name in (test or {}) and test[name] is None}  # a rank correlation, say
    if test is not None and not all(isinstance(test.get(n), int | float) for n in metrics if n not in undefined):
        names = " and ".join(metrics)
        raise UsageError(f"{test_path}: has no {names}: test again with --eval, or leave its folder out")
    run = Run(folder, kind_of(args), args, made_with, read_log(folder / "log.txt"), test)
    if (folder / MEASURES).is_file():
        run.measures = {k: v for k, v in read_json(folder / MEASURES).items() if isinstance(v, int | float)}
    run.problem = problem_of(run)
    return run


def problem_of(run: Run) -> str:
    """Why a run cannot be compared, or ""."""
    last = run.args["epochs"] - 1
    if not run.kind:
        return "neither a pre-training nor a fine-tuning run"
    if last not in run.log:
        return f"unfinished, log.txt {f'ends with epoch {max(run.log)}' if run.log else 'has no epoch'} of 0 to {last}"
    return "unfinished, there is no test.json" if run.kind != PRETRAINING and run.test is None else ""


def refuse(error: OSError) -> None:
    """os.walk would skip a folder that cannot be read."""
    raise error


def find_runs(folders: list[str]) -> list[Run]:
    """All runs in and below the folders, each once, fine-tuning runs with their sources. Raises UsageError."""
    found = {}
    for folder in folders:
        if not os.path.isdir(folder):
            raise UsageError(f"FOLDER {folder}: there is no such folder")
        for root, below, files in os.walk(folder, onerror=refuse):
            below.sort()
            if "args.json" in files and ("log.txt" in files or "config.json" not in files):  # no Hugging Face folder
                found.setdefault(os.path.realpath(root), Path(root))
    runs = [read_run(folder) for folder in found.values()]
    for run in runs:
        if run.kind in KINDS and not run.scratch:
            run.source = source_of(run, [other for other in runs if other.kind == PRETRAINING])
            if run.source is None and not run.problem:
                run.problem = f"started from {run.args['finetune']}, whose run is in none of the FOLDERs"
            elif run.source and run.source.problem and not run.problem:
                run.problem = f"its pre-training {run.source.folder} is left out"
    return runs


def source_of(run: Run, candidates: list[Run]) -> Run | None:
    """The pre-training run whose folder --finetune lies in, or None. Raises UsageError where it may be either of two.

    The trees may have been moved, and paths may be relative: first the checkpoint is sought where it lies as seen
    from the run's own folder, then where the path says, then in the --output_dir that a run had, then by the last two
    parts of the path."""
    given = Path(os.path.normpath(run.args["finetune"]))
    parent = given.parent if given.suffix in CHECKPOINTS else given  # else the run's folder, whose newest was taken
    own, recorded = Path(os.path.realpath(run.folder)).parts, Path(os.path.normpath(run.args["output_dir"])).parts
    same = len(os.path.commonprefix([own[::-1], recorded[::-1]]))  # number of equal parts at the end
    moved_from, moved_to = recorded[: len(recorded) - same], own[: len(own) - same]
    beside = None
    if same and parent.parts[: len(moved_from)] == moved_from:
        beside = os.path.realpath(Path(*moved_to, *parent.parts[len(moved_from) :]))
    ways = (
        lambda other: os.path.realpath(other.folder) == beside,
        lambda other: os.path.realpath(other.folder) == os.path.realpath(parent),
        lambda other: os.path.normpath(other.args["output_dir"]) == str(parent),
        lambda other: len(parent.parts) > 1 and Path(os.path.realpath(other.folder)).parts[-2:] == parent.parts[-2:],
    )
    for way in ways:
        found = [other for other in candidates if way(other)]
        if len(found) > 1:
            raise UsageError(
                f"{run.folder}: started from {run.args['finetune']}, which may be of {found[0].folder} or of "
                f"{found[1].folder}: leave one of them out"
            )
        if found:
            return found[0]
    return None


def value_of(run: Run, flag: str) -> Hashable:
    """A flag's value in a pre-training run, UNREAD where its method does not read it. Raises UsageError."""
    if flag not in run.args:
        raise UsageError(f"--by {flag}: the pre-training run {run.folder} has no such flag")
    if flag in unread(run.args):
        return UNREAD
    value = run.args[flag]
    return tuple(value) if isinstance(value, list) else value


def settings(run: Run, by: tuple[str, ...]) -> dict[str, str]:
    """{name: value as text} of what should be equal in runs that are compared."""
    args = run.args
    free = FREE | (set(by) if run.kind == PRETRAINING else set())
    named = {f"--{name}": UNREAD for name in unread(args)}
    named |= {f"--{name}": str(args[name]) for name in args if name not in free and f"--{name}" not in named}
    clips = [args.get(name, 1) for name in ("batch_size", "accum_iter", "world_size")]
    clips += [args.get("num_sample", 1)] if args.get("batch_counts") == "videos" else []  # earlier runs counted clips
    named["clips per step"] = str(math.prod(clips))
    named["n_parameters"] = str(run.last("n_parameters"))
    named |= {name: str(value) for name, value in run.made_with.items()}
    if run.kind == PRETRAINING:
        return named if "finetune" in by else named | {"--finetune": args["finetune"] or "none"}
    given = Path(args["finetune"])
    named["checkpoint of --finetune"] = (
        UNREAD if run.scratch else given.name if given.suffix in CHECKPOINTS else "the newest"
    )
    return named | {
        f"{name} of the test": str(run.test.get(name)) for name in ("temporal_clips", "spatial_crops", "list", "videos")
    }


def differences(runs: list[Run], by: tuple[str, ...]) -> list[str]:
    """A line for each setting that runs of one kind, fine-tuned on the same, do not share."""
    root = os.path.commonpath([os.path.abspath(run.folder.parent) for run in runs])
    groups, lines = defaultdict(list), []
    for run in runs:
        groups[run.kind, run.args["data_path"] if run.kind in KINDS else ""].append(run)
    for (kind, target), members in sorted(groups.items()):
        all_settings = [settings(run, by) for run in members]
        for name in dict.fromkeys(name for named in all_settings for name in named):
            values = defaultdict(list)
            for run, named in zip(members, all_settings, strict=True):
                values[named.get(name, "absent")].append(os.path.relpath(run.folder, root))
            values.pop(UNREAD, None)
            if len(values) > 1:
                shown = "; ".join(f"{value} in {listing(names)}" for value, names in sorted(values.items()))
                lines.append(f"{kind}{f' on {target}' if len(groups) > 1 and target else ''}: {name}: {shown}")
    return lines


def listing(names: list[str]) -> str:
    """The first six names, and how many more there are."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
