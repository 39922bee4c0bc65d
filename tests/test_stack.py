"""The loop over blocks: what remat policies keep, and that they change no gradient."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax import generators, tokenizers
from rear_jax.errors import RearError
from rear_jax.generators.dropout import Dropout
from rear_jax.generators.llamagen.network import LlamaGenTransformer
from rear_jax.generators.stack import REMAT, run_blocks
from tests import toy

MODEL = LlamaGenTransformer(
    codebook_size=12,
    num_classes=5,
    num_codes=64,
    width=16,
    depth=12,
    heads=2,
    mlp_width=32,
    dropout=0.1,
    token_dropout=0.1,
)
CODES, LABELS = jax.random.randint(jax.random.key(0), (4, 64), 0, 12), jnp.arange(4)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), CODES[:1], LABELS[:1])["params"]
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)  # nothing at zero, so that every parameter counts
    return jax.tree.unflatten(tree, [rng.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def compiled(params):
    """Name of a policy -> the program that computes gradients under it, with dropout; one of them unrolled too."""

    def of(remat: str):
        model = dataclasses.replace(MODEL, remat=remat, unroll=2 if remat == "products" else 1)

        def loss(params):
            out = model.apply(
                {"params": params}, CODES, LABELS, dropout=Dropout.of(jax.random.key(3), jnp.arange(len(CODES)))
            )
            return jnp.mean(jnp.square(out.logits))

        return jax.jit(jax.grad(loss)).lower(params).compile()

    return {name: of(name) for name in REMAT}


def test_policies_and_unrolling_change_no_gradient(compiled, params):
    plain = compiled["none"](params)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain["blocks"]))
    for name in ("products", "full"):
        chex.assert_trees_all_close(plain, compiled[name](params), rtol=1e-4, atol=1e-6)


def test_each_policy_keeps_less(compiled):
    none, products, full = (
        compiled[name].memory_analysis().temp_size_in_bytes for name in ("none", "products", "full")
    )
    assert none > 1.5 * products, (none, products, full)
    assert products > 1.5 * full, (none, products, full)


def test_an_unknown_policy_names_the_known_ones():
    config = toy.config(model__remat="half")
    tokenizer = tokenizers.build(config.tokenizer, config.data.image_size)
    with pytest.raises(RearError, match=r"config\.model\.remat = 'half': use one of auto, none, products, full\."):
        generators.build(config, tokenizer)


class Tanh(nn.Module):
    @nn.compact
    def __call__(self, x, *, dropout):
        return nn.tanh(nn.Dense(8, use_bias=False, name="dense")(x))


class Tapped(nn.Module):
    taps: tuple[int, ...]
    depth: int = 3
    remat: str = "full"
    unroll: int = 1

    def setup(self):
        self.blocks = Tanh()

    def __call__(self, x):
        return run_blocks(self, x, dropout=None, taps=self.taps)


@pytest.mark.parametrize("taps", [(), (0, 2), (2, 1), (1, 1), (0, 0)])
def test_taps_are_the_outputs_of_their_blocks(taps):
    """Values and gradients of a plain loop; the same block twice, and the last one, included."""
    model, (x, *weights) = Tapped(taps), jax.random.normal(jax.random.key(0), (2 + len(taps), 2, 5, 8))
    params = model.init(jax.random.key(1), x)["params"]

    def looped(params, x):
        outputs = []
        for kernel in params["blocks"]["dense"]["kernel"]:
            x = jnp.tanh(x @ kernel)
            outputs.append(x)
        return x, tuple(outputs[tap] for tap in taps)

    def summed(run):
        return lambda *given: sum(jnp.vdot(w, x) for w, x in zip(weights, jax.tree.leaves(run(*given)), strict=True))

    def scanned(params, x):
        return model.apply({"params": params}, x)

    got, wanted = (jax.value_and_grad(summed(run), argnums=(0, 1))(params, x) for run in (scanned, looped))
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-5)
