"""What jobs leave for one another in the workdir, and how the next one opens it."""

import dataclasses
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from rear_jax import models, tokenizers
from rear_jax.atomic import atomic_file
from rear_jax.config import refuse_changes
from rear_jax.convert import published, rar
from rear_jax.errors import RearError
from rear_jax.training import mesh, sharding
from rear_jax.training.checkpoints import Checkpoints, abstract

GENERATOR_SETTINGS = ("data.num_classes", "tokenizer.", "model.")  # what a generator's parameters depend on
TOKENIZER_SETTINGS = ("tokenizer.", "data.image_size")  # ... and a tokenizer's
# ... of which these are its decoder's alone
DECODER_SETTINGS = ("decoder_", "buffer_tokens", "causal_decoder", "predicts", "proxy_")


def tokenizer_folder(workdir: Path) -> Path:
    """Checkpoints of `--job=tokenizer`."""
    return workdir / "tokenizer"


def generator_folder(workdir: Path) -> Path:
    """Checkpoints of `--job=train`."""
    return workdir / "generator"


def best_generator_folder(workdir: Path) -> Path:
    """The checkpoint of `--job=train` that scored best, where `config.train.evaluate_every` asks for scores."""
    return workdir / "generator_best"


def posttrained_folder(workdir: Path) -> Path:
    """Checkpoints of a generator from `--job=posttrain`."""
    return workdir / "posttrained"


def posttrained_decoder_folder(workdir: Path) -> Path:
    """Checkpoints of a tokenizer's decoder from `--job=posttrain` with method 'tokenizer'."""
    return workdir / "posttrained_decoder"


def codes_folder(config: ConfigDict, workdir: Path) -> Path:
    """Code files of `--job=tokenize`."""
    return Path(config.codes_from) if config.codes_from else workdir / "codes"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A frozen tokenizer.

    Attributes:
      module: see `tokenizers.Tokenizer`.
      params: its parameters.
      fingerprint: a hash of parameters and sizes; two tokenizers with one fingerprint give the same codes. That of the
        tokenizer as it was trained, whatever became of its decoder.
      decoder: the same, or a hash of the post-trained decoder.
      origin: where it was loaded from, for people.
    """

    module: Any
    params: Any
    fingerprint: str
    decoder: str
    origin: str

    @property
    def num_codes(self) -> int:
        """N, codes per image."""
        return self.module.codes_per_image

    def codebook(self) -> jax.Array:
        """Vectors of all codes, [K, D] float32."""
        every = jnp.arange(self.module.codebook_size)[None]
        return self.module.apply({"params": self.params}, every, method="embed")[0].astype(jnp.float32)

    def require(self, fingerprint: str, whose: str) -> None:
        """Raises RearError unless this is the tokenizer that something else was made with."""
        if fingerprint != self.fingerprint:
            raise RearError(
                f"{whose} was made with tokenizer {fingerprint}, but {self.origin} is {self.fingerprint}: "
                "point config.tokenizer_from at the right one, or use another --workdir."
            )


@dataclasses.dataclass(frozen=True)
class Generator:
    """A trained generator: module, parameters, the step they are from, and their hash."""

    module: Any
    params: Any
    step: int
    fingerprint: str


def load_tokenizer(config: ConfigDict, workdir: Path, *, stage: str = "train") -> Tokenizer:
    """The tokenizer of this experiment: trained here, in another workdir, or by somebody else.

    Args:
      config: the experiment.
      workdir: its folder.
      stage: 'posttrain' puts the post-trained decoder in, if that is what `config.posttrain.method` trains.

    Raises:
      RearError: it is missing, damaged, or not of the config's sizes.
    """
    module = tokenizers.build(config.tokenizer, config.data.image_size)
    place = Path(config.tokenizer_from) if config.tokenizer_from else tokenizer_folder(workdir)
    params = read_tokenizer(place, config, tokenizer_shapes(module))
    sizes = {k: v for k, v in config.tokenizer.to_dict().items() if k != "dtype"}
    original = fingerprint(params, sizes)
    if stage != "posttrain" or config.posttrain.method != "tokenizer":
        return Tokenizer(module, params, original, original, str(place))
    decoder = _read_posttrained_decoder(config, workdir, {"decoder": params["decoder"]}, original)
    return Tokenizer(module, params | decoder, original, fingerprint(decoder, sizes), str(place))


def _read_posttrained_decoder(config: ConfigDict, workdir: Path, like: Any, tokenizer_fingerprint: str) -> Any:
    """{'decoder': parameters} that post-training has made of the tokenizer with this fingerprint."""
    place = posttrained_decoder_folder(workdir)
    _require_checkpoints(place, "posttrain")
    checkpoints = Checkpoints(place, keep=1)
    record = checkpoints.record()
    refuse_changes(record, config, TOKENIZER_SETTINGS, str(place))
    if record["tokenizer_fingerprint"] != tokenizer_fingerprint:
        raise RearError(f"{place} was post-trained from another tokenizer: post-train again in another --workdir.")
    return checkpoints.restore_params(_on_all_devices(jax.eval_shape(lambda: like), config))[1]


def load_generator(config: ConfigDict, workdir: Path, tokenizer: Tokenizer) -> Generator:
    """The generator that `--job=train` has made so far, or the one of `config.init_from`, or the post-trained one.

    Raises:
      RearError: it is missing, damaged, of other sizes, or made with another tokenizer.
    """
    module = models.build(config, num_codes=tokenizer.num_codes, embedding_dim=tokenizer.module.embedding_dim)
    stage, place = _stage_folder(config, workdir)
    if config.sample.use_ema and stage == "posttrain":
        raise RearError("config.sample.use_ema: --job=posttrain keeps no moving average: set it to False.")
    if config.init_from and stage == "train" and not place.exists():
        params = read_generator(Path(config.init_from), config, generator_shapes(module), tokenizer)
        return Generator(module, params, 0, fingerprint(params, {}))
    _require_checkpoints(place, "posttrain" if stage == "posttrain" else "train")
    checkpoints = Checkpoints(place, keep=1)
    record = checkpoints.record()
    refuse_changes(record, config, GENERATOR_SETTINGS, str(place))
    tokenizer.require(record["tokenizer_fingerprint"], f"the generator in {place}")
    if config.sample.use_ema and not record["train"]["ema_decay"]:
        raise RearError(f"config.sample.use_ema: {place} holds no moving average; train with config.train.ema_decay.")
    shapes = rar.keep_projectors(generator_shapes(module), checkpoints.param_names(), str(place))
    step, params = checkpoints.restore_params(_placed(shapes, config), ema=config.sample.use_ema)
    return Generator(module, params, step, fingerprint(params, {}))


def _stage_folder(config: ConfigDict, workdir: Path) -> tuple[str, Path]:
    """The job whose generator is wanted, and where it is."""
    stage = config.sample.stage
    folders = {
        "train": generator_folder(workdir),
        "best": best_generator_folder(workdir),
        "posttrain": posttrained_folder(workdir),
    }
    if stage not in folders:
        raise RearError(f"config.sample.stage = {stage!r}: use one of {', '.join(folders)}.")
    if stage == "posttrain" and config.posttrain.method == "tokenizer":
        stage = "train"  # post-training left the generator alone
    return stage, folders[stage]


def tokenizer_shapes(module: Any) -> Any:
    """Parameter shapes of a tokenizer."""
    image = jax.ShapeDtypeStruct((1, module.image_size, module.image_size, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), image)["params"]


def generator_shapes(module: Any) -> Any:
    """Parameter shapes of a generator."""
    return jax.eval_shape(module.init, jax.random.key(0), *models.example_inputs(module))["params"]


def discriminator_shapes(module: Any, image_size: int) -> Any:
    """Parameter shapes of a discriminator of images with so many pixels a side."""
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), image)["params"]


def read_tokenizer(place: Path, config: ConfigDict, shapes: Any) -> Any:
    """Parameters of the config's tokenizer from a published file, a converted folder, or that of `--job=tokenizer`."""
    if published.weights_file(place) is not None:
        return published.read_params(place, config, "tokenizer", shapes)
    _require_checkpoints(place, "tokenizer")
    checkpoints = Checkpoints(place, keep=1)
    refuse_changes(checkpoints.record(), config, TOKENIZER_SETTINGS, str(place))
    return checkpoints.restore_params({"tokenizer": _on_all_devices(shapes, config)})[1]["tokenizer"]


def read_discriminator(config: ConfigDict, workdir: Path, shapes: Any) -> Any:
    """Parameters of the discriminator that the tokenizer was trained with; shapes as `config.tokenizer_training` says.

    Raises:
      RearError: the tokenizer is a published file, or was trained without.
    """
    place = Path(config.tokenizer_from) if config.tokenizer_from else tokenizer_folder(workdir)
    if published.weights_file(place) is not None or "discriminator" not in Checkpoints(place, keep=1).param_names():
        raise RearError(
            f"config.posttrain.reward.discriminator: {place} has no discriminator; train a tokenizer with "
            "config.tokenizer_training.discriminator_weight, or set it to 0."
        )
    like = {"discriminator": _on_all_devices(shapes, config)}
    return Checkpoints(place, keep=1).restore_params(like)[1]["discriminator"]


def read_encoder(place: Path, config: ConfigDict, shapes: Any) -> Any:
    """Encoder and codebook of a tokenizer that may have another decoder than the config's, as `read_tokenizer` does.

    Args:
      place: the file or folder; in a file the decoder must be the config's all the same.
      config: the experiment.
      shapes: of the parameters of its tokenizer.
    """
    if published.weights_file(place) is None:
        _require_checkpoints(place, "tokenizer")
        record = Checkpoints(place, keep=1).record()
        own = tuple(f"tokenizer.{key}" for key in config.tokenizer if not key.startswith(DECODER_SETTINGS))
        refuse_changes(record, config, ("data.image_size", *own), str(place))
        config = config.copy_and_resolve_references()
        config.tokenizer.update(record["tokenizer"])
        shapes = tokenizer_shapes(tokenizers.build(config.tokenizer, config.data.image_size))
    params = read_tokenizer(place, config, shapes)
    return {part: params[part] for part in ("encoder", "codebook")}


def read_generator(place: Path, config: ConfigDict, shapes: Any, tokenizer: Tokenizer | None) -> Any:
    """Parameters of the config's generator from a published file, a converted folder, or that of `--job=train`.

    Args:
      place: the file or folder.
      config: the experiment.
      shapes: of the parameters; projectors that `place` does not have are left out of the result.
      tokenizer: what the generator must have been made with, where `place` knows; None asks nothing.
    """
    if published.weights_file(place) is not None:
        return published.read_params(place, config, "model", shapes)
    _require_checkpoints(place, "train")
    checkpoints = Checkpoints(place, keep=1)
    record = checkpoints.record()
    refuse_changes(record, config, GENERATOR_SETTINGS, str(place))
    if tokenizer is not None and "tokenizer_fingerprint" in record:
        tokenizer.require(record["tokenizer_fingerprint"], f"the generator in {place}")
    shapes = rar.keep_projectors(shapes, checkpoints.param_names(), str(place))
    return checkpoints.restore_params(_placed(shapes, config))[1]


def fingerprint(params: Any, sizes: dict) -> str:
    """Sixteen hexadecimal digits that name these parameters with these sizes."""
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    for path, leaf in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(mesh.fetch(leaf)).tobytes())
    return digest.hexdigest()[:16]


def _require_checkpoints(place: Path, job: str) -> None:
    if not place.exists():
        raise RearError(f"{place} does not exist: run --job={job} first, or mend the path.")


def _on_all_devices(shapes: Any, config: ConfigDict) -> Any:
    return abstract(shapes, mesh.replicated(mesh.make_mesh(config.mesh)))


def _placed(shapes: Any, config: ConfigDict) -> Any:
    """To be restored where training has them."""
    return abstract(shapes, sharding.shardings(shapes, mesh.make_mesh(config.mesh)))


def write_json(path: Path, content: dict) -> None:
    """Writes JSON under a temporary name and renames it."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def environment() -> dict[str, str]:
    """The libraries that compute and what they compute on, which may change the last digits of a result."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return versions | {"platform": f"{jax.default_backend()} ({jax.devices()[0].device_kind})"}


def is_done(path: Path, recipe: dict) -> bool:
    """Whether the JSON file at `path` exists and says that its job ran by this very recipe."""
    if not path.exists():
        return False
    done = json.loads(path.read_text())
    return all(done.get(key) == value for key, value in json.loads(json.dumps(recipe)).items())
