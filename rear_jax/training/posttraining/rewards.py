"""What a sampled image is worth: how close it is to its original, how real it looks, how well it fits its label.

A reward is a function (images [B, H, W, 3], labels [B], seen) -> [B], higher is better; `seen` is what else there is to
look at. With every method the images are as the decoder gives them, around [0, 1], as in the released code of VA-π:
what lies outside counts as an error, and has a gradient. With `config.posttrain.clip_images` they are clipped, as they
will be seen. To add a reward, write it, name it in REWARDS, and give it a weight in `config.posttrain.reward`. One that
looks at more than the images is a `Reward`, which declares what.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rear_jax import losses
from rear_jax.errors import RearError
from rear_jax.runtime.mesh import map_rows
from rear_jax.training.loop import SUSPECT
from rear_jax.training.posttraining.teacher_forcing import Networks, unit_images

# what a reward may look at, and a method or a generator may not have
ORIGINAL, CODES, CLASSES, CAPTIONS = "original", "codes", "classes", "captions"


class Seen(NamedTuple):
    """What a reward may look at beside the sampled images and their labels.

    Attributes:
      networks, frozen: modules and their parameters by name.
      codes: [B, N] that the images were decoded from; None where they were decoded from mixtures of codes.
      original: [1, H, W, 3] in [0, 1], the image that all of them stand for; in free-running rollouts only an image
        of the same label.
      text_features: [E] of the caption by the judge that compares images with it; {} where no reward asks for it.
    """

    networks: Networks
    frozen: dict[str, Any]
    codes: jax.Array | None
    original: jax.Array
    text_features: Mapping[str, jax.Array] = {}

    def judge(self, name: str) -> tuple[Any, Any]:
        """The network of `judges.JUDGES` with this name, and its parameters."""
        return self.networks.judges[name], self.frozen[name]


class Reward(NamedTuple):
    """A reward and what it needs.

    Attributes:
      function: (images, labels, seen) -> [B].
      looks_at: of ORIGINAL, CODES, CLASSES and CAPTIONS.
      judge: the network of `judges.JUDGES` that it asks, '' = none.
    """

    function: Callable[[jax.Array, jax.Array, Seen], jax.Array]
    looks_at: tuple[str, ...] = ()
    judge: str = ""

    def __call__(self, images: jax.Array, labels: jax.Array, seen: Seen) -> jax.Array:
        return self.function(images, labels, seen)


def squared_error(images: jax.Array, labels: jax.Array, seen: Seen) -> jax.Array:
    """Minus the mean squared difference from the original, pixels in [-1, 1]."""
    return -4.0 * losses.mean_squared_error(images, jnp.broadcast_to(seen.original, images.shape))


def absolute_error(images: jax.Array, labels: jax.Array, seen: Seen) -> jax.Array:
    """Minus the mean absolute difference from the original, pixels in [-1, 1]."""
    return -2.0 * jnp.mean(jnp.abs(images - seen.original), axis=(1, 2, 3))


def perceptual(images: jax.Array, labels: jax.Array, seen: Seen) -> jax.Array:
    """Minus the distance from the original in a perceptual network's features, which see the original once."""
    network, params = seen.judge("perceptual")
    return -network.compare(params, network.features(params, images), network.features(params, seen.original))


def codebook_cosine(images: jax.Array, labels: jax.Array, seen: Seen) -> jax.Array:
    """Cosine, less 1, between the sampled codes' vectors and what the encoder makes of the original.

    The mean over positions of the cosines [B, N]; see `flattened_codebook_cosine` for the other reading.
    """
    vectors, latents = _vectors_and_latents(seen)
    return -1.0 - jnp.mean(losses.negative_cosine(vectors, latents), axis=-1)


def flattened_codebook_cosine(images: jax.Array, labels: jax.Array, seen: Seen) -> jax.Array:
    """The same as one cosine of all positions together, vectors of N·D features: long vectors count for more."""
    vectors, latents = (x.reshape(len(x), -1) for x in _vectors_and_latents(seen))
    return -1.0 - losses.negative_cosine(vectors, latents)


def _vectors_and_latents(seen: Seen) -> tuple[jax.Array, jax.Array]:
    """Vectors of the sampled codes [B, N, D], and latents of the original [1, N, D]."""
    tokenizer, variables = seen.networks.tokenizer, {"params": seen.frozen["tokenizer"]}
    vectors = tokenizer.apply(variables, seen.codes, method="embed")
    latents = tokenizer.apply(variables, seen.original, method="latents")
    return vectors, latents.reshape(1, *vectors.shape[1:])


def discriminator(images: jax.Array, labels: jax.Array, seen: Seen) -> jax.Array:
    """Mean PatchGAN logit, high for real, of the discriminator that the tokenizer was trained with."""
    network, params = seen.judge("discriminator")
    return jnp.mean(network.apply({"params": params}, images), axis=(1, 2, 3))


def class_probability(images: jax.Array, labels: jax.Array, seen: Seen) -> jax.Array:
    """Log-probability of the label under a linear probe of real images, see `class_probe`."""
    network, params = seen.judge("class_probe")
    return network.log_probability(params, images, labels)


def clip(images: jax.Array, labels: jax.Array, seen: Seen) -> jax.Array:
    """The cosine between CLIP's features of the image and of its caption."""
    network, params = seen.judge("clip")
    return network.fit(params, images, seen.text_features["clip"])


def hps(images: jax.Array, labels: jax.Array, seen: Seen) -> jax.Array:
    """HPSv2, the same cosine in a network that knows which images people prefer."""
    network, params = seen.judge("hps")
    return network.fit(params, images, seen.text_features["hps"])


REWARDS: dict[str, Reward | Callable[..., jax.Array]] = {
    "mse": Reward(squared_error, (ORIGINAL,)),
    "l1": Reward(absolute_error, (ORIGINAL,)),
    "perceptual": Reward(perceptual, (ORIGINAL,), judge="perceptual"),
    "codebook": Reward(codebook_cosine, (ORIGINAL, CODES)),
    "codebook_flattened": Reward(flattened_codebook_cosine, (ORIGINAL, CODES)),
    "discriminator": Reward(discriminator, judge="discriminator"),
    "class_probability": Reward(class_probability, (CLASSES,), judge="class_probe"),
    "clip": Reward(clip, (CAPTIONS,), judge="clip"),
    "hps": Reward(hps, (CAPTIONS,), judge="hps"),
}


def declared(name: str) -> Reward:
    """A reward with its declaration; a plain function looks at nothing but images and labels."""
    return REWARDS[name] if isinstance(REWARDS[name], Reward) else Reward(REWARDS[name])


def wanted(settings: ConfigDict) -> dict[str, float]:
    """Weights in `config.posttrain.reward` that are not 0, by name."""
    return {name: weight for name, weight in settings.reward.items() if weight}


def caption_judges(settings: ConfigDict) -> list[str]:
    """The judges whose features of captions a batch has to hold, see `text_features_of`."""
    return [declared(name).judge for name in wanted(settings) if CAPTIONS in declared(name).looks_at]


def text_features_of(batch: dict) -> dict[str, jax.Array]:
    """Features of the captions of a batch, [B, E] by judge; a batch that no reward wants them of has none."""
    return batch.get("text_features", {})


def check(settings: ConfigDict, lacking: Mapping[str, str]) -> None:
    """Raises RearError where no known reward has a weight, or one looks at what there is not.

    Args:
      settings: `config.posttrain`.
      lacking: what rewards cannot look at -> why.
    """
    if unknown := sorted(set(settings.reward) - set(REWARDS)):
        raise RearError(f"config.posttrain.reward.{unknown[0]} is no reward: use {', '.join(REWARDS)}.")
    if not wanted(settings):
        raise RearError(f"config.posttrain.reward is all 0: give one of {', '.join(settings.reward)} a weight.")
    for what, reason in lacking.items():
        if wrong := [name for name in wanted(settings) if what in declared(name).looks_at]:
            others = ", ".join(name for name in REWARDS if what not in declared(name).looks_at)
            raise RearError(f"config.posttrain.reward.{wrong[0]} {reason}: set it to 0, and use {others}.")


def total(
    settings: ConfigDict, images: jax.Array, labels: jax.Array, seen: Seen
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """R = Σ weight · reward; with the default weights R = -(MSE + perceptual distance) (VA-π, arXiv 2512.19680).

    Args:
      settings: `config.posttrain`.
      images: [B, H, W, 3] as decoded.
      labels: [B].
      seen: what else to look at.

    Returns:
      R [B], and each reward [B] by name, before weighting.
    """
    weights = wanted(settings)
    images = jnp.clip(images, 0.0, 1.0) if settings.clip_images else images
    found = {name: REWARDS[name](images, labels, seen) for name in weights}
    return sum(weights[name] * value for name, value in found.items()), found


def score(
    networks: Networks, settings: ConfigDict, frozen: dict, samples: jax.Array, batch: dict
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Rewards [B, G] of samples [B, G, N] for a batch, and each reward [B, G] by name.

    A few images of a device at a time, so that no more than these are held decoded.
    """

    def of_one_image(inputs):
        codes, image, label, text_features = inputs
        images = networks.tokenizer.apply({"params": frozen["tokenizer"]}, codes, method="decode")
        seen = Seen(networks, frozen, codes, image[None], text_features)
        return total(settings, images, jnp.full(len(codes), label), seen)

    inputs = samples, unit_images(batch), batch["label"], text_features_of(batch)
    return map_rows(of_one_image, inputs, at_once=settings.images_at_once)


def watched(reward: jax.Array, each: Mapping[str, jax.Array], batch: dict) -> dict[str, jax.Array]:
    """Metrics of rewards [B, G] and of each one by name; SUSPECT tells where the first that is not finite is from."""
    means = {f"reward_{name}": jnp.mean(value) for name, value in each.items()}
    return {"reward": jnp.mean(reward), SUSPECT: first_not_finite(reward, batch), **means}


def first_not_finite(reward: jax.Array, batch: dict) -> jax.Array:
    """Place in the data set of the first image with a reward [B, G] that is not finite, or -1."""
    broken = ~jnp.all(jnp.isfinite(reward), axis=-1)
    return jnp.where(jnp.any(broken), batch["index"][jnp.argmax(broken)], -1)
