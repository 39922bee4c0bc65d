"""What a training job carries from step to step, and the optimiser that moves it."""

from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rear_jax.runtime import divided
from rear_jax.runtime.sharding import Rules, decay_mask


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds; a pure function of it and of the batch gives the next one.

    Attributes:
      step: int32 scalar, the number of updates made; also the position in the data.
      params: trainable parameters, float32.
      opt_state: of the optimiser.
      ema: exponential moving average of `params`, or None.
      extra: what else a method carries (statistics of a codebook, say), or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any = None
    extra: Any = None


def new_state(
    params: Any, optimizer: optax.GradientTransformation, *, ema: bool = False, extra: Any = None
) -> TrainState:
    """The state before the first step."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.int32(0), params, optimizer.init(params), average, extra)


def apply_gradients(
    state: TrainState, gradients: Any, optimizer: optax.GradientTransformation, *, ema_decay: float = 0.0
) -> TrainState:
    """One optimiser step; `extra` stays as it is."""
    chex.assert_trees_all_equal_shapes(gradients, state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = jax.tree.map(lambda a, p: ema_decay * a + (1.0 - ema_decay) * p, ema, params)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)


def learning_rate(settings: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine to the final rate at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        decay_steps=max(steps, settings.warmup_steps + 1),
        end_value=settings.final_learning_rate,
    )


def adamw(settings: ConfigDict, steps: int, rules: Rules) -> optax.GradientTransformation:
    """AdamW with gradient clipping; weight decay applies where the rules of the network's family say so."""
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.adamw(
            learning_rate(settings, steps),
            b1=settings.b1,
            b2=settings.b2,
            weight_decay=settings.weight_decay,
            mask=lambda params: decay_mask(params, rules),
        ),
    )


def accumulated_gradients(loss_fn, params: Any, batch: Any, key: jax.Array, microbatches: int):
    """Mean gradients over a batch that is run in equal microbatches.

    Parameters are gathered once for all microbatches, and gradients are divided as the state is, see `divided.py`.

    Args:
      loss_fn: (params, batch, key) -> (scalar loss, auxiliary tree), the loss a mean over the batch.
      batch: a tree of arrays with the batch axis leading, divisible by `microbatches`.
      key: each microbatch draws from its own fold of it, the only one from the key itself.
      microbatches: how many; 1 runs the batch whole, as does 0, which a job replaces by what fits.

    Returns:
      (auxiliary trees of all microbatches, stacked [microbatches, ...]; gradients).
    """
    arrays, for_networks = divided.gather(params)

    def gradients_of(batch, key):
        gradients, aux = jax.grad(lambda arrays: loss_fn(for_networks(arrays), batch, key), has_aux=True)(arrays)
        return divided.scatter(gradients), aux

    if microbatches <= 1:
        gradients, aux = gradients_of(batch, key)
        return jax.tree.map(lambda x: x[None], aux), gradients

    def one(total, inputs):
        microbatch, index = inputs
        gradients, aux = gradients_of(microbatch, jax.random.fold_in(key, index))
        return divided.scatter(jax.tree.map(jnp.add, total, gradients)), aux

    # each takes every `microbatches`-th example, so that it is spread over all devices
    cut = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = divided.scatter(jax.tree.map(jnp.zeros_like, params))
    total, aux = jax.lax.scan(one, zeros, (cut, jnp.arange(microbatches)))
    return aux, jax.tree.map(lambda x: x / microbatches, total)


def merged_microbatches(stacked: Any) -> Any:
    """Arrays of `accumulated_gradients` that lead with [microbatches, b], in the order of the batch, [B, ...]."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), stacked)
