"""TiTok against the authors' network: latents, codes, logits over the proxy's codes, images, weights both ways.

The networks that make pixels themselves (`*_pixels`) give these as their logits, and their file may carry a proxy.
"""

import json

import jax
import numpy as np

from rear_jax.tokenizers.titok import FAMILY, TiTok
from tests.golden_checks import _tokenizers

SIZES = {"width": "width", "depth": "layers"}  # of either transformer: their name here, and in the golden
PROXY = {  # what the golden calls it -> what the tokenizer does
    "codebook_size": "proxy_codebook_size",
    "z_channels": "proxy_dim",
    "hidden_channels": "proxy_channels",
    "channel_mult": "proxy_channel_mult",
    "num_res_blocks": "proxy_res_blocks",
}


def check(golden) -> None:
    """Raises AssertionError where this project's numbers are not the golden's."""
    meta = json.loads(str(golden["meta"]))
    tensors = _tokenizers.tensors_of(golden)
    found = FAMILY.layout.sizes(tensors)
    wanted = {
        "patch_size": meta["patch"],
        "num_latent_tokens": meta["num_latent_tokens"],
        "codebook_size": meta["codebook_size"],
        "codebook_dim": meta["token_size"],
        "predicts": "codes" if "decoder.ffn.2.weight" in tensors else "pixels",
        "legacy_reshape": meta["is_legacy"],
    } | {f"{part}_{size}": meta[key] for part in ("encoder", "decoder") for size, key in SIZES.items()}
    proxy = {name: meta["pixel_decoder"][key] for key, name in PROXY.items()}
    proxy["proxy_channel_mult"] = tuple(proxy["proxy_channel_mult"])
    assert found == (wanted | proxy if wanted["predicts"] == "codes" else wanted)
    heads = {"encoder_heads": meta["heads"], "decoder_heads": meta["heads"]}
    tokenizer = TiTok(image_size=meta["image"], l2_normalize=True, **heads, **proxy | found)
    params = _tokenizers.compare(tokenizer, FAMILY.layout, golden, symmetric=False)
    tokenizer = tokenizer.clone(precision="highest")

    @jax.jit
    def logits(codes):
        vectors = tokenizer.apply({"params": params}, codes, method="embed")
        return tokenizer.apply({"params": params}, vectors, method="pixel_logits")

    np.testing.assert_allclose(logits(golden["out/tokens"]), golden["out/pixel_logits"], rtol=0, atol=2e-4)
