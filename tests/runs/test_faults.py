"""Faults in small: full disks, damaged checkpoints and logs, Ctrl-C, signals in a test. In large: tests/slow."""

import contextlib
import errno
import io
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import run_class_finetuning
from datasets.build import start_worker
from runtime.checkpoint import CheckpointError, checkpoint_files, latest_checkpoint, save_checkpoint
from runtime.launch import run_script
from runtime.outputs import SummaryWriter
from tests.helpers.runs import assert_names, command, finetuning_flags, read_log, run_here
from utils import drop_epochs_from, replace_text

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")


def test_a_save_on_a_full_disk_says_so_in_plain_words(tmp_path, monkeypatch):
    """torch's writer hides the reason behind one of its own."""

    class Nearly(io.FileIO):
        """Room for what is small, as on a disk where the tensors do not fit."""

        def write(self, data):
            if len(data) > 10_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(io, "FileIO", Nearly)
    with pytest.raises(CheckpointError, match=rf"checkpoint-0\.pth.*\({os.strerror(errno.ENOSPC)}\)"):
        save_checkpoint(tmp_path / "checkpoint-0.pth", {"model": torch.zeros(100_000)})
    assert not list(tmp_path.iterdir())


@needs_full
def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "args.json"
    replace_text(path, "old")
    (tmp_path / "args.json.tmp").symlink_to(FULL)
    with pytest.raises(OSError) as failure:
        replace_text(path, "new")
    assert failure.value.filename == str(path) and path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["args.json"]


@needs_full
def test_training_goes_on_without_curves_where_log_dir_is_full(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: open(FULL, "wb"))
    run_here(shapes, "--mask_type", "tats", "--tats_start_epoch", 0, "--epochs", 2, "--output_dir", tmp_path,
             "--log_dir", tmp_path / "curves")  # fmt: skip
    output = capsys.readouterr().out
    assert output.count("warning: --log_dir") == 1 and os.strerror(errno.ENOSPC) in output
    assert len(read_log(tmp_path)) == 2
    monkeypatch.setattr(SummaryWriter, "FLUSH_SECONDS", 1e9)
    curves = SummaryWriter(str(tmp_path / "curves"))
    for step in range(1000):  # more than the file's buffer
        curves.add_scalar("train/loss", 1.0, step)
    curves.close()
    assert capsys.readouterr().out.count("warning: --log_dir") == 1


def test_a_changed_byte_in_a_checkpoint_is_seen(tmp_path):
    """torch writes checksums, but does not compare them."""
    for epoch in range(2):
        save_checkpoint(tmp_path / f"checkpoint-{epoch}.pth", {"model": {"w": torch.full((10_000,), 3.0)}})
    path = tmp_path / "checkpoint-1.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not torch.load(path, weights_only=True)["model"]["w"].eq(3).all()  # torch sees nothing
    assert latest_checkpoint(tmp_path)[0].name == "checkpoint-0.pth"


def test_what_is_later_than_the_resume_is_set_aside(shapes, tmp_path, capsys):
    """Else the run's own saves count as older and are deleted at once."""
    flags = ["--mask_type", "tube", "--epochs", 4, "--output_dir", tmp_path, "--save_ckpt_minutes", 1e-9]
    run_here(shapes, *flags, "--save_ckpt_freq", 1)
    for path in tmp_path.glob("checkpoint-*-step*.pth"):
        path.unlink()
    os.truncate(tmp_path / "checkpoint-3.pth", 100)
    (tmp_path / "checkpoint-2.pth").unlink()
    (tmp_path / "checkpoint-2.pth").mkdir()
    (tmp_path / "checkpoint-9-step1.pth.tmp").write_bytes(b"of a killed save")
    run_here(shapes, *flags)
    output = capsys.readouterr().out
    assert_names(output, "resumed", tmp_path / "checkpoint-1.pth")
    assert_names(output, tmp_path / "checkpoint-3.pth", "checkpoint-3.pth.old")
    assert {p.name for p in checkpoint_files(tmp_path)} >= {"checkpoint-3.pth", "checkpoint-3-step1.pth"}
    assert (tmp_path / "checkpoint-2.pth.old").is_dir() and (tmp_path / "checkpoint-3.pth.old").is_file()
    assert not list(tmp_path.glob("*.tmp"))

    run_here(shapes, *flags, "--no-auto_resume", "--epochs", 1)  # over the older run: its files are no newer ones
    assert_names(capsys.readouterr().out, "note: ", "starting", "epoch 0", tmp_path)
    assert [p.name for p in checkpoint_files(tmp_path)] == ["checkpoint-0.pth", "checkpoint-0-step1.pth"]
    assert (tmp_path / "checkpoint-3.pth.old1").is_file()


def test_a_log_that_ends_in_anything_is_cut_back(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(b'{"epoch": 0}\n{"epoch": 1}\n' + bytes(20) + b"\xff\xfe")
    drop_epochs_from(path, 1)
    assert path.read_text() == '{"epoch": 0}\n'


@contextlib.contextmanager
def signals_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_loader_processes_leave_signals_to_the_training_process():
    with signals_as_before() as handlers:
        start_worker(0)
        assert {signal.getsignal(number) for number in handlers} == {signal.SIG_IGN}


def test_ctrl_c_is_one_line(shapes, tmp_path):
    """In a terminal the loader processes get it too."""
    process = subprocess.Popen(
        command(shapes, "--mask_type", "random", "--epochs", 500, "--num_workers", 1, "--output_dir", tmp_path),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        next(line for line in process.stdout if line.startswith("epoch 1 [1/2]") or line.startswith("epoch 1 [2/2]"))
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    (line,) = error.splitlines()
    assert_names(line, "interrupted")


def test_a_signal_during_the_test_asks_to_be_started_again(labelled, tmp_path, monkeypatch, capsys):
    """The test of a large set takes an hour, and nothing is left to save."""
    flags = finetuning_flags(labelled, "--epochs", 1, "--disable_eval_during_finetuning",
                                "--output_dir", tmp_path)  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(run_class_finetuning, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with signals_as_before():
            signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the signal came through"))
            with pytest.raises(SystemExit) as stop:
                run_class_finetuning.main(flags)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # till the end, which one more would change
    assert stop.value.code == 75
    assert_names(capsys.readouterr().out, "stopped", "SIGTERM")
    run_class_finetuning.main(flags)
    assert (tmp_path / "test.json").exists()


def test_handlers_are_those_from_before_when_a_script_has_ended():
    before = signal.getsignal(signal.SIGTERM)
    run_script(lambda args: signal.signal(signal.SIGTERM, signal.SIG_IGN), None)
    assert signal.getsignal(signal.SIGTERM) == before
