"""Whole runs, as a user starts them: every mask type, resume after kill -9, two processes, bad input."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from run_mae_pretraining import SAMPLERS, build_mae, build_sampler, get_parser, main
from runtime.launch import run_script
from runtime.outputs import SummaryWriter
from tests.helpers.runs import (
    TINY,
    assert_names,
    command,
    flags_read,
    flags_to_read,
    free_port,
    naming,
    read_log,
    run_here,
)

ROOT = Path(__file__).resolve().parents[2]


def losses(folder: Path) -> dict[int, float]:
    return {record["epoch"]: record["train_loss"] for record in read_log(folder)}


tats_and_slowly_the_others = pytest.mark.parametrize(
    "mask_type", ["tats", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tube", "adamae"))]
)
LEARNED = {
    "adamae": {"reward", "entropy", "sampling_loss"},
    "tats": {"reward", "value", "explained_variance", "policy_loss", "value_loss", "entropy", "approx_kl",
             "clip_fraction"},
}  # fmt: skip


@pytest.mark.parametrize("mask_type", SAMPLERS)
def test_every_mask_type_trains_and_logs(mask_type, shapes, tmp_path, capsys):
    run_here(shapes, "--mask_type", mask_type, "--epochs", 2, "--tats_start_epoch", 1, "--output_dir", tmp_path)
    output = capsys.readouterr().out
    record = read_log(tmp_path)[-1]
    assert record["epoch"] == 1
    wanted = {"loss", "motion_lift", "data_time", "step_time"} | LEARNED.get(mask_type, set())
    assert {f"train_{name}" for name in wanted} <= set(record)
    assert all(isinstance(record[f"train_{name}"], float) for name in wanted)
    assert "clips/s" in output and "left" in output and "warning" not in output
    state = torch.load(tmp_path / "checkpoint-1.pth", weights_only=True)
    assert state["args"]["mask_type"] == mask_type
    assert (mask_type in state) == (mask_type in LEARNED)
    assert not any("sampler" in name or "pos_embed" in name for name in state["model"])
    assert json.loads((tmp_path / "args.json").read_text())["args"]["mask_ratio"] == 0.75


@pytest.mark.parametrize(
    "flags",
    [
        ["--tats_attention", "trajectory", "--tats_blocks", "2"],
        ["--tats_attention", "mha", "--normalize_advantage", "--softmax_temp", "0.5"],
        ["--tats_rollout_steps", "2", "--ppo_epochs", "3", "--num_landmarks", "4", "--accum_iter", "1"],
        ["--accum_iter", "2", "--loss", "l1", "--no-normalize_target", "--amp", "bf16", "--clip_grad", "0.1"],
        ["--normlize_target", "False", "--num_sample", "2", "--crop", "random_resized", "--color_jitter", "0.4",
         "--train_interpolation", "random", "--decoder", "pyav", "--no-imagenet_default_mean_and_std"],
        ["--opt", "sgd", "--momentum", "0.5", "--weight_decay_end", "0.2", "--warmup_steps", "1", "--use_checkpoint",
         "--drop_path", "0.1", "--no_pin_mem", "--patch_size", "16", "--tubelet_size", "1"],
    ],
    ids=["trajectory", "mha", "rollout", "accumulation", "data", "optimizer"],
)  # fmt: skip
def test_flags_of_tats_and_data(flags, shapes, tmp_path):
    run_here(shapes, "--mask_type", "tats", "--tats_start_epoch", 0, "--epochs", 1, "--output_dir", tmp_path, *flags)
    assert read_log(tmp_path)[0]["train_loss"] > 0


def test_two_passes_leave_the_recorded_policy(shapes, tmp_path):
    """One pass at k = 1 has every ratio exactly 1; a second pass compares the moved policy with the recorded one."""
    kl = {}
    for passes in (1, 2):
        run_here(shapes, "--mask_type", "tats", "--tats_start_epoch", 0, "--epochs", 1, "--ppo_epochs", passes,
            "--tats_lr", 0.05, "--output_dir", tmp_path / str(passes))  # fmt: skip
        kl[passes] = read_log(tmp_path / str(passes))[0]["train_approx_kl"]
    assert kl[1] == 0 and kl[2] > 0


def test_a_sampler_that_never_starts_is_said(shapes, capsys):
    run_here(shapes, "--mask_type", "tats", "--epochs", 1, "--tats_start_epoch", 1)
    assert_names(capsys.readouterr().out, "warning: --tats_start_epoch 1", "--epochs 1", "random")


@tats_and_slowly_the_others
def test_resume_after_kill_gives_the_undisturbed_run(mask_type, shapes, tmp_path, capsys):
    flags = [
        "--mask_type",
        mask_type,
        "--epochs",
        4,
        "--tats_start_epoch",
        1,
        "--save_ckpt_freq",
        1,
        "--drop_path",
        0.1,
    ]
    flags += ["--num_workers", 1]  # starting a loader must not move the process's own random state
    run_here(shapes, *flags, "--output_dir", tmp_path / "whole")

    killed = tmp_path / "killed"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command(shapes, *flags, "--output_dir", killed, "--print_freq", 1), stdout=subprocess.PIPE, text=True, env=env
    )
    for line in process.stdout:
        if line.startswith("epoch 2 [1/2]"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoint-2.pth").exists()
    run_here(shapes, *flags, "--output_dir", killed)
    assert_names(capsys.readouterr().out, "resumed", killed / "checkpoint-1.pth")

    assert losses(killed) == losses(tmp_path / "whole")
    assert [record["epoch"] for record in read_log(killed)] == [0, 1, 2, 3]
    states = [torch.load(f / "checkpoint-3.pth", weights_only=True) for f in (killed, tmp_path / "whole")]
    for key in {"model", mask_type} & set(states[0]):
        for name, value in states[0][key].items():
            assert torch.equal(value, states[1][key][name]), name


def test_finished_run_does_nothing_and_truncated_newest_checkpoint_is_passed_over(shapes, tmp_path, capsys):
    def run(*arguments):
        run_here(*arguments)
        return capsys.readouterr().out

    flags = ["--mask_type", "random", "--epochs", 2, "--save_ckpt_freq", 1, "--output_dir", tmp_path]
    run(shapes, *flags)
    assert_names(run(shapes, *flags), "nothing", 2)
    newest = tmp_path / "checkpoint-1.pth"
    newest.write_bytes(newest.read_bytes()[:1000])
    output = run(shapes, *flags)
    assert_names(output, "warning: ", newest, "damaged")
    assert_names(output, "resumed", tmp_path / "checkpoint-0.pth")


@pytest.mark.slow  # tests/runs/test_distributed.py has two processes too
@pytest.mark.parametrize("mask_type", ["tats", "tube", "adamae"])
def test_two_processes_and_accumulation_follow_one_process(mask_type, shapes, tmp_path):
    """Masks and crops belong to the clip, not to the process, so the global batch is the same. AdaMAE's sampler has
    dropout, whose draws do depend on the process: its losses agree only loosely."""
    flags = ["--mask_type", mask_type, "--epochs", 3, "--tats_start_epoch", 1]
    run_here(shapes, *flags, "--output_dir", tmp_path / "one")
    halves = [*flags, "--batch_size", 2]
    run_here(shapes, *halves, "--accum_iter", 2, "--output_dir", tmp_path / "accumulated")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
         *command(shapes, *halves, "--output_dir", tmp_path / "two")[1:]],
        check=True, env=env, timeout=300, capture_output=True,
    )  # fmt: skip
    tolerance = 0.02 if mask_type == "adamae" else 1e-5
    reference = losses(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(reference, rel=tolerance)
    assert losses(tmp_path / "accumulated") == pytest.approx(reference, rel=tolerance)


def test_finetune_starts_from_the_weights_of_a_checkpoint(shapes, tmp_path):
    run_here(shapes, "--mask_type", "tube", "--epochs", 1, "--output_dir", tmp_path / "first")
    source = tmp_path / "first" / "checkpoint-0.pth"
    tiny_lr = ["--lr", 1e-12, "--warmup_lr", 0, "--min_lr", 0, "--weight_decay", 0]
    run_here(
        shapes,
        "--mask_type",
        "tats",
        "--epochs",
        1,
        "--finetune",
        source,
        "--output_dir",
        tmp_path / "second",
        *tiny_lr,
    )
    first, second = (torch.load(p, weights_only=True)["model"] for p in (source, tmp_path / "second/checkpoint-0.pth"))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_unreadable_videos_are_replaced_counted_and_named(shapes, tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    listed = [f"{shapes.parent / line}" for line in shapes.read_text().splitlines()[:7]]
    (tmp_path / "list.csv").write_text("\n".join([*listed, f"{broken} 0"]) + "\n")
    run_here(tmp_path / "list.csv", "--mask_type", "random", "--epochs", 1, "--output_dir", tmp_path / "out")
    assert_names(capsys.readouterr().out, "replaced", broken)
    assert read_log(tmp_path / "out")[0]["train_unreadable_videos"] >= 1


def bad_inputs():
    """(name, flags, list text or None, parts the one-line error must have)"""
    yield "no list", ["--data_path", "no/such/list.csv"], None, ["no/such/list.csv"]
    yield "label missing", [], "a.mp4 0\nb.mp4\n", ["list.csv, line 2", "'b.mp4'"]
    yield "label not a number", [], "a.mp4 0\nb.mp4 cat\n", ["list.csv, line 2", "'cat'"]
    yield "empty list", [], "\n", ["list.csv"]
    yield "no video readable", [], "a.mp4 0\n" * 8, ["list.csv", "/a.mp4"]
    yield "fewer videos than a batch", ["--batch_size", "64"], "a.mp4 0\n", ["list.csv", "--batch_size", "64"]
    yield "ratio 0", ["--mask_ratio", "0"], "a.mp4 0\n" * 8, ["--mask_ratio 0"]
    yield "ratio 1", ["--mask_ratio", "1"], "a.mp4 0\n" * 8, ["--mask_ratio 1"]
    yield "ratio leaves nothing", ["--mask_ratio", "0.999"], "a.mp4 0\n" * 8, ["--mask_ratio 0.999"]
    yield "input size", ["--input_size", "30"], "a.mp4 0\n" * 8, ["--input_size", "--patch_size"]
    yield "frames", ["--num_frames", "5"], "a.mp4 0\n" * 8, ["--num_frames", "--tubelet_size"]
    yield "model", ["--model", "vit_base_patch16_224"], "a.mp4 0\n" * 8, ["--model", "pretrain_videomae_base"]
    yield "optimizer", ["--opt", "adamx"], "a.mp4 0\n" * 8, ["--opt adamx"]
    yield "accumulation", ["--accum_iter", "9"], "a.mp4 0\n" * 8, ["--accum_iter 9"]
    yield "zero epochs", ["--epochs", "0"], "a.mp4 0\n" * 8, ["--epochs 0"]
    yield "clipping below 0", ["--clip_grad", "-1"], "a.mp4 0\n" * 8, ["--clip_grad -1"]
    yield "negative seed", ["--seed", "-1"], "a.mp4 0\n" * 8, ["--seed -1"]
    yield "one beta", ["--opt_betas", "0.9"], "a.mp4 0\n" * 8, ["--opt_betas"]
    yield "beta of 1.5", ["--opt_betas", "0.9", "1.5"], "a.mp4 0\n" * 8, ["--opt_betas"]
    yield "drop path", ["--drop_path", "1.5"], "a.mp4 0\n" * 8, ["--drop_path 1.5"]
    yield "patch size", ["--patch_size", "0"], "a.mp4 0\n" * 8, ["--patch_size 0"]
    yield "output is a file", ["--output_dir", "LIST"], "a.mp4 0\n" * 8, ["--output_dir", "list.csv"]
    yield "negative rate", ["--lr", "-1"], "a.mp4 0\n" * 8, ["--lr -1"]
    yield "no checkpoint", ["--resume", "no.pth"], "a.mp4 0\n" * 8, ["no.pth"]
    yield "not a checkpoint", ["--resume", "LIST"], "a.mp4 0\n" * 8, ["list.csv", "checkpoint"]
    yield "checkpoint of another size", ["--finetune", "OTHER"], "a.mp4 0\n" * 8, ["other.pth", "--model", "mask_token"]
    yield "weights without optimizer", ["--resume", "OTHER"], "a.mp4 0\n" * 8, ["other.pth", "--finetune"]
    if not torch.cuda.is_available():
        yield "no gpu", ["--device", "cuda"], "a.mp4 0\n" * 8, ["--device cuda"]


@pytest.mark.parametrize("name,flags,text,parts", [pytest.param(*case, id=case[0]) for case in bad_inputs()])
def test_bad_input_gets_one_clear_error(name, flags, text, parts, tmp_path, capsys, monkeypatch):
    list_path, other = tmp_path / "list.csv", tmp_path / "other.pth"
    if text is not None:
        list_path.write_text(text)
    torch.save({"model": {"mask_token": torch.zeros(1, 1, 7)}}, other)
    flags = [{"LIST": str(list_path), "OTHER": str(other)}.get(flag, flag) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        main(["--data_path", str(list_path), *TINY, "--mask_type", "random", *flags])
    message = str(stop.value)
    assert message.startswith("error: ") and message.count("\n") <= 1
    for part in parts:
        assert part in message


def test_error_of_a_loader_process_is_one_line(tmp_path, capfd):
    (tmp_path / "list.csv").write_text("a.mp4 0\n" * 8)
    with pytest.raises(SystemExit) as stop:
        run_here(tmp_path / "list.csv", "--mask_type", "random", "--num_workers", 1)
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value).strip()
    assert_names(stop.value, tmp_path / "list.csv", tmp_path / "a.mp4")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_tensorboard_has_the_training_curves(shapes, tmp_path):
    run_here(shapes, "--mask_type", "tats", "--tats_start_epoch", 0, "--epochs", 1, "--log_dir", tmp_path)
    (events,) = tmp_path.glob("events*")
    content = events.read_bytes()
    for name in (b"train/loss", b"train/motion_lift", b"train/entropy", b"train/lr"):
        assert name in content


def test_tubes_may_leave_less_than_random_masks_could(shapes, tmp_path):
    """A ratio at which random masks would show no token, and tubes show one per frame."""
    run_here(shapes, "--mask_type", "tube", "--mask_ratio", 0.9, "--patch_size", 16, "--epochs", 1,
             "--output_dir", tmp_path)  # fmt: skip
    assert read_log(tmp_path)[0]["train_loss"] > 0


def test_temperature_and_logit_cap_reach_the_sampler():
    flags = ["--data_path", "x", *TINY, "--mask_type", "tats", "--softmax_temp", "0.5", "--tats_logit_cap", "2"]
    args = get_parser().parse_args(flags)
    sampler = build_sampler(args, build_mae(args))
    assert (sampler.temperature, sampler.logit_cap) == (0.5, 2.0)


def test_every_flag_is_read():
    """A flag nobody reads would be a promise nobody keeps."""
    read = flags_read(("run_mae_vis.py", "run_class_finetuning.py"))
    assert flags_to_read(get_parser()) - read == set()


def test_killed_while_saving_keeps_the_older_checkpoint(shapes, tmp_path, capsys):
    """Temporary files are never taken for checkpoints."""
    flags = ["--mask_type", "random", "--epochs", 2, "--save_ckpt_freq", 1, "--output_dir", tmp_path]
    run_here(shapes, *flags[:3], 1, *flags[4:])
    (tmp_path / "checkpoint-1.pth.tmp").write_bytes(b"half a file")
    capsys.readouterr()
    run_here(shapes, *flags)
    assert_names(capsys.readouterr().out, "resumed", tmp_path / "checkpoint-0.pth")
    assert time.time() - (tmp_path / "checkpoint-1.pth").stat().st_mtime < 60


def test_flags_are_recorded_as_given(shapes, tmp_path):
    """The scaled learning rate belongs to the run; replaying args.json must not scale twice."""
    run_here(shapes, "--mask_type", "random", "--epochs", 1, "--output_dir", tmp_path)
    assert json.loads((tmp_path / "args.json").read_text())["args"]["lr"] == 0.01
    assert torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)["args"]["lr"] == 0.01
    assert read_log(tmp_path)[0]["train_skipped_steps"] == 0


def test_old_spellings_are_understood():
    args = get_parser().parse_args(["--mask_type", "learnable", "--local-rank=1", "--no_pin_mem", "--no_auto_resume"])
    assert (args.mask_type, args.local_rank, args.pin_mem, args.auto_resume) == ("adamae", 1, False, False)


def test_epochs_run_again_are_logged_once(shapes, tmp_path):
    flags = ["--mask_type", "random", "--epochs", 2, "--save_ckpt_freq", 1, "--output_dir", tmp_path]
    run_here(shapes, *flags)
    (tmp_path / "checkpoint-1.pth").unlink()
    run_here(shapes, *flags)
    assert [record["epoch"] for record in read_log(tmp_path)] == [0, 1]


def test_a_narrow_terminal_shows_what_matters(shapes, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "110")
    run_here(shapes, "--mask_type", "tats", "--tats_start_epoch", 0, "--epochs", 1)
    lines = [
        line for line in capsys.readouterr().out.replace("\r\x1b[K", "\n").splitlines() if line.startswith("epoch")
    ]
    assert lines and all(len(line) < 110 for line in lines)
    for part in ("loss", "lr", "data", "step", "clips/s", "left"):
        assert part in lines[-1]


def test_a_compiler_that_fails_is_one_line_and_other_errors_stay_as_they_are():
    def train(args):
        raise args.error

    failure = torch._dynamo.exc.TorchDynamoException("no working compiler\n\ndetails")
    with pytest.raises(SystemExit, match=naming("--compile", "no working compiler")):
        run_script(train, argparse.Namespace(compile=True, error=failure))
    for arguments in (
        dict(compile=False, error=failure),
        dict(compile=True, error=RuntimeError("other")),
        dict(error=NotImplementedError()),  # without a message
    ):
        with pytest.raises(RuntimeError):
            run_script(train, argparse.Namespace(**arguments))


@pytest.mark.parametrize("mask_type", ["tube", "tats"])
def test_a_clip_may_be_one_frame(shapes, tmp_path, mask_type):
    flags = ["--num_frames", 1, "--tubelet_size", 1, "--mask_type", mask_type, "--tats_start_epoch", 0]
    run_here(shapes, *flags, "--epochs", 1, "--output_dir", tmp_path)
    (record,) = read_log(tmp_path)
    assert math.isfinite(record["train_loss"]) and record["train_motion_lift"] == 0  # no motion


def test_an_output_that_nobody_reads_is_not_taken_for_a_dead_loader(shapes, tmp_path):
    flags = ["--mask_type", "random", "--epochs", 500, "--save_ckpt_freq", 1, "--output_dir", tmp_path]
    process = subprocess.Popen(command(shapes, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        process.stdout.readline()
        process.stdout.close()  # as head does
        error = process.stderr.read()
        assert process.wait(timeout=60) == 1
    finally:
        process.kill()
    assert error.count("\n") == 1
    assert_names(error, "error: ", "output", "resumes")


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer"),
                                   RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")])  # fmt: skip
def test_a_loader_process_that_dies_is_one_line(error):
    """Whatever it was doing: computing, or handing over a batch."""

    def train(args):
        raise error

    with pytest.raises(SystemExit, match="^error: .*--num_workers"):
        run_script(train, argparse.Namespace())


@pytest.mark.parametrize("mask_type", ["tube", "adamae", "tats"])
def test_pictures_of_masks_do_not_change_the_run(shapes, tmp_path, mask_type, monkeypatch):
    drawn = []
    monkeypatch.setattr(SummaryWriter, "add_image", lambda self, name, picture, step: drawn.append((picture, step)))
    logs = []
    for freq in ("0", "1"):
        folder = tmp_path / freq
        main(
            ["--data_path", str(shapes), *TINY, "--mask_type", mask_type, "--epochs", "2",
             "--tats_start_epoch", "1", "--output_dir", str(folder), "--log_dir", str(folder), "--picture_freq", freq]
        )  # fmt: skip
        logs.append([{k: v for k, v in r.items() if "time" not in k and "memory" not in k} for r in read_log(folder)])
    assert logs[0] == logs[1] and len(drawn) == 2
    (picture, step), (last, last_step) = drawn
    assert last_step == 2 * step
    learned = [mask_type == "adamae", mask_type != "tube"]  # TATS from its second epoch on
    for image, rows in zip((picture, last), [2 + more for more in learned], strict=True):
        assert image.dtype == torch.uint8 and image.shape[1] % (4 * rows) == 0
        side = image.shape[1] // (4 * rows)
        frames, masked = image[:, :side].float(), image[:, side : 2 * side].float()
        assert ((masked == frames) | (masked <= 0.12 * frames + 1)).all() and masked.mean() < 0.6 * frames.mean()


def test_pictures_need_a_log_dir(shapes, tmp_path):
    with pytest.raises(SystemExit, match=naming("--picture_freq 1", "--log_dir")):
        main(["--data_path", str(shapes), *TINY, "--picture_freq", "1"])
