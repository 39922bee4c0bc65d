"""VQGAN+ against the authors' network: latents, codes and decoded images, weights through the converter."""

import json

from rear_jax.tokenizers.vqgan_plus import FAMILY, VQGANPlus
from tests.golden_checks import _tokenizers


def check(golden) -> None:
    """Raises AssertionError where this project's numbers are not the golden's."""
    meta = json.loads(str(golden["meta"]))
    found = FAMILY.layout.sizes(_tokenizers.tensors_of(golden))
    assert found == {
        "hidden_channels": meta["hidden_channels"],
        "channel_mult": tuple(meta["channel_mult"]),
        "num_res_blocks": meta["num_res_blocks"],
        "z_channels": meta["token_size"],
        "codebook_size": meta["codebook_size"],
    }
    tokenizer = VQGANPlus(image_size=meta["resolution"], **found)
    _tokenizers.compare(tokenizer, FAMILY.layout, golden, symmetric=False)
