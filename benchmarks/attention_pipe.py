"""How attention.py talks to a contestant's process: one JSON object a line, a question and its answer.

Standard library only. A process that dies, or does not answer in time, is an answer too: its next question starts it
anew, so that one failure is a row of the table and not the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


class Refused(Exception):
    """A contestant cannot do this; the message says why."""


def serve(handlers: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """The contestant's end: answer questions until there are none. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = handlers[question.pop("do")](**question)
        except Refused as reason:
            answer = {"refused": str(reason)}
        except Exception as error:  # noqa: BLE001
            # Compilers and allocators raise what they like; the row says what it was.
            answer = {"failed": f"{type(error).__name__}: {error}".strip()[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Contestant:
    """The asker's end: a process that is started when it is first asked."""

    def __init__(self, name: str, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.name = name
        self._command, self._log, self._environment = command, log, environment
        self._process: subprocess.Popen[str] | None = None
        self._stderr: TextIO | None = None

    def send(self, do: str, **fields: Any) -> None:
        """Ask without waiting, so that several can compile at once."""
        if self._process is None:
            self._stderr = self._log.open("a")
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True,
                env={**os.environ, **self._environment},
            )  # fmt: skip
        assert self._process.stdin is not None
        # Of a broken pipe ``receive`` finds the other end, and says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
            self._process.stdin.flush()

    def receive(self, patience: float) -> dict[str, Any]:
        """The answer; where there is none within ``patience`` seconds, ``failed`` with what is known."""
        process = self._process
        assert process is not None and process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            ready = bool(selector.select(patience))
        line = process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.close(kill=True)
        if not ready:
            return {"failed": f"no answer within {patience:.0f} s; the process was ended"}
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
        return {"failed": f"the process died (exit status {process.returncode}): {''.join(last)[:300]}"}

    def ask(self, do: str, patience: float = 60.0, **fields: Any) -> dict[str, Any]:
        self.send(do, **fields)
        return self.receive(patience)

    @property
    def running(self) -> bool:
        return self._process is not None

    def close(self, kill: bool = False) -> None:
        """End the process."""
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None and process.stdout is not None and self._stderr is not None
        if kill:
            process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._stderr.close()
