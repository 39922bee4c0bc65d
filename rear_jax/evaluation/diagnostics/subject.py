"""What the diagnostics look at: a generator, its tokenizer, and images of the splits with their codes."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray
from ml_collections import ConfigDict

from rear_jax import artifacts, generators, tokenizers
from rear_jax.data.sources import open_split
from rear_jax.errors import RearError
from rear_jax.evaluation.reference import RealImages
from rear_jax.runtime import sharding
from rear_jax.runtime.mesh import fetch, replicated, split
from rear_jax.runtime.progress import ProgressBar

SPLITS = {"held_out": "eval_split", "train": "train_split"}  # value of config.analyze.split -> key of config.data


class Weights(NamedTuple):
    """Parameters on the devices."""

    generator: Any
    tokenizer: Any


class Pictures(NamedTuple):
    """Images of one split, and what they are to the two networks.

    Attributes:
      images: uint8 [n, S, S, 3].
      codes: [n, N] int32, what the tokenizer makes of them.
      labels: [n], numbers of their conditions.
      conditions: labels [U] -> what the generator takes.
    """

    images: np.ndarray
    codes: np.ndarray
    labels: np.ndarray
    conditions: Callable[[np.ndarray], Any]


class Subject:
    """The networks on the devices, and programs that go through images in batches.

    Attributes:
      config: the experiment.
      generator, tokenizer: as they were loaded.
      network: the generator's module without what only training needs: it projects no hidden states.
      cached: its cached form.
      weights: of both.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        generator: artifacts.Generator,
        tokenizer: artifacts.Tokenizer,
        mesh: Mesh,
        reader: artifacts.TextReader | None = None,
    ):
        """Places the networks on the devices of the mesh; `reader` is what makes conditions of texts in steps."""
        self.config, self.generator, self.tokenizer = config, generator, tokenizer
        self.network = generators.build(config, tokenizer.module)
        self.cached = generators.cached(self.network)
        self._workdir, self._mesh, self._reader, self._pictures = workdir, mesh, reader, {}
        rules = generators.family_of(self.network).parameters
        self.weights = Weights(
            jax.device_put(generator.params, sharding.shardings(generator.params, mesh, rules)),
            jax.device_put(tokenizer.params, replicated(mesh)),
        )

    @property
    def num_codes(self) -> int:
        """N."""
        return self.tokenizer.num_codes

    @property
    def codebook_size(self) -> int:
        """K."""
        return self.tokenizer.module.codebook_size

    def keys(self, purpose: int, count: int) -> PRNGKeyArray:
        """[count], a key for each image; other purposes have other keys."""
        base = jax.random.fold_in(jax.random.key(self.config.seed), purpose)
        return jax.vmap(jax.random.fold_in, (None, 0))(base, jnp.arange(count))

    def pictures(self, which: str) -> Pictures:
        """The images of a split, a key of SPLITS, read and encoded once."""
        if which not in self._pictures:
            self._pictures[which] = self._read(which)
        return self._pictures[which]

    def describe(self, which: str) -> str:
        """Names the images of a split, for recipes, without reading all of them."""
        chosen = self._chosen(which)
        return f"{chosen.name}, {chosen.size} pixels, {chosen.fingerprint()}"

    def over(self, name: str, program: Callable[..., Any], pictures: Pictures, **more: np.ndarray) -> Any:
        """Runs a jitted program on all images, batch by batch, under a progress bar.

        Args:
          name: of the work, for people.
          program: (weights, conditions, batch) -> a tree of arrays. `conditions` are the distinct ones of the batch,
            and the batch has 'codes' [B, N], 'rows' [B] (index into `conditions`), and what `more` adds.
          pictures: the images.
          **more: further arrays [n, ...].

        Returns:
          The same tree on the host, the arrays of the batches laid end to end.
        """
        whole, size = {"codes": pictures.codes, **more}, self.config.analyze.batch_size
        labels = pictures.labels.reshape(-1, size)
        most = max(len(np.unique(some)) for some in labels)
        found = []
        with ProgressBar(f"analyze {name}", total=len(pictures.labels), unit="image") as bar:
            for number, some in enumerate(labels):
                distinct, rows = np.unique(some, return_inverse=True)
                distinct = np.pad(distinct, (0, most - len(distinct)), mode="edge")
                part = {key: value[number * size :][:size] for key, value in whole.items()}
                batch = jax.device_put(part | {"rows": rows.astype(np.int32)}, split(self._mesh))
                found.append(jax.tree.map(fetch, program(self.weights, pictures.conditions(distinct), batch)))
                bar.update((number + 1) * size)
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    def decode(self, name: str, pictures: Pictures, codes: np.ndarray) -> np.ndarray:
        """uint8 images [n, S, S, 3] of codes [n, N], one sequence for each picture."""
        return self.over(name, self._decoder, pictures, drawn=codes)

    def encode(self, name: str, images: np.ndarray) -> np.ndarray:
        """Codes [n, N] of uint8 images [n, S, S, 3]."""
        found, size = [], self.config.analyze.batch_size
        with ProgressBar(f"analyze {name}", total=len(images), unit="image") as bar:
            for start in range(0, len(images), size):
                batch = jax.device_put(images[start : start + size], split(self._mesh))
                found.append(fetch(self._encoder(self.weights.tokenizer, batch)))
                bar.update(start + size)
        return np.concatenate(found)

    def to_images(self, weights: Weights, codes: jax.Array) -> jax.Array:
        """8-bit images [B, S, S, 3] of codes [B, N], inside a program: what --job=evaluate calls reconstructions."""
        module = self.tokenizer.module
        decoded = module.apply({"params": weights.tokenizer}, codes, method="decode")
        return tokenizers.family_of(module).to_8_bit(decoded)

    def predict(self, weights: Weights, conditions: Any, batch: dict, context: jax.Array) -> jax.Array:
        """Teacher-forced logits [B, N, K], inside a program: of every code from the `context` codes before it."""
        of_rows = jax.tree.map(lambda leaf: jnp.asarray(leaf)[batch["rows"]], conditions)
        return self.network.apply({"params": weights.generator}, context, of_rows).logits

    @functools.cached_property
    def _decoder(self) -> Callable[..., jax.Array]:
        return jax.jit(lambda weights, conditions, batch: self.to_images(weights, batch["drawn"]))

    @functools.cached_property
    def _encoder(self) -> Callable[..., jax.Array]:
        apply = self.tokenizer.module.apply
        return jax.jit(lambda params, images: apply({"params": params}, _unit(images), method="encode"))

    def _chosen(self, which: str) -> RealImages:
        """Raises RearError where a split has too few images."""
        config, learned_from = self.config, self.config.train.num_images if which == "train" else 0
        chosen = RealImages(config.data, config.data[SPLITS[which]], config.analyze.num_images, of=learned_from)
        require_images(self.config, which, len(chosen))
        return chosen

    def _read(self, which: str) -> Pictures:
        config, split_name, labels = self.config, self.config.data[SPLITS[which]], []
        source, chosen = open_split(config.data, split_name), self._chosen(which)
        given = artifacts.open_conditions(config, self._workdir, self.network, split_name, source, self._reader)

        def conditions(labels: np.ndarray) -> Any:
            return self._reader.encode_once(given(labels)) if self._reader else given(labels)

        images = np.concatenate(list(chosen.batches(config.analyze.batch_size, labels)))
        codes = self.encode(f"codes of {which} images", images)
        return Pictures(images, codes, np.concatenate(labels), conditions)


def require_images(config: ConfigDict, which: str, there: int) -> None:
    """Raises RearError where a split has fewer images than `config.analyze.num_images`."""
    wanted = config.analyze.num_images
    if there < wanted:
        split = config.data[SPLITS[which]]
        raise RearError(
            f"config.analyze.num_images = {wanted}: the split {split!r} of {config.data.source} has {there} images; "
            "set it to that or less, a multiple of config.analyze.batch_size."
        )


def _unit(images: jax.Array) -> jax.Array:
    """uint8 to float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255.0
