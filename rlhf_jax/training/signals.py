"""A polite stop: SIGTERM and SIGINT become a flag that loops poll between pieces of work."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopRequested(Exception):
    """Raised by ``StopSignal.check`` inside an evaluation or a rollout; the loop around it saves and ends."""


class StopSignal:
    """While entered, the first SIGTERM or SIGINT only sets ``requested``; a second SIGINT interrupts at once.

    Signals reach the main thread alone; elsewhere nothing is installed, and ``request`` still works.
    """

    def __init__(self):
        self.requested = False
        self._before: dict[int, Any] = {}

    def request(self) -> None:
        self.requested = True

    def check(self) -> None:
        """Call it every few seconds of long work; raises ``StopRequested``."""
        if self.requested:
            raise StopRequested

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
