"""How well images fit their texts: the CLIP score, and HPSv2, which knows what people prefer.

Both are cosines between the features of an image and of its text, without a scale. The CLIP score is their mean (Hessel
et al. 2021, arXiv:2104.08718, without its factor 2.5). Published numbers differ in the network and in what is put
before the text: LlamaGen's evaluation has ViT-B/32 and "A photo depicts ", that of AR-GRPO (arXiv:2508.06924) has
ViT-B/32 and nothing. HPSv2 (arXiv:2306.09341) is a fine-tuned ViT-H-14 with preprocessing of its own; its benchmark
tells 100 times the cosine.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from rear_jax.errors import RearError
from rear_jax.losses import negative_cosine
from rear_jax.metrics import clip_files
from rear_jax.metrics.clip import CLIP
from rear_jax.metrics.clip_preprocess import clip_pixels, hps_pixels
from rear_jax.runtime import local_devices
from rear_jax.runtime.identity import fingerprint
from rear_jax.text import clip_vocabulary
from rear_jax.text.clip_vocabulary import CLIPVocabulary

PREFIX = "A photo depicts "  # of LlamaGen's evaluation
HPS_WIDTH = 1280  # of the image tower of HPSv2
HPS_GROUP = 80  # images in a group of HPSv2's benchmark
TEXTS_AT_ONCE = 16
NAMES = {(768, 32): "ViT-B/32", (768, 16): "ViT-B/16", (1024, 14): "ViT-L/14", (1280, 14): "ViT-H-14"}

Images = UInt8[np.ndarray, "B H W 3"]


def cosines(images: Float[Array, "*n E"], texts: Float[Array, "*n E"]) -> Float[Array, "*n"]:
    """The cosine of the features of each image and its text, float32 in [-1, 1]: HPSv2, and CLIP for one image."""
    return -negative_cosine(images, texts)


def clip_score(images: Float[Array, "n E"], texts: Float[Array, "n E"]) -> Float[Array, ""]:
    """The mean cosine of the features of n images and their texts, about 0.2 to 0.35 for ViT-B/32."""
    return jnp.mean(cosines(images, texts))


def hps_benchmark(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The table of HPSv2's benchmark.

    Args:
      scores: of each style, such as 'anime', the `cosines` [n] of its images in the order of its prompts.

    Returns:
      100 times the mean over groups of 80 of the mean of each group, by style; and as 'overall' 100 times the mean of
      all images. A last group may be smaller.

    Raises RearError: there are no images, or none of some style.
    """
    if empty := next((style for style, of_style in scores.items() if not len(of_style)), None):
        raise RearError(f"HPSv2's benchmark has no images of the style {empty!r}; leave it out or draw them.")
    if not scores:
        raise RearError("HPSv2's benchmark has no images; draw some for a style.")
    groups = {style: np.split(x, range(HPS_GROUP, len(x), HPS_GROUP)) for style, x in scores.items()}
    found = {style: 100 * float(np.mean([group.mean(dtype=float) for group in of])) for style, of in groups.items()}
    return found | {"overall": 100 * float(np.concatenate(list(scores.values())).mean(dtype=float))}


@dataclasses.dataclass(frozen=True, eq=False)
class TextScorer:
    """A network with its vocabulary and its preprocessing, to score images against texts.

    Attributes:
      name: short name for tables, such as "CLIP ViT-B/32".
      recipe: everything that decides the scores but the weights, to be printed beside each number.
      network: at precision 'highest'.
      params: on the host; a tower is copied to the devices when it is first asked.
      vocabulary: of the texts.
      prefix: what is put before each text.
      prepare: what is done to a batch of images on the host.
      pixels: what is done to prepared images on the devices, before the network sees them.
    """

    name: str
    recipe: str
    network: CLIP
    params: Any
    vocabulary: CLIPVocabulary
    prefix: str = ""
    prepare: Callable[[Images], np.ndarray] = lambda images: images
    pixels: Callable[[jax.Array], jax.Array] = lambda images: images

    @functools.cached_property
    def weights(self) -> str:
        """Fingerprint of the parameters."""
        return fingerprint(self.params, {})

    @functools.cached_property
    def _of_images(self) -> Callable[[jax.Array], jax.Array]:
        """Prepared images -> features [B, E], on the devices."""
        return self._on_devices("image", self.pixels)

    @functools.cached_property
    def _of_texts(self) -> Callable[[jax.Array], jax.Array]:
        """Ids [B, T] -> features [B, E], on the devices."""
        return self._on_devices("text", lambda ids: ids)

    def _on_devices(self, tower: str, prepared: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        @jax.jit
        def features(params: Any, given: jax.Array) -> jax.Array:
            return self.network.apply({"params": {tower: params}}, prepared(given), method=f"{tower}_features")

        return functools.partial(features, local_devices.copied(self.params[tower]))

    def text_features(self, texts: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """Features of texts, at least one, each with the prefix."""
        ids = self.vocabulary.encode([self.prefix + text for text in texts])
        padded = np.pad(ids, ((0, -len(ids) % TEXTS_AT_ONCE), (0, 0)))  # so that nothing new is compiled
        parts = padded.reshape(-1, TEXTS_AT_ONCE, ids.shape[1])
        return np.concatenate([np.asarray(self._of_texts(part)) for part in parts])[: len(ids)]

    def image_features(self, batches: Iterable[Images]) -> Iterator[Float[np.ndarray, "b E"]]:
        """Features of each of a stream of batches of 8-bit images, on the host: see `local_devices.stream`."""
        return local_devices.stream(self._of_images, map(self.prepare, batches))

    def scores(self, batches: Iterable[tuple[Images, Sequence[str]]]) -> Iterator[Float[np.ndarray, " b"]]:
        """The cosine of each image and its text, for a stream of batches.

        Raises RearError: a batch is not of 8-bit images, or has not as many texts; or as `local_devices.stream`.
        """
        waiting: deque[Sequence[str]] = deque()

        def images() -> Iterator[Images]:
            for of_batch, texts in batches:
                if of_batch.dtype != np.uint8 or of_batch.ndim != 4 or of_batch.shape[3] != 3:
                    what = f"{of_batch.dtype} {of_batch.shape}"
                    raise RearError(f"{self.name} wants images as uint8 [B, H, W, 3], not {what}.")
                if len(of_batch) != len(texts):
                    raise RearError(f"{self.name} wants a text for each image, not {len(texts)} for {len(of_batch)}.")
                waiting.append(texts)
                yield of_batch

        for features in self.image_features(images()):
            yield np.asarray(cosines(features, self.text_features(waiting.popleft())))

    def score(self, images: Images, texts: Sequence[str]) -> Float[np.ndarray, " B"]:
        """The `scores` of one batch, and its errors."""
        return next(self.scores([(images, texts)]))


def load_clip(weights: str, vocabulary: str, *, prefix: str = "") -> TextScorer:
    """What the CLIP score is computed with.

    Args:
      weights: a file of `clip_files`.
      vocabulary: one of `clip_vocabulary.load`.
      prefix: what is put before each text, such as `PREFIX`.

    Raises RearError: a file is missing, damaged, or of another network.
    """
    network, params, words = _load(weights, vocabulary)
    name = _name(network)
    recipe = f"{name}; 8-bit bicubic to {network.image_size}, centre crop; before the text {prefix!r}; float32"
    prepare = functools.partial(clip_pixels, size=network.image_size)
    return TextScorer(name, recipe, network, params, words, prefix=prefix, prepare=prepare)


def load_hps(weights: str, vocabulary: str, *, antialias: bool = True) -> TextScorer:
    """What HPSv2 is computed with; arguments and errors as of `load_clip`, `antialias` as of `hps_pixels`."""
    network, params, words = _load(weights, vocabulary)
    if network.vision.width != HPS_WIDTH:
        raise RearError(f"{weights} is {_name(network)}, HPSv2 is a ViT-H-14: give HPS_v2.1_compressed.pt.")
    size, how = network.image_size, "antialiased bicubic" if antialias else "bicubic"
    recipe = f"HPSv2, a {_name(network)}; {how} to {size}, padded with black; float32"

    def pixels(images: jax.Array) -> jax.Array:
        return hps_pixels(images / jnp.float32(255), size, antialias=antialias)

    return TextScorer("HPSv2", recipe, network, params, words, pixels=pixels)


def _load(weights: str, vocabulary: str) -> tuple[CLIP, Any, CLIPVocabulary]:
    """Network, parameters and vocabulary, which fit each other."""
    network, params = clip_files.load(weights)
    words = clip_vocabulary.load(vocabulary, context_length=network.context_length)
    if words.size != network.vocab_size:
        raise RearError(f"{vocabulary} has {words.size} ids, {weights} wants {network.vocab_size}: give CLIP's own.")
    return network, params, words


def _name(network: CLIP) -> str:
    sizes = network.vision.width, network.patch_size
    return f"CLIP {NAMES.get(sizes, f'of width {sizes[0]} with patches of {sizes[1]}')}"
