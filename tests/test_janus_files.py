"""One file with several networks: each is read by its own keys, and goes out again with everything else untouched."""

import json
import logging
import pathlib
import shutil
import tracemalloc
import types

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rear_jax import artifacts, generators, jobs, tokenizers
from rear_jax.artifacts import published
from rear_jax.errors import RearError
from rear_jax.generators.janus.files import published_names
from rear_jax.runtime.checkpoints import Checkpoints
from rear_jax.sampling import draw
from rear_jax.tokenizers import llamagen_vq
from rear_jax.weights import layout, spliced, torch_writer
from rear_jax.weights.shards import open_weights
from rear_jax.weights.views import view
from tests import toy, toy_janus

BESIDE = {"config.json": "{}", "tokenizer.json": '{"model": 1}', "README.md": "a model"}  # in a hub's folder


@pytest.fixture(scope="module")
def config():
    return toy_janus.config()


@pytest.fixture(scope="module")
def tensors(config):
    return toy_janus.tensors(config)


def write(place: pathlib.Path, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    """A checkpoint in the form that the name says: `*.bin`, `*.safetensors`, or a folder with shards of either."""
    if place.suffix == ".bin":
        torch_writer.write(place, tensors, tensors.values())
    elif place.suffix == ".safetensors":
        save_file(tensors, place)
    else:
        kind = ".bin" if place.name.endswith("bin") else ".safetensors"
        stem = "pytorch_model" if kind == ".bin" else "model"
        place.mkdir()
        names = {key: f"{stem}-{number % 2 + 1:05}-of-00002{kind}" for number, key in enumerate(tensors)}
        for name in set(names.values()):
            write(place / name, {key: tensor for key, tensor in tensors.items() if names[key] == name})
        index = {"metadata": {"total_size": 1}, "weight_map": names}
        (place / f"{stem}{kind}.index.json").write_text(json.dumps(index))
        (place / f"{'model' if kind == '.bin' else 'other'}.safetensors.index.json.old").write_text("not looked at")
        for name, text in BESIDE.items():
            (place / name).write_text(text)
    return place


def part(tensors, network, prefix: str = ""):
    """The parameters of a network straight from a state dict."""
    family = (tokenizers if prefix else generators).family_of(network)
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return layout.from_torch(own, family.shapes(network), family.layout.torch_name, ignore=family.layout.ignore)


@pytest.fixture(scope="module")
def params(config, tensors):
    """Of generator and tokenizer."""
    return part(tensors, toy.generator(config)), part(tensors, toy.tokenizer(config), "gen_vision_model.")


FORMS = ["janus.bin", "janus.safetensors", "shards", "shards_bin", "transformers"]


@pytest.fixture(scope="module")
def places(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("janus")
    renamed = {toy_janus.for_transformers(key): tensor for key, tensor in tensors.items()}
    return {form: write(folder / form, renamed if form == "transformers" else tensors) for form in FORMS}


def in_authors_names(tensors) -> dict[str, np.ndarray]:
    return {published_names(key) or key: tensors[key] for key in tensors}


@pytest.mark.parametrize("form", FORMS)
def test_each_network_is_read_by_its_own_keys(config, tensors, params, places, form, caplog):
    generator, tokenizer = toy.generator(config), toy.tokenizer(config)
    with caplog.at_level(logging.INFO):
        found = artifacts.read_generator(places[form], config, generator, None)
    count = len(layout.torch_shapes(found, generators.family_of(generator).layout.torch_name))
    assert f"{count} tensors (0 MB) are of this generator; leaving out {len(tensors) - count} others" in caplog.text
    chex.assert_trees_all_equal(found, params[0])
    of_tokenizer = artifacts.read_tokenizer(places[form], config, tokenizer)
    chex.assert_trees_all_equal(of_tokenizer, params[1])


def test_an_index_is_a_name_of_its_folder(config, places):
    artifacts.check_tokenizer_at(places["shards"], config, places["shards"], toy.tokenizer(config), ())
    place = places["shards"] / "model.safetensors.index.json"
    assert published.weights_file(places["shards"]) == place
    found = [artifacts.read_generator(p, config, toy.generator(config), None) for p in (place, places["shards"])]
    chex.assert_trees_all_equal(*found)


def test_nothing_else_is_read(config, tensors, monkeypatch):
    """Of the tensors of another network, only shapes are looked at."""
    read = []

    class Spied(layout.OpenTensors):
        def __getitem__(self, key):
            read.append(key)
            return tensors[key]

        def outline(self):
            return {key: layout.stand_in(tensor.shape, tensor.dtype) for key, tensor in tensors.items()}

        __iter__ = lambda self: iter(tensors)  # noqa: E731
        __len__ = lambda self: len(tensors)  # noqa: E731

    monkeypatch.setattr(published, "open_published", lambda place, section: Spied())
    published.read_params(
        pathlib.Path("x"), config, generators.FAMILIES["janus"], generators.shapes(toy.generator(config))
    )
    assert len(read) == len(set(read))
    assert not [key for key in read if key.startswith("gen_vision_model.") or key in toy_janus.OTHERS]
    read.clear()
    artifacts.read_tokenizer(pathlib.Path(__file__), config, toy.tokenizer(config))
    assert {key.partition(".")[0] for key in read} == {"gen_vision_model"}


def test_a_file_is_of_its_largest_network(config, tensors, tmp_path):
    assert published.detect(tensors, "file") is generators.FAMILIES["janus"]
    assert published.detect(tensors, "file", "tokenizer") is tokenizers.FAMILIES["llamagen_vq"]
    only = {key: tensor for key, tensor in tensors.items() if key.startswith("gen_vision_model.")}
    assert published.detect(only, "file") is tokenizers.FAMILIES["llamagen_vq"]
    assert published.detect(only, "file", "model") is tokenizers.FAMILIES["llamagen_vq"]
    place = write(tmp_path / "vq.safetensors", only)
    with pytest.raises(RearError, match=r"holds a tokenizer \(llamagen_vq\), not a generator"):
        artifacts.read_generator(place, config, toy.generator(config), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("gen_embed.weight"), "has no tensor 'gen_embed.weight'"),
        (lambda t: t.pop("language_model.model.norm.weight"), r"1 missing: language_model\.model\.norm\.weight"),
        (lambda t: t.update({"language_model.extra": np.zeros(3, np.float32)}), r"1 unexpected: language_model\.extra"),
        (lambda t: t.update({"gen_embed.weight": np.zeros((16, 9), np.float32)}), r"code_dim 9 \(config: 8\)"),
    ],
    ids=["missing size", "missing", "unexpected", "misshaped"],
)
def test_nothing_is_loaded_partially(config, tensors, tmp_path, change, message):
    changed = dict(tensors)
    change(changed)
    place = write(tmp_path / "x.safetensors", changed)
    for refuse in (
        lambda: artifacts.read_generator(place, config, toy.generator(config), None),
        lambda: artifacts.check_generator(place, config, tmp_path, toy.generator(config), ()),
    ):
        with pytest.raises(RearError, match=message):
            refuse()
    artifacts.read_tokenizer(place, config, toy.tokenizer(config))  # which is whole all the same


def test_names_of_transformers_for_the_tokenizer():
    """As in its modeling_janus.py: levels and blocks have other names, and the middle has named blocks."""
    names = {
        "encoder.down.3.block.1.nin_shortcut.weight": "encoder.conv_blocks.3.res.1.nin_shortcut.weight",
        "encoder.down.4.attn.0.proj_out.bias": "encoder.conv_blocks.4.attn.0.proj_out.bias",
        "encoder.down.0.downsample.conv.weight": "encoder.conv_blocks.0.downsample.conv.weight",
        "decoder.up.0.block.2.norm1.weight": "decoder.conv_blocks.0.res.2.norm1.weight",
        "decoder.up.1.upsample.conv.bias": "decoder.conv_blocks.1.upsample.conv.bias",
        "decoder.mid.block_1.conv1.weight": "decoder.mid.0.conv1.weight",
        "encoder.mid.attn_1.q.weight": "encoder.mid.1.q.weight",
        "encoder.mid.block_2.norm2.bias": "encoder.mid.2.norm2.bias",
        **{key: key for key in ("quantize.embedding.weight", "post_quant_conv.bias", "encoder.norm_out.weight")},
    }
    assert {key: llamagen_vq.own_key(f"model.vqmodel.{key}") for key in names} == names
    assert {own: llamagen_vq.own_key(f"gen_vision_model.{own}") for own in names.values()} == {
        own: own for own in names.values()
    }


def test_a_tensor_under_two_names_is_refused():
    wanted = llamagen_vq.FAMILY.layout
    held = {
        "model.vqmodel.encoder.conv_blocks.0.res.0.conv1.weight": np.zeros(1),
        "model.vqmodel.encoder.down.0.block.0.conv1.weight": np.zeros(1),
    }
    with pytest.raises(RearError, match=r"file holds encoder\.conv_blocks\.0\.res\.0\.conv1\.weight under two names"):
        view(held, wanted, "file")


def same(found, wanted) -> None:
    """Keys, dtypes, shapes and bytes are the same."""
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert np.ascontiguousarray(found[key]).tobytes() == np.ascontiguousarray(tensor).tobytes(), key


@pytest.fixture(scope="module")
def trained(config, tensors, params, tmp_path_factory):
    """A checkpoint of the generator after a step of training, and the tensors of its file afterwards."""
    rng = np.random.default_rng(1)
    changed = jax.tree.map(lambda leaf: leaf + rng.normal(0.0, 0.1, leaf.shape).astype(np.float32), params[0])
    store = Checkpoints(tmp_path_factory.mktemp("trained") / "posttrained", keep=1)
    store.save(3, {"params": jax.device_put(changed)}, config.to_dict() | {"holds": "generator"})
    store.close()
    own = layout.torch_tensors(changed, generators.FAMILIES["janus"].layout.torch_name)
    return str(store.folder), tensors | {key: tensor.astype(ml_dtypes.bfloat16) for key, tensor in own}


def convert(workdir: pathlib.Path, **settings) -> None:
    made = toy_janus.config(**{f"convert__{key}": str(value) for key, value in settings.items()})
    jobs.JOBS["convert"].check(made, workdir, ())
    jobs.JOBS["convert"].run(made, workdir)


@pytest.mark.parametrize("form", FORMS)
def test_in_and_out_again_bit_for_bit(tensors, places, tmp_path, form):
    convert(tmp_path, source=places[form])
    target = tmp_path / form
    convert(tmp_path, source=tmp_path / "converted", export=target, onto=places[form])
    found = open_weights(target)
    assert list(found) == list(open_weights(places[form]))
    same(in_authors_names(found), tensors)


@pytest.mark.parametrize(
    ("form", "target"), [("janus.bin", "x.safetensors"), ("shards", "x.bin"), ("transformers", "x")]
)
def test_what_was_trained_takes_its_place_and_its_dtype(tensors, places, trained, tmp_path, form, target):
    source, wanted = trained
    assert any((wanted[key] != tensors[key]).any() for key in tensors)
    convert(tmp_path, source=source, export=tmp_path / target, onto=places[form])
    same(in_authors_names(open_weights(tmp_path / target)), wanted)


@pytest.mark.slow
def test_a_tokenizer_goes_onto_the_same_file(tensors, places, tmp_path):
    own = {key.removeprefix("gen_vision_model."): tensor * 2 for key, tensor in tensors.items()}
    only = {key: own[key] for key in own if f"gen_vision_model.{key}" in tensors and "codebook_used" not in key}
    source = write(tmp_path / "vq.safetensors", {key: tensor.astype(np.float32) for key, tensor in only.items()})
    convert(tmp_path, source=source, export=tmp_path / "x.bin", onto=places["janus.bin"])
    same(open_weights(tmp_path / "x.bin"), tensors | {f"gen_vision_model.{key}": only[key] for key in only})


@pytest.mark.parametrize("form", ["shards", "shards_bin"])
def test_a_folder_goes_out_with_the_files_that_describe_the_network(places, tmp_path, form):
    shutil.copytree(places[form], tmp_path / "original")
    other = "model.safetensors" if form == "shards_bin" else "pytorch_model.bin"
    (tmp_path / "original" / f"{other}.index.json").write_text("{") if form == "shards" else None
    convert(tmp_path, source=tmp_path / "original", export=tmp_path / "new", onto=tmp_path / "original")
    weights = {file.name for file in places[form].iterdir() if "00" in file.name}
    stem = "model.safetensors" if form == "shards" else "pytorch_model.bin"
    copied = {f"{stem}.index.json", "config.json", "tokenizer.json"}
    assert {file.name for file in (tmp_path / "new").iterdir()} == weights | copied
    for name in copied:
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "original" / name).read_bytes()


def test_an_export_without_the_original_says_what_it_lacks(config, trained, tmp_path, caplog):
    source, wanted = trained
    convert(tmp_path, source=source, export=tmp_path / "x.safetensors")
    assert "it holds the generator alone; config.convert.onto=ORIGINAL adds all others" in caplog.text
    assert set(open_weights(tmp_path / "x.safetensors")) < set(wanted)
    artifacts.read_generator(tmp_path / "x.safetensors", config, toy.generator(config), None)


@pytest.mark.parametrize(
    ("export", "onto", "message"),
    [
        ("x.bin", "absent.bin", "There is no checkpoint file .*absent.bin"),
        ("x.pt", "janus.bin", r"must end in \.safetensors or \.bin"),
        ("x", "janus.bin", "for which the original must be one, and .*janus.bin is none"),
        ("janus.bin", "janus.bin", "is the original itself"),
        ("shards/model-00001-of-00002.safetensors", "shards", "is the original itself"),
        ("shards", "shards", "is the original itself"),
        ("shards_bin", "shards", "shards_bin exists already: name a new folder"),
        ("x.bin", "small.bin", r"depth 1 \(config: 2\)"),
        ("x.bin", "odd.safetensors", "aligner.layers.0.bias is of type uint16, which .*x.bin cannot hold"),
    ],
)
def test_refusals(tensors, places, trained, tmp_path, export, onto, message):
    folder = places["janus.bin"].parent
    if onto == "small.bin":
        small = {key: tensor for key, tensor in tensors.items() if ".layers.1." not in key or "gen_" in key}
        write(folder / onto, small)
    elif onto == "odd.safetensors":
        write(folder / onto, tensors | {"aligner.layers.0.bias": np.zeros(16, np.uint16)})
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    made = toy_janus.config(
        convert__source=trained[0], convert__export=str(folder / export), convert__onto=str(folder / onto)
    )
    for refuse in (jobs.JOBS["convert"].check, lambda *args: jobs.JOBS["convert"].run(*args[:2])):
        with pytest.raises(RearError, match=message) as caught:
            refuse(made, tmp_path, ())
        assert "\n" not in str(caught.value)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_a_file_that_repeats_its_numbers_without_end_is_refused(tmp_path, monkeypatch):
    """As strides of 0 in a pickle can do it: every tensor is written out."""
    original = write(tmp_path / "a.bin", {"t": np.zeros(9, np.float32)})
    monkeypatch.setattr(spliced, "open_as_written", lambda place: {"t": layout.stand_in((10**15,))})
    with pytest.raises(RearError, match=r"a\.bin is smaller than the weights that it promises"):
        spliced.save(tmp_path / "b.bin", original, {})
    assert not (tmp_path / "b.bin").exists()


def test_a_folder_without_its_config_is_told_so(config, places, tmp_path):
    shutil.copytree(places["shards"], tmp_path / "hub")
    (tmp_path / "hub" / "config.json").unlink()
    with pytest.raises(RearError, match=r"hub has no config\.json beside its weights: download it too, or name "):
        artifacts.read_generator(tmp_path / "hub", config, toy.generator(config), None)


def test_report(places, tmp_path, capsys):
    made = toy_janus.config(convert__source=str(places["janus.bin"]), convert__verify=True)
    jobs.JOBS["convert"].run(made, tmp_path)
    told = capsys.readouterr().out
    assert "a janus of no published size" in told
    assert "code files have no captions, which this generator needs" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_one_tensor_is_held_at_a_time(tmp_path, ending):
    count, size = 24, 2**18
    tensors = {f"t{number}": np.full(size, number, ml_dtypes.bfloat16) for number in range(count)}
    original = write(tmp_path / f"a{ending}", tensors)
    values = {"t3": np.ones(size, np.float32)}
    tracemalloc.start()
    try:
        spliced.save(tmp_path / f"b{ending}", original, values)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * tensors["t0"].nbytes  # of 24
    same(open_weights(tmp_path / f"b{ending}"), tensors | {"t3": np.ones(size, ml_dtypes.bfloat16)})


def test_a_set_of_images_is_truncated_to_8_bits(config):
    """As Janus does it, whatever LlamaGen does with the same tokenizer."""
    network, tokenizer = toy.generator(config), toy.tokenizer(config)
    given = types.SimpleNamespace(module=tokenizer, fingerprint="", decoder_fingerprint="")
    recipe = draw.recipe_of(config, network, given, types.SimpleNamespace(recipe={}), 3)
    assert recipe["eight_bit"] == "truncate"
