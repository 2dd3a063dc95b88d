"""A polite stop: SIGTERM and SIGINT become a flag that loops poll between pieces of work."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from rlhf_jax import processes


class StopRequested(Exception):
    """Raised by ``StopSignal.check`` inside an evaluation or a rollout; the loop around it saves and ends."""


class StopSignal:
    """While entered, the first SIGTERM or SIGINT asks for a stop; a second SIGINT interrupts at once.

    Of several processes any one may be asked, and all find ``requested`` true after the same ``poll``: JAX's own
    service takes SIGTERM there and agrees on the point, so that nobody waits for the others at every step.
    Signals reach the main thread alone; elsewhere nothing is installed, and ``request`` still works.
    """

    def __init__(self):
        self.requested = False
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def request(self) -> None:
        """As a signal would."""
        if processes.count() == 1:
            self.requested = True
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def poll(self) -> bool:
        """``requested`` as of now. Of several processes, all poll at the same points of the program."""
        if processes.count() > 1 and processes.asked_to_stop():
            self.requested = True
        return self.requested

    def check(self) -> None:
        """Call it every few seconds of long work; raises ``StopRequested``."""
        if self.poll():
            raise StopRequested

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT) if processes.count() == 1 else (signal.SIGINT,):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self.requested or self._interrupted):
            raise KeyboardInterrupt
        self._interrupted = True
        self.request()
