"""What waits in the host's memory until reinforcement learning needs it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from rlhf_jax.sharding import park, wake
from rlhf_jax.types import PyTree, TrainState

OFFLOADABLE = ("reference", "reward", "optimizer")


def kept(params: PyTree, parked: bool) -> Callable[[], PyTree]:
    """Gives the parameters when they are needed, from the host's memory if they are parked there."""
    if not parked:
        return lambda: params
    away = park(params)
    return lambda: wake(away)


def rested(state: TrainState) -> TrainState:
    """The state with what only updates need in the host's memory."""
    return dataclasses.replace(state, opt_state=park(state.opt_state), ema=park(state.ema))


def woken(state: TrainState) -> TrainState:
    """The state with everything on its devices."""
    return dataclasses.replace(state, opt_state=wake(state.opt_state), ema=wake(state.ema))
