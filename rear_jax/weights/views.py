"""The part of a checkpoint that is one network's, where a file holds several or names their tensors in another way."""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from rear_jax.errors import RearError
from rear_jax.weights import layout
from rear_jax.weights.layout import Layout, OpenTensors


class View(OpenTensors):
    """Tensors of an open checkpoint under the keys that a network's layout has for them, read at each look-up.

    Attributes:
      prefix: of their keys in the checkpoint.
      names: key of the layout -> key in the checkpoint.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], prefix: str, names: Mapping[str, str]):
        """Gives the tensors that `names` lists."""
        self.prefix, self.names, self._tensors = prefix, names, tensors

    def __getitem__(self, key: str) -> np.ndarray:
        return self._tensors[self.names[key]]

    def outline(self) -> dict[str, np.ndarray]:
        shapes = layout.outline(self._tensors)
        return {key: shapes[name] for key, name in self.names.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def view(tensors: Mapping[str, np.ndarray], of: Layout, source: str = "the state dict") -> View | None:
    """The tensors of a network as its layout calls them; None where the checkpoint does not hold it.

    They are all tensors of a checkpoint that has the keys of the layout, and else those under a prefix of
    `Layout.within`.

    Raises RearError: two tensors of the checkpoint have one name in the layout.
    """
    for prefix, own_key in {"": str, **of.within}.items():
        found = [(own_key(key) or key, key) for key in tensors if key.startswith(prefix)]
        if any(re.fullmatch(of.signature, name) for name, _ in found):
            names = dict(found)
            if twice := [name for name, key in found if names[name] != key]:
                raise RearError(f"{source} holds {twice[0]} under two names: it is damaged, fetch it again.")
            return View(tensors, prefix, names)
    return None
