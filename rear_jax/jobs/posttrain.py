"""`--job=posttrain`: VA-π, a generator learns to sample codes that decode back to the image."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, distributed, grpo, models, pictures
from rear_jax.config import refuse_changes
from rear_jax.data import batches
from rear_jax.data.images import open_source, require_classes
from rear_jax.errors import RearError
from rear_jax.training import loop, mesh, perceptual, va_pi
from rear_jax.training.checkpoints import Checkpoints
from rear_jax.training.state import TrainState, adamw, new_state

log = logging.getLogger(__name__)

SHEET = 8  # images on posttrain.png


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains `workdir/posttrained` from the generator of `--job=train`, or from `config.init_from`.

    Leaves `posttrain.png`: a row for each of a few held-out images with the original, its reconstruction, and samples.
    """
    settings, data = config.posttrain, config.data
    mesh.check_batch(config.mesh, settings.loop.batch_size, settings.accumulation, "config.posttrain.loop.batch_size")
    va_pi.check_settings(settings)
    tokenizer = artifacts.load_tokenizer(config, workdir)
    generator = _bare_generator(config, tokenizer)
    seen_through = None
    if settings.perceptual_weight:
        seen_through = perceptual.load(
            settings.perceptual_network, config.lpips, option="config.posttrain.perceptual_network"
        )
    networks = va_pi.Networks(generator, tokenizer.module, seen_through)
    optimizer = adamw(settings.optimizer, settings.loop.steps * settings.inner_updates)
    source = open_source(data.source, data.path, data.train_split)
    require_classes(source, data.num_classes)
    checkpoints = Checkpoints(
        artifacts.posttrained_folder(workdir), keep=settings.loop.keep_checkpoints, keep_every=settings.loop.keep_every
    )
    if checkpoints.latest_step() is not None:
        saved = checkpoints.record()
        refuse_changes(saved, config, artifacts.GENERATOR_SETTINGS, str(checkpoints.folder))
        tokenizer.require(saved["tokenizer_fingerprint"], f"the generator in {checkpoints.folder}")

    given = {}
    frozen = {"tokenizer": tokenizer.params, "perceptual": seen_through.params if seen_through else None}
    if checkpoints.latest_step() is None or settings.kl_weight:
        given = _starting_point(config, workdir, generator, tokenizer)
    if settings.kl_weight:
        frozen["reference"] = given

    def init(given: Any) -> TrainState:
        params = generator.init(jax.random.key(config.seed), *models.example_inputs(generator))["params"]
        return new_state(params | given, optimizer)

    draw = _drawer(config, networks, frozen)
    state = loop.train(
        "posttrain",
        va_pi.posttrain_step(networks, config, optimizer),
        init,
        given,
        lambda start: batches.image_batches(
            source,
            image_size=data.image_size,
            augment=settings.augmentation,
            batch_size=settings.loop.batch_size,
            seed=config.seed,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ),
        frozen=frozen,
        mesh=mesh.make_mesh(config.mesh),
        settings=settings.loop,
        seed=config.seed,
        record=config.to_dict() | {"holds": "generator", "tokenizer_fingerprint": tokenizer.fingerprint},
        checkpoints=checkpoints,
        workdir=workdir,
        draw=draw,
    )
    checkpoints.close()
    sheet = draw(state)["posttrain"]
    if distributed.is_first():
        pictures.save_png(workdir / "posttrain.png", sheet)


def _bare_generator(config: ConfigDict, tokenizer: artifacts.Tokenizer) -> Any:
    """The config's generator without what only its training needs: projectors and dropout play no part here."""
    bare = config.copy_and_resolve_references()
    bare.method.name = "ar"
    generator = models.build(bare, num_codes=tokenizer.num_codes, embedding_dim=tokenizer.module.embedding_dim)
    if models.takes_captions(generator):
        raise RearError("--job=posttrain has no captions to go with the images: set config.model.condition = 'class'.")
    return generator


def _starting_point(config: ConfigDict, workdir: Path, generator: Any, tokenizer: artifacts.Tokenizer) -> Any:
    """Parameters of the generator trained in this workdir, or of `config.init_from` where none was."""
    place = artifacts.generator_folder(workdir)
    if config.init_from and not place.exists():
        place = Path(config.init_from)
    log.info("posttrain: starting from %s", place)
    return artifacts.read_generator(place, config, artifacts.generator_shapes(generator), tokenizer)


def _drawer(config: ConfigDict, networks: va_pi.Networks, frozen: dict):
    """state -> {'posttrain': the sheet of held-out images, their reconstructions and samples for them}."""
    source = open_source(config.data.source, config.data.path, config.data.eval_split)
    held_out = next(
        batches.ordered_batches(source, start=0, stop=SHEET, image_size=config.data.image_size, batch_size=SHEET)
    )
    images, labels, group = held_out["image"], held_out["label"], config.posttrain.group

    @jax.jit
    def sample(params, tokenizer_params):
        def of_tokenizer(x, method):
            return networks.tokenizer.apply({"params": tokenizer_params}, x, method=method)

        codes = of_tokenizer(images.astype(jnp.float32) / 255.0, "encode")
        logits = networks.generator.apply({"params": params}, codes, labels).logits
        samples = grpo.draw_groups(jax.random.key(config.seed), logits, group)
        every = jnp.concatenate([codes[:, None], samples], axis=1)  # [8, 1 + G, N]
        return of_tokenizer(every.reshape(-1, codes.shape[-1]), "decode")

    def draw(state: TrainState) -> dict[str, np.ndarray]:
        decoded = pictures.to_uint8(mesh.fetch(sample(state.params, frozen["tokenizer"])))
        rows = decoded.reshape(len(images), 1 + group, *images.shape[1:])
        sheet = np.concatenate([images[:, None], rows], axis=1).reshape(-1, *images.shape[1:])
        return {"posttrain": pictures.grid(sheet, 2 + group)}

    return draw
