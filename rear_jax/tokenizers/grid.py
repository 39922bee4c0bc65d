"""What tokenizers of the VQGAN family have in common: a square grid of codes, and files with parallel names."""

import re
from collections.abc import Mapping

import numpy as np

from rear_jax.errors import RearError
from rear_jax.tokenizers.base import CodebookTokenizer
from rear_jax.weights.layout import CONV, Path, TorchName


class GridTokenizer(CodebookTokenizer):
    """A `CodebookTokenizer` with the attribute `channel_mult`, one entry for each resolution.

    Raises RearError: the image size cannot be halved as often as the levels ask.
    """

    def __post_init__(self) -> None:
        factor = 2 ** (len(self.channel_mult) - 1)
        if self.image_size % factor:
            raise RearError(
                f"data.image_size {self.image_size} is not a multiple of {factor}: "
                f"change it, or give tokenizer.channel_mult another number of levels than {len(self.channel_mult)}"
            )
        super().__post_init__()

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Rows and columns."""
        side = self.image_size // 2 ** (len(self.channel_mult) - 1)
        return side, side


def torch_name(path: Path) -> TorchName:
    """Where a tokenizer's parameter lies in a file that names every module as the tokenizer does, `m.0` for `m_0`."""
    if path == ("codebook",):
        return TorchName("quantize.embedding.weight")
    *modules, leaf = path
    prefix = ".".join(re.sub(r"_(\d+)$", r".\1", module) for module in modules)
    return {
        "kernel": TorchName(f"{prefix}.weight", CONV),
        "scale": TorchName(f"{prefix}.weight"),
        "bias": TorchName(f"{prefix}.bias"),
    }[leaf]


def numbered(tensors: Mapping[str, np.ndarray], template: str) -> list[np.ndarray]:
    """The tensors whose keys are the template with 0, 1, 2, ... for its `{}`, as far as they go.

    Raises:
      KeyError: there is not even the first.
    """
    found = [tensors[template.format(0)]]
    while (key := template.format(len(found))) in tensors:
        found.append(tensors[key])
    return found
