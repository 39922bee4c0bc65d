"""The two ways in which a cache has its heads, side by side and apart, give the same codes; and who has which."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from rear_jax import generators
from rear_jax.generators import heads as apart
from rear_jax.generators import heads_together as together
from rear_jax.generators.alitok.network import AliTokTransformer
from rear_jax.generators.cached_attention import new_key_values
from rear_jax.generators.heads import HalfSplitRotation, Norm, Preparation, Rotation
from rear_jax.generators.interface import Captions, Tokens
from rear_jax.generators.janus.network import JanusTransformer
from rear_jax.generators.llamagen.network import LlamaGenTransformer
from rear_jax.generators.rar.network import RARTransformer
from rear_jax.runtime.mesh import AXES
from rear_jax.runtime.precision import standing_in_for
from rear_jax.sampling.generate import Sampler, generate

SIZES = {"codebook_size": 12, "num_classes": 5, "num_codes": 9, "width": 24, "depth": 1, "heads": 3, "mlp_width": 32}
RAR = RARTransformer(**SIZES)
LLAMAGEN = LlamaGenTransformer(**SIZES, token_dropout=0.0)
TEXT = dataclasses.replace(LLAMAGEN, condition="text", caption_length=4, caption_dim=6)
ALITOK = AliTokTransformer(**SIZES | {"num_codes": 7}, token_dropout=0.0, prefix_tokens=3)
JANUS = JanusTransformer(**SIZES, vocabulary_size=20, prompt_length=4, pad_id=3)
LABELS, ROWS = jnp.array([0, 1, 3]), jnp.array([0, 2, 2, 1])
CAPTIONS = Captions(jax.random.normal(jax.random.key(2), (3, 4, 6)), jnp.arange(4) >= jnp.array([2, 0, 3])[:, None])
PROMPTS = Tokens(jax.random.randint(jax.random.key(3), (3, 4), 0, 20), CAPTIONS.mask)
KEYS = jax.random.split(jax.random.key(7), 4)
MODELS = {"rar": RAR, "text": TEXT, "alitok": ALITOK, "janus": JANUS}
CONDITIONS = {"rar": LABELS, "text": CAPTIONS, "alitok": LABELS, "janus": PROMPTS}


def random_params(model):
    """Nothing at zero or one, so that every parameter counts."""
    draw = np.random.default_rng(0).normal
    return jax.tree.map(
        lambda leaf: jnp.asarray(draw(scale=0.3, size=leaf.shape), jnp.float32), generators.shapes(model)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_heads_side_by_side_draw_the_same_codes(name):
    model, conditions = MODELS[name], CONDITIONS[name]
    params, sampler = random_params(model), Sampler("constant", 3.0)
    drawn = []
    for platform in ("cpu", "tpu"):
        run = functools.partial(generate, generators.cached(model), return_logits=True)
        with standing_in_for(platform):
            drawn.append(jax.jit(run, static_argnums=4)(params, conditions, ROWS, KEYS, sampler))
    np.testing.assert_array_equal(drawn[0][0], drawn[1][0])
    np.testing.assert_allclose(drawn[0][1], drawn[1][1], atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("biased", [False, True])
def test_preparation_is_the_same_side_by_side(biased):
    draw = np.random.default_rng(1).normal
    qkv = jnp.asarray(draw(2.0, 3.0, size=(2, 5, 3, 4, 6)), jnp.float32)
    norms = [Norm(*(jnp.asarray(draw(size=6), jnp.float32) for _ in range(1 + biased))) for _ in range(2)]
    angles = draw(size=(5, 3))
    preparation = Preparation(*norms, Rotation(jnp.cos(angles), jnp.sin(angles)))
    for want, got in zip(preparation.apply(qkv), together.prepared_together(qkv, preparation), strict=True):
        np.testing.assert_allclose(got, want.reshape(got.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Rotation, HalfSplitRotation])
def test_the_rotation_is_the_same_to_the_last_bit(kind):
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 6))
    angles = np.random.default_rng(1).normal(size=(2, 5, 3)).astype(np.float32)
    rotation = kind(np.cos(angles), np.sin(angles))  # positions of their own for each sequence
    got = together.rotated(x.reshape(2, 5, 24), rotation, 6)
    np.testing.assert_array_equal(got, apart.rotate(x, rotation).reshape(2, 5, 24))


@pytest.mark.parametrize(
    ("platform", "tensor", "shape"),
    [
        ("cpu", 1, (2, 4, 7, 6)),
        ("gpu", 1, (2, 4, 7, 6)),
        ("tpu", 1, (2, 1, 7, 24)),
        ("tpu", 2, (2, 2, 7, 12)),
        ("tpu", 3, (2, 4, 7, 6)),
    ],
)
def test_heads_lie_side_by_side_on_each_tpu(platform, tensor, shape):
    mesh = AbstractMesh((1, 1, tensor), AXES)
    with standing_in_for(platform), jax.sharding.use_abstract_mesh(mesh):
        past = jax.eval_shape(lambda: new_key_values(2, 4, 7, 6, jnp.bfloat16))
    assert past.keys.shape == past.values.shape == shape


def test_decoding_rounds_kernels_alone():
    """As training has it: biases, scales and shifts are float32."""
    model = dataclasses.replace(RAR, dtype=jnp.bfloat16)
    weights = jax.eval_shape(generators.cached(model).prepare, generators.shapes(model))
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights.layers):
        assert leaf.dtype == (jnp.bfloat16 if "kernel" in jax.tree_util.keystr(path) else jnp.float32)


def test_without_guidance_no_second_half_is_computed():
    """Halves of a batch of 4 lead with 8 rows: nothing has so many without guidance, nor after its interval."""

    def batches(sampler):
        """How many sequences each stretch of the decoder reads."""
        run = functools.partial(generate, generators.cached(LLAMAGEN), sampler=sampler, segments=3)
        program = jax.make_jaxpr(run)(generators.shapes(LLAMAGEN), LABELS, ROWS, KEYS).jaxpr
        scans = [line for line in program.eqns if line.primitive.name == "scan"]
        return [{v.aval.shape[0] for v in scan.outvars if v.aval.ndim == 4} for scan in scans]

    assert batches(Sampler("constant", 1.0)) == [{4}] * 3
    assert batches(Sampler("constant", 3.0)) == [{8}] * 3
    assert batches(Sampler("constant", 3.0, guidance_interval=1)) == [{8}, {4}, {4}]
