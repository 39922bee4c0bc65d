"""Captions of Fashion-MNIST say what the pixels show."""

import numpy as np
import pytest

from rear_jax.data import fashion_mnist
from rear_jax.data.fashion_captions import TEMPLATES, Claim, caption_of, claim_of, claims, measures
from rear_jax.errors import RearError


def test_measures_of_a_drawn_garment():
    image = np.zeros((2, 8, 8), np.uint8)
    image[0, 2:6, 1:4] = 100  # four rows of three pixels
    image[0, 2, 1:4] = 200
    image[0, 0, 0] = 20  # background
    np.testing.assert_allclose(measures(image), [[125, 3], [0, 0]])


@pytest.mark.parametrize("split", ["train", "test"])
def test_half_of_each_kind_is_bright_and_half_is_wide(split):
    images, labels = fashion_mnist.load_embedded(split)
    found = np.array(claims(images, labels.astype(int)))
    np.testing.assert_array_equal(found[:, 0], labels)
    for label in range(10):
        shares = found[labels == label, 1:].mean(axis=0)
        assert (np.abs(shares - 0.5) < (0.01 if split == "train" else 0.15)).all()


def test_a_margin_changes_nothing():
    images, labels = fashion_mnist.load_embedded("test")
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    assert claims(padded, labels.astype(int)) == claims(images, labels.astype(int))


def test_captions_say_what_they_are_made_from():
    every = [Claim(garment, bright, wide) for garment in range(10) for bright in (0, 1) for wide in (0, 1)]
    for claim in every:
        captions = {caption_of(claim, number) for number in range(12)}
        assert len(captions) == len(TEMPLATES)
        assert {claim_of(caption) for caption in captions} == {claim}


def test_a_person_may_write_one():
    assert claim_of("Give me a WIDE, bright T-shirt!") == Claim(0, True, True)
    for caption in ("a dress", "a dark and bright wide dress", "a dark wide hat", ""):
        with pytest.raises(RearError, match="does not say which one it means of"):
            claim_of(caption)
