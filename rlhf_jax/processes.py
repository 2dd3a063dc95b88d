"""The processes of one run: start them together, run a piece of work in step, and end them all when one fails.

Control goes through the coordination service of ``jax.distributed``, which process 0 serves, and never through the
devices: it has timeouts, carries text, and works while devices are busy. Which process this is belongs to the process,
as it does in JAX, and is the only state here. In a single process everything is a plain call.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import clusters, distributed

from rlhf_jax.errors import DONE, PEER_LOST, PREEMPTED, UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""The environment's words for ``--coordinator``, ``--processes`` and ``--process-id``."""
CONNECT_SECONDS = 300
"""Until all processes must have met at the coordinator."""
HEARTBEAT_SECONDS = 30
"""After this much silence JAX takes a process for dead and ends the others."""
MEET_SECONDS = 1800
"""How long living processes wait for each other at one point before they give up."""
FAILED_SECONDS = 10
"""How long a process that failed waits for the others at that point."""
GRACE_SECONDS = 3.0
"""How long a process may take to end by itself once another one has failed."""

_SLICE_MS = 2000
_FAILURE = "rlhf_jax/failure"
_LOST = re.compile(r"gloo|nccl|connection|socket|unavailable|coordination|heartbeat|aborted|deadline", re.IGNORECASE)

Result = TypeVar("Result")


class _Membership:
    """This process's part in the run: the number of its next meeting, and whether it is about to end."""

    def __init__(self):
        self.meetings = itertools.count()
        self.polls = itertools.count()
        self.leaving = threading.Event()
        self.connecting = self.watching = False
        self.heartbeat_seconds = HEARTBEAT_SECONDS


_SELF = _Membership()


def count() -> int:
    """How many processes this run has."""
    return distributed.global_state.num_processes if distributed.global_state.client is not None else 1


def index() -> int:
    """The number of this process."""
    return distributed.global_state.process_id if distributed.global_state.client is not None else 0


def joined() -> bool:
    """Whether this process is one of several, or on its way to be."""
    return distributed.global_state.client is not None or _SELF.connecting


def is_first() -> bool:
    """Whether this process is the one that writes what there is only one of."""
    return index() == 0


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    connect_seconds: int = CONNECT_SECONDS,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> None:
    """Join the run's other processes; before anything else uses JAX. A process on its own joins nobody.

    Args:
        coordinator: ``host:port`` of process 0. Where nothing is given, ``VARIABLES`` are asked if all are set, and
            else the cluster, by JAX: Slurm, GKE, TPU pods, jobs of Kubernetes, Open MPI.
        processes: how many there are; 1 is on its own, whatever the cluster says.
        process_id: which one this is, from 0.
        connect_seconds: until all must have met.
        heartbeat_seconds: of silence before a process counts as dead.

    Raises:
        UserError: impossible numbers, or not all processes have met in time.
    """
    if processes == 1:
        return
    if (coordinator, processes, process_id) == (None, None, None) and set(VARIABLES) <= os.environ.keys():
        coordinator, processes, process_id = (os.environ[VARIABLES[0]], *(_number(name) for name in VARIABLES[1:]))
    given = {"coordinator": coordinator, "processes": processes, "process-id": process_id}
    options: dict[str, Any] = {}
    if any(value is not None for value in given.values()):
        _check(given)
        options = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process_id,
                   "cluster_detection_method": "deactivate"}  # fmt: skip
    elif _cluster_size() == 1:
        return
    where = "the cluster's coordinator" if coordinator is None else coordinator
    found: list[BaseException] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                **options, heartbeat_timeout_seconds=heartbeat_seconds, shutdown_timeout_seconds=heartbeat_seconds,
                initialization_timeout=connect_seconds + 60,  # JAX ends the process then, so our own limit comes first
            )  # fmt: skip
        except BaseException as error:
            found.append(error)

    _SELF.connecting, _SELF.heartbeat_seconds = True, heartbeat_seconds
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(connect_seconds)
    if thread.is_alive() or found:
        which = "" if process_id is None else f"process {process_id} of {processes} "
        reason = f"within {connect_seconds} s" if not found else f"({found[0]})"
        raise UserError(f"{which}could not meet the others {reason}", at=where,
                        expected="process 0 to serve this address, and every process to reach it",
                        fix="compare --coordinator and --processes of all processes, and look whether all were started",
                        exit_code=PEER_LOST) from (found[0] if found else None)  # fmt: skip
    _SELF.watching = True
    threading.Thread(target=_watch, daemon=True).start()


def gather(what: str, work: Callable[[], Result]) -> list[Result]:
    """Do ``work`` in every process; all results, in the order of processes. Where one fails, all raise its error.

    Args:
        what: names this point of the program in errors; the same in every process.
        work: returns something JSON-able.
    """
    if count() == 1:
        return [work()]
    fault: Exception | None = None
    note: dict[str, Any] = {"at": what}
    try:
        note["value"] = work()
    except Exception as error:
        fault, note = error, {"at": what, "fault": _packed(error)}
    try:
        notes = _exchange(what, note, MEET_SECONDS if fault is None else FAILED_SECONDS)
    except UserError:
        if fault is None:
            raise
        raise fault from None
    if fault is not None:
        raise fault
    for number, other in enumerate(notes):
        if "fault" in other:
            raise _unpacked(other["fault"], number)
    return [other["value"] for other in notes]


def together(what: str, work: Callable[[], Result]) -> Result:
    """Do ``work`` in every process, return its own result; where one fails, all raise its error."""
    kept: list[Result] = []
    gather(what, lambda: kept.append(work()))
    return kept[0]


def first(what: str, work: Callable[[], Result]) -> Result:
    """Do ``work`` in process 0 alone; every process returns its JSON-able result, or raises its error."""
    return gather(what, work if is_first() else lambda: None)[0]  # pyright: ignore[reportReturnType]


def same(what: str, value: Any) -> None:
    """Refuse to go on with processes that were started with different values (JSON-able)."""
    values = gather(what, lambda: value)
    odd = [number for number, other in enumerate(values) if other != values[0]]
    if odd:
        raise UserError(f"{what} of process {odd[0]} is {values[odd[0]]}, that of process 0 is {values[0]}",
                        at=f"{count()} processes", expected="the same in every process",
                        fix="start all with the same files, options and versions")  # fmt: skip


def asked_to_stop() -> bool:
    """Whether a SIGTERM reached any process: the same answer at the same call in all of them."""
    from jax.experimental import multihost_utils

    return count() > 1 and multihost_utils.reached_preemption_sync_point(next(_SELF.polls))


def part(rows: int) -> slice:
    """This process's share of so many rows, for work on the host that is shared out."""
    return slice(rows * index() // count(), rows * (index() + 1) // count())


def wait_for_cause(error: BaseException) -> None:
    """After an error that another process may have caused, give that one's own words time to arrive.

    Its notice, or the loss of its heartbeat, ends this process in the meantime.
    """
    if count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError) or not _LOST.search(str(error)):
        return
    seconds = _SELF.heartbeat_seconds + 2 * GRACE_SECONDS
    _say(f"process {index()} of {count()} lost contact with another one ({str(error).splitlines()[0]}); "
         f"waiting up to {seconds:.0f} s to hear why")  # fmt: skip
    time.sleep(seconds)


def leave(code: int, error: str = "") -> None:
    """End this process's part in the run: with the others where all is well, and telling them where it is not.

    Returns only after a good end; else the process is gone, since an ordinary exit would wait for the others.
    """
    if not joined():
        return
    if not _SELF.watching:
        _exit(code)  # a thread still waits for the others
    if code in (DONE, PREEMPTED):
        gather("the end", lambda: None)  # JAX gives them little time for it, and process 0 still writes the report
        _SELF.leaving.set()
        jax.distributed.shutdown()
        return
    _SELF.leaving.set()
    notice = {"process": index(), "code": code, "error": error}
    try:
        _client().key_value_set(_FAILURE, json.dumps(notice))
    except jax.errors.JaxRuntimeError:
        pass  # another one was first, or process 0 is gone
    _exit_with_others(code)


def _client() -> Any:
    """JAX's own client of the coordination service; Orbax uses the same."""
    return distributed.global_state.client


def _check(given: dict[str, Any]) -> None:
    missing = [f"--{name}" for name, value in given.items() if value is None]
    coordinator, processes, process_id = given.values()
    if missing:
        raise UserError(f"{' and '.join(missing)} missing", at="run", expected="all of --coordinator, --processes and "
                        "--process-id, or none of them", fix="add what is missing")  # fmt: skip
    if not re.fullmatch(r"\S+:\d{1,5}", coordinator):
        raise UserError(f"{coordinator!r}", at="--coordinator", expected="host:port", fix="correct it")
    if not 0 <= process_id < processes:
        raise UserError(f"--process-id {process_id} with --processes {processes}", at="run",
                        expected=f"0 to {processes - 1}", fix="correct one of them")  # fmt: skip


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise UserError(f"{os.environ[name]!r}", at=name, expected="a whole number", fix="correct it") from None


def _cluster_size() -> int:
    """Processes of the cluster that JAX finds itself in; 1 outside of any."""
    for kind in clusters.ClusterEnv._cluster_types:
        if kind.name == "k8s" and "JOB_COMPLETION_INDEX" not in os.environ:
            continue  # a pod that is no part of a job, which JAX would ask the cluster about
        if not kind.opt_in_only_method and kind.is_env_present():
            return kind.get_process_count()
    return 1


def _exchange(what: str, note: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    """The notes of all processes: process 0 collects them and hands them out."""
    client, number = _client(), next(_SELF.meetings)
    folder = f"rlhf_jax/meetings/{number}"
    client.key_value_set(f"{folder}/{index()}", json.dumps(note))
    if is_first():
        notes = [json.loads(_read(f"{folder}/{i}", what, i, seconds)) for i in range(count())]
        client.key_value_set(f"{folder}/all", json.dumps(notes))
        if number:  # everybody has read the last ones
            client.key_value_delete(f"rlhf_jax/meetings/{number - 1}")
    notes = json.loads(_read(f"{folder}/all", what, 0, seconds))
    points = [other["at"] for other in notes]
    assert len(set(points)) == 1, f"processes are at different points of the program: {points}"
    return notes


def _read(key: str, what: str, owner: int, seconds: float) -> str:
    """The value of a key, as soon as its owner has set it."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return _client().blocking_key_value_get(key, _SLICE_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if time.monotonic() > deadline:
            raise UserError(f"process {index()} of {count()} has waited {seconds:.0f} s for process {owner}", at=what,
                            expected="every process to come to this point", fix="look at the output of that process",
                            exit_code=PEER_LOST)  # fmt: skip


def _packed(error: Exception) -> dict[str, Any]:
    if isinstance(error, UserError):
        return {name: getattr(error, name) for name in ("what", "at", "expected", "fix", "exit_code")}
    return {"text": f"{type(error).__name__}: {error}"}


def _unpacked(fault: dict[str, Any], process: int) -> Exception:
    """The same error again; one that is no user's error keeps its words."""
    if "what" in fault:
        return UserError(fault.pop("what"), **fault)
    return RuntimeError(f"process {process} failed: {fault['text']}")


def _watch() -> None:
    """End this process when another one has failed, wherever it is; beside the program, in a thread."""
    client = _client()
    while not _SELF.leaving.is_set():
        try:
            notice = json.loads(client.blocking_key_value_get(_FAILURE, _SLICE_MS))
        except jax.errors.JaxRuntimeError:
            _SELF.leaving.wait(0.1)
            continue
        if not _SELF.leaving.wait(GRACE_SECONDS):
            _SELF.leaving.set()
            _say(f"process {index()} of {count()} ends because process {notice['process']} failed: {notice['error']}")
            _exit_with_others(notice["code"])


def _exit_with_others(code: int) -> NoReturn:
    """Process 0 serves the notice, so nobody goes before all have it."""
    try:
        _client().wait_at_barrier("rlhf_jax/end", int((GRACE_SECONDS + 5) * 1000))
    except jax.errors.JaxRuntimeError:
        pass
    if is_first():
        time.sleep(1)  # JAX aborts whoever is still there when the service goes
    _exit(code)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
