"""The program ``rlhf-jax``: reads the words, runs the verb, and turns its outcome into an exit code."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.errors import BUG, DONE, PREEMPTED, Preempted, UserError

INTERRUPTED = 130
DEBUG = "--debug"


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line ``words`` (default: this process's); returns the exit code of ``errors``."""
    words = list(sys.argv[1:] if words is None else words)
    debug = DEBUG in words
    words = [word for word in words if word != DEBUG]
    verb = parse(words)
    keep_compiled_programs()
    code, text = DONE, ""
    try:
        verb.run()
    except UserError as error:
        if debug and not _processes():
            raise
        code, text = error.exit_code, str(error)
        _print_error("".join(traceback.format_exception(error)) if debug else text)
    except Preempted as stop:
        code = PREEMPTED
        _print_error(f"stopped: {stop}", style="yellow")
    except KeyboardInterrupt:
        code, text = INTERRUPTED, "interrupted"
        _print_error(text, style="yellow")
    except Exception as error:
        if others := _processes():
            others.wait_for_cause(error)
        traceback.print_exc()
        code, text = BUG, f"{type(error).__name__}: {error}"
    if others := _processes():
        others.leave(code, text)
    return code


def _processes() -> Any:
    """The module that joined this process to others; None where it is alone."""
    module = sys.modules.get("rlhf_jax.processes")
    return module if module is not None and module.joined() else None


def parse(words: Sequence[str]):
    """The verb that the words name, with its options. Exits with a message where they name none."""
    import tyro

    from rlhf_jax.cli.verbs import VERBS

    return tyro.cli(
        VERBS,
        prog="rlhf-jax",
        description="Reinforcement learning from human feedback in JAX. Any verb takes --debug: tracebacks of errors.",
        args=list(words),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )


def keep_compiled_programs() -> None:
    """Have JAX keep compiled programs on disk, unless the user's environment says otherwise.

    ``JAX_COMPILATION_CACHE_DIR`` names another folder; ``JAX_ENABLE_COMPILATION_CACHE=false`` switches it off.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if base else Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "rlhf_jax" / _processor()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def _processor() -> str:
    """A name for the kind of processor: programs compiled for one may not run on another that shares the home."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), lines[0])
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _print_error(text: str, style: str = "bold red") -> None:
    from rich.console import Console
    from rich.text import Text

    word = "error: " if style == "bold red" else ""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text.assemble((word, style), text))


if __name__ == "__main__":
    sys.exit(main())
