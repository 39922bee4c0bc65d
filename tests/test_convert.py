"""Published files in and out: detection, refusals, init_from, export, the parity report, and resuming from each."""

import json
import pathlib

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from rear_jax import artifacts, jobs
from rear_jax.errors import RearError
from rear_jax.generators.layers import PROJECTOR_KEYS
from rear_jax.runtime.checkpoints import Checkpoints
from tests import toy

BARE = {"method__name": "ar"}  # a config without projectors


def stored(folder: pathlib.Path):
    """All parameters of the newest checkpoint, as saved."""
    step = Checkpoints(folder, keep=1).latest_step()
    return ocp.PyTreeCheckpointer().restore(folder.resolve() / str(step) / "state")["params"]


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    """The toy generator and tokenizer as .safetensors and .bin files with the authors' keys."""
    folder = tmp_path_factory.mktemp("files")
    for kind in ("generator", "tokenizer"):
        for name in (f"{kind}.safetensors", f"{kind}.bin"):
            toy.run(folder, "convert", convert__source=str(trained / kind), convert__export=str(folder / name))
    return folder


def test_exported_keys_are_the_authors(files):
    generator, tokenizer = (load_file(files / f"{kind}.safetensors") for kind in ("generator", "tokenizer"))
    assert generator["blocks.1.attn.qkv.weight"].shape == (48, 16)
    assert {"encode_align_mlp.4.weight", "decode_align_mlp.0.bias", "adaln_before_head.adaLN_modulation.1.weight"} <= {
        *generator
    }
    assert tokenizer["quantize.embedding.weight"].shape == (16, 4)
    assert tokenizer["encoder.down.0.block.0.conv1.weight"].shape == (8, 8, 3, 3)


@pytest.mark.parametrize("kind", ["generator", "tokenizer"])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_out_and_in_again_bit_for_bit(trained, files, tmp_path, kind, ending):
    toy.run(tmp_path, "convert", convert__source=str(files / f"{kind}.{ending}"))
    before, after = stored(trained / kind), stored(tmp_path / "converted")
    assert jax.tree.structure(before) == jax.tree.structure(after)
    chex.assert_trees_all_equal(before, after)


@pytest.mark.slow
def test_samples_of_a_file_a_converted_folder_and_the_training_folder_agree(trained, files, tmp_path):
    common = {"tokenizer_from": str(trained / "tokenizer")}
    toy.run(tmp_path, "convert", convert__source=str(files / "generator.safetensors"))
    places = [files / "generator.safetensors", tmp_path / "converted", trained / "generator"]
    drawn = []
    for i, place in enumerate(places):
        (tmp_path / str(i)).mkdir()
        toy.run(tmp_path / str(i), "sample", init_from=str(place), **common)
        drawn.append(np.load(tmp_path / str(i) / "samples.npz")["arr_0"])
    np.testing.assert_array_equal(drawn[0], np.load(trained / "samples.npz")["arr_0"])
    np.testing.assert_array_equal(drawn[1], drawn[0])
    np.testing.assert_array_equal(drawn[2], drawn[0])


def first_loss(workdir: pathlib.Path) -> float:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return next(line["cross_entropy"] for line in lines if line["job"] == "train")


@pytest.mark.slow
def test_training_goes_on_from_a_file(trained, files, tmp_path):
    common = {
        "tokenizer_from": str(trained / "tokenizer"),
        "codes_from": str(trained / "codes"),
        "train__optimizer__warmup_steps": 100,
    }
    for name in ("fresh", "further"):
        (tmp_path / name).mkdir()
    toy.run(tmp_path / "fresh", "train", **common)
    toy.run(tmp_path / "further", "train", init_from=str(files / "generator.safetensors"), **common)
    assert first_loss(tmp_path / "further") < first_loss(tmp_path / "fresh")


@pytest.mark.slow
def test_a_file_without_projectors_starts_them_afresh(trained, files, tmp_path):
    tensors = {k: v for k, v in load_file(files / "generator.safetensors").items() if "align_mlp" not in k}
    save_file(tensors, tmp_path / "rar.safetensors")
    toy.run(
        tmp_path,
        "train",
        init_from=str(tmp_path / "rar.safetensors"),
        tokenizer_from=str(trained / "tokenizer"),
        codes_from=str(trained / "codes"),
    )
    assert set(PROJECTOR_KEYS) < set(stored(tmp_path / "generator"))


@pytest.mark.slow
def test_projectors_are_left_out_where_the_method_has_none(trained, files, tmp_path):
    common = {"tokenizer_from": str(trained / "tokenizer"), **BARE}
    toy.run(tmp_path, "sample", init_from=str(files / "generator.safetensors"), **common)
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npz")["arr_0"], np.load(trained / "samples.npz")["arr_0"])


@pytest.mark.slow
def test_a_converted_file_without_projectors_serves_rear_too(trained, files, tmp_path):
    tensors = {k: v for k, v in load_file(files / "generator.safetensors").items() if "align_mlp" not in k}
    save_file(tensors, tmp_path / "rar.safetensors")
    toy.run(tmp_path, "convert", convert__source=str(tmp_path / "rar.safetensors"), **BARE)
    toy.run(tmp_path, "sample", init_from=str(tmp_path / "converted"), tokenizer_from=str(trained / "tokenizer"))
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npz")["arr_0"], np.load(trained / "samples.npz")["arr_0"])


@pytest.mark.slow
def test_fine_tuning_a_tokenizer_starts_from_it(files, tmp_path):
    source = str(files / "tokenizer.safetensors")
    toy.run(
        tmp_path,
        "tokenizer",
        tokenizer_training__init_from=source,
        tokenizer_training__optimizer__learning_rate=0.0,
        tokenizer_training__optimizer__final_learning_rate=0.0,
        tokenizer_training__revive_below=0.0,
    )
    config = toy.config()
    want = artifacts.read_tokenizer(pathlib.Path(source), config, toy.tokenizer(config))
    chex.assert_trees_all_equal(want, stored(tmp_path / "tokenizer")["tokenizer"])


def refused_by_check_and_job(workdir: pathlib.Path, message: str, **changes) -> None:
    """Both say it; the check knows no more than headers."""
    convert = jobs.JOBS["convert"]
    for refuse in (
        lambda: convert.check(toy.config(**changes), workdir, ()),
        lambda: toy.run(workdir, "convert", **changes),
    ):
        with pytest.raises(RearError) as caught:
            refuse()
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("", {}, "convert.source is empty"),
        ("/nonexistent.safetensors", {}, "/nonexistent.safetensors"),
        ("generator", {"model__width": 32}, "width 16 (config: 32)"),
        (
            "generator",
            {"model__width": 32, "model__mlp_width": 64},
            "use that network's config, or set --config.model.width=16 --config.model.mlp_width=32.",
        ),
        (
            "tokenizer",
            {"tokenizer__channel_mult": (1, 2, 1, 1)},
            "config, or set '--config.tokenizer.channel_mult=(1, 1, 1, 1)'.",
        ),
        ("generator", {"model__depth": 3}, "depth 2 (config: 3)"),
        ("generator", {"data__num_classes": 5}, "has 10 classes, config.data.num_classes = 5: set it to 10."),
        ("tokenizer", {"tokenizer__codebook_size": 32}, "codebook_size 16 (config: 32)"),
    ],
)
def test_refusals(files, tmp_path, source, changes, message):
    place = str(files / f"{source}.safetensors") if source.isalpha() else source
    refused_by_check_and_job(tmp_path, message, convert__source=place, **changes)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.bias"), "1 missing: lm_head.bias"),
        (lambda t: t.update(extra=np.zeros(3)), "1 unexpected: extra"),
        (lambda t: t.update({"lm_head.bias": np.zeros(7, np.float32)}), "lm_head.bias (7,), wanted (16,)"),
    ],
    ids=["missing", "unexpected", "misshaped"],
)
def test_nothing_is_loaded_partially(files, tmp_path, change, message):
    tensors = load_file(files / "generator.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    refused_by_check_and_job(tmp_path, message, convert__source=str(tmp_path / "x.safetensors"))
    assert not (tmp_path / "converted").exists()


def test_a_foreign_file_is_named_so(tmp_path):
    save_file({"conv.weight": np.zeros((2, 2), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(RearError, match=r"no checkpoint of a network known here.*conv\.weight"):
        toy.run(tmp_path, "convert", convert__source=str(tmp_path / "x.safetensors"))


def test_kinds_do_not_mix(files, tmp_path, trained):
    with pytest.raises(RearError, match=r"holds a generator \(rar\), not a tokenizer"):
        toy.run(tmp_path, "tokenize", tokenizer_from=str(files / "generator.safetensors"))
    with pytest.raises(RearError, match=r"holds a tokenizer \(maskgit_vqgan\), not a generator"):
        toy.run(
            tmp_path,
            "sample",
            init_from=str(files / "tokenizer.safetensors"),
            tokenizer_from=str(trained / "tokenizer"),
        )


def test_a_converted_folder_is_not_overwritten(files, tmp_path):
    toy.run(tmp_path, "convert", convert__source=str(files / "tokenizer.safetensors"))
    with pytest.raises(RearError, match="holds a converted checkpoint already"):
        toy.run(tmp_path, "convert", convert__source=str(files / "generator.safetensors"))
    with pytest.raises(RearError, match="converted already"):
        toy.run(tmp_path, "convert", convert__source=str(tmp_path / "converted"))


@pytest.mark.parametrize("name", ["x.pt", "x"])
def test_names_to_export_to_that_say_no_form_are_refused_before_anything_is_written(files, tmp_path, name):
    source = str(files / "tokenizer.safetensors")
    with pytest.raises(RearError, match=rf"export = '{tmp_path}/x.*must end in \.safetensors or \.bin"):
        toy.run(tmp_path, "convert", convert__source=source, convert__export=f"{tmp_path}/{name}")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_report_of_a_tokenizer(files, tmp_path, capsys):
    toy.run(tmp_path, "convert", convert__source=str(files / "tokenizer.safetensors"), convert__verify=True)
    told = capsys.readouterr().out
    assert "codebook usage, 256 images" in told
    assert "dB" in told
    assert not (tmp_path / "converted").exists()


def test_report_of_a_generator(trained, files, tmp_path, capsys):
    source = str(files / "generator.safetensors")
    toy.run(tmp_path, "convert", convert__source=source, convert__verify=True, codes_from=str(trained / "codes"))
    told = capsys.readouterr().out
    assert "next-code loss, 256 sequences" in told
    assert "below 2.77" in told
    toy.run(tmp_path, "convert", convert__source=source, convert__verify=True)
    assert "not measured" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(files, tmp_path, bad):
    tensors = load_file(files / "tokenizer.safetensors")
    tensors["decoder.conv_out.bias"][0] = bad
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(RearError, match=r"x\.safetensors: decoder\.conv_out\.bias is not finite"):
        toy.run(tmp_path, "convert", convert__source=str(tmp_path / "x.safetensors"))
