"""MaskGIT-VQGAN, its published layout, the tokenizer table and the discriminator."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import save_file

from rear_jax import tokenizers
from rear_jax.artifacts import published
from rear_jax.errors import RearError
from rear_jax.tokenizers.blocks import GroupNorm
from rear_jax.tokenizers.discriminator import PatchDiscriminator
from rear_jax.tokenizers.maskgit_vqgan import FAMILY, MaskGitVQGAN, sizes
from tests import toy
from tests.golden_checks import maskgit_vqgan

GOLDENS = Path(__file__).parent / "goldens"
IMAGES = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))


def tiny_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "name": "maskgit_vqgan",
            "hidden_channels": 8,
            "channel_mult": (1, 2),
            "num_res_blocks": 1,
            "precision": "high",
            "z_channels": 6,
            "codebook_size": 12,
            "l2_normalize": False,
            "dtype": "float32",
        }
    )


def tiny(**changes: object) -> tuple[MaskGitVQGAN, dict]:
    """A small tokenizer and weights drawn without running (hence compiling) its `init`."""
    config = tiny_config()
    config.update(changes)
    tokenizer = tokenizers.build(config, 8)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(tokenizer.init, jax.random.key(0), IMAGES)
    return tokenizer, jax.tree.map(lambda leaf: rng.normal(0.0, 0.2, leaf.shape).astype(leaf.dtype), shapes)


def number_of_parameters(tree: object) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_golden() -> None:
    with np.load(GOLDENS / "maskgit_vqgan.npz") as golden:
        maskgit_vqgan.check(golden)


def test_the_published_network_has_its_published_size() -> None:
    tokenizer = MaskGitVQGAN(256, 128, (1, 1, 2, 2, 4), 2, 256, 1024)
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    params = jax.eval_shape(tokenizer.init, jax.random.key(0), images)["params"]
    assert round(number_of_parameters(params) / 1e6, 1) == 54.5
    assert set(params) == {"encoder", "decoder", "codebook"}
    assert tokenizer.grid == (16, 16)
    assert tokenizer.codes_per_image == 256
    assert tokenizer.embedding_dim == 256


@pytest.mark.slow
@pytest.mark.parametrize("l2_normalize", [False, True])
def test_the_interface_is_consistent_with_itself(l2_normalize: bool) -> None:
    tokenizer, variables = tiny(l2_normalize=l2_normalize)

    def embed(codes: jax.Array) -> jax.Array:
        return tokenizer.apply(variables, codes, method=tokenizer.embed)

    def decode_embeddings(vectors: jax.Array) -> jax.Array:
        return tokenizer.apply(variables, vectors, method=tokenizer.decode_embeddings)

    codes = jax.jit(lambda x: tokenizer.apply(variables, x, method=tokenizer.encode))(IMAGES)
    assert codes.shape == (2, tokenizer.codes_per_image) == (2, 16)
    assert codes.dtype == jnp.int32
    decoded = jax.jit(lambda c: tokenizer.apply(variables, c, method=tokenizer.decode))(codes)
    assert decoded.shape == IMAGES.shape
    vectors = embed(codes)
    assert vectors.shape == (2, 16, tokenizer.embedding_dim)
    assert bool(jnp.allclose(jnp.linalg.norm(vectors, axis=-1), 1.0, atol=1e-5)) is l2_normalize
    np.testing.assert_allclose(jax.jit(decode_embeddings)(vectors.reshape(2, 4, 4, -1)), decoded, atol=1e-5)
    reconstruction, quantized = jax.jit(tokenizer.apply)(variables, IMAGES)
    np.testing.assert_array_equal(quantized.codes.reshape(2, -1), codes)
    np.testing.assert_allclose(reconstruction, decoded, atol=1e-5)


def test_codes_are_row_major() -> None:
    tokenizer, variables = tiny()
    run = jax.jit(lambda x: [tokenizer.apply(variables, x, method=m) for m in (tokenizer.latents, tokenizer.encode)])
    latents, codes = run(IMAGES)
    assert latents.shape == (2, 4, 4, 6)
    distances = np.square(latents[:, :, :, None] - variables["params"]["codebook"]).sum(-1)
    np.testing.assert_array_equal(codes, distances.argmin(-1).reshape(2, 16))
    assert np.unique(codes).size > 1


@pytest.mark.slow
def test_training_reaches_every_parameter() -> None:
    tokenizer, variables = tiny()

    def loss(params: dict) -> jax.Array:
        reconstruction, quantized = tokenizer.apply({"params": params}, IMAGES)
        return jnp.mean(jnp.square(reconstruction - IMAGES)) + quantized.commitment_loss + quantized.codebook_loss

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.all(jnp.isfinite(gradient)), jax.tree_util.keystr(path)
        assert jnp.any(gradient != 0), jax.tree_util.keystr(path)


def test_bfloat16_keeps_parameters_latents_and_images_in_float32() -> None:
    tokenizer, variables = tiny(dtype="bfloat16")
    exact, _ = tiny()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    latents, want = (
        jax.jit(lambda x, t=t: t.apply(variables, x, method=t.latents))(IMAGES) for t in (tokenizer, exact)
    )
    assert latents.dtype == jnp.float32
    np.testing.assert_allclose(latents, want, atol=0.1)
    reconstruction, quantized = jax.eval_shape(tokenizer.apply, variables, IMAGES)
    assert reconstruction.dtype == quantized.vectors.dtype == jnp.float32


def test_group_norm_is_group_norm() -> None:
    x = 3.0 + jax.random.normal(jax.random.key(0), (2, 5, 4, 64))
    scale, bias = jnp.linspace(0.5, 2.0, 64), jnp.linspace(-1.0, 1.0, 64)
    variables = {"params": {"scale": scale, "bias": bias}}
    want = nn.GroupNorm(32, epsilon=1e-6, use_fast_variance=False).apply(variables, x)
    np.testing.assert_allclose(GroupNorm().apply(variables, x), want, atol=1e-5)


def test_group_norm_takes_channels_that_32_does_not_divide() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 24))
    variables = GroupNorm().init(jax.random.key(0), x)
    want = nn.GroupNorm(8, epsilon=1e-6).apply(variables, x)
    np.testing.assert_allclose(GroupNorm().apply(variables, x), want, atol=1e-5)


def test_image_size_must_be_halvable_by_every_level() -> None:
    with pytest.raises(RearError, match=r"image_size 30 is not a multiple of 4"):
        MaskGitVQGAN(30, 8, (1, 2, 2), 1, 6, 12)


def test_build_names_what_is_wrong_with_a_config() -> None:
    config = tiny_config()
    config.name = "maskgit"
    with pytest.raises(RearError, match=r"config\.tokenizer\.name = 'maskgit': use one of .*maskgit_vqgan"):
        tokenizers.build(config, 8)
    config = tiny_config()
    config.hiden_channels = 8
    del config.hidden_channels
    with pytest.raises(RearError, match="mend hidden_channels, hiden_channels"):
        tokenizers.build(config, 8)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    foreign = {"lm_head.weight": np.zeros((2, 2), np.float32)}
    with pytest.raises(KeyError, match=r"encoder\.conv_in\.weight"):
        sizes(foreign)
    path, config = tmp_path / "x.safetensors", toy.config(tokenizer=tiny_config())
    save_file(foreign, path)
    with pytest.raises(RearError, match=r"x\.safetensors is no checkpoint .*maskgit_vqgan.* first keys are lm_head"):
        published.read_params(path, config, FAMILY, {})
    save_file(foreign | {"encoder.down.0.block.0.conv1.weight": np.zeros((8, 8, 3, 3), np.float32)}, path)
    with pytest.raises(
        RearError, match=r"x\.safetensors .*encoder\.conv_in\.weight.* not a whole maskgit_vqgan .*Give"
    ):
        published.read_params(path, config, FAMILY, {})


@pytest.mark.parametrize(("num_layers", "side"), [(2, 6), (3, 2)])
def test_discriminator_judges_patches_of_small_images(num_layers: int, side: int) -> None:
    images = jax.ShapeDtypeStruct((3, 32, 32, 3), jnp.float32)
    discriminator = PatchDiscriminator(base_channels=8, num_layers=num_layers, dtype=jnp.bfloat16)
    logits, _ = jax.eval_shape(discriminator.init_with_output, jax.random.key(1), images)
    assert logits.shape == (3, side, side, 1)
    assert logits.dtype == jnp.float32


def test_discriminator_judges_each_image_by_itself() -> None:
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    run = jax.jit(PatchDiscriminator(base_channels=8, num_layers=1).init_with_output)
    logits, _ = run(jax.random.key(1), images)
    changed, _ = run(jax.random.key(1), images.at[0].set(0.5))
    assert not jnp.allclose(logits[0], changed[0], atol=1e-4)
    np.testing.assert_allclose(logits[1], changed[1], atol=1e-6)


def test_discriminator_has_the_size_of_the_vqgan_papers() -> None:
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    params = jax.eval_shape(PatchDiscriminator().init, jax.random.key(0), images)
    logits = jax.eval_shape(PatchDiscriminator().apply, params, images)
    convolutions = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 1
    assert number_of_parameters(params) == convolutions + 2 * (128 + 256 + 512)
    assert logits.shape == (1, 30, 30, 1)


def test_discriminator_refuses_images_too_small_for_its_layers() -> None:
    with pytest.raises(RearError, match="num_layers 3 wants images of 24 pixels or more, these have 16"):
        PatchDiscriminator().init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
