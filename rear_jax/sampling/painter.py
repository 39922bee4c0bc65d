"""Drawing that can be watched: the decoding of `--job=sample` in stretches, with a picture after each.

Guidance scale, temperature and the other numbers of a sampler are arguments of the programs, so another value compiles
nothing. Both halves of guidance are always decoded; a scale that needs one alone has weight 1.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8
from ml_collections import ConfigDict

from rear_jax import generators
from rear_jax.artifacts import Generator, Tokenizer
from rear_jax.runtime.mesh import fetch, replicated, split
from rear_jax.sampling import draw
from rear_jax.sampling.generate import Carry, Given, Sampler, new_decoding, prepare

GREY = 128  # of 255, pixels of codes that are still to be drawn
MOST_STRETCHES = 16  # pictures on the way to an image
NUMBERS = {  # of a sampler -> dtype of the program's argument
    "guidance_scale": np.float32,
    "guidance_power": np.float32,
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
}


class Painting(NamedTuple):
    """Images on the way.

    Attributes:
      images: uint8 [n, H, W, 3], grey where codes are still to be drawn.
      codes: [n, N] int32, 0 where they are still to be drawn.
      drawn: codes of each image so far; 0 while the programs are compiled.
      compiling: whether what comes next waits for the compiler.
    """

    images: UInt8[np.ndarray, "n H W 3"]
    codes: Int[np.ndarray, "n N"]
    drawn: int
    compiling: bool


class Painter:
    """A generator and a tokenizer on the devices, and the programs that draw with them stretch by stretch.

    Its programs are compiled once for each number of images that are drawn at once, a power of two times the devices.

    Attributes:
      stretch: codes that are drawn between two pictures, whole rows on a grid.
      num_codes: N.
      image_shape: (H, W, 3) of what is drawn.
      tokenizer_params: on the devices.
    """

    def __init__(self, config: ConfigDict, generator: Generator, tokenizer: Tokenizer, mesh: Mesh):
        """Places the networks on the devices of the mesh."""
        self._tokenizer, self._mesh, self.image_shape = tokenizer.module, mesh, draw.image_shape(config)
        self._cached, self._to_8_bit = (
            generators.cached(generator.module),
            generators.family_of(generator.module).to_8_bit,
        )
        self.num_codes, self.stretch = tokenizer.num_codes, stretch_of(*tokenizer.module.grid)
        self._compiled: set[tuple] = set()
        static = ("schedule", "interval")
        self._begin = jax.jit(self._begin_program, static_argnames=static)
        self._go_on = jax.jit(self._go_on_program, static_argnames=static, donate_argnames="carry")
        self._show = jax.jit(self._show_program)
        with jax.set_mesh(mesh):
            params, self.tokenizer_params = draw.place(generator, tokenizer, mesh)
            self._weights = jax.jit(lambda params: prepare(self._cached, params))(params)

    def paint(
        self, conditions: Any, indices: np.ndarray, seed: int, sampler: Sampler, given: Given | None = None
    ) -> Iterator[Painting]:
        """Draws n images, and tells how far they are; the last painting has all codes.

        Image i has the random numbers of image i of `--job=sample` with this seed: but for rounding it is the same.

        Args:
          conditions: what the generator takes, a tree of arrays [n, ...], one row an image.
          indices: [n], global numbers of the images.
          seed: `config.seed`.
          sampler: guidance and filters; only its words and its interval are compiled.
          given: codes [n, N] that are known, and which of them are not drawn.
        """
        count = len(indices)
        batch = self._padded_size(count)
        words = {"schedule": sampler.guidance, "interval": sampler.guidance_interval}
        key = (batch, *words.values(), *(leaf.shape[1:] for leaf in jax.tree.leaves(conditions)))
        codes = np.zeros((batch, self.num_codes), np.int32)
        if key not in self._compiled:
            blank = np.full((count, *self.image_shape), GREY, np.uint8)
            yield Painting(blank, codes[:count], 0, True)
        with jax.set_mesh(self._mesh):
            inputs = self._inputs(conditions, indices, seed, sampler, given, batch)
        carry = None
        for start in range(0, self.num_codes, self.stretch):
            stop = start + self.stretch
            with jax.set_mesh(self._mesh):  # anew, as each step of an iterator may run in another thread
                if start == 0:
                    carry, drawn = self._begin(self._weights, *inputs, **words)
                else:
                    carry, drawn = self._go_on(self._weights, *inputs, carry=carry, start=np.int32(start), **words)
                codes[:, start:stop] = fetch(drawn)
                images = self._shown(codes, stop)
            if start or stop == self.num_codes:  # both programs have run
                self._compiled.add(key)
            yield Painting(images[:count], codes[:count].copy(), stop, key not in self._compiled)

    def images_of(self, codes: Int[np.ndarray, "n N"]) -> UInt8[np.ndarray, "n H W 3"]:
        """The images that a drawing with these codes ends with."""
        padded = np.pad(codes, ((0, self._padded_size(len(codes)) - len(codes)), (0, 0)), mode="edge")
        with jax.set_mesh(self._mesh):
            return self._shown(padded.astype(np.int32), self.num_codes)[: len(codes)]

    def _shown(self, codes: np.ndarray, drawn: int) -> np.ndarray:
        return fetch(self._show(self.tokenizer_params, jax.device_put(codes, split(self._mesh)), np.int32(drawn)))

    def _padded_size(self, count: int) -> int:
        devices = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        return devices * 2 ** math.ceil(math.log2(max(1, count / devices)))

    def _inputs(self, conditions, indices, seed, sampler, given, batch: int) -> tuple:
        """Arguments of the programs, on the devices; the last image is repeated until the batch is full."""
        if given is None:
            shape = len(indices), self.num_codes
            given = Given(np.zeros(shape, np.int32), np.zeros(shape, bool))

        def fill(leaf):
            return np.pad(leaf, ((0, batch - len(leaf)), *[(0, 0)] * (leaf.ndim - 1)), mode="edge")

        conditions, indices, given = jax.tree.map(fill, (conditions, np.asarray(indices), given))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices.astype(np.int32))
        rows = np.arange(batch, dtype=np.int32)
        rows, keys, given = jax.device_put((rows, keys, given), split(self._mesh))
        if not self._cached.guides(sampler.guidance_scale):
            sampler = dataclasses.replace(sampler, guidance_scale=1.0)
        numbers = {name: dtype(getattr(sampler, name)) for name, dtype in NUMBERS.items()}
        return jax.device_put(conditions, replicated(self._mesh)), rows, keys, numbers, given

    def _decoding(self, weights, conditions, rows, keys, numbers, given, schedule, interval):
        sampler = Sampler(guidance=schedule, guidance_interval=interval, **numbers)
        return new_decoding(self._cached, weights, conditions, rows, keys, sampler, guided=True, given=given)

    def _begin_program(self, weights, conditions, rows, keys, numbers, given, *, schedule: str, interval: int):
        """The first stretch -> (carry with room for all codes, codes [B, stretch])."""
        decoding = self._decoding(weights, conditions, rows, keys, numbers, given, schedule, interval)
        carry, first = decoding.begin(self._cached.prefix_length + self.num_codes - 1)
        if self.stretch == 1:
            return carry, first.codes
        carry, others = decoding.go_on(carry, jnp.arange(1, self.stretch))
        return carry, jnp.concatenate([first.codes, others.codes], axis=1)

    def _go_on_program(
        self, weights, conditions, rows, keys, numbers, given, *, carry: Carry, start, schedule: str, interval: int
    ):
        """A later stretch, from code `start` on."""
        decoding = self._decoding(weights, conditions, rows, keys, numbers, given, schedule, interval)
        carry, drawn = decoding.go_on(carry, start + jnp.arange(self.stretch))
        return carry, drawn.codes

    def _show_program(self, params: Any, codes: Int[Array, "B N"], drawn: Int[Array, ""]) -> UInt8[Array, "B S S 3"]:
        """Images of sequences whose first `drawn` codes are there."""
        there = jnp.arange(self.num_codes) < drawn
        images = draw.resized(decode_some(self._tokenizer, params, codes, there), self.image_shape[0])
        rows, columns = self._tokenizer.grid
        if rows == 1:
            return self._to_8_bit(images)
        line = jnp.arange(self.image_shape[0]) * rows // self.image_shape[0]  # row of codes at each row of pixels
        return jnp.where((line < drawn // columns)[:, None, None], self._to_8_bit(images), jnp.uint8(GREY))


def decode_some(
    tokenizer: Any, params: Any, codes: Int[Array, "B N"], there: Bool[Array, " N"]
) -> Float[Array, "B H W 3"]:
    """Images of codes some of which are not known, inside a program: the mean of the codebook takes their places."""

    def embed(codes):
        return tokenizer.apply({"params": params}, codes, method="embed")

    vectors = embed(codes)
    mean = embed(jnp.arange(tokenizer.codebook_size)[None]).mean(axis=(0, 1))
    vectors = jnp.where(there[:, None], vectors, mean.astype(vectors.dtype))
    return tokenizer.apply({"params": params}, vectors, method="decode_embeddings")


def stretch_of(rows: int, columns: int) -> int:
    """Codes between two pictures: whole rows on a grid, and as few as `MOST_STRETCHES` allows, all as long."""
    units, size = (columns, 1) if rows == 1 else (rows, columns)
    return size * next(each for each in range(1, units + 1) if units % each == 0 and units // each <= MOST_STRETCHES)
