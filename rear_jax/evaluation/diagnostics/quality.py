"""How images differ from their originals: one by one, and as sets."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax.metrics import perceptual, scores
from rear_jax.metrics.features import Network, load_network
from rear_jax.metrics.similarity import psnr, ssim
from rear_jax.metrics.statistics import frechet_distance_of
from rear_jax.runtime import local_devices
from rear_jax.runtime.identity import fingerprint
from rear_jax.runtime.progress import ProgressBar

VARIANT = "lite2"  # of the EfficientNet-Lite that takes the place of LPIPS where its files are not given


class Quality:
    """PSNR, SSIM, a perceptual distance, and the Fréchet distance on the features of `config.evaluate.network`."""

    def __init__(self, config: ConfigDict):
        """Loads the networks; raises RearError where their weights are not there."""
        self._batch_size = config.analyze.batch_size
        self._network: Network = load_network(config.evaluate)
        self._name, self._perceptual = perceptual.for_scores(config.lpips, VARIANT)
        self._params = local_devices.copied(self._perceptual.params)
        self._compare = jax.jit(self._differences)
        self._originals: tuple[np.ndarray, np.ndarray] | None = None  # images of the last call, and their features

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the scores: higher is better of the first two, lower of the others."""
        return "PSNR", "SSIM", self._name, scores.distance_name(self._network.extractor)

    @property
    def recipe(self) -> dict[str, str]:
        """What the scores depend on beside the images."""
        return {
            "images": "8 bits; PSNR (dB), SSIM (11x11 Gaussian window, 1.5) and distance: means over images",
            self._name: f"weights {fingerprint(self._perceptual.params, {})}",
            self.columns[-1]: f"{self._network.extractor.recipe}; weights {self._network.weights}; to the originals",
        }

    def of(self, name: str, originals: np.ndarray, images: np.ndarray) -> dict[str, float]:
        """The scores of uint8 images [n, S, S, 3] beside their originals, whose features are kept for the next call."""
        if self._originals is None or self._originals[0] is not originals:
            self._originals = originals, self._features(f"{name}: originals", originals)
        pairs = zip(self._cut(originals), self._cut(images), strict=True)
        found = list(local_devices.stream(lambda pair: self._compare(self._params, *pair), pairs))
        means = {key: float(np.concatenate([one[key] for one in found]).mean()) for key in found[0]}
        distance = frechet_distance_of(self._features(name, images), self._originals[1])
        return means | {self.columns[-1]: distance}

    def _features(self, name: str, images: np.ndarray) -> np.ndarray:
        with ProgressBar(f"analyze {name}, features", total=len(images), unit="image") as bar:
            return scores.describe(self._network.extractor, bar.over(self._cut(images))).pooled

    def _cut(self, images: np.ndarray) -> Iterator[np.ndarray]:
        """In batches."""
        return (images[start : start + self._batch_size] for start in range(0, len(images), self._batch_size))

    def _differences(self, params: dict, before: jax.Array, after: jax.Array) -> dict[str, jax.Array]:
        pair = [images.astype(jnp.float32) / 255.0 for images in (before, after)]
        return {"PSNR": psnr(*pair), "SSIM": ssim(*pair), self._name: self._perceptual.distance(params, *pair)}
