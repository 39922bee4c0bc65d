"""Inception-v3 as the published FIDs use it: the graph of 2015-12-05, not torchvision's network of that name.

It differs in that average pools leave the padding out of the count, the last block has a max pool, and images are
resized to 299 × 299 by TensorFlow 1's bilinear rule (Szegedy et al. 2015, arXiv:1512.00567; Heusel et al. 2017,
arXiv:1706.08500). The network is only ever used frozen, so every convolution carries its BatchNorm folded into a kernel
and a bias; `load` folds them and reads the weights, which are the user's.

Blocks and branches have the names of the public PyTorch port (`pt_inception-2015-12-05`).
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rear_jax.weights.folded import FoldedConvs
from rear_jax.weights.layout import CONV, LINEAR, Path, TorchName, from_torch
from rear_jax.weights.shards import open_weights
from rear_jax.weights.views import View

SIZE = 299  # pixels, both sides, that the network sees
POOLED = 2048  # width of the features of FID
SPATIAL = 17 * 17 * 7  # ... and of sFID
CLASSES = 1008
LARGE = 70  # pixels along each side of an image that one core's cache does not hold


class Outputs(NamedTuple):
    """What the network says about B images, all float32; the first three are averaged over space.

    `spatial` is what the evaluator of ADM (guided-diffusion, evaluations/evaluator.py) takes for sFID: the first seven
    channels of the graph's tensor `mixed_6/conv:0`. The graph counts its blocks `mixed`, `mixed_1` … `mixed_10`, which
    are 5b, 5c, 5d, 6a … 6e, 7a, 7b, 7c here, so `mixed_6` is 6d; a convolution's scope is named after its last node,
    the ReLU, and `conv` without a `tower` before it is the block's 1×1 branch. (`mixed_7` would be 6e.)

    Attributes:
      first: [B, 64], after the first max pool.
      second: [B, 192], after the second.
      middle: [B, 768], of the last block at 17 × 17.
      pooled: [B, 2048], of the last block: the features of FID, KID, precision and recall.
      spatial: [B, 2023], [17, 17, 7] laid out row by row: the features of sFID.
      logits: [B, 1008], without the bias, as the Inception Score takes them.
    """

    first: jax.Array
    second: jax.Array
    middle: jax.Array
    pooled: jax.Array
    spatial: jax.Array
    logits: jax.Array


def resize(images: jax.Array, size: int = SIZE) -> jax.Array:
    """TensorFlow 1's bilinear resize: align_corners=False, no half-pixel centres, no antialiasing.

    Output pixel i looks at the place i · n / size of n pixels; beyond the last one that one is repeated.

    It maps [B, H, W, C] of any dtype to [B, size, size, C] float32, unchanged where the size is right already.
    """
    return _resize_axis(_resize_axis(images.astype(jnp.float32), 2, size), 1, size)


def _resize_axis(images: jax.Array, axis: int, size: int) -> jax.Array:
    length = images.shape[axis]
    if length == size:
        return images
    place = np.arange(size, dtype=np.float32) * (np.float32(length) / np.float32(size))
    lower = np.floor(place).astype(np.int32)
    share = np.expand_dims(place - lower, [i for i in range(images.ndim) if i != axis])
    below = jnp.take(images, lower, axis=axis)
    above = jnp.take(images, np.minimum(lower + 1, length - 1), axis=axis)
    return below + (above - below) * share


def convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: str, **settings: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`, written as matrix products where XLA's own on a CPU is slower.

    That is for kernels of 1 × 1, strides, and images of more than `LARGE` pixels: 50 to 190 GFLOP/s became 80 to 220,
    see benchmarks/RESULTS.md. The columns under a kernel's row are laid side by side; its rows are then slices of that.

    Args:
      x: [B, H, W, C].
      kernel: [h, w, C, F].
      strides: the same in both directions.
      padding: "SAME", for odd kernels without stride, or "VALID".
      settings: what else `nn.Conv` gives.

    Returns:
      [B, H', W', F].
    """
    (height, width), (stride, _) = kernel.shape[:2], strides
    products = height * width == 1 or stride > 1 or x.shape[1] > LARGE
    if jax.default_backend() != "cpu" or not products:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **settings)
    if padding == "SAME":
        x = jnp.pad(x, ((0, 0), (height // 2, height // 2), (width // 2, width // 2), (0, 0)))
    rows, columns = ((size - window) // stride + 1 for size, window in zip(x.shape[1:3], (height, width), strict=True))
    last_row, last_column = (rows - 1) * stride + 1, (columns - 1) * stride + 1
    beside = jnp.concatenate([x[:, :, j : j + last_column : stride] for j in range(width)], axis=-1)  # [B, H, W', w C]
    products = [
        jnp.einsum("bijc,cf->bijf", beside[:, i : i + last_row : stride], row, precision=settings["precision"])
        for i, row in enumerate(kernel.reshape(height, -1, kernel.shape[-1]))  # [w C, F]
    ]
    return sum(products)


class Conv(nn.Module):
    """A convolution with bias and ReLU at full float32 precision: "SAME", or "VALID" with a stride."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.stride, self.stride)
        convolution = nn.Conv(
            self.features,
            self.kernel,
            strides,
            self.padding,
            precision=jax.lax.Precision.HIGHEST,
            conv_general_dilated=convolve,
            name="conv",
        )
        return nn.relu(convolution(x))


class Block(nn.Module):
    """What the blocks share: convolutions by the name of their branch, and pools."""

    def chain(self, x: jax.Array, branch: str, *layers: tuple[int, tuple[int, int]]) -> jax.Array:
        """Convolutions (features, kernel) in a row, named `<branch>_1`, `<branch>_2` …"""
        for index, (features, kernel) in enumerate(layers, start=1):
            x = Conv(features, kernel, name=f"{branch}_{index}")(x)
        return x


class BlockA(Block):
    """35 × 35: 1×1, 5×5, two 3×3, and an average pool with `pool` channels."""

    pool: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        branches = [
            Conv(64, name="branch1x1")(x),
            self.chain(x, "branch5x5", (48, (1, 1)), (64, (5, 5))),
            self.chain(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
            Conv(self.pool, name="branch_pool")(average_pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockB(Block):
    """35 × 35 to 17 × 17."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        double = self.chain(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)))
        branches = [
            Conv(384, (3, 3), 2, "VALID", name="branch3x3")(x),
            Conv(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(double),
            halving_pool(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockC(Block):
    """17 × 17: 1×1, 7×7 as 1×7 and 7×1 through `inner` channels, twice that, and an average pool."""

    inner: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        row, column, inner = (1, 7), (7, 1), self.inner
        branches = [
            Conv(192, name="branch1x1")(x),
            self.chain(x, "branch7x7", (inner, (1, 1)), (inner, row), (192, column)),
            self.chain(x, "branch7x7dbl", (inner, (1, 1)), (inner, column), (inner, row), (inner, column), (192, row)),
            Conv(192, name="branch_pool")(average_pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockD(Block):
    """17 × 17 to 8 × 8."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        single = self.chain(x, "branch3x3", (192, (1, 1)))
        seven = self.chain(x, "branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)))
        branches = [
            Conv(320, (3, 3), 2, "VALID", name="branch3x3_2")(single),
            Conv(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(seven),
            halving_pool(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockE(Block):
    """8 × 8: 1×1, a 3×3 split into 1×3 beside 3×1, a second one deeper, and a pool: average, or max where `last`."""

    last: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        single = Conv(384, name="branch3x3_1")(x)
        double = self.chain(x, "branch3x3dbl", (448, (1, 1)), (384, (3, 3)))
        pooled = nn.max_pool(x, (3, 3), padding="SAME") if self.last else average_pool(x)
        branches = [
            Conv(320, name="branch1x1")(x),
            Conv(384, (1, 3), name="branch3x3_2a")(single),
            Conv(384, (3, 1), name="branch3x3_2b")(single),
            Conv(384, (1, 3), name="branch3x3dbl_3a")(double),
            Conv(384, (3, 1), name="branch3x3dbl_3b")(double),
            Conv(192, name="branch_pool")(pooled),
        ]
        return jnp.concatenate(branches, axis=-1)


def average_pool(x: jax.Array) -> jax.Array:
    """3 × 3 means over the pixels that there are."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def halving_pool(x: jax.Array) -> jax.Array:
    """3 × 3 maxima at every second pixel."""
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")


class InceptionV3(nn.Module):
    """The network from resized images to `Outputs`."""

    @nn.compact
    def __call__(self, images: jax.Array) -> Outputs:
        """Maps images [B, 299, 299, 3], float in [0, 255], as `resize` gives them, to `Outputs`."""
        first, second = self.stem(images)
        x = second
        for name, pool in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = BlockA(pool, name=f"Mixed_{name}")(x)
        x = BlockB(name="Mixed_6a")(x)
        for name, inner in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = BlockC(inner, name=f"Mixed_{name}")(x)
            if name == "6d":
                spatial = x[..., :7]  # a block's output begins with its 1×1 branch
        middle = x
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(last=False, name="Mixed_7b")(x)
        x = BlockE(last=True, name="Mixed_7c")(x)
        pooled = x.mean(axis=(1, 2))
        logits = nn.Dense(CLASSES, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc")(pooled)
        return Outputs(
            first=first,
            second=second.mean(axis=(1, 2)),
            middle=middle.mean(axis=(1, 2)),
            pooled=pooled,
            spatial=spatial.reshape(len(spatial), -1),
            logits=logits,
        )

    def stem(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Up to the second max pool: [B, 64], means after the first one, and [B, 35, 35, 192].

        A CPU takes one image after the other, so that what is between two layers stays in its cache.
        """

        def layers(self, _, images):
            x = (images - 128.0) / 128.0
            x = Conv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
            x = Conv(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
            x = Conv(64, (3, 3), name="Conv2d_2b_3x3")(x)
            x = halving_pool(x)
            first = x.mean(axis=(1, 2))
            x = Conv(80, name="Conv2d_3b_1x1")(x)
            x = Conv(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
            return None, (first, halving_pool(x))

        if jax.default_backend() != "cpu":
            return layers(self, None, images)[1]
        one_by_one = nn.scan(layers, variable_broadcast="params", split_rngs={"params": False})
        _, (first, second) = one_by_one(self, None, images[:, None])
        return first[:, 0], second[:, 0]


BATCH_NORM_EPSILON = 1e-3
UNUSED = ("fc.bias",)  # the Inception Score is taken of logits without it
COUNTER = ".bn.num_batches_tracked"  # that PyTorch writes beside each BatchNorm since version 0.4.1


def load(path: str) -> Any:
    """The parameters of `InceptionV3`, float32 numpy, from its published file or any state dict with the same keys.

    Raises RearError: the file is missing, damaged or of another network.
    """
    return params_from(open_weights(path), source=path)


def params_from(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> Any:
    """The parameters of `InceptionV3`, BatchNorm folded in.

    Raises RearError: a tensor is missing, unexpected or of another shape, or not finite.
    """
    folded = fold_batch_norm(tensors, source=source)
    return from_torch(folded, parameter_shapes(), torch_name, ignore=UNUSED, source=source)


@functools.cache
def parameter_shapes() -> Any:
    """Of `InceptionV3`."""
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return jax.eval_shape(InceptionV3().init, jax.random.key(0), images)["params"]


def torch_name(path: Path) -> TorchName:
    """Where the parameter at `path` lies in a folded state dict: the modules have the port's names."""
    *modules, leaf = path
    where = ".".join(modules)
    if leaf == "bias":
        return TorchName(f"{where}.bias")
    return TorchName(f"{where}.weight", LINEAR if where == "fc" else CONV)


def fold_batch_norm(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> FoldedConvs:
    """Turns each pair `X.conv`, `X.bn` into a convolution `X.conv` with bias; what is in no such pair is passed on.

    Raises RearError: a BatchNorm lacks a tensor, or one of its tensors has another length.
    """
    layers = [key.removesuffix(".conv.weight") for key in tensors if key.endswith(".conv.weight")]
    norms = {f"{layer}.conv": f"{layer}.bn" for layer in layers}
    used = {key: key for key in tensors if not key.endswith(COUNTER)}
    return FoldedConvs(View(tensors, "", used), norms, BATCH_NORM_EPSILON, source)
