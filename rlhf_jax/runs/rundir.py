"""A run directory: created once, held by one process, resumed only with the configuration that it was made with.

config.json       the resolved configuration, its fingerprint
experiment.py     copy of the experiment file, for people; never imported
overrides.json    what was set on the command line
environment.json  code revision, versions, flags, devices of the first attempt
attempts.jsonl    one row per start: pid, host, time, what had changed
summary.json      written at the end, with "done": true
run.lock          who holds the directory
<stage>/          metrics.jsonl, summary.json, checkpoints of each stage
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_jax import config, processes
from rlhf_jax.errors import BAD_DATA, LOCKED, UserError
from rlhf_jax.runs.environment import environment, versions
from rlhf_jax.runs.files import append_row, check_writable, read_json, read_rows, write_json
from rlhf_jax.runs.lock import LOCK_FILE, locked, now

CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"
ATTEMPTS_FILE = "attempts.jsonl"

CHANGEABLE = ("*log_every", "*evaluate_every", "*save_every", "*keep", "*sinks*", "*layout*", "*offload*")
"""Fields that may differ on resume, since they change what is recorded, or where it is computed, and not what."""


@dataclass(frozen=True)
class RunDirectory:
    """An open run. ``attempt`` counts its starts from 1; ``config`` is the description of the configuration."""

    path: Path
    config: Any
    attempt: int

    @property
    def fingerprint(self) -> str:
        return config.fingerprint(self.config)

    def note(self, **row: Any) -> None:
        """Append to the record of attempts, for example the step that a stage resumed from."""
        if processes.is_first():
            append_row(self.path / ATTEMPTS_FILE, {"attempt": self.attempt, "time": now(), **row})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary of the whole run and mark it as done."""
        if processes.is_first():
            write_json(self.path / SUMMARY_FILE, {**summary, "done": True})


def is_done(directory: Path) -> bool:
    """Whether a run in this directory came to its end."""
    return (directory / SUMMARY_FILE).is_file() and read_json(directory / SUMMARY_FILE).get("done") is True


def default_directory(name: str, description: Any, root: Path = Path("runs")) -> Path:
    """``runs/<name>-<first 8 of the fingerprint>``."""
    return root / f"{name}-{config.fingerprint(description)[:8]}"


@contextlib.contextmanager
def open_run(
    directory: Path,
    description: Any,
    *,
    source: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    changeable: Sequence[str] = CHANGEABLE,
) -> Iterator[RunDirectory]:
    """Create ``directory``, or resume the run in it, and hold it until the block ends.

    Of several processes the first does all this, for all of them; they get its error too.

    Args:
        directory: where; its parents are created too.
        description: ``config.describe(experiment)``.
        source: the experiment file, to copy.
        overrides: what was set beside it.
        resume: allow a directory with a run in it; an absent or empty one starts anew.
        changeable: patterns of the paths that may differ from the run's own configuration.

    Raises:
        UserError: if another process holds the directory (LOCKED), it has content and ``resume`` is false, or the
            configuration changed. Nothing is written in any of these cases.
    """
    with contextlib.ExitStack() as held:

        def enter() -> int:
            return held.enter_context(_opened(directory, description, source, overrides, resume, changeable)).attempt

        attempt = processes.first(f"opening of {directory}", enter)
        yield RunDirectory(directory, description, attempt)


@contextlib.contextmanager
def _opened(
    directory: Path,
    description: Any,
    source: Path | None,
    overrides: Mapping[str, Any] | None,
    resume: bool,
    changeable: Sequence[str],
) -> Iterator[RunDirectory]:
    """What ``open_run`` says, in one process."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create it ({error.strerror})", at=str(directory), exit_code=LOCKED) from error
    fresh = _is_empty(directory)
    if not fresh and not (directory / CONFIG_FILE).is_file() and not (directory / LOCK_FILE).is_file():
        # Looked at before the lock, since that would leave a file in a folder that is none of ours.
        raise UserError("this folder has files and no run in it", at=str(directory), fix="take another --run-dir")
    with locked(directory) as died:
        rows = _reused(directory, description, resume, changeable)
        check_writable(directory)
        attempt = 1 + sum("pid" in row for row in read_rows(directory / ATTEMPTS_FILE))
        run = RunDirectory(directory, description, attempt)
        if not (directory / CONFIG_FILE).is_file():
            _write_first(run, source, overrides)
        elif rows:
            write_json(directory / CONFIG_FILE, _config_file(description))
        changes = {path: [old, new] for path, old, new in rows}
        run.note(
            pid=os.getpid(),
            host=socket.gethostname(),
            died=died,
            changed=changes,
            versions=_changed_versions(directory),
        )
        yield run


def _is_empty(directory: Path) -> bool:
    return all(entry.name == LOCK_FILE for entry in directory.iterdir())


def check_reuse(directory: Path, description: Any, resume: bool, changeable: Sequence[str] = CHANGEABLE) -> list[tuple]:
    """The changes that a resumed run takes over; an error for those that it must not. Reads only.

    Of several processes the first looks: the others could come when it has already begun to write.
    """
    return processes.first(f"look at {directory}", lambda: _reused(directory, description, resume, changeable))


def _reused(directory: Path, description: Any, resume: bool, changeable: Sequence[str]) -> list[tuple]:
    if not (directory / CONFIG_FILE).is_file():
        return []  # new, or its first attempt died before it had begun
    if not resume:
        fix = "add --resume to continue it, or take another --run-dir"
        raise UserError("there is a run in this directory", at=str(directory), fix=fix)
    rows = config.differences(read_config(directory), description)
    refused = [row for row in rows if not any(fnmatch.fnmatchcase(row[0], pattern) for pattern in changeable)]
    if refused:
        table = "".join(f"\n  {path}: {old!r} -> {new!r}" for path, old, new in refused)
        fix = "resume with the old values, or take another --run-dir"
        raise UserError(f"the configuration differs from that of the run:{table}\n", at=str(directory), fix=fix)
    return rows


def _write_first(run: RunDirectory, source: Path | None, overrides: Mapping[str, Any] | None) -> None:
    """The files of a new run; config.json comes last, so that a directory with it has them all."""
    if source is not None:
        shutil.copyfile(source, run.path / "experiment.py")
    write_json(run.path / "overrides.json", {path: _plain(value) for path, value in (overrides or {}).items()})
    write_json(run.path / "environment.json", environment(source))
    write_json(run.path / CONFIG_FILE, _config_file(run.config))


def _config_file(description: Any) -> dict[str, Any]:
    return {"fingerprint": config.fingerprint(description), "config": description}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else config.describe(value)


def _changed_versions(directory: Path) -> dict[str, list[str]]:
    """Packages that the run began with in another version: numbers may differ in the last bits from here on."""
    before = read_json(directory / "environment.json").get("packages", {})
    after = versions()
    return {name: [before[name], after[name]] for name in before if name in after and before[name] != after[name]}


def read_config(directory: Path) -> Any:
    """The description of a run's configuration, checked against its fingerprint."""
    content = read_json(directory / CONFIG_FILE)
    if "config" not in content or config.fingerprint(content["config"]) != content.get("fingerprint"):
        raise UserError(
            "the fingerprint does not fit the configuration",
            at=str(directory / CONFIG_FILE),
            fix="restore the file: it is written by the run and not meant to be edited",
            exit_code=BAD_DATA,
        )
    return content["config"]
