"""AliTok's transformer: cached decoding, rotations, taps, random orders, sizes, files, and what `generators.build`
refuses.

That its numbers are the authors' is in golden_checks/alitok_generator.py.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rear_jax import config as configs
from rear_jax import generators, guidance, orders
from rear_jax.artifacts import published
from rear_jax.errors import RearError
from rear_jax.generators.alitok import FAMILY
from rear_jax.generators.alitok.network import AliTokTransformer, rotation_table
from rear_jax.generators.dropout import Dropout
from rear_jax.generators.layers import PROJECTOR_KEYS
from rear_jax.runtime.sharding import decay_mask
from rear_jax.sampling.generate import Sampler, generate
from rear_jax.training import objectives
from rear_jax.training.objectives import build_generator
from rear_jax.training.state import adamw
from rear_jax.weights import layout, safetensors_file
from tests import toy

SIZES = {"codebook_size": 12, "num_classes": 5, "num_codes": 7, "prefix_tokens": 3}
STILL = {"dropout": 0.0, "token_dropout": 0.0}
PLAIN = AliTokTransformer(**SIZES, **STILL, width=16, depth=2, heads=2, mlp_width=32)
TOLD = dataclasses.replace(PLAIN, target_positions=True)
TAPPED = dataclasses.replace(PLAIN, projector="released", projector_width=8, embedding_dim=4, deep_layer=1)
KEYS = jax.random.split(jax.random.key(7), 4)
sample = jax.jit(generate, static_argnums=(0, 5), static_argnames=("segments", "return_logits"))


@functools.cache
def params_of(model):
    """Random values, none at zero or one, so that every parameter counts."""
    shapes = generators.shapes(model)
    leaves, tree = jax.tree.flatten(shapes)
    draw = np.random.default_rng(0).normal
    return jax.tree.unflatten(tree, [jnp.asarray(draw(scale=0.3, size=leaf.shape), jnp.float32) for leaf in leaves])


@functools.partial(jax.jit, static_argnums=0)
def features_of(model, params, codes, labels, orders=None, key=None):
    """The full forward pass; with a key, as in training."""
    dropout = None if key is None else Dropout.of(key, jnp.arange(len(codes)))
    return model.apply({"params": params}, codes, labels, orders, dropout=dropout)


def random_codes(batch=4):
    return jax.random.randint(jax.random.key(0), (batch, 7), 0, 12)


@pytest.mark.parametrize(("model", "segments"), [(PLAIN, 1), (TOLD, 3)], ids=["plain", "told"])
def test_cached_decoding_is_the_full_forward(model, segments):
    params, rows, classes = params_of(model), jnp.array([0, 2, 2, 1]), jnp.array([0, 1, 3])
    sampler = Sampler(guidance_scale=3.0, guidance_power=1.8)
    cached = generators.cached(model)
    codes, logits = sample(cached, params, classes, rows, KEYS, sampler, segments=segments, return_logits=True)
    conditional = features_of(model, params, codes, classes[rows]).logits
    unconditional = features_of(model, params, codes, jnp.full(4, 5)).logits
    for n in range(7):
        weight = guidance.guidance_weight("power_cosine", 3.0, n, 7, power=1.8)
        want = guidance.guide(conditional[:, n], unconditional[:, n], weight)
        np.testing.assert_allclose(logits[:, n], want, atol=1e-4)
        keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, n)
        np.testing.assert_array_equal(codes[:, n], guidance.draw(keys, logits[:, n]))


@pytest.mark.parametrize(("scale", "guided"), [(0.0, False), (1.0, False), (0.7, True), (16.0, True)])
def test_guides(scale, guided):
    assert generators.cached(PLAIN).guides(scale) == guided


def test_causality():
    codes, labels = random_codes(), jnp.array([0, 1, 2, 5])
    before = features_of(PLAIN, params_of(PLAIN), codes, labels).logits
    for n in (1, 4):  # of the prefix and of the grid
        after = features_of(PLAIN, params_of(PLAIN), codes.at[:, n].set((codes[:, n] + 1) % 12), labels).logits
        np.testing.assert_array_equal(before[:, : n + 1], after[:, : n + 1])
        assert (jnp.abs(before - after)[:, n + 1 :].max(axis=-1) > 1e-4).all()


def test_rotation_known_values():
    cos, sin = rotation_table(num_codes=7, head_size=8, prefix_tokens=3)
    assert cos.shape == sin.shape == (8, 4)
    np.testing.assert_array_equal(cos[0], 0)  # the class: not even cos is one
    np.testing.assert_array_equal(sin[0], 0)
    line = [np.outer([0, 1, 2], [1, 0.1, 0.01, 0.001])]  # base 10 000 ** -(0, 2, 4, 6)/8
    grid = [[[3, 0.03, 3, 0.03], [3, 0.03, 4, 0.04], [4, 0.04, 3, 0.03], [4, 0.04, 4, 0.04]]]
    angles = np.concatenate(line + grid)
    np.testing.assert_allclose(cos[1:], np.cos(angles), rtol=1e-5)
    np.testing.assert_allclose(sin[1:], np.sin(angles), rtol=1e-5)


@pytest.mark.slow
def test_taps_change_no_prediction_and_see_what_they_should():
    """The shallow tap of place n has read code n, the last one too; the deep tap has read the codes before n alone."""
    codes, labels, params = random_codes(), jnp.array([0, 1, 2, 5]), params_of(TAPPED)
    bare = {name: tree for name, tree in params.items() if name not in PROJECTOR_KEYS}
    out = features_of(TAPPED, params, codes, labels)
    assert out.shallow.shape == out.deep.shape == (4, 7, 4)
    np.testing.assert_allclose(out.logits, features_of(PLAIN, bare, codes, labels).logits, atol=1e-5)
    for n in (2, 6):
        after = features_of(TAPPED, params, codes.at[:, n].set((codes[:, n] + 1) % 12), labels)
        np.testing.assert_array_equal(out.shallow[:, :n], after.shallow[:, :n])
        assert (jnp.abs(out.shallow - after.shallow)[:, n].max(axis=-1) > 1e-4).all()
        np.testing.assert_array_equal(out.deep[:, : n + 1], after.deep[:, : n + 1])
        assert (jnp.abs(out.deep - after.deep)[:, n + 1 :].max(axis=-1) > 1e-4).all()


def test_taps_are_of_their_layers():
    """Changing what comes after a tapped block leaves its projection alone."""
    codes, labels, params = random_codes(), jnp.array([0, 1, 2, 5]), params_of(TAPPED)
    last = jax.tree.map(lambda p: p.at[1].add(0.1), params["blocks"])
    before, after = (features_of(TAPPED, p, codes, labels) for p in (params, params | {"blocks": last}))
    np.testing.assert_array_equal(before.shallow, after.shallow)  # layer 0
    assert (before.deep != after.deep).any()  # layer 1


def test_the_tokenizers_order_is_an_order():
    codes, labels, params = random_codes(), jnp.array([0, 1, 2, 5]), params_of(TOLD)
    raster = jnp.broadcast_to(jnp.arange(7), (4, 7))
    np.testing.assert_allclose(
        features_of(TOLD, params, codes, labels, raster).logits,
        features_of(TOLD, params, codes, labels).logits,
        atol=1e-5,
    )


@pytest.mark.slow
def test_the_last_code_of_an_order_sees_a_set():
    """With one block, what predicts the last code depends on which codes lie where, not on the order of reading them.

    The code just read is the query; all before it are keys, each turned by where it lies and told what it predicts. So
    the target positions are taken out for this.
    """
    model = dataclasses.replace(TOLD, depth=1)
    params = params_of(model) | {"target_aware_pos_embed": jnp.zeros((7, 16))}
    raster, labels = random_codes(1), jnp.array([2])
    one, other = jnp.array([[3, 0, 5, 1, 6, 4, 2]]), jnp.array([[1, 6, 0, 5, 3, 4, 2]])
    first, second = (
        features_of(model, params, orders.reorder(raster, o), labels, o).logits[:, -1] for o in (one, other)
    )
    np.testing.assert_allclose(first, second, atol=1e-5)
    moved = jnp.array([[1, 6, 0, 4, 3, 5, 2]])  # another code just read
    third = features_of(model, params, orders.reorder(raster, moved), labels, moved).logits[:, -1]
    assert (jnp.abs(third - first) > 1e-4).any()


def test_predictions_are_told_their_target_alone():
    """The embedding of position 4 acts where that code is predicted, and on what comes after."""
    order, labels, params = jnp.array([[3, 0, 5, 4, 6, 1, 2]]), jnp.array([2]), params_of(TOLD)
    moved = params | {"target_aware_pos_embed": params["target_aware_pos_embed"].at[4].add(1.0)}
    before, after = (features_of(TOLD, p, random_codes(1), labels, order).logits for p in (params, moved))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (jnp.abs(before - after)[:, 3].max(axis=-1) > 1e-4).all()


def test_orders_without_target_positions_are_refused():
    with pytest.raises(ValueError, match="target_positions"):
        features_of(PLAIN, params_of(PLAIN), random_codes(), jnp.zeros(4, jnp.int32), random_codes())


@pytest.mark.parametrize("name", ["dropout", "token_dropout"])
def test_dropout_acts_in_training_only(name):
    inputs = params_of(PLAIN), random_codes(), jnp.array([0, 1, 2, 5])
    model, still = dataclasses.replace(PLAIN, **{name: 0.3}), features_of(PLAIN, *inputs).logits
    np.testing.assert_array_equal(features_of(model, *inputs).logits, still)
    one, other = (features_of(model, *inputs, key=jax.random.key(i)).logits for i in (0, 1))
    assert (jnp.abs(one - still) > 1e-3).any()
    assert (jnp.abs(one - other) > 1e-3).any()


@pytest.mark.parametrize(
    ("width", "depth", "mlp_width", "millions"),
    [(768, 24, 2048, 177.0), (1024, 24, 2816, 317.9), (1280, 32, 3584, 662.1)],
    ids=["B", "L", "XL"],
)
def test_published_sizes(width, depth, mlp_width, millions):
    config = toy.config()
    config.unlock()
    config.model, config.method.name = configs.alitok_generator(), "ar"
    config.model.update(width=width, depth=depth, mlp_width=mlp_width)
    config.tokenizer, config.data.image_size, config.data.num_classes = configs.alitok(), 256, 1000
    shapes = generators.shapes(toy.generator(config))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=0.1)
    assert shapes["embeddings"].shape[0] - 1 == 5097  # the null label
    assert FAMILY.published_size(config.model)[1] == millions


def toy_config(method="ar", **model):
    """The toy experiment with an AliTok generator over 7 prefix tokens and 3 x 3 codes."""
    config = toy.config(method__name=method)
    config.unlock()
    config.model = configs.alitok_generator()
    sizes = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "prefix_tokens": 7, "dtype": "float32"}
    config.model.update(sizes | {"target_positions": method == "rar"} | model)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "parameters"), [("ar", set()), ("rar", {"target_aware_pos_embed"}), ("rear", set(PROJECTOR_KEYS))]
)
def test_one_step_of_every_method(method, parameters):
    """Every parameter that the method has is moved, and those that only it has are there."""
    config = toy_config(method, dropout=0.0, token_dropout=0.0)
    config.train.optimizer.update(warmup_steps=0, weight_decay=0.0)
    model = toy.generator(config)
    optimizer = adamw(config.train.optimizer, config.train.loop.steps, FAMILY.parameters)
    state = jax.jit(lambda: objectives.init_state(model, config, optimizer, {}))()
    assert set(state.params) == {"embeddings", "blocks", "norm", "lm_head"} | parameters
    batch = {"codes": jax.random.randint(jax.random.key(2), (4, 16), 0, 16), "label": jnp.arange(4)}
    frozen = {"codebook": jax.random.normal(jax.random.key(4), (16, 4))}
    step = jax.jit(objectives.train_step(model, config, optimizer))
    new, metrics = step(state, batch, jax.random.key(3), frozen)
    assert np.isfinite(metrics["loss"])
    assert metrics["cross_entropy"] == pytest.approx(np.log(16), abs=0.2)  # nothing learned yet
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, new.params)
    assert all(jax.tree.leaves(moved)), moved


def test_weight_decay_is_on_matrices_alone():
    names = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params_of(TOLD))
    assert decay_mask(params_of(TOLD), FAMILY.parameters) == names


@pytest.mark.parametrize("model", [PLAIN, TOLD, TAPPED], ids=["plain", "told", "tapped"])
def test_files_out_and_in_again(model, tmp_path):
    params, path = params_of(model), tmp_path / "generator.safetensors"
    safetensors_file.save(path, params, FAMILY.layout.torch_name)
    tensors = layout.to_torch(params, FAMILY.layout.torch_name)
    found = published.detect(tensors, "file")
    assert found is FAMILY
    sizes = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "target_positions": model.target_positions}
    assert FAMILY.layout.sizes(tensors) == sizes
    config = toy_config()
    config.model.update(target_positions=model.target_positions, prefix_tokens=3)
    config.data.num_classes, config.tokenizer.codebook_size = 5, 12
    back = published.read_params(path, config, FAMILY, generators.shapes(model))
    chex.assert_trees_all_equal(back, params)


def test_a_published_file_serves_rear(tmp_path):
    """Projectors start afresh where the file has none, and are left out where the method has none."""
    config = toy_config()
    config.data.num_classes, config.tokenizer.codebook_size = 5, 12
    safetensors_file.save(tmp_path / "plain.safetensors", params_of(PLAIN), FAMILY.layout.torch_name)
    safetensors_file.save(tmp_path / "tapped.safetensors", params_of(TAPPED), FAMILY.layout.torch_name)
    for file, model in (("plain", TAPPED), ("tapped", PLAIN)):
        shapes = generators.shapes(model)
        read = published.read_params(tmp_path / f"{file}.safetensors", config, FAMILY, shapes)
        assert set(read) == {"embeddings", "blocks", "norm", "lm_head"}


def test_a_file_without_target_positions_is_refused_by_rar(tmp_path):
    config = toy_config("rar")
    safetensors_file.save(tmp_path / "plain.safetensors", params_of(PLAIN), FAMILY.layout.torch_name)
    with pytest.raises(RearError, match=r"target_positions False \(config: True\)"):
        published.read_params(tmp_path / "plain.safetensors", config, FAMILY, generators.shapes(TOLD))


def test_a_file_without_its_embeddings(tmp_path):
    save_file({"blocks.0.mlp.w3.weight": np.zeros((1, 1), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(RearError, match=r"other.safetensors has no tensor 'embeddings.weight': .* a whole alitok"):
        published.read_params(tmp_path / "other.safetensors", toy_config(), FAMILY, generators.shapes(PLAIN))


@pytest.mark.parametrize(
    ("changes", "num_codes", "message"),
    [
        ({}, 15, r"config.model.prefix_tokens = 7 leaves 8 of the tokenizer's 15 codes, .* or to 15 where"),
        ({}, 6, r"config.model.prefix_tokens = 7 leaves -1 of the tokenizer's 6 codes"),
        ({"heads": 8}, 16, "divisible by 4"),
        ({"widht": 16}, 16, "mend widht"),
        ({"method": "rar", "target_positions": False}, 16, "set config.model.target_positions"),
    ],
)
def test_build_refuses(changes, num_codes, message):
    with pytest.raises(RearError, match=message):
        build_generator(toy_config(**changes), toy.only_sizes(num_codes, grid=(1, num_codes)))


@pytest.mark.slow
def test_codes_without_a_grid_are_all_prefix():
    model = build_generator(toy_config(prefix_tokens=15), toy.only_sizes(15, grid=(1, 15)))
    assert model.rotations.cos.shape == (16, 4)
    logits = model.apply({"params": params_of(model)}, jnp.zeros((1, 15), int), jnp.zeros(1, int)).logits
    assert logits.shape == (1, 15, 16)
    assert np.isfinite(logits).all()


def test_build_refuses_the_prefix_of_another_tokenizer():
    config, tokenizer = toy_config(), toy.tokenizer(toy_config())
    config.tokenizer.prefix_tokens = 12
    with pytest.raises(RearError, match=r"config.model.prefix_tokens = 7, but config.tokenizer.prefix_tokens = 12"):
        build_generator(config, tokenizer)
    config.model.prefix_tokens = 12
    assert build_generator(config, tokenizer).prefix_tokens == 12
