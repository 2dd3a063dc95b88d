"""What a user is told when something that they control is wrong, and the exit code that goes with it.

Exit codes follow sysexits: a launcher can requeue on ``PREEMPTED`` without reading the log.
"""

from __future__ import annotations

DONE = 0
USAGE = 2
BAD_DATA = 65
MISSING_INPUT = 66
PEER_LOST = 69
BUG = 70
LOCKED = 73
IO = 74
PREEMPTED = 75
DIVERGED = 76
REFUSED = 77
DOES_NOT_FIT = 78


class UserError(ValueError):
    """A mistake that the user can mend; printed without a traceback.

    Args:
        what: the fault and the value that was found, e.g. ``"unknown field 'train.learning_rat'"``.
        at: where: ``file:line``, a dotted config path, a checkpoint step.
        expected: what would have been accepted.
        fix: what to do.
        exit_code: one of this module's codes.
    """

    def __init__(self, what: str, *, at: str = "", expected: str = "", fix: str = "", exit_code: int = USAGE):
        self.what, self.at, self.expected, self.fix, self.exit_code = what, at, expected, fix, exit_code
        place = f"{at}: " if at else ""
        tail = (f"; expected {expected}" if expected else "") + (f". Fix: {fix}" if fix else "")
        super().__init__(f"{place}{what}{tail}")


class Preempted(Exception):
    """Raised by a loop that was asked to stop (SIGTERM) after everything was saved."""
