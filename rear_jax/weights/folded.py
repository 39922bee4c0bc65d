"""Networks that are only ever used frozen: each BatchNorm becomes part of the convolution before it."""

from collections.abc import Iterator, Mapping

import numpy as np

from rear_jax.errors import RearError
from rear_jax.weights.layout import BATCH_NORM, OpenTensors, is_float, outline, require_finite, stand_in


class FoldedConvs(OpenTensors):
    """A state dict in which convolutions and the BatchNorms after them are convolutions with bias, folded on look-up.

    With BatchNorm y = γ·(x − μ)/√(σ² + ε) + β, the folded weight is w·γ/√(σ² + ε) and the bias β − μ·γ/√(σ² + ε),
    computed in float64 and rounded to float32.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], norms: Mapping[str, str], epsilon: float, source: str):
        """Folds the pairs of `norms`, convolution -> norm (names of layers), and passes on all other tensors.

        Raises RearError: tensors of such a layer are missing, of other shapes or no floats.
        """
        self._tensors, self._norms, self._epsilon, self._source = tensors, norms, epsilon, source
        shapes, inner = outline(tensors), set()
        for conv, norm in norms.items():
            wanted = [f"{conv}.weight", *(f"{norm}.{part}" for part in BATCH_NORM)]
            rows = shapes[wanted[0]].shape[:1] if wanted[0] in shapes else ()
            if not rows:
                raise RearError(f"{source} is of another network: no convolution {wanted[0]}; fetch the right file.")
            if wrong := [key for key in wanted[1:] if key not in shapes or shapes[key].shape != rows]:
                raise RearError(
                    f"{source} is of another network: no {wrong[0]} of {rows[0]} values; fetch the right file."
                )
            if wrong := [key for key in wanted if not is_float(shapes[key].dtype)]:
                raise RearError(f"{source}: {wrong[0]} has no floats but {shapes[wrong[0]].dtype}; fetch it again.")
            inner.update(wanted[1:])
        self._outline = {key: tensor for key, tensor in shapes.items() if key not in inner}
        for conv, norm in norms.items():
            self._outline[f"{conv}.weight"] = stand_in(shapes[f"{conv}.weight"].shape)
            self._outline[f"{conv}.bias"] = stand_in(shapes[f"{norm}.bias"].shape)

    def __getitem__(self, key: str) -> np.ndarray:
        layer, _, leaf = key.rpartition(".")
        if layer not in self._norms:
            return self._tensors[key]
        gain, shift, mean, variance = (self._read(f"{self._norms[layer]}.{part}") for part in BATCH_NORM)
        if (variance < 0).any():
            raise RearError(f"{self._source}: {self._norms[layer]}.running_var is negative; fetch the file again.")
        scale = gain / np.sqrt(variance + self._epsilon)
        if leaf == "bias":
            return (shift - mean * scale).astype(np.float32)
        weight = self._read(key)
        return (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)

    def _read(self, key: str) -> np.ndarray:
        value = self._tensors[key].astype(np.float64)
        require_finite(value, key, self._source)
        return value

    def outline(self) -> dict[str, np.ndarray]:
        return self._outline

    def __iter__(self) -> Iterator[str]:
        return iter(self._outline)

    def __len__(self) -> int:
        return len(self._outline)
