"""What worker processes of the tools do at worst; imports little, since each worker imports it."""

import os
import signal
import time
from pathlib import Path

from datasets.decoding import VideoError


def misbehave(path, *options, **flags):
    """What decoders do to a damaged file."""
    name = Path(path).stem
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hang":
        time.sleep(100)
    if name == "odd":
        raise ValueError("odd")
    if name == "bad":
        raise VideoError(path, "no frames")
    return dict(frames=1, decoded=1, width=2, height=2, decoder=str(os.getpid()), reason=None)


class Unloadable:
    """Ends the process that unpickles it, as a library that does not load would."""

    def __reduce__(self):
        return os._exit, (3,)
