"""CLIP: what its features must be, the sizes that are published, and its files with what can be wrong with them."""

import functools
import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rear_jax.errors import RearError
from rear_jax.metrics import clip_files
from rear_jax.metrics.clip import CLIP, Tower, quick_gelu
from rear_jax.weights import torch_writer
from rear_jax.weights.layout import stand_in, to_torch

GOLDENS = Path(__file__).parent / "goldens"
LAYOUTS = {"hugging_face": clip_files.HUGGING_FACE, "open_clip": clip_files.OPEN_CLIP}
SMALL = CLIP(8, 8, 4, Tower(768, 1, 12), Tower(64, 2, 1), 20, 6, "quick_gelu")  # of a width that the files may have

# embedding, image, patch, image tower, text tower; million parameters
PUBLISHED = {
    "ViT-B/32": ((512, 224, 32, Tower(768, 12, 12), Tower(512, 12, 8), 49408, 77, "quick_gelu"), 151.3),
    "ViT-L/14": ((768, 224, 14, Tower(1024, 24, 16), Tower(768, 12, 12), 49408, 77, "quick_gelu"), 427.6),
    "ViT-H-14": ((1024, 224, 14, Tower(1280, 32, 16), Tower(1024, 24, 16), 49408, 77, "gelu"), 986.1),
}


@functools.cache
def params():
    draw = np.random.default_rng(0).standard_normal
    return jax.tree.map(lambda leaf: 0.2 * draw(leaf.shape, np.float32), clip_files.param_shapes(SMALL))


def tensors(layout: str) -> dict[str, np.ndarray]:
    """The small network as a file of a publisher, with the keys that carry nothing."""
    found = {key: np.array(value) for key, value in to_torch(params(), LAYOUTS[layout].torch_name).items()}
    if layout == "open_clip":
        return found | {"logit_scale": np.float32([4.6]), "attn_mask": np.zeros((6, 6), np.float32)}
    for key in [key for key in found if "qkv_proj" in key]:
        for part, value in zip("qkv", np.split(found.pop(key), 3), strict=True):
            found[key.replace("qkv", part)] = value
    return found | {"logit_scale": np.float32([4.6]), "text_model.embeddings.position_ids": np.arange(6)[None]}


@jax.jit
def texts(text_params, ids):
    return SMALL.apply({"params": {"text": text_params}}, ids, method="text_features")


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_sizes_follow_from_the_shapes_of_a_file(name, layout):
    settings, millions = PUBLISHED[name]
    shapes = clip_files.param_shapes(CLIP(*settings))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6, 1) == millions
    empty = jax.tree.map(lambda leaf: stand_in(leaf.shape), shapes)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(empty):
        key, axes, _ = LAYOUTS[layout].torch_name(tuple(part.key for part in path))
        for i in range(len(leaf) if "{i}" in key else 1):
            one = leaf[0] if "{i}" in key else leaf
            found[key.replace("{i}", str(i))] = one if axes is None else one.transpose(np.argsort(axes))
    assert clip_files.network_of(found) == CLIP(*settings)


def test_quick_gelu():
    np.testing.assert_allclose(quick_gelu(jnp.float32([-1.0, 0.0, 2.0])), [-0.15420423, 0.0, 1.93565862], rtol=1e-6)


def test_a_text_ends_at_its_first_end():
    ids = np.array([[18, 3, 4, 19, 0, 0], [18, 3, 4, 19, 19, 19], [18, 3, 4, 19, 7, 19], [18, 3, 5, 19, 0, 0]])
    found = texts(params()["text"], ids)
    np.testing.assert_allclose(found[:3], found[:1].repeat(3, 0), rtol=1e-5)  # what comes after the end is not seen
    assert np.abs(found[3] - found[0]).max() > 1e-3


def test_each_tower_needs_only_its_own_parameters():
    @jax.jit
    def run(params, pixels, ids):
        image = SMALL.apply({"params": {"image": params["image"]}}, pixels, method="image_features")
        text = SMALL.apply({"params": {"text": params["text"]}}, ids, method="text_features")
        return image, text[0], SMALL.apply({"params": params}, pixels, ids)[:, 0]

    pixels = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    image, text, found = run(params(), pixels, jnp.array([[18, 3, 4, 19, 0, 0]]))
    cosine = image @ text / (jnp.linalg.norm(image, axis=1) * jnp.linalg.norm(text))
    np.testing.assert_allclose(found, cosine, atol=1e-6)


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_all_products_have_the_asked_precision(precision):
    def run(params, pixels, ids):
        return SMALL.clone(precision=precision).apply({"params": params}, pixels, ids).sum()

    shapes = params(), jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 6), jnp.int32)
    for function in (run, jax.grad(run, argnums=1)):
        text = str(jax.make_jaxpr(function)(*shapes))
        asked = re.findall(r"precision=\(Precision\.(\w+), Precision\.(\w+)\)", text)
        assert set(asked) == {(precision.upper(),) * 2}
        assert len(asked) == text.count("dot_general[") >= 14


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_come_back(layout, tmp_path):
    save_file(tensors(layout), tmp_path / "clip.safetensors")
    network, found = clip_files.load(str(tmp_path / "clip.safetensors"), precision="high")
    assert network == SMALL.clone(precision="high")
    chex.assert_trees_all_equal(found, params())


def test_a_file_of_hps_comes_back(tmp_path):
    layout = clip_files.OPEN_CLIP
    torch_writer.save(tmp_path / "HPS_v2.1_compressed.pt", params(), layout.torch_name, under="state_dict")
    _, found = clip_files.load(str(tmp_path / "HPS_v2.1_compressed.pt"))
    chex.assert_trees_all_equal(found, params())


def write(path: Path, layout: str, without: str = "", **changes: np.ndarray) -> str:
    """A file of the small network with a tensor less, or with others in their place."""
    changed = tensors(layout) | {key.replace("__", "."): value for key, value in changes.items()}
    save_file({key: value for key, value in changed.items() if not without or without not in key}, path)
    return str(path)


class TestWrongFiles:
    def test_of_another_network(self, tmp_path):
        save_file({"features.0.weight": np.zeros(3, np.float32)}, tmp_path / "vgg.safetensors")
        with pytest.raises(RearError, match=r"vgg\.safetensors is no CLIP.*: give OpenAI's ViT-B/32"):
            clip_files.load(str(tmp_path / "vgg.safetensors"))
        with pytest.raises(RearError, match=r"no checkpoint file .*none\.pt"):
            clip_files.load(str(tmp_path / "none.pt"))

    @pytest.mark.parametrize(
        ("layout", "key"),
        [("hugging_face", "patch_embedding.weight"), ("open_clip", "token_embedding.weight")],
    )
    def test_that_lack_what_sizes_are_read_from(self, layout, key, tmp_path):
        path = write(tmp_path / "cut.safetensors", layout, without=key)
        with pytest.raises(RearError, match=rf"cut\.safetensors is not a whole CLIP \('.*{key}'\): give"):
            clip_files.load(path)

    @pytest.mark.parametrize(
        ("layout", "key", "told"),
        [
            ("hugging_face", "text_model.encoder.layers.1.self_attn.k_proj.bias", "self_attn.qkv_proj.bias"),
            ("open_clip", "visual.transformer.resblocks.0.attn.in_proj_weight", "attn.in_proj_weight"),
        ],
    )
    def test_that_lack_a_part_of_a_block(self, layout, key, told, tmp_path):
        with pytest.raises(RearError, match=rf"cut\.safetensors does not fit .*1 missing: .*{told}"):
            clip_files.load(write(tmp_path / "cut.safetensors", layout, without=key))

    def test_with_one_tensor_too_many(self, tmp_path):
        path = write(tmp_path / "more.safetensors", "open_clip", visual__extra=np.zeros(1, np.float32))
        with pytest.raises(RearError, match=r"1 unexpected: visual\.extra"):
            clip_files.load(path)

    def test_with_axes_that_no_clip_has(self, tmp_path):
        path = write(tmp_path / "odd.safetensors", "open_clip", positional_embedding=np.zeros(6, np.float32))
        with pytest.raises(RearError, match=r"odd\.safetensors is not a whole CLIP \(not enough values"):
            clip_files.load(path)

    def test_of_an_unknown_width(self):
        golden = np.load(GOLDENS / "clip_open.npz")
        of_golden = {key.removeprefix("param/"): golden[key] for key in golden if key.startswith("param/")}
        width = json.loads(str(golden["meta"]))["vision"]["width"]
        with pytest.raises(
            RearError, match=rf"x\.pt is a CLIP of widths {width} and 32, which is not known here: give"
        ):
            clip_files.network_of(of_golden, source="x.pt")

    def test_images_and_texts_of_another_size(self):
        with pytest.raises(RearError, match=r"wants images \[B, 8, 8, 3\], not \(1, 12, 8, 3\)"):
            SMALL.apply({"params": params()}, jnp.zeros((1, 12, 8, 3)), method="image_features")
        with pytest.raises(RearError, match=r"wants texts as ids \[B, 6\], not \(1, 7\)"):
            SMALL.apply({"params": params()}, jnp.zeros((1, 7), jnp.int32), method="text_features")
