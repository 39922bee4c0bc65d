"""AliTok's tokenizer against the authors' network: latents, codes and images, weights through the converter."""

import json

from rear_jax.tokenizers.alitok import FAMILY, AliTok
from tests.golden_checks import _tokenizers


def check(golden) -> None:
    """Raises AssertionError where this project's numbers are not the golden's."""
    meta = json.loads(str(golden["meta"]))
    found = FAMILY.layout.sizes(_tokenizers.tensors_of(golden))
    assert found == {
        "patch_size": meta["patch"],
        "prefix_tokens": meta["prefix_tokens"],
        "buffer_tokens": meta["decoder"]["class_tokens"],
        "encoder_width": meta["encoder"]["width"],
        "encoder_depth": meta["encoder"]["layers"],
        "decoder_width": meta["decoder"]["width"],
        "decoder_depth": meta["decoder"]["layers"],
        "codebook_size": meta["codebook_size"],
        "codebook_dim": meta["token_size"],
    }
    tokenizer = AliTok(
        image_size=meta["image"],
        encoder_heads=meta["encoder"]["heads"],
        decoder_heads=meta["decoder"]["heads"],
        causal_decoder=False,
        **found,
    )
    _tokenizers.compare(tokenizer, FAMILY.layout, golden, symmetric=False)
