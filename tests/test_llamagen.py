"""LlamaGen's transformer: cached decoding, causality, captions, dropout, sizes, and what `generators.build` refuses."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rear_jax import config as configs
from rear_jax import generators, guidance
from rear_jax.artifacts import published
from rear_jax.errors import RearError
from rear_jax.generators.dropout import Dropout
from rear_jax.generators.heads import Rotation, rotate
from rear_jax.generators.interface import Captions
from rear_jax.generators.llamagen import FAMILY
from rear_jax.generators.llamagen.network import LlamaGenTransformer, rotation_table
from rear_jax.sampling.generate import Sampler, generate
from rear_jax.training.objectives import build_generator
from rear_jax.weights import layout
from tests import toy

SIZES = {"codebook_size": 12, "num_classes": 5, "num_codes": 9, "width": 16, "depth": 2, "heads": 2, "mlp_width": 32}
STILL = {"dropout": 0.0, "token_dropout": 0.0}
CLASS = LlamaGenTransformer(**SIZES, **STILL)
TEXT = LlamaGenTransformer(**SIZES, **STILL, condition="text", caption_length=4, caption_dim=6)
KEYS = jax.random.split(jax.random.key(7), 4)
MASK = jnp.arange(4) >= jnp.array([2, 0, 3])[:, None]  # captions of 2, 4 and 1 features
CONDITIONS = {
    "class": jnp.array([0, 1, 3]),
    "text": Captions(jax.random.normal(jax.random.key(2), (3, 4, 6)), MASK),
}
ROWS = jnp.array([0, 2, 2, 1])
sample = jax.jit(generate, static_argnums=(0, 5), static_argnames=("segments", "return_logits"))


def random_params(model):
    """Nothing at zero or one, so that every parameter counts."""
    leaves, tree = jax.tree.flatten(generators.shapes(model))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    values = [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, values)


PARAMS = {model.condition: random_params(model) for model in (CLASS, TEXT)}


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, codes, conditions, key=None):
    """The full forward pass; with a key, as in training."""
    dropout = None if key is None else Dropout.of(key, jnp.arange(len(codes)))
    return model.apply({"params": params}, codes, conditions, dropout=dropout).logits


def class_logits(codes, labels):
    return logits_of(CLASS, PARAMS["class"], codes, labels)


def text_logits(codes, captions):
    return logits_of(TEXT, PARAMS["text"], codes, captions)


LOGITS = {"class": class_logits, "text": text_logits}


def unconditional(condition):
    """What stands in for the four sequences' conditions in the second half of a guided batch."""
    if condition == "class":
        return jnp.full(4, 5)
    null = jnp.broadcast_to(PARAMS["text"]["null_caption"], (4, 4, 6))
    return Captions(null, MASK[ROWS])


@pytest.mark.parametrize(("scale", "interval", "segments"), [(0.5, -1, 1), (3.0, -1, 1), (3.0, 0, 2), (3.0, 4, 4)])
@pytest.mark.parametrize("model", [CLASS, TEXT], ids=lambda m: m.condition)
def test_cached_decoding_is_the_full_forward(model, scale, interval, segments):
    sampler = Sampler("constant", scale, guidance_interval=interval)
    conditions, full = CONDITIONS[model.condition], LOGITS[model.condition]
    params = PARAMS[model.condition]
    codes, logits = sample(
        generators.cached(model), params, conditions, ROWS, KEYS, sampler, segments=segments, return_logits=True
    )
    c = full(codes, jax.tree.map(lambda leaf: leaf[ROWS], conditions))
    u = full(codes, unconditional(model.condition))
    for n in range(9):
        guided = scale > 1 and (n == 0 or interval < 0 or n - 1 <= interval)
        want = u[:, n] + scale * (c[:, n] - u[:, n]) if guided else c[:, n]
        np.testing.assert_allclose(logits[:, n], want, atol=1e-4)
        keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, n)
        np.testing.assert_array_equal(codes[:, n], guidance.draw(keys, logits[:, n]))


@pytest.mark.slow
@pytest.mark.parametrize("model", [CLASS, TEXT], ids=lambda m: m.condition)
def test_a_sequence_does_not_depend_on_its_batch(model):
    sampler = Sampler("constant", 2.0, top_k=5)
    conditions, params = CONDITIONS[model.condition], PARAMS[model.condition]
    together = sample(generators.cached(model), params, conditions, ROWS, KEYS, sampler)
    for i in range(4):
        own = jax.tree.map(lambda leaf, i=i: leaf[ROWS[i]][None], conditions)
        alone = sample(generators.cached(model), params, own, jnp.array([0]), KEYS[i : i + 1], sampler)
        np.testing.assert_array_equal(alone[0], together[i])


@pytest.mark.slow
@pytest.mark.parametrize("model", [CLASS, TEXT], ids=lambda m: m.condition)
def test_bfloat16_decoding_is_near_the_full_forward(model):
    half = dataclasses.replace(model, dtype=jnp.bfloat16)
    conditions, params = CONDITIONS[model.condition], PARAMS[model.condition]
    sampler = Sampler("constant", 1.0)
    codes, logits = sample(generators.cached(half), params, conditions, ROWS, KEYS, sampler, return_logits=True)
    assert logits.dtype == jnp.float32
    of_rows = jax.tree.map(lambda leaf: leaf[ROWS], conditions)
    np.testing.assert_allclose(logits, LOGITS[model.condition](codes, of_rows), atol=0.15)


@pytest.mark.parametrize("condition", ["class", "text"])
def test_causality(condition):
    codes = jax.random.randint(jax.random.key(0), (3, 9), 0, 12)
    before = LOGITS[condition](codes, CONDITIONS[condition])
    after = LOGITS[condition](codes.at[:, 4].set((codes[:, 4] + 1) % 12), CONDITIONS[condition])
    np.testing.assert_array_equal(before[:, :5], after[:, :5])  # code 4 is first read by the prediction of code 5
    assert (jnp.abs(before - after)[:, 5:].max(axis=-1) > 1e-4).all()
    last = LOGITS[condition](codes.at[:, 8].set((codes[:, 8] + 1) % 12), CONDITIONS[condition])
    np.testing.assert_array_equal(before, last)  # nothing reads the last code


@pytest.mark.parametrize("condition", ["class", "text"])
def test_every_prediction_depends_on_the_condition(condition):
    codes = jnp.zeros((3, 9), jnp.int32)
    logits = LOGITS[condition](codes, CONDITIONS[condition])
    for a, b in [(0, 1), (1, 2), (0, 2)]:
        assert (jnp.abs(logits[a] - logits[b]).max(axis=-1) > 1e-4).all()


def test_the_null_label_is_the_last_row_and_no_class():
    codes = jnp.zeros((1, 9), jnp.int32)
    null = class_logits(codes, jnp.array([5]))
    moved = PARAMS["class"] | {"class_embeddings": PARAMS["class"]["class_embeddings"].at[5].add(1.0)}
    assert (jnp.abs(logits_of(CLASS, moved, codes, jnp.array([5])) - null) > 0).any()
    np.testing.assert_allclose(
        logits_of(CLASS, moved, codes, jnp.array([4])), class_logits(codes, jnp.array([4])), atol=1e-5
    )


@pytest.mark.slow
def test_features_on_padding_do_not_matter():
    captions = CONDITIONS["text"]
    changed = captions._replace(features=jnp.where(MASK[:, :, None], captions.features, 100.0))
    codes = jax.random.randint(jax.random.key(3), (3, 9), 0, 12)
    np.testing.assert_array_equal(text_logits(codes, captions), text_logits(codes, changed))
    assert (
        jnp.abs(text_logits(codes, captions) - text_logits(codes, Captions(captions.features, MASK | True))) > 0
    ).any()
    cached, sampler = generators.cached(TEXT), Sampler("constant", 3.0)
    drawn = [sample(cached, PARAMS["text"], c, ROWS, KEYS, sampler, return_logits=True) for c in (captions, changed)]
    np.testing.assert_array_equal(drawn[0][0], drawn[1][0])
    np.testing.assert_array_equal(drawn[0][1], drawn[1][1])


def test_more_padding_changes_nothing():
    """Condition positions carry no rotation, so a caption may stand anywhere in a longer frame."""
    longer = dataclasses.replace(TEXT, caption_length=7)
    features, mask = CONDITIONS["text"]
    padded = Captions(jnp.pad(features, ((0, 0), (3, 0), (0, 0))), jnp.pad(mask, ((0, 0), (3, 0))))
    params = PARAMS["text"] | {"null_caption": jnp.zeros((7, 6))}
    codes = jax.random.randint(jax.random.key(3), (3, 9), 0, 12)
    np.testing.assert_allclose(
        logits_of(longer, params, codes, padded),
        text_logits(codes, CONDITIONS["text"]),
        atol=1e-5,
    )


def test_rotation_known_values():
    cos, sin = rotation_table(num_codes=4, head_size=8, prefix_length=2)
    assert cos.shape == sin.shape == (6, 4)
    np.testing.assert_array_equal(cos[:2], 0)  # the prefix: not even cos is one
    np.testing.assert_array_equal(sin[:2], 0)
    np.testing.assert_array_equal(cos[2], 1)  # row 0, column 0
    angles = np.array([[0, 0, 1, 0.01], [1, 0.01, 0, 0], [1, 0.01, 1, 0.01]])  # codes 1, 2, 3
    np.testing.assert_allclose(cos[3:], np.cos(angles), rtol=1e-6)
    np.testing.assert_allclose(sin[3:], np.sin(angles), rtol=1e-6)
    quarter = Rotation(jnp.zeros((1, 2)), jnp.ones((1, 2)))
    turned = rotate(jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4), quarter)
    np.testing.assert_array_equal(turned.ravel(), [-2.0, 1.0, -4.0, 3.0])  # pairs (0, 1) and (2, 3)


def test_attention_scores_depend_on_the_difference_of_positions():
    table = rotation_table(num_codes=16, head_size=8, prefix_length=0)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i, j):
        at = [Rotation(table.cos[n][None], table.sin[n][None]) for n in (i, j)]
        return float(jnp.sum(rotate(q, at[0]) * rotate(k, at[1])))

    assert score(5, 0) == pytest.approx(score(15, 10), abs=1e-5)  # one down, one to the right
    assert abs(score(5, 0) - score(4, 0)) > 1e-3


@pytest.mark.slow
def test_dropout_acts_in_training_only():
    model = dataclasses.replace(CLASS, dropout=0.3, token_dropout=0.2)
    inputs = PARAMS["class"], jnp.zeros((2, 9), jnp.int32), jnp.array([0, 1])
    still = logits_of(model, *inputs)
    np.testing.assert_array_equal(still, logits_of(CLASS, *inputs))
    one, other = (logits_of(model, *inputs, jax.random.key(i)) for i in (0, 1))
    assert (one != other).any()
    assert (one != still).any()
    for name in ("dropout", "token_dropout"):
        alone = dataclasses.replace(CLASS, **{name: 0.3})
        assert (logits_of(alone, *inputs, jax.random.key(0)) != still).any(), name


@pytest.mark.parametrize("model", [CLASS, TEXT], ids=lambda m: m.condition)
def test_converter_round_trip_and_what_files_carry_beside(model):
    params = jax.tree.map(np.asarray, PARAMS[model.condition])
    tensors = layout.to_torch(params, FAMILY.layout.torch_name) | {"freqs_cis": np.zeros(3), "causal_mask": np.zeros(3)}
    assert all(value.shape[-1] for value in tensors.values())
    back = layout.from_torch(tensors, generators.shapes(model), FAMILY.layout.torch_name, ignore=FAMILY.layout.ignore)
    chex.assert_trees_all_equal(back, params)
    sizes = {"width": 16, "depth": 2, "mlp_width": 32, "condition": model.condition}
    if model.condition == "text":
        sizes |= {"caption_length": 4, "caption_dim": 6}
    assert FAMILY.layout.sizes(tensors) == sizes  # no heads: 16 is the width of no published model


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1280, 20), (3200, 32)])
def test_heads_follow_from_published_widths(width, heads):
    tensors = {
        "tok_embeddings.weight": np.zeros((1, width)),
        "layers.0.feed_forward.w1.weight": np.zeros((1, 1)),
        "cls_embedding.embedding_table.weight": np.zeros((1, 1)),
    }
    assert FAMILY.layout.sizes(tensors)["heads"] == heads


def test_a_file_without_its_embeddings(tmp_path):
    save_file({"cls_embedding.uncond_embedding": np.zeros((1, 1), np.float32)}, tmp_path / "other.safetensors")
    config = toy.llamagen_config()
    with pytest.raises(RearError, match=r"other.safetensors has no tensor 'tok_embeddings.weight': .* whole llamagen"):
        published.read_params(tmp_path / "other.safetensors", config, FAMILY, generators.shapes(TEXT))


def test_build_and_cached():
    model = toy.generator(toy.llamagen_config(token_dropout=0.25))
    assert model == LlamaGenTransformer(
        codebook_size=16, num_classes=10, num_codes=16, width=16, depth=2, heads=2, mlp_width=32, dropout=0.1,
        token_dropout=0.25, dtype=jnp.dtype("float32"),
    )  # fmt: skip
    assert generators.cached(model).prefix_length == 1
    assert generators.cached(TEXT).prefix_length == 4
    assert generators.cached(toy.generator(toy.config())).prefix_length == 2


@pytest.mark.parametrize(
    ("changes", "num_codes", "message"),
    [
        ({}, 15, "square grid of codes, not 15"),
        ({"heads": 8}, 16, "divisible by 4"),
        ({"heads": 3}, 16, "not divisible by config.model.heads = 3"),
        ({"condition": "image"}, 16, "'image': use one of class, text"),
        ({"widht": 16}, 16, "mend widht"),
        ({"name": "llama"}, 16, "use one of alitok, janus, llamagen, rar"),
        ({"name": "rar"}, 16, "mend caption_dim, caption_length, condition, token_dropout"),
    ],
)
def test_build_refuses(changes, num_codes, message):
    with pytest.raises(RearError, match=message):
        build_generator(toy.llamagen_config(**changes), toy.only_sizes(num_codes, grid=(4, num_codes // 4)))


def test_build_names_missing_keys():
    config = toy.llamagen_config()
    del config.model["token_dropout"]
    with pytest.raises(RearError, match=r"takes exactly the keys attention, caption_dim, .*: mend token_dropout"):
        toy.generator(config)


@pytest.mark.parametrize("section", [configs.titok, configs.alitok])
def test_codes_without_a_grid_are_refused_even_if_they_are_a_square_number(section):
    config = toy.llamagen_config()
    config.tokenizer, config.data.image_size = section(), 128
    assert toy.tokenizer(config).codes_per_image in (64, 81)
    with pytest.raises(RearError, match=rf"needs a grid of codes, which .* = '{config.tokenizer.name}' has not"):
        toy.generator(config)


@pytest.mark.parametrize(
    ("method", "needed"), [("rear", r"projections of hidden states \(taps\)"), ("rar", "codes in random orders")]
)
def test_methods_that_need_a_rar_transformer_are_refused(method, needed):
    config = toy.llamagen_config()
    config.method.name = method
    message = f"'{method}' needs {needed}, which .* = 'llamagen' has not: use another method, or another model"
    with pytest.raises(RearError, match=message):
        toy.generator(config)


def test_a_grid_that_is_not_square_is_refused_by_the_network_too():
    with pytest.raises(RearError, match="square"):
        generators.shapes(dataclasses.replace(CLASS, num_codes=10))
