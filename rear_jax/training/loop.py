"""The one training loop. A job hands it a pure step function and an endless stream of batches."""

import collections
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rear_jax import distributed
from rear_jax.errors import RearError
from rear_jax.progress import ProgressBar
from rear_jax.training import mesh as placement
from rear_jax.training import sharding
from rear_jax.training.checkpoints import Checkpoints, abstract
from rear_jax.training.input_wait import InputWait
from rear_jax.training.state import TrainState
from rear_jax.training.stopping import StopSign, any_raised
from rear_jax.training.writer import MetricWriter

log = logging.getLogger(__name__)

Metrics = dict[str, jax.Array]
StepFunction = Callable[[TrainState, Any, jax.Array, Any], tuple[TrainState, Metrics]]
SUSPECT = "suspect"  # a metric that is not logged: where in the data set a value is not finite, -1 = nowhere
AHEAD = 2  # steps that may be queued on the device: it never waits for the host, and a signal is heard soon


class Interrupted(Exception):
    """A signal asked the job to stop and its state is on disk."""


def train(
    job: str,
    step_fn: StepFunction,
    init: Callable[[Any], TrainState],
    given: Any,
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
    *,
    frozen: dict[str, Any],
    mesh: Mesh,
    settings: ConfigDict,
    seed: int,
    record: dict,
    checkpoints: Checkpoints,
    workdir: Path,
    draw: Callable[[TrainState], dict[str, np.ndarray]] | None = None,
    watch: tuple[int, Callable[[int, TrainState], None]] | None = None,
    counts: Callable[[], dict[str, float]] = dict,
) -> TrainState:
    """Runs a training job to its last step, from its newest checkpoint if there is one.

    Step n draws from `fold_in(key(seed), n)` and reads batch n, so a resumed run repeats an unbroken one bit for bit.
    Metrics stay on the device between log steps. No state is saved whose metrics are not finite.

    Args:
      job: name in metrics and messages.
      step_fn: (state, batch, key, frozen) -> (state, dict of scalar metrics); pure, compiled here, state donated.
      init: makes the state before the first step, from `given`.
      given: parameters that are not to start afresh, as `init` wants them.
      batches: start step -> iterator of host batches.
      frozen: arrays that steps read and do not change.
      mesh: of the devices; the state is placed on it by the rules of `sharding.py`.
      settings: loop settings, see `config.loop_settings`.
      seed: of the job's random keys.
      record: what is stored beside each checkpoint: the whole config and where the data came from.
      checkpoints: where states go.
      workdir: where metrics and pictures go.
      draw: state -> named uint8 pictures, called every `picture_every` steps and at the end.
      watch: a number of steps, and what is called with step and state whenever so many more have been made.
      counts: what is written beside the metrics of a log step; it is counted on this process, as `input_wait` is.

    Raises:
      Interrupted: SIGTERM or SIGINT came; the state was saved first.
      RearError: a metric was NaN or infinite, a save failed, or processes or settings do not fit together.
    """
    _check(job, settings)
    latest = checkpoints.latest_step()
    distributed.agree("config, tokenizer or newest checkpoint", json.dumps([job, record, latest], sort_keys=True))
    with jax.set_mesh(mesh):
        state = _restore_or_init(job, init, given, checkpoints, mesh, record)
        places = sharding.shardings(state, mesh)
        frozen = jax.device_put(frozen, sharding.shardings(frozen, mesh, "frozen/"))
        start = int(state.step)
        if start >= settings.steps:
            log.info("%s: done already, %d steps", job, start)
            return state

        stream = batches(start)
        batch = placement.put_batch(next(stream), mesh)
        stop = StopSign(mesh, ahead=AHEAD)
        program = step_program(step_fn, seed, mesh, places)
        compiled = _compile(job, program, state, batch, stop.flags(), frozen)
        pending: list[Metrics] = []  # of the steps since the last log step
        newest: collections.deque[Metrics] = collections.deque(maxlen=AHEAD + 1)
        with (
            checkpoints.finishing(),
            contextlib.closing(stream),
            MetricWriter(workdir, job, start_step=start) as writer,
            ProgressBar(job, total=settings.steps, start=start, unit="step") as bar,
            stop.listening(),
            InputWait() as wait,
        ):
            since = time.perf_counter()
            for step in range(start + 1, settings.steps + 1):
                state, metrics, answer = compiled(state, batch, stop.flags(), frozen)
                pending.append(metrics)
                newest.append(metrics)
                with wait.fetching(metrics):
                    batch = placement.put_batch(next(stream), mesh)  # while the step runs
                if len(newest) > AHEAD:
                    jax.block_until_ready(newest[0])
                stopping = stop.stops_after(answer)
                last = step == settings.steps or stopping
                save = last or step % settings.checkpoint_every == 0
                if save or step % settings.log_every == 0:
                    means = _finite_means(job, step, pending, checkpoints)
                    rate = len(pending) / (time.perf_counter() - since)
                    speed = {"steps_per_second": rate, "images_per_second": rate * settings.batch_size}
                    writer.write(step, means | speed | {"input_wait": wait.share()} | counts())
                    bar.update(step, loss=means["loss"])
                    pending, since = [], time.perf_counter()
                if save:
                    checkpoints.save(step, state, record)
                if draw is not None and settings.picture_every and (last or step % settings.picture_every == 0):
                    for name, picture in draw(state).items():
                        writer.picture(step, name, picture)
                if watch is not None and step % watch[0] == 0:
                    watch[1](step, state)
                if stopping and step < settings.steps:
                    checkpoints.wait()
                    raise Interrupted(f"{job}: saved at step {step} of {settings.steps}; resume with the same command.")
        checkpoints.wait()
        return state


def step_program(step_fn: StepFunction, seed: int, mesh: Mesh, places: Any) -> Any:
    """The one program of a job: (state, batch, flags of a `StopSign`, frozen) -> (state, metrics, its answer).

    Args:
      step_fn: as in `train`; its state is donated.
      seed: of the job's random keys.
      mesh: of the devices.
      places: sharding of every array of the state.
    """

    def keyed_step(state, batch, flags, frozen):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        return *step_fn(state, batch, key, frozen), any_raised(flags)

    everywhere = placement.replicated(mesh)
    return jax.jit(keyed_step, donate_argnums=0, out_shardings=(places, everywhere, everywhere))


def _compile(job: str, function: Any, *arguments: Any) -> Any:
    """The one program of the job, compiled before the clock of the first step starts."""
    since = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    log.info("%s: compiled in %.1f s", job, time.perf_counter() - since)
    return compiled


def _check(job: str, settings: ConfigDict) -> None:
    """Raises RearError for settings of the loop that do not go together."""
    for name in ("log_every", "checkpoint_every"):
        if settings[name] < 1:
            raise RearError(f"{job}: loop.{name} = {settings[name]}: it counts steps, choose at least 1.")
    if settings.keep_every % settings.checkpoint_every:
        raise RearError(
            f"{job}: loop.keep_every = {settings.keep_every} is no multiple of loop.checkpoint_every = "
            f"{settings.checkpoint_every}."
        )


def _restore_or_init(
    job: str, init: Callable[[Any], TrainState], given: Any, checkpoints: Checkpoints, mesh: Mesh, record: dict
) -> TrainState:
    """The newest saved state, else a fresh one, on the devices that the rules say."""
    shapes = jax.eval_shape(init, given)
    places = sharding.shardings(shapes, mesh)
    whole, part = (sharding.bytes_per_device(shapes, p) / 1e6 for p in (placement.replicated(mesh), places))
    log.info("%s: state of %.1f MB, %.1f MB of it on each device of %s", job, whole, part, dict(mesh.shape))
    if checkpoints.latest_step() is None:
        given = jax.device_put(given, sharding.shardings(given, mesh, "params/"))
        return jax.jit(init, out_shardings=places)(given)
    step, state = checkpoints.restore(abstract(shapes, places), record)
    log.info("%s: going on from step %d", job, step)
    return state


def _finite_means(job: str, step: int, pending: list[Metrics], checkpoints: Checkpoints) -> dict[str, float]:
    """Means over the steps since the last call; stops the run if any single value is not finite."""
    values = jax.device_get(pending)
    names = [name for name in values[0] if name != SUSPECT]
    for offset, metrics in enumerate(values):
        broken = [name for name in names if not np.isfinite(metrics[name])]
        if broken:
            checkpoints.wait()
            suspect = metrics.get(SUSPECT, -1)
            where, remedy = "", "Lower the learning rate or raise the precision."
            if suspect >= 0:
                where = f", first for image {suspect} of the training images (counted from 0)"
                remedy = "Look at that image and at what gives its value, such as the reward."
            raise RearError(
                f"{job}: {', '.join(broken)} not finite at step {step - len(values) + 1 + offset}{where}; the "
                f"checkpoint of step {checkpoints.latest_step() or 0} is intact. {remedy}"
            )
    return {name: float(np.mean([metrics[name] for metrics in values])) for name in names}
