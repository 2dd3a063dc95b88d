"""One line that says how far a run is: a bar on a terminal, now and then a plain line in a log file."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_EVERY_SECONDS = 10.0
_SHOWN = (("loss", ("/loss",)), ("gold", ("/gold",)), ("score", ("/score",)), ("KL", ("kl/sequence",)),
          ("accuracy", ("/accuracy",)), ("tokens/s", ("tokens_per_s",)))  # fmt: skip


class ProgressLine:
    """Shows the rows of metrics of a run while it goes on, and the messages of its log above them."""

    def __init__(self, console: Console | None = None):
        self._console = console if console is not None else Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._handler = RichHandler(console=self._console, show_path=False, show_time=False, markup=False)
        self._before = logging.NOTSET, True
        self._stage = ""
        self._began = self._said = (0, 0.0)  # (step, seconds)

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        logger = logging.getLogger("rlhf_jax")
        logger.addHandler(self._handler)
        self._before = logger.level, logger.propagate
        logger.propagate = False  # libraries put handlers of their own on the root logger
        logger.setLevel(logging.INFO)  # what tables of data hold, and what was cut or left out of them
        return self

    def __exit__(self, *exception: Any) -> None:
        logger = logging.getLogger("rlhf_jax")
        logger.removeHandler(self._handler)
        level, logger.propagate = self._before
        logger.setLevel(level)
        self._progress.stop()

    def announce(self, text: str) -> None:
        """Print a message that stays."""
        self._console.print(Text(text, style="bold"))

    def __call__(self, stage: str, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """Show a row of metrics of ``step`` out of ``total``."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._said = stage, (step, now), (step, now)
            for task in self._progress.task_ids:
                self._progress.remove_task(task)
            self._progress.add_task(stage, total=total, completed=step, numbers="")
        self._progress.update(self._progress.task_ids[-1], completed=step, numbers=numbers_text(metrics))
        if not self._console.is_terminal and (now - self._said[1] >= PLAIN_EVERY_SECONDS or step >= total):
            self._said = (step, now)
            text = f"{stage} {step}/{total}  {numbers_text(metrics)}  {self._time_left(step, total, now)}"
            self._console.print(text.rstrip(), markup=False, soft_wrap=True)

    def _time_left(self, step: int, total: int, now: float) -> str:
        first, began = self._began
        if step >= total or step <= first:
            return ""
        minutes, seconds = divmod(round((now - began) / (step - first) * (total - step)), 60)
        return f"{minutes}:{seconds:02d} left"


def numbers_text(metrics: Mapping[str, Any]) -> str:
    """``loss 1.234  12,345 tokens/s``: the numbers that people watch, of those that the row has."""
    words = []
    for word, endings in _SHOWN:
        values = (value for name, value in metrics.items() if name.endswith(endings) and not name.startswith("ptx/"))
        value = next(values, None)
        if isinstance(value, int | float):
            words.append(f"{value:,.0f} {word}" if word == "tokens/s" else f"{word} {value:.4g}")
    return "  ".join(words)
