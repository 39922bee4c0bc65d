"""Vector quantisation as pure functions on a codebook array [K, D]: search, look-up, losses, and upkeep between steps.

A codebook is learned by gradient (VQ-VAE, arXiv 1711.00937, equation 3), with `Quantized.codebook_loss` in the
objective, or as a moving average of the latents that chose each code (same paper, appendix A.1), with
`update_codebook` after each step. Either way `update_codebook` can put codes that nothing chooses back to work. What it
must remember is a `CodebookState` that the caller carries and checkpoints.
"""

from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

SMOOTHING = 1e-5  # Laplace smoothing of the moving average, in uniform shares


class Quantized(NamedTuple):
    """What quantising latents gives.

    Attributes:
      vectors: codebook vectors in the latents' place; their gradient passes straight through to the latents.
      codes: the indices of these vectors.
      latents: the latents as they were compared with the codebook (normalised if the tokenizer normalises), float32.
      commitment_loss: mean squared pull of the latents towards their codes; its weight is the caller's.
      codebook_loss: mean squared pull of the codes towards their latents; leave it out when codes are moving averages.
    """

    vectors: Float[Array, "*B D"]
    codes: Int[Array, "*B"]
    latents: Float[Array, "*B D"]
    commitment_loss: Float[Array, ""]
    codebook_loss: Float[Array, ""]


@flax.struct.dataclass
class CodebookState:
    """What the upkeep of a codebook remembers from step to step.

    Attributes:
      usage: moving average of how often each code was chosen, in uniform shares: 1 is the K-th part of all latents.
      sums: moving average of the summed latents of each code, in the same unit; None if codes learn by gradient.
    """

    usage: Float[Array, " K"]
    sums: Float[Array, "K D"] | None


def codebook_init(key: PRNGKeyArray, shape: tuple[int, int], dtype: Any = jnp.float32) -> Float[Array, "K D"]:
    """First codebook: uniform in ±1/K, as VQGAN and all that follow it draw it (arXiv 2012.09841)."""
    return jax.random.uniform(key, shape, dtype, minval=-1.0 / shape[0], maxval=1.0 / shape[0])


def unit_codebook_init(key: PRNGKeyArray, shape: tuple[int, int], dtype: Any = jnp.float32) -> Float[Array, "K D"]:
    """The same with vectors of length one, as LlamaGen draws it (arXiv 2406.06525)."""
    return unit(codebook_init(key, shape, dtype))


def unit(vectors: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Vectors of length one, in float32 or better; a zero vector stays zero and has a finite gradient."""
    vectors = _at_least_float32(vectors)
    squared = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


def nearest_codes(latents: Float[Array, "*B D"], codebook: Float[Array, "K D"]) -> Int[Array, "*B"]:
    """Index of the codebook vector at the smallest squared distance; the lowest index among equals.

    Computed in float32 at full matmul precision on every backend, since bfloat16 passes pick other codes. Holds one
    float for every pair of latent and code.
    """
    latents, codebook = _at_least_float32(latents), _at_least_float32(codebook)
    products = jnp.matmul(latents, codebook.T, precision=jax.lax.Precision.HIGHEST)
    # |z - e|² without |z|², which is the same for all codes
    distances = jnp.sum(jnp.square(codebook), axis=-1) - 2.0 * products
    return jnp.argmin(distances, axis=-1).astype(jnp.int32)


def look_up(codes: Int[Array, "*B"], codebook: Float[Array, "K D"], *, l2_normalize: bool) -> Float[Array, "*B D"]:
    """The vectors of codes, of length one if `l2_normalize`."""
    vectors = jnp.take(codebook, codes, axis=0)
    return unit(vectors) if l2_normalize else vectors


def search(latents: Float[Array, "*B D"], codebook: Float[Array, "K D"], *, l2_normalize: bool) -> Int[Array, "*B"]:
    """`nearest_codes`, between vectors of length one if `l2_normalize` (LlamaGen, arXiv 2406.06525)."""
    return nearest_codes(unit(latents), unit(codebook)) if l2_normalize else nearest_codes(latents, codebook)


def quantize(latents: Float[Array, "*B D"], codebook: Float[Array, "K D"], *, l2_normalize: bool) -> Quantized:
    """Replaces each latent by its nearest code, with the straight-through gradient and both VQ-VAE losses."""
    latents = unit(latents) if l2_normalize else _at_least_float32(latents)
    codes = jax.lax.stop_gradient(search(latents, codebook, l2_normalize=l2_normalize))
    vectors = look_up(codes, codebook, l2_normalize=l2_normalize)
    return Quantized(
        vectors=latents + jax.lax.stop_gradient(vectors - latents),
        codes=codes,
        latents=latents,
        commitment_loss=jnp.mean(jnp.square(latents - jax.lax.stop_gradient(vectors))),
        codebook_loss=jnp.mean(jnp.square(vectors - jax.lax.stop_gradient(latents))),
    )


def init_codebook_state(codebook: Float[Array, "K D"], *, method: Literal["gradient", "ema"]) -> CodebookState:
    """The state before the first step: every code counts as used its uniform share, so none starts out dead."""
    usage = jnp.ones(codebook.shape[0], jnp.float32)
    return CodebookState(usage=usage, sums=codebook.astype(jnp.float32) if method == "ema" else None)


def update_codebook(
    codebook: Float[Array, "K D"],
    state: CodebookState,
    latents: Float[Array, "*B D"],
    codes: Int[Array, "*B"],
    rng: PRNGKeyArray,
    *,
    decay: float,
    revive_below: float,
    method: Literal["gradient", "ema"],
) -> tuple[Float[Array, "K D"], CodebookState]:
    """Upkeep after one training step: usage, the moving-average codes, and the revival of dead codes.

    Under jit with a sharded batch the counts are those of the whole batch, and every device revives the same codes.

    Args:
      codebook: codes as the step left them.
      state: from `init_codebook_state` with the same method, or from the last call.
      latents: `Quantized.latents` of the step.
      codes: `Quantized.codes` of the step.
      rng: key of this call; chooses the latents that dead codes become.
      decay: of the moving averages, per step, in [0, 1).
      revive_below: a code whose usage falls below this many uniform shares becomes a random latent of the batch and
        counts as used one share; 0 revives nothing. A code that is never chosen keeps usage decay**steps.
      method: 'ema' makes each code the mean of its latents; 'gradient' leaves living codes as they are.

    Raises:
      ValueError: the method is neither.
    """
    if method not in ("gradient", "ema"):
        raise ValueError(f"unknown codebook method {method!r}: use 'gradient' or 'ema'")
    num_codes, width = codebook.shape
    latents = jax.lax.stop_gradient(latents).reshape(-1, width).astype(jnp.float32)
    codes = codes.reshape(-1)
    usage = decay * state.usage + (1.0 - decay) * num_codes * _code_shares(codes, num_codes)
    dead = usage < revive_below
    reborn = latents[jax.random.choice(rng, codes.size, (num_codes,))]
    sums = state.sums
    if method == "ema":
        chosen = jax.ops.segment_sum(latents, codes, num_codes) * (num_codes / codes.size)
        sums = decay * sums + (1.0 - decay) * chosen
        smoothed = (usage + SMOOTHING) / (jnp.mean(usage) + SMOOTHING) * jnp.mean(usage)
        codebook = (sums / smoothed[:, None]).astype(codebook.dtype)
        sums = jnp.where(dead[:, None], reborn, sums)
    codebook = jnp.where(dead[:, None], reborn.astype(codebook.dtype), codebook)
    return codebook, CodebookState(usage=jnp.where(dead, 1.0, usage), sums=sums)


def codebook_usage(codes: Int[Array, "*B"], num_codes: int) -> Float[Array, ""]:
    """Share of the codebook that occurs among `codes`, in [0, 1]."""
    return jnp.mean(_code_shares(codes, num_codes) > 0)


def perplexity(codes: Int[Array, "*B"], num_codes: int) -> Float[Array, ""]:
    """exp of the entropy of the codes' frequencies: 1 if one code does it all, K if all are equally frequent."""
    return jnp.exp(jnp.sum(jax.scipy.special.entr(_code_shares(codes, num_codes))))


def _code_shares(codes: Int[Array, "*B"], num_codes: int) -> Float[Array, " K"]:
    """Frequency of each code; they sum to 1."""
    return jnp.bincount(codes.reshape(-1), length=num_codes).astype(jnp.float32) / codes.size


def _at_least_float32(x: jax.Array) -> jax.Array:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
