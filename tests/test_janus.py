"""Janus-Pro's generator: sizes, prompts and their padding, cached decoding, files, and what it refuses."""

import dataclasses
import functools
import pathlib

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
from rear_jax.generators import heads
from rear_jax.generators.dropout import Dropout
from rear_jax.generators.interface import Tokens
from rear_jax.generators.janus import FAMILY
from rear_jax.generators.janus.files import published_names
from rear_jax.generators.janus.network import JanusTransformer, rotation_table
from rear_jax.generators.rotary import Block
from rear_jax.sampling.generate import Sampler, generate
from rear_jax.weights import layout
from tests import toy

START, PAD, BEGIN = 1, 3, 5
LANGUAGE = {"vocabulary_size": 40, "width": 16, "depth": 2, "heads": 2, "mlp_width": 32}
MODEL = JanusTransformer(codebook_size=12, num_classes=0, num_codes=9, **LANGUAGE, prompt_length=8, pad_id=PAD)
FULL = {"codebook_size": 16384, "num_classes": 0, "num_codes": 576}
KEYS = jax.random.split(jax.random.key(7), 4)
TEXTS = [[START, 20, 38, 15, 37, BEGIN], [START, BEGIN], [START, 6, 38, BEGIN]]
ROWS = jnp.array([0, 2, 2, 1])
CODES = jax.random.randint(jax.random.key(3), (3, 9), 0, 12)
sample = jax.jit(generate, static_argnums=(0, 5), static_argnames=("segments", "return_logits"))


def prompts(*texts, length=6) -> Tokens:
    """Texts in a frame of so many positions."""
    ids = np.array([[39] * (length - len(text)) + text for text in texts], np.int32)
    mask = np.array([[False] * (length - len(text)) + [True] * len(text) for text in texts])
    return Tokens(jnp.asarray(ids), jnp.asarray(mask))


def janus_config(**model):
    """The published network, or one with changes."""
    config = toy.config(method__name="ar")
    config.unlock()
    config.model = configs.janus()
    config.model.update(**model)
    return config


def random_params(model):
    """Nothing at zero or one, so that every parameter counts."""
    leaves, tree = jax.tree.flatten(generators.shapes(model))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    values = [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, values)


PARAMS = random_params(MODEL)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, codes, conditions, key=None):
    """The full forward pass; with a key, as in training."""
    dropout = None if key is None else Dropout.of(key, jnp.arange(len(codes)))
    return model.apply({"params": params}, codes, conditions, dropout=dropout).logits


def logits(codes, conditions):
    return logits_of(MODEL, PARAMS, codes, conditions)


@pytest.mark.parametrize(
    ("changes", "parts", "whole"),
    [
        ({}, {"language model": 1652.7 - 209.7, "code_embeddings": 0.13, "aligner": 4.21, "head": 37.8}, 1485.1),
        ({"width": 4096, "depth": 30, "heads": 32, "mlp_width": 11008}, {}, 6591.8),
    ],
    ids=["1B", "7B"],
)
def test_published_sizes(changes, parts, whole):
    """Millions of each part, as in the published files."""
    network = JanusTransformer(**FULL, **changes)
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in generators.shapes(network).items()
    }
    of_part = {
        "language model": sizes["token_embeddings"] + sizes["blocks"] + sizes["norm"],
        "code_embeddings": sizes["code_embeddings"],
        "aligner": sizes["aligner_fc1"] + sizes["aligner_fc2"],
        "head": sizes["head_fc1"] + sizes["head_fc2"],
    }
    assert sum(of_part.values()) == sum(sizes.values())
    assert {name: of_part[name] / 1e6 for name in parts} == pytest.approx(parts, rel=2e-3, abs=0.05)
    settings = {"width": network.width, "depth": network.depth}
    assert FAMILY.published_size(settings)[1] == whole == round(sum(sizes.values()) / 1e6, 1)


def test_the_section_is_that_of_the_published_network():
    section = configs.janus()
    shape = {name: section[name] for name in ("width", "depth", "heads", "mlp_width", "vocabulary_size", "code_dim")}
    assert list(shape.values()) == [2048, 24, 16, 5632, 102400, 8]
    assert (section.dropout, section.pad_id, section.prompt_length) == (0.0, 100002, 256)
    assert FAMILY.published_size(section)[0] == "Janus-Pro-1B"


def test_it_reads_tokens_and_takes_no_captions():
    assert generators.reads_tokens(MODEL)
    assert not generators.takes_captions(MODEL)
    llamagen = toy.generator(toy.llamagen_config(condition="text"))
    assert generators.takes_captions(llamagen)
    assert not generators.reads_tokens(llamagen)


def test_a_dropped_prompt_keeps_start_end_and_padding():
    nothing = FAMILY.unconditional(MODEL, PARAMS, prompts(*TEXTS))
    np.testing.assert_array_equal(
        nothing.ids,
        [[START, PAD, PAD, PAD, PAD, BEGIN], [39, 39, 39, 39, START, BEGIN], [39, 39, START, PAD, PAD, BEGIN]],
    )
    np.testing.assert_array_equal(nothing.mask, prompts(*TEXTS).mask)
    alone = prompts([BEGIN])
    np.testing.assert_array_equal(FAMILY.unconditional(MODEL, PARAMS, alone).ids, alone.ids)


def test_a_dropped_prompt_still_tells_its_length():
    """The pads in the place of words are seen."""
    one, other = (FAMILY.unconditional(MODEL, PARAMS, prompts(text))[:] for text in TEXTS[::2])
    assert (jnp.abs(logits(CODES[:1], Tokens(*one)) - logits(CODES[:1], Tokens(*other))).max(axis=-1) > 1e-4).all()


@pytest.mark.slow
def test_padding_changes_nothing():
    """Neither how much of it, nor what stands there, nor who else is in the batch."""
    wanted = logits(CODES, prompts(*TEXTS))
    more = logits(CODES, prompts(*TEXTS, length=8))
    np.testing.assert_allclose(more, wanted, atol=1e-5)
    padded = prompts(*TEXTS)
    other = padded._replace(ids=jnp.where(padded.mask, padded.ids, 0))
    np.testing.assert_array_equal(logits(CODES, other), wanted)
    for i, text in enumerate(TEXTS):
        alone = logits(CODES[i : i + 1], prompts(text, length=len(text)))
        np.testing.assert_allclose(alone[0], wanted[i], atol=1e-5)
    seen = padded._replace(mask=jnp.ones_like(padded.mask))
    assert (jnp.abs(logits(CODES, seen) - wanted)[1:].max(axis=-1) > 1e-4).all()


def test_each_code_is_predicted_where_the_one_before_it_is_read():
    """Code 0 at begin_of_image: moved by one, a prediction would know its code, and nothing would predict code 0."""
    before = logits(CODES, prompts(*TEXTS))
    after = logits(CODES.at[:, 4].set((CODES[:, 4] + 1) % 12), prompts(*TEXTS))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])  # code 4 is first read by the prediction of code 5
    assert (jnp.abs(before - after)[:, 5:].max(axis=-1) > 1e-4).all()
    last = logits(CODES.at[:, 8].set((CODES[:, 8] + 1) % 12), prompts(*TEXTS))
    np.testing.assert_array_equal(before, last)  # nothing reads the last code
    first = logits(CODES.at[:, 0].set((CODES[:, 0] + 1) % 12), prompts(*TEXTS))
    np.testing.assert_array_equal(before[:, 0], first[:, 0])
    assert (jnp.abs(before - first)[:, 1].max(axis=-1) > 1e-4).all()


def test_the_parts_make_the_whole():
    """`embed_text`, `embed_codes`, `hidden_states` and `head` are what others build on."""
    text = prompts(*TEXTS, length=8)

    def run(model):
        x = jnp.concatenate([model.embed_text(text.ids), model.embed_codes(CODES[:, :-1])], axis=1)
        hidden = model.hidden_states(x, rotation_table(16, 8), model.visible(text, 16))
        return model.head(hidden[:, 7:])

    parts = jax.jit(lambda params: MODEL.apply({"params": params}, method=run))
    np.testing.assert_allclose(parts(PARAMS), logits(CODES, text), atol=1e-6)


@pytest.mark.parametrize(("scale", "segments", "length"), [(1.0, 1, 6), (5.0, 4, 6), (0.5, 2, 8)])
def test_cached_decoding_is_the_full_forward(scale, segments, length):
    sampler, conditions = Sampler("constant", scale), prompts(*TEXTS, length=length)
    cached = generators.cached(MODEL)
    codes, drawn = sample(cached, PARAMS, conditions, ROWS, KEYS, sampler, segments=segments, return_logits=True)
    of_rows = jax.tree.map(lambda leaf: leaf[ROWS], conditions)
    c, u = logits(codes, of_rows), logits(codes, FAMILY.unconditional(MODEL, PARAMS, of_rows))
    np.testing.assert_allclose(drawn, c if scale == 1 else u + scale * (c - u), atol=1e-4)
    for n in range(9):
        keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, n)
        np.testing.assert_array_equal(codes[:, n], guidance.draw(keys, drawn[:, n]))


@pytest.mark.slow
def test_a_sequence_does_not_depend_on_its_batch():
    cached, sampler = generators.cached(MODEL), Sampler("constant", 5.0, top_k=5)
    together = sample(cached, PARAMS, prompts(*TEXTS, length=8), ROWS, KEYS, sampler)
    for i, row in enumerate(ROWS.tolist()):
        own = prompts(TEXTS[row])
        alone = sample(cached, PARAMS, own, jnp.array([0]), KEYS[i : i + 1], sampler)
        np.testing.assert_array_equal(alone[0], together[i])


@pytest.mark.slow
def test_bfloat16_decoding_is_near_the_full_forward():
    half, conditions = dataclasses.replace(MODEL, dtype=jnp.bfloat16), prompts(*TEXTS)
    sampler = Sampler("constant", 1.0)
    codes, drawn = sample(generators.cached(half), PARAMS, conditions, ROWS, KEYS, sampler, return_logits=True)
    assert drawn.dtype == jnp.float32
    np.testing.assert_allclose(drawn, logits(codes, jax.tree.map(lambda leaf: leaf[ROWS], conditions)), atol=0.15)


def test_dropout_is_off_as_published_and_acts_in_training_alone():
    key, text = jax.random.key(0), prompts(*TEXTS)
    still = logits(CODES, text)
    np.testing.assert_array_equal(logits_of(MODEL, PARAMS, CODES, text, key), still)
    model = dataclasses.replace(MODEL, dropout=0.3)
    np.testing.assert_array_equal(logits_of(model, PARAMS, CODES, text), still)
    assert (logits_of(model, PARAMS, CODES, text, key) != still).any()


def test_longer_prompts_are_refused():
    text = prompts(*TEXTS, length=9)
    message = r"a prompt has 9 tokens, and config\.model\.prompt_length = 8: shorten it"
    with pytest.raises(RearError, match=message):
        logits(CODES, text)
    with pytest.raises(RearError, match=message):
        sample(generators.cached(MODEL), PARAMS, text, ROWS, KEYS, Sampler("constant", 5.0))


def test_half_split_rotation_known_values():
    quarter = heads.HalfSplitRotation(jnp.zeros((1, 2)), jnp.ones((1, 2)))
    turned = heads.rotate(jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4), quarter)
    np.testing.assert_array_equal(turned.ravel(), [-3.0, -4.0, 1.0, 2.0])  # pairs (0, 2) and (1, 3)
    cos, sin = rotation_table(5, 4)
    np.testing.assert_allclose(cos[4], np.cos([4.0, 0.04]), rtol=1e-6)
    np.testing.assert_allclose(sin[4], np.sin([4.0, 0.04]), rtol=1e-6)
    assert isinstance(jax.tree.map(lambda x: x, quarter.at(None)), heads.HalfSplitRotation)


def test_the_norms_have_the_published_epsilon():
    """1e-6 where LlamaGen has 1e-5: it shows in an input as small as that."""
    x, sizes = jnp.full((1, 1, 16), 1e-3), (16, 2, 32, 0.0, jnp.float32)
    norm = {"scale": jnp.ones(16)}

    def normed(block):
        return block.apply({"params": {"attention_norm": norm}}, method=lambda block: block.attention_norm(x))

    np.testing.assert_allclose(normed(Block(*sizes, epsilon=1e-6)), 1e-3 / np.sqrt(2e-6), rtol=1e-5)
    np.testing.assert_allclose(normed(Block(*sizes)), 1e-3 / np.sqrt(1.1e-5), rtol=1e-5)
    final = MODEL.apply({"params": {**PARAMS, "norm": norm}}, x, method="final_norm")
    np.testing.assert_allclose(final, 1e-3 / np.sqrt(2e-6), rtol=1e-5)


def published_tensors() -> dict[str, np.ndarray]:
    """The parameters as in the authors' file, with what else is there."""
    others = ("vision_model.vision_tower.norm.weight", "aligner.layers.0.weight", "gen_vision_model.quant_conv.bias")
    others += ("language_model.lm_head.weight", "language_model.model.layers.1.self_attn.rotary_emb.inv_freq")
    params = jax.tree.map(np.asarray, PARAMS)
    return layout.to_torch(params, FAMILY.layout.torch_name) | dict.fromkeys(others, np.zeros((1, 1), np.float32))


def test_out_and_in_again(tmp_path):
    tensors = published_tensors()
    joined = np.asarray(PARAMS["blocks"]["qkv"]["kernel"])
    for part, name in enumerate("qkv"):
        own = tensors[f"language_model.model.layers.1.self_attn.{name}_proj.weight"]
        np.testing.assert_array_equal(own, joined[1, :, 16 * part : 16 * part + 16].T)
    sizes = {key: value for key, value in LANGUAGE.items() if key != "heads"} | {"code_dim": 8}
    assert FAMILY.layout.sizes(tensors) == sizes  # no heads: 16 is the width of no published model
    file = tmp_path / "janus.safetensors"
    save_file(tensors, file)
    back = published.read_params(file, janus_config(**LANGUAGE), FAMILY, generators.shapes(MODEL))
    chex.assert_trees_all_equal(back, PARAMS)


def test_what_a_file_lacks_is_named_by_its_published_name():
    tensors = published_tensors()
    del tensors["language_model.model.layers.1.self_attn.k_proj.weight"]
    tensors["language_model.model.layers.0.self_attn.v_proj.weight"] = np.zeros((16, 8), np.float32)
    wanted = (
        r"1 missing: language_model\.model\.layers\.1\.self_attn\.k_proj\.weight; "
        r"1 of another shape: language_model\.model\.layers\.0\.self_attn\.v_proj\.weight \(8, 16\), wanted \(16, 16\)"
    )
    names, ignore = FAMILY.layout.torch_name, FAMILY.layout.ignore
    with pytest.raises(RearError, match=wanted):
        layout.from_torch(tensors, generators.shapes(MODEL), names, ignore=ignore)


def test_the_7b_is_told_apart_by_its_shapes(monkeypatch):
    network = JanusTransformer(**FULL, width=4096, depth=30, heads=32, mlp_width=11008)
    tensors = layout.torch_shapes(generators.shapes(network), FAMILY.layout.torch_name)
    monkeypatch.setattr(published, "open_published", lambda path, section: tensors)
    config = janus_config()
    wanted = (
        r"pro\.bin is Janus-Pro-7B with config\.model\.width 4096 \(config: 2048\), depth 30 \(config: 24\), "
        r"mlp_width 11008 \(config: 5632\), heads 32 \(config: 16\): use that network's config"
    )
    with pytest.raises(RearError, match=wanted):
        published.check_params(pathlib.Path("pro.bin"), config, FAMILY, generators.shapes(JanusTransformer(**FULL)))
    config.model.update(width=4096, depth=30, heads=32, mlp_width=11008)
    published.check_params(pathlib.Path("pro.bin"), config, FAMILY, generators.shapes(network))


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        (
            "model.language_model.layers.23.self_attn.q_proj.weight",
            "language_model.model.layers.23.self_attn.q_proj.weight",
        ),
        ("model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("model.generation_embeddings.weight", "gen_embed.weight"),
        ("model.generation_aligner.fc1.bias", "gen_aligner.layers.0.bias"),
        ("model.generation_aligner.hidden_layers.0.weight", "gen_aligner.layers.2.weight"),
        ("model.generation_head.proj_out.weight", "gen_head.output_mlp_projector.weight"),
        ("model.generation_head.vision_head.bias", "gen_head.vision_head.bias"),
        ("model.aligner.fc1.weight", "aligner.layers.0.weight"),
        ("model.aligner.hidden_layers.0.bias", "aligner.layers.2.bias"),
        ("model.vqmodel.quantize.embedding.weight", "gen_vision_model.quantize.embedding.weight"),
        (
            "model.vqmodel.encoder.down.0.downsample.conv.weight",
            "gen_vision_model.encoder.conv_blocks.0.downsample.conv.weight",
        ),
        ("model.vqmodel.encoder.down.4.attn.1.q.bias", "gen_vision_model.encoder.conv_blocks.4.attn.1.q.bias"),
        (
            "model.vqmodel.decoder.up.1.block.2.norm1.weight",
            "gen_vision_model.decoder.conv_blocks.1.res.2.norm1.weight",
        ),
        ("model.vqmodel.decoder.mid.block_1.conv1.bias", "gen_vision_model.decoder.mid.0.conv1.bias"),
        ("model.vqmodel.encoder.mid.attn_1.k.weight", "gen_vision_model.encoder.mid.1.k.weight"),
        ("model.vqmodel.encoder.mid.block_2.norm2.bias", "gen_vision_model.encoder.mid.2.norm2.bias"),
        ("model.vision_model.post_layernorm.weight", "vision_model.post_layernorm.weight"),
        ("gen_head.vision_head.weight", None),
        ("language_model.model.norm.weight", None),
        ("model.layers.0.weight", None),
    ],
)
def test_transformers_names(key, wanted):
    assert published_names(key) == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 16, "width": 48}, r"config\.model\.width / config\.model\.heads = 3: it must be divisible by 2"),
        ({"prompt_length": 0}, r"config\.model\.prompt_length = 0: a prompt has one token at least"),
        ({"pad_id": 40}, r"config\.model\.pad_id = 40: tokens are 0\.\.39"),
        ({"attention": "fast"}, r"config\.model\.attention = 'fast': use one of auto, "),
    ],
)
def test_build_refuses(changes, message):
    config = janus_config(**LANGUAGE | {"pad_id": PAD} | changes)
    with pytest.raises(RearError, match=message):
        generators.build(config, toy.only_sizes(16, grid=(4, 4)))


def test_build():
    config = janus_config(**LANGUAGE, pad_id=PAD, prompt_length=8, dtype="float32")
    network = generators.build(config, toy.only_sizes(9, grid=(3, 3)))
    sizes = {"codebook_size": network.codebook_size, "num_classes": config.data.num_classes}
    assert network == dataclasses.replace(MODEL, **sizes)
    assert generators.cached(network).prefix_length == 8
    with pytest.raises(RearError, match="needs projections of hidden states"):
        generators.build(config, toy.only_sizes(9, grid=(3, 3)), needs=("taps",))
