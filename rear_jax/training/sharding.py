"""Which axes of the mesh divide which parameter: one table of rules for every network.

A rule is a regular expression and the mesh axes of an array's *last* dimensions; those before them are never divided,
such as the layer axis of scanned blocks and the window of convolutions. The first rule that is found in an array's path
counts. Optimiser state and moving averages hold arrays under the path of their parameter, so that they follow it.

'fsdp' divides parameters that each device then gathers when it needs them (ZeRO, arXiv 1910.02054). 'tensor' divides
the transformers as Megatron-LM does (arXiv 1909.08053): the first linear layer of a pair by columns, or by heads, the
second by rows, embeddings and head by vocabulary. That activations follow is said in `models/partition.py`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rear_jax.errors import RearError

COLUMNS, ROWS, WHOLE = ("fsdp", "tensor"), ("tensor", "fsdp"), ()

RULES: tuple[tuple[str, tuple[str | tuple[str, ...] | None, ...]], ...] = (
    # what training does not change, but for the generators that post-training keeps
    (r"^frozen/(?!(reference|generator)/)", WHOLE),
    # transformers
    (r"(^|/)qkv/kernel$", (("fsdp", "tensor"), None)),  # no cut through [3, heads, features] divides heads
    (r"(^|/)(fc1|gate|up|adaln|head_adaln|caption_fc1|lm_head)/kernel$", COLUMNS),
    (r"(^|/)(fc1|gate|up|adaln|head_adaln|caption_fc1|lm_head)/bias$", ("tensor",)),
    (r"(^|/)(proj|fc2|down|caption_fc2)/kernel$", ROWS),
    (r"(^|/)(qkv|proj|fc2|down|caption_fc2)/bias$", WHOLE),
    (r"(^|/)(embeddings|code_embeddings|class_embeddings)$", ROWS),
    (r"(^|/)(cls_token|pos_embed|target_aware_pos_embed|timesteps_embeddings|null_caption)$", ("fsdp",)),
    (r"(^|/)(shallow|deep)_projector/layer\d/kernel$", ("fsdp", None)),
    (r"(^|/)(shallow|deep)_projector/layer\d/bias$", WHOLE),
    (r"(^|/)(q_|k_|attention_|mlp_)?norm\d?/(scale|bias)$", WHOLE),
    # tokenizers and their discriminator
    (r"(^|/)(encoder|(pixel_)?decoder|discriminator)/.*kernel$", ("fsdp",)),
    (r"(^|/)(encoder|(pixel_)?decoder|discriminator)/.*(scale|bias)$", WHOLE),
    (r"(^|/)(encoder|decoder)/.*(embedding|latent_tokens|mask_token)$", ("fsdp",)),
    (r"(^|/)(pixel_)?codebook$|^extra/(usage|sums)$", WHOLE),
)


def spec(path: str, shape: tuple[int, ...], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """How one array is divided. A dimension that its axis does not divide stays whole, and so do scalars.

    Args:
      path: names from the root of the tree, joined by '/'.
      shape: of the array.
      mesh_shape: devices along each axis.

    Raises:
      RearError: no rule matches, or the rule is for arrays of more dimensions.
    """
    if not shape:
        return PartitionSpec()
    axes = next((axes for pattern, axes in RULES if re.search(pattern, path)), None)
    if axes is None or len(axes) > len(shape):
        raise RearError(f"no sharding rule fits {path} {list(shape)}: add one to rear_jax/training/sharding.py.")
    axes = (None,) * (len(shape) - len(axes)) + axes
    return PartitionSpec(*(_dividing(axis, size, mesh_shape) for axis, size in zip(axes, shape, strict=True)))


def _dividing(axis: str | tuple[str, ...] | None, size: int, mesh_shape: Mapping[str, int]) -> Any:
    """The axis, or several together, where it divides a dimension of this size; else None."""
    names = (axis,) if isinstance(axis, str) else axis or ()
    return axis if size % math.prod(mesh_shape[name] for name in names) == 0 else None


def shardings(tree: Any, mesh: Mesh, root: str = "") -> Any:
    """The sharding of every array of a tree.

    Args:
      tree: arrays or their shapes.
      mesh: where they go.
      root: what their paths begin with: '' or a name that ends in '/'.
    """

    def of(path, leaf):
        name = root + jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(name, leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(of, tree)


def bytes_per_device(tree: Any, placed: Any) -> int:
    """What a tree of arrays or shapes takes on each device, under one sharding or a tree of them."""
    placed = jax.tree.broadcast(placed, tree)
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, placed)
    return sum(jax.tree.leaves(sizes))
