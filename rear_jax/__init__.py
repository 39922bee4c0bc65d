"""Visual autoregressive models whose generator agrees with its tokenizer: reAR and VA-π in JAX.

`rear_jax.load` opens a model for use from Python. It comes with the first look at it, so that a project that imports
`rear_jax.losses` alone waits for nothing else.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rear_jax.pipeline import Pipeline as Pipeline
    from rear_jax.pipeline import load as load


def __getattr__(name: str) -> Any:
    """`load` and `Pipeline`, imported when they are asked for."""
    if name in ("load", "Pipeline"):
        from rear_jax import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
