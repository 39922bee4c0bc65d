"""The loop over a transformer's blocks, once for all generators.

What a block computes must be at hand again in the backward pass. `REMAT` says what of it is kept; the rest is computed
a second time (arXiv 1604.06174), which costs time and saves memory in proportion to the depth. A training job chooses
what 'auto' is (`training/fitting.py`); where there is no backward pass it does not matter.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from rear_jax.generators.dropout import Dropout
from rear_jax.runtime.sharding import by_rows

KEPT = "kept"
HIDDEN = "hidden"  # the collection that takes the hidden states of all layers, where a caller makes it mutable

REMAT: dict[str, Any] = {  # name -> what is kept of a block; None = everything, without a second computation
    "auto": None,
    "none": None,
    "products": jax.checkpoint_policies.save_only_these_names(KEPT),  # what `keep` names
    "full": jax.checkpoint_policies.nothing_saveable,  # its input alone
}


def keep(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same array, named as one that the backward pass reads and that would be expensive to compute again."""
    return checkpoint_name(x, KEPT)


def run_blocks(
    model: nn.Module, x: Float[Array, "B T W"], *inputs: Any, dropout: Dropout | None, taps: tuple[int, ...] = ()
) -> tuple[Float[Array, "B T W"], tuple[jax.Array, ...]]:
    """All blocks in turn: one compiled block in a scan, its parameters stacked [depth, ...].

    Where the collection `HIDDEN` is mutable, it gets `states` [depth + 1, B, T, W]: x, and the output of every block.

    Args:
      model: the generator: its `blocks` is one block, `depth`, `remat` and `unroll` say how often and how it is run.
      x: input of the first block.
      *inputs: what every block reads besides.
      dropout: where the blocks drop; None switches dropout off.
      taps: 0-based index of the blocks whose output is wanted.

    Returns:
      (output of the last block, outputs [B, T, W] of the tapped ones).
    """

    tapping = sorted(set(taps))
    watched = model.is_mutable_collection(HIDDEN) and not model.is_initializing()
    slots = jnp.array([tapping.index(n) if n in tapping else len(tapping) for n in range(model.depth)])

    def body(block, carry, given):
        layer, place = given
        x, tapped = jax.tree.map(by_rows, carry)
        x = block(x, *inputs, dropout=place)
        if taps:
            tapped = _with_tap(tapped, x, slots[layer])
        return jax.tree.map(by_rows, (x, tapped)), x if watched else None

    policy = REMAT[model.remat]
    scan = nn.scan(
        body if policy is None else nn.remat(body, policy=policy, prevent_cse=False),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=model.depth,
        unroll=model.unroll,
    )
    x = by_rows(x)
    places = None if dropout is None else dropout.split(model.depth)
    tapped = jnp.zeros((len(x), len(tapping) + 1, *x.shape[1:]), x.dtype) if taps else ()
    carry, states = scan(model.blocks, (x, tapped), (jnp.arange(model.depth), places))
    if watched:
        model.sow(HIDDEN, "states", jnp.concatenate([x[None], states]))
    x, tapped = jax.tree.map(by_rows, carry)
    return x, tuple(tapped[:, tapping.index(tap)] for tap in taps)


@jax.custom_vjp
def _with_tap(tapped: Float[Array, "B n+1 T W"], x: Float[Array, "B T W"], slot: jax.Array) -> jax.Array:
    """The output of a block is put into a slot; that of a block without a tap into the last one, which nobody reads.

    Going back, no gradient has to be taken out of `tapped`: every other slot is filled once, and that of the last slot
    is zero.
    """
    return jax.lax.dynamic_update_index_in_dim(tapped, x, slot, 1)


def _with_tap_backward(slot, of_tapped):
    return of_tapped, jax.lax.dynamic_index_in_dim(of_tapped, slot, 1, keepdims=False), None


_with_tap.defvjp(lambda tapped, x, slot: (_with_tap(tapped, x, slot), slot), _with_tap_backward)
