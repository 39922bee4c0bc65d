"""The one training loop. A job hands it what is computed (`Learning`), and where and on what it runs (`Run`)."""

import collections
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.runtime import distributed, divided, flops, sharding
from rear_jax.runtime.atomic import atomic_file
from rear_jax.runtime.checkpoints import Checkpoints, abstract
from rear_jax.runtime.input_wait import InputWait
from rear_jax.runtime.mesh import put_batch, replicated, split
from rear_jax.runtime.profile import Profile
from rear_jax.runtime.progress import ProgressBar
from rear_jax.runtime.stopping import Interrupted, StopSign, any_raised
from rear_jax.runtime.writer import MetricWriter, read_metrics
from rear_jax.training.speed import Speed, peak
from rear_jax.training.state import TrainState

log = logging.getLogger(__name__)

Metrics = dict[str, jax.Array]
StepFunction = Callable[[TrainState, Any, jax.Array, Any], tuple[TrainState, Metrics]]
SUSPECT = "suspect"  # a metric that is not logged: where in the data set a value is not finite, -1 = nowhere
AHEAD = 2  # steps that may be queued on the device: it never waits for the host, and a signal is heard soon


@dataclasses.dataclass(frozen=True)
class Learning:
    """What a training job computes. The job fills it with arrays, a plan with their shapes.

    Attributes:
      job: name in metrics and messages.
      step: (state, batch, key, frozen) -> (state, dict of scalar metrics); pure, compiled by the loop, state donated.
      init: makes the state before the first step, from `given`.
      given: parameters that are not to start afresh, as `init` wants them.
      frozen: arrays that steps read and do not change.
      batch: shapes of a batch of all processes together; 'label' leads with the number of images.
      rules: sharding of the state and, under 'frozen/', of what is frozen.
      settings: of the loop, see `config.loop_settings`.
      seed: of the job's random keys.
      divides: whether the state is divided over 'data' as well, `config.mesh.divide_state`.
      dtype: of kernels in products, see `divided.Division`.
    """

    job: str
    step: StepFunction
    init: Callable[[Any], TrainState]
    given: Any
    frozen: dict[str, Any]
    batch: Any
    rules: sharding.Rules
    settings: ConfigDict
    seed: int
    divides: bool = True
    dtype: Any = None

    @property
    def division(self) -> divided.Division:
        """How the state is divided beside the rules, and what the step's networks read of it."""
        return divided.Division(self.rules, divided.AXES if self.divides else (), self.dtype)

    def state(self, mesh: Mesh) -> TrainState:
        """Shapes of the state, placed on the mesh; what a method carries in `extra` is placed by the rules alone."""
        shapes = jax.eval_shape(self.init, self.given)
        places = sharding.shardings(shapes, mesh, self.rules, also=self.division.axes)
        return abstract(shapes, places.replace(extra=sharding.shardings(shapes.extra, mesh, self.rules, "extra/")))

    def seen(self, state: TrainState, mesh: Mesh) -> TrainState:
        """The same state with whole parameters, and moving average, for whoever looks at it between steps."""
        params, ema = (
            tree if tree is None else jax.device_put(tree, sharding.shardings(tree, mesh, self.rules, "params/"))
            for tree in (state.params, state.ema)
        )
        return state.replace(params=params, ema=ema)

    def frozen_places(self, mesh: Mesh) -> Any:
        """The sharding of every frozen array."""
        return sharding.shardings(self.frozen, mesh, self.rules, "frozen/")

    def arguments(self, mesh: Mesh) -> tuple[TrainState, Any, Any]:
        """Shapes of state, batch and frozen arrays, placed on the mesh."""
        frozen = abstract(self.frozen, self.frozen_places(mesh))
        return self.state(mesh), abstract(self.batch, split(mesh)), frozen


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a training job runs, what it reads, and what it leaves.

    Attributes:
      batches: start step -> iterator of host batches, this process's share of each.
      mesh: of the devices.
      record: what is stored beside each checkpoint: the whole config and where the data came from.
      checkpoints: where states go.
      workdir: where metrics and pictures go.
      draw: state -> named uint8 pictures, called every `picture_every` steps and at the end; None draws nothing.
      watch: a number of steps, and what is called with step and state whenever so many more have been made.
      counts: what is written beside the metrics of a log step; it is counted on this process, as `input_wait` is.
      compiled: the job's program, if it is compiled already.
      plain: gives the same computation without what saves memory, whose operations are counted; None: it is plain.
    """

    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    mesh: Mesh
    record: dict
    checkpoints: Checkpoints
    workdir: Path
    draw: Callable[[TrainState], dict[str, np.ndarray]] | None = None
    watch: tuple[int, Callable[[int, TrainState], None]] | None = None
    counts: Callable[[], dict[str, float]] = dict
    compiled: Any = None
    plain: Callable[[], Learning] | None = None


def train(learning: Learning, run: Run) -> TrainState:
    """Runs a training job to its last step, from its newest checkpoint if there is one.

    Step n draws from `fold_in(key(seed), n)` and reads batch n, so a resumed run repeats an unbroken one bit for bit.
    Metrics stay on the device between log steps. No state is saved whose metrics are not finite.

    Raises:
      Interrupted: SIGTERM or SIGINT came; the state was saved first.
      RearError: a metric was NaN or infinite, a save failed, or processes or settings do not fit together.
    """
    job, settings, mesh, checkpoints = learning.job, learning.settings, run.mesh, run.checkpoints
    check(job, settings)
    agree(job, run)
    with jax.set_mesh(mesh):
        wanted = learning.state(mesh)
        state = _restore_or_init(learning, run, wanted)
        frozen = jax.device_put(learning.frozen, learning.frozen_places(mesh))
        start = int(state.step)
        if start >= settings.steps:
            log.info("%s: done already, %d steps", job, start)
            return learning.seen(state, mesh)

        stream = run.batches(start)
        batch = put_batch(next(stream), mesh)
        stop = StopSign(mesh, ahead=AHEAD)
        compiled = run.compiled or compiled_step(learning, mesh)
        share = _share_of_second(learning, run, mesh)
        pending: list[Metrics] = []  # of the steps since the last log step
        newest: collections.deque[Metrics] = collections.deque(maxlen=AHEAD + 1)
        with (
            checkpoints.finishing(),
            contextlib.closing(stream),
            MetricWriter(run.workdir, job, start_step=start) as writer,
            ProgressBar(job, total=settings.steps, start=start, unit="step") as bar,
            Profile(job, run.workdir / "tensorboard" / job, settings.profile_steps) as profile,
            stop.listening(),
            InputWait() as wait,
        ):
            spent = _device_hours(run.workdir, job)
            speed = Speed(mesh, settings.steps, settings.batch_size, share=share, spent=spent)
            for step in range(start + 1, settings.steps + 1):
                profile.before(step, state)
                state, metrics, answer = compiled(state, batch, stop.flags(), frozen)
                pending.append(metrics)
                newest.append(metrics)
                with wait.fetching(metrics):
                    batch = put_batch(next(stream), mesh)  # while the step runs
                if len(newest) > AHEAD:
                    jax.block_until_ready(newest[0])
                profile.after(step, metrics)
                stopping = stop.stops_after(answer)
                last = step == settings.steps or stopping
                save = last or step % settings.checkpoint_every == 0
                if save or step % settings.log_every == 0:
                    means = _finite_means(job, step, pending, checkpoints)
                    rates, progress = speed.of(step, len(pending))
                    counts = {"input_wait": wait.share()} | run.counts()
                    writer.write(step, means | rates | counts, progress=progress, saved=save)
                    bar.update(step, loss=means["loss"])
                    pending = []
                    speed.restart()
                else:
                    bar.update(step)
                if save:
                    checkpoints.save(step, state, run.record)
                if run.draw is not None and settings.picture_every and (last or step % settings.picture_every == 0):
                    for name, picture in run.draw(learning.seen(state, mesh)).items():
                        writer.picture(step, name, picture)
                if run.watch is not None and step % run.watch[0] == 0:
                    run.watch[1](step, learning.seen(state, mesh))
                if stopping and step < settings.steps:
                    checkpoints.wait()
                    raise Interrupted(f"{job}: saved at step {step} of {settings.steps}; resume with the same command.")
        checkpoints.wait()
        return learning.seen(state, mesh)


def program(learning: Learning, mesh: Mesh, wanted: TrainState) -> Any:
    """The one program of a job: (state, batch, flags of a `StopSign`, frozen) -> (state, metrics, its answer).

    `wanted` is `learning.state(mesh)`: what it is given, and what it gives back.
    """

    def keyed_step(state, batch, flags, frozen):
        key = jax.random.fold_in(jax.random.key(learning.seed), state.step)
        with divided.dividing(learning.division):
            return *learning.step(state, batch, key, frozen), any_raised(flags)

    places = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    everywhere = replicated(mesh)
    return jax.jit(keyed_step, donate_argnums=0, out_shardings=(places, everywhere, everywhere))


def compiled_step(learning: Learning, mesh: Mesh) -> Any:
    """The one program of the job, compiled from shapes before the clock of the first step starts."""
    state, batch, frozen = learning.arguments(mesh)
    since = time.perf_counter()
    log.info("%s: compiling the training step; at full size this takes minutes", learning.job)
    with jax.set_mesh(mesh):
        flags = StopSign(mesh, ahead=AHEAD).flags()
        compiled = program(learning, mesh, state).lower(state, batch, flags, frozen).compile()
    log.info("%s: compiled in %.1f s", learning.job, time.perf_counter() - since)
    return compiled


def agree(job: str, run: Run) -> None:
    """Raises RearError in every process unless all run the same job from the same place."""
    what = json.dumps([job, run.record, run.checkpoints.latest_step()], sort_keys=True)
    distributed.agree("config, tokenizer or newest checkpoint", what)


def check(job: str, settings: ConfigDict) -> None:
    """Raises RearError for settings of the loop that do not go together."""
    if settings.keep_every % settings.checkpoint_every:
        raise RearError(
            f"{job}: loop.keep_every = {settings.keep_every} is no multiple of loop.checkpoint_every = "
            f"{settings.checkpoint_every}."
        )
    profiled = tuple(settings.profile_steps)
    if profiled and not (len(profiled) == 2 and profiled[0] <= profiled[1] <= settings.steps):
        raise RearError(
            f"{job}: loop.profile_steps = {profiled}: give the first and the last step, up to loop.steps = "
            f"{settings.steps}, or () for no profile."
        )


def _restore_or_init(learning: Learning, run: Run, wanted: TrainState) -> TrainState:
    """The newest saved state, else a fresh one, on the devices that the rules say."""
    job, mesh = learning.job, run.mesh
    places = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    whole, part = (sharding.bytes_per_device(wanted, p) / 1e6 for p in (replicated(mesh), places))
    log.info("%s: state of %.1f MB, %.1f MB of it on each device of %s", job, whole, part, dict(mesh.shape))
    if run.checkpoints.latest_step() is None:
        given = jax.device_put(learning.given, sharding.shardings(learning.given, mesh, learning.rules, "params/"))
        state = jax.jit(learning.init, out_shardings=places)(given)
        _write_parameters(job, state.params, run.workdir)
        return state
    step, state = run.checkpoints.restore(wanted, run.record)
    log.info("%s: going on from step %d", job, step)
    return state


def _write_parameters(job: str, params: Any, workdir: Path) -> None:
    """Name, shape, number, mean and standard deviation of each parameter, to the log and a file; all processes call."""
    table = parameter_overview.get_parameter_overview(params, include_stats="global")
    if distributed.is_first():
        with atomic_file(workdir / f"parameters_{job}.txt") as file:
            file.write_text(f"{table}\n")
        log.info("%s: parameters at the start\n%s", job, table)


def _share_of_second(learning: Learning, run: Run, mesh: Mesh) -> float | None:
    """The share of a second that a step takes at the peak of the devices; None where that is not known."""
    whole = peak(mesh)
    if whole is None:
        return None
    plain = run.plain() if run.plain else learning
    state, batch, frozen = plain.arguments(mesh)
    flags = StopSign(mesh, ahead=AHEAD).flags()
    return flops.count(program(plain, mesh, state).trace(state, batch, flags, frozen).jaxpr) / whole


def _device_hours(workdir: Path, job: str) -> float:
    """What the runs that this one continues have taken."""
    written = [record["device_hours"] for record in read_metrics(workdir, job) if "device_hours" in record]
    return max(written, default=0.0)


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
