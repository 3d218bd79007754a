"""Signals and the clock in one process; several: test_distributed.py. Kills and full disks: test_faults.py."""

import json
import multiprocessing
import os
import signal

import pytest
import torch

import engine_for_pretraining
import run_class_finetuning
from datasets.moving_shapes import write_dataset
from run_mae_pretraining import main
from runtime import preemption
from runtime.checkpoint import checkpoint_files, latest_checkpoint, prune_checkpoints
from runtime.epoch import EpochRunner
from runtime.metrics import Metrics
from runtime.preemption import GO_ON, SAVE, SIGNALS, STOP, PreemptionWatch, set_handlers
from tests.helpers.runs import assert_names
from utils import append_json_line

FLAGS = [
    "--model", "pretrain_videomae_tiny_patch8_64", "--input_size", "32", "--num_frames", "4", "--sampling_rate", "2",
    "--decoder_depth", "1", "--num_workers", "0", "--device", "cpu", "--print_freq", "3", "--warmup_epochs", "0",
    "--lr", "0.01", "--tats_lr", "1e-3", "--mask_type", "tats", "--tats_start_epoch", "1", "--epochs", "2",
    "--drop_path", "0.1", "--save_ckpt_freq", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("shapes"), train=28, val=10, size=32, frames=12) / "train.csv"


@pytest.fixture(autouse=True)
def handlers():
    """Puts back what a stopped process leaves for its last moments."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    set_handlers(before)


@pytest.fixture
def at_step(monkeypatch):
    """at_step(step, function): calls the function in the middle of an optimizer step of the run."""
    original, actions = EpochRunner.end_micro_batch, {}

    def watched(runner, index, step, lr, loss, complete):
        actions.pop(step, lambda runner: None)(runner)
        original(runner, index, step, lr, loss, complete)

    monkeypatch.setattr(EpochRunner, "end_micro_batch", watched)
    return actions.__setitem__


def run(shapes, output, *flags, status=0, batch_size=4) -> None:
    arguments = ["--data_path", str(shapes), "--output_dir", str(output), "--batch_size", str(batch_size)]
    if status == 0:
        main([*arguments, *FLAGS, *flags])
        return
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *FLAGS, *flags])
    assert stop.value.code == status


def log_of(folder) -> list[dict]:
    lines = (folder / "log.txt").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "time" not in k and "memory" not in k} for line in lines]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_after_the_step_and_the_run_goes_on_as_if_it_had_not(number, shapes, tmp_path, at_step, capsys):
    run(shapes, tmp_path / "whole")
    at_step(2, lambda runner: os.kill(os.getpid(), number))
    run(shapes, tmp_path / "stopped", status=75)
    assert_names(capsys.readouterr().out, "stopped", "epoch 0", "3 of 7", "saved")
    os.kill(os.getpid(), signal.SIGTERM)  # schedulers send more than one: the status stays
    at_step(13, lambda runner: os.kill(os.getpid(), number))  # the very last step: nothing is left to stop
    run(shapes, tmp_path / "stopped")
    assert_names(capsys.readouterr().out, "resumed", "3 of 7", "epoch 0")
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")
    states = [torch.load(tmp_path / f / "checkpoint-1.pth", weights_only=True) for f in ("stopped", "whole")]
    for part in ("model", "tats"):
        assert all(torch.equal(value, states[1][part][name]) for name, value in states[0][part].items())
    run(shapes, tmp_path / "stopped")
    assert_names(capsys.readouterr().out, "nothing", 2)


def test_a_signal_in_the_last_step_of_an_epoch_saves_the_epoch(shapes, tmp_path, at_step):
    at_step(6, lambda runner: os.kill(os.getpid(), signal.SIGTERM))
    run(shapes, tmp_path, "--save_ckpt_freq", "5", status=75)
    assert [path.name for path in checkpoint_files(tmp_path)] == ["checkpoint-0.pth"]
    assert [record["epoch"] for record in log_of(tmp_path)] == [0]


def test_rollouts_are_not_cut(shapes, tmp_path, at_step):
    """A stop waits for phase 2, lest recorded episodes are lost."""
    rollouts = ["--tats_start_epoch", "0", "--tats_rollout_steps", "3"]
    run(shapes, tmp_path / "whole", *rollouts)
    at_step(3, lambda runner: os.kill(os.getpid(), signal.SIGTERM))
    run(shapes, tmp_path / "stopped", *rollouts, status=75)
    assert (tmp_path / "stopped" / "checkpoint-0-step6.pth").exists()
    run(shapes, tmp_path / "stopped", *rollouts)
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")


def test_without_a_folder_nothing_is_saved_and_that_is_said(shapes, at_step, capsys):
    at_step(1, lambda runner: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        main(["--data_path", str(shapes), "--batch_size", "4", *FLAGS])
    assert stop.value.code == 1
    assert_names(capsys.readouterr().out, "stopped", "nothing")


def test_the_clock_saves_in_mid_epoch_and_two_files_stay(shapes, tmp_path, at_step):
    seen = []
    for step in range(14):
        at_step(step, lambda runner: seen.append([path.name for path in checkpoint_files(tmp_path)]))
    run(shapes, tmp_path, "--save_ckpt_minutes", "1e-6", "--save_ckpt_freq", "9")
    assert seen[:4] == [[], ["checkpoint-0-step1.pth"], ["checkpoint-0-step2.pth", "checkpoint-0-step1.pth"],
                        ["checkpoint-0-step3.pth", "checkpoint-0-step2.pth"]]  # fmt: skip
    assert [path.name for path in checkpoint_files(tmp_path)] == ["checkpoint-1.pth", "checkpoint-1-step6.pth"]


def test_another_number_of_clips_a_step_starts_the_epoch_over_once(shapes, tmp_path, at_step, capsys):
    at_step(9, lambda runner: os.kill(os.getpid(), signal.SIGTERM))
    run(shapes, tmp_path, status=75)
    at_step(5, lambda runner: os.kill(os.getpid(), signal.SIGTERM))  # the second of four steps of epoch 1
    run(shapes, tmp_path, batch_size=7, status=75)
    assert_names(capsys.readouterr().out, "note: ", 4, 7, "epoch 1")
    run(shapes, tmp_path, batch_size=7)
    assert_names(capsys.readouterr().out, "resumed", "2 of 4", "epoch 1")
    assert [record["epoch"] for record in log_of(tmp_path)] == [0, 1]


def test_a_run_from_resume_goes_on_with_its_own_saves(shapes, tmp_path, at_step, capsys):
    """Or a job that is put back into the queue would start from the same file again and again."""
    run(shapes, tmp_path / "first", "--epochs", "1")
    source = ["--resume", str(tmp_path / "first" / "checkpoint-0.pth")]
    run(shapes, tmp_path / "whole", *source)
    at_step(9, lambda runner: os.kill(os.getpid(), signal.SIGTERM))
    run(shapes, tmp_path / "stopped", *source, status=75)
    capsys.readouterr()
    run(shapes, tmp_path / "stopped", *source)
    assert_names(capsys.readouterr().out, "resumed", "3 of 7", "epoch 1")
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")


def test_the_clock_is_heard_at_the_end_of_an_epoch(shapes, tmp_path, at_step):
    at_step(6, lambda runner: setattr(runner.state.watch, "save_seconds", 1e-9))
    at_step(7, lambda runner: setattr(runner.state.watch, "save_seconds", 0))
    run(shapes, tmp_path, "--save_ckpt_freq", "9")
    assert [path.name for path in checkpoint_files(tmp_path)] == ["checkpoint-1.pth", "checkpoint-0.pth"]


def test_all_that_an_epoch_counts_is_carried_over(shapes, tmp_path, at_step, monkeypatch):
    """Accumulation, several clips a video, a loader process, a skipped step and a broken video before the stop; the
    signal reaches the loader process too."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    lines = [f"{shapes.parent / line}" for line in shapes.read_text().splitlines()]
    data = tmp_path / "list.csv"
    data.write_text("\n".join([*lines[:22], f"{broken} 0", f"{broken} 0"]) + "\n")
    flags = ["--accum_iter", "2", "--num_sample", "2", "--batch_size", "2", "--num_workers", "1", "--print_freq", "3",
             "--epochs", "2", "--mask_type", "random"]  # fmt: skip
    error = engine_for_pretraining.masked_error
    seen = []  # micro-batches, 12 an epoch, 6 steps; the third begins a step and ends a line of progress

    def nan_once(*arguments):
        seen.append(None)
        return error(*arguments) * (float("nan") if len(seen) == 3 else 1.0)

    def signal_all(runner):
        for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
            os.kill(pid, signal.SIGTERM)

    monkeypatch.setattr(engine_for_pretraining, "masked_error", nan_once)
    run(data, tmp_path / "whole", *flags)
    seen.clear()
    at_step(4, signal_all)
    run(data, tmp_path / "stopped", *flags, status=75)
    assert (tmp_path / "stopped" / "checkpoint-0-step5.pth").exists()
    run(data, tmp_path / "stopped", *flags)
    whole = log_of(tmp_path / "whole")
    assert log_of(tmp_path / "stopped") == whole
    assert whole[0]["train_skipped_steps"] == 1 and whole[0]["train_unreadable_videos"] >= 1
    skipped = [(tmp_path / f / "skipped_steps.jsonl").read_text() for f in ("whole", "stopped")]
    (line,) = map(json.loads, skipped[0].splitlines())
    assert skipped[0] == skipped[1] and (line["step"], line["loss"], len(line["videos"])) == (1, "nan", 2)


def test_a_probe_goes_on_in_mid_epoch(shapes, tmp_path, at_step):
    flags = ["--data_path", str(shapes.parent), "--data_set", "custom", "--nb_classes", "10", "--linear_probe",
             "--model", "vit_tiny_patch8_64", "--input_size", "32", "--num_frames", "4", "--batch_size", "4",
             "--num_workers", "0", "--device", "cpu", "--epochs", "2", "--warmup_epochs", "0", "--lr", "1",
             "--num_sample", "1", "--test_num_segment", "1", "--test_num_crop", "1", "--accum_iter", "2"]  # fmt: skip
    run_class_finetuning.main([*flags, "--output_dir", str(tmp_path / "whole")])
    at_step(1, lambda runner: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        run_class_finetuning.main([*flags, "--output_dir", str(tmp_path / "stopped")])
    assert stop.value.code == 75 and (tmp_path / "stopped" / "checkpoint-0-step2.pth").exists()
    run_class_finetuning.main([*flags, "--output_dir", str(tmp_path / "stopped")])
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")


def test_the_newest_by_place_and_what_is_pruned(tmp_path):
    names = ["checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-2-step5.pth", "checkpoint-2-step40.pth",
             "checkpoint-2.pth", "checkpoint-3.pth", "checkpoint-10-step1.pth"]  # fmt: skip
    for name in reversed(names):
        torch.save({"name": name}, tmp_path / name)
    (tmp_path / "checkpoint-best.pth").write_bytes(b"")
    (tmp_path / "checkpoint-11.pth.tmp").write_bytes(b"")
    assert [path.name for path in checkpoint_files(tmp_path)] == names[::-1]
    assert latest_checkpoint(tmp_path)[1]["name"] == "checkpoint-10-step1.pth"
    prune_checkpoints(tmp_path, every=2)
    left = ["checkpoint-10-step1.pth", "checkpoint-3.pth", "checkpoint-1.pth"]
    assert [path.name for path in checkpoint_files(tmp_path)] == left
    prune_checkpoints(tmp_path, every=2, keep_last=1)  # two stay, should the newest prove damaged
    assert [path.name for path in checkpoint_files(tmp_path)] == left[:2]
    assert (tmp_path / "checkpoint-best.pth").exists()


def test_one_process_decides_at_once():
    watch = PreemptionWatch(save_minutes=0)
    assert watch.decide() == watch.decide_now() == GO_ON
    watch.save_seconds = 1e-9
    assert watch.decide() == watch.decide_now() == SAVE
    watch.signal = "SIGTERM"
    assert watch.decide() == watch.decide_now() == STOP


def test_all_clocks_start_again_when_one_has_asked(monkeypatch):
    """Or each of several processes would ask for a save of its own."""

    class Work:
        def wait(self):
            pass

    asked = []
    monkeypatch.setattr(preemption.dist, "all_reduce", lambda flag, *_, **__: asked.append(int(flag)) or Work())
    watch = PreemptionWatch(save_minutes=1)
    watch.group = object()
    watch.started -= 1000  # due here too
    watch.pending = (Work(), torch.tensor([SAVE]))  # another process was first
    assert watch.decide() == SAVE and asked == [GO_ON]
    watch.started -= 1000
    assert watch.decide() == GO_ON and asked == [GO_ON, SAVE]  # one call late
    assert watch.decide_now() == SAVE and asked[2:] == [GO_ON]


def test_means_do_not_depend_on_where_they_were_interrupted():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=generator) * 10 ** torch.randint(-3, 3, (50,), generator=generator)
    whole, first, second = Metrics(), Metrics(), Metrics()
    for i, value in enumerate(values):
        whole.update(loss=value, other=value**2)
        (first if i < 17 else second).update(loss=value, other=value**2)
        if i == 16:
            second.load(json.loads(json.dumps(first.state())), torch.device("cpu"))
    assert whole.read_epoch() == second.read_epoch()


def test_a_line_after_a_torn_one_stands_alone(tmp_path):
    path = tmp_path / "log.txt"
    append_json_line(path, {"epoch": 0})
    with open(path, "a") as file:
        file.write('{"epoch": 1, "train_lo')  # the disk was full
    append_json_line(path, {"epoch": 2, "bad": float("nan")})
    assert path.read_text().splitlines() == ['{"epoch": 0}', '{"epoch": 1, "train_lo', '{"epoch": 2, "bad": null}']
