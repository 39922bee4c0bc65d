"""`--job=posttrain`: VA-π, a generator learns to sample codes that decode back to the image; or a baseline of it."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, generators
from rear_jax.data import batches
from rear_jax.data.captions import CaptionFile
from rear_jax.data.images import ImageSource, fingerprint, open_source, require_classes
from rear_jax.errors import RearError
from rear_jax.runtime import distributed, pictures
from rear_jax.runtime.mesh import check_batch, fetch, make_mesh
from rear_jax.training import fitting, loop, posttraining
from rear_jax.training.posttraining.judges import judges_of
from rear_jax.training.posttraining.method import Method
from rear_jax.training.posttraining.rewards import images_of, score
from rear_jax.training.posttraining.teacher_forcing import Networks, bare_generator, read_context
from rear_jax.training.state import TrainState

log = logging.getLogger(__name__)

SHEET = 8  # images on posttrain.png


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains `workdir/posttrained` from the generator of `--job=train`, or from `config.init_from`.

    A method that trains the decoder leaves `workdir/posttrained_decoder` instead. Either way `posttrain.png` is left: a
    row for each of a few held-out images with the original, its reconstruction, and samples with their rewards.
    """
    settings, data = config.posttrain, config.data
    check_batch(config.mesh, settings.loop.batch_size, settings.accumulation or 1, "config.posttrain.loop.batch_size")
    posttraining.method_of(config)
    tokenizer = artifacts.load_tokenizer(config, workdir)
    generator = bare_generator(config, tokenizer.module)
    method = posttraining.checked_method(config, generator)
    source, held_out = (open_source(data.source, data.path, split) for split in (data.train_split, data.eval_split))
    distributed.agree(f"the images of {source.name}", fingerprint(source))
    conditions = _conditions(config, generator, {data.train_split: source, data.eval_split: held_out})
    asked = judges_of(config, workdir)
    checkpoints, saved = artifacts.resumable(_folder(method, workdir), settings.loop, config, "posttrain")
    if saved:
        tokenizer.require(saved["tokenizer_fingerprint"], f"what {checkpoints.folder} holds")

    start = {}
    if not saved or settings.kl_weight or method.trains == "decoder":
        start = _starting_point(config, workdir, generator, tokenizer)

    def learn(config: ConfigDict) -> loop.Learning:
        return posttraining.learning(config, tokenizer, start, asked)

    images = batches.training_stream(source, config, settings.loop, settings.augmentation)

    def stream(start: int) -> Iterator[dict[str, Any]]:
        return _with_conditions(images(start), conditions)

    networks = posttraining.networks_of(config, tokenizer.module, asked)
    draw, devices = _drawer(config, networks, learn(config).frozen, held_out, conditions), make_mesh(config.mesh)
    record = config.to_dict() | {"holds": method.trains, "tokenizer_fingerprint": tokenizer.fingerprint}
    state = fitting.train(config, learn, loop.Run(stream, devices, record, checkpoints, workdir, draw=draw))
    checkpoints.close()
    with jax.set_mesh(devices):
        sheet = draw(state)["posttrain"]
    if distributed.is_first():
        pictures.save_png(workdir / "posttrain.png", sheet)


def _folder(method: Method, workdir: Path) -> Path:
    """Where what is trained goes."""
    if method.trains == "decoder":
        return artifacts.posttrained_decoder_folder(workdir)
    return artifacts.posttrained_folder(workdir)


def _starting_point(config: ConfigDict, workdir: Path, generator: Any, tokenizer: artifacts.Tokenizer) -> Any:
    """Parameters of the generator trained in this workdir, or of `config.init_from` where none was."""
    place = artifacts.generator_folder(workdir)
    if config.init_from and not place.exists():
        place = Path(config.init_from)
    log.info("posttrain: starting from %s", place)
    return artifacts.read_generator(place, config, generator, tokenizer)


def _conditions(config: ConfigDict, generator: Any, sources: dict[str, ImageSource]) -> Callable[[np.ndarray], Any]:
    """Labels [b] -> what the generator is conditioned on: themselves, or the captions with these numbers.

    Raises RearError: of the sources, by split, one has labels that are no classes or captions; captions cannot be read.
    """
    if not generators.takes_captions(generator):
        for source in sources.values():
            require_classes(source, config.data.num_classes)
        return lambda labels: labels
    option = "config.posttrain.captions"
    captions = CaptionFile(
        config.posttrain.captions, option=option, length=generator.caption_length, dim=generator.caption_dim
    )
    for split, source in sources.items():
        if source.num_classes > len(captions):
            raise RearError(
                f"{source.name} ({split}) has labels up to {source.num_classes - 1}, {option} has {len(captions)} "
                "captions: an image's label is the number of its caption."
            )
    return captions.__getitem__


def _with_conditions(stream: Any, conditions: Callable[[np.ndarray], Any]) -> Iterator[dict[str, Any]]:
    """The batches with 'condition' beside 'label'."""
    try:
        for batch in stream:
            yield batch | {"condition": conditions(batch["label"])}
    finally:
        stream.close()


def _drawer(
    config: ConfigDict,
    networks: Networks,
    frozen: dict,
    source: ImageSource,
    conditions: Callable[[np.ndarray], Any],
) -> Callable[[TrainState], dict[str, np.ndarray]]:
    """state -> {'posttrain': the sheet of held-out images, their reconstructions, and samples with rewards}."""
    method, group, size = posttraining.method_of(config), config.posttrain.group, config.data.image_size
    held_out = next(batches.ordered_batches(source, start=0, stop=SHEET, image_size=size, batch_size=SHEET))
    labels, originals = held_out["label"], held_out["image"]
    batch = {"image": originals, "label": labels, "index": np.arange(len(labels)), "condition": conditions(labels)}

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
        images = jax.lax.map(lambda codes: images_of(networks, frozen["tokenizer"], codes), every)
        return images, score(networks, config.posttrain, frozen, samples, batch)[0]

    def draw(state: TrainState) -> dict[str, np.ndarray]:
        images, reward = map(fetch, judged(state.params, frozen))
        rows = np.concatenate([originals[:, None], pictures.to_uint8(images)], axis=1)
        texts = [text for row in reward for text in ("original", "decoded", *map("{:.3f}".format, row))]
        tiles = pictures.labelled(rows.reshape(-1, *originals.shape[1:]), texts)
        return {"posttrain": pictures.grid(tiles, 2 + group)}

    return draw
