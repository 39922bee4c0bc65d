"""Fused kernels of causal attention, and the rule that says where which of them runs.

A fused kernel never holds the scores [B, H, T, T] in memory. cuDNN's (GPUs) divides itself over a mesh. Splash
attention (TPUs) is a Pallas kernel, which XLA's partitioner does not look into, so it is mapped over the devices here.
Neither has the dropout of attention weights that fits training (cuDNN's repeats one mask, drawn from a constant seed),
nor positions that only some queries see: for these, and for everything else, there is the plain form in `attention.py`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from rear_jax.errors import RearError
from rear_jax.runtime.precision import platform
from rear_jax.runtime.sharding import BATCH_AXES, HEAD_AXES, dividing

SPLASH_BLOCK = 128  # positions that splash attention takes at a time; lengths are filled up to a multiple
CUDNN_DTYPES = ("bfloat16", "float16")
CUDNN_HEAD_SIZE = 128  # at most, and a multiple of 8
CUDNN_CAPABILITY = 8.0  # compute capability at least: Ampere


def cudnn_attention(
    queries: Float[Array, "B T H D"], keys: Float[Array, "B T H D"], values: Float[Array, "B T H D"]
) -> Float[Array, "B T H D"]:
    """Causal attention by cuDNN; softmax in float32."""
    return jax.nn.dot_product_attention(queries, keys, values, is_causal=True, implementation="cudnn")


def splash_attention(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B T H D"],
    values: Float[Array, "B T H D"],
    *,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """Causal attention by JAX's splash attention, each device with rows and heads of its own; softmax in float32.

    Args:
      queries, keys, values: one dtype, in which the queries are scaled.
      interpret: run the kernel's Python on any platform, slowly.
    """
    batch, length, heads, size = queries.shape
    filled = -(-length // SPLASH_BLOCK) * SPLASH_BLOCK  # positions after the last are seen by none before them

    def kernel(*inputs):  # [b, T, h, D] each, of one device
        rows = [jnp.pad(x, ((0, 0), (0, filled - length), (0, 0), (0, 0))).swapaxes(1, 2) for x in inputs]
        mask = splash.MultiHeadMask([splash.CausalMask((filled, filled))] * rows[0].shape[1])
        of_row = splash.make_splash_mha_single_device(mask, interpret=interpret)
        return jax.vmap(of_row)(*rows).swapaxes(1, 2)[:, :length]

    queries *= jnp.asarray(size**-0.5, queries.dtype)
    mesh = jax.sharding.get_abstract_mesh().shape
    if math.prod(mesh.values()) == 1:
        return kernel(queries, keys, values)
    spec = PartitionSpec(dividing(BATCH_AXES, batch, mesh), None, dividing(HEAD_AXES, heads, mesh))
    return jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(queries, keys, values)


FUSED: dict[str, Callable[..., jax.Array]] = {"cudnn": cudnn_attention, "splash": splash_attention}
KERNELS = ("auto", "plain", *FUSED)


def choose(name: str, *, dtype: Any, head_size: int, dropout: float, masked: bool) -> str:
    """The kernel to use: 'plain' or a key of FUSED.

    Args:
      name: `config.model.attention`, one of KERNELS; 'auto' takes the fused one that can run, else 'plain'.
      dtype: of queries, keys and values.
      head_size: D.
      dropout: rate of attention weights that are dropped now; 0 outside training.
      masked: whether some positions are hidden from others besides those that come after them.

    Raises RearError: the kernel that is named cannot compute this here.
    """
    reasons = {kernel: _obstacle(kernel, jnp.dtype(dtype).name, head_size, dropout, masked) for kernel in FUSED}
    if name == "auto":
        return next((kernel for kernel, reason in reasons.items() if not reason), "plain")
    if reasons.get(name):
        raise RearError(f"config.model.attention = {name!r} {reasons[name]}: use 'auto' or 'plain'.")
    return name


def _obstacle(kernel: str, dtype: str, head_size: int, dropout: float, masked: bool) -> str:
    """Why a fused kernel cannot compute this attention; '' where it can."""
    if kernel == "splash" and platform() != "tpu":
        return f"runs on TPUs, not on {platform()}"
    if kernel == "cudnn" and not (platform() == "gpu" and _has_flash_attention()):
        return f"runs on NVIDIA GPUs of compute capability {CUDNN_CAPABILITY} or higher, not on {platform()}"
    if kernel == "splash" and dtype != "bfloat16":
        return f"takes bfloat16, to which it rounds its factors, not {dtype}"
    if kernel == "cudnn" and dtype not in CUDNN_DTYPES:
        return f"takes bfloat16 or float16, not {dtype}"
    if kernel == "cudnn" and (head_size > CUDNN_HEAD_SIZE or head_size % 8):
        return f"takes heads of a multiple of 8 up to {CUDNN_HEAD_SIZE} features, not {head_size}"
    if dropout:
        return f"has no dropout of attention weights, and config.model.dropout = {dropout} asks for it"
    return "hides no positions, as captions need it" if masked else ""


def _has_flash_attention() -> bool:
    """Whether this machine's GPUs are cuDNN's and new enough; AMD's name their kind where NVIDIA's have a number."""
    if jax.default_backend() != "gpu":
        return False
    capability = jax.local_devices()[0].compute_capability
    return capability.replace(".", "").isdigit() and float(capability) >= CUDNN_CAPABILITY
