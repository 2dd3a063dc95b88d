"""How peers.py talks to a side: one JSON object a line, a question on stdin and its answer on stdout.

Standard library only, because both environments import it. Between a question and the next the side sleeps in a read,
so that whichever side is being timed has the cores to itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO


class Questions:
    """The side's end. Whatever a library prints goes to stderr, never between two answers."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._begun = self._cpu = 0.0

    def begin(self) -> bool:
        """Sleep until the next question, then start the clock; False when there will be none."""
        asked = bool(sys.stdin.readline())
        self._begun, self._cpu = time.perf_counter(), time.process_time()
        return asked

    def done(self, **fields: Any) -> None:
        """Answer with the time since ``begin``."""
        self.answer(seconds=time.perf_counter() - self._begun, cpu_before=self._cpu, **fields)

    def answer(self, **fields: Any) -> None:
        """Answer without a time."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        fields |= {"cpu_after": time.process_time(), "peak_mib": memory}
        self._answers.write(json.dumps(fields) + "\n")
        self._answers.flush()

    def serve(self, run: Callable[[], dict[str, Any]]) -> None:
        """Answer each question with the wall time of ``run()`` and what it returned."""
        while self.begin():
            self.done(**run())


class Side:
    """The asker's end: a warm process on the given cores."""

    def __init__(self, command: list[str], cores: list[int], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        self._stderr: TextIO = log.open("w")
        with held_to(cores):
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(len(cores)), **environment},
            )  # fmt: skip

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            raise RuntimeError(f"the side ended with exit code {self._process.wait()}; the end of {self.log}:\n{tail}")
        return json.loads(line)

    def ask(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("{}\n")
        self._process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """Let the process end by closing its pipe, or end it after a while."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()


@contextlib.contextmanager
def held_to(cores: list[int]) -> Iterator[None]:
    """Processes that are started inside inherit these cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
