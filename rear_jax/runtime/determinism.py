"""Whether two runs of one program give the same bits.

On CPUs and TPUs they do. On GPUs some operations add up in whatever order their threads come: the gradient of an
embedding is such a sum. XLA can do without them, more slowly, if it is told before it starts.
"""

import logging
import os

import jax

log = logging.getLogger(__name__)

XLA_FLAG = "--xla_gpu_deterministic_ops=true"


def ask_for() -> None:
    """Tells XLA to use operations that give the same result in every run. It must not have started yet."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAG}".strip()


def note(*, asked: bool) -> None:
    """Says in the log what can be relied on here."""
    if asked:
        log.info("deterministic: XLA runs with %s", XLA_FLAG)
    elif jax.default_backend() == "gpu":
        log.info("a resumed run repeats an unbroken one bit for bit only with --deterministic on GPUs")
