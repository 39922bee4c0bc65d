"""A frozen classifier of this data set's classes, for rewards: a linear probe on EfficientNet-Lite0 features."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax.data.batches import ordered_batches
from rear_jax.data.sources import open_split, require_classes, split_facts
from rear_jax.data.sources.interface import Spread
from rear_jax.errors import RearError
from rear_jax.metrics import efficientnet, features
from rear_jax.metrics.efficientnet import FEATURES, EfficientNetLite
from rear_jax.metrics.probe import fit_probe

NETWORK = "lite0"  # not the one that the default evaluation looks through
BATCH_SIZE = 64


class ClassProbe(NamedTuple):
    """The classifier; the function takes the parameters first, so that a compiled step need not hold them.

    Attributes:
      params: frozen.
      log_probability: (params, images [B, H, W, 3] in [0, 1], labels [B]) -> [B], differentiable in the images.
      real_accuracy: top-1 accuracy on real images that it was not fitted to.
    """

    params: Any
    log_probability: Callable[[Any, jax.Array, jax.Array], jax.Array]
    real_accuracy: float


def fit(data: ConfigDict, *, count: int, feature_size: int) -> ClassProbe:
    """Fits the probe to training images, evenly spread over their source; the same input gives the same probe.

    Args:
      data: `config.data`.
      count: how many of them to look at, at most.
      feature_size: pixels, both sides, at which the network looks.

    Raises RearError: a label is no class, or a class of the data is not among the images looked at.
    """
    source = open_split(data, data.train_split)
    network = efficientnet.load(NETWORK)
    extractor = features.efficientnet_extractor(network, NETWORK, feature_size)
    labels: list[np.ndarray] = []

    def images():
        for batch in ordered_batches(Spread(source, count), image_size=data.image_size, batch_size=BATCH_SIZE):
            labels.append(batch["label"])
            yield batch["image"]

    extracted = features.extract(extractor, images())
    probe = fit_probe(extracted, np.concatenate(labels))
    scaler, regression = (step for _, step in probe.classifier.steps)
    if missing := sorted(set(range(data.num_classes)) - set(regression.classes_)):
        raise RearError(
            f"config.posttrain.reward.class_probability: none of the {len(extracted)} images that the probe looked at "
            f"is of class {missing[0]}; raise config.posttrain.probe_images."
        )
    coefficients, intercept = regression.coef_, regression.intercept_
    if len(coefficients) == 1:  # scikit-learn keeps one row for two classes
        coefficients, intercept = (np.concatenate([-x / 2, x / 2]) for x in (coefficients, intercept))
    kernel = (coefficients / scaler.scale_).T.astype(np.float32)  # [D, classes]
    bias = (intercept - coefficients @ (scaler.mean_ / scaler.scale_)).astype(np.float32)
    params = {"network": network, "kernel": kernel, "bias": bias}
    return ClassProbe(params, _log_probability(feature_size), probe.real_accuracy)


def check(data: ConfigDict, *, count: int) -> None:
    """Raises RearError where `fit` must fail: its weights are not installed, or it looks at too few images."""
    facts = split_facts(data, data.train_split)
    require_classes(facts, data.num_classes)
    looked_at = min(facts.num_images, count)
    if looked_at < data.num_classes:
        raise RearError(
            f"config.posttrain.reward.class_probability: the probe looks at {looked_at} images, which cannot show "
            f"{data.num_classes} classes; raise config.posttrain.probe_images."
        )
    efficientnet.load(NETWORK)


def outline(num_classes: int, *, feature_size: int) -> ClassProbe:
    """A probe that was fitted to nothing: the shapes of its parameters in their place, its accuracy not a number."""
    image = jax.ShapeDtypeStruct((1, feature_size, feature_size, 3), jnp.float32)
    params = {
        "network": jax.eval_shape(EfficientNetLite(NETWORK).init, jax.random.key(0), image)["params"],
        "kernel": jax.ShapeDtypeStruct((FEATURES, num_classes), jnp.float32),
        "bias": jax.ShapeDtypeStruct((num_classes,), jnp.float32),
    }
    return ClassProbe(params, _log_probability(feature_size), float("nan"))


def _log_probability(feature_size: int) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """`ClassProbe.log_probability` of a network that looks at so many pixels, both sides."""

    def log_probability(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        network = params["network"]
        seen = features.efficientnet_features(network, images, variant=NETWORK, size=feature_size, precision="high")
        logits = jnp.dot(seen["pooled"], params["kernel"], precision="high") + params["bias"]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]

    return log_probability
