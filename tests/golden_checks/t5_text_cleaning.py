"""Captions as LlamaGen's code cleans them."""

from collections.abc import Mapping

import numpy as np

from rear_jax.text.cleaning import clean, clean_once


def check(golden: Mapping[str, np.ndarray]) -> None:
    """Raises AssertionError where a cleaned caption is not the golden's."""
    texts = [str(text) for text in golden["in/texts"]]
    assert [clean_once(text) for text in texts] == golden["out/cleaned_once"].tolist()
    assert [clean(text) for text in texts] == golden["out/cleaned"].tolist()
