"""The comparison of runs: numbers against closed forms, runs put together, what it refuses and what it names."""

import contextlib
import csv
import json
import math
import os
import re
import shutil
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from unittest import mock

import matplotlib.image
import numpy as np
import pytest
from scipy import stats

import run_class_finetuning
import run_mae_pretraining
from tests.helpers.runs import assert_names
from tools import compare_runs, paper_tables, seed_statistics
from utils import write_run_description

T_2 = 4.302653  # 97.5 % quantile of Student's t with 2 degrees of freedom, from a printed table
EPOCHS = 3


def write_run(folder, args, log, test=None):
    folder.mkdir(parents=True)
    write_run_description(folder / "args.json", args)
    (folder / "log.txt").write_text("".join(f"{json.dumps(record)}\n" for record in log))
    if test:
        (folder / "test.json").write_text(json.dumps(test))
    return folder


def pretrain(root, name, *flags, loss=0.5, step_time=(0.1, 0.2, 0.9), epochs_logged=EPOCHS, **logged):
    folder = root / name
    parser = run_mae_pretraining.get_parser()
    args = parser.parse_args(["--epochs", str(EPOCHS), "--output_dir", str(folder), "--data_path", "/d/a.csv", *flags])
    records = [
        {"train_loss": loss + EPOCHS - 1 - epoch, "train_motion_lift": 1 + epoch, "train_step_time": step_time[epoch]}
        | {f"train_{key}": value for key, value in logged.items()}
        | {"epoch": epoch, "n_parameters": 7}
        for epoch in range(epochs_logged)
    ]
    return write_run(folder, args, records)


def finetune(root, name, source, *flags, acc1=50.0, acc5=90.0, videos=240, epochs_logged=EPOCHS, tested=True):
    folder = root / name
    start = [] if source is None else ["--finetune", f"{source}/checkpoint-2.pth"]
    args = run_class_finetuning.parse_args(
        ["--epochs", str(EPOCHS), "--output_dir", str(folder), "--data_path", "/d/fine", "--nb_classes", "4",
         "--data_set", "custom", *start, *flags]
    )  # fmt: skip
    records = [
        {"train_loss": 1.0, "val_acc1": acc1 - EPOCHS + epoch, "epoch": epoch, "n_parameters": 9}
        for epoch in range(epochs_logged)
    ]
    test = {"acc1": acc1, "acc5": acc5, "videos": videos, "list": "/d/fine/val.csv", "temporal_clips": 2}
    return write_run(folder, args, records, test if tested else None)


TUBE, TATS = (50.0, 52.0, 57.0), (60.0, 61.0, 70.0)


@pytest.fixture
def campaign(tmp_path):
    """Two methods, three seeds each, fine-tuned and probed; and one run from scratch."""
    root = tmp_path / "runs"
    for seed, (tube, tats) in enumerate(zip(TUBE, TATS, strict=True)):
        s = str(seed)
        source = pretrain(root, f"tube{s}", "--seed", s, loss=0.5 + 0.1 * seed)
        finetune(root, f"tube{s}_ft", source, "--seed", s, acc1=tube)
        source = pretrain(root, f"tats{s}", "--mask_type", "tats", "--seed", s, "--tats_start_epoch", "1",
                          entropy=0.9 + 0.01 * seed, explained_variance=0.25)  # fmt: skip
        finetune(root, f"tats{s}_ft", source, "--seed", s, acc1=tats, acc5=tats + 20)
        finetune(root, f"tats{s}_probe", source, "--seed", s, "--linear_probe", acc1=tats - 10)
    finetune(root, "fresh", None, acc1=25.0)
    return root


def compare(tmp_path, *arguments, pictures=False):
    """Runs the tool; returns table.md, and the rows of table.csv and runs.csv. pictures: whether they are drawn, which
    takes longer than all the rest."""
    output = tmp_path / "out"
    with contextlib.nullcontext() if pictures else mock.patch.object(compare_runs, "write_pictures"):
        compare_runs.main([str(argument) for argument in (*arguments, "--output", output)])
    table, runs = (list(csv.DictReader(open(output / name, newline=""))) for name in ("table.csv", "runs.csv"))
    return (output / "table.md").read_text(), table, runs


def error_of(*arguments):
    with pytest.raises(SystemExit) as refusal:
        compare_runs.main([str(argument) for argument in arguments])
    message = refusal.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def row_of(table, **values):
    (row,) = [row for row in table if all(row[name] == value for name, value in values.items())]
    return row


def cell_of(text, method, heading):
    """Of table.md."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    (row,) = [line for line in lines if method in line]
    return row[lines[0].index(heading)]


# ------------------------------------------------------------------------------------------------------- numbers


def test_means_and_intervals_are_those_of_students_t(tmp_path, campaign):
    text, table, _ = compare(tmp_path, campaign)
    assert [row["mask_type"] for row in table] == ["tube", "tats", "scratch"]
    tats = row_of(table, mask_type="tats")
    half = T_2 * np.std(TATS, ddof=1) / math.sqrt(3)
    assert float(tats["fine_tuning_acc1_mean"]) == pytest.approx(np.mean(TATS))
    assert float(tats["fine_tuning_acc1_half_width"]) == pytest.approx(half, rel=1e-6)
    assert float(tats["fine_tuning_acc5_mean"]) == pytest.approx(np.mean(TATS) + 20)
    assert float(tats["linear_probe_acc1_mean"]) == pytest.approx(np.mean(TATS) - 10)
    assert cell_of(text, "tats", "fine-tuning top-1 (%)").startswith(f"{np.mean(TATS):.2f} ± {half:.2f} (")
    assert float(tats["entropy_mean"]) == pytest.approx(0.91) and float(tats["explained_variance_mean"]) == 0.25
    tube = row_of(table, mask_type="tube")
    assert float(tube["loss_mean"]) == pytest.approx(0.6)  # of the last epoch
    assert float(tube["loss_half_width"]) == pytest.approx(T_2 * 0.1 / math.sqrt(3), rel=1e-6)
    assert float(tube["motion_lift_mean"]) == 3 and float(tube["motion_lift_half_width"]) == 0
    assert tube["runs"] == "3" and tube["entropy_mean"] == tube["linear_probe_acc1_mean"] == ""
    assert cell_of(text, "tube", "entropy / log N") == "-"
    assert "tokens" in text.split("|")[0]


def test_step_time_is_the_median_over_the_epochs_that_train_the_sampler(tmp_path, campaign):
    text, table, _ = compare(tmp_path, campaign, "--baseline", "tube")
    assert float(row_of(table, mask_type="tube")["step_time"]) == pytest.approx(0.2)
    assert float(row_of(table, mask_type="tats")["step_time"]) == pytest.approx(0.55)  # of 0.2 and 0.9
    assert float(row_of(table, mask_type="tats")["step_ratio"]) == pytest.approx(2.75)
    assert cell_of(text, "tats", "step / tube's") == "2.75" and cell_of(text, "tats", "peak memory (GiB)") == "-"


def test_memory_is_the_largest_that_was_logged(tmp_path):
    log = pretrain(tmp_path, "a", peak_memory=3.5) / "log.txt"
    log.write_text(log.read_text().replace("3.5", "4.25", 1))
    assert row_of(compare(tmp_path, tmp_path)[1], mask_type="tube")["peak_memory"] == "4.25"


def test_baseline_is_compared_seed_by_seed(tmp_path, campaign):
    text, table, _ = compare(tmp_path, campaign, "--baseline", "tube")
    tats = row_of(table, mask_type="tats")
    differences = np.subtract(TATS, TUBE)  # 10, 9, 13
    half = T_2 * differences.std(ddof=1) / math.sqrt(3)
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(3))
    p = 1 - t / math.sqrt(2 + t * t)  # two-sided, in closed form with 2 degrees of freedom
    name = "fine_tuning_minus_baseline"
    assert float(tats[f"{name}_difference"]) == pytest.approx(differences.mean())
    assert float(tats[f"{name}_low"]) == pytest.approx(differences.mean() - half, rel=1e-6)
    assert float(tats[f"{name}_high"]) == pytest.approx(differences.mean() + half, rel=1e-6)
    assert float(tats[f"{name}_p"]) == pytest.approx(p, rel=1e-6) and tats[f"{name}_pairs"] == "3"
    assert cell_of(text, "tats", "fine-tuning top-1 - tube's").startswith("+10.67 (")
    for method in ("tube", "scratch"):
        assert cell_of(text, method, "fine-tuning top-1 - tube's") == "-"
    assert tats["linear_probe_minus_baseline_difference"] == ""  # tube has no probe


def test_pairs_are_common_seeds_and_one_is_too_few(tmp_path, campaign):
    shutil.rmtree(campaign / "tube1_ft")
    _, table, _ = compare(tmp_path, campaign, "--baseline", "tube")
    tats = row_of(table, mask_type="tats")
    assert tats["fine_tuning_minus_baseline_pairs"] == "2"
    assert float(tats["fine_tuning_minus_baseline_difference"]) == pytest.approx((10 + 13) / 2)
    shutil.rmtree(campaign / "tube2_ft")
    text, table, _ = compare(tmp_path, campaign, "--baseline", "tube")
    assert row_of(table, mask_type="tats")["fine_tuning_minus_baseline_pairs"] == ""
    assert cell_of(text, "tats", "fine-tuning top-1 - tube's") == "-"
    assert cell_of(text, "tube", "fine-tuning top-1 (%)").startswith("50.00 (one run")


def test_equal_differences_have_no_p(tmp_path):
    for seed in "01":
        for method, acc1 in (("tube", 40.0), ("random", 43.0)):
            source = pretrain(tmp_path, method + seed, "--mask_type", method, "--seed", seed)
            finetune(tmp_path, f"{method}{seed}_ft", source, "--seed", seed, acc1=acc1)
    text, table, _ = compare(tmp_path, tmp_path, "--baseline", "tube")
    assert cell_of(text, "random", "fine-tuning top-1 - tube's") == (
        "+3.00 (3.00 to 3.00; p -, 2 pairs; test set ± 8.8): not decided, 0.0 would be found"
    )
    assert row_of(table, mask_type="random")["fine_tuning_minus_baseline_p"] == ""


def test_one_run_has_the_binomial_interval_of_its_test(tmp_path):
    finetune(tmp_path, "ft", pretrain(tmp_path, "tube"), acc1=25.0, videos=40)
    text, table, _ = compare(tmp_path, tmp_path)
    share, n, z = 0.25, 40, 1.959964
    for name, sign in (("low", -1), ("high", 1)):
        bound = float(table[0][f"fine_tuning_acc1_wilson_{name}"]) / 100
        # Wilson: the shares for which the observed one lies z of their own standard errors away
        assert (share - bound) == pytest.approx(-sign * z * math.sqrt(bound * (1 - bound) / n), rel=1e-5)
    assert table[0]["fine_tuning_acc1_half_width"] == "" and table[0]["fine_tuning_acc1_n"] == "1"
    assert cell_of(text, "tube", "fine-tuning top-1 (%)") == "25.00 (one run; 40 test videos alone leave 14.2 to 40.2)"
    assert cell_of(text, "tube", "reconstruction error") == "0.5000"


def test_scratch_can_be_the_baseline(tmp_path, campaign):
    finetune(campaign, "fresh1", None, "--seed", "1", acc1=31.0)
    _, table, _ = compare(tmp_path, campaign, "--baseline", "scratch")
    tats = row_of(table, mask_type="tats")
    assert float(tats["fine_tuning_minus_baseline_difference"]) == pytest.approx((60 - 25 + 61 - 31) / 2)


def test_scratch_is_compared_with_a_baseline_that_is_one(tmp_path):
    for seed in range(2):
        source = pretrain(tmp_path, f"tube{seed}", "--seed", str(seed))
        finetune(tmp_path, f"tube{seed}_ft", source, "--seed", str(seed), acc1=80.0 + seed)
        finetune(tmp_path, f"fresh{seed}", None, "--seed", str(seed), acc1=30.0)
    _, table, _ = compare(tmp_path, tmp_path, "--baseline", "tube")
    assert float(row_of(table, mask_type="scratch")["fine_tuning_minus_baseline_difference"]) == -50.5
    finetune(tmp_path, "tube_90_ft", pretrain(tmp_path, "tube_90", "--mask_ratio", "0.9"))
    _, table, _ = compare(tmp_path, tmp_path, "--baseline", "tube")  # of two ratios: which?
    assert row_of(table, mask_type="scratch")["fine_tuning_minus_baseline_difference"] == ""


def test_a_difference_is_decided_or_said_not_to_be(tmp_path):
    """Normal quantiles and Student's t by hand: differences 20, 21, 22 in three seeds, 1000 videos; then 4 videos."""
    for videos, verdict in ((1000, "ahead"), (4, "not decided")):
        root = tmp_path / str(videos)
        for seed in range(3):
            for method, acc1 in (("tube", 40.0), ("random", 60.0 + seed)):
                source = pretrain(root, f"{method}{seed}", "--mask_type", method, "--seed", str(seed))
                finetune(root, f"{method}{seed}_ft", source, "--seed", str(seed), acc1=acc1, videos=videos)
        _, table, _ = compare(tmp_path, root, "--baseline", "tube")
        row = row_of(table, mask_type="random")
        error = 195.9964 * math.sqrt((0.4 * 0.6 + 0.61 * 0.39) / videos)
        assert float(row["fine_tuning_minus_baseline_test_error"]) == pytest.approx(error, rel=1e-3)
        assert row["fine_tuning_minus_baseline_verdict"] == verdict
        assert row_of(table, mask_type="tube")["fine_tuning_minus_baseline_verdict"] == ""


def test_errors_of_values_are_compared_and_less_is_ahead(tmp_path):
    """Mean absolute errors that no share of videos bounds; a table has one --task."""
    for seed in range(3):
        for method, mae in (("tube", 4.0), ("random", 2.0 + 0.1 * seed)):
            source = pretrain(tmp_path / "runs", f"{method}{seed}", "--mask_type", method, "--seed", str(seed))
            folder = finetune(
                tmp_path / "runs", f"{method}{seed}_ft", source, "--seed", str(seed), "--task", "regression"
            )
            test = {"mae": mae, "spearman": None if seed else 0.5, "videos": 4, "list": "/d/fine/val.csv"}
            (folder / "test.json").write_text(json.dumps(test))
    text, table, runs = compare(tmp_path, tmp_path / "runs", "--baseline", "tube")
    row = row_of(table, mask_type="random")
    assert float(row["fine_tuning_mae_mean"]) == pytest.approx(2.1) and row["fine_tuning_spearman_n"] == "1"
    assert row["fine_tuning_minus_baseline_verdict"] == "ahead"
    assert float(row["fine_tuning_minus_baseline_difference"]) == pytest.approx(-1.9)
    assert float(row["fine_tuning_minus_baseline_test_error"]) == 0  # 4 videos say nothing of errors of values
    assert cell_of(text, "random", "fine-tuning mean absolute error").startswith("2.1000 ± ")
    assert row_of(runs, folder=str(tmp_path / "runs/tube0_ft"))["mae"] == "4.0"
    source = pretrain(tmp_path / "runs", "other", "--mask_type", "frame")
    finetune(tmp_path / "runs", "classes", source)
    error = error_of(tmp_path / "runs", "--output", tmp_path / "out")
    assert_names(error, tmp_path / "runs/classes", "--task single_label", "--task regression")


@pytest.mark.parametrize("pairs", [2, 3, 5, 20])
def test_what_would_be_found_is_found_four_times_in_five(pairs):
    """Simulated: differences of this mean and deviation 3, by scipy's paired t test."""
    shift = seed_statistics.detectable(3.0, pairs)
    draws = np.random.default_rng(pairs).normal(shift, 3.0, (pairs, 20_000))
    found = (stats.ttest_1samp(draws, 0).pvalue < 0.05).mean()
    assert found == pytest.approx(0.8, abs=0.012)


def test_measures_and_the_learning_curve_have_columns(tmp_path):
    for seed in range(2):
        source = pretrain(tmp_path, f"tube{seed}", "--seed", str(seed))
        measures = {"checkpoint": "checkpoint-2.pth", "mask_ratio": 0.85, "ridge": 20.0 + 2 * seed, "error_moving": 0.5}
        (source / "measures.json").write_text(json.dumps(measures))
        finetune(tmp_path, f"tube{seed}_ft", source, "--seed", str(seed), acc1=50.0 + seed)
    text, table, _ = compare(tmp_path, tmp_path)
    assert float(table[0]["ridge_mean"]) == 21 and float(table[0]["error_moving_mean"]) == 0.5
    assert cell_of(text, "tube", "ridge").startswith("21.0 ± ") and "mask_ratio_mean" not in table[0]
    assert float(table[0]["fine_tuning_mean_val_mean"]) == pytest.approx(np.mean([47, 48, 49, 48, 49, 50]))
    text, table, _ = compare(tmp_path, tmp_path, "--level", "47.5")  # on the way from 47 to 48; at the first validation
    assert float(table[0]["fine_tuning_epochs_to_level_mean"]) == (1.5 + 1) / 2
    text, table, _ = compare(tmp_path, tmp_path, "--level", "49.5")  # never, so all 3 epochs; from 49 to 50
    assert float(table[0]["fine_tuning_epochs_to_level_mean"]) == (3 + 2.5) / 2
    assert cell_of(text, "tube", "fine-tuning epochs to 49.5 %") == "> 2.75"


def test_frozen_features_are_compared_seed_by_seed(tmp_path):
    auc = {"tube": (0.66, 0.70, 0.67), "random": (0.93, 0.92, 0.93), "motion": (0.91, None, None)}
    for mask, values in auc.items():
        for seed, value in enumerate(values):
            source = pretrain(tmp_path, f"{mask}{seed}", "--mask_type", mask, "--seed", str(seed))
            if value is not None:
                (source / "measures.json").write_text(json.dumps({"motion_auc": value, "error_moving": 2 - value}))
    text, table, _ = compare(tmp_path, tmp_path, "--baseline", "random")
    row = row_of(table, mask_type="tube")
    differences = np.array([-0.27, -0.22, -0.26])
    half = 4.302653 * differences.std(ddof=1) / 3**0.5  # t at 97.5 % of 2 degrees of freedom
    assert float(row["motion_auc_minus_baseline_difference"]) == pytest.approx(-0.25)
    assert float(row["motion_auc_minus_baseline_low"]) == pytest.approx(-0.25 - half)
    assert row["motion_auc_minus_baseline_verdict"] == "behind"
    assert float(row["error_moving_minus_baseline_difference"]) == pytest.approx(0.25)
    assert row["error_moving_minus_baseline_verdict"] == "behind"  # less is better
    assert cell_of(text, "tube", "motion auc - random's").startswith("-0.250 (-0.316 to -0.184")
    assert "test set" not in cell_of(text, "tube", "motion auc - random's")
    assert row_of(table, mask_type="motion")["motion_auc_minus_baseline_verdict"] == ""  # one pair


# ---------------------------------------------------------------------------------------------- what belongs together


def test_flags_that_a_method_does_not_read_make_no_rows_and_no_notes(tmp_path):
    pretrain(tmp_path, "tube0", "--tats_lr", "1", "--entropy_coef", "1")
    pretrain(tmp_path, "tube1", "--seed", "1")
    path = tmp_path / "tube1" / "args.json"
    args = json.loads(path.read_text())
    del args["args"]["tats_logit_cap"]  # of a revision that had no such flag
    path.write_text(json.dumps(args))
    pretrain(tmp_path, "tats0", "--mask_type", "tats", "--entropy_coef", "1e-5")
    text, table, _ = compare(tmp_path, tmp_path, "--by", "mask_type", "entropy_coef", "--baseline", "tube")
    assert [(row["mask_type"], row["entropy_coef"], row["runs"]) for row in table] == [
        ("tube", "-", "2"), ("tats", "1e-05", "1"),
    ]  # fmt: skip
    assert float(table[1]["step_ratio"]) == 1.0 and "Differs" not in text


def test_flags_that_an_objective_does_not_read_make_no_rows_and_no_notes(tmp_path):
    pretrain(tmp_path, "ppo0", "--mask_type", "tats", "--normalize_advantage", "--entropy_coef", "1e-5")
    pretrain(tmp_path, "ppo1", "--mask_type", "tats", "--normalize_advantage", "--entropy_coef", "1e-5",
             "--tats_tau", "3", "--seed", "1")  # fmt: skip
    listwise = ["--mask_type", "tats", "--tats_objective", "listwise"]
    pretrain(tmp_path, "show", *listwise)
    pretrain(tmp_path, "hide", *listwise, "--tats_tau", "-0.1", "--ppo_clip", "0.5")
    by = ["--by", "tats_objective", "tats_tau", "--baseline", "ppo"]
    text, table, _ = compare(tmp_path, tmp_path, *by)
    assert {(row["tats_objective"], row["tats_tau"], row["runs"]) for row in table} == {
        ("ppo", "-", "2"), ("listwise", "0.1", "1"), ("listwise", "-0.1", "1"),
    }  # fmt: skip
    assert all(row["step_ratio"] == "1.0" for row in table) and "Differs" not in text
    shutil.rmtree(tmp_path / "hide")
    pretrain(tmp_path, "hide", *listwise, "--tats_tau", "-0.1", "--tats_logit_cap", "2")
    assert "--tats_logit_cap: 0.0 in" in compare(tmp_path, tmp_path, *by)[0]  # both objectives read it


def test_a_baseline_may_be_one_row_of_several_flags(tmp_path):
    """All other rows are compared with it, also where they differ from it in each of the flags."""
    for k, value in (("1", 0.9), ("5", 0.8)):
        for start in ("0", "2"):
            for seed in ("0", "1", "2"):
                folder = pretrain(tmp_path, f"{start}-{k}-{seed}", "--mask_type", "tats", "--tats_start_epoch", start,
                                  "--tats_rollout_steps", k, "--seed", seed)  # fmt: skip
                measures = {"motion_auc": value + int(start) / 100 + int(seed) / 1000}
                (folder / "measures.json").write_text(json.dumps(measures))
    by = ["--by", "tats_start_epoch", "tats_rollout_steps", "--baseline"]
    found = []
    for baseline in ("2", "2,1"):
        text, table, _ = compare(tmp_path, *by, baseline, tmp_path)  # FOLDER may come last
        differences = [row["motion_auc_minus_baseline_difference"] for row in table]
        rows = [(row["tats_start_epoch"], row["tats_rollout_steps"]) for row in table]
        found.append({row: x and f"{float(x):.3g}" for row, x in zip(rows, differences, strict=True)})
    assert found[0] == {("0", "1"): "-0.02", ("0", "5"): "-0.02", ("2", "1"): "", ("2", "5"): ""}  # of equal k
    assert found[1] == {("0", "1"): "-0.02", ("0", "5"): "-0.12", ("2", "1"): "", ("2", "5"): "-0.1"}
    assert "motion auc - 2,1's" in text
    out = ("--output", tmp_path / "out")
    assert_names(error_of(tmp_path, *by, "2,3", *out), "--baseline 2,3", "tats_start_epoch,tats_rollout_steps", "2,5")
    assert_names(error_of(tmp_path, *by, "2,1,0", *out), "--baseline 2,1,0", "--by")


def test_exported_folders_are_no_runs(tmp_path, campaign):
    """tools/convert_checkpoint.py writes args.json too, without paths."""
    for name in ("hub", "run_too"):
        (campaign / name).mkdir()
        (campaign / name / "config.json").write_text("{}")
        (campaign / name / "args.json").write_text('{"args": {"model": "a"}}')
    out = ("--output", tmp_path / "other")
    (campaign / "run_too/log.txt").touch()
    assert_names(error_of(campaign, *out), campaign / "run_too/args.json")
    shutil.rmtree(campaign / "run_too")
    assert "hub" not in compare(tmp_path, campaign)[0]


def test_other_flags_that_differ_are_named_with_values_and_runs(tmp_path):
    for name, flags in {"a": (), "b": ("--lr", "3e-4"), "c": ("--num_workers", "1", "--output_dir", "x")}.items():
        source = pretrain(tmp_path, name, "--seed", str(ord(name)), *flags)
        finetune(
            tmp_path, f"{name}_ft", source, "--seed", str(ord(name)), *(("--smoothing", "0") if name == "c" else ())
        )
    path = tmp_path / "b" / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"git": "other", "versions": {"torch": "1.0"}}))
    log = tmp_path / "c" / "log.txt"
    log.write_text(log.read_text().replace('"n_parameters": 7', '"n_parameters": 8'))
    text, _, _ = compare(tmp_path, tmp_path)
    noted = text.split("Differs between runs")[1]
    assert re.search(r"(?m)^- pre-training.*--lr.* 0\.00015 .*\ba, c\b.* 0\.0003 .*\bb$", noted)
    assert re.search(r"(?m)^- pre-training.*n_parameters.* 7 .*\ba, b\b.* 8 .*\bc$", noted)
    assert re.search(r"torch.* 1\.0 .*\bb\b", noted) and re.search(r"git.* other .*\bb\b", noted)
    assert re.search(r"--smoothing.* 0\.0 .*\bc_ft\b.* 0\.1 .*\ba_ft, b_ft\b", noted)
    assert "num_workers" not in noted and "output_dir" not in noted and "seed" not in noted.split("\n", 1)[1]


def test_batch_test_views_and_start_count_although_a_resume_may_change_them(tmp_path):
    source = pretrain(tmp_path, "a")
    pretrain(tmp_path, "b", "--seed", "1", "--world_size", "4", "--finetune", "other/start.pth")
    finetune(tmp_path, "a_ft", source)
    other = finetune(tmp_path, "b_ft", source, "--seed", "1")
    path = other / "test.json"
    path.write_text(path.read_text().replace('"temporal_clips": 2', '"temporal_clips": 5'))
    path = other / "args.json"
    path.write_text(path.read_text().replace("checkpoint-2.pth", "checkpoint-1.pth"))
    noted = compare(tmp_path, tmp_path)[0].split("Differs between runs")[1]
    assert re.search(r" 256 .*\bb\b.* 64 .*\ba\b", noted)
    assert re.search(r"--finetune.* none .*\ba\b.* other/start\.pth .*\bb\b", noted)
    assert re.search(r"temporal_clips.* 2 .*\ba_ft\b.* 5 .*\bb_ft\b", noted)
    assert re.search(r"--finetune.* checkpoint-1\.pth .*\bb_ft\b.* checkpoint-2\.pth .*\ba_ft\b", noted)
    assert_names(noted, 2, "fine-tuning", 1, "pre-training")


def test_two_runs_of_one_seed_are_refused_by_name(tmp_path, campaign):
    pretrain(campaign, "tube0_again", "--lr", "1e-3")
    message = error_of(campaign, "--output", tmp_path / "out")
    assert_names(message, campaign / "tube0", campaign / "tube0_again", "--lr", "--by")
    shutil.rmtree(campaign / "tube0_again")
    finetune(campaign, "tube0_ft_again", campaign / "tube0")
    message = error_of(campaign, "--output", tmp_path / "out")
    assert_names(message, campaign / "tube0_ft", campaign / "tube0_ft_again")
    assert "--by" not in message


def test_unfinished_runs_are_named_and_left_out(tmp_path, campaign):
    pretrain(campaign, "frame", "--mask_type", "frame", epochs_logged=2)
    finetune(campaign, "frame_ft", campaign / "frame")
    finetune(campaign, "short", campaign / "tube0", "--attentive_probe", epochs_logged=1)
    finetune(campaign, "untested", campaign / "tube0", "--attentive_probe", tested=False)
    finetune(campaign, "orphan", "/elsewhere/videomae")
    pretrain(campaign, "empty", "--mask_type", "motion", epochs_logged=0)
    write_run(campaign / "vis", Namespace(
        seed=0, epochs=1, data_path="", finetune="", output_dir=""), [{"epoch": 0}])  # fmt: skip
    text, table, runs = compare(tmp_path, campaign)
    assert {row["mask_type"] for row in table} == {"tube", "tats", "scratch"} and "attentive" not in text.split("Left")[
        0
    ]
    left_out = text.split("Left out")[1]
    for name, *parts in (
        ("frame", "unfinished", "log.txt", "epoch 1", "0 to 2"),
        ("frame_ft", campaign / "frame"),
        ("short", "unfinished", "log.txt", "epoch 0", "0 to 2"),
        ("untested", "unfinished", "test.json"),
        ("orphan", "/elsewhere/videomae/checkpoint-2.pth"),
        ("empty", "unfinished", "log.txt", "0 to 2"),
        ("vis", "pre-training", "fine-tuning"),
    ):
        assert_names(left_out, f"- {campaign}/{name}: ", *parts)
    assert row_of(runs, folder=str(campaign / "frame"))["left_out"].startswith("unfinished")
    assert row_of(runs, folder=str(campaign / "tube0"))["left_out"] == ""


def test_a_torn_line_and_values_that_were_not_finite_do_no_harm(tmp_path):
    log = pretrain(tmp_path, "tube") / "log.txt"
    log.write_text(
        '{"epoch": 0, "train_lo\n[3]\n' + log.read_text().replace('"train_motion_lift": 3', '"train_motion_lift": null')
    )
    text, table, _ = compare(tmp_path, tmp_path)
    assert table[0]["motion_lift_mean"] == "" and float(table[0]["loss_mean"]) == 0.5


def test_runs_csv_has_a_row_a_run(tmp_path, campaign):
    _, _, runs = compare(tmp_path, campaign)
    assert len(runs) == 3 * 5 + 1
    probe = row_of(runs, folder=str(campaign / "tats1_probe"))
    assert (probe["kind"], probe["seed"], probe["acc1"], probe["videos"]) == ("linear probe", "1", "51.0", "240")
    assert probe["pretraining"] == str(campaign / "tats1") and probe["mask_type"] == "tats"
    assert row_of(runs, folder=str(campaign / "fresh"))["mask_type"] == "scratch"
    assert float(row_of(runs, folder=str(campaign / "tube2"))["loss"]) == pytest.approx(0.7)


def test_transfer_has_columns_from_and_to(tmp_path):
    for name in ("ucf101", "ssv2"):
        source = pretrain(tmp_path, name, "--data_path", f"/d/{name}/train.csv")
        for target, acc1 in (("ucf101", 60.0), ("hmdb51", 40.0)):
            finetune(tmp_path, f"{name}_{target}", source, "--data_path", f"/d/{target}", acc1=acc1 + (name == "ssv2"))
    text, table, _ = compare(tmp_path, tmp_path)
    assert len(table) == 4
    row = row_of(table, **{"from": "/d/ssv2/train.csv", "to": "/d/hmdb51"})
    assert float(row["fine_tuning_acc1_mean"]) == 41 and float(row["loss_mean"]) == 0.5
    assert text.split("\n|")[1].startswith(" from | to | mask_type") and "| ssv2/train.csv | hmdb51 | tube" in text
    text, table, _ = compare(tmp_path, tmp_path, "--paper", "table2")
    row = row_of(table, **{"from": "/d/ssv2/train.csv", "to": "/d/hmdb51"})
    assert row["paper_top1"] == ""  # the ratio is 0.75 here
    assert "| SSv2 | HMDB51 | tube | 0.75 |" in text and "| SSv2 | HMDB51 | tats | 0.95 | - |" in text
    assert row_of(table, **{"from": "K400", "to": "SSv2", "mask_type": "tats", "mask_ratio": "0.9"})[
        "paper_top1"
    ] == "39.46"  # fmt: skip


def test_baselines_are_of_the_same_data(tmp_path):
    for method, gain in (("tube", 0.0), ("random", 1.0)):
        for start in "ab":
            for seed in "01":
                flags = "--mask_type", method, "--data_path", f"/d/{start}.csv", "--seed", seed
                source = pretrain(tmp_path, f"{method}_{start}{seed}", *flags)
                for target in "cd":
                    finetune(tmp_path, f"{source.name}_{target}", source, "--seed", seed, "--data_path", f"/d/{target}",
                             acc1=50 + gain * (1 + 2 * (start == "b") + 4 * (target == "d")) + 9 * (target == "d")
                             + 20 * (start == "b"))  # fmt: skip
    _, table, _ = compare(tmp_path, tmp_path, "--baseline", "tube")
    differences = {
        (row["from"], row["to"]): float(row["fine_tuning_minus_baseline_difference"])
        for row in table
        if row["mask_type"] == "random"
    }
    assert differences == {("/d/a.csv", "/d/c"): 1, ("/d/b.csv", "/d/c"): 3, ("/d/a.csv", "/d/d"): 5,
                           ("/d/b.csv", "/d/d"): 7}  # fmt: skip


def test_no_columns_from_and_to_where_there_is_one_of_each(tmp_path, campaign):
    assert "from |" not in compare(tmp_path, campaign)[0]


# ---------------------------------------------------------------------------------------------------- moved folders


def test_runs_are_found_together_wherever_the_tree_was_moved_to(tmp_path, campaign):
    expected = compare(tmp_path, campaign)[1]
    moved = tmp_path / "another" / "place"
    moved.parent.mkdir()
    campaign.rename(moved)
    assert compare(tmp_path, moved)[1] == expected
    separate = tmp_path / "apart"
    for folder in list(moved.iterdir()):  # fine-tuning runs on one disk, the others on another
        shutil.move(folder, separate / ("ft" if "_" in folder.name else "pre") / folder.name)
    assert compare(tmp_path, separate / "ft", separate / "pre", separate / "ft")[1][:2] == expected[:2]


def test_a_renamed_run_is_sought_where_the_path_says_then_by_its_last_parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrain(Path("exp"), "tube")  # its --output_dir is relative
    os.symlink(tmp_path / "exp" / "tube", "latest")
    finetune(Path("exp"), "ft", tmp_path / "latest").rename("exp/renamed")
    finetune(Path("exp"), "probe", "/old/disk/exp/tube", "--linear_probe").rename("exp/renamed_probe")
    finetune(Path("exp"), "other", "/old/disk/elsewhere/tube", "--attentive_probe").rename("exp/renamed_other")
    _, _, runs = compare(tmp_path, "exp")
    found = {run["folder"]: run["pretraining"] for run in runs}
    assert found["exp/renamed"] == found["exp/renamed_probe"] == "exp/tube" and found["exp/renamed_other"] == ""


def test_relative_paths_of_two_machines_are_not_mixed_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for machine, seed in (("a", "0"), ("b", "1")):
        source = pretrain(Path("output"), "tube", "--seed", seed)
        finetune(Path("output"), "ft", source, "--seed", seed)
        shutil.move("output", f"copies/{machine}/output")
    _, table, runs = compare(tmp_path, "copies")
    assert table[0]["runs"] == "2" and table[0]["fine_tuning_acc1_n"] == "2"
    assert row_of(runs, folder="copies/b/output/ft")["pretraining"] == "copies/b/output/tube"
    shutil.move("copies/a/output/ft", "ft")  # now seen from nowhere
    message = error_of("copies", "ft", "--output", tmp_path / "out")
    assert_names(message, "error: ft:", "copies/a/output/tube", "copies/b/output/tube")


# --------------------------------------------------------------------------------------------------------- pictures


def test_pictures_are_drawn(tmp_path, campaign):
    compare(tmp_path, campaign, "--title", "Small", pictures=True)
    for name in ("curves.png", "accuracy.png"):
        pixels = matplotlib.image.imread(tmp_path / "out" / name)
        assert pixels[..., :3].std() > 0.01 and min(pixels.shape[:2]) > 300
    assert (tmp_path / "out" / "table.md").read_text().startswith("# Small\n")


def test_panels_hold_means_and_bands_of_the_seeds(tmp_path, campaign, monkeypatch):
    from tools import compare_pictures

    figures = {}
    monkeypatch.setattr(
        compare_pictures, "finish", lambda figure, path, handles: figures.update({path.stem: (figure, list(handles))})
    )
    compare(tmp_path, campaign, pictures=True)
    figure, names = figures["curves"]
    loss, lift, entropy, accuracy, *_ = panels = figure.axes
    titles = [axes.get_title() for axes in panels if axes.has_data()]
    assert titles[3:] == ["fine-tuning: validation top-1 (%)", "linear probe: validation top-1 (%)"]
    assert len(loss.lines) == len(lift.lines) == 2 and len(entropy.lines) == 1 and len(accuracy.lines) == 3
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [2.6, 1.6, 0.6])  # tube, over seeds
    heights = loss.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(0.5) and heights.max() == pytest.approx(2.7)
    colour = {axes: axes.lines[1].get_color() for axes in (loss, accuracy)}
    assert colour[loss] == colour[accuracy] == entropy.lines[0].get_color()
    assert len(names) == 3 and names[0] == "tube, mask_ratio 0.75"
    dots = figures["accuracy"][0].axes[0].lines[0].get_ydata()
    assert sorted(dots) == sorted(TUBE)


def test_the_map_has_a_cell_for_each_data_set_and_ratio(tmp_path, monkeypatch):
    from tools import compare_pictures

    figures = {}
    monkeypatch.setattr(compare_pictures, "finish", lambda figure, path, handles: figures.update({path.stem: figure}))
    gains = {("small", "0.75"): 20.0, ("small", "0.9"): 1.0, ("large", "0.9"): -8.0}
    for (data, ratio), gain in gains.items():
        for seed in range(3):
            for method, acc1 in (("tube", 40.0 + seed), ("random", 40.0 + gain + 0.5 * seed)):
                name, flags = f"{data}{ratio}{method}{seed}", ("--data_path", f"data/{data}", "--seed", str(seed))
                source = pretrain(tmp_path, name, "--mask_type", method, "--mask_ratio", ratio, *flags)
                target = f"data/{data}/four", "--seed", str(seed)
                finetune(tmp_path, f"{name}_ft", source, "--data_path", *target, acc1=acc1, videos=10_000)
                if ratio == "0.9":  # its error is less by a hundredth of the gain
                    measures = {"checkpoint": "checkpoint-2.pth", "error_moving": 1 - acc1 / 100}
                    (source / "measures.json").write_text(json.dumps(measures))
    compare(tmp_path, tmp_path, "--baseline", "tube", pictures=True)
    axes, mean_val, measured = (axes for axes in figures["map"].axes if axes.has_data())  # none of the baseline
    assert axes.get_title() == "random\nfine-tuning top-1\n- tube's"
    assert mean_val.get_title() == "random\nfine-tuning mean val\n- tube's"
    assert measured.get_title() == "random\nerror moving\n- tube's"
    np.testing.assert_allclose(measured.images[0].get_array().filled(np.nan), [[np.nan, 0.085], [np.nan, -0.005]])
    assert sorted(text.get_text().split("\n")[0] for text in measured.texts) == ["+0.085", "-0.005"]
    colours = [panel.images[0].to_rgba(panel.images[0].get_array())[0, 1] for panel in (axes, measured)]
    assert all(red > blue for red, _, blue, _ in colours)  # large at 0.9: behind in both, though the error's sign is +
    texts = {(text.get_position()[::-1], text.get_weight()): text.get_text().split("\n")[0] for text in axes.texts}
    assert texts == {((1, 0), "bold"): "+19.50", ((1, 1), "normal"): "+0.50", ((0, 1), "bold"): "-8.50"}
    for panel, places in ((axes, ["large/four", "small/four"]), (measured, ["large", "small"])):
        assert [label.get_text() for label in panel.get_yticklabels()] == places
    values = axes.images[0].get_array().filled(np.nan)
    np.testing.assert_allclose(values, [[np.nan, -8.5], [19.5, 0.5]])
    assert "map" not in {path.stem for path in (tmp_path / "out").glob("*.png")}


def test_one_place_and_scratch_make_no_map(tmp_path):
    for seed in range(2):
        for method in ("tube", "random"):
            source = pretrain(tmp_path, f"{method}{seed}", "--mask_type", method, "--seed", str(seed))
            finetune(tmp_path, f"{method}{seed}_ft", source, "--seed", str(seed))
        finetune(tmp_path, f"scratch{seed}", None, "--seed", str(seed), acc1=30.0 + seed)
    compare(tmp_path, tmp_path, "--baseline", "random", pictures=True)
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"curves.png", "accuracy.png"}


def test_panels_without_data_are_left_out(tmp_path):
    finetune(tmp_path, "fresh", None, "--disable_eval_during_finetuning")
    log = tmp_path / "fresh" / "log.txt"
    log.write_text(log.read_text().replace("val_acc1", "other"))
    compare(tmp_path, tmp_path, pictures=True)
    assert not (tmp_path / "out" / "curves.png").exists() and (tmp_path / "out" / "accuracy.png").stat().st_size > 0


# ------------------------------------------------------------------------------------------------------ the paper's


def test_papers_figures_stand_beside_the_runs_they_are_about(tmp_path):
    for method in ("tube", "tats", "motion"):
        pretrain(tmp_path, method, "--mask_type", method, "--mask_ratio", "0.9")
    text, table, _ = compare(tmp_path, tmp_path, "--paper", "table1", "--data_set", "UCF101")
    heading = "top-1, reported by the paper, not measured here"
    row = row_of(table, mask_type="tats", mask_ratio="0.9")
    assert row["paper_top1"] == "84.53" and row["paper_top5"] == "96.37" and row["runs"] == "1"
    assert row_of(table, mask_type="motion")["paper_top1"] == "" and len(table) == 10 and heading in text
    other = row_of(table, mask_type="adamae", mask_ratio="0.95")
    assert other["paper_top1"] == "80.83" and other["runs"] == "0" and other["loss_mean"] == ""
    assert "| adamae | 0.95 | - | - | - | - | - | - | - | - | - | - | 80.83 | 95.26 |" in text
    assert [row["mask_type"] for row in table][:3] == ["tube"] * 3 and "UCF101" in text.split("|")[0]


def test_papers_ablations_go_by_the_flags(tmp_path):
    pretrain(tmp_path, "l1", "--mask_type", "tats", "--loss", "l1", "--no-normalize_target")
    pretrain(tmp_path, "tube", "--seed", "1")
    _, table, _ = compare(tmp_path, tmp_path, "--paper", "table3", "--by", "loss", "normalize_target")
    assert row_of(table, loss="l1", normalize_target="False", runs="1")["paper_top1"] == "81.41"
    assert row_of(table, loss="mse", normalize_target="True", runs="1")["paper_top1"] == ""  # tube masks
    assert row_of(table, loss="mse", normalize_target="True", runs="0")["paper_top1"] == "81.75"
    _, table, _ = compare(tmp_path, tmp_path / "l1", "--paper", "table3", "--by", "tats_attention")
    assert row_of(table, tats_attention="orthoformer")["paper_memory"] == "25.36"
    _, table, _ = compare(tmp_path, tmp_path / "l1", "--paper", "table5", "--data_set", "HMDB51")
    assert row_of(table, tats_start_epoch="10", tats_rollout_steps="1", runs="1")["paper_error"] == "0.8278"
    assert row_of(table, tats_start_epoch="50", tats_rollout_steps="25")["paper_error"] == ""
    text, table, _ = compare(tmp_path, tmp_path / "l1", "--paper", "table6")
    assert row_of(table, runs="1")["paper_error"] == "0.5135" and "0.5215 / 0.7869" in text  # printed twice
    _, table, _ = compare(tmp_path, tmp_path / "l1", "--paper", "table9")
    assert row_of(table, mask_type="tube")["paper_top1"] == "59.38"


def test_papers_tables_are_whole():
    """TATS is best but for the top-5 that the text concedes, a tie and one more; top-5 is above top-1 everywhere."""
    groups = defaultdict(dict)
    for row in paper_tables.FIGURES:
        if "mask_type" in row.flags:
            metrics = groups[row.source, row.data_set, row.flags["mask_ratio"]]
            metrics[row.flags["mask_type"]] = row.metrics["top-1"], row.metrics["top-5"]
    beaten = []
    for group, methods in groups.items():
        assert set(methods) == {"tube", "adamae", "tats"} and all(top1 < top5 for top1, top5 in methods.values())
        assert max(methods, key=methods.get) == "tats"
        if methods["tats"][1] <= max(methods["tube"][1], methods["adamae"][1]):
            beaten.append(group)
    assert len(groups) == 4 * 3 + 5 * 3 + 1
    assert beaten == [(None, "HMDB51", 0.85), ("K400", "HMDB51", 0.85), ("SSv2", "HMDB51", 0.95)]


def test_the_shared_page_of_the_method_has_the_same_figures(shared_data):
    page = shared_data.parent / "METHOD.md"
    if not page.is_file():
        return  # beside the data in the project's own checkout alone; the figures above are checked anyway
    text = page.read_text()
    top1 = defaultdict(list)
    for row in paper_tables.FIGURES:
        if row.table == "table1":
            top1[row.data_set, row.flags["mask_ratio"]].append(f"{row.metrics['top-1']:.2f}")
        if row.table == "table5" and row.data_set == "UCF101":
            e, k = row.flags.values()
            error = f"{row.metrics['error']:.4f}".lstrip("0")
            assert f"({e},{k}) {error}" in text
    assert len(top1) == 4 * 3
    for (_, ratio), figures in top1.items():
        assert f"{ratio:.2f}".lstrip("0") + ": " + "/".join(figures) in text


# ----------------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_compared_is_one_line(tmp_path, campaign):
    out = ("--output", tmp_path / "out")
    (tmp_path / "bare").mkdir()
    for flags, parts in (
        (["nowhere"], ["FOLDER nowhere"]),
        ([tmp_path / "bare"], [tmp_path / "bare", "args.json", "log.txt", "test.json"]),
        ([campaign, "--baseline", "adamae"], ["--baseline adamae", "mask_type", "tube", "tats", "scratch"]),
        ([campaign, "--by", "depth"], ["--by depth", campaign / "tats0"]),
        ([campaign, "--paper", "table3"], ["--paper table3", "--by tats_attention", "--by decoder_depth"]),
        ([campaign, "--paper", "table1", "--by", "lr"], ["--paper table1", "--by mask_type mask_ratio"]),
        ([campaign, "--paper", "table1"], ["--data_set", "--paper table1", "UCF101, HMDB51, K400, SSv2"]),
        ([campaign, "--paper", "table5", "--data_set", "K400"], ["--data_set K400", "UCF101, HMDB51"]),
        ([campaign, "--data_set", "UCF101"], ["--data_set UCF101", "--paper"]),
    ):
        assert_names(error_of(*flags, *out), *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name,content,parts",
    [
        ("args.json", "{", ["JSON"]),
        ("args.json", "[]", []),
        ("args.json", "{}", ["seed", "epochs"]),
        ("args.json", '{"args": {"seed": 0, "epochs": "3"}}', ["data_path"]),
        ("test.json", '{"acc1": null}', ["acc1", "acc5"]),
    ],
)
def test_damaged_files_are_named(tmp_path, campaign, name, content, parts):
    (campaign / "fresh" / name).write_text(content)
    assert_names(error_of(campaign, "--output", tmp_path / "out"), campaign / "fresh" / name, *parts)


def test_an_output_that_is_a_file_is_an_error(tmp_path, campaign):
    (tmp_path / "file").write_text("")
    assert "file" in error_of(campaign, "--output", tmp_path / "file")
