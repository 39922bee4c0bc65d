"""Images through the tokenizer, and what they lose on the way."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax import tokenizers
from rear_jax.artifacts import Tokenizer
from rear_jax.evaluation.reference import RealImages, ReferencePlan, plan_of
from rear_jax.metrics import scores
from rear_jax.metrics.features import FeatureExtractor, Network
from rear_jax.metrics.perceptual import PerceptualNetwork
from rear_jax.metrics.similarity import psnr, ssim
from rear_jax.metrics.statistics import frechet_distance
from rear_jax.runtime import local_devices
from rear_jax.tokenizers import quantizer


class ReconstructedImages(RealImages):
    """A number of images of a split after the tokenizer, as a set to compare with."""

    def __init__(self, data: ConfigDict, split: str, wanted: int, tokenizer: Tokenizer):
        super().__init__(data, split, wanted)
        self._tokenizer = tokenizer
        self.name += f", after the tokenizer {tokenizer.fingerprint}"

    def batches(self, batch_size: int, labels: list[np.ndarray]) -> Iterator[np.ndarray]:
        """As those of the images themselves."""
        return Reconstructions(self._tokenizer, None).over(super().batches(batch_size, labels))

    def fingerprint(self) -> str:
        """Names the set by its images and by what has decoded them."""
        return f"{super().fingerprint()} {self._tokenizer.fingerprint} {self._tokenizer.decoder_fingerprint}"


def plan(config: ConfigDict, tokenizer: Tokenizer, network: Network) -> ReferencePlan:
    """To compare samples with held-out images after the tokenizer: `config.evaluate.reconstructed_reference`."""
    images = ReconstructedImages(config.data, config.data.eval_split, config.evaluate.num_reference, tokenizer)
    return plan_of(images, network, config.evaluate)


def distance(
    reconstructed: scores.Reference, generated: scores.Described, extractor: FeatureExtractor
) -> dict[str, float]:
    """The Fréchet distance of samples from such a reference, under its name."""
    found = frechet_distance(scores.moments(generated.pooled), reconstructed.moments)
    return {f"{scores.distance_name(extractor)} from reconstructions": found}


class Reconstructions:
    """Images through the tokenizer, with what they lose on the way."""

    def __init__(self, tokenizer: Tokenizer, network: PerceptualNetwork | None):
        """Takes the tokenizer, and LPIPS where its files are given."""
        self._tokenizer, self._network = tokenizer, network
        self._to_8_bit = tokenizers.family_of(tokenizer.module).to_8_bit
        self._params = local_devices.copied((tokenizer.params, network.params if network else {}))
        self._codes: list[np.ndarray] = []
        self._differences: list[dict[str, np.ndarray]] = []

    def over(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """uint8 images [b, S, S, 3] -> the same through the codes, as 8 bits; no batch is larger than the first."""
        reconstruct, differ = jax.jit(self._reconstruct), jax.jit(self._differ)
        tokenizer, lpips = self._params

        def through(images: jax.Array) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
            codes, decoded = reconstruct(tokenizer, images)
            return codes, decoded, differ(lpips, images, decoded)

        for codes, decoded, differences in local_devices.stream(through, batches):
            self._codes.append(codes)
            self._differences.append(differences)
            yield decoded

    def scores(self) -> dict[str, float]:
        """Means over the images that have passed: PSNR (dB), SSIM and LPIPS, then how the codebook was used."""
        names = self._differences[0]
        means = {name: float(np.concatenate([d[name] for d in self._differences]).mean()) for name in names}
        codes, size = np.concatenate(self._codes), self._tokenizer.module.codebook_size
        return means | {
            "codebook_usage": float(quantizer.codebook_usage(codes, size)),
            "codebook_perplexity": float(quantizer.perplexity(codes, size)),
        }

    def _reconstruct(self, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        apply = self._tokenizer.module.apply
        codes = apply({"params": params}, images.astype(jnp.float32) / 255.0, method="encode")
        return codes, self._to_8_bit(apply({"params": params}, codes, method="decode"))

    def _differ(self, params: Any, before: jax.Array, after: jax.Array) -> dict[str, jax.Array]:
        pair = [images.astype(jnp.float32) / 255.0 for images in (before, after)]
        found = {"PSNR": psnr(*pair), "SSIM": ssim(*pair)}
        return found | ({"LPIPS": self._network.distance(params, *pair)} if self._network else {})
