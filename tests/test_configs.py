"""Every file in configs/: its sizes are the paper's, and it takes a real step at toy width."""

import importlib.util
import pathlib

import jax
import numpy as np
import optax
import pytest

from rear_jax import generators, jobs
from rear_jax.errors import RearError
from rear_jax.runtime.checkpoints import Checkpoints
from rear_jax.text.janus_vocabulary import JanusVocabulary
from rear_jax.training.state import learning_rate, new_state
from tests import toy
from tests.test_janus_vocabulary import tokenizer_json

FILES = sorted((toy.ROOT / "configs").glob("*.py"))
MILLIONS = {  # published sizes, which leave the training-only projectors out
    "ar_s": 218.4,
    "ar_b": 260.9,
    "ar_l": 461.7,
    "alitok_b": 177.0,
    "alitok_l": 317.9,
    "alitok_xl": 662.1,
    "ar_alitok_b": 177.0,
    "rar_alitok_b": 177.3,
    "ar_titok_b64": 265.2,
    "rar_titok_b64": 265.2,
    "llamagen_b": 110.9,
    "llamagen_l": 342.9,
    "llamagen_xl": 774.7,
    "llamagen_xxl": 1411.0,
    "llamagen_xl_t2i": 777.9,  # "775M"
    "va_pi_janus_pro_1b": 1485.1,  # of 2089.3: without the tokenizer and what understands images
    "llamagen_3b_384": 3096.7,  # "3.1B"
    "rar_b": 260.9,
    "rar_l": 461.7,
    "rar_xl": 955.4,
    "rar_xxl": 1498.5,
}


def load(file: pathlib.Path, *options: str):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*options)


def test_all_are_here():
    assert {f.stem for f in FILES} >= {"quickstart", *(f"{m}_{s}" for m in ("ar", "rear") for s in "sbl")}


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_counts(name):
    shapes = generators.shapes(toy.generator(load(toy.ROOT / "configs" / f"{name}.py")))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    assert count == pytest.approx(MILLIONS[name], abs=0.1)


@pytest.mark.parametrize(
    ("name", "layer"), [("rear_s", 15), ("rear_b", 18), ("rear_l", 18), ("alitok_xl", 24), ("quickstart", 2)]
)
def test_the_deep_layer_is_at_three_quarters_of_the_depth(name, layer):
    config = load(toy.ROOT / "configs" / f"{name}.py")
    config.method.name = "rear"
    assert toy.generator(config).deep_layer == layer
    config.method.deep_layer = 1
    assert toy.generator(config).deep_layer == 1
    for outside in (config.model.depth, -2):
        config.method.deep_layer = outside
        with pytest.raises(RearError, match=rf"deep_layer = {outside} is not a layer of 0\.\.{config.model.depth - 1}"):
            toy.generator(config)


def test_llamagen_trains_at_a_constant_rate():
    train = load(toy.ROOT / "configs" / "llamagen_b.py").train
    schedule = learning_rate(train.optimizer, train.loop.steps)
    assert [float(schedule(step)) for step in (0, 1, 700_000, 1_501_200)] == pytest.approx([1e-4] * 4)


@pytest.mark.parametrize(
    ("name", "image_size", "steps", "noise_rate", "images", "rate"),
    [
        ("va_pi_llamagen_xl", 384, 100, 0.0, 128, 1e-6),
        ("va_pi_llamagen_xxl", 384, 100, 0.0, 128, 1e-6),
        ("va_pi_llamagen_t2i_xl", 256, 200, 0.5, 128, 1e-6),
        ("va_pi_janus_pro_1b", 384, 100, 0.95, 64, 1e-7),
        ("va_pi_rear_b", 256, 100, 0.0, 128, 1e-6),  # in no table: LlamaGen's recipe
        ("va_pi_rear_l", 256, 100, 0.0, 128, 1e-6),
    ],
)
def test_va_pi_is_trained_as_the_papers_table_says(name, image_size, steps, noise_rate, images, rate):
    """arXiv 2512.19680: AdamW and a constant rate. Janus' 64 images a step are those of the released launcher."""
    config = load(toy.ROOT / "configs" / f"{name}.py")
    post, optimizer = config.posttrain, config.posttrain.optimizer
    assert (config.data.image_size, post.loop.steps, post.noise_rate) == (image_size, steps, noise_rate)
    assert (post.group, post.prior_weight, post.kl_weight, post.clip_range) == (8, 0.1, 0.0, 0.2)
    assert (post.noise_reading, post.loop.batch_size, post.inner_updates) == ("paper", images, 1)
    assert {reward: weight for reward, weight in post.reward.items() if weight} == {"mse": 1.0, "perceptual": 1.0}
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.999, 1e-4, 1.0)
    schedule = learning_rate(optimizer, steps)
    assert [float(schedule(step)) for step in (0, 1, steps // 2, steps)] == pytest.approx([rate] * 4)


def files_with(job: str) -> list:
    """The files with `job` among theirs; all but the first of each generator are for `-m slow`."""
    seen, marked = set(), []
    for file in (f for f in FILES if job in load(f).jobs):
        name = load(file).model.name
        marked.append(pytest.param(file, id=file.stem, marks=[pytest.mark.slow] if name in seen else []))
        seen.add(name)
    return marked


@pytest.mark.parametrize("file", files_with("train"))
def test_one_real_run_at_toy_width(file, trained, tmp_path):
    config = toy.shrink(load(file))
    config.tokenizer_from = str(trained / "tokenizer")
    config.codes_from = str(trained / "codes")
    if config.model.get("condition") == "text":
        config.captions_from = str(captions(config.model, tmp_path))
    jobs.JOBS["train"].run(config, tmp_path)
    assert (tmp_path / "generator" / str(config.train.loop.steps)).is_dir()
    assert (tmp_path / "metrics.jsonl").exists()


def untrained_generator(config, folder: pathlib.Path) -> pathlib.Path:
    """A checkpoint of the config's generator with random parameters."""
    model = toy.generator(config)
    params = jax.jit(model.init)(jax.random.key(0), *generators.family_of(model).example_inputs(model))["params"]
    store = Checkpoints(folder / "untrained", keep=1)
    store.save(0, new_state(params, optax.sgd(1.0)), config.to_dict())
    store.close()
    return store.folder


def captions(model, folder: pathlib.Path) -> pathlib.Path:
    """Ten caption features, one for each class of the embedded images."""
    np.savez(folder / "captions.npz", features=np.ones((10, 2, model.caption_dim)), mask=np.ones((10, 2)))
    return folder / "captions.npz"


def read_text(config, folder: pathlib.Path) -> None:
    """Gives a generator that reads text itself a small vocabulary, and images with captions."""
    (folder / "tokenizer.json").write_text(tokenizer_json())
    words = JanusVocabulary(folder)
    config.text.vocabulary = str(words.path)
    config.model.update(vocabulary_size=words.size, pad_id=words.pad_id, prompt_length=96)
    config.data.source = "fashion_captions"


@pytest.mark.slow
@pytest.mark.parametrize("file", files_with("posttrain"))
def test_one_real_post_training_at_toy_width(file, trained, tmp_path):
    config = toy.shrink(load(file))
    config.tokenizer_from = str(trained / "tokenizer")
    config.posttrain.loop.update(steps=2, batch_size=16, log_every=1)
    config.posttrain.perceptual_network = "lite0"
    config.method.name = "ar"
    if "vocabulary_size" in config.model:
        read_text(config, tmp_path)
    config.init_from = str(untrained_generator(config, tmp_path))
    if config.model.get("condition") == "text":
        config.captions_from = str(captions(config.model, tmp_path))
    jobs.JOBS["posttrain"].run(config, tmp_path)
    assert (tmp_path / "posttrained" / "2").is_dir()
    assert (tmp_path / "posttrain.png").exists()
