"""A linear probe: does a generated image look, to a frozen network, like the class it was generated for?"""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING

import numpy as np

from rear_jax.errors import RearError
from rear_jax.metrics.statistics import require_features

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

HELD_OUT = 0.2  # share of the real images that the probe is tested on instead of fitted to
MAX_ITERATIONS = 300


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """A multinomial logistic regression on standardised features of real images.

    Attributes:
      classifier: the fitted scikit-learn pipeline.
      real_accuracy: top-1 accuracy on held-out real images: what a perfect generator would about reach.
    """

    classifier: Pipeline
    real_accuracy: float

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """Top-1 accuracy on features [n, D] of images that were generated for labels [n].

        Raises RearError: shapes do not fit, a feature is not finite, or the probe was never shown one of the labels.
        """
        _check(features, labels)
        unknown = np.setdiff1d(labels, self.classifier.classes_)
        if unknown.size:
            raise RearError(f"The probe saw no real image of class {unknown[0]}; fit it on all classes you generate.")
        return float(np.mean(self.classifier.predict(np.asarray(features, np.float64)) == labels))


def fit_probe(features: np.ndarray, labels: np.ndarray) -> LinearProbe:
    """Fits a probe on four fifths of the real images and tests it on the rest; the same input gives the same probe.

    Features are standardised over the fitted images; the penalty is scikit-learn's ½‖W‖² against the summed
    cross-entropy; L-BFGS stops after at most 300 iterations, converged or not.

    Args:
      features: [n, D] of real images.
      labels: [n] integer classes.

    Returns:
      The probe, with its accuracy on the images held out.

    Raises RearError: shapes do not fit, a feature is not finite, or fewer than two classes are left to fit.
    """
    # here, because importing it takes a second that other jobs need not wait
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _check(features, labels)
    order = np.random.default_rng(0).permutation(len(labels))
    held_out, fitted = np.split(order, [max(1, round(HELD_OUT * len(labels)))])
    if np.unique(labels[fitted]).size < 2:
        raise RearError("A linear probe needs labelled images of at least two classes; give it more real images.")
    features = np.asarray(features, np.float64)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(features[fitted], labels[fitted])
    return LinearProbe(classifier, float(classifier.score(features[held_out], labels[held_out])))


def _check(features: np.ndarray, labels: np.ndarray) -> None:
    require_features(features)
    if labels.shape != features.shape[:1] or not len(labels):
        raise RearError(f"A probe takes features [n, D] and labels [n], got {features.shape} and {labels.shape}.")
