"""Training steps that read captions as tokens."""

from typing import Any

import jax

from rear_jax.artifacts import TextReader
from rear_jax.runtime.sharding import Rules, within
from rear_jax.text.t5 import PARAMETERS
from rear_jax.training.loop import Metrics, StepFunction
from rear_jax.training.state import TrainState

FROZEN = "text"  # under which the encoder's weights are among the frozen arrays
RULES: Rules = within(f"frozen/{FROZEN}", PARAMETERS)


def reading(step: StepFunction, reader: TextReader | None) -> StepFunction:
    """A step whose batches hold tokens as 'condition', from one that wants conditions there; itself without a reader.

    The frozen arrays hold the reader's parameters as `FROZEN`. The captions of the whole batch are encoded at once.
    """
    if reader is None:
        return step

    def reading_step(state: TrainState, batch: dict, key: jax.Array, frozen: dict) -> tuple[TrainState, Metrics]:
        condition = reader.condition(frozen[FROZEN], batch["condition"])
        return step(state, batch | {"condition": condition}, key, frozen)

    return reading_step


def frozen_weights(reader: TextReader | None) -> dict[str, Any]:
    """What a reader adds to the frozen arrays."""
    return {} if reader is None else {FROZEN: reader.params}
