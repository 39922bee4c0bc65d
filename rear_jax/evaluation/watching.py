"""Scores while a generator is being trained: a small set every so many steps, and the best generator kept."""

import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts
from rear_jax.errors import RearError
from rear_jax.evaluation import reconstructions, reference
from rear_jax.metrics import scores
from rear_jax.metrics.features import Network, load_network
from rear_jax.runtime import distributed, places
from rear_jax.runtime.atomic import write_json
from rear_jax.runtime.checkpoints import Checkpoints
from rear_jax.runtime.identity import environment
from rear_jax.runtime.mesh import check_batch, make_mesh
from rear_jax.runtime.writer import MetricWriter
from rear_jax.sampling import draw
from rear_jax.sampling.conditions import balanced_labels, check_conditions, open_conditions, scored
from rear_jax.sampling.generate import sampler_of
from rear_jax.training.state import TrainState

log = logging.getLogger(__name__)

JOB = "train_scores"  # under which scores stand in metrics.jsonl and TensorBoard, and the name of their recipe's file


def check(config: ConfigDict, workdir: Path, model: Any) -> None:
    """Raises RearError where a `Watch` of this generator will; no parameter goes to a device."""
    _check_settings(config)
    check_conditions(_of_all(config), workdir, model)
    _plan(config, reference.outline_network(config.evaluate))


def _check_settings(config: ConfigDict) -> None:
    if jax.process_count() > 1:
        raise RearError("config.train.evaluate_every works in one process: set it to 0, and use --job=evaluate.")
    check_batch(config.mesh, config.sample.batch_size, 1, "config.sample.batch_size")
    if config.sample.use_ema and not config.train.ema_decay:
        raise RearError("config.sample.use_ema: train with config.train.ema_decay, or set it to False.")
    sampler_of(config.sample)


def _of_all(config: ConfigDict) -> ConfigDict:
    """The settings of a set that is balanced over all classes or captions, whatever `--job=sample` is to draw."""
    config = scored(config)
    config.sample.classes = ()
    return config


def _plan(config: ConfigDict, network: Network) -> reference.ReferencePlan:
    """What sets are compared with; raises RearError where they do not compare."""
    plan = reference.plan_reference(config, network)
    shape = config.train.evaluate_images, *draw.image_shape(config)
    reference.require_scores(plan, network.extractor, config.evaluate, shape)
    if config.evaluate.reconstructed_reference:
        scores.require_size("reconstructions", config.data.image_size, *shape[1:3])
    return plan


class Watch:
    """Draws, scores, writes the scores down, and keeps the state with the smallest Fréchet distance."""

    def __init__(self, config: ConfigDict, workdir: Path, model: Any, tokenizer: artifacts.Tokenizer, record: dict):
        """Opens the reference, which is computed if it is not kept yet, and writes the scores' recipe.

        Args:
          config: the experiment; sets are drawn as `config.sample` says and scored as `config.evaluate` says.
          workdir: where references, scores and the best generator go.
          model: the generator.
          tokenizer: what decodes.
          record: what is stored beside the best state.

        Raises RearError: several processes train; the batch of samples does not divide over the devices; there is no
          moving average to sample from; or so many images of this size cannot be scored against the reference.
        """
        settings, self._config, self._workdir, self._record = config.evaluate, config, workdir, record
        _check_settings(config)
        network = load_network(settings)
        plan = _plan(config, network)
        folder = places.place(settings.cache) if settings.cache else workdir / "references"
        self._extractor = network.extractor
        self._reference = reference.prepare_reference(plan, network.extractor, settings, folder)
        self._reconstructed = None
        if settings.reconstructed_reference:
            of_decoded = reconstructions.plan(config, tokenizer, network)
            self._reconstructed = reference.prepare_reference(of_decoded, network.extractor, settings, folder)
        self._settings = reference.score_settings(settings)
        self._conditions = open_conditions(_of_all(config), workdir, model)
        self._program = draw.compile_sampler(config, model, tokenizer.module)
        self._tokenizer_params = tokenizer.params
        self._best = Checkpoints(artifacts.best_generator_folder(workdir), keep=1)
        recipe = {
            **reference.recipe_of(settings, network, plan),
            "comparable_with_published_FID": False,
            "not_comparable_because": ["it is for choosing a generator: run --job=sample,evaluate on that one"],
            "samples": draw.recipe_of(config, model, tokenizer, self._conditions, config.train.evaluate_images),
            "drawn_with": environment(),
        }
        write_json(workdir / f"{JOB}.json", recipe)

    def look(self, step: int, state: TrainState) -> None:
        """Scores the generator as it is after `step`."""
        params = state.ema if self._config.sample.use_ema else state.params
        described = scores.describe(self._extractor, scores.same_size(self._reference, self._images(params)))
        found = scores.compare(self._reference, described, self._extractor, self._settings)
        if self._reconstructed:
            found |= reconstructions.distance(self._reconstructed, described, self._extractor)
        if distributed.is_first():
            with MetricWriter(self._workdir, JOB, start_step=step - 1) as writer:
                writer.write(step, found)
        distance = found[scores.distance_name(self._extractor)]
        if distance < self._best_distance(step):
            self._best.save(step, state, self._record | {"distance": distance})
            self._best.wait()
            log.info("train: step %d is the best so far", step)

    def _best_distance(self, step: int) -> float:
        """Of the best state before `step`; one that a run which was set back had saved later does not count."""
        latest = self._best.latest_step()
        return np.inf if latest is None or latest >= step else self._best.record()["distance"]

    def _images(self, params: Any) -> Iterator[np.ndarray]:
        """The set, batch by batch."""
        count, mesh = self._config.train.evaluate_images, make_mesh(self._config.mesh)
        labels = balanced_labels(count, self._conditions.count)
        program = functools.partial(self._program, params, self._tokenizer_params)
        for batch in draw.plan_batches(labels, np.arange(count), self._config.sample.batch_size):
            yield draw.draw_batch(program, self._conditions, batch, mesh)
