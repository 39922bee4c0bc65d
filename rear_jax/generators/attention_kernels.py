"""Kernels of causal attention, and the rule that says where which of them runs.

None of them holds the scores [B, H, T, T] in memory. On TPUs there is one of ours, `fused_attention.py`, for sequences
of which one fits on the chip, with dropout of attention weights and hidden positions; and JAX's splash attention for
what that does not take. On GPUs there is cuDNN's, and one of ours, `flash_attention.py`. The libraries' kernels have no
dropout that fits training (cuDNN's repeats one mask, drawn from a constant seed), and no positions that only some
queries see. For everything else, there is the plain form in `attention.py`.

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
from rear_jax.generators.flash_attention import flash_attention
from rear_jax.generators.fused_attention import LONGEST, fused_attention
from rear_jax.generators.fused_kernels import Shape
from rear_jax.generators.heads import Preparation
from rear_jax.runtime.precision import of_products, platform
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
GPU_CAPABILITY = 8.0  # compute capability at least: Ampere
FLASH_DTYPES = ("bfloat16", "float16", "float32")
FLASH_HEAD_SIZE = 128  # at most
FLASH_CHECKED = frozenset({"9.0"})  # compute capabilities on which `benchmarks/attention.py` found 'flash' right, and
# faster than the plain form and cuDNN's, in dtypes of two bytes (benchmarks/RESULTS.md): there 'auto' takes it


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
    given = {"rate": rate, "memory": fast_memory(), "interpret": interpret}
    given["precision"] = None if qkv.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST

    def kernel(qkv, heads, preparation, visible, words):
        return fused_attention(qkv, preparation, heads, visible=visible, words=words, **given)

    return _on_mesh(kernel, qkv, preparation, visible, dropout)


def flash_on_mesh(
    qkv: Float[Array, "B T 3 H D"],
    preparation: Preparation,
    visible: Bool[Array, "B T"] | None,
    rate: float,
    dropout: Dropout | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T W"]:
    """`flash_attention`, each device with rows and heads of its own; arguments as of `attention.self_attention`."""
    given = {"rate": rate, "precision": of_products(), "interpret": interpret}

    def kernel(qkv, heads, preparation, visible, words):
        prepared = preparation.apply(qkv.reshape(*qkv.shape[:2], 3, heads, -1))
        return flash_attention(*prepared, visible=visible, words=words, **given).reshape(*qkv.shape[:2], -1)

    return _on_mesh(kernel, qkv, preparation, visible, dropout)


def _on_mesh(
    kernel: Callable[..., jax.Array],
    qkv: Float[Array, "B T 3 H D"],
    preparation: Preparation,
    visible: Bool[Array, "B T"] | None,
    dropout: Dropout | None,
) -> Float[Array, "B T W"]:
    """A kernel of a device's rows and heads on all devices.

    It is called with (qkv [b, T, 3 h D], h, preparation, visible, words of dropout), and gives [b, T, h D].
    """
    batch, length, _, heads, _ = qkv.shape
    words = None if dropout is None else dropout.of_heads(heads)
    mesh = jax.sharding.get_abstract_mesh().shape
    rows, of_heads = dividing(BATCH_AXES, batch, mesh), dividing(HEAD_AXES, heads, mesh)
    here = heads // math.prod(mesh[axis] for axis in of_heads)
    if here == heads:
        qkv = qkv.reshape(batch, length, -1)  # side by side as they come: heads apart would be moved in memory

    def of_device(qkv, *others):
        return kernel(qkv.reshape(*qkv.shape[:2], -1), here, *others)

    if math.prod(mesh.values()) == 1:
        return of_device(qkv, preparation, visible, words)
    of_qkv = PartitionSpec(rows) if here == heads else PartitionSpec(rows, None, None, of_heads)
    of_all = PartitionSpec()  # a rotation of [1, T, D/2] is that of all images, too
    of_each = jax.tree.map(lambda x: PartitionSpec(rows) if x.ndim == 3 and len(x) == batch else of_all, preparation)
    specs = of_qkv, of_each, PartitionSpec(rows), PartitionSpec(rows, of_heads)
    out = PartitionSpec(rows, None, of_heads)
    return jax.shard_map(of_device, in_specs=specs, out_specs=out, check_vma=False)(qkv, preparation, visible, words)


OURS: dict[str, Callable[..., jax.Array]] = {"fused": fused_on_mesh, "flash": flash_on_mesh}
LIBRARY: dict[str, Callable[..., jax.Array]] = {"cudnn": cudnn_attention, "splash": splash_attention}
KERNELS = ("auto", "plain", *OURS, *LIBRARY)


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
    """The kernel to use: 'plain', or a key of OURS or of LIBRARY.

    Args:
      name: `config.model.attention`, one of KERNELS; 'auto' takes the first kernel that can run, else 'plain'.
      task: what it has to compute.

    Raises RearError: the kernel that is named cannot compute this here.
    """
    reasons = {kernel: obstacle(task) for kernel, obstacle in OBSTACLES.items()}
    if name == "auto":
        able = (kernel for kernel, reason in reasons.items() if not reason)
        return next((kernel for kernel in able if kernel != "flash" or _is_checked(task)), "plain")
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
    if reason := _lacks_gpu():
        return reason
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


def _obstacle_to_flash(task: Task) -> str:
    if reason := _lacks_gpu():
        return reason
    if task.dtype not in FLASH_DTYPES:
        return f"takes {', '.join(FLASH_DTYPES)}, not {task.dtype}"
    return f"takes heads of up to {FLASH_HEAD_SIZE} features, not {task.size}" if task.size > FLASH_HEAD_SIZE else ""


def _lacks_gpu() -> str:
    if platform() == "gpu" and _has_flash_attention():
        return ""
    return f"runs on NVIDIA GPUs of compute capability {GPU_CAPABILITY} or higher, not on {platform()}"


def _lacks(task: Task) -> str:
    """What the libraries' kernels cannot do."""
    if task.rate:
        return f"has no dropout of attention weights, and config.model.dropout = {task.rate} asks for it"
    return "hides no positions, as captions need it" if task.masked else ""


OBSTACLES = {  # by kernel; 'auto' tries them in this order
    "fused": _obstacle_to_fused,
    "flash": _obstacle_to_flash,
    "cudnn": _obstacle_to_cudnn,
    "splash": _obstacle_to_splash,
}


def fast_memory() -> int:
    """Bytes of a core's own memory on the TPUs of the mesh that is in use, else on this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.local_devices()[0].device_kind if device is None else device.device_kind
    return next((size for name, size in FAST_MEMORY.items() if kind.startswith(name)), min(FAST_MEMORY.values()))


def _has_flash_attention() -> bool:
    """Whether this machine's GPUs are NVIDIA's and new enough for the tensor cores that the kernels use."""
    return float(_capability() or 0) >= GPU_CAPABILITY


def _is_checked(task: Task) -> bool:
    """Whether 'auto' may take 'flash' here."""
    return task.dtype in CUDNN_DTYPES and _capability() in FLASH_CHECKED


def _capability() -> str:
    """Of this machine's NVIDIA GPUs, such as '9.0'; '' without any. AMD's name their kind where these have a number."""
    if jax.default_backend() != "gpu":
        return ""
    capability = jax.local_devices()[0].compute_capability
    return capability if capability.replace(".", "").isdigit() else ""
