"""What the tools share: files that are replaced as a whole, and work in processes that may crash or never end."""

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from datasets.decoding import VideoError
from datasets.lists import ListError, excerpt, split_line
from utils import UsageError, format_time, tolerant_output

VIDEO_SUFFIXES = (
    ".avi", ".mp4", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts", ".mts", ".m2ts",
    ".vob", ".ogv", ".gif", ".asf",
)  # fmt: skip
START_SECONDS = 300  # for a worker to import torch and PyAV, on a busy network file system
LOG_SECONDS = 10  # between two lines of progress in a log
LONGEST_TIMEOUT = 1_000_000  # seconds; the system's waits do not take any number
NAMED_FAILURES = 20  # on the terminal; the report has all

Outcome = tuple[Any, str | None]  # (result, None), or (None, the reason why there is none)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows the module's text with its own line breaks, and the defaults except None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def run_tool(tool: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> None:
    """Runs tool(args) and exits with the status it returns; an error of the user is `error: ...` and status 1."""
    tolerant_output()
    try:
        status = tool(args)
    except (UsageError, ListError, VideoError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    if status:
        sys.exit(status)


# ----------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[str]:
    """Gives a temporary name beside path. That file is renamed to path if the block succeeds, and is removed otherwise;
    what a killed process left under the name is overwritten next time."""
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def temporary_name(path: str | Path) -> str:
    """path and .tmp; a digest replaces the end of a name that would exceed 255 bytes."""
    folder, name = os.path.split(path)
    if len(os.fsencode(name)) > 251:
        digest = hashlib.sha1(os.fsencode(name)).hexdigest()[:16]
        name = os.fsdecode(os.fsencode(name)[:200]).encode(errors="ignore").decode() + digest
    return os.path.join(folder, f"{name}.tmp")


def write_text(path: str | Path, text: str) -> None:
    """Replaces a file as a whole."""
    with replacing(path) as temporary:
        # names of files need not be UTF-8: they keep their bytes
        Path(temporary).write_text(text, encoding="utf-8", errors="surrogateescape")


def write_list(list_path: str, paths: Iterable[str], labels: Iterable[int]) -> None:
    """Writes a list that datasets.lists.read_list reads back as it is given here.

    A video in or below the list's folder is written relative to it, so that both can be moved together; any other keeps
    its path, which must be absolute. Raises: UsageError where there is nothing to list or a name cannot be written.
    """
    if not paths:
        raise UsageError(f"{list_path}: no video is left to list")
    folder = os.path.join(os.path.dirname(os.path.abspath(list_path)), "")
    lines = []
    for path, label in zip(paths, labels, strict=True):
        path = path.removeprefix(folder)
        if path.startswith("#") or path != path.lstrip():  # a line that starts so would be a comment, or stripped
            path = f"./{path}"
        line = f"{path} {label}"
        if split_line(line) != (path, str(label)):  # it ends with a number, say
            quoted = path.replace('"', '""')
            line = f'"{quoted}" {label}'
        readable = line.encode(errors="replace").decode()
        if split_line(readable) != (path, str(label)) or set("\r\n\0") & set(line):
            raise UsageError(f"{list_path}: the name {excerpt(path)} cannot be written to a list: rename the file")
        lines.append(f"{line}\n")
    write_text(list_path, "".join(lines))


def find_videos(folder: str, skip: str | None = None) -> Iterator[str]:
    """The paths of all video files below folder, sorted, each file once: under its own name rather than a link's, and
    under the first of several hard links. Links to folders are followed, each folder once; the folder skip is left
    out."""
    found: dict[tuple[int, int], str] = {}  # by device and inode
    for follow in (False, True):
        entered: set[tuple[int, int]] = set()
        for root, folders, names in os.walk(folder, followlinks=follow):
            below = [os.path.join(root, name) for name in sorted(folders)]
            folders[:] = [os.path.basename(path) for path in below if path != skip and _is_new(path, entered)]
            for name in sorted(names):
                path = os.path.join(root, name)
                if name.lower().endswith(VIDEO_SUFFIXES) and (follow or not os.path.islink(path)):
                    with contextlib.suppress(OSError):  # a link to nothing
                        found.setdefault(_identity(path), path)
    yield from sorted(found.values(), key=lambda path: path.split(os.sep))


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_new(folder: str, entered: set[tuple[int, int]]) -> bool:
    try:
        identity = _identity(folder)
    except OSError:
        return False
    new = identity not in entered
    entered.add(identity)
    return new


# ------------------------------------------------------------------------------------------------------- processes


def run_all(function: Callable, items: list[tuple], num_workers: int, timeout: float) -> list[Outcome]:
    """Calls function(*item) for every item, in processes, and prints progress.

    Args: function, importable by another process; items, tuples that start with the path of a video; num_workers
    processes; timeout in seconds for one item.
    Returns: the outcome of every item, in order. Raises: UsageError.
    """
    if num_workers < 1 or not 0 < timeout <= LONGEST_TIMEOUT:  # nan too
        raise UsageError(f"--num_workers must be at least 1, --timeout above 0 and at most {LONGEST_TIMEOUT}")
    outcomes: list[Outcome] = [(None, "not done")] * len(items)
    terminal = sys.stdout.isatty()
    clear = "\r\033[K" if terminal else ""
    start = shown = time.monotonic()
    bad = 0
    for done, (index, result, reason) in enumerate(in_processes(function, items, num_workers, timeout), 1):
        outcomes[index] = result, reason
        if reason is not None:
            bad += 1
            if bad <= NAMED_FAILURES:
                print(f"{clear}bad: {items[index][0]}: {reason}", flush=True)
            if bad == NAMED_FAILURES:
                print("further bad videos are named in the report only", flush=True)
        now = time.monotonic()
        if done == len(items) or now - shown >= (0.2 if terminal else LOG_SECONDS):
            shown = now
            left = format_time((now - start) / done * (len(items) - done))
            line = f"[{done}/{len(items)}]  {done / (now - start):.3g} videos/s  left {left}  bad {bad}"
            print(f"{clear}{line}", end="" if terminal and done < len(items) else "\n", flush=True)
    return outcomes


def in_processes(
    function: Callable, items: list[tuple], num_workers: int, timeout: float
) -> Iterator[tuple[int, Any, str | None]]:
    """Yields (index, result, None) or (index, None, reason) as items finish.

    A decoder may crash on a damaged file, or never return. So each worker has a pipe of its own: a worker that dies, or
    takes longer than timeout seconds, loses the item it was at and is replaced. multiprocessing.Pool would wait for it
    for ever; pebble's pool joins a killed worker without a time limit, which never returns where the worker waits for a
    lost network drive, and its workers outlive a killed parent. Raises: UsageError where workers do not start.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")  # a plain fork would copy locks that other threads hold
        context.set_forkserver_preload(["torch"])  # imported once, so that a replacement is there at once
    else:  # Windows
        context = multiprocessing.get_context("spawn")
    todo = deque(range(len(items)))
    workers = [_Worker(context, function) for _ in range(min(num_workers, len(items)))]
    try:
        while workers:
            earliest = min(worker.deadline for worker in workers)
            wait([worker.connection for worker in workers], max(0, earliest - time.monotonic()))
            for worker in list(workers):
                answer = worker.answer(timeout)
                if answer is None:
                    continue
                index, result, reason, alive = answer
                if index is None and not alive:
                    raise UsageError(f"the worker processes do not start: {reason}")
                if alive and todo:
                    worker.give(todo.popleft(), items, timeout)
                else:
                    worker.end()
                    workers.remove(worker)
                    if todo:
                        workers.append(_Worker(context, function))
                if index is not None:
                    yield index, result, reason
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that calls a function on the items given to it; index is that of the item it is at, None at first."""

    def __init__(self, context: BaseContext, function: Callable):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        self.process.start()
        theirs.close()  # else a death would not be seen as the end of the pipe
        self.index: int | None = None
        self.deadline = time.monotonic() + START_SECONDS

    def give(self, index: int, items: list[tuple], timeout: float) -> None:
        with contextlib.suppress(OSError):  # it has just died: the next answer says so
            self.connection.send(items[index])
        self.index, self.deadline = index, time.monotonic() + timeout

    def answer(self, timeout: float) -> tuple[int | None, Any, str | None, bool] | None:
        """None while there is none, else (index, result, reason, whether the process can take another item)."""
        if self.connection.poll():
            try:
                return self.index, *self.connection.recv(), True
            except (EOFError, OSError):
                self.process.join()
                return self.index, None, f"the process that read it died ({_cause(self.process.exitcode)})", False
        if time.monotonic() > self.deadline:
            return self.index, None, f"not done within {timeout:g} s", False
        return None

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join(5)  # one that waits for a lost network drive cannot even be killed


def _serve(function: Callable, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends its workers
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # FFmpeg writes there about every damaged packet
    connection.send((None, None))  # ready: from here on the time is the function's own
    while True:
        item = connection.recv()
        try:
            answer = function(*item), None
        except VideoError as error:
            answer = None, str(error).removeprefix(f"{item[0]}: ")
        except Exception as error:  # whatever a decoder thinks of: the next video may be good
            answer = None, f"{type(error).__name__}: {error}"
        connection.send(answer)


def _die_with_parent() -> None:
    """A killed tool leaves no worker that still writes."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _cause(exitcode: int) -> str:
    if exitcode >= 0:
        return f"exit status {exitcode}"
    name = signal.Signals(-exitcode).name
    return f"{name}: out of memory?" if name == "SIGKILL" else name
