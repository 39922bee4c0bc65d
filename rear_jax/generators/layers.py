"""Layers that several families of generators share, and the rules of their parameters."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from rear_jax.generators.stack import keep
from rear_jax.runtime.precision import Linear, add_bias, gelu, in_float32, multiply
from rear_jax.runtime.sharding import HEAD_AXES, Rule, Rules, by_heads, is_divided, split_columns, split_rows
from rear_jax.weights.layout import Path, TorchName, leaf_name

PROJECTORS = {"released": 3, "paper": 2}  # linear layers of a projector
RELEASED_HIDDEN = 2048  # width of a projector's hidden layers
PROJECTOR_KEYS = {"shallow_projector": "encode_align_mlp", "deep_projector": "decode_align_mlp"}  # in reAR's files

# The authors' `trunc_normal_(std=0.02)` cuts at ±2, a hundred standard deviations: no draw is ever cut.
normal = nn.initializers.normal(0.02)

ATTENTION: Rules = (
    Rule(r"(^|/)qkv/kernel$", (("fsdp", "tensor"), None), decays=True),  # no cut of [3, heads, features] divides heads
    Rule(r"(^|/)qkv/bias$"),
    *split_rows("proj"),
    Rule(r"(^|/)(q_|k_|attention_|mlp_)?norm\d?/(scale|bias)$"),
)
TAPS: Rules = (
    Rule(r"(^|/)(shallow|deep)_projector/layer\d/kernel$", ("fsdp", None), decays=True),
    Rule(r"(^|/)(shallow|deep)_projector/layer\d/bias$"),
)
HEAD: Rules = split_columns("lm_head")


class HeadsLinear(nn.Module):
    """The linear layer from [..., W] to queries, keys and values of all heads, [..., 3, heads, W / heads].

    Its parameters are those of a `Linear` of 3 W features, and so is its product. Under tensor parallelism each device
    has heads of its own (Megatron-LM, arXiv 1909.08053), which no equal cut through the 3 W columns gives: each block's
    kernel is dealt out by heads when it is used.
    """

    heads: int
    dtype: Any
    use_bias: bool = True
    kernel_init: Any = normal

    @nn.compact
    def __call__(self, x: Float[Array, "... W"]) -> Float[Array, "... 3 H D"]:
        width = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (width, 3 * width), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (3 * width,), jnp.float32) if self.use_bias else None
        apart = (3, self.heads, width // self.heads)
        if is_divided(HEAD_AXES):
            out = multiply(x, kernel.reshape(width, *apart), self.dtype, place=by_heads)
        else:
            out = multiply(x, kernel, self.dtype)
        if bias is not None:
            out = add_bias(out, bias.reshape(out.shape[x.ndim - 1 :]))
        return keep(out).reshape(*x.shape[:-1], *apart)


def dense(
    features: int, dtype: Any, name: str | None = None, kernel_init: Any = normal, out_dtype: Any = None
) -> Linear:
    """A biased linear layer with the family's initialisation."""
    return Linear(features, dtype=dtype, kernel_init=kernel_init, out_dtype=out_dtype, name=name)


class Projector(nn.Module):
    """Maps hidden states into the codebook's space, in training only.

    `layers` linear layers of hidden width `hidden`: three with SiLU are the released code's (and its checkpoints'),
    two with GELU the paper's text.

    At the released hidden width weights start with the released standard deviation of 0.02. At others, those that read
    hidden features start with one that makes the vectors as large. If they started near zero, as from 0.02 at a hidden
    width of 128, gradients of their cosines would be hundreds of times those of the prediction.
    """

    hidden: int
    features: int
    layers: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B N W"]) -> Float[Array, "B N D"]:
        activation = in_float32(nn.silu, self.dtype) if self.layers == 3 else gelu
        as_large = nn.initializers.normal(0.02 * math.sqrt(RELEASED_HIDDEN / self.hidden))
        for i in range(self.layers - 1):
            start = as_large if i else normal
            x = activation(dense(self.hidden, self.dtype, name=f"layer{i}", kernel_init=start)(x))
        return dense(self.features, self.dtype, name=f"layer{self.layers - 1}", kernel_init=as_large)(x)


def projectors(model: nn.Module) -> tuple[Projector, Projector]:
    """The shallow and the deep projector of a generator that has taps; its attributes say their sizes."""
    sizes = model.projector_width, model.embedding_dim, PROJECTORS[model.projector], model.dtype
    return Projector(*sizes), Projector(*sizes)


def projector_name(path: Path) -> TorchName:
    """Key of a projector's parameter in reAR's files, where an activation stands between two linear layers."""
    module, layer, leaf = path
    return leaf_name(f"{PROJECTOR_KEYS[module]}.{2 * int(layer.removeprefix('layer'))}", leaf)
