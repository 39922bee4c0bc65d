"""Cached decoding equals the full forward pass, and a sequence does not depend on the batch it is in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax import generators, guidance
from rear_jax.generators.rar.cached import CachedRAR
from rear_jax.generators.rar.network import RARTransformer
from rear_jax.sampling.generate import Sampler, generate, segment_bounds

MODEL = RARTransformer(
    codebook_size=12, num_classes=5, num_codes=9, width=16, depth=3, heads=2, mlp_width=32, deep_layer=1
)
KEYS = jax.random.split(jax.random.key(7), 4)
sample = jax.jit(generate, static_argnums=(0, 5), static_argnames=("segments", "return_logits"))


@pytest.fixture(scope="module")
def params():
    leaves, tree = jax.tree.flatten(generators.shapes(MODEL))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    values = [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, values)  # nothing at zero, so that modulation and biases count


@pytest.mark.parametrize("segments", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cached_decoding_is_the_full_forward(params, segments, scale):
    labels = jnp.array([0, 3, 3, 1])
    sampler = Sampler(guidance_scale=scale, guidance_power=1.5)
    codes, logits = sample(
        CachedRAR(MODEL),
        params,
        jnp.array([0, 1, 3]),
        jnp.array([0, 2, 2, 1]),
        KEYS,
        sampler,
        segments=segments,
        return_logits=True,
    )
    conditional = MODEL.apply({"params": params}, codes, labels).logits
    unconditional = MODEL.apply({"params": params}, codes, jnp.full(4, 5)).logits
    for n in range(9):
        weight = guidance.guidance_weight("power_cosine", scale, n, 9, power=1.5)
        want = guidance.guide(conditional[:, n], unconditional[:, n], weight)
        np.testing.assert_allclose(logits[:, n], want, atol=1e-4)
        keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, n)
        np.testing.assert_array_equal(codes[:, n], guidance.draw(keys, logits[:, n]))


def test_a_sequence_does_not_depend_on_its_batch(params):
    sampler = Sampler(guidance_scale=2.0)
    classes = jnp.arange(5)
    rows = jnp.array([4, 0, 2, 2])
    together = sample(CachedRAR(MODEL), params, classes, rows, KEYS, sampler)
    for i in range(4):
        alone = sample(CachedRAR(MODEL), params, classes[rows[i]][None], jnp.array([0]), KEYS[i : i + 1], sampler)
        np.testing.assert_array_equal(alone[0], together[i])


@pytest.mark.slow
def test_causality(params):
    codes = jax.random.randint(jax.random.key(0), (1, 9), 0, 12)
    labels = jnp.array([2])
    before = MODEL.apply({"params": params}, codes, labels).logits
    after = MODEL.apply({"params": params}, codes.at[0, 4].set((codes[0, 4] + 1) % 12), labels).logits
    np.testing.assert_array_equal(before[:, :5], after[:, :5])  # code 4 is first read by the prediction of code 5
    assert (jnp.abs(before - after)[:, 5:].max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize(("num_codes", "segments"), [(1, 4), (2, 4), (9, 4), (256, 4), (10, 100)])
def test_segments_cover_every_code_once(num_codes, segments):
    covered = [n for a, b in segment_bounds(num_codes, segments) for n in range(a, b)]
    assert covered == list(range(1, num_codes))
