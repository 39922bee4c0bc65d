"""The encoder of T5 v1.1, which flan-T5 shares: its features are what text-conditional LlamaGen reads.

Raffel et al. 2020, arXiv:1910.10683; the gated MLP is Shazeer 2020, arXiv:2002.05202; Chung et al. 2022,
arXiv:2210.11416 (flan-T5). Blocks are pre-norm with RMSNorm. No layer has a bias, logits of attention are not scaled,
and the only positions are a learned bias of the logits by the distance of key and query, one table for all blocks.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rear_jax.errors import RearError
from rear_jax.runtime.precision import Linear, factors, in_float32, of_products
from rear_jax.runtime.sharding import ROWS, Rule, Rules, by_rows, split_columns, split_rows

EPSILON = 1e-6  # of RMSNorm
DTYPES = ("bfloat16", "float32")
PARAMETERS: Rules = (
    *split_columns("q", "k", "v", "gate", "up"),
    *split_rows("proj", "down"),
    Rule(r"(^|/)token_embeddings$", ROWS, decays=True),
    Rule(r"(^|/)relative_bias$"),
    Rule(r"(^|/)(attention_|mlp_)?norm/scale$"),
)


def check_dtype(dtype: Any) -> None:
    """Raises RearError for a dtype in which T5 does not compute.

    Products of the MLP reach beyond 65504, the largest float16. bfloat16 has the range of float32.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise RearError(f"T5 does not compute in {name}: use bfloat16 or float32 (in float16 its MLP overflows).")


def distance_buckets(length: int, buckets: int = 32, max_distance: int = 128) -> Int[np.ndarray, " 2T-1"]:
    """The bucket of each distance in a text of `length` tokens.

    Half of the buckets are for keys after the query. Of each half, the first half are single distances 0, 1, 2, ...;
    the others grow in geometric steps up to `max_distance`, and the last one takes all that is farther. The steps are
    compared as integers: a logarithm may round a distance down that lies on an edge.

    Args:
      length: T.
      buckets: how many there are.
      max_distance: where the last one would end.

    Returns:
      int32; entry i is the bucket of key position − query position = i − (T − 1).
    """
    half = buckets // 2
    exact = half // 2
    steps = half - exact
    # step n begins at the first d with (d / exact)^steps >= (max_distance / exact)^n
    starts = [
        next(d for d in range(exact, max_distance + 1) if d**steps * exact**n >= max_distance**n * exact**steps)
        for n in range(1, steps)
    ]
    offsets = np.arange(-(length - 1), length)
    far = exact + np.searchsorted(starts, np.abs(offsets), side="right")
    bucket = np.where(np.abs(offsets) < exact, np.abs(offsets), far)
    return (bucket + np.where(offsets > 0, half, 0)).astype(np.int32)


class T5Block(nn.Module):
    """Self-attention and the gated MLP, each behind an RMSNorm and added to its input.

    Attributes:
      heads, head_size, mlp_width: sizes; heads × head_size may differ from the width of the input.
      dtype: of the products.
    """

    heads: int
    head_size: int
    mlp_width: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T W"], bias: Float[Array, "H T T"], mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T W"]:
        x = x + self.attention(rms_norm(self.dtype, "attention_norm")(x), bias, mask)
        return x + self.mlp(rms_norm(self.dtype, "mlp_norm")(x))

    def attention(
        self, x: Float[Array, "B T W"], bias: Float[Array, "H T T"], mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T W"]:
        """Every position looks at all that the mask admits; logits and softmax are float32."""
        apart = (*x.shape[:2], self.heads, self.head_size)
        q, k, v = (self._linear(self.heads * self.head_size, name)(x).reshape(apart) for name in "qkv")
        logits = _product("bqhd,bkhd->bhqk", q, k, jnp.float32) + bias
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)  # finite: a text may be empty
        weights = jax.nn.softmax(logits).astype(self.dtype)  # [B, H, T, T]
        out = _product("bhqk,bkhd->bqhd", weights, v, self.dtype).reshape(*x.shape[:2], -1)
        return self._linear(x.shape[-1], "proj", jnp.float32)(out)

    def mlp(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        """down(gelu(gate x) · up x), with the tanh form of GELU."""
        gate, up = (self._linear(self.mlp_width, name)(x) for name in ("gate", "up"))
        gated = in_float32(lambda gate, up: jax.nn.gelu(gate, approximate=True) * up, self.dtype)(gate, up)
        return self._linear(x.shape[-1], "down", jnp.float32)(gated)

    def _linear(self, features: int, name: str, out_dtype: Any = None) -> Linear:
        return Linear(features, dtype=self.dtype, use_bias=False, out_dtype=out_dtype, name=name)


class T5Encoder(nn.Module):
    """Features of texts. The defaults are the sizes of flan-T5-XL.

    The residual stream, the norms and the softmax are float32; `dtype` is that of the factors of products.

    Attributes:
      vocabulary_size: rows of the table of tokens.
      width, depth, heads, head_size, mlp_width: of the transformer.
      buckets, max_distance: of the relative bias, see `distance_buckets`.
      dtype: bfloat16 or float32.
    """

    vocabulary_size: int = 32128
    width: int = 2048
    depth: int = 24
    heads: int = 32
    head_size: int = 64
    mlp_width: int = 5120
    buckets: int = 32
    max_distance: int = 128
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T W"]:
        """Features of tokens, float32, zero where the mask is False.

        Args:
          ids: int32 token ids.
          mask: True where there is a token; no token looks at the other positions.

        Raises RearError: `dtype` is neither bfloat16 nor float32.
        """
        check_dtype(self.dtype)
        normal = nn.initializers.normal(1.0)
        table = self.param("token_embeddings", normal, (self.vocabulary_size, self.width), jnp.float32)
        biases = self.param("relative_bias", normal, (self.buckets, self.heads), jnp.float32)
        bias = self._bias(biases, ids.shape[1])
        block = T5Block(self.heads, self.head_size, self.mlp_width, self.dtype, name="blocks")
        scan = nn.scan(
            lambda block, x, _: (by_rows(block(x, bias, mask)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = scan(block, by_rows(jnp.take(table, ids, axis=0).astype(jnp.float32)), None)
        return jnp.where(mask[..., None], rms_norm(jnp.float32, "norm")(x), 0.0)

    def _bias(self, biases: Float[Array, "buckets H"], length: int) -> Float[Array, "H T T"]:
        """What every block adds to the logits [query, key] of each head."""
        distances = np.arange(length)[None, :] - np.arange(length)[:, None] + length - 1
        buckets = distance_buckets(length, self.buckets, self.max_distance)[distances]  # [T, T]
        return jnp.moveaxis(biases.astype(jnp.float32)[buckets], -1, 0)


def rms_norm(dtype: Any, name: str) -> nn.RMSNorm:
    """x / √(mean x² + ε) · scale in float32, rounded to `dtype`."""
    return nn.RMSNorm(epsilon=EPSILON, dtype=dtype, name=name)


def _product(axes: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """An einsum with a result in `dtype`."""
    return jnp.einsum(axes, *factors(a, b, dtype), precision=of_products(), preferred_element_type=dtype)
