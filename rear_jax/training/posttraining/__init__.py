"""Post-training: VA-π and the methods it is compared with, one file each with a `METHOD`.

To add one, write its file and name it in METHODS (docs/extending.md).
"""

from collections.abc import Mapping
from typing import Any

import optax
from ml_collections import ConfigDict

from rear_jax import artifacts, generators, tokenizers
from rear_jax.config import default
from rear_jax.data.batches import image_shapes
from rear_jax.errors import RearError
from rear_jax.runtime.sharding import whole_frozen
from rear_jax.training import text
from rear_jax.training.loop import Learning
from rear_jax.training.posttraining import ar_grpo, rewards, ste, tokenizer, va_pi
from rear_jax.training.posttraining.judges import Judged
from rear_jax.training.posttraining.method import Method
from rear_jax.training.posttraining.teacher_forcing import READINGS, Networks, bare_generator
from rear_jax.training.state import TrainState, adamw, new_state

METHODS: dict[str, Method] = {
    "va_pi": va_pi.METHOD,
    "ste": ste.METHOD,
    "tokenizer": tokenizer.METHOD,
    "ar_grpo": ar_grpo.METHOD,
}


def method_of(config: ConfigDict) -> Method:
    """The method of `config.posttrain`; raises RearError where there is none of that name."""
    name = config.posttrain.method
    if name not in METHODS:
        raise RearError(f"config.posttrain.method = {name!r}: use one of {', '.join(METHODS)}.")
    return METHODS[name]


def checked_method(config: ConfigDict, generator: Any) -> Method:
    """The method of `config.posttrain`, its settings checked.

    Raises RearError: the method or a setting is unknown, cannot work, or has no effect with this method.
    """
    method, settings = method_of(config), config.posttrain
    read_by_some = sorted({name for other in METHODS.values() for name in other.reads})
    for name in read_by_some:
        if name not in method.reads and settings[name] != (usual := default().posttrain[name]):
            raise RearError(
                f"config.posttrain.{name} = {settings[name]} has no effect with config.posttrain.method = "
                f"{settings.method!r}: leave it at {usual}."
            )
    if settings.noise_reading not in READINGS:
        raise RearError(f"config.posttrain.noise_reading = {settings.noise_reading!r}: use {', '.join(READINGS)}.")
    if generators.takes_text(generator):
        lacking = {rewards.CLASSES: "asks for a class, and this generator takes captions"}
    else:
        lacking = {rewards.CAPTIONS: "asks for a caption, and this generator takes classes"}
    rewards.check(settings, {**method.lacks, **lacking})
    method.check(config)
    return method


def networks_of(config: ConfigDict, of_tokenizer: Any, judges: Mapping[str, Judged]) -> Networks:
    """All modules that play a part."""
    modules = {name: network for name, (network, _) in judges.items()}
    return Networks(bare_generator(config, of_tokenizer), of_tokenizer, modules)


def learning(
    config: ConfigDict,
    of_tokenizer: artifacts.Tokenizer,
    start: Any,
    judges: Mapping[str, Judged],
    reader: artifacts.TextReader | None = None,
) -> Learning:
    """What `--job=posttrain` computes; with shapes in the place of parameters the result is for a plan.

    Args:
      config: the experiment.
      of_tokenizer: the tokenizer.
      start: parameters of the generator that training starts from; {} where a saved state takes their place.
      judges: the networks that rewards ask, from `judges.judges_of`.
      reader: of captions, where batches hold their tokens.
    """
    settings, networks = config.posttrain, networks_of(config, of_tokenizer.module, judges)
    method = checked_method(config, networks.generator)
    frozen = {"tokenizer": of_tokenizer.params} | {name: params for name, (_, params) in judges.items()}
    frozen |= text.frozen_weights(reader)
    family = generators.family_of(networks.generator)
    given, rules = start, family.parameters
    if method.trains == "decoder":
        frozen["generator"], given = start, {"decoder": of_tokenizer.params["decoder"]}
        rules = (*tokenizers.family_of(of_tokenizer.module).parameters, *rules)
    elif settings.kl_weight:
        frozen["reference"] = start
    optimizer = adamw(settings.optimizer, settings.loop.steps * settings.inner_updates, rules)
    rows = settings.loop.batch_size
    texts = {"condition": reader.token_shapes(rows) if reader else family.condition_shapes(networks.generator, rows)}
    if names := rewards.caption_judges(settings):
        texts["text_features"] = {name: networks.judges[name].caption_shape(rows) for name in names}
    return Learning(
        job="posttrain",
        step=text.reading(method.make_step(networks, config, optimizer), reader),
        init=lambda given: init_state(networks, config, optimizer, given, trains=method.trains),
        given=given,
        frozen=frozen,
        batch=image_shapes(rows, config.data.image_size) | texts,
        rules=(*text.RULES, whole_frozen("reference", "generator"), *rules),
        settings=settings.loop,
        seed=config.seed,
        divides=config.mesh.divide_state,
        dtype=family.factor_dtype(networks.generator) if method.trains == "generator" else None,
    )


def init_state(
    networks: Networks, config: ConfigDict, optimizer: optax.GradientTransformation, given: Any, *, trains: str
) -> TrainState:
    """The state before the first step; `given` are parameters that do not start afresh, `trains` as in `Method`."""
    if trains == "decoder":
        return new_state(given, optimizer)
    params = generators.family_of(networks.generator).init(networks.generator, config.seed)
    return new_state(params | given, optimizer)
