"""Tasks that generate their own data and know the exact reward of every answer."""

from rlhf_jax.data.tasks.base import Task, TaskDemonstrations, TaskPrompts, TaskRankings, TaskTexts
from rlhf_jax.data.tasks.market import Market
from rlhf_jax.data.tasks.randomwalks import RandomWalks

__all__ = ["Market", "RandomWalks", "Task", "TaskDemonstrations", "TaskPrompts", "TaskRankings", "TaskTexts"]
