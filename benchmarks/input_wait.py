"""Share of the time in which the devices wait for batches of codes, as the training loop itself reports it.

    python benchmarks/input_wait.py

The loop trains reAR at the size of `train_step.py` from code files, and then takes steps of nothing but a few matrix
products with the batch of the published recipe, so that many sequences a second are asked for. On a CPU the steps and
the input share the cores, which slows both; what counts as input wait is said in rear_jax/training/input_wait.py.
"""

import argparse
import os
import pathlib
import tempfile

import data
import jax
import jax.numpy as jnp
import measure
import numpy as np

from rear_jax import models
from rear_jax.config import loop_settings
from rear_jax.data.batches import code_batches
from rear_jax.data.codes import Codes, open_codes
from rear_jax.training import loop, next_code
from rear_jax.training.checkpoints import Checkpoints
from rear_jax.training.mesh import DATA_PARALLEL, make_mesh
from rear_jax.training.state import TrainState, adamw, new_state
from rear_jax.training.writer import read_metrics

LOGGED = 5  # times that the loop reports


def train(codes: Codes, step_fn, init, batch_size: int, steps: int) -> list[dict]:
    """The metrics of a job of so many steps from code files."""
    settings = loop_settings()
    settings.update(steps=steps, batch_size=batch_size, log_every=steps // LOGGED, checkpoint_every=steps)
    frozen = {"codebook": jax.random.normal(jax.random.key(0), (codes.header.codebook_size, measure.EMBEDDING_DIM))}
    with tempfile.TemporaryDirectory() as name:
        workdir = pathlib.Path(name)
        checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
        loop.train(
            "train",
            step_fn,
            init,
            {},
            lambda start: code_batches(codes, batch_size=batch_size, seed=0, start_step=start),
            frozen=frozen,
            mesh=make_mesh(DATA_PARALLEL),
            settings=settings,
            seed=0,
            record={},
            checkpoints=checkpoints,
            workdir=workdir,
        )
        checkpoints.close()
        return read_metrics(workdir, "train")


def rear(arguments):
    """Step function and first state of reAR."""
    config, model = measure.build(arguments)
    optimizer = adamw(config.train.optimizer, 1000)

    def init(given) -> TrainState:
        return new_state(model.init(jax.random.key(0), *models.example_inputs(model))["params"], optimizer)

    return next_code.train_step(model, config, optimizer), init


def products(count: int):
    """Step function of so many products of large matrices, and its first state."""

    def step(state: TrainState, batch, key, frozen):
        x = batch["codes"][:512, :1] * jnp.ones((512, 512)) + state.step
        loss = jax.lax.fori_loop(0, count, lambda _, x: jnp.tanh(x @ x), x).mean()
        return state.replace(step=state.step + 1), {"loss": loss}

    return step, lambda given: TrainState(jnp.int32(0), {}, ())


def row(what: str, metrics: list[dict]) -> tuple[str, ...]:
    """Of all reports but the first, in which the reading begins."""
    steps, rates, waits = (
        [record[name] for record in metrics[1:]] for name in ("steps_per_second", "images_per_second", "input_wait")
    )
    wait = f"{100 * np.median(waits):.2f} % (to {100 * max(waits):.2f} %)"
    return what, f"{1 / np.median(steps):.3f}", f"{np.median(rates):,.1f}", wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_flags(parser)
    parser.add_argument("--steps", type=int, default=25, help="of reAR; ten times as many of the products")
    parser.add_argument("--large-batch", type=int, default=2048)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--shards", type=int, default=256)
    arguments = parser.parse_args()
    print(f"load before: {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} core(s)\n")
    rows = [("what", "seconds a step", "sequences a second", "input wait, median (to largest)")]
    with tempfile.TemporaryDirectory() as name:
        data.write_random(pathlib.Path(name), arguments)
        codes = open_codes(name)
        found = train(codes, *rear(arguments), arguments.batch, arguments.steps)
        rows.append(row(f"reAR of width {arguments.width}, batch {arguments.batch}", found))
        for count in (50, 10, 2):
            found = train(codes, *products(count), arguments.large_batch, 10 * arguments.steps)
            rows.append(row(f"{count} products, batch {arguments.large_batch}", found))
    measure.table(rows)


if __name__ == "__main__":
    main()
