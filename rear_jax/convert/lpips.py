"""The two published files of LPIPS-VGG: torchvision's VGG16 and the heads of the package `lpips`.

VGG16 is `vgg16-397923af.pth` or any state dict with its keys, of which the classifier is not needed. The heads are
`lpips/weights/v0.1/vgg.pth` of the package, or the state dict of a whole `lpips.LPIPS(net="vgg")`.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rear_jax.convert.layout import CONV, Path, TorchName, from_torch
from rear_jax.convert.torch_files import read_tensors
from rear_jax.errors import RearError
from rear_jax.metrics.lpips import LPIPS, SMALLEST, STAGES


def load(vgg16: str, heads: str) -> Any:
    """The parameters of `LPIPS` from its two files.

    Args:
      vgg16: path of torchvision's VGG16.
      heads: path of the heads.

    Returns:
      float32 numpy.

    Raises:
      RearError: a file is missing, damaged or of another network, or a head has a negative weight.
    """
    tensors = {key: value for key, value in read_tensors(vgg16).items() if key.startswith("features.")}
    tensors |= head_tensors(read_tensors(heads), source=heads)
    return params_from(tensors, source=f"{vgg16} with {heads}")


def params_from(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> Any:
    """The parameters of `LPIPS` from `features.*` of VGG16 and `lin*.model.1.weight` in one state dict.

    Raises:
      RearError: a tensor is missing, unexpected or of another shape.
    """
    images = jnp.zeros((1, SMALLEST, SMALLEST, 3))
    shapes = jax.eval_shape(LPIPS().init, jax.random.key(0), images, images)["params"]
    return from_torch(tensors, shapes, torch_name, source=source)


def head_tensors(tensors: Mapping[str, np.ndarray], *, source: str) -> dict[str, np.ndarray]:
    """The heads under their short names, `lin0.model.1.weight` to `lin4.model.1.weight`, whatever else is there.

    Raises:
      RearError: some are missing, or a weight is negative or not a number.
    """
    found = {}
    for stage in range(len(STAGES)):
        key = f"lin{stage}.model.1.weight"
        value = tensors.get(key, tensors.get(f"lins.{stage}.model.1.weight"))
        if value is None:
            raise RearError(f"{source} has no tensor {key}: give the heads of LPIPS-VGG, the lpips package's vgg.pth.")
        if not (value >= 0).all():
            raise RearError(f"{source}: {key} has negative weights, an LPIPS head has none; fetch the file again.")
        found[key] = value
    return found


def torch_name(path: Path) -> TorchName:
    """Where the parameter at `path` of `LPIPS` lies in the files.

    torchvision numbers convolutions, ReLUs and pools in one row: stage 2's second convolution is `features.12`.
    """
    module, leaf = path
    if head := re.fullmatch(r"head(\d)", module):
        return TorchName(f"lin{head[1]}.model.1.weight", CONV)
    stage, layer = map(int, re.fullmatch(r"stage(\d)_conv(\d)", module).groups())
    before = sum(2 * len(widths) + 1 for widths in STAGES[:stage])
    place = f"features.{before + 2 * layer}"
    return TorchName(f"{place}.weight", CONV) if leaf == "kernel" else TorchName(f"{place}.bias")
