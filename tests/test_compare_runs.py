"""tools/compare_runs.py on run folders made up here: the statistics by hand, what differs, what is left out."""

import csv
import json
import math

import pytest

from tools import compare_runs, paper_tables

T3, T2 = 4.302653, 12.706205  # quantiles 0.975 of Student's t with 2 and 1 degrees of freedom
ACC = {"tube": (50, 60, 55), "tats": (61, 66, 68)}


def pretrain(root, name, mask, seed, loss=0.6, epochs=2, done=2, **flags):
    args = dict(mask_type=mask, mask_ratio=0.75, seed=seed, epochs=epochs, data_path="/data/a/train.csv", lr=0.1,
                tats_lr=1e-4 if mask == "tats" else 1e-6) | flags  # fmt: skip
    learned = {"train_entropy": 0.9, "train_explained_variance": -0.1} if mask == "tats" else {}
    learned["train_step_time"] = 0.2 if mask == "tats" else 0.1
    log = [dict(epoch=e, train_loss=loss + done - 1 - e, train_motion_lift=1.5, **learned) for e in range(done)]
    return write(root / name / "pretrain", args, log)


def evaluate(root, name, kind, source, seed, acc1, test=True, **flags):
    args = dict(nb_classes=10, seed=seed, epochs=1, data_path="/data/a", lr=0.2, linear_probe=kind == "linear_probe",
                finetune=str(source / "checkpoint-1.pth") if source else "") | flags  # fmt: skip
    folder = write(root / name / kind, args, [dict(epoch=0, train_loss=1.0, train_step_time=0.1, val_acc1=acc1)])
    if test:
        (folder / "test.json").write_text(json.dumps({"acc1": acc1, "acc5": 90.0, "videos": 80}))
    return folder


def write(folder, args, log, git="abc"):
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"args": args, "git": git}))
    (folder / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    return folder


@pytest.fixture
def runs(tmp_path):
    for mask, accuracies in ACC.items():
        for seed, accuracy in enumerate(accuracies):
            source = pretrain(tmp_path / "runs", f"{mask}{seed}", mask, seed, loss=0.5 + 0.1 * seed)
            evaluate(tmp_path / "runs", f"{mask}{seed}", "finetune", source, seed, accuracy)
    return tmp_path / "runs"


def compared(root, *flags):
    out = root.parent / "out"
    compare_runs.main([str(root), "--output", str(out), *flags])
    with open(out / "table.csv", newline="") as file:
        return list(csv.DictReader(file)), (out / "table.md").read_text(), out


def test_means_intervals_and_the_paired_test(runs):
    (tube, tats), text, out = compared(runs, "--baseline", "tube")
    assert (tube["mask_type"], tats["mask_type"]) == ("tube", "tats")
    assert float(tube["fine-tuned top-1"]) == 55 and float(tats["fine-tuned top-1"]) == 65
    assert float(tube["fine-tuned top-1 half width"]) == pytest.approx(T3 * 5 / math.sqrt(3), rel=1e-6)
    assert float(tube["error"]) == pytest.approx(0.6)
    assert float(tats["fine-tuned - tube"]) == 10  # differences 11, 6, 13
    half = T3 * math.sqrt((1 + 16 + 9) / 2 / 3)
    assert float(tats["fine-tuned - tube half width"]) == pytest.approx(half, rel=1e-6)
    # with 2 degrees of freedom p of t is 1 - t / sqrt(2 + t^2)
    t = 10 / (half / T3)
    assert float(tats["fine-tuned - tube p"]) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)
    assert float(tats["time / tube"]) == pytest.approx(2)
    assert f"+10.0 ± {half:.1f}" in text and "differs" not in text and "probe" not in text
    for name in ("curves.png", "accuracy.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert len((out / "runs.csv").read_text().splitlines()) == 1 + 12


def test_other_differences_are_named_but_not_those_a_method_does_not_read(runs):
    path = runs / "tube1" / "pretrain" / "args.json"
    path.write_text(path.read_text().replace('"lr": 0.1', '"lr": 0.3'))
    _, text, _ = compared(runs)
    assert "pretrain: --lr differs: 0.1 in" in text and "0.3 in tube1/pretrain" in text
    assert "tats_lr" not in text  # also 1e-4 and 1e-6, but tube masks have no use for it


def test_revisions_that_differ_are_named(runs):
    path = runs / "tube1" / "finetune" / "args.json"
    path.write_text(path.read_text().replace("abc", "def"))
    assert "finetune: git revisions differ" in compared(runs)[1]


def test_unfinished_runs_are_named_and_left_out(runs):
    source = pretrain(runs, "late", "random", 0, done=1)
    evaluate(runs, "late", "finetune", source, 0, 99.0)
    evaluate(runs, "tube0", "linear_probe", runs / "tube0" / "pretrain", 0, 99.0, test=False)
    rows, text, _ = compared(runs)
    assert [row["mask_type"] for row in rows] == ["tube", "tats"]
    assert "left out, unfinished: " in text and "late/pretrain" in text and "tube0/linear_probe" in text
    assert "late/finetune started from" in text


def test_one_seed_has_wilsons_interval(tmp_path):
    source = pretrain(tmp_path / "runs", "a", "tube", 0)
    evaluate(tmp_path / "runs", "a", "finetune", source, 0, 50.0)
    rows, text, _ = compared(tmp_path / "runs", "--baseline", "tube")
    z, n = 1.959964, 80
    half = 100 * z / (1 + z * z / n) * math.sqrt(0.25 / n + z * z / (4 * n * n))
    assert f"50.0 ({50 - half:.0f} to {50 + half:.0f})" in text
    assert rows[0]["fine-tuned top-1 half width"] == "nan"


def test_scratch_and_transfer_have_rows_of_their_own(runs):
    evaluate(runs, "none", "finetune", None, 0, 40.0)
    evaluate(runs, "tube0", "linear_probe", runs / "tube0" / "pretrain", 0, 33.0, data_path="/data/b")
    rows, _, _ = compared(runs)
    keyed = {(row["mask_type"], row["fine-tuned on"]): row for row in rows}
    assert float(keyed["scratch", "a"]["fine-tuned top-1"]) == 40
    assert float(keyed["tube", "b"]["linear probe top-1"]) == 33 and keyed["tube", "b"]["fine-tuned top-1"] == ""
    assert float(keyed["tube", ""]["fine-tuned top-1"]) == 55


def test_a_moved_tree_is_still_joined(runs):
    moved = runs.parent / "elsewhere" / "runs"
    moved.parent.mkdir()
    runs.rename(moved)
    assert float(compared(moved)[0][0]["fine-tuned top-1"]) == 55


def test_two_runs_in_one_place_are_refused(runs, capsys):
    pretrain(runs, "again", "tube", 0)
    with pytest.raises(SystemExit) as end:
        compared(runs)
    assert "again" in str(end.value) and "tube0" in str(end.value) and "seed 0" in str(end.value)


@pytest.mark.parametrize(
    "damage, flags, message",
    [
        (lambda root: None, ["--by", "colour"], "--by colour"),
        (lambda root: None, ["--baseline", "frame"], "--baseline frame: no finished run"),
        (lambda root: None, ["--paper", "table1"], "--data_set (none): table1 of the paper has UCF101"),
        (lambda root: None, ["--paper", "table5"], "--by mask_type mask_ratio: table5"),
        (lambda root: None, ["--paper", "table1", "--by", "lr"], "rows by mask_type and mask_ratio"),
        (lambda root: (root / "tube0/pretrain/log.txt").write_text("{"), [], "tube0/pretrain/log.txt: cannot be read"),
        (lambda root: (root / "tube0/pretrain/args.json").write_text("[]"), [], "has no flags"),
    ],
)
def test_errors_name_what_is_wrong(runs, damage, flags, message):
    damage(runs)
    with pytest.raises(SystemExit) as end:
        compared(runs, *flags)
    assert str(end.value).startswith("error: ") and message in str(end.value)


def test_a_folder_without_runs_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="no run in it"):
        compared(tmp_path / "nothing")


def test_what_the_paper_reports_stands_beside(runs):
    for folder in ("tube0", "tats0"):  # at a ratio the paper has
        path = runs / folder / "pretrain" / "args.json"
        path.write_text(path.read_text().replace('"mask_ratio": 0.75', '"mask_ratio": 0.95'))
    rows, text, _ = compared(runs, "--paper", "table1", "--data_set", "UCF101")
    title = "top-1, reported by the paper, not measured here"
    found = {(row["mask_type"], float(row["mask_ratio"])): row[title] for row in rows}
    assert found["tats", 0.95] == "81.75" and found["tube", 0.95] == "65.86" and found["tube", 0.75] == ""
    assert found["adamae", 0.85] == "83.98"  # not run here
    assert title in text


def test_ablations_are_matched_by_their_flags(tmp_path):
    for depth in (1, 8):
        pretrain(tmp_path / "runs", f"d{depth}", "tats", 0, decoder_depth=depth)
    rows, _, _ = compared(tmp_path / "runs", "--by", "mask_ratio", "decoder_depth", "--paper", "table3")
    title = "top-1, reported by the paper, not measured here"
    assert {row["decoder_depth"]: row[title] for row in rows} == {"1": "81.46", "8": "79.1", "2": "80.83", "4": "81.75"}


def test_the_papers_tables_are_whole():
    for data_set in paper_tables.TABLE1.values():
        assert len(data_set) == 9
    assert paper_tables.TABLE1["SSv2"]["tats", 0.9] == {"top-1": 40.79, "top-5": 69.30}
    assert paper_tables.TABLE2["K400 to HMDB51"]["tats", 0.95] == {"top-1": 58.14, "top-5": 82.62}
    assert paper_tables.TABLE9["SSv2"]["adamae", 0.95] == {"top-1": 63.06, "top-5": 85.89}
    assert [len(rows) for rows in paper_tables.TABLE3.values()] == [2, 4, 4, 3]
