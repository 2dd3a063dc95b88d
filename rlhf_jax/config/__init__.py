"""An experiment's configuration: load it from a Python file, change it by path, write it as JSON, read it back.

A configuration is a frozen value (dataclasses, Linen modules, tuples, scalars). This package knows nothing of what is
configured and never imports JAX.
"""

from rlhf_jax.config.description import describe, fingerprint, names, names_in, revive
from rlhf_jax.config.difference import ABSENT, diff, differences, flatten
from rlhf_jax.config.loading import ConfigFile, load
from rlhf_jax.config.overrides import override, parse_assignments
from rlhf_jax.config.paths import leaves

__all__ = [
    "ABSENT",
    "ConfigFile",
    "describe",
    "diff",
    "differences",
    "fingerprint",
    "flatten",
    "leaves",
    "load",
    "override",
    "parse_assignments",
    "names",
    "names_in",
    "revive",
]
