"""The T5 encoder: what holds for any weights, its files with everything that can be wrong with them, and shards."""

import functools
import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import save_file

from rear_jax.errors import RearError
from rear_jax.runtime import flops, sharding
from rear_jax.runtime.precision import standing_in_for
from rear_jax.text import t5, t5_files
from rear_jax.text.t5 import T5Encoder
from rear_jax.weights import layout
from rear_jax.weights.shards import open_weights

SIZES = {"vocabulary_size": 20, "width": 24, "depth": 2, "heads": 3, "head_size": 4, "mlp_width": 16, "buckets": 32}
MODULE = T5Encoder(**SIZES, dtype=jnp.dtype("float32"))


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    """A small encoder under the published keys, float32."""
    draw = np.random.default_rng(0).normal
    shapes = layout.torch_shapes(t5_files.shapes(MODULE), t5_files.torch_name)
    found = {key: draw(scale=0.3, size=tensor.shape).astype(np.float32) for key, tensor in shapes.items()}
    return {key: 1 + value if "norm" in key else value for key, value in found.items()}


@functools.cache
def params():
    return t5_files.params_from(tensors(), MODULE)


@functools.partial(jax.jit, static_argnames="module")
def hidden(params, ids, mask, module=MODULE):
    return module.apply({"params": params}, ids, mask)


def texts(lengths: tuple[int, ...] = (6, 3, 1, 0), total: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, padded on the right."""
    mask = np.arange(total) < np.array(lengths)[:, None]
    ids = np.random.default_rng(1).integers(2, SIZES["vocabulary_size"], mask.shape, dtype=np.int32)
    return np.where(mask, ids, 0), mask


def test_buckets_by_hand():
    """Single distances below 8, then edges at 12, 16, 23, 32, 46, 64, 91; 16 more for keys after the query."""
    buckets = t5.distance_buckets(200)
    of = dict(zip(range(-199, 200), buckets.tolist(), strict=True))
    assert [of[-d] for d in range(9)] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    starts = [next(d for d in range(200) if of[-d] == bucket) for bucket in range(8, 16)]
    assert starts == [8, 12, 16, 23, 32, 46, 64, 91]
    assert all(of[d] == of[-d] + 16 for d in range(1, 200))
    assert of[199] == 31
    assert t5.distance_buckets(1).tolist() == [0]


def test_padding_is_not_seen_and_is_zero():
    ids, mask = texts()
    found = hidden(params(), ids, mask)
    assert found.dtype == jnp.float32
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[~mask], 0.0)
    np.testing.assert_allclose(hidden(params(), np.where(mask, ids, 7), mask), found, atol=1e-6)
    shorter = hidden(params(), ids[1:2, :3], mask[1:2, :3])
    np.testing.assert_allclose(shorter, found[1:2, :3], atol=1e-5)


def test_positions_are_distances_alone():
    """A text that stands further right has the same features there."""
    ids, mask = texts((4,), 4)
    moved = np.pad(ids, ((0, 0), (3, 0))), np.pad(mask, ((0, 0), (3, 0)))
    np.testing.assert_allclose(hidden(params(), *moved)[:, 3:], hidden(params(), ids, mask), atol=1e-5)
    swapped = hidden(params(), ids[:, ::-1], mask)[:, ::-1]
    assert np.abs(swapped - hidden(params(), ids, mask)).max() > 0.01


def test_bfloat16_is_close_and_every_sum_is_float32():
    ids, mask = texts()
    small = T5Encoder(**SIZES)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())
    found, wanted = hidden(rounded, ids, mask, module=small), hidden(params(), ids, mask)
    assert found.dtype == jnp.float32
    assert 1e-4 < np.abs(found - wanted).max() < 0.1
    with standing_in_for("tpu"):
        traced = jax.make_jaxpr(lambda *given: small.apply({"params": rounded}, *given))(ids, mask)
    assert set(flops.by_precision(traced)) == {"bfloat16"}
    decides = re.findall(r":(\w+)\[[^\]]*\] = (exp|tanh|rsqrt|reduce_sum|reduce_max)\b", str(traced))
    assert {name for _, name in decides} == {"exp", "tanh", "rsqrt", "reduce_sum", "reduce_max"}
    assert {dtype for dtype, _ in decides} == {"f32"}


def test_large_activations_stay_finite_in_bfloat16():
    """The MLP of T5 leaves the range of float16, which is why that is refused."""
    ids, mask = texts()
    large = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())
    large["blocks"]["up"]["kernel"] *= 1e5
    assert np.isfinite(hidden(large, ids, mask, module=T5Encoder(**SIZES))).all()
    for dtype in ("float16", "int8", "bf16"):
        with pytest.raises(RearError, match=rf"does not compute in {dtype}: use bfloat16 or float32"):
            T5Encoder(**SIZES, dtype=dtype).init(jax.random.key(0), ids, mask)


def test_every_parameter_of_flan_t5_xl_is_divided():
    module = T5Encoder()
    shapes = t5_files.shapes(module)
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, 1) == 1223.5
    mesh = {"data": 1, "fsdp": 4, "tensor": 2}
    whole = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = sharding.name_of(path)
        spec = sharding.spec(name, leaf.shape, mesh, t5.PARAMETERS)
        whole += leaf.size if spec == PartitionSpec(*[None] * leaf.ndim) else 0
    assert whole < 2e5  # norms and the bias
    query = sharding.spec("blocks/q/kernel", (24, 2048, 2048), mesh, t5.PARAMETERS)
    assert query == PartitionSpec(None, "fsdp", "tensor")


def write_shards(folder: Path) -> Path:
    """The small encoder in two files beside an index, as model hubs have it."""
    keys = sorted(tensors())
    parts = {f"model-0000{n + 1}-of-00002.safetensors": keys[n::2] for n in range(2)}
    for name, part in parts.items():
        save_file({key: tensors()[key] for key in part}, folder / name)
    places = {key: name for name, part in parts.items() for key in part}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return path


class TestFiles:
    def test_sizes_and_weights(self, tmp_path):
        more = {
            "encoder.embed_tokens.weight": tensors()["shared.weight"],
            "decoder.block.0.layer.0.layer_norm.weight": np.ones(3, np.float32),
            "lm_head.weight": np.ones((2, 2), np.float32),
        }
        save_file(tensors() | more, tmp_path / "model.safetensors")
        assert t5_files.sizes(open_weights(tmp_path)) == SIZES
        loaded = t5_files.load(str(tmp_path / "model.safetensors"), jnp.float32)
        assert loaded.module == MODULE
        chex.assert_trees_all_equal(loaded.params, params())

    def test_bfloat16(self, tmp_path):
        save_file(tensors(), tmp_path / "a.safetensors")
        loaded, whole = (t5_files.load(str(tmp_path / "a.safetensors"), dtype) for dtype in ("bfloat16", "float32"))
        assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {np.dtype(ml_dtypes.bfloat16)}
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), loaded.params, params())
        assert loaded.fingerprint != whole.fingerprint

    def test_fingerprint_names_the_weights(self, tmp_path):
        found = set()
        for change in (0.0, 0.5):
            changed = tensors() | {"shared.weight": tensors()["shared.weight"] + np.float32(change)}
            save_file(changed, tmp_path / "a.safetensors")
            found.add(t5_files.load(str(tmp_path / "a.safetensors")).fingerprint)
            assert t5_files.load(str(tmp_path / "a.safetensors")).fingerprint in found
        assert len(found) == 2

    def test_other_networks_are_refused(self):
        ungated = {key.replace("wi_0", "wi"): value for key, value in tensors().items() if "wi_1" not in key}
        with pytest.raises(RearError, match=r"^FILE is T5 v1\.0, whose MLP has no gate: give"):
            t5_files.sizes(ungated, source="FILE")
        decoder = {key.replace("encoder.", "decoder."): value for key, value in tensors().items()}
        with pytest.raises(RearError, match=r"^FILE has no encoder of T5 v1\.1 or flan-T5: it lacks encoder\.block\.0"):
            t5_files.sizes(decoder, source="FILE")
        for key, shape, why in [
            (t5_files.FIRST_QUERY, (13, 24), "3 heads share 13 features"),
            (t5_files.BIASES, (9999, 3), "9999 buckets"),
            (t5_files.TABLE, (20,), "no matrices"),
            (t5_files.BIASES, (32, 0), "no matrices"),
        ]:
            with pytest.raises(RearError, match=why):
                t5_files.sizes(tensors() | {key: np.zeros(shape, np.float32)})

    def test_what_does_not_fit_is_named(self):
        lost = {key: value for key, value in tensors().items() if key != "encoder.block.1.layer.1.layer_norm.weight"}
        with pytest.raises(RearError, match=r"1 missing: encoder\.block\.1\.layer\.1\.layer_norm\.weight"):
            t5_files.params_from(lost, MODULE)
        bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"  # umT5 has one in every block
        with pytest.raises(RearError, match=r"1 unexpected: encoder\.block\.1.*relative_attention_bias"):
            t5_files.params_from(tensors() | {bias: np.zeros((32, 3), np.float32)}, MODULE)
        broken = tensors()["shared.weight"].copy()
        broken[3, 5] = np.nan
        with pytest.raises(RearError, match=r"shared\.weight is not finite"):
            t5_files.params_from(tensors() | {"shared.weight": broken}, MODULE)

    def test_more_weights_than_bytes_are_refused(self, tmp_path, monkeypatch):
        """As a damaged file of PyTorch may promise them: one number, repeated."""
        (tmp_path / "t5.bin").write_bytes(b"x" * 100)
        monkeypatch.setattr(t5_files, "open_weights", lambda path: tensors())
        with pytest.raises(RearError, match=r"t5\.bin is smaller than the weights that it promises"):
            t5_files.load(str(tmp_path / "t5.bin"))


class TestShards:
    def test_an_index_or_its_folder(self, tmp_path):
        index = write_shards(tmp_path)
        for place in (index, str(index), tmp_path):
            found = open_weights(place)
            assert dict(found).keys() == tensors().keys()
            assert len(found) == len(tensors())
            assert all(np.array_equal(found[key], tensors()[key]) for key in found)
            assert {k: v.shape for k, v in layout.outline(found).items()} == {k: v.shape for k, v in tensors().items()}
        with pytest.raises(KeyError, match="absent"):
            found["absent"]
        loaded = t5_files.load(str(tmp_path), "float32")
        chex.assert_trees_all_equal(loaded.params, params())

    def test_files_of_pytorch(self, tmp_path):
        zipped = Path(__file__).parent / "data" / "state_dict_zip.pt"
        (tmp_path / "part.bin").write_bytes(zipped.read_bytes())
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"half": "part.bin"}}))
        assert {key: value.tolist() for key, value in open_weights(tmp_path).items()} == {"half": [1.5, -0.25]}

    def test_links_are_followed(self, tmp_path):
        """A cache of a model hub keeps the files elsewhere."""
        for name in ("blobs", "snapshot"):
            (tmp_path / name).mkdir()
        write_shards(tmp_path / "blobs")
        for file in (tmp_path / "blobs").iterdir():
            (tmp_path / "snapshot" / file.name).symlink_to(file)
        assert open_weights(tmp_path / "snapshot").keys() == tensors().keys()

    def test_one_file_is_itself(self, tmp_path):
        save_file(tensors(), tmp_path / "model.safetensors")
        assert open_weights(tmp_path).keys() == open_weights(tmp_path / "model.safetensors").keys() == tensors().keys()
        with pytest.raises(RearError, match=r"no checkpoint file .*absent\.json"):
            open_weights(tmp_path / "absent.json")

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(RearError, match=r"has no weights: a folder must hold one of model\.safetensors, "):
            open_weights(tmp_path)

    def test_a_missing_or_damaged_shard(self, tmp_path):
        index = write_shards(tmp_path)
        second = tmp_path / "model-00002-of-00002.safetensors"
        whole = second.read_bytes()
        second.write_bytes(whole[:-8])
        with pytest.raises(RearError, match=r"model-00002-of-00002\.safetensors is not a whole checkpoint"):
            open_weights(index)
        second.unlink()
        with pytest.raises(RearError, match=r"index\.json names the file model-00002-of-00002\.safetensors, which is"):
            open_weights(index)
        save_file({"other": np.ones(1, np.float32)}, second)
        with pytest.raises(RearError, match=r"00002\.safetensors has no tensor encoder\..*, but .*index\.json says so"):
            open_weights(index)

    @pytest.mark.parametrize(
        "name", ["../outside.safetensors", "/etc/passwd", "a/b.bin", "..", "", "a\\b.bin", "a\0b", "\ud800", "a" * 300]
    )
    def test_a_shard_outside_the_folder(self, tmp_path, name):
        index = tmp_path / "folder" / "model.safetensors.index.json"
        index.parent.mkdir()
        save_file(tensors(), tmp_path / "outside.safetensors")
        index.write_text(json.dumps({"weight_map": {"shared.weight": name}}))
        with pytest.raises(RearError, match=r"which is not beside it: refused"):
            open_weights(index)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"\xff\xfe",
            b"[]",
            b"{}",
            b'{"weight_map": 3}',
            b'{"weight_map": {}}',
            b'{"weight_map": {"a": ["b"]}}',
            b"[" * 100_000,
        ],
    )
    def test_no_index(self, tmp_path, content):
        (tmp_path / "model.safetensors.index.json").write_bytes(content)
        with pytest.raises(RearError, match=r"index\.json is not an index of shards \(.*fetch it again") as caught:
            open_weights(tmp_path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
