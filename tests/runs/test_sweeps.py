"""Sweeps of scripts/compare and scripts/ablations: their units, and one small sweep, killed and gone on with."""

import csv
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datasets.moving_shapes import write_dataset
from run_mae_pretraining import check_flags, get_parser
from tests.helpers.runs import ROOT, assert_names
from tools import paper_tables
from tools.compare_runs import is_value

COMPARE, ABLATIONS = ROOT / "scripts/compare", ROOT / "scripts/ablations"


def sweep(path: Path, *flags: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    own = ("DATA_PATH", "MODEL_PATH", "GPUS", "SCALE", "EPOCHS", "SEEDS", "SLURM_ARRAY_TASK_ID")
    env = {name: value for name, value in os.environ.items() if name not in own} | environment
    return subprocess.run(["bash", str(path), *flags], env=env, capture_output=True, text=True, timeout=300, cwd=cwd)


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


def test_scratch_knows_no_ratio():
    found = units(COMPARE / "embedded.sh", METHODS="random scratch", MASK_RATIOS=" 0.75  0.85", SEEDS="0 1")
    assert [words[0] for words in found if words[1] == "scratch"] == [
        "scratch-ratio0.75-seed0",
        "scratch-ratio0.75-seed1",
    ]
    assert len(found) == 6


def test_the_map_is_every_method_at_every_size_and_ratio_with_every_seed():
    found = units(COMPARE / "map.sh", DATA_PATH="shapes", METHODS="random motion", SEEDS="0 1")
    expected = [(method, ratio, seed) for ratio in ("0.75", "0.85") for method in ("random", "motion")
                for seed in "01"]  # fmt: skip
    assert sorted(tuple(words[1:]) for words in found) == sorted(2 * expected)  # two sizes


def test_the_ablations_on_the_embedded_data_are_all_of_them_within_their_epochs():
    found = units(COMPARE / "ablations.sh", DATA_PATH="shapes", SEEDS="0 1")
    assert len(found) == 28 * 2
    starts = {int(words[words.index("--tats_start_epoch") + 1]) for words in found if "--tats_start_epoch" in words}
    assert starts == {0, 1, 2, 3}  # of 4 epochs
    baselines = dict(re.findall(r"\[(\w+)\]=([\w,.-]+)[ )\n]", (COMPARE / "ablations.sh").read_text()))
    assert baselines.keys() == {path.stem for path in ABLATIONS.glob("*.sh")}
    for block, values in baselines.items():
        by = re.search(r"--by ([a-z_ ]+) --paper", (ABLATIONS / f"{block}.sh").read_text())[1].split()
        values = values.split(",")
        assert len(values) == len(by), block
        rows = units(COMPARE / "ablations.sh", DATA_PATH="shapes", SEEDS="0", BLOCKS=block)
        rows = [get_parser().parse_args(words[4:]) for words in rows]
        assert sum(all(is_value(getattr(row, name), value) for name, value in zip(by, values, strict=True))
                   for row in rows) == 1, block  # fmt: skip


@pytest.mark.parametrize("path", sorted(ABLATIONS.glob("*.sh")), ids=lambda p: p.stem)
def test_ablations_have_the_papers_rows_and_flags_that_exist(path):
    rows = set()
    table = re.search(r"--paper (table\d)", path.read_text())[1]
    by = re.search(r"--by ([a-z_ ]+) --paper", path.read_text())[1].split()
    for name, method, ratio, _, *flags in units(path, DATA_SET="ucf101", DATA_PATH="lists"):
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
        (dict(DATA_SET="imagenet", DATA_PATH="x"), ["DATA_SET=imagenet", "scripts/imagenet/pretrain_random.sh"]),
        (dict(DATA_SET="ssv2", DATA_PATH="x", SLURM_ARRAY_TASK_ID="99"), ["--array=0-8"]),
        (dict(DATA_SET="ssv2", DATA_PATH="x", METHODS="tube block"), ["METHODS=block", "tats"]),
        (dict(DATA_SET="demo", DATA_PATH="x"), ["DATA_SET=demo"]),
        (dict(TO_SET="imagenet"), ["TO_SET=imagenet"]),
        (dict(DATA_SET="custom", DATA_PATH="x"), ["NB_CLASSES"]),
        (dict(METHODS=" "), ["METHODS is empty"]),
        (dict(SEEDS=" "), ["SEEDS is empty"]),
        (dict(SEEDS="0 one"), ["SEEDS=one"]),
        (dict(MASK_RATIOS="0.5 2"), ["MASK_RATIOS=2", "between 0 and 1"]),
        (dict(MASK_RATIOS="0"), ["MASK_RATIOS=0"]),
        (dict(EVALUATIONS="finetune probe"), ["EVALUATIONS=probe", "linear_probe"]),
        (dict(JOBS="0"), ["JOBS=0", "at least 1"]),
        (dict(JOBS="auto"), ["JOBS=auto"]),
        (dict(PRETRAIN_EPOCHS="08"), ["PRETRAIN_EPOCHS=08"]),
        (dict(TATS_TAU="-0.1"), ["TATS_TAU=-0.1", "hide"]),
        (dict(METHODS="listwise random"), ["METHODS=listwise random", "tube random"]),
        (dict(METHODS="tats hide"), ["METHODS=tats hide", "tube random"]),
        (dict(SEEDS="1 0 1"), ["tube-ratio0.85-seed1", "twice"]),
    ],
)
def test_settings_that_make_no_sense_are_said_before_anything_starts(environment, parts, tmp_path):
    for more in ({}, dict(LIST="1")):
        if "SLURM_ARRAY_TASK_ID" not in environment or not more:
            result = sweep(
                COMPARE / "table1.sh", **dict(OUTPUT_DIR=str(tmp_path / "o"), PYTHON="false") | environment | more
            )
            assert result.returncode == 2 and not result.stdout
            assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
            assert_names(result.stderr, *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "script, environment, parts",
    [
        ("table2.sh", dict(DATA_SET="ssv2", DATA_PATH="x"), ["TO_SET"]),
        ("map.sh", dict(SIZES="0.1-0.16 large"), ["SIZES=large"]),
        ("map.sh", dict(SLURM_ARRAY_TASK_ID="0"), ["array"]),
        ("ablations.sh", dict(SLURM_ARRAY_TASK_ID="0"), ["array"]),
        ("ablations.sh", dict(BLOCKS="attention heads"), ["BLOCKS=heads", "rollout"]),
        ("map.sh", dict(METHODS="random block"), ["METHODS=block"]),
        ("map.sh", dict(METHODS="random block", LIST="1"), ["METHODS=block"]),
        ("ablations.sh", dict(SEEDS="one"), ["SEEDS=one"]),
        ("collapse.sh", dict(MODEL_PATH="no/such/run"), ["no/such/run", "make compare"]),
        ("collapse.sh", dict(MODEL_PATH=".", MASK_RATIOS="0.75 0.85"), ["MASK_RATIOS"]),
        ("collapse.sh", dict(MODEL_PATH=".", OBJECTIVES="ppo dpo"), ["OBJECTIVES=dpo"]),
    ],
)
def test_the_other_sweeps_say_it_too(script, environment, parts, tmp_path):
    result = sweep(COMPARE / script, **dict(OUTPUT_DIR=str(tmp_path / "o"), PYTHON="false") | environment)
    assert result.returncode == 2 and not result.stdout and not list(tmp_path.iterdir())
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert_names(result.stderr, *parts)


def test_ablations_of_the_embedded_data_have_ratios_and_epochs_that_show_something():
    for path in ABLATIONS.glob("*.sh"):
        assert {words[2] for words in units(path, DATA_PATH="lists")} == {"0.75"}
        assert {words[2] for words in units(path, DATA_SET="ucf101", DATA_PATH="lists")} == {"0.95"}
    starts = [int(words[words.index("--tats_start_epoch") + 1]) for words in units(ABLATIONS / "rollout.sh")]
    assert max(starts) < 4


def test_off_is_0_and_a_dry_run_is_the_list(tmp_path):
    on = sweep(COMPARE / "embedded.sh", DRY_RUN="1", LIST="0", OUTPUT_DIR="o", cwd=tmp_path)
    assert on.stdout == sweep(COMPARE / "embedded.sh", LIST="1").stdout and not list(tmp_path.iterdir())
    script = ROOT / "scripts/custom/pretrain_random.sh"
    off = sweep(script, DRY_RUN="0", DATA_PATH="x", GPUS="0", PYTHON="echo")
    assert off.stdout.startswith(str(ROOT / "run_mae_pretraining.py --data_path x"))  # run
    for flag in (dict(EPOCHS="1e2"), dict(GPUS="two"), dict(NODES="0")):
        result = sweep(script, DATA_PATH="x", PYTHON="echo", **flag)
        assert result.returncode == 2 and not result.stdout
        assert_names(result.stderr, "error: ", "=".join(*flag.items()), "whole number")


def test_the_tiny_scale_has_one_thread_where_nothing_else_is_said(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "threads: ${OMP_NUM_THREADS:-all}"\n')
    python.chmod(0o755)
    for scale, said, threads in (("tiny", "", "1"), ("tiny", "2", "2"), ("paper", "", "all")):
        environment = dict(SCALE=scale, OMP_NUM_THREADS=said, PYTHON=str(python), GPUS="0", DATA_PATH="x")
        assert sweep(ROOT / "scripts/custom/pretrain_random.sh", **environment).stdout == f"threads: {threads}\n"


def test_flags_with_spaces_stay_whole(tmp_path):
    (tmp_path / "a b").mkdir()
    found = sweep(COMPARE / "collapse.sh", LIST="1", MODEL_PATH="a b", SEEDS="0", cwd=tmp_path)
    line = found.stdout.splitlines()[0]
    assert shlex.split(line)[-2:] == ["--finetune", str(tmp_path / "a b")]


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
if [ -n "${WAIT:-}" ]; then
    trap 'sleep 0.5; touch "$WAIT.$$.saved"; exit "${CODE:-75}"' TERM
    touch "$WAIT.$$"
    for _ in $(seq 600); do sleep 0.1; done
fi
case $1 in
    *moving_shapes.py) exec "$REAL" "$@" ;;
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


@pytest.fixture
def quick(tmp_path):
    """Starts a sweep of the stand-in, from tmp_path; returns its result and the calls of its programs."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "shapes").mkdir()
    fixed = small_sweep(Path("shapes"), Path("out")) | dict(
        PYTHON=str(python), CALLS=str(calls), FAIL="", EVALUATIONS="finetune"
    )

    def run(
        script: str = "embedded.sh", *flags: str, **more: str
    ) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        calls.write_text("")
        result = sweep(COMPARE / script, *flags, cwd=tmp_path, **fixed | more)
        return result, [shlex.split(line) for line in calls.read_text().splitlines()]

    fixed["REAL"] = sys.executable
    run.environment = fixed
    return run


def test_paths_are_relative_to_where_the_command_is_given(quick, tmp_path):
    result, calls = quick()
    assert result.returncode == 0, result.stdout + result.stderr
    assert calls[0][calls[0].index("--data_path") + 1] == str(tmp_path / "shapes/train.csv")
    assert (tmp_path / "out/random-ratio0.85-seed0/finetune/test.json").exists()


@pytest.mark.parametrize(
    "more, part",
    [
        (dict(PRETRAIN_EPOCHS="3"), "pretrain was started with other flags (was --epochs 2, now --epochs 3)"),
        (dict(FINETUNE_EPOCHS="12"), "finetune was started with other flags (was --epochs 8, now --epochs 12)"),
        (dict(PRETRAIN_EXTRA="--drop_path 0.1"), "now --drop_path 0.1"),
        (dict(LR="3"), "now --lr 3"),
    ],
)
def test_another_protocol_is_refused_and_not_passed_over(quick, tmp_path, more, part):
    assert quick()[0].returncode == 0
    result, calls = quick(**more)
    assert result.returncode == 1 and [Path(call[0]).name for call in calls] == ["compare_runs.py"]
    assert_names(result.stdout, "random-ratio0.85-seed0: status 2", part, "another OUTPUT_DIR")
    free = dict(NUM_WORKERS="3", SAVE_FREQ="7", PRETRAIN_EXTRA="--keep_last 2 --no-pin_mem")  # no other result
    result, calls = quick(SEEDS="0 1", **free)
    assert result.returncode == 0 and len(calls) == 3, result.stdout
    (tmp_path / "out/random-ratio0.85-seed0/pretrain/checkpoint-11.pth").unlink()  # to have the space
    (tmp_path / "out/random-ratio0.85-seed0/pretrain/checkpoint-2.pth").unlink()
    assert len(quick()[1]) == 1
    for path in tmp_path.glob("out/*/*/flags.txt"):  # as sweeps of earlier revisions
        path.unlink()
    assert len(quick(**more)[1]) == 1


def test_flags_that_trained_nothing_are_not_held_to(quick, tmp_path):
    for flags in ("--tpyo 1", "--drop_path 0.2"):
        result, calls = quick(PRETRAIN_EXTRA=flags, FAIL="tpyo")
        assert result.returncode == ("tpyo" in flags) and flags in " ".join(calls[0])
    assert "--drop_path 0.2" in (tmp_path / "out/random-ratio0.85-seed0/pretrain/flags.txt").read_text()


def test_a_table_that_fails_is_the_status_of_the_sweep(quick, tmp_path):
    (tmp_path / "start.pth").touch()
    for script in ("embedded.sh", "collapse.sh"):
        result, calls = quick(script, FAIL="compare_runs", MODEL_PATH="start.pth", OBJECTIVES="ppo", RATES="1e-3")
        assert result.returncode and len(calls) > 1


def test_a_folder_that_cannot_be_written_is_an_error(quick, tmp_path):
    (tmp_path / "file").touch()
    result, calls = quick(DATA_PATH="file/shapes")
    assert result.returncode and not calls and "file" in result.stderr


def test_shapes_of_other_settings_are_refused(quick, tmp_path):
    data = write_dataset(tmp_path / "small", train=10, val=10, size=32, frames=4, num_shapes=2)
    for flags in ({}, dict(SHAPES_FLAGS="--num_shapes 2")):
        assert quick(DATA_PATH=str(data), **flags)[0].returncode == 0
    for flags, part in ((dict(SHAPES_FLAGS="--num_shapes 3"), "num_shapes"), (dict(INPUT_SIZE="64"), "size")):
        result, calls = quick(DATA_PATH=str(data), **flags)
        assert result.returncode and [Path(call[0]).name for call in calls] == ["moving_shapes.py"]
        assert_names(result.stderr, "error: ", data, "other settings", part)
    result, _ = quick(DATA_PATH=str(tmp_path / "new"), SHAPES_FLAGS="--num_shapes -1")
    assert result.returncode and not list(tmp_path.glob("new*"))


def test_units_at_one_time_have_gpus_of_their_own(quick, tmp_path, monkeypatch):
    for name, lines in (
        ("nvidia-smi", 'for i in 0 1 2 3; do echo "GPU $i: A (UUID: GPU-$i)"; done'),
        ("nproc", "echo 8"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    note = """start=$(date +%s.%N)
    case $* in *seed0*) sleep 0.8 ;; *) sleep 0.1 ;; esac
    [[ $* != *pretraining.py* ]] || echo "$start $(date +%s.%N) $CUDA_VISIBLE_DEVICES" > "$DEVICES.$$"
    case $1"""
    (tmp_path / "python").write_text(PYTHON.replace("case $1", note))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fixed = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", EVALUATIONS="", SEEDS="0 1 2 3 4 5 6")

    def seen(shared: bool = False, **environment: str) -> set[str]:
        out = tmp_path / "-".join(environment.values())
        result, _ = quick(DEVICES=f"{out}/devices", OUTPUT_DIR=str(out), **fixed | environment)
        assert result.returncode == 0, result.stdout + result.stderr
        runs = [path.read_text().strip().split(maxsplit=2) for path in out.glob("devices.*")]
        assert len(runs) == 7
        for (start, end, one), (other_start, _, other) in itertools.permutations(runs, 2):
            if start <= other_start < end:  # at one time
                assert shared or not set(one.split(",")) & set(other.split(",")), (one, other)
        return {devices for _, _, devices in runs}

    assert seen(JOBS="2", GPUS="2") == {"0,1", "2,3"}
    assert seen(JOBS="3", GPUS="1") == {"0", "1", "2"}
    assert seen(JOBS="2", GPUS="1", CUDA_VISIBLE_DEVICES="5,GPU-7") == {"5", "GPU-7"}
    assert seen(JOBS="", GPUS="2") == {"0,1", "2,3"}  # as many as fit
    assert seen(shared=True, JOBS="6", GPUS="1") == {"0", "1", "2", "3"}
    for more in ({}, dict(LIST="1")):
        result, calls = quick(JOBS="3", GPUS="2", OUTPUT_DIR="many", DATA_PATH="none", **fixed | more)
        assert result.returncode == 2 and not calls and not (tmp_path / "none").exists()
        assert_names(result.stderr, "error: ", "JOBS=3", "GPUS=2", "4")


def test_flags_in_another_order_are_the_same_protocol(quick, tmp_path):
    quick()
    for path in tmp_path.glob("out/*/*/flags.txt"):
        last = {line.split()[0]: line for line in path.read_text().splitlines()}  # of a flag counts
        path.write_text("\n".join(["--epochs 99", *reversed(last.values())]) + "\n")
    result, calls = quick()
    assert result.returncode == 0 and len(calls) == 1, result.stdout


def test_table_1_can_stand_beside_table_9_and_table_2_beside_table_1(quick):
    ssv2 = dict(DATA_SET="ssv2", METHODS="tube", MASK_RATIOS="0.9")
    _, calls = quick("table1.sh", **ssv2)
    assert calls[-1][-4:] == ["--paper", "table1", "--data_set", "SSv2"]
    for flags in (["--paper", "table9"], ["--paper=table9"]):
        _, calls = quick("table1.sh", *flags, **ssv2)
        assert calls[-1][-2 - len(flags) :] == ["--baseline", "tube", *flags]
    _, calls = quick("table2.sh", TO_SET="ucf101", TO_PATH="shapes", **ssv2)
    outputs = [calls[-1][i + 1] for i, word in enumerate(calls[-1]) if word == "--output"]
    assert outputs[-1].endswith("out/table2_ucf101")


def test_measures_are_made_once(quick, tmp_path):
    assert "tools/measure.py" not in str(quick(MEASURE="0", OUTPUT_DIR="out_0")[1])
    for evaluations in ("", "finetune"):
        out = tmp_path / f"out_{evaluations}"
        _, calls = quick(MEASURE="1", EVALUATIONS=evaluations, OUTPUT_DIR=str(out))
        names = [Path(call[0]).stem for call in calls]
        assert [name for name in names if name != "run_class_finetuning"] == [
            "run_mae_pretraining", "measure", "compare_runs",
        ]  # fmt: skip
        (out / "random-ratio0.85-seed0/pretrain/measures.json").touch()
        assert len(quick(MEASURE="1", EVALUATIONS=evaluations, OUTPUT_DIR=str(out))[1]) == 1


def test_a_table_is_asked_for_that_tells_the_methods_apart(quick):
    def asked(methods: str, script: str) -> str:
        return " ".join(quick(script, METHODS=methods, OUTPUT_DIR=f"out_{methods}", MASK_RATIOS="0.85")[1][-1])

    by = "--by mask_type mask_ratio tats_objective tats_tau"
    assert f"{by} --baseline random" in asked("random tats hide scratch", "embedded.sh")
    assert f"{by} --baseline tats" in asked("listwise", "embedded.sh")  # alone, of an array
    assert "--baseline tats" in asked("tats tube", "table1.sh") and "--by" not in asked("tats tube", "table1.sh")


@pytest.mark.parametrize("script", ["embedded.sh", "map.sh", "ablations.sh"])
def test_a_sweep_that_is_told_to_stop_waits_until_its_runs_are_saved(quick, tmp_path, script):
    environment = os.environ | quick.environment | dict(WAIT=str(tmp_path / "run"), SEEDS="0 1 2", JOBS="2")
    environment["SIZES"] = "0.175-0.28"  # the map's, of the shapes that are there
    process = subprocess.Popen(
        ["bash", str(COMPARE / script)], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while len(started := set(tmp_path.glob("run.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()  # this shell alone
    assert process.wait(timeout=30) == 143
    assert process.stderr.read() == "stopped; start the same command again to continue\n"
    saved = {path.with_name(f"{path.name}.saved") for path in started}
    assert len(started) == 2 and set(tmp_path.glob("run.*")) == started | saved  # and no other run started


@pytest.mark.parametrize("code", ["75", "0"])  # stopped, or just finished: no fine-tuning starts
def test_a_unit_of_an_array_saves_itself_before_its_job_ends(quick, tmp_path, code):
    environment = os.environ | quick.environment | dict(WAIT=str(tmp_path / "run"), SLURM_ARRAY_TASK_ID="0", CODE=code)
    process = subprocess.Popen(["bash", str(COMPARE / "embedded.sh")], env=environment, cwd=tmp_path, process_group=0)
    deadline = time.monotonic() + 60
    while not (started := list(tmp_path.glob("run.*"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)  # as Slurm, every process of the step
    assert process.wait(timeout=30) == 75  # back into the queue
    assert set(tmp_path.glob("run.*")) == {started[0], started[0].with_name(f"{started[0].name}.saved")}


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
