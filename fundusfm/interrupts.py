"""Ctrl-C that is not lost in an import."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import cast

_RETRY_S = 0.05


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """In the block Ctrl-C waits for the end of a running import; where it is ignored it stays ignored.

    The initialisation of many extension modules clears any exception, so that a command whose room was just
    being imported would go on as if nothing had been pressed.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _raise_after_imports)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _raise_after_imports(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _thread.start_new_thread(_press_again, ())  # takes no lock that this thread could be holding
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _press_again() -> None:
    time.sleep(_RETRY_S)
    signal.pthread_kill(cast(int, threading.main_thread().ident), signal.SIGINT)
