"""`--job=train`: a generator learns to predict the codes of images."""

import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, distributed, models
from rear_jax.config import refuse_changes
from rear_jax.data import batches
from rear_jax.data.codes import check_codes, open_codes
from rear_jax.data.images import fingerprint, open_source, require_classes
from rear_jax.errors import RearError
from rear_jax.training import loop, mesh, next_code
from rear_jax.training.checkpoints import Checkpoints
from rear_jax.training.state import adamw
from rear_jax.watching import Watch

log = logging.getLogger(__name__)

IDENTITY = ("data.num_classes", "data.image_size", "tokenizer.", "model.", "method.name", "method.projector")


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains `workdir/generator` on code files, or on images that it encodes as it goes."""
    settings = config.train.loop
    mesh.check_batch(config.mesh, settings.batch_size, config.train.accumulation, "config.train.loop.batch_size")
    tokenizer = artifacts.load_tokenizer(config, workdir)
    model = models.build(config, num_codes=tokenizer.num_codes, embedding_dim=tokenizer.module.embedding_dim)
    if models.takes_captions(model):
        raise RearError("--job=train has no captions to go with the codes: set config.model.condition = 'class'.")
    optimizer = adamw(config.train.optimizer, settings.steps)
    record = config.to_dict() | {"holds": "generator", "tokenizer_fingerprint": tokenizer.fingerprint}

    checkpoints = Checkpoints(
        artifacts.generator_folder(workdir), keep=settings.keep_checkpoints, keep_every=settings.keep_every
    )
    if checkpoints.latest_step() is not None:
        saved = checkpoints.record()
        refuse_changes(saved, config, IDENTITY, f"{checkpoints.folder}")
        tokenizer.require(saved["tokenizer_fingerprint"], f"the generator in {checkpoints.folder}")

    frozen = {"codebook": tokenizer.codebook()}
    encode = None
    if config.codes.on_the_fly:
        frozen["tokenizer"] = tokenizer.params
        encode = next_code.encoder(tokenizer.module)

    given = {}
    if config.init_from and checkpoints.latest_step() is None:
        given = artifacts.read_generator(Path(config.init_from), config, artifacts.generator_shapes(model), tokenizer)
        log.info("train: starting from %s", config.init_from)

    count = sum(leaf.size for leaf in jax.tree.leaves(artifacts.generator_shapes(model)))
    log.info("train: %s %s, %.1fM parameters", config.method.name, config.model.name, count / 1e6)
    watch = None
    if config.train.evaluate_every:
        watch = config.train.evaluate_every, Watch(config, workdir, model, tokenizer, record).look
    stream, counts = _batches(config, workdir, tokenizer)
    loop.train(
        "train",
        next_code.train_step(model, config, optimizer, encode),
        lambda given: next_code.init_state(model, config, optimizer, given),
        given,
        stream,
        frozen=frozen,
        mesh=mesh.make_mesh(config.mesh),
        settings=settings,
        seed=config.seed,
        record=record,
        checkpoints=checkpoints,
        workdir=workdir,
        watch=watch,
        counts=counts,
    )
    checkpoints.close()


def _batches(config: ConfigDict, workdir: Path, tokenizer: artifacts.Tokenizer):
    """start step -> iterator of this process's share of each batch; and what is counted while they are read."""
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batch_size = config.train.loop.batch_size
    if config.codes.on_the_fly:
        source = open_source(config.data.source, config.data.path, config.data.train_split)
        require_classes(source, config.data.num_classes)
        distributed.agree(f"the images of {source.name}", fingerprint(source))

        def from_images(start: int) -> Iterator[dict[str, np.ndarray]]:
            return batches.image_batches(
                source,
                image_size=config.data.image_size,
                augment=config.tokenizer_training.augmentation,
                batch_size=batch_size,
                seed=config.seed,
                start_step=start,
                **share,
            )

        return from_images, dict

    codes = open_codes(
        artifacts.codes_folder(config, workdir),
        in_memory=config.codes.in_memory,
        max_corrupt_share=config.codes.max_corrupt_share,
    )
    check_codes(
        codes.header,
        fingerprint=tokenizer.fingerprint,
        codebook_size=config.tokenizer.codebook_size,
        codes_per_image=tokenizer.num_codes,
        num_classes=config.data.num_classes,
    )

    some = codes.read(np.linspace(0, len(codes) - 1, 64).astype(int))["codes"].tolist()
    distributed.agree(f"the codes in {artifacts.codes_folder(config, workdir)}", f"{codes.header} {some}")

    def from_codes(start: int) -> Iterator[dict[str, np.ndarray]]:
        return batches.code_batches(codes, batch_size=batch_size, seed=config.seed, start_step=start, **share)

    return from_codes, lambda: {"corrupt_records": codes.num_corrupt}
