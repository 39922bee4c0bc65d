"""The record of an objective, and the prediction that all objectives share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, Shaped
from ml_collections import ConfigDict

from rear_jax import generators, losses, noise

LossFunction = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


class Objective(NamedTuple):
    """How a generator learns from codes.

    Attributes:
      name: in `config.method.name`.
      loss: (generator, config) -> loss(params, batch, key, *, progress, codebook) -> (scalar, metrics). The batch is a
        microbatch, with 'codes' [B, N], 'label' [B], what the generator is conditioned on as 'condition' where that is
        not the label, and 'number' [B], the place of each image in the whole batch. The key is that of the step,
        whatever the microbatch: random numbers are drawn by `draw_each` and by `Dropout`, so that they do not depend on
        how the batch is cut. Progress is the share of the steps, the codebook is [K, D].
      needs: (config.method) -> what the generator must offer, of `generators.family`.
    """

    name: str
    loss: Callable[[Any, ConfigDict], LossFunction]
    needs: Callable[[ConfigDict], tuple[str, ...]]


def prediction(logits: jax.Array, codes: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of codes [B, N] under logits [B, N, K], and its metrics."""
    chex.assert_shape(logits, (*codes.shape, None))
    cross_entropy = jnp.mean(losses.next_code_cross_entropy(logits, codes))
    correct = jnp.mean(losses.correct_codes(logits, codes))
    return cross_entropy, {"loss": cross_entropy, "cross_entropy": cross_entropy, "correct_codes": correct}


def draw_each(
    draw: Callable[..., Any], key: PRNGKeyArray, numbers: Int[Array, " B"], *arrays: Shaped[Array, "B ..."]
) -> Any:
    """`draw(key, *rows)` for every image of a microbatch, with a random key of its own.

    Args:
      draw: a pure function of a key and of arrays that lead with images; so do its results.
      key: of the step.
      numbers: place of each image in the whole batch.
      *arrays: what `draw` is given, a row at a time.
    """

    def one(number, *rows):
        drawn = draw(jax.random.fold_in(key, number), *(row[None] for row in rows))
        return jax.tree.map(lambda x: x[0], drawn)

    return jax.vmap(one)(numbers, *arrays)


def conditions_with_drops(model: Any, config: ConfigDict, params: Any, batch: dict[str, Any], key: PRNGKeyArray) -> Any:
    """What the images of a microbatch are conditioned on, some of it replaced by what stands for nothing.

    Captions are dropped whole, and what takes the place of their features or words is under the mask of the caption.
    """
    rate = config.method.label_drop
    if not generators.takes_text(model):

        def draw(key, labels):
            return noise.drop_labels(key, labels, model.num_classes, rate)

        return draw_each(draw, key, batch["number"], batch["label"])
    given = batch["condition"]
    nothing = generators.family_of(model).unconditional(model, params, given)
    dropped = draw_each(lambda key: jax.random.uniform(key, (1,)) < rate, key, batch["number"])

    def choose(instead, own):
        return jnp.where(dropped.reshape(-1, *(1,) * (own.ndim - 1)), instead, own)

    return jax.tree.map(choose, nothing, given)
