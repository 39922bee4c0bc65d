"""Tokenizers as jobs leave them or others publish them."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rear_jax import tokenizers
from rear_jax.artifacts import published
from rear_jax.artifacts.workdir import (
    on_all_devices,
    open_checkpoints,
    posttrained_decoder_folder,
    saved,
    to_be_made,
    tokenizer_folder,
)
from rear_jax.errors import RearError
from rear_jax.runtime import identity, places
from rear_jax.runtime.checkpoints import Saved


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A frozen tokenizer.

    Attributes:
      module: see `tokenizers.base.CodebookTokenizer`.
      params: its parameters, or their shapes.
      fingerprint: a hash of parameters and sizes; two tokenizers with one fingerprint give the same codes. That of the
        tokenizer as it was trained, whatever became of its decoder.
      decoder_fingerprint: the same, or a hash of the post-trained decoder.
      origin: where it was loaded from, for people.
    """

    module: Any
    params: Any
    fingerprint: str
    decoder_fingerprint: str
    origin: str

    @property
    def num_codes(self) -> int:
        """N, codes per image."""
        return self.module.codes_per_image

    def codebook(self) -> jax.Array | jax.ShapeDtypeStruct:
        """Vectors of all codes, [K, D] float32; the shape of that where the parameters are shapes."""
        every = jnp.arange(self.module.codebook_size)[None]

        def look_up(params):
            return self.module.apply({"params": params}, every, method="embed")[0].astype(jnp.float32)

        outlined = isinstance(jax.tree.leaves(self.params)[0], jax.ShapeDtypeStruct)
        return jax.eval_shape(look_up, self.params) if outlined else look_up(self.params)

    def require(self, fingerprint: str, whose: str) -> None:
        """Raises RearError unless this is the tokenizer that something else was made with."""
        if fingerprint != self.fingerprint:
            raise RearError(
                f"{whose} was made with tokenizer {fingerprint}, but {self.origin} is {self.fingerprint}: "
                "point config.tokenizer_from at the right one, or use another --workdir."
            )


def outline_tokenizer(config: ConfigDict) -> Tokenizer:
    """The tokenizer of this experiment with shapes in the place of its parameters."""
    module = tokenizers.build(config.tokenizer, config.data.image_size)
    return Tokenizer(module, tokenizers.shapes(module), "", "", "")


def load_tokenizer(config: ConfigDict, workdir: Path, *, decoder_posttrained: bool = False) -> Tokenizer:
    """The tokenizer of this experiment: trained here, in another workdir, or by somebody else.

    With `decoder_posttrained` its decoder is the one that `--job=posttrain` has made.

    Raises RearError: it is missing, damaged, or not of the config's sizes.
    """
    module, place = tokenizers.build(config.tokenizer, config.data.image_size), tokenizer_place(config, workdir)
    params = read_tokenizer(place, config, module)
    sizes = {k: v for k, v in config.tokenizer.to_dict().items() if k not in identity.FREE}
    original = identity.fingerprint(params, sizes)
    if not decoder_posttrained:
        return Tokenizer(module, params, original, original, str(place))
    decoder = _read_posttrained_decoder(config, workdir, {"decoder": params["decoder"]}, original)
    return Tokenizer(module, params | decoder, original, identity.fingerprint(decoder, sizes), str(place))


def check_tokenizer(
    config: ConfigDict, workdir: Path, before: Collection[str], *, decoder_posttrained: bool = False
) -> None:
    """Raises RearError where headers tell that `load_tokenizer` will fail.

    `before` are jobs that run first: what these will make is not looked for.
    """
    module = tokenizers.build(config.tokenizer, config.data.image_size)
    check_tokenizer_at(tokenizer_place(config, workdir), config, workdir, module, before)
    place = posttrained_decoder_folder(workdir)
    if decoder_posttrained and not to_be_made(place, config, workdir, before):
        found = saved(place, "posttrain")
        identity.refuse_changes(found.record(), config, identity.TOKENIZER, str(place))
        found.refuse_other_params({"decoder": tokenizers.shapes(module)["decoder"]})


def check_tokenizer_at(
    place: Path, config: ConfigDict, workdir: Path, module: nn.Module, before: Collection[str]
) -> None:
    """Raises RearError where headers tell that `read_tokenizer` cannot read `place`, unless it is still to be made."""
    if to_be_made(place, config, workdir, before):
        return
    if published.weights_file(place) is not None:
        published.check_params(place, config, tokenizers.family_of(module), tokenizers.shapes(module))
        return
    published.refuse_section(place, config, tokenizers.family_of(module))
    found = saved(place, "tokenizer")
    identity.refuse_changes(found.record(), config, identity.TOKENIZER, str(place))
    found.refuse_other_params({"tokenizer": tokenizers.shapes(module)})


def check_encoder_at(
    place: Path, config: ConfigDict, workdir: Path, module: nn.Module, before: Collection[str]
) -> None:
    """The same of `read_encoder`."""
    if to_be_made(place, config, workdir, before):
        return
    if published.weights_file(place) is None:
        config, module = _with_decoder_of(saved(place, "tokenizer"), config, module)
    check_tokenizer_at(place, config, workdir, module, before)


def tokenizer_place(config: ConfigDict, workdir: Path) -> Path:
    """The file or folder that holds the tokenizer of this experiment."""
    return places.place(config.tokenizer_from) if config.tokenizer_from else tokenizer_folder(workdir)


def _read_posttrained_decoder(config: ConfigDict, workdir: Path, like: Any, tokenizer_fingerprint: str) -> Any:
    """{'decoder': parameters} that post-training has made of the tokenizer with this fingerprint."""
    place = posttrained_decoder_folder(workdir)
    checkpoints = open_checkpoints(place, "posttrain")
    record = checkpoints.record()
    identity.refuse_changes(record, config, identity.TOKENIZER, str(place))
    if record["tokenizer_fingerprint"] != tokenizer_fingerprint:
        raise RearError(f"{place} was post-trained from another tokenizer: post-train again in another --workdir.")
    return checkpoints.restore_params(on_all_devices(jax.eval_shape(lambda: like), config))[1]


def read_tokenizer(place: Path, config: ConfigDict, module: nn.Module) -> Any:
    """Parameters of the config's tokenizer from a published file, a converted folder, or that of `--job=tokenizer`."""
    shapes = tokenizers.shapes(module)
    if published.weights_file(place) is not None:
        return published.read_params(place, config, tokenizers.family_of(module), shapes)
    published.refuse_section(place, config, tokenizers.family_of(module))
    checkpoints = open_checkpoints(place, "tokenizer")
    identity.refuse_changes(checkpoints.record(), config, identity.TOKENIZER, str(place))
    return checkpoints.restore_params({"tokenizer": on_all_devices(shapes, config)})[1]["tokenizer"]


def read_encoder(place: Path, config: ConfigDict, module: nn.Module) -> Any:
    """Encoder and codebook of a tokenizer, as `read_tokenizer` reads it; its decoder may be another than the config's.

    In a published file the decoder must be the config's all the same.
    """
    if published.weights_file(place) is None:
        config, module = _with_decoder_of(open_checkpoints(place, "tokenizer"), config, module)
    params = read_tokenizer(place, config, module)
    return {part: params[part] for part in ("encoder", "codebook")}


def _with_decoder_of(found: Saved, config: ConfigDict, module: nn.Module) -> tuple[ConfigDict, nn.Module]:
    """The config and its tokenizer with the decoder of a saved one; raises RearError where more than that differs."""
    record, of_decoder = found.record(), tokenizers.family_of(module).of_decoder
    own = tuple(f"tokenizer.{key}" for key in config.tokenizer if not key.startswith(of_decoder))
    identity.refuse_changes(record, config, ("data.image_size", *own), str(found.folder))
    config = config.copy_and_resolve_references()
    config.tokenizer.update(record["tokenizer"])
    return config, tokenizers.build(config.tokenizer, config.data.image_size)


def read_discriminator(config: ConfigDict, workdir: Path, shapes: Any) -> Any:
    """Parameters of the discriminator that the tokenizer was trained with; shapes as `config.tokenizer_training` says.

    Raises RearError: the tokenizer is a published file, or was trained without.
    """
    check_discriminator(config, workdir, shapes, ())
    like = {"discriminator": on_all_devices(shapes, config)}
    return open_checkpoints(tokenizer_place(config, workdir), "tokenizer").restore_params(like)[1]["discriminator"]


def check_discriminator(config: ConfigDict, workdir: Path, shapes: Any, before: Collection[str]) -> None:
    """Raises RearError where headers tell that `read_discriminator` will fail, or where no job of `before` makes it."""
    place = tokenizer_place(config, workdir)
    if to_be_made(place, config, workdir, before):
        if config.tokenizer_training.discriminator_weight:
            return
    elif published.weights_file(place) is None:
        found = saved(place, "tokenizer")
        if "discriminator" in found.param_names():
            found.refuse_other_params({"discriminator": shapes})
            return
    raise RearError(
        f"config.posttrain.reward.discriminator: {place} has no discriminator; train a tokenizer with "
        "config.tokenizer_training.discriminator_weight, or set it to 0."
    )
