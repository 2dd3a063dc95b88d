"""rlhf_jax: reinforcement learning from human feedback in JAX and Flax."""

__version__ = "0.1.0"
