"""One process per run directory: an advisory lock that dies with its owner, and says who the owner is."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from rlhf_jax.errors import LOCKED, UserError

LOCK_FILE = "run.lock"


def now() -> str:
    """The time of day for records that people read; nothing is ordered by it."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[dict | None]:
    """Hold the directory for this process; yields the owner that died holding it, if one did.

    The kernel drops the lock when its owner ends, however it ends, so there is never a stale one to remove.

    Raises:
        UserError: with exit code LOCKED if another process holds it, or the file cannot be created.
    """
    path = directory / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"cannot create it ({error.strerror})", at=str(path), exit_code=LOCKED) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _in_use(directory, _read_owner(descriptor)) from None
        died = _read_owner(descriptor)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
        _write_owner(descriptor, owner)
        try:
            yield died
        finally:
            _write_owner(descriptor, None)
    finally:
        os.close(descriptor)


def _in_use(directory: Path, owner: dict | None) -> UserError:
    who = "another process" if owner is None else "pid {pid} on host {host} since {since}".format(**owner)
    fix = "wait for it, stop it, or take another run directory"
    return UserError(f"the run directory is in use by {who}", at=str(directory), fix=fix, exit_code=LOCKED)


def _read_owner(descriptor: int) -> dict | None:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # empty, or torn by a crash
        return None
    return owner if isinstance(owner, dict) and {"pid", "host", "since"} <= owner.keys() else None


def _write_owner(descriptor: int, owner: dict | None) -> None:
    os.ftruncate(descriptor, 0)
    if owner is not None:
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        os.fsync(descriptor)
