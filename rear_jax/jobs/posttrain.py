"""`--job=posttrain`: VA-π, a generator learns to sample codes that decode back to the image; or a baseline of it."""

import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, generators
from rear_jax.data import batches
from rear_jax.data.sources import fingerprint, open_split, split_facts
from rear_jax.data.sources.interface import ImageSource
from rear_jax.runtime import distributed, pictures, places
from rear_jax.runtime.mesh import check_batch, fetch, make_mesh
from rear_jax.runtime.writer import MetricWriter
from rear_jax.training import fitting, loop, posttraining
from rear_jax.training.posttraining.judges import check_judges, judges_of
from rear_jax.training.posttraining.method import Method
from rear_jax.training.posttraining.rewards import caption_judges, score
from rear_jax.training.posttraining.teacher_forcing import (
    Context,
    Networks,
    bare_generator,
    cross_entropy,
    read_context,
    unit_images,
)
from rear_jax.training.posttraining.text_judge import CaptionFeatures, caption_scorers, require_captions
from rear_jax.training.state import TrainState

log = logging.getLogger(__name__)

SHEET = 8  # images on posttrain.png
HELD_OUT = 32  # images whose cross-entropy is watched
WATCHED = "posttrain_held_out"  # under which it stands in metrics.jsonl and TensorBoard


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains `workdir/posttrained` from the generator of `--job=train`, or from `config.init_from`.

    A method that trains the decoder leaves `workdir/posttrained_decoder` instead. Either way `posttrain.png` is left: a
    row for each of a few held-out images with the original, its reconstruction, and samples with their rewards.
    """
    settings, data = config.posttrain, config.data
    _check_settings(config)
    tokenizer = artifacts.load_tokenizer(config, workdir)
    generator = bare_generator(config, tokenizer.module)
    method = posttraining.checked_method(config, generator)
    source, held_out = (open_split(data, split) for split in (data.train_split, data.eval_split))
    distributed.agree(f"the images of {source.name}", fingerprint(source))
    reader = artifacts.reader_in_step(config, workdir, generator)
    conditions, of_held_out = (
        artifacts.open_conditions(config, workdir, generator, split, images, reader)
        for split, images in ((data.train_split, source), (data.eval_split, held_out))
    )
    scorers = caption_scorers(config)
    texts, texts_of_held_out = (CaptionFeatures(scorers, images) for images in (source, held_out))
    asked, text_encoder = judges_of(config, workdir), artifacts.text_encoder_of(config, workdir, generator, reader)
    checkpoints, saved = artifacts.resumable(_folder(method, workdir), settings.loop, config, "posttrain")
    if saved:
        tokenizer.require(saved["tokenizer_fingerprint"], f"what {checkpoints.folder} holds")
        artifacts.refuse_other_encoder(saved.get("text_encoder", ""), text_encoder, f"what {checkpoints.folder} holds")

    start = {}
    if _needs_start(config, resumed=bool(saved)):
        start = _starting_point(config, workdir, generator, tokenizer, text_encoder)

    def learn(config: ConfigDict) -> loop.Learning:
        return posttraining.learning(config, tokenizer, start, asked, reader)

    images = batches.training_stream(source, config, settings.loop, settings.augmentation)

    def stream(start: int) -> Iterator[dict[str, Any]]:
        return texts.beside(artifacts.with_conditions(images(start), conditions))

    def to_look_at(labels: np.ndarray) -> Any:
        return reader.encode_once(of_held_out(labels)) if reader else of_held_out(labels)

    networks = posttraining.networks_of(config, tokenizer.module, asked)
    frozen, devices = posttraining.learning(config, tokenizer, start, asked).frozen, make_mesh(config.mesh)
    draw = _drawer(config, networks, frozen, held_out, to_look_at, texts_of_held_out)
    record = config.to_dict() | {"holds": method.trains, "tokenizer_fingerprint": tokenizer.fingerprint}
    record["text_encoder"] = text_encoder
    watch, look = None, _watcher(config, workdir, method, networks, frozen["tokenizer"], held_out, to_look_at)
    if settings.loop.picture_every:
        watch = settings.loop.picture_every, lambda step, state: look(step, state.params)
    with jax.set_mesh(devices):
        if not saved:
            look(0, start)
    run = loop.Run(stream, devices, record, checkpoints, workdir, draw=draw, watch=watch)
    state = fitting.train(config, learn, run)
    checkpoints.close()
    with jax.set_mesh(devices):
        look(int(state.step), state.params)
        sheet = draw(state)["posttrain"]
    if distributed.is_first():
        pictures.save_png(workdir / "posttrain.png", sheet)


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """See `Job.check`."""
    settings, data = config.posttrain, config.data
    _check_settings(config)
    tokenizer = artifacts.outline_tokenizer(config)
    generator = bare_generator(config, tokenizer.module)
    start, reader = generators.shapes(generator), artifacts.outline_reader_in_step(config, workdir, generator)
    learning = posttraining.learning(config, tokenizer, start, judges_of(config), reader)
    loop.check(learning.job, settings.loop)
    state = learning.state(make_mesh(config.mesh))
    artifacts.check_tokenizer(config, workdir, before)
    for split in (data.train_split, data.eval_split):
        artifacts.check_conditions(config, workdir, generator, split, split_facts(data, split), before)
        require_captions(caption_judges(settings), split_facts(data, split))
    check_judges(config, workdir, before)
    folder = _folder(posttraining.method_of(config), workdir)
    resumed = artifacts.check_resumable(folder, config, "posttrain", state)
    if _needs_start(config, resumed=resumed):
        artifacts.check_generator(_starting_place(config, workdir, before), config, workdir, generator, before)


def _check_settings(config: ConfigDict) -> None:
    settings = config.posttrain
    check_batch(config.mesh, settings.loop.batch_size, settings.accumulation or 1, "config.posttrain.loop.batch_size")
    posttraining.method_of(config)
    batches.random_view_of(settings.augmentation)


def _needs_start(config: ConfigDict, *, resumed: bool) -> bool:
    """Whether the generator that training starts from is read."""
    trains = posttraining.method_of(config).trains
    return not resumed or bool(config.posttrain.kl_weight) or trains == "decoder"


def _folder(method: Method, workdir: Path) -> Path:
    """Where what is trained goes."""
    if method.trains == "decoder":
        return artifacts.posttrained_decoder_folder(workdir)
    return artifacts.posttrained_folder(workdir)


def _starting_point(
    config: ConfigDict, workdir: Path, generator: Any, tokenizer: artifacts.Tokenizer, text_encoder: str
) -> Any:
    """Parameters of the generator that training starts from."""
    place = _starting_place(config, workdir)
    log.info("posttrain: starting from %s", place)
    return artifacts.read_generator(place, config, generator, tokenizer, text_encoder=text_encoder)


def _starting_place(config: ConfigDict, workdir: Path, before: Collection[str] = ()) -> Path:
    """The generator trained in this workdir, now or by a job that runs before, or `config.init_from` where none is."""
    place = artifacts.generator_folder(workdir)
    there = place.exists() or artifacts.to_be_made(place, config, workdir, before)
    return places.place(config.init_from) if config.init_from and not there else place


def _watcher(
    config: ConfigDict,
    workdir: Path,
    method: Method,
    networks: Networks,
    tokenizer: Any,
    source: ImageSource,
    conditions: Callable[[np.ndarray], Any],
) -> Callable[[int, Any], None]:
    """(step, generator's parameters) -> writes the cross-entropy of held-out codes, with conditions and without.

    Guidance lives on the difference of the two: where the second one rises, guided samples get worse. The context has
    no noise. A method that trains the decoder leaves both as they are, and nothing is written.
    """
    if method.trains != "generator":
        return lambda step, params: None
    size = config.data.image_size
    held_out = next(batches.ordered_batches(source, start=0, stop=HELD_OUT, image_size=size, batch_size=HELD_OUT))
    images, condition = unit_images(held_out), conditions(held_out["label"])

    @jax.jit
    def cross_entropies(params, tokenizer):
        codes = networks.tokenizer.apply({"params": tokenizer}, images, method="encode")
        context = Context(codes, codes, condition)
        names = {"cross_entropy": True, "unconditional_cross_entropy": False}
        return {name: cross_entropy(networks, params, context, conditional=given) for name, given in names.items()}

    def look(step: int, params: Any) -> None:
        found = {name: float(fetch(value)) for name, value in cross_entropies(params, tokenizer).items()}
        with MetricWriter(workdir, WATCHED, start_step=step - 1) as writer:
            writer.write(step, found)

    return look


def _drawer(
    config: ConfigDict,
    networks: Networks,
    frozen: dict,
    source: ImageSource,
    conditions: Callable[[np.ndarray], Any],
    texts: CaptionFeatures,
) -> Callable[[TrainState], dict[str, np.ndarray]]:
    """state -> {'posttrain': the sheet of held-out images, their reconstructions, and samples with rewards}."""
    method, group, size = posttraining.method_of(config), config.posttrain.group, config.data.image_size
    held_out = next(batches.ordered_batches(source, start=0, stop=SHEET, image_size=size, batch_size=SHEET))
    labels, originals = held_out["label"], held_out["image"]
    batch = {"image": originals, "label": labels, "index": np.arange(len(labels)), "condition": conditions(labels)}
    batch |= texts.of(labels)

    @jax.jit
    def judged(params, frozen):
        """Reconstructions and samples [8, 1 + G, H, W, 3] and the samples' rewards [8, G]."""
        generator = params if method.trains == "generator" else frozen["generator"]
        if method.trains == "decoder":
            frozen = frozen | {"tokenizer": frozen["tokenizer"] | params}
        key = jax.random.key(config.seed)
        samples = method.draw_samples(networks, config, generator, frozen, batch, key)
        codes = read_context(networks, config.posttrain, frozen, batch, key).codes
        every = jnp.concatenate([codes[:, None], samples], axis=1)  # [8, 1 + G, N]
        variables = {"params": frozen["tokenizer"]}
        images = jax.lax.map(lambda codes: networks.tokenizer.apply(variables, codes, method="decode"), every)
        return images, score(networks, config.posttrain, frozen, samples, batch)[0]

    def draw(state: TrainState) -> dict[str, np.ndarray]:
        images, reward = map(fetch, judged(state.params, frozen))
        rows = np.concatenate([originals[:, None], pictures.to_uint8(images)], axis=1)
        texts = [text for row in reward for text in ("original", "decoded", *map("{:.3f}".format, row))]
        tiles = pictures.labelled(rows.reshape(-1, *originals.shape[1:]), texts)
        return {"posttrain": pictures.grid(tiles, 2 + group)}

    return draw
