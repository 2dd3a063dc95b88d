"""Folders that are either whole and verifiable, or absent.

Orbax does not notice a flipped bit in the data of an array, and leaves small files unsynced. So a folder is written
under a temporary name, gets a ``MANIFEST.json`` with the size and sha256 of every file, is forced to the disk, and only
then takes its name. What is read is verified first. Several processes of a run share the folder: all fill and
sync it, process 0 makes and names it. This file knows nothing of arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_jax import processes

MANIFEST = "MANIFEST.json"
LEFTOVERS = (".tmp-", ".old-")
"""How the names of folders begin that were being written or removed when a process died."""


class Damaged(Exception):
    """A folder is not what was written; the message names the file and the fault."""


def write_folder(folder: Path, fill: Callable[[Path], None], header: dict[str, Any]) -> None:
    """Fills a folder and gives it its name at once, in place of one that has this name.

    Args:
        folder: the name; the folder above it is made when it is missing.
        fill: writes files into the folder that it is given; called in every process.
        header: JSON-able; kept in the manifest and returned by ``verify_folder``.
    """
    at = str(folder)
    draft = Path(processes.first(f"beginning of {at}", lambda: str(_new_draft(folder))))
    try:
        processes.together(f"writing of {at}", lambda: (fill(draft), _sync_tree(draft)))
        files = _fingerprints(draft, processes.first(f"files of {at}", lambda: _files(draft)))
        processes.first(f"end of {at}", lambda: _publish(draft, folder, {"files": files, "header": header}))
    except BaseException:
        if processes.is_first():
            shutil.rmtree(draft, ignore_errors=True)
        raise


def verify_folder(folder: Path) -> dict[str, Any]:
    """The header of a folder whose every file is as it was written; ``Damaged`` otherwise, in every process."""
    body = agreed(f"manifest of {folder}", lambda: _manifest(folder) if processes.is_first() else None)[0]
    own = sorted(body["files"])[processes.index() :: processes.count()]
    agreed(f"check of {folder}", lambda: _compare(folder, {name: body["files"][name] for name in own}))
    return body["header"]


def agreed(what: str, look: Callable[[], Any]) -> list[Any]:
    """What every process sees (JSON-able); ``Damaged`` in all where it is so, or unreadable, for one."""

    def seen() -> dict[str, Any]:
        try:
            return {"seen": look()}
        except (Damaged, OSError) as error:
            return {"damaged": str(error)}

    found = processes.gather(what, seen)
    for one in found:
        if "damaged" in one:
            raise Damaged(one["damaged"])
    return [one["seen"] for one in found]


def _manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise Damaged(f"{folder.name} is not a folder")
    if not (folder / MANIFEST).is_file():
        raise Damaged(f"{MANIFEST} is missing: the folder was not written to its end")
    stored = (folder / MANIFEST).read_bytes()
    try:
        content = json.loads(stored)
        body = {"files": content["files"], "header": content["header"]}
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{MANIFEST} does not read ({error})") from error
    if _render(body) != stored:
        raise Damaged(f"{MANIFEST} differs from what was written")
    return body


def _compare(folder: Path, files: dict[str, Any]) -> None:
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if path.stat().st_size != expected["size"]:
            raise Damaged(f"{name} has {path.stat().st_size} bytes; {expected['size']} were written")
        if _fingerprint(path) != expected:
            raise Damaged(f"{name} differs from what was written (sha256)")


def remove_folder(folder: Path) -> None:
    """Removes a folder in one stroke: nobody sees a half of it under its name."""
    away = folder.parent / f"{LEFTOVERS[1]}{folder.name}-{os.getpid()}"
    shutil.rmtree(away, ignore_errors=True)
    os.rename(folder, away)
    if away.is_dir():
        shutil.rmtree(away)
    else:
        away.unlink()


def remove_leftovers(folder: Path) -> list[str]:
    """Removes what processes that died left in a folder; only for the folder's one writer. Returns the names."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.startswith(LEFTOVERS)]
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return sorted(path.name for path in found)


def _new_draft(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.parent / f"{LEFTOVERS[0]}{folder.name}-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    return draft


def _publish(draft: Path, folder: Path, body: dict[str, Any]) -> None:
    (draft / MANIFEST).write_bytes(_render(body))
    _sync(draft / MANIFEST)
    _sync(draft)
    if folder.exists():
        remove_folder(folder)
    os.rename(draft, folder)
    _sync(folder.parent)


def _fingerprints(folder: Path, names: list[str]) -> dict[str, Any]:
    """Of all files; each process reads its share of them."""
    own = names[processes.index() :: processes.count()]
    shares = processes.gather(f"checksums of {folder}", lambda: {name: _fingerprint(folder / name) for name in own})
    return {name: found for share in shares for name, found in share.items()}


def _render(body: dict[str, Any]) -> bytes:
    """The manifest, with a digest of itself: a flipped bit in it must not pass either."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
