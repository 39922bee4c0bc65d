"""The old path of `rear_jax.config.experiments`, for config files that were written before it moved."""

from rear_jax.config.experiments import *  # noqa: F403
