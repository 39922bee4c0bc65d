"""The frozen networks that rewards ask, by name.

A judge is a function (config, workdir) -> (network, its parameters). Without a workdir, for a plan, it gives the shapes
of the parameters in their place. A reward with a network of its own takes two files: the reward's, and this one.
"""

import functools
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rear_jax import artifacts
from rear_jax.metrics import perceptual
from rear_jax.tokenizers.discriminator import PatchDiscriminator, shapes
from rear_jax.training.posttraining import class_probe, rewards, text_judge

log = logging.getLogger(__name__)

Judged = tuple[Any, Any]  # a network, and its parameters or their shapes


def judges_of(config: ConfigDict, workdir: Path | None = None) -> dict[str, Judged]:
    """The networks that the config's rewards ask; raises RearError where the parameters of one are not there."""
    asked = dict.fromkeys(rewards.declared(name).judge for name in rewards.wanted(config.posttrain))
    return {name: JUDGES[name](config, workdir) for name in asked if name}


def check_judges(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """Raises RearError where `judges_of` will, as far as that can be told without reading images.

    `before` are jobs that run first: what these will make is not looked for.
    """
    for name, (_, params) in judges_of(config).items():
        if name in CHECKS:
            CHECKS[name](config, workdir, params, before)


def perceptual_network(config: ConfigDict, workdir: Path | None) -> Judged:
    """The network of `config.posttrain.perceptual_network`."""
    name, option = config.posttrain.perceptual_network, "config.posttrain.perceptual_network"
    network = perceptual.outline(name, option=option)
    if workdir is not None:
        network = perceptual.load(name, config.lpips, option=option)
    return network, network.params


def discriminator(config: ConfigDict, workdir: Path | None) -> Judged:
    """The discriminator that the tokenizer was trained with."""
    vq = config.tokenizer_training
    network = PatchDiscriminator(vq.discriminator_channels, vq.discriminator_layers)
    wanted = shapes(network, config.data.image_size)
    return network, wanted if workdir is None else artifacts.read_discriminator(config, workdir, wanted)


def probe(config: ConfigDict, workdir: Path | None) -> Judged:
    """A linear probe of the data set's real images."""
    size = config.evaluate.feature_size
    if workdir is None:
        network = class_probe.outline(config.data.num_classes, feature_size=size)
    else:
        network = class_probe.fit(config.data, count=config.posttrain.probe_images, feature_size=size)
        log.info("posttrain: the class probe is right for %.1f %% of other real images", 100 * network.real_accuracy)
    return network, network.params


def of_text(name: str, config: ConfigDict, workdir: Path | None) -> Judged:
    """The network that compares images with captions for the reward `name`."""
    return text_judge.outline(name, config) if workdir is None else text_judge.load(name, config)


JUDGES: dict[str, Callable[[ConfigDict, Path | None], Judged]] = {
    "perceptual": perceptual_network,
    "discriminator": discriminator,
    "class_probe": probe,
    "clip": functools.partial(of_text, "clip"),
    "hps": functools.partial(of_text, "hps"),
}

# name -> (config, workdir, shapes of the network's parameters, jobs that run first) raises RearError where they cannot
# be had
CHECKS: dict[str, Callable[[ConfigDict, Path, Any, Collection[str]], Any]] = {
    "perceptual": lambda config, workdir, *_: perceptual_network(config, workdir),
    "discriminator": artifacts.check_discriminator,
    "class_probe": lambda config, *_: class_probe.check(config.data, count=config.posttrain.probe_images),
    "clip": lambda config, *_: text_judge.scorer("clip", config),
    "hps": lambda config, *_: text_judge.scorer("hps", config),
}
