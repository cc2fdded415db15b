"""SIGTERM and Ctrl-C end a run: at once by an exception, at the next step at the latest where that was swallowed.

Python swallows an exception that is raised while it runs a finalizer (`__del__`, the callback of a weak reference), and so does
code that catches everything: the run would train on as if nothing had been asked.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(BaseException):
    """SIGTERM has arrived."""


EXCEPTIONS = {signal.SIGTERM: Terminated, signal.SIGINT: KeyboardInterrupt}
_arrived: list[int] = []


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let both signals raise an exception, and errors that follow from it count as it.

    A signal that is ignored stays ignored, as Ctrl-C is by a job that a script starts in the background. Processes forked
    meanwhile die of SIGTERM as usual.
    """
    own = os.getpid()

    def stop(number, frame):
        if os.getpid() == own:
            _arrived.append(number)
        elif number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise EXCEPTIONS[number]

    heard = [number for number in EXCEPTIONS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    except Exception as error:
        if _arrived:
            raise EXCEPTIONS[_arrived[0]] from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _arrived.clear()


def stop_if_asked() -> None:
    """Raise the exception of a signal that has arrived, where it did not end the run."""
    if _arrived:
        raise EXCEPTIONS[_arrived[0]]
