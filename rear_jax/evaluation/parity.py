"""What a converted network does on real data, in one table, to be held against what its authors publish."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rear_jax import losses
from rear_jax.tokenizers import quantizer

Row = tuple[str, str, str]  # quantity, measured, published


def size_rows(params: Any, expected_millions: float | None, *, leave_out: Iterable[str] = ()) -> list[Row]:
    """Parameter count and finiteness.

    Args:
      params: nested dict of arrays.
      expected_millions: published count, None where there is none.
      leave_out: top-level modules that the published count does not include.
    """
    counted = {module: tree for module, tree in params.items() if module not in set(leave_out)}
    millions = sum(leaf.size for leaf in jax.tree.leaves(counted)) / 1e6
    broken = [
        jax.tree_util.keystr(p) for p, a in jax.tree_util.tree_leaves_with_path(params) if not np.isfinite(a).all()
    ]
    return [
        (
            "parameters",
            f"{millions:.1f}M",
            f"{expected_millions:.1f}M" if expected_millions else "of no published size",
        ),
        ("all finite", "no: " + ", ".join(broken[:4]) if broken else "yes", "yes"),
    ]


def tokenizer_rows(module: Any, params: Any, batches: Iterable[np.ndarray]) -> list[Row]:
    """Codebook usage and reconstruction PSNR over batches of uint8 images [B, H, W, 3]."""

    @jax.jit
    def look(params, images):
        pixels = images.astype(jnp.float32) / 255.0
        codes = module.apply({"params": params}, pixels, method="encode")
        decoded = jnp.clip(module.apply({"params": params}, codes, method="decode"), 0.0, 1.0)
        return codes, losses.mean_squared_error(decoded, pixels)

    looked = [jax.device_get(look(params, images)) for images in batches]
    codes, squared = (np.concatenate(column) for column in zip(*looked, strict=True))
    usage, perplexity = (f(codes, module.codebook_size) for f in (quantizer.codebook_usage, quantizer.perplexity))
    psnr = -10.0 * np.log10(np.maximum(squared, 1e-10)).mean()
    return [
        (f"codebook usage, {len(codes)} images", f"{usage:.1%} of {module.codebook_size}", ""),
        ("code perplexity", f"{perplexity:.0f}", ""),
        ("reconstruction PSNR, mean over images", f"{psnr:.2f} dB", ""),
    ]


def generator_rows(module: Any, params: Any, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[Row]:
    """Next-code loss and accuracy over batches of (codes [B, N], labels [B])."""

    @jax.jit
    def look(params, codes, labels):
        logits = module.apply({"params": params}, codes, labels).logits
        loss = jnp.mean(losses.next_code_cross_entropy(logits, codes), axis=-1)
        return loss, jnp.mean(losses.correct_codes(logits, codes), axis=-1)

    looked = [jax.device_get(look(params, codes, labels)) for codes, labels in batches]
    loss, correct = (np.concatenate(column) for column in zip(*looked, strict=True))
    return [
        (f"next-code loss, {len(loss)} sequences", f"{loss.mean():.4f}", f"below {math.log(module.codebook_size):.2f}"),
        ("next code is the most probable", f"{correct.mean():.2%}", ""),
    ]
