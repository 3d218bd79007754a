"""The output folder: tensorboard curves, descriptions of the run."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch

from runtime.backend import Backend
from runtime.zero import DeepSpeedBackend
from utils import UsageError, is_main_process, log, write_run_description


class SummaryWriter:
    """tensorboard's file of scalars in a folder, written by the training process itself: the thread of tensorboardX's
    SummaryWriter dies of a full disk, and training then waits for it forever. Here a full disk ends the curves with a
    warning. Raises ImportError, OSError."""

    FLUSH_SECONDS = 60

    def __init__(self, folder: str):
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import image, scalar

        self.folder, self.event, self.scalar, self.image = folder, Event, scalar, image
        os.makedirs(folder, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self.file = RecordWriter(os.path.join(folder, name))
        self.flushed = 0.0
        self._write(file_version="brain.Event:2")

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._write(step=step, summary=self.scalar(name, value))

    def add_image(self, name: str, picture: torch.Tensor, step: int) -> None:
        """picture uint8 [3, H, W]."""
        self._write(step=step, summary=self.image(name, picture.numpy()))

    def close(self) -> None:
        if self.file is not None:
            self._attempt(self.file.close)
            self.file = None

    def _write(self, **content) -> None:
        if self.file is None:
            return
        record = self.event(wall_time=time.time(), **content).SerializeToString()
        self._attempt(lambda: self.file.write(record))
        if self.file is not None and time.monotonic() - self.flushed > self.FLUSH_SECONDS:
            self.flushed = time.monotonic()
            self._attempt(self.file.flush)

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            log(f"warning: --log_dir {self.folder}: {error.strerror}; no more curves are written, only log.txt")
            with contextlib.suppress(OSError):
                self.file.close()
            self.file = None


def closing(curves: SummaryWriter | None):
    """A context that closes them where there are any."""
    return contextlib.nullcontext() if curves is None else contextlib.closing(curves)


def open_output(args, description: str = "args.json") -> tuple[Path | None, SummaryWriter | None]:
    """The main process makes --output_dir, writes the description of the run there, and opens --log_dir.

    Returns: the output folder, or None; tensorboard's curves, or None. Raises UsageError.
    """
    output = Path(args.output_dir) if args.output_dir else None
    if not is_main_process():
        return output, None
    if output:
        try:
            output.mkdir(parents=True, exist_ok=True)
            write_run_description(output / description, args)
        except OSError as error:
            raise UsageError(f"--output_dir {output}: cannot be written ({error.strerror})") from error
    if not args.log_dir:
        return output, None
    try:
        return output, SummaryWriter(args.log_dir)
    except ImportError:
        raise UsageError("--log_dir needs tensorboardX: pip install tensorboardX, or leave the flag out") from None
    except OSError as error:
        raise UsageError(f"--log_dir {args.log_dir}: cannot be written ({error.strerror})") from error


def write_deepspeed_configs(output: Path | None, backends: dict[str, Backend]) -> None:
    """deepspeed_config_NAME.json of each backend that has one."""
    for name, backend in backends.items():
        if output and is_main_process() and isinstance(backend, DeepSpeedBackend):
            (output / f"deepspeed_config_{name}.json").write_text(json.dumps(backend.config, indent=2) + "\n")
