"""CLIP with x·sigmoid(1.702x), in Hugging Face's layout."""

from collections.abc import Mapping

import numpy as np

from rear_jax.metrics.clip_files import HUGGING_FACE
from tests.golden_checks import _clip


def check(golden: Mapping[str, np.ndarray]) -> None:
    """Raises AssertionError where this project's numbers are not the golden's."""
    _clip.check(golden, HUGGING_FACE, "quick_gelu")
