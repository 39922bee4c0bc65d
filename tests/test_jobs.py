"""The jobs in turn at toy size: what they leave, what they refuse, and that a second run changes nothing."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from rear_jax import jobs
from rear_jax.errors import RearError
from rear_jax.jobs import tokenize
from rear_jax.runtime.writer import read_metrics
from tests import toy


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    """A copy in which jobs may run: other workers read the original."""
    return shutil.copytree(trained, tmp_path_factory.mktemp("jobs") / "run")


def test_every_job_leaves_what_it_promises(trained):
    for name in ("reconstructions.png", "samples.png", "samples.npz", "samples.json", "metrics.jsonl"):
        assert (trained / name).stat().st_size > 0, name
    assert any((trained / "tensorboard" / "train").glob("events*"))
    assert len(list((trained / "codes").glob("*.array_record"))) == 4
    header = json.loads((trained / "codes" / "header.json").read_text())
    assert (header["codebook_size"], header["codes_per_image"], header["num_images"]) == (16, 16, 2000)
    with np.load(trained / "samples.npz") as file:
        assert file["arr_0"].shape == (24, 32, 32, 3)
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["labels"], np.arange(24) % 10)
    assert Image.open(trained / "samples.png").size == (5 * (2 * 65 - 1 + 2) - 2, 2 * (64 + 17) + 2)


def test_metrics_are_logged_for_every_step_once(trained):
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["job"] == "tokenizer"] == [2, 3, 4, 6]
    assert [r["step"] for r in records if r["job"] == "train"] == [3, 4, 6, 8, 9, 12]
    wanted = {"loss", "cross_entropy", "correct_codes", "shallow", "deep", "noise", "gradient_norm", "learning_rate"}
    assert wanted <= records[-1].keys()


@pytest.mark.parametrize("share", [pytest.param(0.001, marks=pytest.mark.slow), 0.0])
def test_training_passes_over_corrupt_records_or_stops(trained, tmp_path, share):
    """Eight flipped bytes among 4000 records: counted in the metrics, or, where none may be, the end."""
    shutil.copytree(trained / "codes", tmp_path / "codes")
    shard = tmp_path / "codes" / "codes-00002-of-00004.array_record"
    content = bytearray(shard.read_bytes())
    content[40_000:40_008] = bytes(byte ^ 0xFF for byte in content[40_000:40_008])
    shard.write_bytes(content)
    changes = {"tokenizer_from": str(trained / "tokenizer"), "codes__max_corrupt_share": share}
    if share:
        toy.run(tmp_path, "train", **changes)
        assert [r["corrupt_records"] for r in read_metrics(tmp_path, "train")] == [1] * 6
    else:
        with pytest.raises(RearError, match=r"codes-00002-of-00004\.array_record, record \d+: .*1 of 4000 records"):
            toy.run(tmp_path, "train", **changes)


@pytest.mark.slow
def test_second_run_is_done_already(workdir):
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and "tensorboard" not in p.parts}
    toy.run(workdir, "tokenizer", "tokenize", "train", "sample")
    after = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and "tensorboard" not in p.parts}
    changed = {p for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
    assert changed <= {workdir / "reconstructions.png"}


def test_evaluate_scores_and_reports(trained, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(trained, workdir)
    toy.run(workdir, "evaluate")
    result = json.loads((workdir / "scores.json").read_text())
    by_name = {name: values["FD-EffNetLite2@32"] for name, values in result["scores"].items()}
    samples, floor, decoded = by_name.values()
    assert 0 < floor < decoded
    assert floor < samples
    report = (workdir / "report.md").read_text()
    for needed in ("FD-EffNetLite2@32", "not FID", "guidance_scale", "curves_train.png", "samples.png", "versions"):
        assert needed in report
    assert (workdir / "curves_train.png").exists()
    stamp = (workdir / "scores.json").stat().st_mtime_ns
    toy.run(workdir, "evaluate")
    assert (workdir / "scores.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("job", "changes", "message"),
    [
        ("tokenizer", {"tokenizer__z_channels": 8}, "tokenizer.z_channels (was 4, now 8)"),
        ("tokenizer", {"data__image_size": 33}, "33"),
        ("tokenizer", {"tokenizer__name": "vqgan"}, "maskgit_vqgan"),
        ("tokenizer", {"data__source": "folder", "data__path": "/nonexistent"}, "/nonexistent"),
        ("tokenizer", {"data__source": "imagenet"}, "fashion_mnist"),
        ("tokenize", {"data__num_classes": 9}, "9"),
        ("tokenize", {"codes__augmentation": "ten_crop"}, "augmentation"),
        ("train", {"model__width": 32}, "model.width (was 16, now 32)"),
        ("train", {"data__num_classes": 11}, "data.num_classes (was 10, now 11)"),
        ("train", {"train__ema_decay": 0.9}, "train.ema_decay (was 0.0, now 0.9)"),
        ("train", {"method__embedding_weight": 0.0}, "method.embedding_weight (was 1.0, now 0.0)"),
        ("tokenizer", {"tokenizer_training__discriminator_weight": 0.1}, "discriminator_weight (was 0.0, now 0.1)"),
        ("train", {"method__deep_layer": 2}, "deep_layer"),
        ("train", {"method__name": "sar"}, "rear"),
        ("train", {"method__noise_schedule": "cosine"}, "annealed"),
        ("train", {"method__projector": "mine"}, "released"),
        ("train", {"method__embedding_reading": "mine"}, "paper"),
        ("train", {"train__accumulation": 3}, "multiple of 3"),
        ("train", {"codes_from": "/nonexistent"}, "tokenize"),
        ("train", {"tokenizer_from": "/nonexistent/file.bin"}, "/nonexistent/file.bin"),
        ("sample", {"model__depth": 3}, "model.depth"),
        ("sample", {"sample__use_ema": True}, "ema_decay"),
        ("sample", {"sample__guidance": "cosine"}, "power_cosine"),
    ],
)
def test_refusals_name_the_thing(workdir, job, changes, message):
    """The check tells what the job itself would."""
    for refuse in (
        lambda: jobs.check_all((job,), toy.config(**changes), workdir),
        lambda: toy.run(workdir, job, **changes),
    ):
        with pytest.raises(RearError) as caught:
            refuse()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_checks_pass_beside_what_was_made_and_leave_it_alone(workdir):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    names = ("tokenizer", "tokenize", "train", "sample", "evaluate")
    jobs.check_all(names, toy.config(), workdir)
    for name in names:
        jobs.check_all((name,), toy.config(), workdir)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_samples_missing_or_damaged(tmp_path, trained):
    with pytest.raises(RearError, match="--job=sample"):
        toy.run(tmp_path, "evaluate", evaluate__tokenizer=False)
    content = (trained / "samples.npz").read_bytes()
    (tmp_path / "samples.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(RearError, match="cannot be read"):
        toy.run(tmp_path, "evaluate")


@pytest.mark.slow
def test_another_tokenizer_fits_neither_the_codes_nor_the_generator(tmp_path, workdir):
    toy.run(tmp_path, "tokenizer", seed=1)
    with pytest.raises(RearError, match="fingerprint"):
        toy.run(tmp_path, "train", seed=1, codes_from=str(workdir / "codes"))
    with pytest.raises(RearError, match="was made with tokenizer"):
        toy.run(workdir, "sample", tokenizer_from=str(tmp_path / "tokenizer"))


@pytest.mark.parametrize("rows", [1, 4, 10, 100])
def test_views_are_encoded_so_many_at_a_time(rows):
    batches = [np.arange(10), np.arange(10, 20), np.arange(20, 25)]
    groups = list(tokenize.regrouped(batches, rows))
    np.testing.assert_array_equal(np.concatenate(groups), np.arange(25))
    assert [len(group) for group in groups] == [rows] * (25 // rows) + [25 % rows] * (25 % rows > 0)


def test_nothing_trained_yet(tmp_path, trained):
    with pytest.raises(RearError, match="--job=tokenizer"):
        toy.run(tmp_path, "tokenize")
    with pytest.raises(RearError, match="--job=train"):
        toy.run(tmp_path, "sample", tokenizer_from=str(trained / "tokenizer"))
