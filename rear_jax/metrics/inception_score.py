"""The Inception Score: how sure a classifier is of each image, and how different the images are."""

import itertools

import numpy as np

from rear_jax.errors import RearError
from rear_jax.metrics.statistics import require_features

SPLITS = 10


def inception_score(logits: np.ndarray, splits: int = SPLITS) -> float:
    """exp of the mean divergence KL(p(y|x) ‖ p(y)), computed on consecutive splits of the set and averaged over them.

    The evaluator of ADM cuts 50 000 images into tens of 5 000 in the order in which they lie in the file, and so does
    this. All arithmetic is float64.

    Args:
      logits: [n, K], for published numbers Inception's 1008 without the bias.
      splits: 10 in the published numbers.

    Returns:
      A number in [1, K].

    Raises RearError: there are fewer images than splits, or a logit is not finite.

    References:
      Salimans et al. 2016, "Improved Techniques for Training GANs", arXiv:1606.03498.
    """
    require_features(logits)
    if len(logits) < splits:
        raise RearError(f"An Inception Score of {splits} splits needs logits [n, K] of as many images: {logits.shape}.")
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = [_score(logits[a:b].astype(np.float64)) for a, b in itertools.pairwise(bounds)]
    return float(np.mean(scores))


def _score(logits: np.ndarray) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    marginal = np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny)  # a class of probability 0 adds 0
    return float(np.exp((p * (log_p - np.log(marginal))).sum(axis=1).mean()))
