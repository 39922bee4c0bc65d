"""The jobs with LlamaGen generators at toy size: training, and sampling by class and by caption."""

import json
import pickletools
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rear_jax import artifacts, generators, jobs, noise
from rear_jax.errors import RearError
from rear_jax.generators.interface import Captions
from rear_jax.generators.llamagen import FAMILY
from rear_jax.runtime.sharding import decay_mask
from rear_jax.training import objectives
from rear_jax.training.objectives.objective import conditions_with_drops
from rear_jax.training.state import adamw, new_state
from rear_jax.weights import safetensors_file
from rear_jax.weights.torch_files import read_tensors
from tests import toy


@pytest.fixture
def experiment(trained):
    """LlamaGen's toy config on the tokenizer and codes of the trained workdir."""

    def make(**model):
        config = toy.llamagen_config(**model)
        config.tokenizer_from, config.codes_from = str(trained / "tokenizer"), str(trained / "codes")
        config.sample.guidance, config.sample.guidance_scale = "constant", 2.0
        return config

    return make


@pytest.mark.slow
def test_training_and_sampling_by_class(experiment, tmp_path):
    config = experiment()
    jobs.JOBS["train"].run(config, tmp_path)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written[-1]["step"] == config.train.loop.steps
    assert np.isfinite([r["loss"] for r in written]).all()
    sets = []
    for batch_size in (8, 5):
        config.sample.batch_size = batch_size
        (tmp_path / "samples.json").unlink(missing_ok=True)
        jobs.JOBS["sample"].run(config, tmp_path)
        with np.load(tmp_path / "samples.npz") as file:
            sets.append(file["arr_0"])
            np.testing.assert_array_equal(file["labels"], np.arange(24) % 10)
    assert np.abs(sets[0].astype(int) - sets[1]).max() <= 1


@pytest.mark.slow
def test_one_step_by_hand():
    """A step of 'ar' moves what it should by AdamW's first step, and dropped labels are the null label's row."""
    config = toy.llamagen_config(dropout=0.0, token_dropout=0.0)
    config.method.label_drop = 1.0
    config.train.optimizer.warmup_steps = 0
    model = toy.generator(config)
    params = jax.jit(model.init)(jax.random.key(0), *FAMILY.example_inputs(model))["params"]
    params["lm_head"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), params["lm_head"]["kernel"].shape)
    optimizer = adamw(config.train.optimizer, config.train.loop.steps, FAMILY.parameters)
    state = new_state(params, optimizer)
    batch = {"codes": jax.random.randint(jax.random.key(2), (4, 16), 0, 16), "label": jnp.arange(4)}
    step = jax.jit(objectives.train_step(model, config, optimizer))
    new, metrics = step(state, batch, jax.random.key(3), {"codebook": jnp.zeros((16, 4))})
    logits = model.apply({"params": params}, batch["codes"], jnp.full(4, 10)).logits
    log_probabilities = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["codes"][:, :, None], axis=2)
    np.testing.assert_allclose(metrics["loss"], -log_probabilities.mean(), rtol=1e-5)
    rate, decay = config.train.optimizer.learning_rate, config.train.optimizer.weight_decay
    moved = new.params["class_embeddings"] - params["class_embeddings"]
    np.testing.assert_allclose(moved[:10], -rate * decay * params["class_embeddings"][:10], atol=1e-8)
    assert (jnp.abs(moved[10]) > 0.5 * rate).all()  # the null label's row alone has a gradient
    assert noise.drop_labels(jax.random.key(0), batch["label"], model.num_classes, 1.0).tolist() == [10] * 4


def test_weight_decay_is_on_matrices_and_embeddings_alone():
    """As in the authors' optimiser: everything with two axes or more."""
    mask = decay_mask(generators.shapes(toy.generator(toy.llamagen_config())), FAMILY.parameters)
    stacked = mask.pop("blocks")
    assert {name: m["scale"] for name, m in stacked.items() if "norm" in name} == dict.fromkeys(
        ("attention_norm", "mlp_norm"), False
    )
    assert all(m["kernel"] for name, m in stacked.items() if "norm" not in name)
    assert mask == {
        "code_embeddings": True,
        "class_embeddings": True,
        "norm": {"scale": False},
        "lm_head": {"kernel": True},
    }


def published_file(config, path):
    """Writes a generator with random parameters under the authors' key names."""
    model = toy.generator(config)
    params = jax.jit(model.init)(jax.random.key(0), *FAMILY.example_inputs(model))["params"]
    params["lm_head"]["kernel"] = jax.random.normal(jax.random.key(1), params["lm_head"]["kernel"].shape)
    safetensors_file.save(path, params, FAMILY.layout.torch_name)
    return str(path)


@pytest.mark.slow
def test_sampling_by_caption(experiment, tmp_path):
    config = experiment(condition="text", caption_length=4, caption_dim=6)
    config.init_from = published_file(config, tmp_path / "t2i.safetensors")
    with pytest.raises(RearError, match=r"config.sample.captions = ''"):
        jobs.JOBS["sample"].run(config, tmp_path)
    config.sample.captions = str(tmp_path / "captions.npz")
    features = np.random.default_rng(0).normal(size=(3, 4, 6))
    np.savez(config.sample.captions, features=features, mask=np.tril(np.ones((3, 4))))
    config.sample.num_images, config.sample.batch_size = 7, 3
    jobs.JOBS["sample"].run(config, tmp_path)
    with np.load(tmp_path / "samples.npz") as file:
        images, labels = file["arr_0"], file["labels"]
    np.testing.assert_array_equal(labels, [0, 1, 2, 0, 1, 2, 0])
    assert len(np.unique(images.reshape(7, -1), axis=0)) > 1
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.size[0] > 4 * sheet.size[1]  # two samples of each of three captions, all in one row
    recipe = json.loads((tmp_path / "samples.json").read_text())
    assert "captions" in recipe["labels"]

    stamp = (tmp_path / "samples.npz").stat().st_mtime_ns
    jobs.JOBS["sample"].run(config, tmp_path)
    assert (tmp_path / "samples.npz").stat().st_mtime_ns == stamp  # done already
    np.savez(config.sample.captions, features=-features, mask=np.ones((3, 4)))
    jobs.JOBS["sample"].run(config, tmp_path)
    assert json.loads((tmp_path / "samples.json").read_text())["captions"] != recipe["captions"]
    with np.load(tmp_path / "samples.npz") as file:
        assert (file["arr_0"] != images).any()


def write_captions(folder, count=10, seed=0):
    """A folder of captions of one to four features; returns its name."""
    features = np.random.default_rng(seed).normal(size=(count, 4, 6)).astype(np.float32)
    np.save(folder / "features.npy", features)
    np.save(folder / "mask.npy", np.arange(4) <= np.arange(count)[:, None] % 4)
    return str(folder)


@pytest.mark.slow
def test_training_by_caption(experiment, tmp_path):
    """The null caption stays as it was drawn; so does everything where a run is resumed."""
    config = experiment(condition="text", caption_length=4, caption_dim=6)
    with pytest.raises(RearError, match=r"captions/test does not exist: run --job=caption first"):
        jobs.JOBS["train"].run(config, tmp_path)
    (tmp_path / "captions" / "test").mkdir(parents=True)
    write_captions(tmp_path / "captions" / "test")
    jobs.JOBS["train"].run(config, tmp_path)
    params = artifacts.read_generator(tmp_path / "generator", config, toy.generator(config), None)
    fresh = FAMILY.init(toy.generator(config), config.seed)
    np.testing.assert_allclose(params["null_caption"], fresh["null_caption"], atol=1e-7)
    assert (params["caption_fc1"]["kernel"] != fresh["caption_fc1"]["kernel"]).any()

    write_captions(tmp_path, seed=1)
    config.captions_from = str(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    jobs.JOBS["train"].run(config, other)
    with_others = artifacts.read_generator(other / "generator", config, toy.generator(config), None)
    assert (params["lm_head"]["kernel"] != with_others["lm_head"]["kernel"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_one_step_by_caption(drop):
    """Captions condition the prediction; a dropped one keeps its mask, and the null caption has no gradient."""
    config = toy.llamagen_config(
        condition="text", caption_length=4, caption_dim=6, dropout=0.0, token_dropout=0.0, attention="plain"
    )
    config.method.label_drop = drop
    model = toy.generator(config)
    params = jax.jit(lambda: FAMILY.init(model, 0))()
    params["lm_head"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), params["lm_head"]["kernel"].shape)
    mask = jnp.arange(4) >= jnp.array([0, 1, 2, 3])[:, None]
    captions = Captions(jax.random.normal(jax.random.key(4), (4, 4, 6)), mask)
    codes = jax.random.randint(jax.random.key(2), (4, 16), 0, 16)
    batch = {"codes": codes, "label": jnp.arange(4), "number": jnp.arange(4), "condition": captions}
    loss = objectives.OBJECTIVES["ar"].loss(model, config)

    def mean_loss(params):
        return loss(params, batch, jax.random.key(3), progress=0.0, codebook=None)[0]

    found, gradient = jax.jit(jax.value_and_grad(mean_loss))(params)
    null = jnp.broadcast_to(params["null_caption"], captions.features.shape)
    logits = model.apply({"params": params}, codes, Captions(null if drop else captions.features, mask)).logits
    by_hand = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[:, :, None], axis=2)
    np.testing.assert_allclose(found, -by_hand.mean(), rtol=1e-5)
    assert not gradient["null_caption"].any()
    assert gradient["caption_fc1"]["kernel"].any()


@pytest.mark.slow
def test_dropped_captions_do_not_depend_on_the_microbatch():
    config = toy.llamagen_config(condition="text", caption_length=4, caption_dim=6)
    config.method.label_drop = 0.5
    model, key = toy.generator(config), jax.random.key(0)
    params = FAMILY.init(model, 0)
    numbers = jnp.arange(64)
    captions = Captions(jnp.ones((64, 4, 6)), jnp.ones((64, 4), bool))

    def dropped(rows):
        part = {"number": numbers[rows], "condition": jax.tree.map(lambda x: x[rows], captions)}
        given = conditions_with_drops(model, config, params, part, key)
        return np.asarray((given.features != 1).any(axis=(1, 2)))

    whole = dropped(slice(None))
    assert 16 < whole.sum() < 48
    np.testing.assert_array_equal(whole[1::2], dropped(slice(1, None, 2)))


def test_parity_report_of_a_text_generator(experiment, tmp_path, capsys):
    config = experiment(condition="text", caption_length=4, caption_dim=6)
    config.convert.source, config.convert.verify = published_file(config, tmp_path / "t2i.safetensors"), True
    jobs.JOBS["convert"].run(config, tmp_path)
    assert "code files have no captions" in capsys.readouterr().out


def test_a_pickled_file_has_its_state_dict_where_the_authors_code_looks(experiment, tmp_path):
    config = experiment()
    config.convert.source = published_file(config, tmp_path / "c2i.safetensors")
    config.convert.export = str(tmp_path / "c2i.bin")
    jobs.JOBS["convert"].run(config, tmp_path)
    with zipfile.ZipFile(config.convert.export) as archive:
        opcodes = list(pickletools.genops(archive.read("archive/data.pkl")))
    assert next(text for opcode, text, _ in opcodes if opcode.name == "BINUNICODE") == "model"
    before, after = (read_tensors(path) for path in (config.convert.source, config.convert.export))
    assert set(before) == set(after)
    for key, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[key], err_msg=key)
