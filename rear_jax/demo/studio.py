"""The networks behind the page, and what its tabs share. Nothing here knows the page."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from rear_jax import generators, tokenizers
from rear_jax.artifacts import Generator, TextReader, Tokenizer
from rear_jax.config.ranges import checked
from rear_jax.data.class_names import class_names, class_numbers
from rear_jax.data.crops import center_crop
from rear_jax.data.sources import decoding
from rear_jax.errors import RearError
from rear_jax.sampling.generate import Given, Sampler, sampler_of
from rear_jax.sampling.painter import Painter, Painting

COMPILING = "Compiling. This happens once for each number of images, and other settings do not repeat it."


class Wanted(NamedTuple):
    """What images are drawn for.

    Attributes:
      conditions: what the generator takes, a tree of arrays [n, ...], one row an image.
      captions: n texts for people.
    """

    conditions: Any
    captions: list[str]


class Shown(NamedTuple):
    """What the page shows of a drawing.

    Attributes:
      images: uint8 [m, H, W, 3], those that are begun.
      captions: m texts.
      status: one sentence.
    """

    images: UInt8[np.ndarray, "m H W 3"]
    captions: list[str]
    status: str


class Studio:
    """A generator and a tokenizer on the devices, for one user at a time.

    Attributes:
      config: the experiment; `config.sample` has the settings that the page begins with.
      module: the tokenizer's, without parameters.
      takes_text: whether the generator takes prompts.
      names: of the classes by number; () where nothing tells them.
      stopping: set when the page ends: a drawing ends after its stretch.
    """

    def __init__(
        self, config: ConfigDict, generator: Generator, tokenizer: Tokenizer, reader: TextReader | None, mesh: Mesh
    ):
        """Places the networks on the devices of the mesh; `reader` is what reads prompts."""
        self.config, self.module, self._reader, self._mesh = config, tokenizer.module, reader, mesh
        self.takes_text = generators.takes_text(generator.module)
        self.names = () if self.takes_text else class_names(config.data)
        self.stopping = threading.Event()
        self._painter = Painter(config, generator, tokenizer, mesh)
        to_8_bit = tokenizers.family_of(self.module).to_8_bit

        def apply(method):
            return lambda params, x: self.module.apply({"params": params}, x, method=method)

        self._encode = jax.jit(lambda params, images: apply("encode")(params, images.astype(jnp.float32) / 255.0))
        self._decode = jax.jit(lambda params, codes: to_8_bit(apply("decode")(params, codes)))

    @property
    def title(self) -> str:
        """What the page shows, in one line."""
        model, tokenizer = self.config.model.name, self.config.tokenizer.name
        return f"{model} with {tokenizer}: {self.num_codes} codes of {self.module.codebook_size}"

    @property
    def num_codes(self) -> int:
        """N, codes of an image."""
        return self._painter.num_codes

    def read_image(self, file: str | None) -> UInt8[np.ndarray, "S S 3"]:
        """The central square of a file of the user's, as the tokenizer takes it.

        Raises RearError: there is none, or it is no image, too large or damaged.
        """
        if not file:
            raise RearError("There is no image yet: drop one first.")
        return center_crop(decoding.decode(Path(file), Path(file).name), self.config.data.image_size)

    def encode(self, image: UInt8[np.ndarray, "S S 3"]) -> Int[np.ndarray, " N"]:
        """Codes of an image."""
        with jax.set_mesh(self._mesh):
            return np.asarray(self._encode(self._painter.tokenizer_params, image[None]))[0]

    def decode(self, codes: Int[np.ndarray, " N"]) -> UInt8[np.ndarray, "S S 3"]:
        """The image of codes."""
        with jax.set_mesh(self._mesh):
            return np.asarray(self._decode(self._painter.tokenizer_params, codes[None].astype(np.int32)))[0]

    def decode_drawn(self, codes: Int[np.ndarray, " N"]) -> UInt8[np.ndarray, "H W 3"]:
        """The same as the images that are drawn: of their size, and rounded as they are."""
        return self._painter.images_of(codes[None])[0]

    def wanted(self, text: str, each: int) -> Wanted:
        """What `each` images are drawn for, of every class of a text ('Sandal, 5'), or of the prompt that it is.

        Raises RearError: it is empty, names no class, or asks for too many images.
        """
        text, what = text.strip(), "prompt" if self.takes_text else "class"
        if not text:
            raise RearError(f"There is no {what}: give one.")
        if self.takes_text:
            one = self._reader.encode([text])
            conditions, captions = jax.tree.map(lambda leaf: np.repeat(leaf, each, axis=0), one), [text] * each
        else:
            conditions = np.repeat(class_numbers([text], self.config.data, "Classes"), each)
            captions = [self.name(label) for label in conditions.tolist()]
        if not 1 <= len(captions) <= self.config.demo.most_images:
            most = self.config.demo.most_images
            raise RearError(f"These are {len(captions)} images: draw 1 to {most} (config.demo.most_images) at a time.")
        return Wanted(conditions, captions)

    def name(self, label: int) -> str:
        """Of a class; its number where nothing tells the name."""
        return self.names[label] if label < len(self.names) else str(label)

    def settings(self, seed: int | None, **sampler: float | None) -> tuple[int, Sampler]:
        """Seed and sampler of a drawing; the page gives None where a field is empty.

        Raises RearError: a value is missing or out of its range.
        """
        config = self.config.copy_and_resolve_references()
        for name, value in {"seed": seed, **sampler}.items():
            if value is None:
                raise RearError(f"The field for {name.replace('_', ' ')} is empty: give a number.")
        try:
            config.sample.update(sampler)
            config.seed = seed
        except TypeError as error:
            raise RearError(f"A setting is of the wrong kind ({error}).") from None
        return seed, sampler_of(checked(config).sample)

    def draw(
        self, wanted: Wanted, seed: int, sampler: Sampler, codes: np.ndarray | None = None, known: int = 0
    ) -> Iterator[Shown]:
        """Draws images, `config.demo.batch_size` at once, and shows them on the way.

        Args:
          wanted: what for.
          seed, sampler: see `settings`.
          codes: [N], of which the first `known` are kept and not drawn.
          known: how many.

        Raises RearError: the page ends.
        """
        count, size, clock = len(wanted.captions), self.config.demo.batch_size, Clock(self.num_codes)
        finished = np.zeros((0, *self._painter.image_shape), np.uint8)
        for start in range(0, count, size):
            indices = np.arange(start, min(start + size, count))
            conditions = jax.tree.map(lambda leaf, at=indices: leaf[at], wanted.conditions)
            for painting in self._painter.paint(conditions, indices, seed, sampler, self._given(codes, known, indices)):
                if self.stopping.is_set():
                    raise RearError("The page has ended: start the demo again.")
                clock.note(painting)
                images = np.concatenate([finished, painting.images])
                status = COMPILING if painting.compiling else self._status(painting, start, count, clock)
                yield Shown(images, wanted.captions[: len(images)], status)
            finished = images

    def _given(self, codes: np.ndarray | None, known: int, indices: np.ndarray) -> Given | None:
        if codes is None:
            return None
        shape = len(indices), self.num_codes
        return Given(np.broadcast_to(codes, shape), np.broadcast_to(np.arange(self.num_codes) < known, shape))

    def _status(self, painting: Painting, before: int, count: int, clock: "Clock") -> str:
        rate = f", {clock.rate:.3g} images/s" if clock.rate else ""
        done = before + len(painting.images)
        if painting.drawn < self.num_codes:
            return f"{painting.drawn} of {self.num_codes} codes of images {before + 1} to {done} of {count}{rate}"
        return f"{done} of {count} images{rate}"


class Clock:
    """Measures how fast images are drawn, without the time of the compiler."""

    def __init__(self, num_codes: int):
        self._num_codes, self._seconds, self._images = num_codes, 0.0, 0.0
        self._last, self._last_drawn, self._counts = time.monotonic(), 0, True

    def note(self, painting: Painting) -> None:
        """The next painting is there; the wait for it counts unless the one before has said that it compiles."""
        now, drawn = time.monotonic(), painting.drawn
        if self._counts and drawn:
            self._seconds += now - self._last
            self._images += len(painting.images) * (drawn - self._last_drawn) / self._num_codes
        self._last, self._counts = now, not painting.compiling
        self._last_drawn = 0 if drawn == self._num_codes else drawn

    @property
    def rate(self) -> float:
        """Images a second so far; 0 where nothing is measured yet."""
        return self._images / self._seconds if self._seconds else 0.0
