"""A few samples of a generator as it is, while it is trained."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from rear_jax.artifacts import Tokenizer
from rear_jax.runtime import pictures
from rear_jax.runtime.mesh import make_mesh
from rear_jax.sampling import draw
from rear_jax.sampling.conditions import Conditions, balanced_labels

IMAGES, COLUMNS = 16, 8


def previewer(
    config: ConfigDict, model: nn.Module, tokenizer: Tokenizer, look_up: Callable[[np.ndarray], Any], count: int
) -> Callable[[Any], np.ndarray]:
    """(generator's parameters) -> a grid [H, W, 3] uint8 of samples; all processes call it.

    They are drawn as `config.sample` says, always from the same random numbers, and sorted by their condition.

    Args:
      config: the experiment.
      model: the generator.
      tokenizer: what decodes.
      look_up: numbers [U] of conditions -> what the generator takes, a tree of arrays [U, ...].
      count: of conditions; the first ones are shown.
    """
    mesh = make_mesh(config.mesh)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    number = -(-IMAGES // rows) * rows  # as many on each device
    labels = balanced_labels(number, count)
    conditions = Conditions(look_up, count, labels, (), {})
    program = draw.compile_sampler(config, model, tokenizer.module)
    (batch,) = draw.plan_batches(labels, np.arange(number), number)

    def preview(params: Any) -> np.ndarray:
        weights = functools.partial(program, params, tokenizer.params)
        return pictures.grid(draw.draw_batch(weights, conditions, batch, mesh)[:IMAGES], COLUMNS)

    return preview
