"""Running means on the device, and the progress line."""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from utils import format_time, is_main_process, world_size


class Metrics:
    """Running means of 0-d tensors that stay on the device; read only when a line is printed.

    Values that are not finite are left out of the means (the backend counts such steps).
    """

    def __init__(self):
        # names -> [sums, counts] of the window and of the epoch before it; one entry for each set of names
        self.window: dict[tuple[str, ...], list[Tensor]] = {}
        self.epoch: dict[tuple[str, ...], list[Tensor]] = {}

    def update(self, **values: Tensor) -> None:
        # in float64 sums of float32 do not depend on their order, hence not on where a run was interrupted
        stacked = torch.stack([value.detach().double() for value in values.values()])
        finite = torch.isfinite(stacked)
        names = tuple(values)
        if names not in self.window:
            self.window[names] = [torch.zeros_like(stacked), torch.zeros_like(stacked)]
            self.epoch.setdefault(names, [torch.zeros_like(stacked), torch.zeros_like(stacked)])
        self.window[names][0] += torch.where(finite, stacked, 0)
        self.window[names][1] += finite

    def read_window(self) -> dict[str, float]:
        """Means since the last call; waits for the device."""
        for names, parts in self.window.items():
            for total, part in zip(self.epoch[names], parts, strict=True):
                total += part
        means = _means(self.window)
        self.window = {}
        return means

    def read_epoch(self) -> dict[str, float]:
        """Means over the epoch and over all ranks."""
        self.read_window()
        if dist.is_initialized():
            for part in (part for parts in self.epoch.values() for part in parts):
                dist.all_reduce(part)
        return _means(self.epoch)

    def state(self) -> dict[str, list[list[float]]]:
        """Sums and counts of the epoch so far over all ranks, {names joined by commas: [sums, counts]}."""
        self.read_window()
        summed = {}
        for names, parts in self.epoch.items():
            parts = [part.clone() for part in parts]
            for part in parts if dist.is_initialized() else []:
                dist.all_reduce(part)
            summed[",".join(names)] = [part.tolist() for part in parts]
        return summed

    def load(self, state: dict[str, list[list[float]]], device: torch.device, weight: float = 1.0) -> None:
        """Continues from `state`, whose values count `weight` times; the main rank has it for all."""
        share = weight if is_main_process() else 0.0
        for names, parts in state.items():
            parts = [share * torch.tensor(part, dtype=torch.float64, device=device) for part in parts]
            self.epoch[tuple(names.split(","))] = parts


def _means(groups: dict[tuple[str, ...], list[Tensor]]) -> dict[str, float]:
    return {
        name: mean
        for names, (total, count) in groups.items()
        for name, mean in zip(names, (total / count).tolist(), strict=True)
    }


class Progress:
    """Iterates a loader, timing how long steps wait for data, and prints where training stands.

    print_freq steps a line; in a terminal one line that is rewritten.
    """

    def __init__(self, header: str, steps: int, print_freq: int, remaining_steps: int):
        self.header, self.steps, self.print_freq = header, steps, print_freq
        self.remaining_steps = remaining_steps  # of the whole run, at the start of this epoch
        self.data_seconds = self.seconds = 0.0
        self._open_window()

    def _open_window(self) -> None:
        self.window_start = time.perf_counter()
        self.window_data = 0.0
        self.window_steps = self.window_clips = 0

    def watch(self, loader: Iterable, start: int = 0) -> Iterator:
        """Yields the batches of the epoch from number `start` on; the time inside next() is data wait."""
        self._open_window()
        iterator = iter(loader)
        for _ in range(start, self.steps):
            begin = time.perf_counter()
            batch = next(iterator)
            self.window_data += time.perf_counter() - begin
            self.window_steps += 1
            self.window_clips += len(batch["video"])
            yield batch

    def report(self, step: int, metrics: Metrics, lr: float) -> dict[str, float]:
        """Prints and returns the means of the window that ends with this step (0-based)."""
        values = metrics.read_window()  # waits for the device, so that the time is true
        seconds = time.perf_counter() - self.window_start
        self.seconds += seconds
        self.data_seconds += self.window_data
        per_step = seconds / self.window_steps
        left = per_step * (self.remaining_steps - step - 1)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "loss")
        line = (  # what matters first: a narrow terminal shows the beginning
            f"{self.header} [{step + 1}/{self.steps}]  loss {values['loss']:.4g}  lr {lr:.3g}  "
            f"data {self.window_data / self.window_steps:.3f} s  step {per_step:.3f} s  "
            f"{self.window_clips * world_size() / seconds:.1f} clips/s  left {format_time(left)}  {shown}"
        )
        self._open_window()
        if is_main_process():
            if sys.stdout.isatty():
                line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be rewritten
                print(f"\r\033[K{line}", end="\n" if step + 1 == self.steps else "", flush=True)
            else:
                print(line, flush=True)
        return values

    def epoch_times(self) -> dict[str, float]:
        """Mean seconds a micro-batch."""
        return {"data_time": self.data_seconds / self.steps, "step_time": self.seconds / self.steps}
