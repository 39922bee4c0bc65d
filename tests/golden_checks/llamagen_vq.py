"""LlamaGen's tokenizer against the authors' network: latents, codes and images, weights through the converter."""

import json

from rear_jax.tokenizers.llamagen_vq import FAMILY, LlamaGenVQ
from tests.golden_checks import _tokenizers


def check(golden) -> None:
    """Raises AssertionError where this project's numbers are not the golden's."""
    meta = json.loads(str(golden["meta"]))
    found = FAMILY.layout.sizes(_tokenizers.tensors_of(golden))
    assert found == {
        "channels": meta["channels"],
        "channel_mult": tuple(meta["channel_mult"]),
        "num_res_blocks": meta["num_res_blocks"],
        "z_channels": meta["z_channels"],
        "codebook_size": meta["codebook_size"],
        "codebook_dim": meta["codebook_dim"],
    }
    image_size = golden["in/images"].shape[1]
    tokenizer = LlamaGenVQ(image_size=image_size, l2_normalize=meta["l2_normalised"], **found)
    _tokenizers.compare(tokenizer, FAMILY.layout, golden, symmetric=meta["image_range"] == [-1, 1])
