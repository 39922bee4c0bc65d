"""`--job=tokenizer`: a VQ tokenizer learns to reconstruct images from codes, or to predict another's codes first."""

import logging
from collections.abc import Collection
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, tokenizers
from rear_jax.data import batches
from rear_jax.data.sources import fingerprint, open_split, split_facts
from rear_jax.errors import RearError
from rear_jax.metrics import perceptual
from rear_jax.runtime import distributed, pictures, places
from rear_jax.runtime.mesh import check_batch, fetch, make_mesh
from rear_jax.training import loop, vq
from rear_jax.training.state import TrainState

log = logging.getLogger(__name__)

SHEET = 16  # images on reconstructions.png
PERCEPTUAL = "config.tokenizer_training.perceptual_network"
STARTS = {  # value of init_parts -> what reads them, and what checks that they can be read
    "all": (artifacts.read_tokenizer, artifacts.check_tokenizer_at),
    "codes": (artifacts.read_encoder, artifacts.check_encoder_at),
}


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains `workdir/tokenizer` and leaves `reconstructions.png`: originals above, reconstructions below."""
    if config.tokenizer_from:
        log.info("tokenizer: nothing to train, config.tokenizer_from is %s", config.tokenizer_from)
        return
    settings, data = config.tokenizer_training, config.data
    _check_settings(config)
    source = open_split(data, data.train_split)
    distributed.agree(f"the images of {source.name}", fingerprint(source))
    networks = _networks(config)
    frozen = _frozen_params(config, networks)
    checkpoints, saved = artifacts.resumable(artifacts.tokenizer_folder(workdir), settings.loop, config, "tokenizer")
    given = {} if saved else {"tokenizer": _first_params(config, networks, frozen)}
    originals, devices = _held_out(config), make_mesh(config.mesh)

    @jax.jit
    def reconstruct(params):
        return networks.tokenizer.apply({"params": params}, originals.astype(jnp.float32) / 255.0)[0]

    def draw(state: TrainState) -> dict[str, np.ndarray]:
        sheet = np.concatenate([originals, pictures.to_uint8(fetch(reconstruct(state.params["tokenizer"])))])
        return {"reconstructions": pictures.grid(sheet, SHEET)}

    stream = batches.training_stream(source, config, settings.loop, settings.augmentation)
    record = config.to_dict() | {"holds": "tokenizer"}
    learning = vq.learning(config, networks, frozen, given)
    state = loop.train(learning, loop.Run(stream, devices, record, checkpoints, workdir, draw=draw))
    checkpoints.close()
    with jax.set_mesh(devices):
        sheet = draw(state)["reconstructions"]
    if distributed.is_first():
        pictures.save_png(workdir / "reconstructions.png", sheet)


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """See `Job.check`."""
    if config.tokenizer_from:
        return
    settings, data = config.tokenizer_training, config.data
    _check_settings(config)
    networks = _networks(config)
    learning = vq.learning(config, networks, {}, {})
    loop.check(learning.job, settings.loop)
    state = learning.state(make_mesh(config.mesh))
    for split in (data.train_split, data.eval_split):
        split_facts(data, split)
    if networks.proxy is None:
        _frozen_params(config, networks)  # files of at most some hundred megabytes
    else:
        made = _proxy_config(config)
        artifacts.check_tokenizer_at(places.place(settings.proxy), made, workdir, networks.proxy, before)
    resumed = artifacts.check_resumable(artifacts.tokenizer_folder(workdir), config, "tokenizer", state)
    if settings.init_from and not resumed:
        _, check_at = STARTS[settings.init_parts]
        check_at(places.place(settings.init_from), config, workdir, networks.tokenizer, before)


def _check_settings(config: ConfigDict) -> None:
    """Raises RearError for what settings alone tell, and what else asks them does not refuse by itself."""
    settings = config.tokenizer_training
    check_batch(config.mesh, settings.loop.batch_size, 1, "config.tokenizer_training.loop.batch_size")
    batches.random_view_of(settings.augmentation)
    for name, known in {"init_parts": STARTS, "codebook_update": ("gradient", "ema")}.items():
        if settings[name] not in known:
            raise RearError(f"config.tokenizer_training.{name} = {settings[name]!r}: use {' or '.join(known)}.")


def _networks(config: ConfigDict) -> vq.Networks:
    """What the objective needs.

    Raises RearError: the objective is unknown or needs something that the config does not give.
    """
    settings = config.tokenizer_training
    if "encoder" in vq.frozen_entries(settings) and not settings.init_from:
        raise RearError(
            "config.tokenizer_training.trained = 'decoder' leaves the encoder as it is: name a trained one, "
            "config.tokenizer_training.init_from."
        )
    if settings.objective == "codes":
        _proxy_config(config)
    return vq.outline(config)[0]


def _frozen_params(config: ConfigDict, networks: vq.Networks) -> dict:
    """The parameters that stay as they are; raises RearError where they are not there or not whole."""
    settings = config.tokenizer_training
    if networks.proxy is not None:
        return {"proxy": artifacts.read_tokenizer(places.place(settings.proxy), _proxy_config(config), networks.proxy)}
    return {"perceptual": perceptual.load(settings.perceptual_network, config.lpips, option=PERCEPTUAL).params}


def _proxy_config(config: ConfigDict) -> ConfigDict:
    """The config with, for its tokenizer, the one whose codes the objective 'codes' has predicted."""
    section = tokenizers.FAMILIES[config.tokenizer.name].proxy(config.tokenizer)
    if section is None or not config.tokenizer_training.proxy:
        raise RearError(vq.NEEDS_PROXY)
    made = config.copy_and_resolve_references()
    with made.unlocked():
        made.tokenizer, made.tokenizer_section = section, ""
    return made


def _first_params(config: ConfigDict, networks: vq.Networks, frozen: dict) -> dict:
    """The parts of the tokenizer that do not start afresh: those of `init_from`, and what a proxy gives."""
    settings, given = config.tokenizer_training, {}
    if settings.init_from:
        read, _ = STARTS[settings.init_parts]
        given = read(places.place(settings.init_from), config, networks.tokenizer)
        log.info("tokenizer: starting from %s", settings.init_from)
    if networks.proxy is not None:
        proxy = frozen["proxy"]
        given = given | {"pixel_codebook": proxy["codebook"], "pixel_decoder": proxy["decoder"]}
    return given


def _held_out(config: ConfigDict) -> np.ndarray:
    """The first images of the evaluation split, [SHEET, S, S, 3] uint8."""
    source = open_split(config.data, config.data.eval_split)
    return next(
        batches.ordered_batches(source, start=0, stop=SHEET, image_size=config.data.image_size, batch_size=SHEET)
    )["image"]
