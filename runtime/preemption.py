"""Stopping in time: a scheduler's signals and the clock, agreed upon by all processes between two steps."""

import signal
import threading
import time

import torch
import torch.distributed as dist

from utils import UsageError

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))  # Windows: one
EXIT_STATUS = 75  # EX_TEMPFAIL: saved, start me again (scripts/slurm requeues on it)
GO_ON, SAVE, STOP = range(3)


class Preempted(Exception):
    """Training stopped for a signal; the message says where. saved: whether a resume continues from there."""

    def __init__(self, message: str, saved: bool):
        super().__init__(f"{message}; " + ("saved: the same command resumes here" if saved else "nothing saved"))
        self.saved = saved


def set_handlers(handlers: dict) -> None:
    """Of signals, where Python allows it: in the main thread."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stop_at_once(saves: bool) -> None:
    """From now on SIGTERM and SIGUSR1 raise Preempted: outside training all there is to save is saved, if the run saves
    at all. One process only: several wait for one another where Python hears no signal, and are better killed."""

    def stop(number, frame):
        raise Preempted(f"stopped by {signal.Signals(number).name}, not in training", saves)

    if not dist.is_initialized():
        set_handlers(dict.fromkeys(SIGNALS, stop))


class PreemptionWatch:
    """A context in which SIGTERM and SIGUSR1 do not kill but are remembered, and a clock that asks for saves.

    One process may get a signal earlier than another, and all have to save the same step: decide() is called by all
    after every step. It costs no wait: the answer is that of the step before, which has crossed the network meanwhile.
    save_minutes: between two saves; 0: none by the clock.
    """

    def __init__(self, save_minutes: float = 0.0):
        self.save_seconds = 60 * save_minutes
        self.started = time.monotonic()
        self.signal = ""
        # of its own, so that it runs beside NCCL and beside collectives of training
        self.group = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            try:
                self.group = dist.new_group(backend="gloo")
            except RuntimeError as error:
                raise UsageError(
                    "the processes cannot reach one another by gloo, which agrees on when to stop: set "
                    f"GLOO_SOCKET_IFNAME to the network interface between the nodes ({str(error).splitlines()[0]})"
                ) from error
        self.pending: tuple | None = None

    def __enter__(self):
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        set_handlers(dict.fromkeys(SIGNALS, self._remember))
        return self

    def __exit__(self, *exception):
        set_handlers(self.before)

    def _remember(self, number, frame):
        self.signal = signal.Signals(number).name

    def _wish(self) -> int:
        if self.signal:
            return STOP
        due = self.save_seconds and time.monotonic() - self.started >= self.save_seconds
        return SAVE if due else GO_ON

    def decide(self) -> int:
        """GO_ON, SAVE or STOP: the most urgent wish of any process, one call late where there are several."""
        answer = self._settle(self._wish() if self.group is None else self._answer())
        if self.group is not None:
            flag = torch.tensor([self._wish()])
            self.pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, self.group, async_op=True), flag)
        return answer

    def decide_now(self) -> int:
        """As decide, but waits for all processes. For the end of an epoch."""
        answer = self.decide()
        return answer if self.group is None else max(answer, self._settle(self._answer()))

    def _settle(self, answer: int) -> int:
        if answer == SAVE:
            self.started = time.monotonic()  # everybody's clock, whoever's it was
        return answer

    def _answer(self) -> int:
        if self.pending is None:
            return GO_ON
        work, flag = self.pending
        self.pending = None
        work.wait()
        return int(flag)
