"""CLIP with the exact GELU, in open_clip's layout."""

from collections.abc import Mapping

import numpy as np

from rear_jax.metrics.clip_files import OPEN_CLIP
from tests.golden_checks import _clip


def check(golden: Mapping[str, np.ndarray]) -> None:
    """Raises AssertionError where this project's numbers are not the golden's."""
    _clip.check(golden, OPEN_CLIP, "gelu")
