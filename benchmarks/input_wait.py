"""Share of the time in which the devices wait for batches of codes, as the training loop itself reports it.

    python benchmarks/input_wait.py

The loop trains reAR at the size of `train_step.py` from code files, and then takes steps of nothing but a few matrix
products with the batch of the published recipe, so that many sequences a second are asked for. On a CPU the steps and
the input share the cores, which slows both; what counts as input wait is said in rear_jax/runtime/input_wait.py.
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

from rear_jax import generators
from rear_jax.config import loop_settings
from rear_jax.data.batches import code_batches, code_shapes
from rear_jax.data.codes import Codes, open_codes
from rear_jax.runtime.checkpoints import Checkpoints
from rear_jax.runtime.mesh import DATA_PARALLEL, make_mesh
from rear_jax.runtime.sharding import whole_frozen
from rear_jax.runtime.writer import read_metrics
from rear_jax.training import loop, objectives
from rear_jax.training.state import TrainState, adamw, new_state

LOGGED = 5  # times that the loop reports


def train(codes: Codes, learned: dict, batch_size: int, steps: int) -> list[dict]:
    """The metrics of a job of so many steps from code files; `learned` has the other fields of `loop.Learning`."""
    settings = loop_settings()
    settings.update(steps=steps, batch_size=batch_size, log_every=steps // LOGGED, checkpoint_every=steps)
    batch = code_shapes(batch_size, codes.header.codes_per_image)
    learning = loop.Learning(job="train", given={}, batch=batch, settings=settings, seed=0, **learned)
    with tempfile.TemporaryDirectory() as name:
        workdir = pathlib.Path(name)
        checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
        where = loop.Run(
            batches=lambda start: code_batches(codes, batch_size=batch_size, seed=0, start_step=start),
            mesh=make_mesh(DATA_PARALLEL),
            record={},
            checkpoints=checkpoints,
            workdir=workdir,
        )
        loop.train(learning, where)
        checkpoints.close()
        return read_metrics(workdir, "train")


def rear(arguments) -> dict:
    """What reAR learns, for `train`."""
    config, model = measure.build(arguments)
    family = generators.family_of(model)
    optimizer = adamw(config.train.optimizer, 1000, family.parameters)
    codebook = jax.random.normal(jax.random.key(0), (model.codebook_size, model.embedding_dim))
    return {
        "step": objectives.train_step(model, config, optimizer),
        "init": lambda given: new_state(family.init(model, 0), optimizer),
        "frozen": {"codebook": codebook},
        "rules": (whole_frozen(), *family.parameters),
    }


def products(count: int) -> dict:
    """So many products of large matrices in the place of learning, for `train`."""

    def step(state: TrainState, batch, key, frozen):
        x = batch["codes"][:512, :1] * jnp.ones((512, 512)) + state.step
        loss = jax.lax.fori_loop(0, count, lambda _, x: jnp.tanh(x @ x), x).mean()
        return state.replace(step=state.step + 1), {"loss": loss}

    return {"step": step, "init": lambda given: TrainState(jnp.int32(0), {}, ()), "frozen": {}, "rules": ()}


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
        found = train(codes, rear(arguments), arguments.batch, arguments.steps)
        rows.append(row(f"reAR of width {arguments.width}, batch {arguments.batch}", found))
        for count in (50, 10, 2):
            found = train(codes, products(count), arguments.large_batch, 10 * arguments.steps)
            rows.append(row(f"{count} products, batch {arguments.large_batch}", found))
    measure.table(rows)


if __name__ == "__main__":
    main()
