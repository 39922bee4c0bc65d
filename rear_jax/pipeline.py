"""Models from Python: `rear_jax.load` opens a generator and its tokenizer, and the result samples, encodes, decodes.

import rear_jax

model = rear_jax.load("rear_l", generator="rear_l.safetensors", tokenizer="maskgit-vqgan-imagenet-f16-256.bin")
images = model.sample(["golden retriever", 360], num=4)  # uint8 [8, 256, 256, 3]
codes = model.encode(images)  # int32 [8, 256]
again = model.decode(codes)  # uint8 [8, 256, 256, 3]
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from rear_jax import artifacts, generators, tokenizers
from rear_jax.config import downloads, files
from rear_jax.config.ranges import checked
from rear_jax.data.class_names import class_names, class_numbers
from rear_jax.errors import RearError
from rear_jax.runtime.mesh import make_mesh
from rear_jax.sampling import draw
from rear_jax.sampling.conditions import Conditions
from rear_jax.sampling.generate import Sampler, sampler_of
from rear_jax.training import objectives, sampled

NOWHERE = Path("no workdir")


def load(
    config: str | Path | ConfigDict,
    *,
    generator: str | Path = "",
    tokenizer: str | Path = "",
    workdir: str | Path = "",
    text_encoder: str | Path = "",
    vocabulary: str | Path = "",
) -> "Pipeline":
    """Opens a tokenizer and, if there is one, a generator; their weights go to the devices.

    Args:
      config: the experiment: the name of a file in configs/ ('rear_l'), the path of one, or settings.
      generator: published file or hub folder, `hf://owner/repo/file`, or a folder of checkpoints; '' =
        `config.init_from`, or that of `workdir`, which `config.sample.stage` chooses.
      tokenizer: the same; '' = `config.tokenizer_from`, or that of `workdir`.
      workdir: of a run of the command line; '' = none. Without one, and without a generator, only `encode` and `decode`
        work.
      text_encoder, vocabulary: for generators that take prompts; '' = those of `config.text`.

    Raises RearError: there is no such config, a file is missing or damaged, or files and config do not fit together.
    """
    made = config if isinstance(config, ConfigDict) else files.load(str(config))
    made = made.copy_and_resolve_references()
    made.text.update(encoder=str(text_encoder or made.text.encoder), vocabulary=str(vocabulary or made.text.vocabulary))
    made.update(tokenizer_from=str(tokenizer or made.tokenizer_from), init_from=str(generator or made.init_from))
    if not (workdir or made.tokenizer_from):
        raise RearError("rear_jax.load: name a tokenizer, or the workdir that has one.")
    made, folder = downloads.fetched(checked(made)), Path(workdir).expanduser() if workdir else NOWHERE
    if workdir and not generator:
        return Pipeline(made, *sampled.load(made, folder), folder)
    codec = sampled.load_tokenizer(made, folder) if workdir else artifacts.load_tokenizer(made, folder)
    if not made.init_from:
        return Pipeline(made, codec, None, folder)
    network = objectives.build_generator(made, codec.module)
    params = artifacts.read_generator(Path(made.init_from), made, network, codec)
    return Pipeline(made, codec, artifacts.Generator(network, params, 0, ""), folder)


class Pipeline:
    """A tokenizer and perhaps a generator with their weights, of one experiment.

    A call compiles its program once for each shape of its arrays; `sample` also for each choice of guidance,
    temperature, top_k and top_p. It is for one process; its devices share the work as `config.mesh` says.

    Attributes:
      config: the settings; `config.sample` has the defaults of `sample`.
      tokenizer: module and parameters, see `artifacts.Tokenizer`.
      generator: the same, see `artifacts.Generator`; None if only the tokenizer was opened.
      class_names: of the classes by number; () where nothing tells them, or where the generator takes prompts.
    """

    def __init__(
        self, config: ConfigDict, tokenizer: artifacts.Tokenizer, generator: artifacts.Generator | None, workdir: Path
    ):
        """See `load`."""
        self.config, self.tokenizer, self.generator, self._workdir = config, tokenizer, generator, workdir
        self._mesh, self._programs = make_mesh(config.mesh), {}
        of_text = generator is not None and generators.takes_text(generator.module)
        self.class_names = () if of_text else class_names(config.data)
        with jax.set_mesh(self._mesh):
            if generator is None:
                self._weights = None, jax.device_put(tokenizer.params)
            else:
                self._weights = draw.place(generator, tokenizer, self._mesh)

    def sample(
        self,
        wanted: int | str | Sequence[int | str],
        *,
        num: int = 1,
        guidance_scale: float | None = None,
        guidance_power: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
    ) -> UInt8[np.ndarray, "n H W 3"]:
        """Draws images.

        Image i of a call has random numbers of its own, which `seed` and i decide; the batch size does not. With the
        same settings `--job=sample` with `config.sample.classes` draws the same images, but for rounding.

        Args:
          wanted: one or several classes, by number or by name; or one or several prompts, if the generator takes those.
          num: images of each.
          guidance_scale, guidance_power, temperature, top_k, top_p: see `config.sample`, which has the defaults.
          seed: None = `config.seed`.
          batch_size: images that the devices draw at once; None = `config.sample.batch_size`.

        Returns:
          The images of the first class or prompt, then those of the second, and so on: n = num · len(wanted).

        Raises RearError: there is no generator, no such class or no text encoder; or a value is out of its range.
        """
        if self.generator is None:
            raise RearError("there is no generator to sample from: give rear_jax.load one, or a workdir.")
        given = {
            "guidance_scale": guidance_scale,
            "guidance_power": guidance_power,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "batch_size": batch_size,
            "images_per_class": num,
        }
        config = self._with_settings(given, seed)
        conditions = self._conditions([wanted] if isinstance(wanted, int | str | np.integer) else list(wanted), num)
        labels, images = conditions.labels, np.empty((len(conditions.labels), *draw.image_shape(config)), np.uint8)
        with jax.set_mesh(self._mesh):
            program = self._program(sampler_of(config.sample))
            program = functools.partial(program, jax.random.key(config.seed), *self._weights)
            size = draw.batch_size(config, len(labels), self._mesh)
            for batch in draw.plan_batches(labels, np.arange(len(labels)), size):
                images[batch.indices[: batch.count]] = draw.draw_batch(program, conditions, batch, self._mesh)
        return images

    def encode(self, images: UInt8[np.ndarray, "n H W 3"] | Float[np.ndarray, "n H W 3"]) -> Int[np.ndarray, "n N"]:
        """Codes of images, int32; the images are uint8, or floats in [0, 1], of `config.data.image_size` pixels a side.

        Raises RearError: they are none, or of another size.
        """
        images, size = np.asarray(images), self.config.data.image_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise RearError(
                f"images of shape {images.shape}: this tokenizer takes [n, {size}, {size}, 3]; resize them."
            )
        if images.dtype == np.uint8:
            images = images / np.float32(255)
        elif not np.issubdtype(images.dtype, np.floating) or not ((images >= 0) & (images <= 1)).all():
            raise RearError(f"images are {images.dtype}: give uint8, or floats from 0 to 1.")
        with jax.set_mesh(self._mesh):
            return np.asarray(self._encode(self._weights[1], images.astype(np.float32)))

    def decode(self, codes: Int[np.ndarray, "n N"]) -> UInt8[np.ndarray, "n H W 3"]:
        """Images of codes; rounded to 8 bits as the tokenizer's authors do it.

        Raises RearError: there are more or fewer codes an image than the tokenizer has, or one that it does not have.
        """
        codes, module = np.asarray(codes), self.tokenizer.module
        if codes.ndim != 2 or codes.shape[1] != self.tokenizer.num_codes or codes.dtype.kind not in "iu":
            raise RearError(
                f"codes are {codes.dtype} {codes.shape}: this tokenizer takes integers [n, {self.tokenizer.num_codes}]."
            )
        if codes.size and not 0 <= codes.min() <= codes.max() < module.codebook_size:
            raise RearError(f"codes go from {codes.min()} to {codes.max()}: give 0 to {module.codebook_size - 1}.")
        with jax.set_mesh(self._mesh):
            return np.asarray(self._decode(self._weights[1], codes.astype(np.int32)))

    def _with_settings(self, given: dict[str, float | None], seed: int | None) -> ConfigDict:
        """The config with what a call asks for; raises RearError where a value is out of its range."""
        config = self.config.copy_and_resolve_references()
        try:
            config.sample.update({name: value for name, value in given.items() if value is not None})
            config.seed = config.seed if seed is None else seed
        except TypeError as error:
            raise RearError(f"sample: {error}.") from None
        return checked(config)

    def _conditions(self, wanted: list[int | str], num: int) -> Conditions:
        """What a call draws for, in the order of the call."""
        model = self.generator.module
        if not wanted or not all(isinstance(one, int | str | np.integer) for one in wanted):
            raise RearError(f"sample takes classes, by number or name, or prompts; it got {str(wanted)[:99]}.")
        if not generators.takes_text(model):
            numbers = class_numbers(wanted, self.config.data, "classes")
            every = np.arange(self.config.data.num_classes, dtype=np.int32)
            return Conditions(every.__getitem__, len(every), np.repeat(numbers, num), (), {})
        if not all(isinstance(one, str) for one in wanted):
            raise RearError("this generator takes prompts: give texts.")
        reader = self._reader
        self.generator.require_text_encoder(reader.fingerprint)

        def look_up(numbers: np.ndarray) -> object:
            return reader.encode([wanted[number] for number in numbers.tolist()])

        return Conditions(look_up, len(wanted), np.repeat(np.arange(len(wanted), dtype=np.int32), num), (), {})

    def _program(self, sampler: Sampler):
        """The compiled sampler of these settings."""
        if sampler not in self._programs:
            size = draw.image_shape(self.config)[0]
            modules = self.generator.module, self.tokenizer.module
            self._programs[sampler] = draw.sampler_program(*modules, sampler, size)
        return self._programs[sampler]

    @functools.cached_property
    def _reader(self) -> artifacts.TextReader:
        return artifacts.open_text_reader(self.config, self._workdir, self.generator.module)

    @functools.cached_property
    def _encode(self):
        module = self.tokenizer.module
        return jax.jit(lambda params, images: module.apply({"params": params}, images, method="encode"))

    @functools.cached_property
    def _decode(self):
        module, to_8_bit = self.tokenizer.module, tokenizers.family_of(self.tokenizer.module).to_8_bit
        return jax.jit(lambda params, codes: to_8_bit(module.apply({"params": params}, codes, method="decode")))
