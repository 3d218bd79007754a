"""What the commands in bench/ share: flags, rounds, peaks of memory and of speed, operation counts, the table."""

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def new_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", default=5, type=int, help="timed visits of every row (5)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows, and those they are compared with")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="a table each (fp32; on a GPU bf16)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--threads", default=0, type=int, help="of the CPU (torch's own number)")
    parser.add_argument("--sweep", action="store_true", help="also how the cost grows with the size")
    parser.add_argument("--skip_memory", action="store_true", help="it takes a process per row on a CPU")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # the row a fresh process measures
    return parser


def start(flags: argparse.Namespace) -> torch.device:
    """Sets the threads and what the flags leave open."""
    if flags.threads:
        torch.set_num_threads(flags.threads)
    if flags.dtype is None:
        flags.dtype = ["bf16" if flags.device == "cuda" else "fp32"]
    return torch.device(flags.device)


def choose_rows(flags: argparse.Namespace, known: list[str], always: tuple[str, ...] = ()) -> list[str]:
    """Rows in the table's order, those always needed among them."""
    unknown = [name for name in flags.rows or [] if name not in known]
    if unknown:
        sys.exit(f"error: --rows {' '.join(unknown)}: unknown; some of {', '.join(known)}")
    return [name for name in known if flags.rows is None or name in flags.rows or name in always]


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def time_rounds(
    calls: dict[Hashable, Callable[[], object]], rounds: int, device: torch.device
) -> dict[Hashable, list[float]]:
    """Seconds of every call in every round. Rounds visit all calls in turn, so that what else a shared machine does
    falls on all of them; one more round goes before, which warms up."""
    seconds = {key: [] for key in calls}
    for number in range(rounds + 1):
        for key, call in calls.items():
            spent = seconds_of(call, device)
            if number:
                seconds[key].append(spent)
    return seconds


def ratio(times: list[float], reference: list[float] | None) -> str:
    """Median over the rounds of this time over the reference's of the same round."""
    if reference is None:
        return "-"
    return f"{statistics.median(t / r for t, r in zip(times, reference, strict=True)):.2f}"


for end in ("", "_backward"):  # torch before 2.15 does not count the CPU's kernel
    kernel = "_scaled_dot_product_flash_attention"
    counted, on_cpu = (getattr(torch.ops.aten, f"{kernel}{place}{end}") for place in ("", "_for_cpu"))
    flop_registry.setdefault(on_cpu, flop_registry[counted])


def count_flop(call: Callable[[], object]) -> int:
    """Multiplications and additions of the matrix products and fused attention that call runs, recomputed ones too;
    elementwise operations, norms, softmaxes, sorts and the optimizer are not in it. Compiled modules run eagerly."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class Product:
    """One big square matrix product, timed in every round beside the rows: the measure of what the device can do."""

    def __init__(self, device: torch.device, dtype: str):
        size = 8192 if device.type == "cuda" else 2048
        self.matrix = torch.randn(size, size, device=device, dtype=DTYPES[dtype])
        self.flop = 2 * size**3

    def __call__(self) -> None:
        self.matrix @ self.matrix

    def peak(self, times: list[float]) -> float:
        """FLOP/s of the best round."""
        return self.flop / min(times)

    def share(self, flop: float, times: list[float], product_times: list[float]) -> str:
        """Median over the rounds of a row's FLOP/s over the product's of the same round."""
        return f"{statistics.median(flop / t / (self.flop / p) for t, p in zip(times, product_times, strict=True)):.2f}"


def header(device: torch.device, dtype: str, peak: float | None = None) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()
    line = f"{name}, {torch.get_num_threads()} CPU thread(s), torch {torch.__version__}, {dtype}, {date.today()}"
    return line if peak is None else f"{line}; matrix product {peak / 1e12:.3g} TFLOP/s"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def peak_growth(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that call, run before, needs at its peak beyond what was there when it began. On a CPU: resident memory,
    right only in a process that fresh_process started."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError):  # where that is not allowed the peak counts from the start of the process
        Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    call()
    return max(status_bytes("VmHWM") - before, 0)


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def fresh_process(row: str, overrides: list[str]) -> list[int] | None:
    """The numbers this command, run once more with --memory_of row and the overrides, prints as its last line; None
    where the system does not tell a process's memory. Large tensors go back to the system when they are freed."""
    if not Path("/proc/self/status").exists():
        return None
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, *sys.argv, *overrides, "--memory_of", row]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"error: {row} failed in a process of its own ({result.returncode}); --skip_memory leaves that out")
    return [int(number) for number in result.stdout.splitlines()[-1].split()]


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]
    for line in [columns, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]), flush=True)
    print(flush=True)
