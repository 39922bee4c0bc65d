"""Kernels of causal attention, and the rule that says where which of them runs.

None of them holds the scores [B, H, T, T] in memory. On TPUs there is one of ours, `fused_attention.py`, for sequences
of which one fits on the chip, with dropout of attention weights and hidden positions; and JAX's splash attention for
what that does not take. On GPUs there is cuDNN's. The libraries' kernels have no dropout that fits training (cuDNN's
repeats one mask, drawn from a constant seed), and no positions that only some queries see. For these, and for
everything else, there is the plain form in `attention.py`.

cuDNN's divides itself over a mesh. The others are Pallas kernels, which XLA's partitioner does not look into, so they
are mapped over the devices here.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from rear_jax.errors import RearError
from rear_jax.generators.dropout import Dropout
from rear_jax.generators.fused_attention import LONGEST, fused_attention
from rear_jax.generators.fused_kernels import Shape
from rear_jax.generators.heads import Preparation
from rear_jax.runtime.precision import platform
from rear_jax.runtime.sharding import BATCH_AXES, HEAD_AXES, dividing

SPLASH_BLOCK = 128  # positions that splash attention takes at a time; lengths are filled up to a multiple
FAST_MEMORY = {  # bytes of a TPU core by the device's kind, from jax's `pallas.tpu.get_tpu_info`
    "TPU v4": 16 * 2**20,
    "TPU v5 lite": 128 * 2**20,
    "TPU v5": 64 * 2**20,
    "TPU v6 lite": 128 * 2**20,
    "TPU7": 64 * 2**20,
}
CUDNN_DTYPES = ("bfloat16", "float16")
CUDNN_HEAD_SIZE = 128  # at most, and a multiple of 8
CUDNN_CAPABILITY = 8.0  # compute capability at least: Ampere


def cudnn_attention(
    queries: Float[Array, "B T H D"], keys: Float[Array, "B T H D"], values: Float[Array, "B T H D"]
) -> Float[Array, "B T H D"]:
    """Causal attention by cuDNN; softmax in float32."""
    return jax.nn.dot_product_attention(queries, keys, values, is_causal=True, implementation="cudnn")


def splash_attention(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B T H D"],
    values: Float[Array, "B T H D"],
    *,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """Causal attention by JAX's splash attention, each device with rows and heads of its own; softmax in float32.

    Args:
      queries, keys, values: one dtype, in which the queries are scaled.
      interpret: run the kernel's Python on any platform, slowly.
    """
    batch, length, heads, size = queries.shape
    filled = -(-length // SPLASH_BLOCK) * SPLASH_BLOCK  # positions after the last are seen by none before them

    def kernel(*inputs):  # [b, T, h, D] each, of one device
        rows = [jnp.pad(x, ((0, 0), (0, filled - length), (0, 0), (0, 0))).swapaxes(1, 2) for x in inputs]
        mask = splash.MultiHeadMask([splash.CausalMask((filled, filled))] * rows[0].shape[1])
        of_row = splash.make_splash_mha_single_device(mask, interpret=interpret)
        return jax.vmap(of_row)(*rows).swapaxes(1, 2)[:, :length]

    queries *= jnp.asarray(size**-0.5, queries.dtype)
    mesh = jax.sharding.get_abstract_mesh().shape
    if math.prod(mesh.values()) == 1:
        return kernel(queries, keys, values)
    spec = PartitionSpec(dividing(BATCH_AXES, batch, mesh), None, dividing(HEAD_AXES, heads, mesh))
    return jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(queries, keys, values)


def fused_on_mesh(
    qkv: Float[Array, "B T 3 H D"],
    preparation: Preparation,
    visible: Bool[Array, "B T"] | None,
    rate: float,
    dropout: Dropout | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T W"]:
    """`fused_attention`, each device with rows and heads of its own; arguments as of `attention.self_attention`."""
    batch, length, _, heads, _ = qkv.shape
    words = None if dropout is None else dropout.of_heads(heads)
    mesh = jax.sharding.get_abstract_mesh().shape
    rows, of_heads = dividing(BATCH_AXES, batch, mesh), dividing(HEAD_AXES, heads, mesh)
    here = heads // math.prod(mesh[axis] for axis in of_heads)
    given = {"rate": rate, "memory": fast_memory(), "interpret": interpret}
    given["precision"] = None if qkv.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST

    def kernel(qkv, preparation, visible, words):  # of one device
        qkv = qkv.reshape(*qkv.shape[:2], -1)
        return fused_attention(qkv, preparation, here, visible=visible, words=words, **given)

    if here == heads:
        qkv = qkv.reshape(batch, length, -1)  # side by side as they come: heads apart would be moved in memory
    if math.prod(mesh.values()) == 1:
        return kernel(qkv, preparation, visible, words)
    of_qkv = PartitionSpec(rows) if qkv.ndim == 3 else PartitionSpec(rows, None, None, of_heads)
    of_each = jax.tree.map(lambda x: PartitionSpec(rows) if x.ndim == 3 else PartitionSpec(), preparation)
    specs = of_qkv, of_each, PartitionSpec(rows), PartitionSpec(rows, of_heads)
    mapped = jax.shard_map(kernel, in_specs=specs, out_specs=PartitionSpec(rows, None, of_heads), check_vma=False)
    return mapped(qkv, preparation, visible, words)


LIBRARY: dict[str, Callable[..., jax.Array]] = {"cudnn": cudnn_attention, "splash": splash_attention}
KERNELS = ("auto", "plain", "fused", *LIBRARY)


class Task(NamedTuple):
    """What an attention has to compute.

    Attributes:
      dtype: of queries, keys and values, by name.
      length, heads, size: T, H on one device, D.
      rate: of attention weights that are dropped now; 0 outside training.
      masked: whether some positions are hidden from others besides those that come after them.
    """

    dtype: str
    length: int
    heads: int
    size: int
    rate: float
    masked: bool

    @classmethod
    def of(cls, qkv: Float[Array, "B T 3 H D"], *, rate: float, masked: bool) -> "Task":
        """Of a projection, on the mesh that is in use."""
        _, length, _, heads, size = qkv.shape
        mesh = jax.sharding.get_abstract_mesh().shape
        count = math.prod(mesh[axis] for axis in dividing(HEAD_AXES, heads, mesh))
        return cls(qkv.dtype.name, length, heads // count, size, rate, masked)


def choose(name: str, task: Task) -> str:
    """The kernel to use: 'plain', 'fused' or a key of LIBRARY.

    Args:
      name: `config.model.attention`, one of KERNELS; 'auto' takes the first kernel that can run, else 'plain'.
      task: what it has to compute.

    Raises RearError: the kernel that is named cannot compute this here.
    """
    reasons = {kernel: obstacle(task) for kernel, obstacle in OBSTACLES.items()}
    if name == "auto":
        return next((kernel for kernel, reason in reasons.items() if not reason), "plain")
    if reasons.get(name):
        raise RearError(f"config.model.attention = {name!r} {reasons[name]}: use 'auto' or 'plain'.")
    return name


def _obstacle_to_fused(task: Task) -> str:
    if platform() != "tpu":
        return f"runs on TPUs, not on {platform()}"
    if task.dtype not in ("bfloat16", "float32"):
        return f"takes bfloat16 or float32, not {task.dtype}"
    if task.size % 8 or task.heads * task.size % 128:
        return f"takes heads of a multiple of 8 features, together a multiple of 128, not {task.heads} of {task.size}"
    there, itemsize = fast_memory(), jnp.dtype(task.dtype).itemsize
    shape = Shape(task.heads, task.size, task.length, itemsize=itemsize, memory=there)
    if task.length > LONGEST or shape.needed > there:
        return f"takes whole sequences into {there >> 20} MiB on the chip: {task.length} positions are too long"
    return ""


def _obstacle_to_cudnn(task: Task) -> str:
    if not (platform() == "gpu" and _has_flash_attention()):
        return f"runs on NVIDIA GPUs of compute capability {CUDNN_CAPABILITY} or higher, not on {platform()}"
    if task.dtype not in CUDNN_DTYPES:
        return f"takes bfloat16 or float16, not {task.dtype}"
    if task.size > CUDNN_HEAD_SIZE or task.size % 8:
        return f"takes heads of a multiple of 8 up to {CUDNN_HEAD_SIZE} features, not {task.size}"
    return _lacks(task)


def _obstacle_to_splash(task: Task) -> str:
    if platform() != "tpu":
        return f"runs on TPUs, not on {platform()}"
    if task.dtype != "bfloat16":
        return f"takes bfloat16, to which it rounds its factors, not {task.dtype}"
    return _lacks(task)


def _lacks(task: Task) -> str:
    """What the libraries' kernels cannot do."""
    if task.rate:
        return f"has no dropout of attention weights, and config.model.dropout = {task.rate} asks for it"
    return "hides no positions, as captions need it" if task.masked else ""


OBSTACLES = {"fused": _obstacle_to_fused, "cudnn": _obstacle_to_cudnn, "splash": _obstacle_to_splash}


def fast_memory() -> int:
    """Bytes of a core's own memory on the TPUs of the mesh that is in use, else on this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.local_devices()[0].device_kind if device is None else device.device_kind
    return next((size for name, size in FAST_MEMORY.items() if kind.startswith(name)), min(FAST_MEMORY.values()))


def _has_flash_attention() -> bool:
    """Whether this machine's GPUs are cuDNN's and new enough; AMD's name their kind where NVIDIA's have a number."""
    if jax.default_backend() != "gpu":
        return False
    capability = jax.local_devices()[0].compute_capability
    return capability.replace(".", "").isdigit() and float(capability) >= CUDNN_CAPABILITY
