"""The record of a post-training method, and the step of those that simply descend a loss."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rear_jax.training.loop import SUSPECT
from rear_jax.training.state import TrainState, accumulated_gradients, apply_gradients, learning_rate


@dataclasses.dataclass(frozen=True)
class Method:
    """How a generator or a decoder is post-trained.

    A batch holds 'image' [B, H, W, 3] uint8, 'label' [B], 'condition' (labels or captions, as the generator takes
    them) and 'index' [B], where in the data set each image is. Where a reward compares with captions, it also holds
    'text_features', [B, E] by judge, see `rewards.caption_judges`. `frozen` holds parameters by name, see
    `teacher_forcing.Networks`.

    Attributes:
      trains: which network the state holds: 'generator', or 'decoder', that of the tokenizer.
      make_step: (networks, config, optimizer) -> step(state, batch, key, frozen) -> (state, metrics).
      draw_samples: (networks, config, params, frozen, batch, key) -> codes [B, G, N] that the generator with `params`
        draws for a batch, to look at.
      reads: settings of `config.posttrain` that it reads and some other method does not.
      lacks: what rewards cannot look at, of `rewards.ORIGINAL` and `CODES` -> why.
      check: (config) raises RearError where its settings cannot work.
    """

    trains: str
    make_step: Callable[..., Any]
    draw_samples: Callable[..., jax.Array]
    reads: tuple[str, ...]
    lacks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    check: Callable[[ConfigDict], None] = lambda config: None


def descent_step(config: ConfigDict, optimizer: optax.GradientTransformation, loss_fn):
    """step(state, batch, key, frozen) -> (state, metrics): descends (params, batch, key, frozen) -> (loss, metrics)."""
    settings = config.posttrain
    schedule = learning_rate(settings.optimizer, settings.loop.steps)

    def step(state: TrainState, batch: dict, key: jax.Array, frozen: dict) -> tuple[TrainState, dict]:
        def loss(params, batch, key):
            return loss_fn(params, batch, key, frozen)

        stacked, gradients = accumulated_gradients(loss, state.params, batch, key, settings.accumulation)
        metrics = means(stacked) | {"gradient_norm": optax.tree.norm(gradients)}
        return apply_gradients(state, gradients, optimizer), metrics | {"learning_rate": schedule(state.step)}

    return step


def means(stacked: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics of a step from those of its microbatches."""
    return {name: jnp.max(values) if name == SUSPECT else jnp.mean(values) for name, values in stacked.items()}
