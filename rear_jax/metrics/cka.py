"""Centred kernel alignment (CKA) with linear kernels: how alike two networks, or two layers, see the same examples.

Kornblith, Norouzi, Lee & Hinton 2019, "Similarity of Neural Network Representations Revisited", arXiv:1905.00414. CKA
divides the Hilbert-Schmidt independence criterion (HSIC) of two sets of features by those of each set with itself. It
does not change when a set is rotated, moved or scaled as a whole.

The plain estimate of HSIC is too large for few examples and many features. `unbiased_hsic` is the estimator of Song et
al. 2012, "Feature Selection via Dependence Maximization", JMLR 13, equation 5. Its sums over batches give a CKA that
does not depend on the batch size but by chance (Nguyen, Raghu & Kornblith 2020, arXiv:2010.15327, section 3.1).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from rear_jax.errors import RearError

FEWEST_ROWS = 4  # that the unbiased estimator is defined for


def cka(x: Float[Array, "n D"], y: Float[Array, "n E"]) -> Float[Array, ""]:
    """The plain, biased CKA of features of the same n examples: ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖) of the centred features.

    Returns:
      float32 in [0, 1]; 1 for sets that differ by a rotation, a shift and a factor, 0 where a set is constant.
    """
    x, y = _centred(x), _centred(y)
    return _ratio(_squared_norm(x, y), _squared_norm(x, x), _squared_norm(y, y))


def unbiased_hsic(x: Float[Array, "n D"], y: Float[Array, "n E"]) -> Float[Array, ""]:
    """The unbiased estimate of HSIC with linear kernels; 0 on average for independent features, and then also negative.

    With K = XXᵀ and L = YYᵀ without their diagonals, of n examples, it is [tr KL + 1ᵀK1 1ᵀL1 / ((n − 1)(n − 2)) −
    2 1ᵀKL1 / (n − 2)] / (n (n − 3)). The estimate does not change when features are moved. Of centred features K1 is
    minus the diagonal k of XXᵀ, so that no n × n matrix is needed: tr KL = ‖XᵀY‖² − k·l and 1ᵀKL1 = k·l.

    Returns:
      float32, in the squared units of both features.

    Raises RearError: there are fewer than four examples.
    """
    count = len(x)
    if count < FEWEST_ROWS:
        raise RearError(f"HSIC without bias needs {FEWEST_ROWS} examples or more, there are {count}: take more images.")
    x, y = _centred(x), _centred(y)
    k, l = jnp.sum(x * x, axis=1), jnp.sum(y * y, axis=1)  # noqa: E741
    diagonals = count / (count - 2) * jnp.sum(k * l)
    sums = jnp.sum(k) * jnp.sum(l) / ((count - 1) * (count - 2))
    return (_squared_norm(x, y) - diagonals + sums) / (count * (count - 3))


def unbiased_cka(x: Float[Array, "n D"], y: Float[Array, "n E"]) -> Float[Array, ""]:
    """CKA of unbiased estimates; 1 for rotated copies, around 0 for independent features, and then also negative."""
    return _ratio(unbiased_hsic(x, y), unbiased_hsic(x, x), unbiased_hsic(y, y))


def cka_of_batches(between: np.ndarray, within_x: np.ndarray, within_y: np.ndarray) -> float:
    """CKA of many examples, from the unbiased estimates of their batches.

    Args:
      between: [b] `unbiased_hsic(x, y)` of each batch; all batches have the same number of examples.
      within_x: [b] `unbiased_hsic(x, x)` of each.
      within_y: [b] `unbiased_hsic(y, y)` of each.
    """
    sums = (np.sum(np.asarray(values, np.float64)) for values in (between, within_x, within_y))
    return float(_ratio(*sums))


def _centred(x: jax.Array) -> jax.Array:
    """Features without their mean, float32."""
    x = x.astype(jnp.float32)
    return x - jnp.mean(x, axis=0)


def _squared_norm(x: jax.Array, y: jax.Array) -> jax.Array:
    """‖XᵀY‖², the sum of the squares of all products of features."""
    return jnp.sum(jnp.square(jnp.matmul(x.T, y, precision=lax.Precision.HIGHEST)))


def _ratio(between: jax.Array, within_x: jax.Array, within_y: jax.Array) -> jax.Array:
    """between / √(within_x · within_y), and 0 where one of these is not positive: such features say nothing."""
    product = jnp.sqrt(jnp.maximum(within_x, 0.0)) * jnp.sqrt(jnp.maximum(within_y, 0.0))
    return jnp.where(product > 0, between / jnp.where(product > 0, product, 1.0), 0.0)
