"""`--job=posttrain`: VA-π, a generator learns to sample codes that decode back to the image; or a baseline of it."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, distributed, models, pictures
from rear_jax.config import refuse_changes
from rear_jax.data import batches
from rear_jax.data.captions import CaptionFile
from rear_jax.data.images import ImageSource, fingerprint, open_source, require_classes
from rear_jax.errors import RearError
from rear_jax.tokenizers.discriminator import PatchDiscriminator
from rear_jax.training import class_probe, loop, mesh, perceptual
from rear_jax.training.checkpoints import Checkpoints
from rear_jax.training.posttraining import METHODS, parts, rewards
from rear_jax.training.state import TrainState, adamw

log = logging.getLogger(__name__)

IDENTITY = (*artifacts.GENERATOR_SETTINGS, "posttrain.method")
SHEET = 8  # images on posttrain.png


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains `workdir/posttrained` from the generator of `--job=train`, or from `config.init_from`.

    Method 'tokenizer' trains `workdir/posttrained_decoder` instead. Either way `posttrain.png` is left: a row for each
    of a few held-out images with the original, its reconstruction, and samples with their rewards.
    """
    settings, data = config.posttrain, config.data
    method = _method(config)
    mesh.check_batch(config.mesh, settings.loop.batch_size, settings.accumulation, "config.posttrain.loop.batch_size")
    tokenizer = artifacts.load_tokenizer(config, workdir)
    source, held_out = (open_source(data.source, data.path, split) for split in (data.train_split, data.eval_split))
    distributed.agree(f"the images of {source.name}", fingerprint(source))
    networks, frozen = _networks(config, workdir, tokenizer, source)
    conditions = _conditions(config, networks.generator, {data.train_split: source, data.eval_split: held_out})
    checkpoints = Checkpoints(
        _folder(config, workdir), keep=settings.loop.keep_checkpoints, keep_every=settings.loop.keep_every
    )
    fresh = checkpoints.latest_step() is None
    if not fresh:
        saved = checkpoints.record()
        refuse_changes(saved, config, IDENTITY, str(checkpoints.folder))
        tokenizer.require(saved["tokenizer_fingerprint"], f"what {checkpoints.folder} holds")

    given = {}
    if method.TRAINS == "decoder":
        frozen["generator"] = _starting_point(config, workdir, networks.generator, tokenizer)
        given = {"decoder": tokenizer.params["decoder"]}
    elif fresh or settings.kl_weight:
        given = _starting_point(config, workdir, networks.generator, tokenizer)
        if settings.kl_weight:
            frozen["reference"] = given
    optimizer = adamw(settings.optimizer, settings.loop.steps * settings.inner_updates)

    draw, devices = _drawer(config, networks, frozen, held_out, conditions), mesh.make_mesh(config.mesh)
    state = loop.train(
        "posttrain",
        method.make_step(networks, config, optimizer),
        lambda given: parts.init_state(networks, config, optimizer, given, trains=method.TRAINS),
        given,
        lambda start: _with_conditions(
            batches.image_batches(
                source,
                image_size=data.image_size,
                augment=settings.augmentation,
                batch_size=settings.loop.batch_size,
                seed=config.seed,
                start_step=start,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            ),
            conditions,
        ),
        frozen=frozen,
        mesh=devices,
        settings=settings.loop,
        seed=config.seed,
        record=config.to_dict() | {"holds": method.TRAINS, "tokenizer_fingerprint": tokenizer.fingerprint},
        checkpoints=checkpoints,
        workdir=workdir,
        draw=draw,
    )
    checkpoints.close()
    with jax.set_mesh(devices):
        sheet = draw(state)["posttrain"]
    if distributed.is_first():
        pictures.save_png(workdir / "posttrain.png", sheet)


def _method(config: ConfigDict) -> Any:
    """The module of `config.posttrain.method`, its settings checked."""
    name = config.posttrain.method
    if name not in METHODS:
        raise RearError(f"config.posttrain.method = {name!r}: use one of {', '.join(METHODS)}.")
    METHODS[name].check(config)
    return METHODS[name]


def _folder(config: ConfigDict, workdir: Path) -> Path:
    """Where what is trained goes."""
    if _method(config).TRAINS == "decoder":
        return artifacts.posttrained_decoder_folder(workdir)
    return artifacts.posttrained_folder(workdir)


def _networks(
    config: ConfigDict, workdir: Path, tokenizer: artifacts.Tokenizer, source: ImageSource
) -> tuple[parts.Networks, dict[str, Any]]:
    """Everything that plays a part, and the frozen parameters but for the generator's; rewards get what they need."""
    settings, wanted = config.posttrain, rewards.wanted(config.posttrain)
    frozen = {"tokenizer": tokenizer.params}
    networks = parts.Networks(parts.bare_generator(config, tokenizer.module), tokenizer.module)
    if "perceptual" in wanted:
        network = perceptual.load(
            settings.perceptual_network, config.lpips, option="config.posttrain.perceptual_network"
        )
        networks, frozen["perceptual"] = networks._replace(perceptual=network), network.params
    if "discriminator" in wanted:
        vq = config.tokenizer_training
        network = PatchDiscriminator(vq.discriminator_channels, vq.discriminator_layers)
        networks = networks._replace(discriminator=network)
        shapes = artifacts.discriminator_shapes(network, config.data.image_size)
        frozen["discriminator"] = artifacts.read_discriminator(config, workdir, shapes)
    if "class_probability" in wanted:
        if models.takes_captions(networks.generator):
            raise RearError("config.posttrain.reward.class_probability: captions are no classes: set it to 0.")
        require_classes(source, config.data.num_classes)
        probe = class_probe.fit(
            source, config.data, count=settings.probe_images, feature_size=config.evaluate.feature_size
        )
        log.info("posttrain: the class probe is right for %.1f %% of other real images", 100 * probe.real_accuracy)
        networks, frozen["class_probe"] = networks._replace(class_probe=probe), probe.params
    return networks, frozen


def _starting_point(config: ConfigDict, workdir: Path, generator: Any, tokenizer: artifacts.Tokenizer) -> Any:
    """Parameters of the generator trained in this workdir, or of `config.init_from` where none was."""
    place = artifacts.generator_folder(workdir)
    if config.init_from and not place.exists():
        place = Path(config.init_from)
    log.info("posttrain: starting from %s", place)
    return artifacts.read_generator(place, config, artifacts.generator_shapes(generator), tokenizer)


def _conditions(config: ConfigDict, generator: Any, sources: dict[str, ImageSource]) -> Callable[[np.ndarray], Any]:
    """Labels [b] -> what the generator is conditioned on: themselves, or the captions with these numbers.

    Raises:
      RearError: of the sources, by split, one has labels that are no classes or captions; captions cannot be read.
    """
    if not models.takes_captions(generator):
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
    networks: parts.Networks,
    frozen: dict,
    source: ImageSource,
    conditions: Callable[[np.ndarray], Any],
) -> Callable[[TrainState], dict[str, np.ndarray]]:
    """state -> {'posttrain': the sheet of held-out images, their reconstructions, and samples with rewards}."""
    method, group, size = _method(config), config.posttrain.group, config.data.image_size
    held_out = next(batches.ordered_batches(source, start=0, stop=SHEET, image_size=size, batch_size=SHEET))
    labels, originals = held_out["label"], held_out["image"]
    batch = {"image": originals, "label": labels, "index": np.arange(len(labels)), "condition": conditions(labels)}

    @jax.jit
    def judged(params, frozen):
        """Reconstructions and samples [8, 1 + G, H, W, 3] and the samples' rewards [8, G]."""
        generator = params if method.TRAINS == "generator" else frozen["generator"]
        if method.TRAINS == "decoder":
            frozen = frozen | {"tokenizer": frozen["tokenizer"] | params}
        key = jax.random.key(config.seed)
        samples = method.draw_samples(networks, config, generator, frozen, batch, key)
        codes = parts.read_context(networks, config.posttrain, frozen, batch, key).codes
        every = jnp.concatenate([codes[:, None], samples], axis=1)  # [8, 1 + G, N]
        images = jax.lax.map(lambda codes: parts.decode(networks, frozen["tokenizer"], codes), every)
        return images, parts.score(networks, config.posttrain, frozen, samples, batch)[0]

    def draw(state: TrainState) -> dict[str, np.ndarray]:
        images, reward = map(mesh.fetch, judged(state.params, frozen))
        rows = np.concatenate([originals[:, None], pictures.to_uint8(images)], axis=1)
        texts = [text for row in reward for text in ("original", "decoded", *map("{:.3f}".format, row))]
        tiles = pictures.labelled(rows.reshape(-1, *originals.shape[1:]), texts)
        return {"posttrain": pictures.grid(tiles, 2 + group)}

    return draw
