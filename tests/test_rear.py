"""reAR's objective: which embedding terms count, and how projectors start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax import generators
from rear_jax.errors import RearError
from rear_jax.generators.layers import Projector
from rear_jax.training import objectives
from rear_jax.training.objectives import rear
from tests import toy

WEIGHT = 0.7


@pytest.fixture(scope="module")
def learned():
    """(embedding_terms) -> (loss, metrics) and the gradients of the toy generator."""
    model = toy.generator(toy.config(method__name="rear"))
    params = generators.family_of(model).init(model, 0)
    batch = {"codes": jax.random.randint(jax.random.key(2), (4, 16), 0, 16), "label": jnp.arange(4) % 2}
    batch["number"] = jnp.arange(4)
    codebook = jax.random.normal(jax.random.key(4), (16, 4))

    def at(terms):
        config = toy.config(method__name="rear", method__embedding_terms=terms, method__embedding_weight=WEIGHT)
        loss = rear.rear_loss(model, config)
        given = {"key": jax.random.key(3), "progress": 0.0, "codebook": codebook}
        return jax.jit(jax.value_and_grad(lambda params: loss(params, batch, **given), has_aux=True))(params)

    return at


@pytest.mark.parametrize("terms", rear.TERMS)
def test_each_term_counts_once_whichever_others_do(learned, terms):
    """The released code doubles one term where the other is off."""
    (loss, metrics), gradients = learned(terms)
    counted = sum(metrics[name] for name in rear.TERMS[terms])
    assert loss == pytest.approx(float(metrics["cross_entropy"] + WEIGHT * counted), rel=1e-6)
    assert counted != 0.0
    for name in rear.TERMS["both"]:
        moves = any(np.any(leaf != 0) for leaf in jax.tree.leaves(gradients[f"{name}_projector"]))
        assert moves == (name in rear.TERMS[terms])


def test_an_unknown_term_is_named():
    config = toy.config(method__name="rear", method__embedding_terms="middle")
    with pytest.raises(RearError, match=r"method.embedding_terms = 'middle': use one of both, shallow, deep\."):
        objectives.train_step(toy.generator(config), config, None)


@pytest.mark.parametrize("layers", [2, 3])
def test_projectors_of_every_width_start_with_vectors_as_large(layers):
    """The gradient of a cosine grows as a vector shrinks: from near zero it would drown that of the prediction."""
    states = jax.random.normal(jax.random.key(0), (1, 64, 96))

    def size(hidden):
        projector = Projector(hidden, 16, layers, jnp.float32)
        params = projector.init(jax.random.key(1), states)
        return float(jnp.linalg.norm(projector.apply(params, states), axis=-1).mean())

    assert size(64) == pytest.approx(size(2048), rel=0.3)


def test_a_projector_of_the_released_width_starts_as_released():
    params = Projector(2048, 256, 3, jnp.float32).init(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]
    for layer in params.values():
        assert float(layer["kernel"].std()) == pytest.approx(0.02, rel=0.02)
