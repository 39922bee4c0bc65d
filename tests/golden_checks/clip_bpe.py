"""CLIP's byte-level BPE on a small list of merges: repair, words, pieces, cut and padding."""

import json
from collections.abc import Mapping

import numpy as np

from rear_jax.text.clip_vocabulary import CLIPVocabulary, ids_of


def check(golden: Mapping[str, np.ndarray]) -> None:
    """Raises AssertionError where this project's ids are not the golden's."""
    meta = json.loads(str(golden["meta"]))
    merges = [tuple(merge.split(" ")) for merge in golden["in/merges"].tolist()]
    vocabulary = CLIPVocabulary(ids_of(merges), merges, source="the golden", context_length=meta["context_length"])
    assert (vocabulary.size, vocabulary.start, vocabulary.end) == (
        meta["vocab_size"],
        meta["start_id"],
        meta["end_id"],
    )
    np.testing.assert_array_equal(vocabulary.encode(golden["in/texts"].tolist()), golden["out/ids"])
