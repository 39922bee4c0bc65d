"""Floats to 8 bits: both sides of every border between two levels, and a rule for every network."""

import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax import generators, tokenizers
from rear_jax.weights.family import round_half_up, truncate

LEVELS = np.arange(256)


@pytest.mark.parametrize(("rule", "shift"), [(truncate, 0.0), (round_half_up, 0.5)])
def test_borders(rule, shift):
    """Level n begins at (n - shift) / 255 and reaches to just below the next."""
    below, above = (LEVELS[1:] - shift - 1e-3) / 255, (LEVELS[1:] - shift + 1e-3) / 255
    np.testing.assert_array_equal(rule(jnp.asarray(below)), LEVELS[:-1])
    np.testing.assert_array_equal(rule(jnp.asarray(above)), LEVELS[1:])
    outside = rule(jnp.asarray([-7.0, -1e-3, 0.0, 1.0, 1.001, 300.0]))
    np.testing.assert_array_equal(outside, [0, 0, 0, 255, 255, 255])
    assert outside.dtype == jnp.uint8


def test_llamagens_rule_is_that_of_its_range():
    y = np.linspace(-1.2, 1.2, 4001)
    away = np.abs(np.mod(127.5 * y + 128.0, 1.0) - 0.5) < 0.499  # from borders, where float32 decides
    wanted = np.clip(127.5 * y + 128.0, 0.0, 255.0).astype(np.uint8)
    np.testing.assert_array_equal(round_half_up(jnp.asarray((y + 1.0) / 2.0))[away], wanted[away])


def test_every_network_has_its_rule():
    of_generators = {name: family.to_8_bit for name, family in generators.FAMILIES.items()}
    assert of_generators == {"rar": truncate, "llamagen": round_half_up, "alitok": truncate, "janus": truncate}
    of_tokenizers = {name: family.to_8_bit for name, family in tokenizers.FAMILIES.items()}
    others = dict.fromkeys(("maskgit_vqgan", "vqgan_plus", "titok", "alitok"), truncate)
    assert of_tokenizers == {"llamagen_vq": round_half_up} | others
