"""Runs that are killed, or lose a process, their disk or their videos: `make test-slow`, some 15 minutes.

After every fault the same command is started again, and its log, weights and optimizer state must be those of an
undisturbed run, bit by bit. Damaged checkpoints and logs, Ctrl-C and losses that are not finite are tested in seconds:
tests/runs/test_faults.py, test_preemption.py and test_distributed.py.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from datasets.moving_shapes import write_dataset
from runtime.checkpoint import checkpoint_files, load_checkpoint
from tests.helpers.runs import command, free_port, read_log

pytestmark = pytest.mark.slow

LIMIT = 180  # seconds from one event of a run to the next
STEPS = 6  # per epoch: 24 clips, 4 per step
EPOCHS = 8
OFTEN = 14  # epochs of the runs that are stopped many times
TIMES = {"train_data_time", "train_step_time", "train_peak_memory"}  # of log.txt, never equal twice
TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n(?!  File \"<frozen runpy>\")")  # torchrun's own is fine


class Job:
    """A run in a session of its own, whose output is written to a file."""

    def __init__(self, arguments: list[str], output: Path):
        self.path = output
        with open(output, "wb") as file:
            self.process = subprocess.Popen(
                arguments,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.path.read_text(errors="replace")

    @property
    def last_step(self) -> int:
        """Steps of the run that the last progress line reports as done."""
        found = re.findall(r"^epoch (\d+) \[(\d+)/\d+\]", self.text, re.MULTILINE)
        return int(found[-1][0]) * STEPS + int(found[-1][1]) if found else 0

    @property
    def resumed_step(self) -> int:
        """Steps in the checkpoint that the run was resumed from; 0: it began at the start."""
        if found := re.search(r"^resumed after (\d+) of \d+ steps of epoch (\d+)", self.text, re.MULTILINE):
            return int(found[2]) * STEPS + int(found[1])
        found = re.search(r"^resumed after epoch (\d+)", self.text, re.MULTILINE)
        return (int(found[1]) + 1) * STEPS if found else 0

    def wait_until(self, happened: Callable[[], object], limit: float = LIMIT, pause: float = 0.003) -> bool:
        """Whether it happened before the job ended and before the limit."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if happened():
                return True
            if self.process.poll() is not None:
                return bool(happened())
            time.sleep(pause)
        return False

    def wait_step(self, step: int) -> None:
        assert self.wait_until(lambda: self.last_step >= step), f"step {step} not reached:\n{self.text}"

    def children(self) -> list[int]:
        """Process ids of the loader processes, or of torchrun's ranks."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in pids if b".py" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def rank(self, number: int) -> int:
        """Process id of a rank under torchrun."""
        wanted = f"\0RANK={number}\0".encode()
        return next(pid for pid in self.children() if wanted in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())

    def finish(self, limit: float = LIMIT) -> int:
        """The exit status, negative for a signal. A run that does not end is killed and fails the test."""
        try:
            return self.process.wait(limit)
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends the job and what it started; torchrun's ranks have sessions of their own."""
        left = self.children() if self.process.poll() is None else []
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def line(self, pattern: str) -> str:
        """The last line of the output that matches; there must be one, and no traceback."""
        assert not TRACEBACK.search(self.text), self.text
        lines = [line for line in self.text.splitlines() if re.search(pattern, line)]
        assert lines, f"no line matches {pattern!r}:\n{self.text}"
        return lines[-1]


class Campaign:
    """Starts runs on one small data set, and keeps the undisturbed run of each set of flags."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = write_dataset(folder / "data", train=24, val=10, size=40, frames=12)
        self.references: dict[tuple, Path] = {}
        self.jobs: list[Job] = []

    def start(self, output: Path, *flags: object, processes: int = 1, data: Path | None = None) -> Job:
        fixed = ["--print_freq", 1, "--save_ckpt_freq", 50, "--save_ckpt_minutes", 0.002, "--tats_start_epoch", 1]
        batch = ["--batch_size", 4 // processes]
        arguments = command((data or self.data) / "train.csv", *fixed, *batch, "--output_dir", output, *flags)
        if processes > 1:
            launcher = f"-m torch.distributed.run --nproc_per_node {processes} --master_port {free_port()}"
            arguments[1:1] = launcher.split()
        self.jobs.append(Job(arguments, self.folder / f"{len(self.jobs)}.txt"))
        return self.jobs[-1]

    def reference(self, *flags: object, processes: int = 1) -> Path:
        """Folder of the undisturbed run."""
        key = (processes, *flags)
        if key not in self.references:
            folder = self.folder / f"undisturbed{len(self.references)}"
            job = self.start(folder, *flags, processes=processes)
            assert job.finish() == 0, job.text
            self.references[key] = folder
        return self.references[key]

    def finish_again(self, folder: Path, *flags: object, processes: int = 1) -> Job:
        """Starts the same command once more. The run must then be equal to an undisturbed one."""
        job = self.start(folder, *flags, processes=processes)
        assert job.finish() == 0, job.text
        assert not TRACEBACK.search(job.text) and not list(folder.glob("*.tmp"))
        assert_equal_runs(folder, self.reference(*flags, processes=processes))
        return job


def assert_equal_runs(folder: Path, reference: Path) -> None:
    """All of log.txt except times; the weights and the optimizer's state, bit by bit."""
    logs = [[{k: v for k, v in entry.items() if k not in TIMES} for entry in read_log(f)] for f in (folder, reference)]
    assert logs[0] == logs[1]
    states = [torch.load(checkpoint_files(f)[0], weights_only=True) for f in (folder, reference)]
    ours, theirs = (dict(tensors({k: v for k, v in s.items() if k not in ("rng", "args")})) for s in states)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def tensors(value: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, f"{name}.{key}")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory) -> Iterator[Campaign]:
    campaign = Campaign(tmp_path_factory.mktemp("faults"))
    yield campaign
    for job in campaign.jobs:  # of a test that failed half-way
        if job.process.poll() is None:
            job.kill()


# ---------------------------------------------------------------------------------------------- killed and stopped


@pytest.mark.parametrize("mask", ["tube", "tats"])
def test_a_run_killed_20_times_has_the_losses_of_an_undisturbed_one(campaign, tmp_path, mask):
    """kill -9 at random steps, during start-up, and while a checkpoint is being written."""
    chance, flags, folder = random.Random(0), ("--mask_type", mask, "--epochs", OFTEN), tmp_path / "run"
    kinds = chance.choices(["start", "step", "save"], [1, 3, 3], k=20)
    in_save, before = 0, 0
    for step, kind in zip(sorted(chance.sample(range(2, STEPS * OFTEN - 6), len(kinds))), kinds, strict=True):
        half_written = halves(folder)
        job = campaign.start(folder, *flags, "--save_ckpt_minutes", chance.choice([0.002, 0.01]))
        if kind == "start":
            time.sleep(chance.uniform(0.5, 5))
        else:
            job.wait_step(step)
        if kind == "save":
            job.wait_until(lambda: list(folder.glob("*.tmp")), limit=3, pause=0)
        job.kill()
        in_save += bool(halves(folder) - half_written)
        if job.resumed_step:
            # saves go by the clock: 0.01 minutes are some 20 steps here, and more on a faster machine
            assert before - job.resumed_step < 10 * STEPS
        before = job.last_step or before
    campaign.finish_again(folder, *flags)
    assert in_save > 0, "no kill fell into a save"


def halves(folder: Path) -> set[tuple[str, int]]:
    """Half-written files, each with its time."""
    return {(path.name, path.stat().st_mtime_ns) for path in folder.glob("*.tmp")}


@pytest.mark.parametrize("number, mask", [(signal.SIGTERM, "tats"), (signal.SIGUSR1, "tube")])
def test_a_run_stopped_8_times_by_the_scheduler_loses_no_step(campaign, tmp_path, number, mask):
    chance, flags, before = random.Random(0), ("--mask_type", mask, "--epochs", OFTEN), 0
    for step in sorted(chance.sample(range(1, STEPS * OFTEN - 3), 8)):
        job = campaign.start(tmp_path, *flags, "--save_ckpt_minutes", 0, "--num_workers", 1)
        job.wait_step(step)
        job.process.send_signal(number)
        assert job.finish() == 75 and job.line("^stopped ") and job.resumed_step == before
        before = job.last_step
    assert campaign.finish_again(tmp_path, *flags).resumed_step == before


@pytest.mark.parametrize("rank, in_save", [(0, False), (1, False), (0, True)])
def test_kill_9_of_one_rank_of_two_ends_the_job_at_once(campaign, tmp_path, rank, in_save):
    flags = ("--mask_type", "tats", "--epochs", EPOCHS)
    job = campaign.start(tmp_path, *flags, processes=2)
    job.wait_step(17 + rank)
    pid = job.rank(rank)
    if in_save:
        job.wait_until(lambda: list(tmp_path.glob("*.tmp")), limit=5, pause=0)
    os.kill(pid, signal.SIGKILL)
    assert job.finish(limit=20) == 1
    again = campaign.finish_again(tmp_path, *flags, processes=2)
    assert 0 <= job.last_step - again.resumed_step <= STEPS


def test_a_rank_that_pauses_costs_nothing(campaign, tmp_path):
    flags = ("--mask_type", "tats", "--epochs", EPOCHS)
    job = campaign.start(tmp_path, *flags, processes=2)
    job.wait_step(10)
    pid = job.rank(1)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    assert job.process.poll() is None
    os.kill(pid, signal.SIGCONT)
    assert job.finish() == 0
    assert_equal_runs(tmp_path, campaign.reference(*flags, processes=2))


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_of_a_loader_process_ends_the_run_at_once(campaign, tmp_path, workers):
    flags = ("--mask_type", "tube", "--epochs", EPOCHS)
    job = campaign.start(tmp_path, *flags, "--num_workers", workers)
    job.wait_step(15)
    os.kill(job.children()[-1], signal.SIGKILL)
    assert job.finish(limit=15) == 1 and "--num_workers" in job.line("^error: ")
    campaign.finish_again(tmp_path, *flags)


# ----------------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs of the given size; skips the test where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> Path:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if made.returncode:
            pytest.skip("mounting a tmpfs is not allowed here")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, options: str) -> bool:
    return subprocess.run(["mount", "-o", f"remount,{options}", folder], capture_output=True).returncode == 0


def test_a_disk_full_from_the_third_save_on(campaign, small_disk):
    """Training continues to its last step; what was saved before can be read."""
    disk, flags = small_disk("18m"), ("--mask_type", "tube", "--epochs", EPOCHS)  # two checkpoints of 7 MB, no third
    job = campaign.start(disk / "run", *flags)
    assert job.finish() == 1 and job.last_step == EPOCHS * STEPS
    assert job.line("^warning: .*No space left|^warning: .*cannot be written") and job.line("^error: ")
    files = checkpoint_files(disk / "run")
    assert files
    for path in files:
        load_checkpoint(path)
    assert remount(disk, "size=64m")
    campaign.finish_again(disk / "run", *flags)


def test_a_disk_full_to_the_last_byte(campaign, small_disk):
    """log.txt does not fit either. TATS, whose log lines are long: a tmpfs gives room in blocks of 4096 bytes."""
    disk, flags = small_disk("32m"), ("--mask_type", "tats", "--epochs", EPOCHS)
    job = campaign.start(disk / "run", *flags)
    job.wait_step(STEPS * 2 + 2)
    fill(disk / "filler")
    assert job.finish() == 1 and job.last_step == EPOCHS * STEPS
    assert job.line("^warning: .*log.txt") and job.line("^error: ")
    refused = campaign.start(disk / "run", *flags)
    assert refused.finish() == 1 and refused.line("^error: ")
    assert json.loads((disk / "run/args.json").read_text())["args"]["epochs"] == EPOCHS
    (disk / "filler").unlink()
    campaign.finish_again(disk / "run", *flags)


def fill(path: Path) -> None:
    """Writes until nothing fits, for one second: what becomes free in that time is taken too."""
    end = time.monotonic() + 1
    with open(path, "ab", buffering=0) as file:
        while time.monotonic() < end:
            for size in (65536, 1):
                with contextlib.suppress(OSError):
                    file.write(bytes(size))
                    break
            else:
                time.sleep(0.002)


def test_a_disk_that_becomes_read_only(campaign, small_disk):
    disk, flags = small_disk("32m"), ("--mask_type", "tube", "--epochs", EPOCHS)
    job = campaign.start(disk / "run", *flags)
    job.wait_step(STEPS * 3)
    assert any(remount(disk, "ro") for _ in range(100))  # refused while a file is open for writing
    assert job.finish() == 1
    assert job.line("^warning: .*Read-only") and job.line("^error: ")
    refused = campaign.start(disk / "run", *flags)
    assert refused.finish() == 1 and "--output_dir" in refused.line("^error: ")
    assert remount(disk, "rw")
    campaign.finish_again(disk / "run", *flags)


# ---------------------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize("damage", ["deleted", "cut to half", "all zeros"])
def test_videos_that_vanish_while_training_reads_them(campaign, tmp_path, damage):
    """They are replaced by others, named, and counted in log.txt."""
    data = write_dataset(tmp_path / "data", train=24, val=10, size=40, frames=12)
    names = [line.split()[0] for line in (data / "train.csv").read_text().splitlines()]
    folder, chosen = tmp_path / "run", [data / name for name in random.Random(0).sample(names, 4)]
    job = campaign.start(folder, "--epochs", 6, "--num_workers", 1, data=data)
    job.wait_step(STEPS)
    for path in chosen:
        size = path.stat().st_size
        if damage == "deleted":
            path.unlink()
        elif damage == "cut to half":
            os.truncate(path, size // 2)
        else:
            path.write_bytes(bytes(size))
    assert job.finish() == 0
    for path in chosen:
        assert job.line(f"^warning: unreadable video.*{path.name}")
    assert sum(entry["train_unreadable_videos"] for entry in read_log(folder)) >= 4
