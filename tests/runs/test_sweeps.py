"""Sweeps of scripts/compare and scripts/ablations: their units, and one small sweep, killed and gone on with."""

import csv
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from datasets.moving_shapes import write_dataset
from run_mae_pretraining import check_flags, get_parser
from tests.helpers.runs import ROOT, assert_names
from tools import paper_tables
from tools.compare_runs import is_value

COMPARE, ABLATIONS = ROOT / "scripts/compare", ROOT / "scripts/ablations"


def sweep(path: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    own = ("DATA_PATH", "MODEL_PATH", "GPUS", "SCALE", "EPOCHS", "SEEDS", "SLURM_ARRAY_TASK_ID")
    env = {name: value for name, value in os.environ.items() if name not in own} | environment
    return subprocess.run(["bash", str(path), *flags], env=env, capture_output=True, text=True, timeout=300)


def units(path: Path, **environment: str) -> list[list[str]]:
    result = sweep(path, LIST="1", **environment)
    assert result.returncode == 0, result.stderr
    return [line.split() for line in result.stdout.splitlines()]


def test_every_block_of_the_papers_ablations_has_a_script():
    names = {path.stem for path in ABLATIONS.glob("*.sh")}
    assert names == {"attention", "decoder_depth", "loss", "tats_blocks", "rollout", "coefficients"}


def test_table1_is_every_method_at_every_ratio_with_every_seed():
    found = units(COMPARE / "table1.sh", DATA_SET="ssv2", DATA_PATH="lists", METHODS="tube tats", SEEDS="0 1")
    assert len(found) == 2 * 3 * 2 and len({words[0] for words in found}) == 12
    assert {tuple(words[1:]) for words in found} == {
        (method, ratio, seed) for method in ("tube", "tats") for ratio in ("0.85", "0.9", "0.95") for seed in "01"
    }


def test_the_map_is_every_method_at_every_size_and_ratio_with_every_seed():
    found = units(COMPARE / "map.sh", DATA_PATH="shapes", METHODS="random motion", SEEDS="0 1")
    expected = [(method, ratio, seed) for ratio in ("0.75", "0.85", "0.95") for method in ("random", "motion")
                for seed in "01"]  # fmt: skip
    assert sorted(tuple(words[1:]) for words in found) == sorted(2 * expected)  # two sizes


def test_the_ablations_on_the_embedded_data_are_all_of_them_within_their_epochs():
    found = units(COMPARE / "ablations.sh", DATA_PATH="shapes", SEEDS="0 1")
    assert len(found) == 28 * 2
    starts = {int(words[words.index("--tats_start_epoch") + 1]) for words in found if "--tats_start_epoch" in words}
    assert starts == {0, 1, 2, 3}  # of 4 epochs
    baselines = re.findall(r"\[(\w+)\]=([^\s)]+)", (COMPARE / "ablations.sh").read_text())
    assert {block for block, _ in baselines} == {path.stem for path in ABLATIONS.glob("*.sh")}
    for block, value in baselines:
        by = re.search(r"--by (\w+)", (ABLATIONS / f"{block}.sh").read_text())[1]
        rows = units(COMPARE / "ablations.sh", DATA_PATH="shapes", SEEDS="0", BLOCKS=block)
        assert any(is_value(getattr(get_parser().parse_args(words[4:]), by), value) for words in rows), block


@pytest.mark.parametrize("path", sorted(ABLATIONS.glob("*.sh")), ids=lambda p: p.stem)
def test_ablations_have_the_papers_rows_and_flags_that_exist(path):
    rows = set()
    table = re.search(r"--paper (table\d)", path.read_text())[1]
    by = re.search(r"--by ([a-z_ ]+) --paper", path.read_text())[1].split()
    for name, method, ratio, _, *flags in units(path, DATA_PATH="lists"):
        args = get_parser().parse_args(["--mask_type", method, "--mask_ratio", ratio, *flags])
        check_flags(args)
        row = tuple(getattr(args, flag) for flag in by)
        assert row not in rows, name
        rows.add(row)
    assert {values for values, _, _ in paper_tables.reported(table, tuple(by), "UCF101")} <= rows


@pytest.mark.parametrize(
    "environment, parts",
    [
        (dict(DATA_SET="ssv2"), ["DATA_PATH"]),
        (dict(DATA_SET="imagenet", DATA_PATH="x"), ["DATA_SET=imagenet", "scripts/imagenet/finetune.sh"]),
        (dict(DATA_SET="ssv2", DATA_PATH="x", SLURM_ARRAY_TASK_ID="99"), ["--array=0-8"]),
        (dict(DATA_SET="ssv2", DATA_PATH="x", SLURM_ARRAY_TASK_ID="0", METHODS="block"), ["METHODS=block"]),
    ],
)
def test_settings_that_make_no_sense_are_said(environment, parts, tmp_path):
    result = sweep(COMPARE / "table1.sh", OUTPUT_DIR=str(tmp_path), **environment)
    assert result.returncode == 2
    assert_names(result.stderr, "error: ", *parts)
    result = sweep(COMPARE / "table2.sh", DATA_SET="ssv2", DATA_PATH="x")
    assert result.returncode == 2
    assert_names(result.stderr, "error: ", "TO_SET")


def small_sweep(shapes: Path, out: Path) -> dict[str, str]:
    """Variables of one small unit."""
    return dict(DATA_PATH=str(shapes), OUTPUT_DIR=str(out), METHODS="random", SEEDS="0", PRETRAIN_EPOCHS="2",
                EVALUATIONS="linear_probe", PROBE_EPOCHS="1", TATS_START_EPOCH="1", NUM_WORKERS="0", JOBS="1",
                BATCH_SIZE="4", OMP_NUM_THREADS="1", MEASURE="")  # fmt: skip


PYTHON = r"""#!/usr/bin/env bash
# In place of Python: notes what it was called for, and leaves the files that tell a sweep how far it is.
echo "$*" >> "$CALLS"
folder=$(sed -n 's/.*--output_dir \([^ ]*\).*/\1/p' <<< "$*")
[ -z "$FAIL" ] || [[ $* != *$FAIL* ]] || exit 3
case $1 in
    *run_mae_pretraining.py) mkdir -p "$folder" && touch "$folder/checkpoint-2.pth" "$folder/checkpoint-11.pth" ;;
    *run_class_finetuning.py) mkdir -p "$folder" && touch "$folder/test.json" ;;
esac
"""


def test_finished_parts_are_passed_over_and_failures_named(tmp_path):
    python, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "shapes").mkdir()  # of a user
    environment = small_sweep(tmp_path / "shapes", out) | dict(
        PYTHON=str(python), CALLS=str(calls), FAIL="", METHODS="random scratch", EVALUATIONS="finetune linear_probe",
    )  # fmt: skip

    def programs(**more: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        calls.write_text("")
        result = sweep(COMPARE / "embedded.sh", **environment | more)
        return result, [[Path(line.split()[0]).name, *line.split()[1:]] for line in calls.read_text().splitlines()]

    result, found = programs()
    assert result.returncode == 0, result.stdout + result.stderr
    names = [name for name, *_ in found]
    trained = ["run_mae_pretraining.py", *["run_class_finetuning.py"] * 4]  # two from the checkpoint, two from none
    assert names == [*trained, "compare_runs.py"]
    for flags in found[1:3]:
        assert flags[flags.index("--finetune") + 1] == f"{out}/random-ratio0.85-seed0/pretrain/checkpoint-11.pth"
    assert "--finetune" not in found[3] + found[4] and found[-1][found[-1].index("--baseline") + 1] == "random"
    assert [name for name, *_ in programs()[1]] == ["compare_runs.py"]

    (out / "random-ratio0.85-seed0/linear_probe/test.json").unlink()
    _, found = programs()
    assert [name for name, *_ in found] == [*trained[:2], "compare_runs.py"] and "--linear_probe" in found[1]

    result, found = programs(SEEDS="0 1", FAIL="seed1/pretrain")
    assert result.returncode == 1
    assert_names(result.stdout, "random-ratio0.85-seed1", "status 3")
    assert [name for name, *_ in found] == [trained[0], *trained[1:3], "compare_runs.py"]  # scratch's are done


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    shapes = write_dataset(tmp_path / "shapes", train=20, val=20, size=32, frames=16)
    out = tmp_path / "out"
    environment = small_sweep(shapes, out)
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    process = subprocess.Popen(["bash", str(COMPARE / "embedded.sh")], env=os.environ | environment, **quiet)
    first = out / "random-ratio0.85-seed0/pretrain/checkpoint-1.pth"
    deadline = time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    written = first.stat().st_mtime_ns
    result = sweep(COMPARE / "embedded.sh", **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert first.stat().st_mtime_ns == written  # not trained again
    with open(out / "table.csv", newline="") as file:
        rows = {row["mask_type"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"random"}
    for method, row in rows.items():
        test = json.loads((out / f"{method}-ratio0.85-seed0/linear_probe/test.json").read_text())
        assert float(row["linear_probe_acc1_mean"]) == test["acc1"]
    for name in ("table.md", "curves.png", "accuracy.png"):
        assert (out / name).stat().st_size > 0
    # a failure is named, and is the sweep's status
    result = sweep(COMPARE / "embedded.sh", **environment | dict(SEEDS="1", METHODS="random", PRETRAIN_EXTRA="--lr -1"))
    assert result.returncode == 1
    assert_names(result.stdout, "random-ratio0.85-seed1", "status 1")


@pytest.mark.slow
def test_a_job_of_a_slurm_array_is_one_unit_and_writes_no_table(tmp_path):
    shapes = write_dataset(tmp_path / "shapes", train=20, val=20, size=32, frames=16)
    job = small_sweep(shapes, tmp_path / "array") | dict(SLURM_ARRAY_TASK_ID="1", METHODS="random tats", EVALUATIONS="")
    result = sweep(COMPARE / "embedded.sh", **job)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "array").iterdir()] == ["tats-ratio0.85-seed0"]
    assert (tmp_path / "array/tats-ratio0.85-seed0/pretrain/checkpoint-1.pth").exists()
