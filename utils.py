"""Processes, seeds, memory and the files a run writes."""

import contextlib
import datetime
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import MutableMapping
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class UsageError(Exception):
    """Something the user can put right: says which flag, file or line, and what to do."""


# --- processes ---------------------------------------------------------------------------------------------------


def init_distributed(args) -> None:
    """Joins the process group that the launcher describes and sets args.rank, world_size, local_rank, distributed.

    torchrun's variables come first (srun sets its own even around torchrun), then Open MPI's (--dist_on_itp), then
    those of a Slurm step of several tasks: a batch script or an salloc shell has SLURM_NTASKS too, but is one process.
    Several processes get torchrun's variables whoever started them; one process makes no group. Raises UsageError.
    """
    env = os.environ
    slurm = False
    if "RANK" in env:
        rank, world, local = env["RANK"], env.get("WORLD_SIZE", args.world_size), env.get("LOCAL_RANK", args.local_rank)
        here = env.get("LOCAL_WORLD_SIZE", 1)
    elif args.dist_on_itp:
        try:
            rank, world, local, here = (
                env[f"OMPI_COMM_WORLD_{name}"] for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
            )
        except KeyError as error:
            raise UsageError(f"--dist_on_itp needs a launch by mpirun: {error} is not set") from None
    elif slurm := int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        rank, world, local = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"], env["SLURM_LOCALID"]
        here = len(env["SLURM_GTIDS"].split(","))  # the step's tasks on this node
        if args.dist_url == "env://":
            _set_slurm_master(env)
    else:
        rank, world, local, here = 0, 1, 0, 1
    args.rank, args.world_size, args.local_rank = int(rank), int(world), max(int(local), 0)
    args.distributed = args.world_size > 1
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here; use --device cpu")
    if args.device == "cuda":
        devices = torch.cuda.device_count()
        if slurm and devices == 1:  # Slurm may show each task its own GPU only
            args.local_rank = 0
        if args.local_rank >= devices:
            raise UsageError(f"process {args.local_rank} of this node has no GPU of its own: torch sees {devices}")
        torch.cuda.set_device(args.local_rank)
    if not args.distributed:
        return
    env.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(args.local_rank), LOCAL_WORLD_SIZE=str(here))
    try:
        dist.init_process_group(
            "nccl" if args.device == "cuda" else "gloo",
            init_method=args.dist_url,
            rank=args.rank,
            world_size=args.world_size,
            timeout=datetime.timedelta(hours=1),  # one process may test or read longer than the others
        )
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:  # ValueError: no MASTER_ADDR, say
        place = args.dist_url
        if place == "env://":
            place = f"MASTER_ADDR:MASTER_PORT = {env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}"
        reason = first_line(error)
        raise UsageError(f"process {rank} of {world} did not find the others at {place} ({reason})") from error


def _set_slurm_master(env: MutableMapping[str, str]) -> None:
    """MASTER_ADDR and MASTER_PORT, where not set: the first host of the step, a port of its own for each step of a job.
    Raises UsageError."""
    port = 31 * int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])
    env.setdefault("MASTER_PORT", str(12000 + port % 20000))  # below the ports the system gives to clients
    if env.get("MASTER_ADDR"):
        return
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
    try:
        shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        env["MASTER_ADDR"] = shown.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        raise UsageError(
            f"scontrol does not name the hosts of {nodes} ({reason}): set MASTER_ADDR to the first of them"
        ) from error


def is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def check_same_on_all_ranks(value, what: str) -> None:
    """Raises UsageError on every process unless all have the same value: what one of them alone reads from its disk
    would lead them apart."""
    values = all_gather_object(value)
    if any(other != values[0] for other in values):
        raise UsageError(f"the processes see different {what} ({values}): --output_dir must be on a shared disk")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_object(value) -> list:
    """The values of all processes, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def total(value: int, device: torch.device) -> int:
    """The sum over all processes."""
    if not dist.is_initialized():
        return value
    summed = torch.tensor(value, device=device)
    dist.all_reduce(summed)
    return int(summed)


def mean_and_deviation(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of the values of all ranks together, float64 [] on the device.

    Two passes, so that a mean much larger than the deviation costs no digits. Every rank has to call it.
    """
    values = values.double()
    count_and_sum = torch.stack([values.new_full((), values.numel()), values.sum()])
    if dist.is_initialized():
        dist.all_reduce(count_and_sum)
    count, mean = count_and_sum[0], count_and_sum[1] / count_and_sum[0]
    squares = (values - mean).square().sum()
    if dist.is_initialized():
        dist.all_reduce(squares)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


def log(message: str) -> None:
    """One line on the main process's standard output."""
    if is_main_process():
        print(message, flush=True)


def tolerant_output() -> None:
    """Prints names that are not UTF-8, or that the terminal cannot show, with escapes and not with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a test or notebook has taken its place
            stream.reconfigure(errors="backslashreplace")


def picture_text(text: str) -> str:
    """A user's text for matplotlib, shown as it is: `$` begins no formula, what is no character becomes `?`."""
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    return text.replace("$", r"\$")


def first_line(error: Exception) -> str:
    """Of its message, or its kind where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def seed_everything(seed: int, rank: int | None = None) -> None:
    """Seeds Python's, numpy's and torch's generators: without rank alike on all ranks, with it each pair (seed, rank)
    gets streams of its own. With seed + rank, rank 1 of seed 0 would draw what rank 0 of seed 1 draws."""
    if rank is None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        return
    # spawn_key: a seed of several 32-bit words cannot run into the rank, as it could in SeedSequence([seed, rank])
    words = np.random.SeedSequence(seed, spawn_key=(rank,)).generate_state(8)
    random.seed(words[:4].tobytes())
    np.random.seed(words[:4])
    torch.manual_seed(int.from_bytes(words[4:6].tobytes(), "little"))


def rng_state(device: torch.device) -> list[dict]:
    """Random state of every rank, as tensors and plain numbers (loads with weights_only=True)."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    name, keys, *rest = np.random.get_state()
    state["numpy"] = (name, keys.tolist(), *rest)
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return all_gather_object(state)


def set_rng_state(states: list[dict], device: torch.device) -> None:
    """Restores this rank's state; a run on another number of ranks keeps its fresh seeds."""
    if len(states) != world_size():
        log(f"note: {len(states)} processes wrote the checkpoint, this run has {world_size()}: new random states")
        return
    state = states[dist.get_rank() if dist.is_initialized() else 0]
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


CGROUP = Path("/sys/fs/cgroup")  # the container's limits, by the kernel


def available_memory() -> int | None:
    """Bytes of host memory that can be had without swapping, within a container's limit (cgroup v2); caches of files
    count as free. None where the system does not tell (macOS, Windows)."""
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(lines["inactive_file"]) + int(lines["active_file"]))
    except (OSError, ValueError, KeyError):  # no limit
        return free


def peak_memory(device: torch.device) -> float:
    """Most that this process has held so far, in GiB: tensors on a GPU, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes, or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def format_time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


# --- files of a run ----------------------------------------------------------------------------------------------


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or leaves the older one whole. Raises OSError that names it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_run_description(path: Path, args) -> None:
    """A JSON file of every resolved flag, package versions and the git revision."""
    packages = ("torch", "torchvision", "timm", "numpy", "decord", "av", "deepspeed")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    root = Path(__file__).resolve().parent
    try:
        git = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True)
        revision = git.stdout.strip() or None
    except OSError:  # no git on this machine
        revision = None
    description = {
        "args": vars(args),
        "command": sys.argv,
        "versions": versions,
        "python": sys.version.split()[0],
        "git": revision,
    }
    replace_text(path, json.dumps(description, indent=2, default=str) + "\n")


def append_json_line(path: Path, record: dict) -> None:
    """log.txt as VideoMAE writes it: one JSON object a line. Raises OSError."""
    record = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in record.items()}
    with open(path, "ab+") as file:
        torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"  # by a full disk, once
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")


def write_log(output: Path | None, record: dict) -> None:
    """A line of log.txt, by the main process; a full disk is a warning: losing a line is better than losing the run."""
    if output and is_main_process():
        try:
            append_json_line(output / "log.txt", record)
        except OSError as error:
            log(f"warning: {output / 'log.txt'} lacks epoch {record['epoch']} ({error.strerror}): {record}")


def drop_epochs_from(path: Path, epoch: int) -> None:
    """Removes what a killed run logged of epochs that are about to be run again."""
    if path.exists():
        lines = path.read_text(errors="replace").splitlines()  # a power cut can leave anything at the end
        replace_text(path, "".join(f"{line}\n" for line in lines if _epoch_of(line) < epoch))


def _epoch_of(line: str) -> float:
    """Of a line of log.txt; one that tells none stays, one that was cut off by a crash goes."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return math.inf
    return record.get("epoch", -1) if isinstance(record, dict) else math.inf
