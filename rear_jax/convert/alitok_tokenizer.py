"""AliTok's published tokenizer: a PyTorch state dict (`AliTok.pth`; arXiv 2506.05289)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rear_jax.convert import vit, vqgan
from rear_jax.convert.layout import Path, TorchName

SIGNATURE = r"decoder\.transformer\.0\.attn\.in_proj\.weight"
IGNORE = ()


def torch_name(path: Path) -> TorchName:
    """Where the parameter at `path` of `AliTok` lies in the file."""
    return vit.torch_name(path)


def sizes(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> dict[str, Any]:
    """The attributes of `AliTok` that a file determines: all but image_size, heads, masks, l2_normalize and dtype.

    Raises:
      RearError: the file is not a state dict of this tokenizer.
    """
    try:
        patches, tokens = (len(tensors[k]) for k in ("encoder.positional_embedding", "latent_tokens"))
        found = vit.sizes(tensors)
        positions = len(tensors["decoder.latent_token_positional_embedding"])
    except KeyError as missing:
        raise vqgan.foreign_file(source, missing, "AliTok tokenizer") from missing
    return found | {"prefix_tokens": tokens - patches, "buffer_tokens": positions - tokens}
