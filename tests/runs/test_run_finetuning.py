"""Whole runs of fine-tuning, probes and tests: modes, resume after kill -9, processes and workers, bad input."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import run_mae_pretraining
from run_class_finetuning import PROBE_DEFAULTS, check_flags, get_parser, main, parse_args
from tests.helpers.runs import assert_names, finetuning_flags, flags_read, flags_to_read, free_port, naming, read_log
from tools import compare_runs
from utils import UsageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def pretrained(labelled, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    run_mae_pretraining.main(
        ["--data_path", str(labelled / "train.csv"), "--model", "pretrain_videomae_tiny_patch8_64",
         "--input_size", "32", "--num_frames", "4", "--sampling_rate", "2", "--decoder_depth", "1",
         "--batch_size", "4", "--num_workers", "0", "--device", "cpu", "--epochs", "1", "--output_dir", str(folder)]
    )  # fmt: skip
    return folder / "checkpoint-0.pth"


def run_here(data_path, *flags) -> None:
    main(finetuning_flags(data_path, *flags))


def run(data_path, *flags, processes=1) -> str:
    command = [sys.executable]
    if processes > 1:
        command += [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--master_port",
            str(free_port()),
        ]
    command += [str(ROOT / "run_class_finetuning.py"), *finetuning_flags(data_path, *flags)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def scores(folder: Path) -> np.ndarray:
    return np.load(folder / "scores.npz")["probability"]


def weights(path: Path, key: str = "model") -> dict:
    return torch.load(path, weights_only=True)[key]


@pytest.fixture(scope="session")
def finetuned(labelled, pretrained, tmp_path_factory) -> tuple[Path, str]:
    """A finished run with everything on, and what it printed."""
    folder = tmp_path_factory.mktemp("finetuned")
    flags = ["--finetune", pretrained, "--epochs", 3, "--model_ema", "--model_ema_decay", 0.5, "--num_workers", 1]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        run_here(labelled, *flags, "--output_dir", folder, "--log_dir", folder)
    return folder, output.getvalue()


def test_everything_on(labelled, finetuned):
    folder, output = finetuned
    assert re.search(r"\b54 .*fresh.*fc_norm\.\* \(2\), head\.\* \(2\)", output)
    assert re.search(r"left.*mask_token, decoder\.\* \(17\), encoder_to_decoder\.weight, norm\.\* \(2\)", output)
    assert_names(output, "flip", "off")
    assert "clips/s" in output
    log = read_log(folder)
    assert [record["epoch"] for record in log] == [0, 1, 2]
    wanted = {"train_loss", "train_grad_norm", "train_skipped_steps", "val_acc1", "val_acc5", "val_loss"}
    assert all(wanted <= set(record) for record in log)
    best = torch.load(folder / "checkpoint-best.pth", weights_only=True)
    accuracies = [record["val_acc1"] for record in log]
    assert best["best"] == {"acc1": max(accuracies), "epoch": accuracies.index(max(accuracies))}
    result = json.loads((folder / "test.json").read_text())
    assert result["videos"] == 11 and result["unreadable"] == 0 and result["checkpoint"].endswith("checkpoint-2.pth")
    assert result["best_epoch"] == best["best"]["epoch"] and result["best_chosen_on_test_videos"] is True
    assert_names(output, "best epoch", "chosen")
    assert (result["temporal_clips"], result["spatial_crops"]) == (2, 3)
    rows = list(csv.DictReader(open(folder / "predictions.csv")))
    assert len(rows) == 11 and result["acc1"] == pytest.approx(100 * np.mean([int(row["correct"]) for row in rows]))
    assert len(list(csv.DictReader(open(folder / "per_class.csv")))) == 10
    assert (folder / "per_class.csv").read_text().splitlines()[4].startswith("3,translate_down,2,")
    assert (folder / "confusion.png").stat().st_size > 5000
    (events,) = folder.glob("events*")
    assert all(name in events.read_bytes() for name in (b"train/loss", b"val/acc1", b"train/lr"))


def test_eval_alone_repeats_the_test(labelled, finetuned, tmp_path):
    """From the run's folder (the newest), and from a file; flags are the checkpoint's; the run's args.json stays."""
    folder, _ = finetuned
    reference, described = scores(folder), (folder / "args.json").read_bytes()
    here = ["--eval", "--data_path", str(labelled), "--device", "cpu", "--num_workers", "0"]
    main([*here, "--output_dir", str(folder)])
    assert np.allclose(scores(folder), reference, atol=1e-6)  # another batch size
    assert (folder / "args.json").read_bytes() == described and (folder / "eval_args.json").exists()
    assert "acc1_best" in json.loads((folder / "test.json").read_text())  # kept from the run
    named = [*here, "--finetune", str(folder / "checkpoint-2.pth"), "--batch_size", "4"]
    state = torch.load(folder / "checkpoint-2.pth", weights_only=True)
    torch.save(state | {"args": state["args"] | {"short_side_size": 40}}, tmp_path / "cropped.pth")
    cropped = [*here, "--finetune", str(tmp_path / "cropped.pth")]
    for command, flags, sides in (
        (named, [], (32, 32)),
        (named, ["--crop_pct", "0.8"], (40, 32)),
        (named, ["--input_size", "48"], (48, 48)),
        (cropped, [], (40, 32)),
        (cropped, ["--input_size", "24"], (40, 24)),
        (cropped, ["--input_size", "48"], (48, 48)),
        (cropped, ["--input_size", "48", "--short_side_size", "56"], (56, 48)),
    ):
        args = parse_args([*command, *flags])
        check_flags(args)
        assert (args.short_side_size, args.input_size) == sides
    with pytest.raises(UsageError, match=naming("--short_side_size 40", "--input_size 48")):
        check_flags(parse_args([*cropped, "--input_size", "48", "--short_side_size", "40"]))
    main([*named, "--output_dir", str(tmp_path / "ema")])
    assert np.array_equal(scores(tmp_path / "ema"), reference)
    main([*named, "--output_dir", str(tmp_path / "raw"), "--no-model_ema"])
    assert not np.allclose(scores(tmp_path / "raw"), reference, atol=1e-6)  # the average is another model
    torch.save({"model": weights(folder / "checkpoint-2.pth")}, tmp_path / "bare.pth")
    with pytest.raises(SystemExit, match=naming("bare.pth", "--model_ema")):
        run_here(labelled, "--eval", "--model_ema", "--finetune", tmp_path / "bare.pth")
    run_here(labelled, "--eval", "--finetune", tmp_path / "bare.pth", "--output_dir", tmp_path / "bare")
    assert np.array_equal(scores(tmp_path / "bare"), scores(tmp_path / "raw"))


@pytest.mark.slow  # processes of their own; tests/runs/test_distributed.py has two
def test_processes_and_workers_change_nothing(labelled, finetuned, tmp_path):
    folder, _ = finetuned
    flags = ["--eval", "--finetune", folder / "checkpoint-best.pth", "--output_dir"]
    run_here(labelled, *flags, tmp_path / "one")
    run(labelled, *flags, tmp_path / "workers", "--num_workers", 4)
    run(labelled, *flags, tmp_path / "two", processes=2)
    run(labelled, *flags, tmp_path / "three", "--num_workers", 1, "--batch_size", 7, processes=3)
    reference = scores(tmp_path / "one")
    assert reference.shape == (11, 10) and np.allclose(reference.sum(axis=1), 1, atol=1e-5)
    assert np.array_equal(reference[3], reference[10])  # the same video twice in the list
    assert np.array_equal(scores(tmp_path / "workers"), reference)
    assert np.array_equal(scores(tmp_path / "two"), reference)
    assert np.allclose(scores(tmp_path / "three"), reference, atol=1e-6)  # other batches, other rounding
    for name in ("predictions.csv", "per_class.csv", "test.json"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()


def test_finished_run_does_nothing_and_an_interrupted_test_is_done_again(labelled, finetuned, capsys):
    folder, _ = finetuned
    flags = ["--epochs", 3, "--model_ema", "--model_ema_decay", 0.5, "--output_dir", folder]
    run_here(labelled, *flags)
    assert_names(capsys.readouterr().out, "nothing", folder / "test.json")
    reference = scores(folder)
    (folder / "test.json").unlink()
    (folder / "scores.npz").unlink()
    run_here(labelled, *flags)
    output = capsys.readouterr().out
    assert_names(output, "resumed", folder / "checkpoint-2.pth")
    assert "top-1" in output
    assert np.allclose(scores(folder), reference, atol=1e-6)  # another test may have left those of other batches


@pytest.mark.slow  # tests/runs/test_preemption.py resumes in one process
def test_resume_after_kill_gives_the_undisturbed_run(labelled, tmp_path):
    flags = ["--epochs", 5, "--save_ckpt_freq", 2, "--num_workers", 1, "--drop_path", 0.2, "--drop", 0.1, "--model_ema",
             "--model_ema_decay", 0.9, "--accum_iter", 2]  # fmt: skip
    run(labelled, *flags, "--output_dir", tmp_path / "whole")
    killed = tmp_path / "killed"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        str(ROOT / "run_class_finetuning.py"),
        *finetuning_flags(labelled, *flags, "--output_dir", killed),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    for line in process.stdout:
        if line.startswith("epoch 2 ["):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert {path.name for path in killed.glob("checkpoint-?.pth")} == {"checkpoint-0.pth", "checkpoint-1.pth"}
    assert_names(run(labelled, *flags, "--output_dir", killed), "resumed", killed / "checkpoint-1.pth")

    def without_times(folder):
        return [
            {name: v for name, v in record.items() if "time" not in name and "memory" not in name}
            for record in read_log(folder)
        ]

    assert without_times(killed) == without_times(tmp_path / "whole")
    for name in ("checkpoint-4.pth", "checkpoint-best.pth"):
        states = [torch.load(folder / name, weights_only=True) for folder in (killed, tmp_path / "whole")]
        assert states[0]["best"] == states[1]["best"]
        for key in ("model", "model_ema"):
            assert all(torch.equal(value, states[1][key][n]) for n, value in states[0][key].items())
    assert np.array_equal(scores(killed), scores(tmp_path / "whole"))


def test_best_of_a_killed_run_is_not_replaced_by_worse(labelled, finetuned, tmp_path):
    """checkpoint-best.pth may be newer than the newest checkpoint-N.pth."""
    folder, _ = finetuned
    state = torch.load(folder / "checkpoint-2.pth", weights_only=True)
    best = torch.load(folder / "checkpoint-best.pth", weights_only=True)
    torch.save(state | {"best": {"acc1": 0.0, "epoch": 0}}, tmp_path / "checkpoint-2.pth")
    torch.save(best | {"best": {"acc1": 101.0, "epoch": 3}}, tmp_path / "checkpoint-best.pth")
    run_here(labelled, "--epochs", 4, "--model_ema", "--output_dir", tmp_path)
    assert weights(tmp_path / "checkpoint-best.pth", "best") == {"acc1": 101.0, "epoch": 3}
    assert weights(tmp_path / "checkpoint-3.pth", "best") == {"acc1": 101.0, "epoch": 3}


@pytest.mark.slow
def test_two_processes_and_accumulation_follow_one_process(labelled, tmp_path):
    """Clips belong to their seed, not to the process; without mixing within a batch the global batch is the same."""
    flags = ["--epochs", 2, "--mixup", 0, "--cutmix", 0, "--drop_path", 0]
    run_here(labelled, *flags, "--output_dir", tmp_path / "one")
    run_here(labelled, *flags, "--batch_size", 2, "--update_freq", 2, "--output_dir", tmp_path / "accumulated")
    run(labelled, *flags, "--batch_size", 2, "--output_dir", tmp_path / "two", processes=2)
    reference = read_log(tmp_path / "one")
    for folder in ("accumulated", "two"):
        for record, expected in zip(read_log(tmp_path / folder), reference, strict=True):
            for name in ("train_loss", "train_acc1", "val_loss"):
                assert record[name] == pytest.approx(expected[name], rel=2e-4), (folder, name)
            assert record["val_acc1"] == expected["val_acc1"]
    assert np.allclose(scores(tmp_path / "two"), scores(tmp_path / "one"), atol=1e-4)


@pytest.mark.slow  # processes of their own; tests/runs/test_distributed.py has two
def test_processes_that_see_different_files_stop(labelled, tmp_path):
    """On disks of their own one process would resume and the other start anew, and their gradients be averaged."""
    run_here(labelled, "--epochs", 1, "--output_dir", tmp_path / "rank0")
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import run_class_finetuning\n"
        "run_class_finetuning.main([a.replace('RANK', os.environ['RANK']) for a in sys.argv[1:]])\n"
    )
    flags = finetuning_flags(labelled, "--epochs", 2, "--output_dir", tmp_path / "rankRANK")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
         str(launcher), *flags], capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode != 0
    assert_names(result.stderr, "--output_dir", "shared")


def test_between_two_kept_checkpoints_one_is_rolling(labelled, tmp_path):
    """A run killed before --save_ckpt_freq is reached has not lost everything; old ones do not pile up."""
    run_here(labelled, "--epochs", 5, "--save_ckpt_freq", 2, "--output_dir", tmp_path)
    assert {path.name for path in tmp_path.glob("checkpoint-?.pth")} == {f"checkpoint-{n}.pth" for n in (1, 3, 4)}


def test_a_folder_goes_on_with_the_run_it_holds(labelled, pretrained, finetuned, tmp_path):
    folder, _ = finetuned
    torch.save(torch.load(pretrained, weights_only=True), tmp_path / "other.pth")
    for finetune in (tmp_path / "other.pth", "no/such.pth"):
        with pytest.raises(SystemExit, match=naming(folder, pretrained, f"--finetune {finetune}")):
            run_here(labelled, "--finetune", finetune, "--model_ema", "--epochs", 3, "--output_dir", folder)
    with pytest.raises(SystemExit, match=naming("--opt sgd", folder, "adamw")):
        run_here(labelled, "--opt", "sgd", "--model_ema", "--epochs", 4, "--output_dir", folder)


def test_anothers_best_is_not_tested(labelled, finetuned, tmp_path):
    folder, _ = finetuned
    shutil.copy(folder / "checkpoint-best.pth", tmp_path)
    run_here(labelled, "--no_save_ckpt", "--no_auto_resume", "--epochs", 1, "--output_dir", tmp_path)
    assert json.loads((tmp_path / "test.json").read_text())["checkpoint"] == "the weights after epoch 0"


def test_damage_does_not_stop_a_resume(labelled, tmp_path, capsys):
    """A best checkpoint cut short, a log whose last line is torn, no git on the machine."""
    run_here(labelled, "--epochs", 2, "--output_dir", tmp_path)
    best, text = tmp_path / "checkpoint-best.pth", (tmp_path / "log.txt").read_text()
    best.write_bytes(best.read_bytes()[:1000])
    (tmp_path / "log.txt").write_text('{"Final top-1": 1}\n' + text + '{"epoch": 2, "trai')
    path = os.environ["PATH"]
    os.environ["PATH"] = str(tmp_path)
    try:
        run_here(labelled, "--epochs", 3, "--output_dir", tmp_path)
    finally:
        os.environ["PATH"] = path
    output = capsys.readouterr().out
    assert_names(output, "checkpoint-best.pth", "damaged")
    assert_names(output, "resumed", "checkpoint-1.pth")
    assert [record.get("epoch") for record in read_log(tmp_path)] == [None, 0, 1, 2]
    assert json.loads((tmp_path / "args.json").read_text())["git"] is None


def test_an_epoch_whose_validation_failed_is_validated_by_the_resume(labelled, tmp_path):
    video = labelled / (labelled / "val.csv").read_text().splitlines()[0].rsplit(" ", 1)[0]
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    (tmp_path / "val.csv").write_text(f"{video} 0\nbroken.mp4 1\n")
    flags = ["--eval_data_path", tmp_path / "val.csv", "--epochs", 1, "--output_dir", tmp_path / "out"]
    for _ in range(2):
        with pytest.raises(SystemExit, match="broken.mp4"):
            run_here(labelled, *flags)
    assert not (tmp_path / "out" / "log.txt").exists()
    run_here(labelled, *flags, "--allow_missing")
    (record,) = read_log(tmp_path / "out")
    assert record["epoch"] == 0 and {"train_loss", "val_acc1"} <= set(record)
    assert (tmp_path / "out" / "checkpoint-best.pth").exists()
    assert json.loads((tmp_path / "out" / "test.json").read_text())["unreadable"] == 1


@pytest.mark.parametrize("cache", ["--cache_features", "--no-cache_features"])
@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_probe_trains_only_its_head(kind, cache, labelled, pretrained, tmp_path):
    run_here(labelled, f"--{kind}_probe", cache, "--finetune", pretrained, "--epochs", 3, "--output_dir", tmp_path)
    before, after = weights(pretrained), weights(tmp_path / "checkpoint-2.pth")
    for name, value in after.items():
        if name.startswith("encoder."):
            assert torch.equal(value, before[name]), name
    assert {name.split(".")[0] for name in after} == {"encoder", "pool", "head"}
    log = read_log(tmp_path)
    assert log[-1]["train_loss"] < log[0]["train_loss"] and "train_acc1" in log[0]
    reference = scores(tmp_path)
    run_here(labelled, f"--{kind}_probe", "--eval", "--output_dir", tmp_path)
    assert np.array_equal(scores(tmp_path), reference)
    run_here(
        labelled, f"--{kind}_probe", "--eval", "--output_dir", tmp_path, "--batch_size", 1
    )  # of running statistics
    assert np.allclose(scores(tmp_path), reference, atol=1e-5)


def test_knn_writes_a_report_without_training(labelled, pretrained, tmp_path, capsys):
    """The votes themselves: test_finetune_engine.py, on one and two processes."""
    flags = ["--knn", 3, "--finetune", pretrained, "--test_num_segment", 1, "--test_num_crop", 1, "--output_dir"]
    run_here(labelled, *flags, tmp_path / "a")
    result = json.loads((tmp_path / "a/test.json").read_text())
    assert result["checkpoint"] == str(pretrained) and result["knn"] == 3 and result["videos"] == 11
    assert result["acc1"] == pytest.approx(100 * (scores(tmp_path / "a").argmax(1) == label_of(labelled)).mean())
    assert_names(capsys.readouterr().out, "macro-F1", f"{result['macro_f1']:.2f}", f"{result['acc1']:.2f}")
    assert not list((tmp_path / "a").glob("*.pth")) and (tmp_path / "a/per_class.csv").exists()
    run_here(labelled, *flags, tmp_path / "a")
    assert_names(capsys.readouterr().out, "nothing", tmp_path / "a/test.json")
    run_here(labelled, *flags, tmp_path / "b")
    assert (tmp_path / "b/scores.npz").read_bytes() == (tmp_path / "a/scores.npz").read_bytes()
    compare_runs.main([str(pretrained.parent), str(tmp_path / "a"), "--output", str(tmp_path / "table")])
    assert "kNN top-1 (%)" in (tmp_path / "table/table.md").read_text()
    assert f"{result['acc1']:.2f} (one run" in (tmp_path / "table/table.md").read_text()
    with pytest.raises(SystemExit, match=naming("--output_dir", pretrained.parent)):
        run_here(labelled, *flags, pretrained.parent)


def label_of(folder: Path) -> np.ndarray:
    return np.array([int(line.rsplit(" ", 1)[1]) for line in (folder / "val.csv").read_text().splitlines()])


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_every_reader_of_the_accuracy_knows_other_tasks(task, labelled, tmp_path, capsys):
    """Lists, training, the best epoch, the log, the test, --eval, resume and the comparison."""
    several = {"multi_label": lambda k: f"{k},{(k + 3) % 10}" if k else "-1", "regression": lambda k: f"{k / 10},{-k}"}
    for split in ("train", "val"):
        lines = [line.rsplit(" ", 1) for line in (labelled / f"{split}.csv").read_text().splitlines()]
        text = "".join(f"{labelled / path} {several[task](int(k))}\n" for path, k in lines)
        (tmp_path / f"{split}.csv").write_text(text)
    metric, best = {"multi_label": ("mAP", max), "regression": ("mae", min)}[task]
    flags = [
        "--task",
        task,
        "--nb_classes",
        {"multi_label": 10, "regression": 2}[task],
        "--output_dir",
        tmp_path / "out",
    ]
    run_here(tmp_path, *flags, "--epochs", 2)
    run_here(tmp_path, *flags, "--epochs", 3)  # resumes
    log = read_log(tmp_path / "out")
    values = [record[f"val_{metric}"] for record in log]
    state = torch.load(tmp_path / "out/checkpoint-best.pth", weights_only=True)
    assert state["best"] == {metric: best(values), "epoch": values.index(best(values))}
    assert log[-1]["train_loss"] < log[0]["train_loss"] and "train_acc1" not in log[0]
    result = json.loads((tmp_path / "out/test.json").read_text())
    stored = np.load(tmp_path / "out/scores.npz")
    if task == "multi_label":
        assert set(np.unique(stored["label"])) == {0, 1} and (stored["label"][0] == 0).all()
        assert 0 < result["mAP"] <= 100 and ((stored["probability"] > 0) & (stored["probability"] < 1)).all()
    else:
        assert result["mae"] == pytest.approx(np.abs(stored["probability"] - stored["label"]).mean(), rel=1e-6)
    assert f"{metric}_best" in result and result["best_epoch"] == state["best"]["epoch"]
    reference = stored["probability"]
    main(["--eval", "--data_path", str(tmp_path), "--device", "cpu", "--num_workers", "0", "--batch_size", "4",
          "--output_dir", str(tmp_path / "out")])  # fmt: skip
    assert np.array_equal(scores(tmp_path / "out"), reference)
    capsys.readouterr()
    compare_runs.main([str(tmp_path / "out"), "--output", str(tmp_path / "table")])
    assert f"{result[metric]:.{2 if task == 'multi_label' else 4}f}" in (tmp_path / "table/table.md").read_text()
    assert metric in (tmp_path / "table/runs.csv").read_text() and (tmp_path / "table/accuracy.png").exists()
    if task == "multi_label":  # as many outputs, of another kind
        with pytest.raises(SystemExit, match=naming("checkpoint-2.pth", "--task single_label")):
            run_here(labelled, "--epochs", 4, "--output_dir", tmp_path / "out")


@pytest.mark.slow
def test_probe_of_two_processes_and_resume(labelled, pretrained, tmp_path):
    flags = ["--linear_probe", "--finetune", pretrained, "--batch_size", 2, "--save_ckpt_freq", 1, "--epochs", 3]
    run(labelled, *flags, "--output_dir", tmp_path / "whole", processes=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (tmp_path / "resumed" / "checkpoint-2.pth").unlink()
    output = run(labelled, *flags, "--output_dir", tmp_path / "resumed", processes=2)
    assert_names(output, "resumed", tmp_path / "resumed" / "checkpoint-1.pth")
    whole, resumed = (read_log(tmp_path / name) for name in ("whole", "resumed"))
    for name in ("train_loss", "train_acc1", "val_acc1", "val_loss"):
        assert [record[name] for record in resumed] == [record[name] for record in whole]


@pytest.mark.parametrize(
    "flags",
    [
        ["--use_cls", "--smoothing", 0, "--mixup", 0, "--cutmix", 0, "--aa", "none", "--remode", "const"],
        ["--use_checkpoint", "--amp", "bf16", "--remode", "rand", "--recount", 3, "--reprob", 1, "--resplit"],
        ["--model_ema", "--model_ema_force_cpu", "--mixup_mode", "pair", "--train_interpolation", "random"],
        ["--cutmix_minmax", 0.2, 0.8, "--mixup_prob", 0.5, "--mixup_switch_prob", 1, "--mixup_mode", "elem"],
        ["--disable_eval_during_finetuning", "--aa", "augmix-m5-w4-d2", "--attn_drop_rate", 0.1, "--fc_drop_rate", 0.5],
        ["--no_save_ckpt", "--aa", "v0", "--opt", "sgd", "--lr", 0.01, "--layer_decay", 1, "--clip_grad", 1],
        ["--data_set", "UCF101", "--nb_classes", 101, "--flip", "--num_segments", 4, "--dist_eval"],
        ["--data_set", "SSV2", "--nb_classes", 174, "--short_side_size", 36, "--weight_decay", 0],
        ["--tubelet_size", 1, "--patch_size", 16, "--crop_pct", 0.875, "--no-imagenet_default_mean_and_std"],
        ["--weight_decay_end", 0.2, "--init_scale", 1, "--warmup_steps", 2, "--num_sample", 1, "--crop_scale", 0.5, 1],
    ],
    ids=lambda flags: flags[0],
)
def test_flags_are_taken(flags, labelled, tmp_path):
    run_here(labelled, *flags, "--epochs", 2, "--test_num_segment", 1, "--test_num_crop", 1, "--output_dir", tmp_path)
    assert np.isfinite(scores(tmp_path)).all() and (scores(tmp_path) > 0).any()
    assert bool(list(tmp_path.glob("*.pth"))) != ("--no_save_ckpt" in flags)
    assert (tmp_path / "checkpoint-best.pth").exists() == (
        flags[0] not in ("--no_save_ckpt", "--disable_eval_during_finetuning")
    )


def test_single_view_test_is_the_validation(labelled, tmp_path):
    run_here(labelled, "--epochs", 1, "--test_num_segment", 1, "--test_num_crop", 1, "--output_dir", tmp_path)
    result, record = json.loads((tmp_path / "test.json").read_text()), read_log(tmp_path)[0]
    assert result["acc1"] == record["val_acc1"] and result["loss"] == pytest.approx(record["val_loss"], rel=1e-6)


def test_foreign_checkpoints(labelled, pretrained, tmp_path, capsys):
    """VideoMAE's .pth (Namespace, encoder.), DeepSpeed's (module), AdaMAE's with its sampler, a bare one."""
    state = weights(pretrained)
    sampler = {"encoder.get_token_probs.0.weight": torch.zeros(3), "encoder.pos_embed_probs": torch.zeros(3)}
    files = {
        "videomae": {"model": state, "args": Namespace(num_frames=4), "epoch": 1},
        "deepspeed": {"module": state},
        "adamae": {"model": state | sampler},
        "bare": {f"module.{name}": value for name, value in state.items()},
        "tensors": state,
    }
    results = []
    for name, content in files.items():
        path = tmp_path / f"{name}.{'safetensors' if name == 'tensors' else 'pth'}"
        (safetensors.torch.save_file if name == "tensors" else torch.save)(content, path)
        run_here(labelled, "--finetune", path, "--epochs", 1, "--output_dir", tmp_path / name)
        results.append(scores(tmp_path / name))
        output = capsys.readouterr().out
        assert_names(output, 54, "fc_norm.* (2)")
        assert ("pos_embed_probs" in output) == (name == "adamae")
    assert all(np.array_equal(result, results[0]) for result in results)


def test_other_frames_and_size_and_a_learned_position_table(labelled, pretrained, tmp_path, capsys):
    run_here(labelled, "--finetune", pretrained, "--num_frames", 8, "--input_size", 40, "--epochs", 1)
    state = weights(pretrained)
    table = torch.randn(1, 2 * 4 * 4, 96)
    torch.save({"model": state | {"encoder.pos_embed": table}, "args": {"num_frames": 4}}, tmp_path / "learned.pth")
    run_here(labelled, "--finetune", tmp_path / "learned.pth", "--num_frames", 8, "--input_size", 40, "--epochs", 1,
             "--lr", 1e-9, "--output_dir", tmp_path / "out")  # fmt: skip
    assert_names(capsys.readouterr().out, 55, "fc_norm.* (2)")
    kept = weights(tmp_path / "out" / "checkpoint-0.pth")["pos_embed"]
    expected = torch.nn.functional.interpolate(
        table.transpose(1, 2).reshape(1, 96, 2, 4, 4), size=(4, 5, 5), mode="trilinear"
    )
    assert torch.allclose(kept, expected.reshape(1, 96, 100).transpose(1, 2), atol=1e-5)
    run_here(
        labelled, "--num_frames", 8, "--input_size", 40, "--eval", "--output_dir", tmp_path / "out"
    )  # learned again


# --- bad input ---------------------------------------------------------------------------------------------------


def bad_inputs():
    """(name, flags, parts the one-line error must have); LIST has a label 10, HEADLESS is a pre-training checkpoint."""
    yield "no folder", ["--data_path", "no/such"], ["no/such"]
    yield (
        "label beyond the classes",
        ["--data_path", "LIST", "--eval_data_path", "LIST"],
        ["line 2", "label 10", "--nb_classes"],
    )
    yield (
        "list without validation",
        ["--data_path", "GOOD", "--batch_size", "1", "--num_sample", "2"],
        ["--eval_data_path"],
    )
    yield "validation video missing", ["--eval_data_path", "MISSING"], ["missing.mp4", "--allow_missing", "1 of 2"]
    yield "validation video broken", ["--eval_data_path", "BROKEN"], ["broken.mp4", "check_videos", "1 of 2"]
    yield "all broken", ["--eval_data_path", "ALLBROKEN", "--allow_missing"], ["broken.mp4", "1 of 1"]
    yield "classes of UCF101", ["--data_set", "UCF101"], ["--nb_classes 10", "101", "custom"]
    yield "no augmentation", ["--aa", "rand-x9"], ["--aa rand-x9"]
    yield "unknown augmentation", ["--aa", "bogus"], ["--aa bogus"]
    yield "crops do not fit", ["--short_side_size", "24"], ["--short_side_size 24", "--input_size 32"]
    yield "both sizes", ["--short_side_size", "40", "--crop_pct", "0.9"], ["--short_side_size", "--crop_pct"]
    yield "segments", ["--num_segments", "3"], ["--num_segments 3", "--num_frames 4"]
    yield "two probes", ["--linear_probe", "--attentive_probe"], ["--linear_probe", "--attentive_probe"]
    yield "probe with mixup", ["--linear_probe", "--mixup", "0.8"], ["--mixup", "--no-cache_features"]
    yield "probe with layer decay", ["--linear_probe", "--layer_decay", "0.7"], ["--layer_decay 0.7"]
    yield "probe with dropout", ["--linear_probe", "--drop", "0.1"], ["--drop"]
    yield "linear probe of one clip", ["--linear_probe", "--batch_size", "1", "--num_sample", "1"], ["--batch_size 1"]
    yield "nothing to store", ["--no-cache_features"], ["--no-cache_features"]
    yield "resplit of one clip", ["--resplit", "--num_sample", "1"], ["--resplit", "--num_sample 1"]
    yield "decay that cannot change", ["--weight_decay", "0", "--weight_decay_end", "1"], ["--weight_decay_end"]
    yield "no such epoch", ["--start_epoch", "7"], ["--start_epoch 7"]
    yield "odd batch", ["--batch_size", "3", "--num_sample", "1"], ["--batch_size 3", "--num_sample 1"]
    yield "layer decay", ["--layer_decay", "0"], ["--layer_decay 0"]
    yield "smoothing", ["--smoothing", "1"], ["--smoothing 1"]
    yield "probability", ["--reprob", "1.5"], ["--reprob 1.5"]
    yield "crop scale", ["--crop_scale", "0.9", "0.5"], ["--crop_scale 0.9 0.5"]
    yield "views", ["--test_num_segment", "0"], ["--test_num_segment 0"]
    yield "model", ["--model", "pretrain_videomae_base_patch16_224"], ["--model", "vit_base_patch16_224"]
    yield "nothing to test", ["--eval"], ["--eval", "--finetune"]
    yield "test of a pre-training checkpoint", ["--eval", "--finetune", "HEADLESS"], ["pretrained.pth", "classifier"]
    yield "other width", ["--finetune", "HEADLESS", "--model", "vit_small_patch16_224"], ["pretrained.pth", "--model"]
    yield "no such prefix", ["--finetune", "HEADLESS", "--model_prefix", "student."], ["--model_prefix student."]
    yield "no such key", ["--finetune", "HEADLESS", "--model_key", "teacher"], ["pretrained.pth", "'teacher'"]
    yield "resume from weights alone", ["--resume", "HEADLESS"], ["pretrained.pth"]
    yield "no checkpoint", ["--finetune", "no.pth"], ["no.pth"]
    yield "cutmix range", ["--cutmix_minmax", "0.5", "0.51"], ["--cutmix_minmax 0.5 0.51"]
    yield "few classes", ["--nb_classes", "1"], ["--nb_classes", "2"]


@pytest.mark.parametrize("name,flags,parts", [pytest.param(*case, id=case[0]) for case in bad_inputs()])
def test_bad_input_gets_one_clear_error(name, flags, parts, labelled, pretrained, tmp_path):
    video = (labelled / "val.csv").read_text().splitlines()[0].rsplit(" ", 1)[0]
    good = f"{labelled / video} 0\n"
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    lists = {
        "LIST": good + good.replace(" 0", " 10"),
        "GOOD": good,
        "MISSING": good + "missing.mp4 1\n",
        "BROKEN": good + "broken.mp4 1\n",
        "ALLBROKEN": "broken.mp4 1\n",
    }
    for key, text in lists.items():
        (tmp_path / f"{key}.csv").write_text(text)
    paths = {key: str(tmp_path / f"{key}.csv") for key in lists} | {"HEADLESS": str(tmp_path / "pretrained.pth")}
    torch.save({"model": weights(pretrained), "step": 1}, tmp_path / "pretrained.pth")
    flags = [paths.get(flag, flag) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        run_here(labelled, "--epochs", 1, "--output_dir", tmp_path / "out", *flags)
    message = str(stop.value)
    assert message.startswith("error: ") and message.count("\n") == 0
    for part in parts:
        assert part in message
    if name == "validation video broken":  # the epoch that came before it is not lost
        assert (tmp_path / "out" / "checkpoint-0.pth").exists()


def test_custom_needs_its_number_of_classes():
    with pytest.raises(SystemExit, match=naming("--data_set custom", "--nb_classes")):
        main(["--data_set", "custom"])


def test_a_missing_video_counts_as_wrong_where_allowed(labelled, finetuned, tmp_path, capsys):
    folder, _ = finetuned
    lines = [f"{labelled}/{line}" for line in (labelled / "val.csv").read_text().splitlines()]
    (tmp_path / "list.csv").write_text("\n".join([*lines, f"{tmp_path}/gone.mp4 3"]) + "\n")
    run_here(labelled, "--eval", "--model_ema", "--finetune", folder / "checkpoint-2.pth", "--allow_missing",
             "--test_data_path", tmp_path / "list.csv", "--output_dir", tmp_path)  # fmt: skip
    assert_names(capsys.readouterr().out, "wrong", f"{tmp_path}/gone.mp4")
    result, whole = (json.loads((f / "test.json").read_text()) for f in (tmp_path, folder))
    assert (result["videos"], result["unreadable"]) == (12, 1)
    assert result["acc1"] == pytest.approx(whole["acc1"] * 11 / 12) and result["loss"] == pytest.approx(whole["loss"])
    assert (tmp_path / "predictions.csv").read_text().splitlines()[-1] == f"{tmp_path}/gone.mp4,3,0"


# --- flags -------------------------------------------------------------------------------------------------------


def test_data_sets_decide():
    def resolved(*flags):
        args = parse_args([*flags, "--device", "cpu"])
        check_flags(args)
        return args.nb_classes, args.num_segments, args.flip, args.short_side_size

    assert resolved() == (400, 1, True, 224)
    assert resolved("--data_set", "SSV2", "--num_frames", "8") == (174, 8, False, 224)
    assert resolved("--data_set", "UCF101", "--no-flip", "--crop_pct", "0.875") == (101, 1, False, 256)
    assert resolved("--data_set", "HMDB51", "--input_size", "112", "--num_segments", "2") == (51, 2, True, 112)
    assert resolved("--data_set", "custom", "--nb_classes", "7", "--short_side_size", "256") == (7, 1, True, 256)


def test_probes_have_their_own_defaults():
    args = vars(parse_args(["--linear_probe", "--weight_decay", "0.3"]))
    assert {name: args[name] for name in PROBE_DEFAULTS} == PROBE_DEFAULTS | {"weight_decay": 0.3}
    assert parse_args([]).mixup == 0.8


def test_every_flag_is_read():
    """A flag nobody reads would be a promise nobody keeps."""
    read = flags_read(("run_mae_vis.py", "run_mae_pretraining.py"))
    # crop_pct becomes short_side_size in check_flags
    assert flags_to_read(get_parser()) - {"crop_pct"} - read == set()
