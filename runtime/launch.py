"""How a program starts and ends: one line for what the user can correct, a status for every end."""

import errno
import multiprocessing
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable

import torch

from datasets.decoding import VideoError
from datasets.lists import ListError
from runtime.preemption import EXIT_STATUS, SIGNALS, Preempted, set_handlers
from utils import UsageError, first_line, is_main_process, log, tolerant_output

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ESTALE, errno.EIO)
# Beginnings of what torch, gloo and NCCL say, and what it means.
LOADER_DIED = (
    "a loader process died, for want of memory or by a crash of the decoder; lower --num_workers, and look for broken "
    "videos with tools/check_videos.py"
)
FAILURES = (
    (r"DataLoader worker .*(exited unexpectedly|killed by signal)", LOADER_DIED),
    (r"DataLoader timed out", "no batch came for half an hour: a loader process or the disk does not respond"),
    (r"Connection (closed|reset) by|Broken pipe|NCCL error|NCCL communicator was aborted|gloo.*[Tt]imed out",
     "another rank exited or stopped responding; look for the first error in the other ranks' logs"),
    (r"CUDA out of memory", "the GPU has too little memory: lower --batch_size (and raise --accum_iter), or set "
     "--use_checkpoint"),
)  # fmt: skip


def run_script(train: Callable, args) -> None:
    """train(args), with what the user can put right as one line and a non-zero status; status 75 where training was
    told to stop and can be resumed, 130 after Ctrl-C."""
    tolerant_output()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        train(args)
    except (UsageError, ListError, VideoError) as error:
        # an error from a loader process comes with that process's traceback around it
        sys.exit(f"error: {str(error).rsplit('VideoError: ', 1)[-1].strip()}")
    except (EOFError, ConnectionError) as error:
        if _is_output_closed():
            again = "; the same command resumes the run" if getattr(args, "output_dir", "") else ""
            sys.exit(f"error: nothing reads the output any more (a pipe to head?){again}")
        # a loader died while it handed over a batch
        sys.exit(f"error: {LOADER_DIED} ({type(error).__name__})")
    except OSError as error:  # a full or read-only disk, a quota, a lost mount
        if error.errno not in DISK_ERRORS:
            raise
        sys.exit(f"error: {error.filename or 'writing'}: {error.strerror}")
    except KeyboardInterrupt:
        set_handlers({signal.SIGINT: signal.SIG_IGN})
        if is_main_process():
            print("interrupted: the same command resumes from the newest checkpoint", file=sys.stderr, flush=True)
        sys.exit(130)  # as a shell has it
    except Preempted as stop:
        # one more while this process ends would change its status; Python would take back a handler of its own early
        handlers = dict.fromkeys(SIGNALS, signal.SIG_IGN)
        set_handlers(handlers)
        log(str(stop))
        _leave_group()
        sys.exit(EXIT_STATUS if stop.saved else 1)
    except RuntimeError as error:
        reason = first_line(error)
        if getattr(args, "compile", False) and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            sys.exit(f"error: --compile failed: {reason}; leave it out to train uncompiled")  # no compiler, say
        for pattern, meaning in FAILURES:
            if re.search(pattern, str(error)):
                sys.exit(f"error: {meaning} ({reason})")
        raise
    finally:
        set_handlers(handlers)
        _end_loaders()
    _leave_group()


def end_with_status(main: Callable[[], None]) -> None:
    """main(), and the end of the process with its status.

    Where there were several processes, or DeepSpeed, it ends without the interpreter's own clearing up, in which
    threads of torch's process groups now and then abort it ("terminate called without an active exception"): a
    finished run would count as crashed, a stopped one would not go back into the queue.
    """
    status = 0
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and "deepspeed" not in sys.modules:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_output_closed() -> bool:
    """Whether what is printed has no reader. If so, Python prints to nowhere from now on."""
    try:
        descriptor = sys.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, 0)  # errors alone
        closed = any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError):  # Windows; no descriptor
        return False
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return closed


def _end_loaders() -> None:
    """Loader processes ignore polite signals (datasets/build.py): one that hangs would keep this one from ending."""
    children = multiprocessing.active_children()
    if children and threading.current_thread() is threading.main_thread():
        handler = None
        if hasattr(signal, "SIGCHLD"):  # not on Windows; torch's takes their end for a failure
            handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in children:
            child.kill()
            child.join(5)  # one that waits for a dead mount does not even end by this
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)


def _leave_group() -> None:
    """Where all processes end together. One that fails just ends: the others may be waiting for it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
