"""Images a second of `--job=sample` from end to end, and where the time goes.

PYTHONPATH=. python benchmarks/sample.py --config=configs/rear_b.py [--images=10000] [--batch=128]
PYTHONPATH=. python benchmarks/sample.py --config=configs/rear_l.py
PYTHONPATH=. python benchmarks/sample.py --config=tests/toy_config.py --images=48 --batch=8    # seconds on a CPU

The job itself runs, on checkpoints of random parameters: it loads and hashes them, compiles, draws and decodes the
codes, rounds to 8 bits, and writes the set and its .npz. Decoding and the tokenizer, which are one program there, are
then timed alone, on one batch.
"""

import argparse
import contextlib
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import measure
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, generators, jobs, tokenizers
from rear_jax.generators.interface import Generator
from rear_jax.runtime.checkpoints import Checkpoints
from rear_jax.sampling import draw
from rear_jax.sampling.conditions import balanced_labels
from rear_jax.sampling.generate import generate, sampler_of
from rear_jax.sampling.sampled_set import SampledSet
from rear_jax.training import objectives
from rear_jax.training.state import TrainState


def networks(config: ConfigDict) -> tuple[Any, Generator]:
    """Tokenizer and generator."""
    tokenizer = tokenizers.build(config.tokenizer, config.data.image_size)
    return tokenizer, objectives.build_generator(config, tokenizer)


def tokenizer_params(tokenizer: Any) -> Any:
    """Parameters of a tokenizer that nobody has trained."""
    image = jnp.zeros((1, tokenizer.image_size, tokenizer.image_size, 3))
    return jax.jit(tokenizer.init)(jax.random.key(0), image)["params"]


def save(folder: pathlib.Path, params: Any, record: dict) -> None:
    """A checkpoint as a training job leaves it, without the optimiser's state."""
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, TrainState(jnp.int32(1), params, ()), record)
    checkpoints.close()


def prepare(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Checkpoints of tokenizer and generator."""
    tokenizer, generator = networks(config)
    save(artifacts.tokenizer_folder(workdir), {"tokenizer": tokenizer_params(tokenizer)}, config.to_dict())
    fingerprint = artifacts.load_tokenizer(config, workdir).fingerprint
    record = config.to_dict() | {"tokenizer_fingerprint": fingerprint}
    save(artifacts.generator_folder(workdir), measure.random_params(generator), record)


@contextlib.contextmanager
def watching(owner: Any, name: str) -> Iterator[list[float]]:
    """The seconds that each call of `owner`'s function takes."""
    function, seconds = getattr(owner, name), []

    def timed(*arguments, **options):
        since = time.perf_counter()
        result = function(*arguments, **options)
        seconds.append(time.perf_counter() - since)
        return result

    with mock.patch.object(owner, name, timed):
        yield seconds


def run_job(config: ConfigDict, workdir: pathlib.Path) -> Iterator[tuple]:
    """Rows: the job, and what it consists of."""
    count, batch = config.sample.num_images, config.sample.batch_size
    with (
        watching(draw, "draw_batch") as drawing,
        watching(SampledSet, "add") as adding,
        watching(SampledSet, "export") as exporting,
    ):
        since = time.perf_counter()
        jobs.JOBS["sample"].run(config, workdir)
        seconds = time.perf_counter() - since
    first, later, writing = drawing[0], sum(drawing[1:]), sum(adding + exporting)
    yield f"--job=sample of {count} images, end to end", f"{seconds:.2f}", f"{count / seconds:.2f}"
    yield f"its batches of {batch} after the first", f"{later:.2f}", f"{(count - batch) / later:.2f}"
    yield "its first batch, compiling included", f"{first:.2f}", ""
    yield "its writing, batch by batch and .npz", f"{writing:.2f}", f"{count / writing:.2f}"
    yield "its rest: checkpoints, hashes, sheet", f"{seconds - first - later - writing:.2f}", ""


def parts(config: ConfigDict) -> dict[str, Callable[[int], list[float]]]:
    """The two halves of the program that draws a batch, by name: a number of repeats -> seconds."""
    tokenizer, generator = networks(config)
    cached, sampler = generators.cached(generator), sampler_of(config.sample)
    labels = balanced_labels(config.sample.num_images, config.data.num_classes)
    first = next(draw.plan_batches(labels, np.arange(len(labels)), config.sample.batch_size))
    codes = jax.random.randint(jax.random.key(1), (len(first.rows), generator.num_codes), 0, tokenizer.codebook_size)

    def draw_codes(params):
        return generate(
            cached, params, first.classes, first.rows, jax.random.split(jax.random.key(2), len(codes)), sampler
        )

    def to_images(params):
        images = tokenizer.apply({"params": params}, codes, method="decode")
        return jnp.clip(255.0 * images.astype(jnp.float32), 0.0, 255.0).astype(jnp.uint8)

    def timing(function, make):
        def timed(repeats):
            params = make()
            return measure.timed(jax.jit(function), lambda _: (params,), repeats)[0]

        return timed

    return {
        "decoding codes alone, a batch": timing(draw_codes, lambda: measure.random_params(generator)),
        "the tokenizer's decoder and 8 bits alone, a batch": timing(to_images, lambda: tokenizer_params(tokenizer)),
    }


def rows(arguments, config: ConfigDict) -> Iterator[tuple]:
    """The table."""
    yield "what", "seconds", "images/s"
    with tempfile.TemporaryDirectory() as name:
        prepare(config, pathlib.Path(name))
        found, failure = measure.guarded(lambda: list(run_job(config, pathlib.Path(name))))
    yield from found or [("--job=sample", failure, "")]
    for what, timed in parts(config).items():
        seconds, failure = measure.guarded(lambda timed=timed: timed(arguments.repeats))
        rate = "" if failure else f"{config.sample.batch_size / min(seconds):.2f}"
        yield what, failure or measure.about(seconds), rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/rear_b.py")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.images <= arguments.batch:
        parser.error("--images must be more than a --batch: the first one is compiled")
    config = measure.read_config(arguments.config)
    config.sample.update(num_images=arguments.images, batch_size=arguments.batch)
    measure.header(measure.matmul_ceiling(config.model.dtype), config.model.dtype)
    measure.table(rows(arguments, config))
    print(f"\npeak {measure.peak_memory_gib():.1f} GiB", flush=True)


if __name__ == "__main__":
    main()
