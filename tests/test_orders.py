"""Random orders: the annealing of their share, permutations, and what the transformer may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax import orders
from rear_jax.generators.rar.network import RARTransformer


@pytest.mark.parametrize(
    ("progress", "share"), [(0.0, 1.0), (0.5, 1.0), (0.625, 0.5), (0.75, 0.0), (1.0, 0.0)], ids=str
)
def test_share_of_the_published_recipe(progress, share):
    """Epochs 200 to 300 of 400."""
    np.testing.assert_allclose(orders.random_share(progress, start=0.5, end=0.75), share, atol=1e-6)


def test_share_drops_at_once_where_start_is_end():
    assert [float(orders.random_share(p, start=0.5, end=0.5)) for p in (0.49, 0.5, 1.0)] == [1.0, 0.0, 0.0]


def test_every_order_is_a_permutation():
    drawn = orders.draw_orders(jax.random.key(0), 64, 16, 0.5)
    np.testing.assert_array_equal(np.sort(drawn, axis=1), np.broadcast_to(np.arange(16), (64, 16)))


def test_share_is_met_and_raster_is_the_rest():
    drawn = np.asarray(orders.draw_orders(jax.random.key(1), 4000, 16, 0.3))
    raster = (drawn == np.arange(16)).all(axis=1)
    assert abs(raster.mean() - 0.7) < 0.03
    assert (orders.draw_orders(jax.random.key(2), 32, 16, 0.0) == jnp.arange(16)).all()
    assert len(np.unique(drawn[~raster], axis=0)) == (~raster).sum()  # 16! orders: none comes twice


def test_first_position_is_uniform():
    first = np.asarray(orders.draw_orders(jax.random.key(3), 8000, 8, 1.0))[:, 0]
    assert np.abs(np.bincount(first, minlength=8) / 8000 - 1 / 8).max() < 0.02


def test_reorder_by_hand():
    np.testing.assert_array_equal(orders.reorder(jnp.array([[5, 6, 7]]), jnp.array([[2, 0, 1]])), [[7, 5, 6]])


@pytest.fixture(scope="module")
def model_and_params():
    model = RARTransformer(codebook_size=16, num_classes=3, num_codes=9, width=16, depth=2, heads=2, mlp_width=32)
    codes, labels = jax.random.randint(jax.random.key(0), (2, 9), 0, 16), jnp.array([0, 2])
    params = jax.jit(model.init)(jax.random.key(1), codes, labels)["params"]
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    return model, params, codes, labels


@pytest.mark.slow
def test_raster_order_given_or_implied_is_the_same(model_and_params):
    model, params, codes, labels = model_and_params
    raster = jnp.broadcast_to(jnp.arange(9), (2, 9))
    given = model.apply({"params": params}, codes, labels, raster).logits
    np.testing.assert_array_equal(given, model.apply({"params": params}, codes, labels).logits)


def test_prediction_depends_on_the_position_to_be_predicted(model_and_params):
    """The last two codes of an order trade places: what predicts the first of them sees only where it will lie."""
    model, params, codes, labels = model_and_params
    order = jnp.broadcast_to(jnp.array([3, 1, 0, 2, 5, 4, 6, 8, 7]), (2, 9))
    swapped = order.at[:, 7:].set(order[:, [8, 7]])
    a, b = (model.apply({"params": params}, codes, labels, o).logits for o in (order, swapped))
    np.testing.assert_allclose(a[:, :7], b[:, :7], atol=1e-6)
    assert np.abs(a[:, 7] - b[:, 7]).max() > 1e-3


def test_later_codes_stay_unseen_in_any_order(model_and_params):
    model, params, codes, labels = model_and_params
    order = orders.draw_orders(jax.random.key(4), 2, 9, 1.0)
    a = model.apply({"params": params}, codes, labels, order).logits
    b = model.apply({"params": params}, codes.at[:, 5:].set(0), labels, order).logits
    np.testing.assert_allclose(a[:, :6], b[:, :6], atol=1e-6)
    assert np.abs(a[:, 6:] - b[:, 6:]).max() > 1e-3
