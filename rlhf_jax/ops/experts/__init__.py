"""Work of many experts at the cost of the few that each token goes to: sorting, grouped matmuls, meshes."""

from rlhf_jax.ops.experts.feedforward import expert_feedforward
from rlhf_jax.ops.experts.grouped import (
    GROUPED_IMPLEMENTATIONS,
    GroupedImplementation,
    case_of,
    check_implementation,
    choose,
    grouped_matmul,
)
from rlhf_jax.ops.experts.rows import Sorting, combine, counts, dispatch, sort

__all__ = [
    "GROUPED_IMPLEMENTATIONS",
    "GroupedImplementation",
    "Sorting",
    "case_of",
    "check_implementation",
    "choose",
    "combine",
    "counts",
    "dispatch",
    "expert_feedforward",
    "grouped_matmul",
    "sort",
]
