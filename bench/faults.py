"""A campaign of faults on tiny runs: killed, stopped, starved of disk, fed with broken files. Prints a Markdown table.

    python bench/faults.py                      # all, some 15 minutes on two cores; mounts small tmpfs where root may
    python bench/faults.py --only kill signals  # some of the groups

Every process has a time limit, and a row fails where one is reached. Status 1 where any row failed.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LIMIT = 180.0  # seconds any run may take from one event to the next (DeepSpeed may have to compile)
STEPS = 6  # optimizer steps an epoch: 24 clips, 4 a step
SHARED = [
    "--input_size", 32, "--num_frames", 4, "--sampling_rate", 2, "--device", "cpu", "--print_freq", 1,
    "--warmup_epochs", 0, "--save_ckpt_freq", 50, "--save_ckpt_minutes", 0.002, "--num_workers", 0,
]  # fmt: skip
PRETRAIN = [
    "run_mae_pretraining.py", "--model", "pretrain_videomae_tiny_patch8_64", "--decoder_depth", 1, "--batch_size", 4,
    "--lr", 0.01, "--tats_lr", 1e-3, "--tats_start_epoch", 1, *SHARED,
]  # fmt: skip
FINETUNE = [
    "run_class_finetuning.py", "--model", "vit_tiny_patch8_64", "--data_set", "custom", "--nb_classes", 10,
    "--batch_size", 4, "--num_sample", 1, "--lr", 0.1, "--test_num_segment", 2, "--test_num_crop", 3, *SHARED,
]  # fmt: skip
# torchrun's own report of a rank that failed begins so too
OUR_TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n(?!  File \"<frozen runpy>\")")
TIMES = {"train_data_time", "train_step_time", "train_peak_memory"}  # of log.txt, never the same twice


@dataclass
class Row:
    fault: str
    saw: str = ""
    status: str = ""
    lost: str = "-"
    equal: str = "-"
    problems: list[str] = field(default_factory=list)

    def expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)

    def cells(self) -> list[str]:
        result = "FAILED: " + "; ".join(self.problems) if self.problems else "ok"
        return [self.fault, f"`{self.saw}`" if self.saw else "-", self.status, self.lost, self.equal, result]


# --- runs --------------------------------------------------------------------------------------------------------


class Job:
    """A command in a session of its own, whose output goes to a file."""

    def __init__(self, command: list, output: Path):
        self.path = output
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.started = time.monotonic()
        with open(output, "wb") as file:
            self.process = subprocess.Popen(
                [str(part) for part in command], stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
                start_new_session=True, preexec_fn=listen,
            )  # fmt: skip
        self.hung = False

    @property
    def text(self) -> str:
        return self.path.read_text(errors="replace")

    def wait_until(self, happened: Callable[[], object], limit: float = LIMIT, pause: float = 0.003) -> bool:
        """Whether it has happened before the job has ended or the limit was reached."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if happened():
                return True
            if self.process.poll() is not None:
                return bool(happened())
            time.sleep(pause)
        return False

    def wait_step(self, step: int) -> bool:
        return self.wait_until(lambda: last_step(self.text) >= step)

    def wait_line(self, pattern: str) -> bool:
        return self.wait_until(lambda: re.search(pattern, self.text, re.MULTILINE))

    def send(self, number: int, pid: int | None = None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid or self.process.pid, number)

    def finish(self, limit: float = LIMIT) -> int:
        """The exit status, negative for a signal; what hangs is killed and noted."""
        try:
            self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.hung = True
            for pid in self.children():  # torchrun's ranks have sessions of their own
                self.send(signal.SIGKILL, pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # also what it left behind
        return self.process.wait(10)

    def children(self) -> list[int]:
        """Loader processes, and torchrun's ranks: children that run Python on a script."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = []
        with contextlib.suppress(OSError):
            for pid in map(int, listed.read_text().split()):
                with contextlib.suppress(OSError):
                    if b".py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        found.append(pid)
        return found

    def rank(self, number: int) -> int:
        """Process id of a rank under torchrun."""
        for pid in self.children():
            if f"\0RANK={number}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                return pid
        raise RuntimeError(f"no rank {number} under {self.process.pid}")


def listen() -> None:
    """A campaign in the background ignores Ctrl-C, and what it starts would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def last_step(text: str) -> int:
    """Steps of the run done by the last progress line."""
    found = re.findall(r"^epoch (\d+) \[(\d+)/\d+\]", text, re.MULTILINE)
    return int(found[-1][0]) * STEPS + int(found[-1][1]) if found else 0


def resumed_step(text: str) -> int | None:
    """Steps after which a run went on; None: it began afresh."""
    if found := re.search(r"^resumed after (\d+) of \d+ steps of epoch (\d+)", text, re.MULTILINE):
        return int(found[2]) * STEPS + int(found[1])
    if found := re.search(r"^resumed after epoch (\d+)", text, re.MULTILINE):
        return (int(found[1]) + 1) * STEPS
    return None


class Campaign:
    def __init__(self, folder: Path, seed: int):
        from datasets.moving_shapes import write_dataset

        self.folder, self.random = folder, random.Random(seed)
        self.seed = seed
        self.data = write_dataset(folder / "data", train=24, val=11, size=40, frames=12)
        self.references: dict[tuple, Path] = {}
        self.jobs = 0

    def start(self, script: list, output: Path | None, *flags, processes: int = 1, inject: str = "") -> Job:
        data = [] if "--data_path" in flags else ["--data_path", self.data_path(script)]
        launch = [sys.executable]
        if processes > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            launch += ["-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", port]
            flags = (*flags, "--batch_size", 4 // processes)
        launch += [Path(__file__), "--inject", inject] if inject else []
        self.jobs += 1
        folder = ["--output_dir", output] if output else []
        return Job([*launch, ROOT / script[0], *script[1:], *data, *folder, *flags], self.folder / f"{self.jobs}.txt")

    def data_path(self, script: list) -> Path:
        return self.data if script is FINETUNE else self.data / "train.csv"

    def reference(self, script: list, *flags, processes: int = 1) -> Path:
        """Folder of the undisturbed run."""
        key = (script[0], processes, *map(str, flags))
        if key not in self.references:
            folder = self.folder / f"undisturbed{len(self.references)}"
            job = self.start(script, folder, *flags, processes=processes)
            if job.finish() != 0:
                sys.exit(f"error: the undisturbed run failed:\n{job.text}")
            self.references[key] = folder
        return self.references[key]

    def new(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def said(self, row: Row, job: Job, pattern: str) -> str:
        """The line of the output that matches, with the campaign's folder shortened; noted as a problem where none."""
        text = job.text
        row.expect(not job.hung, "HUNG")
        row.expect(not OUR_TRACEBACK.search(text), "traceback")
        lines = [line for line in text.splitlines() if re.search(pattern, line)]
        row.expect(bool(lines), f"no line says {pattern!r}, the last is {(text.splitlines() or [''])[-1]!r}")
        return self.short(lines[-1]) if lines else ""

    def short(self, line: str) -> str:
        line = line.replace(f"{self.folder}/", "").replace("|", "/").strip()
        return line if len(line) < 240 else line[:237] + "..."

    def compare(self, row: Row, folder: Path, reference: Path) -> None:
        """Fills in `equal`: all of log.txt but times, weights, and the optimizer's state."""
        difference = differs(folder, reference)
        row.equal = "no" if difference else "yes"
        row.expect(not difference, difference)

    def finish_again(self, row: Row, script: list, folder: Path, reference: Path | None, *flags, **kwargs) -> Job:
        """Starts the same command once more, undisturbed."""
        job = self.start(script, folder, *flags, **kwargs)
        status = job.finish()
        row.expect(not job.hung, "the resume HUNG")
        row.expect(status == 0, f"the resume ended with {status}: {(job.text.splitlines() or [''])[-1]}")
        if reference and status == 0:
            self.compare(row, folder, reference)
        return job


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def differs(folder: Path, reference: Path) -> str:
    """What is not the same in two folders of finished runs, or ""."""
    import torch

    from runtime.checkpoint import checkpoint_files

    logs = [[{k: v for k, v in r.items() if k not in TIMES} for r in read_log(f)] for f in (folder, reference)]
    if logs[0] != logs[1]:
        return f"log.txt differs ({len(logs[0])} and {len(logs[1])} lines)"
    states = [torch.load(checkpoint_files(f)[0], weights_only=True) for f in (folder, reference)]

    def tensors(value, name=""):
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from tensors(inner, f"{name}.{key}")

    kept = [dict(tensors({k: v for k, v in s.items() if k not in ("rng", "args")})) for s in states]
    if kept[0].keys() != kept[1].keys():
        return "checkpoints hold different tensors"
    unequal = [name for name in kept[0] if not torch.equal(kept[0][name], kept[1][name])]
    return f"{len(unequal)} tensors differ, {unequal[0]}" if unequal else ""


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.tmp")] if folder.is_dir() else []


def halves(folder: Path) -> set[tuple[str, int]]:
    """Half-written files, each with its time."""
    return {(name, (folder / name).stat().st_mtime_ns) for name in unfinished(folder)}


def spread(steps: list[int]) -> str:
    return f"{sum(steps) / len(steps):.1f} steps on average, {max(steps)} at most" if steps else "0"


# --- 1: kill -9 --------------------------------------------------------------------------------------------------


def kill(campaign: Campaign) -> Iterator[Row]:
    for mask in ("tube", "tats"):
        yield kill_often(campaign, mask, 20)
    yield from kill_rank(campaign)


def kill_often(campaign: Campaign, mask: str, kills: int) -> Row:
    epochs = 14
    flags = ("--mask_type", mask, "--epochs", epochs)
    reference = campaign.reference(PRETRAIN, *flags)
    folder = campaign.new(f"kill_{mask}")
    row = Row(f"{kills} x kill -9, {mask}")
    steps = sorted(campaign.random.sample(range(2, STEPS * epochs - 6), kills))
    kinds = campaign.random.choices(["start", "step", "save"], [1, 3, 3], k=kills)
    lost, in_save, saw, before = [], 0, "", None
    for step, kind in zip(steps, kinds, strict=True):
        left = halves(folder)
        minutes = campaign.random.choice([0.002, 0.01])  # between saves
        job = campaign.start(PRETRAIN, folder, *flags, "--save_ckpt_minutes", minutes)
        if kind == "start":
            job.wait_until(lambda: False, limit=campaign.random.uniform(0.5, 5))
        else:
            row.expect(job.wait_step(step), f"step {step} not reached")
            if kind == "save":
                job.wait_until(lambda: unfinished(folder), limit=3, pause=0)
            else:
                time.sleep(campaign.random.uniform(0, 0.03))
        job.send(signal.SIGKILL)
        job.finish()
        in_save += bool(halves(folder) - left)
        from_step = resumed_step(job.text)
        if before is not None and from_step is not None:
            lost.append(before - from_step)
            saw = campaign.said(row, job, "^resumed after") or saw
        before = last_step(job.text) or before
    job = campaign.finish_again(row, PRETRAIN, folder, reference, *flags)
    lost.append(before - (resumed_step(job.text) or 0))
    saw = campaign.said(row, job, "^resumed after") or saw
    row.fault += f" ({kinds.count('start')} in start-up, {in_save} with half a save on disk)"
    row.expect(in_save > 0, "no kill fell into a save")
    row.expect(not unfinished(folder), f"left behind: {', '.join(unfinished(folder))}")
    row.saw, row.status, row.lost = saw, "-9, then 0", spread(lost)
    return row


def kill_rank(campaign: Campaign) -> Iterator[Row]:
    flags = ("--mask_type", "tats", "--epochs", 8)
    reference = campaign.reference(PRETRAIN, *flags, processes=2)
    for rank, in_save in ((0, False), (1, False), (0, True)):
        folder = campaign.new(f"kill_rank{rank}{in_save}")
        row = Row(f"kill -9 of rank {rank} of 2{' during a save' if in_save else ''}, tats")
        job = campaign.start(PRETRAIN, folder, *flags, processes=2)
        row.expect(job.wait_step(campaign.random.randrange(8, 30)), "step not reached")
        pid = job.rank(rank)
        if in_save:
            job.wait_until(lambda folder=folder: unfinished(folder), limit=5, pause=0)
        job.send(signal.SIGKILL, pid)
        began = time.monotonic()
        status = job.finish()
        row.status = f"{status} after {time.monotonic() - began:.0f} s"
        row.expect(status != 0, "status 0")
        text = job.text
        ours = [line for line in text.splitlines() if re.search(r"^error: ", line)]
        row.saw = campaign.short(ours[-1]) if ours else campaign.short(f"(torchrun) {next_signal_line(text)}")
        row.expect(not job.hung, "HUNG")
        again = campaign.finish_again(row, PRETRAIN, folder, reference, *flags, processes=2)
        row.lost = f"{last_step(text) - (resumed_step(again.text) or 0)} steps"
        yield row


def next_signal_line(text: str) -> str:
    return next((line for line in text.splitlines() if "Signal 9" in line or "exitcode" in line), "")


# --- 2: damaged checkpoints --------------------------------------------------------------------------------------


def damage(campaign: Campaign) -> Iterator[Row]:
    from runtime.checkpoint import checkpoint_files

    rng = campaign.random

    cuts = itertools.cycle(["start", "anywhere", "end"])

    def truncate(path: Path) -> str:
        size = path.stat().st_size
        ranges = {"start": (0, 1000), "anywhere": (0, size), "end": (size - 200, size)}
        length = rng.randrange(*ranges[next(cuts)])
        os.truncate(path, length)
        return f"cut to {length} of {size} bytes"

    def zero(path: Path) -> str:
        path.write_bytes(bytes(path.stat().st_size))
        return "all zeros"

    def zero_block(path: Path) -> str:
        content = bytearray(path.read_bytes())
        start = len(content) // 2
        content[start : start + 4096] = bytes(4096)
        path.write_bytes(content)
        return "a block of 4096 zeros in its middle"

    def delete(path: Path) -> str:
        path.unlink()
        return "deleted"

    def directory(path: Path) -> str:
        path.unlink()
        path.mkdir()
        (path / "file").write_text("x")
        return "replaced by a folder"

    def garbage(path: Path) -> str:
        path.write_bytes(rng.randbytes(path.stat().st_size))
        return "random bytes"

    flags = ("--mask_type", "tube", "--epochs", 5)
    reference = campaign.reference(PRETRAIN, *flags)
    for kept, every in (("two newest only", 50), ("every epoch kept", 1)):
        killed = campaign.new(f"damage{every}")
        job = campaign.start(PRETRAIN, killed, *flags, "--save_ckpt_freq", every)
        job.wait_step(21)
        job.send(signal.SIGKILL)
        job.finish()
        cases = [(f, 1) for f in (truncate, truncate, truncate, zero, zero_block, delete, directory, garbage)]
        if every == 1:
            cases = [(truncate, 2), (directory, 2)]
        else:
            cases += [(truncate, 2), (directory, 2), (delete, 2)]
        for damaged_by, count in cases:
            folder = campaign.new("damaged")
            shutil.copytree(killed, folder)
            for path in folder.glob("*.tmp"):
                path.unlink()
            files = checkpoint_files(folder)
            how = [damaged_by(path) for path in files[:count]]
            row = Row(f"{'newest checkpoint' if count == 1 else 'both newest checkpoints'} {how[0]} ({kept})")
            again = campaign.start(PRETRAIN, folder, *flags, "--save_ckpt_freq", every)
            status = again.finish()
            row.status = str(status)
            if damaged_by is delete:
                row.saw = campaign.said(row, again, "^resumed after" if count == 1 else "^note: starting")
            elif len(files) > count:
                row.saw = campaign.said(row, again, "^warning: .*not a readable|^warning: .*is a folder")
                campaign.said(row, again, "^resumed after")
                row.expect(status == 0, "status")
            else:
                row.saw = campaign.said(row, again, "^error: ")
                row.expect(status not in (0, None), "began afresh over a run's folder")
                row.lost = "nothing: refused"
            if status == 0:
                row.lost = f"{last_step(job.text) - (resumed_step(again.text) or 0)} steps"
                campaign.compare(row, folder, reference)
                rest = checkpoint_files(folder)
                row.expect(len(rest) >= 2 and all(path.is_file() for path in rest), f"left: {rest}")
            yield row
    yield from damage_best(campaign)


def damage_best(campaign: Campaign) -> Iterator[Row]:
    flags = ("--epochs", 4)
    reference = campaign.reference(FINETUNE, *flags)
    folder = campaign.new("best")
    job = campaign.start(FINETUNE, folder, *flags)
    job.wait_step(2 * STEPS + 3)
    job.send(signal.SIGKILL)
    job.finish()
    best = folder / "checkpoint-best.pth"
    os.truncate(best, best.stat().st_size // 2)
    row = Row("checkpoint-best.pth cut to half, fine-tuning goes on")
    again = campaign.finish_again(row, FINETUNE, folder, reference, *flags)
    row.saw, row.status = campaign.said(row, again, "^warning: .*checkpoint-best"), "0"
    row.lost = "the best weights; the run's last are tested" if "testing the weights" in again.text else "nothing"
    yield row
    row = Row("checkpoint-best.pth of a finished run cut to half, --eval")
    shutil.copy(reference / "checkpoint-best.pth", best)
    os.truncate(best, best.stat().st_size // 2)
    job = campaign.start(FINETUNE, folder, "--eval")
    row.status = str(job.finish())
    row.saw = campaign.said(row, job, "^error: ")
    row.expect(row.status == "1", "status")
    yield row


# --- 3: videos ---------------------------------------------------------------------------------------------------


def videos(campaign: Campaign) -> Iterator[Row]:
    for what in ("deleted", "cut to half", "all zeros"):
        data = campaign.new("vanishing")
        shutil.copytree(campaign.data, data)
        files = sorted(path for path in data.rglob("*.mp4") if "train" in str(path.relative_to(data)))
        chosen = campaign.random.sample(files, 4)
        folder = campaign.new("videos")
        row = Row(f"4 of {len(files)} videos {what} while training reads them (1 loader process)")
        job = campaign.start(PRETRAIN, folder, "--epochs", 6, "--num_workers", 1, "--data_path", data / "train.csv")
        row.expect(job.wait_step(STEPS), "step not reached")
        for path in chosen:
            if what == "deleted":
                path.unlink()
            elif what == "all zeros":
                path.write_bytes(bytes(path.stat().st_size))
            else:
                os.truncate(path, path.stat().st_size // 2)
        row.status = str(job.finish())
        row.saw = campaign.said(row, job, "^warning: unreadable video replaced")
        unnamed = [p.name for p in chosen if not re.search(f"unreadable video replaced.*{p.name}", job.text)]
        row.expect(not unnamed, f"not named: {', '.join(unnamed)}")
        counted = sum(record["train_unreadable_videos"] for record in read_log(folder))
        row.lost = f"{counted:.0f} readings, replaced and counted in log.txt"
        row.expect(counted >= 4, "not counted")
        row.expect(row.status == "0", "status")
        yield row


# --- 4: not a number on one rank ---------------------------------------------------------------------------------


def nan(campaign: Campaign) -> Iterator[Row]:
    import torch

    from datasets.build import EpochSampler
    from runtime.checkpoint import checkpoint_files

    zero3 = campaign.folder / "zero3.json"
    zero3.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    names = [Path(line.split()[0]).name for line in (campaign.data / "train.csv").read_text().splitlines()]
    backends = {"DDP": []} | {
        f"ZeRO {stage}": ["--enable_deepspeed", "--zero_stage", stage]
        + (["--deepspeed_config", zero3] if stage == 3 else [])
        for stage in range(4)
    }
    for name, more in backends.items():
        mask = "tats" if name in ("DDP", "ZeRO 2") else "tube"
        flags = ("--mask_type", mask, "--epochs", 6, "--tats_start_epoch", 0, *more)
        folder = campaign.new(f"nan_{name.replace(' ', '')}")
        row = Row(f"loss NaN on rank 1 of 2 in steps 3 and 9, {name}, {mask}")
        job = campaign.start(PRETRAIN, folder, *flags, processes=2, inject="nan:1:3,9")
        row.status = str(job.finish())
        row.saw = campaign.said(row, job, r"^warning: .*skipped")
        row.expect(row.status == "0", "status")
        if row.status == "0":
            skipped = [record["train_skipped_steps"] for record in read_log(folder)]
            row.expect(skipped == [1, 1, 0, 0, 0, 0], f"log.txt counts {skipped}")
            row.lost = "2 steps, on both ranks"
            entries = [json.loads(line) for line in (folder / "skipped_steps.jsonl").read_text().splitlines()]
            sampler = EpochSampler(len(names), 0, 1, 2)
            for step, entry in zip((3, 9), entries, strict=False):
                sampler.set_epoch(step // STEPS, step % STEPS * 2)
                wanted = [names[index] for (index, _), _ in zip(sampler, range(2), strict=False)]
                row.expect(entry["rank"] == 1, f"rank {entry['rank']} named")
                row.expect([Path(v).name for v in entry["videos"]] == wanted, f"videos {entry['videos']}")
            row.expect(len(entries) == 2, f"{len(entries)} entries in skipped_steps.jsonl")
            state = torch.load(checkpoint_files(folder)[0], weights_only=True)
            row.expect(all(v.isfinite().all() for v in state["model"].values()), "weights not finite")
        yield row

        folder = campaign.new(f"nans_{name.replace(' ', '')}")
        row = Row(f"loss NaN on rank 1 of 2 from step 8 on, {name}, {mask}")
        steps = ",".join(map(str, range(8, 100)))
        job = campaign.start(PRETRAIN, folder, *flags, processes=2, inject=f"nan:1:{steps}")
        ended = job.wait_line("^error: the gradient was not finite")  # by the first; torchrun ends a slower second
        began = time.monotonic()
        row.status = str(job.finish())
        row.saw = campaign.said(row, job, "^error: ")
        row.expect(row.status == "1", "status")
        row.expect(ended and time.monotonic() - began < 20, "a rank went on")
        states = [torch.load(path, weights_only=True) for path in checkpoint_files(folder)]
        row.expect(bool(states) and all(v.isfinite().all() for s in states for v in s["model"].values()), "checkpoints")
        again = campaign.finish_again(row, PRETRAIN, folder, None, *flags, processes=2)
        row.lost = f"stopped at step {last_step(job.text)}, goes on from step {resumed_step(again.text)}"
        row.expect(
            all(r["train_loss"] is not None and r["train_loss"] == r["train_loss"] for r in read_log(folder)), "losses"
        )
        yield row


# --- 5: processes that go ----------------------------------------------------------------------------------------


def loader(campaign: Campaign) -> Iterator[Row]:
    flags = ("--mask_type", "tube", "--epochs", 8)
    reference = campaign.reference(PRETRAIN, *flags)
    for workers in (1, 2):
        folder = campaign.new("loader")
        row = Row(f"kill -9 of a loader process (1 of {workers})")
        job = campaign.start(PRETRAIN, folder, *flags, "--num_workers", workers)
        row.expect(job.wait_step(campaign.random.randrange(8, 30)), "step not reached")
        job.send(signal.SIGKILL, campaign.random.choice(job.children()))
        began = time.monotonic()
        status = job.finish()
        seconds = time.monotonic() - began
        row.status = f"{status} after {seconds:.0f} s"
        row.expect(status == 1 and seconds < 15, "status, or too late")
        row.saw = campaign.said(row, job, "^error: ")
        again = campaign.finish_again(row, PRETRAIN, folder, reference, *flags, "--num_workers", workers)
        row.lost = f"{last_step(job.text) - (resumed_step(again.text) or 0)} steps"
        yield row
    flags = ("--mask_type", "tats", "--epochs", 8)
    reference = campaign.reference(PRETRAIN, *flags, processes=2)
    folder = campaign.new("stopped")
    row = Row("rank 1 of 2 stopped for 5 s (SIGSTOP, SIGCONT)")
    job = campaign.start(PRETRAIN, folder, *flags, processes=2)
    row.expect(job.wait_step(10), "step not reached")
    pid = job.rank(1)
    job.send(signal.SIGSTOP, pid)
    time.sleep(5)
    row.expect(job.process.poll() is None, "ended")
    job.send(signal.SIGCONT, pid)
    row.status = str(job.finish())
    row.saw = campaign.said(row, job, "^training took")
    row.lost = "nothing; a rank that stays stopped ends the job after the group's time-out of 1 hour (not waited for)"
    campaign.compare(row, folder, reference)
    yield row


# --- 6: disks ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A tmpfs; yields None where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    try:
        yield folder if made.returncode == 0 else None
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def disk(campaign: Campaign) -> Iterator[Row]:
    from runtime.checkpoint import checkpoint_files, load_checkpoint

    flags = ("--mask_type", "tube", "--epochs", 8)
    reference = campaign.reference(PRETRAIN, *flags)
    yield from torn_log(campaign, reference, flags)
    with small_disk(campaign.folder / "disk", "18m") as disk:  # two checkpoints of 7 MB and no third
        if disk is None:
            yield Row("full disk, read-only disk", saw="skipped: mounting is not allowed here")
            return
        row = Row("--output_dir full from the third save on")
        job = campaign.start(PRETRAIN, disk / "run", *flags)
        row.status = str(job.finish())
        campaign.said(row, job, "^warning: .*No space left|^warning: .*cannot be written")
        row.saw = campaign.said(row, job, "^error: ")
        row.expect(row.status == "1", "status")
        row.expect(last_step(job.text) == 8 * STEPS, f"training stopped at step {last_step(job.text)}")
        for path in checkpoint_files(disk / "run"):
            load_checkpoint(path)
        row.expect(bool(checkpoint_files(disk / "run")), "no checkpoint left")
        remount(disk, "size=64m")
        again = campaign.finish_again(row, PRETRAIN, disk / "run", reference, *flags)
        row.lost = f"{last_step(job.text) - (resumed_step(again.text) or 0)} steps, done again after room was made"
        yield row
    with small_disk(campaign.folder / "disk", "32m") as disk:
        row = Row("--output_dir full to the last byte, log.txt too")
        flags = ("--mask_type", "tats", "--epochs", 8)  # whose lines are long: a tmpfs gives room by 4096 bytes
        reference = campaign.reference(PRETRAIN, *flags)
        job = campaign.start(PRETRAIN, disk / "run", *flags)
        row.expect(job.wait_step(STEPS * 2 + 2), "step not reached")
        fill(disk)
        row.status = str(job.finish())
        row.saw = campaign.said(row, job, "^warning: .*log.txt lacks")
        campaign.said(row, job, "^error: ")
        row.expect(row.status == "1", "status")
        row.expect(last_step(job.text) == 8 * STEPS, f"training stopped at step {last_step(job.text)}")
        still = campaign.start(PRETRAIN, disk / "run", *flags)  # no room yet
        row.expect(still.finish() == 1, "started without room")
        campaign.said(row, still, "^error: ")
        row.expect(json.loads((disk / "run" / "args.json").read_text())["args"]["epochs"] == 8, "args.json")
        (disk / "filler").unlink()
        again = campaign.finish_again(row, PRETRAIN, disk / "run", reference, *flags)
        row.lost = f"{last_step(job.text) - (resumed_step(again.text) or 0)} steps, done again after room was made"
        yield row
    with small_disk(campaign.folder / "disk", "32m") as disk:
        row = Row("--output_dir turned read-only while training runs")
        job = campaign.start(PRETRAIN, disk / "run", *flags)
        row.expect(job.wait_step(STEPS * 3), "step not reached")
        for _ in range(100):  # busy while a file is open for writing
            with contextlib.suppress(subprocess.CalledProcessError):
                remount(disk, "ro")
                break
        row.status = str(job.finish())
        campaign.said(row, job, "^warning: .*Read-only")
        row.saw = campaign.said(row, job, "^error: ")
        row.expect(row.status == "1", "status")
        row2 = Row("--output_dir read-only from the start")
        still = campaign.start(PRETRAIN, disk / "run", *flags)
        row2.status = str(still.finish())
        row2.saw = campaign.said(row2, still, "^error: ")
        row2.expect(row2.status == "1", "status")
        row2.lost = "nothing: does not start"
        remount(disk, "rw")
        again = campaign.finish_again(row, PRETRAIN, disk / "run", reference, *flags)
        row.lost = f"{last_step(job.text) - (resumed_step(again.text) or 0)} steps, done again once it was writable"
        yield from (row, row2)
    with small_disk(campaign.folder / "disk", "8k") as disk:
        row = Row("--log_dir full (tensorboard)")
        folder = campaign.new("tensorboard")
        job = campaign.start(PRETRAIN, folder, *flags, "--log_dir", disk)
        row.status = str(job.finish())
        row.saw = campaign.said(row, job, "^warning: .*log_dir")
        row.expect(row.status == "0", "status")
        row.lost = "curves after that (log.txt goes on)"
        if row.status == "0":
            campaign.compare(row, folder, reference)
        yield row


def fill(disk: Path) -> None:
    """Until nothing fits; what frees a little later is taken too."""
    end = time.monotonic() + 1
    with open(disk / "filler", "ab", buffering=0) as file:
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                file.write(bytes(65536))
                continue
            with contextlib.suppress(OSError):
                file.write(bytes(1))
            time.sleep(0.002)


def torn_log(campaign: Campaign, reference: Path, flags: tuple) -> Iterator[Row]:
    tails = {"a torn line": b'{"train_loss": 0.9, "tr', "zeros and bytes of no text": bytes(50) + b"\xff\xfe"}
    for what, tail in tails.items():
        folder = campaign.new("torn")
        row = Row(f"kill -9, and log.txt ends in {what}")
        job = campaign.start(PRETRAIN, folder, *flags)
        row.expect(job.wait_step(STEPS * 3), "step not reached")
        job.send(signal.SIGKILL)
        row.status = f"{job.finish()}, then 0"
        with open(folder / "log.txt", "ab") as file:
            file.write(tail)
        again = campaign.finish_again(row, PRETRAIN, folder, reference, *flags)
        row.saw = campaign.said(row, again, "^resumed after")
        row.lost = f"{last_step(job.text) - (resumed_step(again.text) or 0)} steps"
        yield row


# --- 7: signals --------------------------------------------------------------------------------------------------


def signals(campaign: Campaign) -> Iterator[Row]:
    epochs = 14
    for number, mask in ((signal.SIGTERM, "tats"), (signal.SIGUSR1, "tube")):
        flags = ("--mask_type", mask, "--epochs", epochs, "--save_ckpt_minutes", 0, "--num_workers", 1)
        reference = campaign.reference(PRETRAIN, *flags)
        folder = campaign.new(f"signals_{mask}")
        row = Row(f"8 x {number.name} at random steps, {mask}")
        statuses, lost, before = [], [], None
        for step in sorted(campaign.random.sample(range(1, STEPS * epochs - 3), 8)):
            job = campaign.start(PRETRAIN, folder, *flags)
            row.expect(job.wait_step(step), f"step {step} not reached")
            time.sleep(campaign.random.uniform(0, 0.03))
            job.send(number)
            statuses.append(job.finish())
            row.saw = campaign.said(row, job, "^stopped ")
            if before is not None:
                lost.append(before - (resumed_step(job.text) or 0))
            before = last_step(job.text)
        again = campaign.finish_again(row, PRETRAIN, folder, reference, *flags)
        lost.append(before - (resumed_step(again.text) or 0))
        row.status, row.lost = ", ".join(map(str, sorted(set(statuses)))) + ", then 0", spread(lost)
        row.expect(set(statuses) == {75}, "status")
        row.expect(max(lost) == 0, "steps lost")
        yield row

    flags = ("--mask_type", "tube", "--epochs", 8)
    reference = campaign.reference(PRETRAIN, *flags)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        row = Row(f"{number.name} during start-up (6 random moments)")
        statuses = []
        for _ in range(6):
            folder = campaign.new("early")
            job = campaign.start(PRETRAIN, folder, *flags)
            job.wait_until(lambda: False, limit=campaign.random.uniform(0.5, 5))
            job.send(number)
            statuses.append(job.finish())
            row.expect(not OUR_TRACEBACK.search(job.text), "traceback")
            row.expect(not job.hung, "HUNG")
            row.saw = next((self for self in job.text.splitlines() if self.startswith("stopped")), row.saw)
        row.status, row.lost = ", ".join(map(str, sorted(set(statuses)))), "nothing was done yet"
        row.expect(set(statuses) <= {75, -number}, "status")
        yield row

    row = Row("SIGTERM three times in a row")
    folder = campaign.new("twice")
    job = campaign.start(PRETRAIN, folder, *flags)
    row.expect(job.wait_step(20), "step not reached")
    for pause in (0.01, 0.05, 0):
        job.send(signal.SIGTERM)
        time.sleep(pause)
    row.status = str(job.finish())
    row.saw = campaign.said(row, job, "^stopped ")
    row.expect(row.status == "75", "status")
    campaign.finish_again(row, PRETRAIN, folder, reference, *flags)
    row.lost = "0 steps"
    yield row

    for workers, everybody in ((0, False), (2, True)):
        row = Row("SIGINT" + (" (Ctrl-C: the loader processes get it too)" if everybody else ""))
        folder = campaign.new("interrupted")
        job = campaign.start(PRETRAIN, folder, *flags, "--num_workers", workers)
        row.expect(job.wait_step(20), "step not reached")
        for pid in [job.process.pid] + everybody * job.children():
            job.send(signal.SIGINT, pid)
        row.status = str(job.finish())
        row.saw = campaign.said(row, job, "^error: |^stopped|interrupted")
        row.expect(row.status == "130", "status")
        again = campaign.finish_again(row, PRETRAIN, folder, reference, *flags, "--num_workers", workers)
        row.lost = f"{last_step(job.text) - (resumed_step(again.text) or 0)} steps"
        yield row

    row = Row("a finished folder started again")
    job = campaign.start(PRETRAIN, folder, *flags)
    row.status, row.saw, row.lost = str(job.finish()), campaign.said(row, job, "^nothing to do"), "nothing"
    row.expect(row.status == "0", "status")
    campaign.compare(row, folder, reference)
    yield row

    flags = ("--epochs", 3)
    reference = campaign.reference(FINETUNE, *flags)
    for what, occasion, times in (("validation", "evaluate", 2), ("the test", "evaluate", 4)):
        row = Row(f"SIGTERM during {what} of fine-tuning")
        folder = campaign.new("finetune")
        job = campaign.start(FINETUNE, folder, *flags, inject="slow_evaluate")
        row.expect(
            job.wait_until(lambda job=job, n=times, o=occasion: job.text.count(f"-- {o} begins") >= n), "not reached"
        )
        time.sleep(0.3)
        job.send(signal.SIGTERM)
        row.status = str(job.finish())
        row.saw = campaign.said(row, job, "^stopped ")
        row.expect(row.status == "75", "status")
        again = campaign.finish_again(row, FINETUNE, folder, reference, *flags)
        row.lost = f"{last_step(job.text) - (resumed_step(again.text) or 0)} steps"
        results = [json.loads((f / "test.json").read_text()) for f in (folder, reference)]
        row.expect(results[0]["acc1"] == results[1]["acc1"] and results[0]["loss"] == results[1]["loss"], "test.json")
        yield row
    row = Row("a finished fine-tuning folder started again")
    job = campaign.start(FINETUNE, folder, *flags)
    row.status, row.saw, row.lost = str(job.finish()), campaign.said(row, job, "^nothing to do"), "nothing"
    row.expect(row.status == "0", "status")
    yield row


# --- what this file does inside a run it disturbs ----------------------------------------------------------------


def inject(what: str, command: list[str]) -> None:
    """Runs the script `command` with a fault in it: nan:RANK:STEP,STEP,... or slow_evaluate."""
    import runpy

    kind, *rest = what.split(":")
    if kind == "nan":
        import engine_for_pretraining
        import engine_for_tats

        steps = {int(step) for step in rest[1].split(",")} if os.environ["RANK"] == rest[0] else set()
        calls = iter(range(10**9))
        true_error = engine_for_pretraining.masked_error

        def masked_error(*args):
            error = true_error(*args)
            return error * float("nan") if next(calls) in steps else error

        engine_for_pretraining.masked_error = engine_for_tats.masked_error = masked_error
    elif kind == "slow_evaluate":
        import engine_for_finetuning

        true_evaluate = engine_for_finetuning.evaluate

        def evaluate(*args, **kwargs):
            print("-- evaluate begins", flush=True)
            end = time.monotonic() + 1  # a signal does not shorten it
            while time.monotonic() < end:
                time.sleep(0.01)
            return true_evaluate(*args, **kwargs)

        engine_for_finetuning.evaluate = evaluate
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


GROUPS = {f.__name__: f for f in (kill, damage, videos, nan, loader, disk, signals)}
COLUMNS = ["fault", "what the user saw", "exit status", "lost", "equal after resume", "result"]


def main() -> None:
    if sys.argv[1:2] == ["--inject"]:
        return inject(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), metavar="NAME",
                        help=f"groups of faults: {', '.join(GROUPS)}")  # fmt: skip
    parser.add_argument("--seed", default=0, type=int, help="decides moments and kinds of damage")
    parser.add_argument("--keep", help="folder for the runs and their output; default: a temporary one")
    flags = parser.parse_args()
    import torch

    start, failed = time.monotonic(), 0
    with contextlib.ExitStack() as stack:
        folder = flags.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="faults"))
        Path(folder).mkdir(parents=True, exist_ok=True)
        print(f"{os.cpu_count()} cores, torch {torch.__version__}, seed {flags.seed}, {date.today()}\n")
        for line in (COLUMNS, ["---"] * len(COLUMNS)):
            print(f"| {' | '.join(line)} |", flush=True)
        for name in flags.only:
            campaign = Campaign(Path(folder, name), flags.seed)
            for row in GROUPS[name](campaign):
                failed += bool(row.problems)
                print(f"| {' | '.join(row.cells())} |", flush=True)
    print(f"\n{time.monotonic() - start:.0f} s, {failed} rows failed", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
