"""CLIP and HPSv2 as judges of how well images fit their captions, for the rewards `clip` and `hps`.

The features of captions are computed beside the steps, each once, and come with the batches. A step computes those of
images, with products at 'high'.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax.data.sources import SplitFacts, facts_of
from rear_jax.data.sources.interface import ImageSource
from rear_jax.errors import RearError
from rear_jax.metrics import clip_files, text_scores
from rear_jax.metrics.clip import CLIP, Tower
from rear_jax.metrics.clip_preprocess import clip_pixels_of_floats, hps_pixels
from rear_jax.metrics.text_scores import TextScorer
from rear_jax.training.posttraining.rewards import caption_judges
from rear_jax.weights.shards import open_weights

# What a plan counts where no file is given: OpenAI's ViT-B/32, and the ViT-H-14 of HPSv2.
USUAL = {
    "clip": CLIP(512, 224, 32, Tower(768, 12, 12), Tower(512, 12, 8), 49408, 77, "quick_gelu"),
    "hps": CLIP(1024, 224, 14, Tower(1280, 32, 16), Tower(1024, 24, 16), 49408, 77, "gelu"),
}


class TextJudge(NamedTuple):
    """The image side of a network; its parameters are {'image': …}.

    Attributes:
      network: at precision 'high'.
      pixels: images [B, H, W, 3] in [0, 1] -> what the network sees.
    """

    network: CLIP
    pixels: Callable[[jax.Array], jax.Array]

    def fit(self, params: Any, images: jax.Array, text: jax.Array) -> jax.Array:
        """The cosine [B] of images [B, H, W, 3] in [0, 1] with features of their text [E], differentiable in both."""
        features = self.network.apply({"params": params}, self.pixels(images), method="image_features")
        return text_scores.cosines(features, text)

    def caption_shape(self, rows: int) -> jax.ShapeDtypeStruct:
        """Of the features of so many captions."""
        return jax.ShapeDtypeStruct((rows, self.network.embedding_dim), jnp.float32)


def outline(name: str, config: ConfigDict) -> tuple[TextJudge, Any]:
    """The judge of the reward `name`, and the shapes of its parameters.

    Raises RearError: the file of its weights is given and is missing, damaged or of another network.
    """
    weights = config[name].weights
    network = clip_files.network_of(open_weights(weights), source=weights) if weights else USUAL[name]
    return _judge(name, config, network), {"image": clip_files.param_shapes(network)["image"]}


def load(name: str, config: ConfigDict) -> tuple[TextJudge, Any]:
    """The judge of the reward `name`, and its parameters.

    Raises RearError: as `scorer`.
    """
    found = scorer(name, config)
    return _judge(name, config, found.network), {"image": found.params["image"]}


class CaptionFeatures:
    """Features of the captions of a source, by the judges that compare images with them, each computed once."""

    def __init__(self, scorers: Mapping[str, TextScorer], source: ImageSource):
        """Computes nothing yet; `scorers` are those of `caption_scorers`, and without any the source needs no captions.

        Raises RearError: it has none.
        """
        require_captions(list(scorers), facts_of(source))
        self._scorers: Mapping[str, TextScorer] = scorers
        self._source: Any = source
        self._known: dict[str, dict[int, np.ndarray]] = {name: {} for name in scorers}

    def of(self, labels: np.ndarray) -> dict[str, Any]:
        """{'text_features': [b, E] by judge} of the captions with these numbers [b]; {} where no reward asks."""
        numbers = labels.tolist()
        for name, known in self._known.items():
            if new := sorted(set(numbers) - known.keys()):
                features = self._scorers[name].text_features([self._source.caption(number) for number in new])
                known.update(zip(new, features, strict=True))
        found = {name: np.stack([known[number] for number in numbers]) for name, known in self._known.items()}
        return {"text_features": found} if found else {}

    def beside(self, stream: Any) -> Iterator[dict[str, Any]]:
        """The batches of a stream with 'text_features' beside 'label'."""
        try:
            for batch in stream:
                yield batch | self.of(batch["label"])
        finally:
            stream.close()


def require_captions(names: Sequence[str], facts: SplitFacts) -> None:
    """Raises RearError where these judges compare images with captions, of `caption_judges`, and a split has none."""
    if names and not facts.captioned:
        raise RearError(
            f"config.posttrain.reward.{names[0]} needs the texts of captions, and {facts.name} has none: set "
            "config.data.source to one that has, such as 'imagefolder'."
        )


def caption_scorers(config: ConfigDict) -> dict[str, TextScorer]:
    """What the config's rewards compare images with captions by, without the parameters that see images.

    Raises RearError: as `scorer`.
    """
    found = {name: scorer(name, config) for name in caption_judges(config.posttrain)}
    return {name: dataclasses.replace(one, params={"text": one.params["text"]}) for name, one in found.items()}


def scorer(name: str, config: ConfigDict) -> TextScorer:
    """The network of the reward `name` with its vocabulary.

    Raises RearError: a file of it is not given, missing, damaged or of another network.
    """
    wanted = {f"{name}.weights": "a file of the network", "clip.vocabulary": "the tokenizer.json of a CLIP"}
    for option, what in wanted.items():
        if not config[option.partition(".")[0]][option.partition(".")[2]]:
            raise RearError(f"config.posttrain.reward.{name} needs config.{option}: give {what}.")
    if name == "clip":
        return text_scores.load_clip(config.clip.weights, config.clip.vocabulary, prefix=config.clip.prefix)
    return text_scores.load_hps(config.hps.weights, config.clip.vocabulary, antialias=config.hps.antialias)


def _judge(name: str, config: ConfigDict, network: CLIP) -> TextJudge:
    size, antialias = network.image_size, config.hps.antialias

    def pixels(images: jax.Array) -> jax.Array:
        return clip_pixels_of_floats(images, size) if name == "clip" else hps_pixels(images, size, antialias=antialias)

    return TextJudge(network.clone(precision="high"), pixels)
