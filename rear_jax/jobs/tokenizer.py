"""`--job=tokenizer`: a VQ tokenizer learns to reconstruct images from codes."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, distributed, pictures, tokenizers
from rear_jax.config import refuse_changes
from rear_jax.data import batches
from rear_jax.data.images import open_source
from rear_jax.tokenizers.discriminator import PatchDiscriminator
from rear_jax.training import loop, mesh, perceptual, vq
from rear_jax.training.checkpoints import Checkpoints
from rear_jax.training.state import TrainState

log = logging.getLogger(__name__)

IDENTITY = ("tokenizer.", "data.image_size", "tokenizer_training.codebook_update")
SHEET = 16  # images on reconstructions.png


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains `workdir/tokenizer` and leaves `reconstructions.png`: originals above, reconstructions below."""
    if config.tokenizer_from:
        log.info("tokenizer: nothing to train, config.tokenizer_from is %s", config.tokenizer_from)
        return
    settings, data = config.tokenizer_training, config.data
    mesh.check_batch(config.mesh, settings.loop.batch_size, 1, "config.tokenizer_training.loop.batch_size")
    source = open_source(data.source, data.path, data.train_split)
    seen_through = perceptual.load(
        settings.perceptual_network, config.lpips, option="config.tokenizer_training.perceptual_network"
    )
    networks = vq.Networks(
        tokenizers.build(config.tokenizer, data.image_size),
        seen_through.distance,
        PatchDiscriminator(settings.discriminator_channels, settings.discriminator_layers)
        if settings.discriminator_weight
        else None,
    )
    checkpoints = Checkpoints(
        artifacts.tokenizer_folder(workdir), keep=settings.loop.keep_checkpoints, keep_every=settings.loop.keep_every
    )
    if checkpoints.latest_step() is not None:
        refuse_changes(checkpoints.record(), config, IDENTITY, str(checkpoints.folder))
    given = {}
    if settings.init_from and checkpoints.latest_step() is None:
        shapes = artifacts.tokenizer_shapes(networks.tokenizer)
        given = {"tokenizer": artifacts.read_tokenizer(Path(settings.init_from), config, shapes)}
        log.info("tokenizer: starting from %s", settings.init_from)
    optimizer = vq.make_optimizer(config)
    originals = _held_out(config)

    @jax.jit
    def reconstruct(params):
        return networks.tokenizer.apply({"params": params}, originals.astype(jnp.float32) / 255.0)[0]

    def draw(state: TrainState) -> dict[str, np.ndarray]:
        sheet = np.concatenate([originals, pictures.to_uint8(mesh.fetch(reconstruct(state.params["tokenizer"])))])
        return {"reconstructions": pictures.grid(sheet, SHEET)}

    state = loop.train(
        "tokenizer",
        vq.tokenizer_step(networks, config, optimizer),
        lambda given: vq.init_state(networks, config, optimizer, given),
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
        frozen={"perceptual": seen_through.params},
        mesh=mesh.make_mesh(config.mesh),
        settings=settings.loop,
        seed=config.seed,
        record=config.to_dict() | {"holds": "tokenizer"},
        checkpoints=checkpoints,
        workdir=workdir,
        draw=draw,
    )
    checkpoints.close()
    sheet = draw(state)["reconstructions"]
    if distributed.is_first():
        pictures.save_png(workdir / "reconstructions.png", sheet)


def _held_out(config: ConfigDict) -> np.ndarray:
    """The first images of the evaluation split, [SHEET, S, S, 3] uint8."""
    source = open_source(config.data.source, config.data.path, config.data.eval_split)
    return next(
        batches.ordered_batches(source, start=0, stop=SHEET, image_size=config.data.image_size, batch_size=SHEET)
    )["image"]
