"""``rlhf-jax launch``: several processes of ``run`` on this machine, which meet on its loopback address.

For one machine only; on several, the scheduler starts ``rlhf-jax run`` on each (docs/several-machines.md).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rlhf_jax.errors import PEER_LOST, PREEMPTED, Preempted, UserError

OTHERS_SECONDS = {"failed": 15.0, "killed": 2.0}
"""How long the others may go on when one has failed, which they hear of, or was killed, which they do not."""


def launch(words: Sequence[str], processes: int, devices: int | None = None) -> None:
    """Run ``rlhf-jax run`` with these words in so many processes; each line of output has its process before it.

    SIGTERM and Ctrl-C are passed on as SIGTERM, so that all save and end; a second Ctrl-C kills.

    Args:
        words: the arguments of ``run``.
        processes: how many.
        devices: of each process: processors that JAX simulates, or graphics cards.

    Raises:
        Preempted: all have saved and stopped.
        UserError: one failed, with its exit code.
    """
    if processes < 1:
        raise UserError(f"--processes {processes}", at="launch", expected="at least 1", fix="correct it")
    environments = _environments(processes, devices)
    address = f"127.0.0.1:{_free_port()}"
    command = [sys.executable, "-u", "-m", "rlhf_jax", "run", *words, "--coordinator", address,
               "--processes", str(processes)]  # fmt: skip
    running = [
        subprocess.Popen(
            [*command, "--process-id", str(number)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **own, "JAX_COORDINATOR_BIND_ADDRESS": address}, start_new_session=True,
        )
        for number, own in enumerate(environments)
    ]  # fmt: skip
    readers = [
        threading.Thread(target=_prefixed, args=(number, source, target), daemon=True)
        for number, process in enumerate(running)
        for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    ]
    for reader in readers:
        reader.start()
    try:
        with _passing_on(running):
            first = _wait(running)
    finally:
        for process in running:
            process.kill()
        for reader in readers:
            reader.join(5)
    if first is not None:
        _report(first, running[first].returncode, processes)


def _wait(running: list[subprocess.Popen]) -> int | None:
    """Until all have ended; the number of the first that failed, after which the others get some time."""
    first, deadline = None, float("inf")
    while any(process.poll() is None for process in running) and time.monotonic() < deadline:
        if first is None:
            first = next((i for i, process in enumerate(running) if process.poll() not in (None, 0)), None)
            if first is not None:
                kind = "killed" if running[first].returncode < 0 else "failed"
                deadline = time.monotonic() + OTHERS_SECONDS[kind]
                if running[first].returncode == PREEMPTED:
                    deadline = float("inf")
        time.sleep(0.05)
    return first if first is not None else next((i for i, p in enumerate(running) if p.returncode), None)


def _report(number: int, code: int, processes: int) -> None:
    which = f"process {number} of {processes}"
    if code == PREEMPTED:
        raise Preempted(f"all {processes} processes; everything is saved")
    if code < 0:
        name = signal.Signals(-code).name
        raise UserError(f"{which} was ended by {name}, and the others with it", at="launch",
                        fix="look for its cause (memory?), then go on with --resume", exit_code=PEER_LOST)  # fmt: skip
    raise UserError(f"{which} failed with exit code {code}, and the others ended with it", at="launch",
                    fix="read its output above", exit_code=code)  # fmt: skip


@contextlib.contextmanager
def _passing_on(running: list[subprocess.Popen]) -> Iterator[None]:
    asked: list[int] = []

    def receive(number: int, frame: Any) -> None:
        for process in running:
            if process.poll() is None:
                process.kill() if number == signal.SIGINT and asked else process.terminate()
        asked.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environments(processes: int, devices: int | None) -> list[dict[str, str]]:
    """What each process sees of this machine's devices."""
    cards = _cards(os.environ)
    if not cards:
        count = 1 if devices is None else devices
        if count < 1:
            raise UserError(f"--devices-per-process {devices}", at="launch", expected="at least 1", fix="correct it")
        # Each device that waits in a collective holds a thread of XLA's pool, which has one per core otherwise.
        threads = max(4 * count, os.cpu_count() or 1)
        own = {"JAX_NUM_CPU_DEVICES": str(count), "NPROC": os.environ.get("NPROC", str(threads))}
        return [own] * processes
    each = len(cards) // processes if devices is None else devices
    if each < 1 or each * processes > len(cards) or (devices is None and len(cards) % processes):
        wanted = "" if devices is None else f" with {devices} cards each"
        raise UserError(f"{processes} processes{wanted} on {len(cards)} cards", at="launch",
                        expected="cards that are shared out evenly",
                        fix="change --processes or --devices-per-process")  # fmt: skip
    return [{"CUDA_VISIBLE_DEVICES": ",".join(cards[i * each : (i + 1) * each])} for i in range(processes)]


def _cards(environment: Mapping[str, str]) -> list[str]:
    """The graphics cards that JAX would use."""
    if environment.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [card for card in environment["CUDA_VISIBLE_DEVICES"].split(",") if card]
    found = [path.name for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return sorted((name.removeprefix("nvidia") for name in found), key=int)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _prefixed(number: int, source: IO[bytes], target: Any) -> None:
    for line in source:
        target.write(f"[{number}] {line.decode(errors='replace')}")
        target.flush()
