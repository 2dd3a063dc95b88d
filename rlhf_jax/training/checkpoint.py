"""Checkpoints of a loop, and parameters as a stage's output: verified when read, never half written.

A checkpoint is a step, a pytree of arrays and JSON-able extras (the state of the data iterator, controllers, ...).
Writing is synchronous: when ``save`` returns, the checkpoint is on the disk, and a failure is an error at once. The
processes of one run write a folder together; keeping others out is the run directory's lock.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rlhf_jax import processes
from rlhf_jax.errors import IO, MISSING_INPUT, UserError
from rlhf_jax.training.arrays import abstract, describe, described, expect_same, read_arrays, write_arrays
from rlhf_jax.training.durable import Damaged, agreed, remove_folder, remove_leftovers, verify_folder, write_folder
from rlhf_jax.types import PyTree

__all__ = ["Checkpoints", "Snapshot", "abstract", "load_params", "save_params"]

_log = logging.getLogger(__name__)
_EXTRA = "extra.json"


class Snapshot(NamedTuple):
    """What a loop continues from."""

    step: int
    tree: PyTree
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints of one loop, in a folder with one folder per step.

    Args:
        directory: made when the first checkpoint is saved.
        keep: how many to keep; at least two, so that a damaged one has one before it.
        every: ``due`` is true at multiples of this; 0 leaves only what the loop saves when it ends or is stopped.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2, every: int = 0):
        if keep < 2:
            raise ValueError(f"checkpoints: keep is {keep}; expected at least 2, so that a damaged one can be replaced")
        if every < 0:
            raise ValueError(f"checkpoints: every is {every}; expected a number of steps, or 0 for none in between")
        self.directory = Path(directory)
        self.keep = keep
        self.every = every
        self._rejected: list[Path] = []

    def due(self, step: int) -> bool:
        return self.every > 0 and step > 0 and step % self.every == 0

    def steps(self) -> list[int]:
        """The steps there are folders for, whole or not, oldest first."""
        return [step for step, _ in self._folders()]

    def folder(self, step: int) -> Path:
        return self.directory / f"{step:08d}"

    def save(self, step: int, tree: PyTree, extra: dict[str, Any]) -> Path:
        """Writes a checkpoint, then removes those beyond ``keep``; one of the same step is replaced."""
        text, header = json.dumps(extra), {"step": step, "leaves": describe(tree)}
        processes.first(f"putting aside before step {step}", self._put_aside)
        later = [s for s in processes.first("steps", self.steps) if s > step]
        if later:
            raise UserError(
                f"saving step {step} beside the checkpoint of step {later[-1]}",
                at=str(self.directory),
                expected="a folder of this run, continued from its newest checkpoint",
                fix="resume the run, or choose another run directory",
            )

        def fill(folder: Path) -> None:
            write_arrays(folder, tree)
            if processes.is_first():
                (folder / _EXTRA).write_text(text, encoding="utf-8")

        def remove_old() -> None:
            for _, old in self._folders()[: -self.keep]:
                remove_folder(old)

        try:
            processes.first(f"tidying before step {step}", lambda: remove_leftovers(self.directory))
            write_folder(self.folder(step), fill, header)
            processes.first(f"tidying after step {step}", remove_old)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(step, tree, error) from error
        return self.folder(step)

    def restore_latest(self, target: PyTree, loose: Sequence[str] = ()) -> Snapshot | None:
        """The newest checkpoint that verifies, or None where none was ever saved; reads only.

        Args:
            target: the tree that is expected: arrays, or ``jax.ShapeDtypeStruct`` with shardings where these matter.
            loose: further parts of the tree, which is then a dictionary, whose arrays are not known before: they come
                as nested dictionaries of what was saved, empty where that was nothing.

        A damaged checkpoint is logged and the one before it is used. Where all are damaged, or where the arrays are
        those of another architecture, it is a ``UserError``: a run never starts again from nothing in silence.
        """
        target = abstract(target)
        rejected: list[tuple[Path, str]] = []
        for step, name in reversed(processes.first("steps", lambda: [(s, p.name) for s, p in self._folders()])):
            folder = self.directory / name
            try:
                snapshot = self._read(step, folder, target, loose)
            except Damaged as error:
                _log.warning("checkpoint of step %d rejected: %s: %s", step, folder, error)
                rejected.append((folder, str(error)))
                continue
            self._rejected = [path for path, _ in rejected]
            return snapshot
        if not rejected:
            return None
        reasons = "\n".join(f"  {path.name}: {reason}" for path, reason in rejected)
        raise UserError(
            f"none of {len(rejected)} checkpoints can be used:\n{reasons}\n ",
            at=str(self.directory),
            expected="one that is as it was written",
            fix="restore the folder from a copy, or remove it to start from step 0",
            exit_code=IO,
        )

    def _folders(self) -> list[tuple[int, Path]]:
        if not self.directory.is_dir():
            return []
        return sorted((int(p.name), p) for p in self.directory.iterdir() if p.name.isascii() and p.name.isdigit())

    def _read(self, step: int, folder: Path, target: PyTree, loose: Sequence[str]) -> Snapshot:
        header = verify_folder(folder)
        if loose:
            target = {**target, **{name: described(header["leaves"], name) for name in loose}}
        if header["step"] != step:
            raise Damaged(f"it was written as step {header['step']}")
        expect_same(header["leaves"], target, at=str(folder))
        text = processes.first(f"extras of {folder}", lambda: (folder / _EXTRA).read_text(encoding="utf-8"))
        tree: list[PyTree] = []
        agreed(f"arrays of {folder}", lambda: tree.append(read_arrays(folder, target)))
        return Snapshot(step, tree[0], json.loads(text))

    def _put_aside(self) -> None:
        """Renames the checkpoints that the last restore rejected, so that they neither count nor get in the way."""
        for path in self._rejected:
            aside = path.with_name(f"rejected-{path.name}")
            if aside.exists():
                remove_folder(aside)
            os.rename(path, aside)
        self._rejected = []

    def _failed(self, step: int, tree: PyTree, error: Exception) -> UserError:
        need = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self.directory).free
        good = self.steps()
        last = f"the last good checkpoint is that of step {good[-1]}" if good else "there is no checkpoint before it"
        return UserError(
            f"checkpoint of step {step} could not be written ({error})",
            at=str(self.directory),
            expected=f"room for about {need / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free; {last}",
            fix="free space or mend the permissions, then resume the run",
            exit_code=IO,
        )


def save_params(folder: str | os.PathLike[str], params: PyTree) -> None:
    """Writes parameters to a folder of their own, with checksums; a folder of this name is replaced."""
    folder = Path(folder)
    try:
        write_folder(folder, lambda draft: write_arrays(draft, params), {"leaves": describe(params)})
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"parameters could not be written ({error})",
            at=str(folder),
            fix="free space or mend the permissions, then resume the run",
            exit_code=IO,
        ) from error


def load_params(folder: str | os.PathLike[str], target: PyTree) -> PyTree:
    """Reads what ``save_params`` wrote; a damaged file, or one of another architecture, is a ``UserError``."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            "no parameters here",
            at=str(folder),
            expected="a folder that a stage wrote",
            fix="run that stage to its end, or name another folder",
            exit_code=MISSING_INPUT,
        )
    try:
        header = verify_folder(folder)
        expect_same(header["leaves"], target, at=str(folder))
        return read_arrays(folder, abstract(target))
    except Damaged as error:
        raise UserError(
            f"damaged parameters: {error}",
            at=str(folder),
            expected="files as they were written",
            fix="restore the folder from a copy, or run the stage again",
            exit_code=IO,
        ) from error
