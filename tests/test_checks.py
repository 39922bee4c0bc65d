"""Checks come before work: a fault in the last job is told before the first one starts, and nothing is written."""

import dataclasses
import gc
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from rear_jax import generators, jobs, main, tokenizers
from rear_jax.data.codes_header import CodesHeader, as_json
from rear_jax.data.sources import split_facts
from rear_jax.errors import RearError
from rear_jax.evaluation import reference
from rear_jax.runtime import determinism
from rear_jax.runtime.atomic import write_json
from rear_jax.runtime.checkpoints import Checkpoints
from rear_jax.weights import safetensors_file
from tests import toy

ALL = ("tokenizer", "tokenize", "train", "posttrain", "sample", "evaluate")
UP_TO = {name: ALL[: place + 1] for place, name in enumerate(ALL)}


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    """No job runs."""

    def never(config, workdir):
        pytest.fail("a job ran before all checks had passed")

    for name, job in jobs.JOBS.items():
        monkeypatch.setitem(jobs.JOBS, name, dataclasses.replace(job, run=never))


def published(file: pathlib.Path, network, family) -> None:
    """A file with the authors' key names and parameters that are all zero."""
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), family.shapes(network))
    safetensors_file.save(file, params, family.layout.torch_name)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files that faults refer to."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("a", "b", "c", "d"):
        (folder / "images" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(folder / "images" / "train" / name / "0.png")
    small, wide = toy.config(), toy.config(model__width=32, model__mlp_width=64)
    for name, made in {"small": small, "wide": wide}.items():
        network = toy.generator(made)
        published(folder / f"{name}.safetensors", network, generators.family_of(network))
    network = toy.tokenizer(small)
    published(folder / "tokenizer.safetensors", network, tokenizers.family_of(network))
    other = toy.tokenizer(toy.config(tokenizer__z_channels=8))
    published(folder / "other_tokenizer.safetensors", other, tokenizers.family_of(other))
    np.savez(folder / "reference.npz", arr_0=np.zeros((40, 24, 24, 3), np.uint8))
    (folder / "codes.jsonl").write_text('{"class_id": 1, "tokens": [1, 2, 3]}\n')
    np.savez(folder / "codes.npz", codes=np.zeros((5, 2, 16), np.int32), labels=np.zeros(5, np.float32))
    (folder / "weights.pth").write_bytes(b"no checkpoint")
    return folder


FOLDER = {"data__source": "folder", "data__path": "FILES/images", "data__train_split": "train"}
POST = {"posttrain__reward__perceptual": 0.0, "sample__stage": "posttrain"}
FAULTS = [  # the jobs, a fault of the last of them, and what is said
    # settings
    (("tokenizer", "scores"), {}, "unknown job 'scores'"),
    (("tokenizer", "train"), {"method__noise_schedule": "cosine"}, "annealed"),
    (("tokenizer", "train"), {"model__heads": 3}, "not divisible"),
    (("tokenizer", "tokenize"), {"codes__augmentation": "tencrop"}, "ten_crop"),
    (("tokenizer", "tokenize"), {"codes__batch_size": 0}, "config.codes.batch_size = 0: give a whole number of 1"),
    (("tokenizer", "train"), {"codes__max_corrupt_share": 1.0}, "max_corrupt_share"),
    (("tokenizer", "train"), {"train__loop__log_every": 0}, "config.train.loop.log_every = 0: give"),
    (UP_TO["posttrain"], POST | {"posttrain__loop__keep_every": 7}, "posttrain: loop.keep_every = 7 is no multiple"),
    (UP_TO["posttrain"], POST | {"posttrain__method": "ppo"}, "va_pi"),
    (UP_TO["posttrain"], POST | {"posttrain__noise_rate": 2.0}, "give a number of 0 to 1"),
    (UP_TO["posttrain"], POST | {"posttrain__group": 1}, "at least 2 samples"),
    (UP_TO["posttrain"], POST | {"posttrain__reward__mse": 0.0}, "all 0"),
    (UP_TO["posttrain"], POST | {"posttrain__augmentation": "ten_crop"}, "unknown augmentation 'ten_crop'"),
    (("tokenizer", "train", "sample"), {"sample__guidance": "cosine"}, "power_cosine"),
    (("tokenizer", "train", "sample"), {"sample__stage": "newest"}, "use one of train, best, posttrain"),
    (("tokenizer", "train", "sample"), {"sample__use_ema": True}, "no moving average"),
    (("tokenizer", "train", "sample"), {"sample__stage": "best"}, "generator_best does not exist"),
    (UP_TO["evaluate"], {"evaluate__network": "vgg"}, "lite0"),
    (UP_TO["evaluate"], {"evaluate__kid_subset_size": 1}, "kid_subset_size = 1"),
    (UP_TO["evaluate"], {"sample__num_images": 1}, "needs 2 images or more"),
    (("tokenizer", "sweep"), {}, "a sweep needs points"),
    (("tokenizer", "plan"), {"plan__topology": "v9:1"}, "config.plan.topology = 'v9:1'"),
    (("tokenizer", "train", "plan"), {"plan__topology": "h100:3"}, "choose a multiple of 3"),
    # files that are missing, or of another kind or size
    (("tokenizer", "tokenize"), {"tokenizer_from": "FILES/none.bin"}, "none.bin does not exist"),
    (("tokenizer", "tokenize"), {"tokenizer_from": "FILES/small.safetensors"}, "holds a generator"),
    (("tokenizer", "tokenize"), {"tokenizer_from": "FILES/other_tokenizer.safetensors"}, "z_channels 8 (config: 4)"),
    (("tokenizer", "tokenize", "train"), {"init_from": "FILES/none.bin"}, "none.bin does not exist"),
    (("tokenizer", "tokenize", "train"), {"init_from": "FILES/wide.safetensors"}, "width 32 (config: 16)"),
    (("tokenizer", "sample"), {"init_from": "FILES/wide.safetensors"}, "width 32 (config: 16)"),
    (("tokenizer", "train"), {"codes_from": "FILES/none"}, "holds no codes"),
    (("tokenizer", "sample"), {}, "generator does not exist: run --job=train first"),
    (("sample",), {}, "tokenizer does not exist: run --job=tokenizer first"),
    (("tokenizer", "train", "sample"), {"sample__stage": "posttrain"}, "run --job=posttrain first"),
    (("tokenizer", "evaluate"), {"evaluate__tokenizer": False}, "run --job=sample first"),
    (UP_TO["evaluate"], {"evaluate__network": "inception"}, "give config.evaluate.inception"),
    (
        UP_TO["evaluate"],
        {"evaluate__network": "inception", "evaluate__inception": "FILES/none.pth"},
        "no checkpoint file",
    ),
    (
        UP_TO["evaluate"],
        {"evaluate__network": "inception", "evaluate__inception": "FILES/weights.pth"},
        "not a whole checkpoint",
    ),
    (UP_TO["evaluate"], {"evaluate__reference": "FILES/none.npz"}, "none.npz does not exist"),
    (
        UP_TO["evaluate"],
        {"evaluate__reference": "FILES/reference.npz"},
        "32x32 pixels do not compare with reference.npz",
    ),
    (UP_TO["posttrain"], {"posttrain__perceptual_network": "lpips"}, "give config.lpips.vgg16"),
    (UP_TO["evaluate"], {"lpips__vgg16": "FILES/none.pth", "lpips__heads": "FILES/none.pth"}, "no checkpoint file"),
    (UP_TO["posttrain"], POST | {"posttrain__reward__discriminator": 1.0}, "has no discriminator"),
    (
        UP_TO["posttrain"],
        POST | {"posttrain__reward__class_probability": 1.0, "posttrain__probe_images": 9},
        "looks at 9 images",
    ),
    (("tokenizer", "convert"), {}, "config.convert.source is empty"),
    (("tokenizer", "convert"), {"convert__source": "FILES/none.bin"}, "no checkpoint file"),
    (("tokenizer", "convert"), {"convert__source": "FILES/wide.safetensors"}, "width 32 (config: 16)"),
    (
        ("tokenizer", "convert"),
        {"convert__source": "FILES/small.safetensors", "convert__export": "a.onnx"},
        "must end in .safetensors or .bin",
    ),
    (("tokenizer", "convert"), {"convert__source": "WORKDIR/tokenizer"}, "is converted already"),
    (("tokenizer", "import"), {}, "config.import_codes.source is not given"),
    (("tokenizer", "import"), {"import_codes__source": "FILES/codes.jsonl"}, "line 1: wanted 16 integers"),
    (("tokenizer", "import"), {"import_codes__source": "FILES/codes.npz"}, "labels are float32, not integers"),
    # images and their labels
    (("plan", "tokenizer"), FOLDER | {"data__eval_split": "train", "data__num_classes": 3}, "has 4 classes"),
    (
        ("tokenizer", "tokenize"),
        FOLDER | {"data__num_classes": 3, "tokenizer_from": "FILES/tokenizer.safetensors"},
        "4",
    ),
    (("plan", "tokenizer"), FOLDER | {"data__eval_split": "test"}, "has no folder 'test'"),
    (UP_TO["posttrain"], POST | {"data__eval_split": "validation"}, "validation"),
    (("tokenizer", "evaluate"), {"data__eval_split": "validation"}, "validation"),
    (
        ("tokenizer", "train"),
        FOLDER | {"data__num_classes": 3, "codes__on_the_fly": True},
        "has 4 classes",
    ),
]


def filled(changes: dict, files: pathlib.Path, workdir: pathlib.Path) -> dict:
    """Settings with the places of files."""
    places = {"FILES": str(files), "WORKDIR": str(workdir)}

    def place(value):
        head, slash, rest = value.partition("/") if isinstance(value, str) else ("", "", "")
        return f"{places[head]}/{rest}" if slash and head in places else value

    return {name: place(value) for name, value in changes.items()}


def pass_all_but_the_last(monkeypatch, names: tuple[str, ...]) -> None:
    """Only the last job's check can refuse."""
    for name in names[:-1]:
        monkeypatch.setitem(jobs.JOBS, name, dataclasses.replace(jobs.JOBS[name], check=lambda *_: None))


def refused(names, config, workdir: pathlib.Path) -> str:
    """What is said of a command that is refused; it writes nothing."""
    before = sorted(workdir.rglob("*"))
    with pytest.raises(RearError) as caught:
        jobs.run_all(names, config, workdir)
    assert sorted(workdir.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("names", "changes", "message"), FAULTS)
def test_a_fault_in_the_last_job_is_told_before_the_first_starts(tmp_path, files, monkeypatch, names, changes, message):
    pass_all_but_the_last(monkeypatch, names)
    config = toy.config(**filled(changes, files, tmp_path))
    assert message in refused(names, config, tmp_path)


@pytest.mark.parametrize(
    ("names", "changes", "setting"),
    [
        (("tokenize", "tokenizer"), {}, "tokenizer_training.loop.batch_size = 8"),
        (("tokenizer", "train"), {"tokenizer_training__loop__batch_size": 256}, "train.loop.batch_size = 8"),
        (UP_TO["posttrain"], POST | {"posttrain__loop__batch_size": 128}, "posttrain.loop.batch_size = 128"),
        (UP_TO["sample"], {"sample__batch_size": 128}, "sample.batch_size = 128"),
    ],
)
def test_batches_on_256_devices(tmp_path, monkeypatch, names, changes, setting):
    monkeypatch.setattr("jax.device_count", lambda: 256)
    pass_all_but_the_last(monkeypatch, names)
    told = refused(names, toy.config(**changes), tmp_path)
    assert told.startswith(f"config.{setting} does not divide")
    assert "256 device(s)" in told


@pytest.mark.slow
def test_captions_that_are_missing_or_too_few(tmp_path):
    changes = {"condition": "text", "caption_length": 3, "caption_dim": 2}
    config = toy.llamagen_config(**changes)
    published(tmp_path / "text.safetensors", toy.generator(config), generators.family_of(toy.generator(config)))
    config.init_from = str(tmp_path / "text.safetensors")
    config.posttrain.reward.perceptual = 0.0
    config.posttrain.loop.batch_size = 8
    assert "config.sample.captions = ''" in refused(("tokenizer", "sample"), config, tmp_path)
    np.savez(tmp_path / "captions.npz", features=np.zeros((3, 3, 2), np.float32), mask=np.ones((3, 3)))
    config.captions_from = str(tmp_path / "captions.npz")
    assert "has 3 captions" in refused(("tokenizer", "posttrain"), config, tmp_path)
    config.captions_from = str(tmp_path / "none.npz")
    assert "config.captions_from = " in refused(("tokenizer", "posttrain"), config, tmp_path)
    assert "config.captions_from = " in refused(("tokenizer", "tokenize", "train"), config, tmp_path)
    config.captions_from = ""
    assert "run --job=caption first" in refused(("tokenizer", "tokenize", "train"), config, tmp_path)


def study(variants, **changes) -> ConfigDict:
    """The toy experiment as a study."""
    config = toy.config(method__name="ar", posttrain__reward__perceptual=0.0, sample__stage="posttrain", **changes)
    config.posttrain.loop.update(steps=2, batch_size=8)
    config.study.seeds = (0, 1)
    with config.study.unlocked():
        config.study.variants = ConfigDict(variants)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variants", "changes", "message"),
    [
        ({"typo": {"posttrain": {"grup": 4}}}, {}, "config has no setting 'posttrain.grup'"),
        ({"both": {}, "one": {"posttrain": {"group": 1}}}, {}, "at least 2 samples"),
        ({"both": {}}, {"study__variant_jobs": ("posttrain", "sweep")}, "a sweep needs points"),
        ({"both": {}}, {"study__variant_jobs": ("sample", "evaluate")}, "must begin with a training job"),
        ({"both": {}}, {"study__variant_jobs": ("posttrain",)}, "must score samples"),
        ({"both": {}}, {"study__jobs": ()}, "seed_0/both/generator does not exist"),
        ({"both": {"posttrain": {"loop": {"checkpoint_every": 0}}}}, {}, "loop.checkpoint_every = 0"),
    ],
)
def test_a_study_checks_its_variants(tmp_path, variants, changes, message):
    assert message in refused(("tokenizer", "tokenize", "study"), study(variants, **changes), tmp_path)


@pytest.mark.slow
def test_a_study_whose_jobs_make_all_that_they_need_passes(tmp_path):
    jobs.check_all(("tokenizer", "tokenize", "study"), study({"both": {}, "none": {}}), tmp_path)
    with pytest.raises(RearError, match="tokenizer does not exist"):
        jobs.check_all(("study",), study({"both": {}}), tmp_path)


@pytest.mark.slow
def test_what_is_there_already_is_looked_at(tmp_path):
    """A checkpoint and codes of other settings, of which only headers can be read."""
    record = toy.config(model__depth=3).to_dict() | {"holds": "generator", "tokenizer_fingerprint": "f00"}
    checkpoints = Checkpoints(tmp_path / "generator", keep=1)
    checkpoints.save(1, {"params": {"x": jnp.zeros(1)}}, record)
    checkpoints.close()
    assert "model.depth (was 3, now 2)" in refused(("tokenizer", "tokenize", "train"), toy.config(), tmp_path)
    told = refused(("tokenizer", "tokenize", "train"), toy.config(model__depth=3), tmp_path)
    assert "holds another state than this config makes" in told
    assert "model.depth (was 3, now 2)" in refused(("tokenizer", "sample"), toy.config(), tmp_path)
    assert "holds other parameters" in refused(("tokenizer", "sample"), toy.config(model__depth=3), tmp_path)


@pytest.mark.slow
def test_what_an_earlier_job_makes_is_not_looked_for(tmp_path, monkeypatch, files):
    """Networks of this workdir, by a path from the current folder; the earlier job's own check is another matter."""
    monkeypatch.chdir(tmp_path)
    given = {"init_from": "converted", "tokenizer_from": str(files / "tokenizer.safetensors")}
    jobs.check_all(("sample",), toy.config(**given | {"init_from": str(files / "small.safetensors")}), tmp_path)
    assert "converted does not exist" in refused(("sample",), toy.config(**given), tmp_path)
    pass_all_but_the_last(monkeypatch, ("convert", "sample"))
    jobs.check_all(("convert", "sample"), toy.config(**given), tmp_path)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    names = ("tokenizer", "tokenize", "train", "convert")
    exported = {"convert__source": "generator", "convert__export": "a.onnx"}
    assert "must end in .safetensors" in refused(names, toy.config(**exported), tmp_path)
    jobs.check_all(names, toy.config(**exported | {"convert__export": "a.bin"}), tmp_path)
    decoder = POST | {"posttrain__method": "tokenizer", "posttrain__loop__batch_size": 8}
    jobs.check_all(UP_TO["sample"], toy.config(**decoder), tmp_path)
    watched = {"sample__stage": "best", "train__evaluate_every": 12, "train__evaluate_images": 20}
    jobs.check_all(("tokenizer", "tokenize", "train", "sample"), toy.config(**watched), tmp_path)


@pytest.mark.slow
def test_only_headers_are_read_and_nothing_is_placed_on_a_device(tmp_path, monkeypatch, files):
    def read(*_):
        pytest.fail("a check read more than headers")

    for place in ("torch_files._SafeTensors.__getitem__", "torch_files._TorchTensors.__getitem__"):
        monkeypatch.setattr(f"rear_jax.weights.{place}", read)
    monkeypatch.setattr("rear_jax.data.imports.line_bounds", read)
    (tmp_path / "good.jsonl").write_text(
        '{"class_id": 1, "tokens": [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6]}\n'
    )
    config = toy.config(
        tokenizer_from=str(files / "tokenizer.safetensors"),
        init_from=str(files / "small.safetensors"),
        import_codes__source=str(tmp_path / "good.jsonl"),
        convert__source=str(files / "small.safetensors"),
        posttrain__reward__perceptual=0.0,  # whose network is read: its files are small
        posttrain__loop__batch_size=8,
    )
    gc.collect()
    arrays = len(jax.live_arrays())
    jobs.check_all(("import", "train", "posttrain", "convert", "sample"), config, tmp_path)
    gc.collect()
    assert len(jax.live_arrays()) == arrays
    monkeypatch.undo()
    with jax.transfer_guard("disallow_explicit"):
        assert reference.outline_network(config.evaluate).extractor.name == "EffNetLite2@32"


@pytest.mark.slow
def test_codes_of_another_plan(tmp_path):
    header = CodesHeader(2000, 1, "center", 16, 16, 32, 10, "f00", "fashion_mnist", "test", 4)
    (tmp_path / "codes").mkdir()
    write_json(tmp_path / "codes" / "header.json", as_json(header))
    assert "begun with num_augmentations 1, not 2" in refused(ALL[:2], toy.config(), tmp_path)
    assert "before codes noted" in refused(ALL[:2], toy.config(codes__augmentation="center"), tmp_path)
    write_json(tmp_path / "codes" / "header.json", as_json(dataclasses.replace(header, images="0" * 15)))
    assert "codes of other images" in refused(ALL[:2], toy.config(codes__augmentation="center"), tmp_path)
    images = split_facts(toy.config().data, toy.config().data.train_split).contents
    write_json(tmp_path / "codes" / "header.json", as_json(dataclasses.replace(header, images=images)))
    jobs.check_all(ALL[:2], toy.config(codes__augmentation="center"), tmp_path)  # whatever the fingerprint


def test_every_job_is_checked_in_order_before_any_runs(tmp_path, monkeypatch):
    done = []

    def note(name):
        return jobs.job.Job(
            lambda config, workdir: done.append(name),
            lambda config, workdir, before: done.append((name, before)),
        )

    names = tuple(jobs.JOBS)
    for name in names:
        monkeypatch.setitem(jobs.JOBS, name, note(name))
    jobs.run_all(names, toy.config(), tmp_path)
    assert done == [*((name, names[:place]) for place, name in enumerate(names)), *names]


def test_a_dry_run_of_the_quickstart_says_what_would_run(tmp_path):
    command = [sys.executable, "-m", "rear_jax.main", "--config=configs/quickstart.py", f"--workdir={tmp_path}"]
    done = subprocess.run(
        [*command, "--dry_run"], env=toy.environment(), cwd=toy.ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"dry run: {', '.join(ALL)} would run in {tmp_path}")
    assert [file.name for file in tmp_path.iterdir()] == ["log.txt"]


@pytest.mark.slow
def test_five_jobs_with_a_fault_in_the_last_end_before_any_work(tmp_path):
    flags = ["--job=tokenizer,tokenize,train,sample,evaluate", "--config.evaluate.reference=none.npz"]
    done = toy.finish(tmp_path, *flags)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: none.npz does not exist")
    assert [file.name for file in tmp_path.iterdir()] == ["log.txt"]


def test_the_help_text_tells_of_the_dry_run():
    assert "run nothing" in main.flags.FLAGS["dry_run"].help


@pytest.mark.slow
def test_a_deterministic_run_tells_xla_and_the_log(tmp_path):
    """XLA ends a process that has a flag which it does not know."""
    done = toy.finish(tmp_path, "--job=tokenizer", "--dry_run", "--deterministic")
    assert done.returncode == 0, done.stderr
    assert "deterministic: XLA runs with --xla_gpu_deterministic_ops=true" in (tmp_path / "log.txt").read_text()


def test_xla_flags_that_are_there_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    determinism.ask_for()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false --xla_gpu_deterministic_ops=true"
