"""In what precision networks compute, on every backend alike.

`dtype` is what a network multiplies in. Where it is float32, that must not depend on the hardware: JAX's default on a
TPU rounds the factors of a float32 product to bfloat16. So every product here is made at one of `PRECISIONS`: 'high' is
three bfloat16 passes on a TPU and TF32 on a GPU, 'highest' is float32 itself. A CPU makes no difference. For products
of bfloat16 a precision means nothing.

Where `dtype` is bfloat16, products add up in float32, and so do gradients, over examples and over devices. Element-wise
arithmetic between two products is float32 too, as PyTorch has it: only what is stored is rounded.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from rear_jax.runtime import sharding

PRECISIONS = ("high", "highest")
_STAND_IN: contextvars.ContextVar[str] = contextvars.ContextVar("stand_in", default="")


def products_at(precision: str) -> contextlib.AbstractContextManager:
    """Inside, products of float32 that name no precision of their own are made at this one."""
    return jax.default_matmul_precision(precision)


@contextlib.contextmanager
def standing_in_for(name: str) -> Iterator[None]:
    """Inside, what is traced is traced for this platform, whose place the devices of the mesh take."""
    before = _STAND_IN.set(name)
    try:
        yield
    finally:
        _STAND_IN.reset(before)


def platform() -> str:
    """Of the devices that this will run on: those of the mesh, else jax's own ('cpu', 'gpu' or 'tpu')."""
    if _STAND_IN.get():
        return _STAND_IN.get()
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def factors(a: jax.Array, b: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Two arrays as factors of a product with a result in `dtype`.

    XLA's CPU backend, which multiplies bfloat16 in float32 anyway, lacks some products with a wider result.
    """
    if platform() == "cpu" and jnp.dtype(dtype).itemsize > a.dtype.itemsize:
        return a.astype(dtype), b.astype(dtype)
    return a, b


def of_products() -> str:
    """The precision of products here: that of `products_at` around them, else 'high'."""
    return jax.config.jax_default_matmul_precision or PRECISIONS[0]


def in_float32(function: Callable[..., jax.Array], dtype: Any) -> Callable[..., jax.Array]:
    """An element-wise function of arrays, computed in float32 and rounded once, to `dtype`.

    For the backward pass the arrays are kept as they come; what lies between them and the result is computed again, so
    that float32 costs no memory.
    """

    def run(*arrays: jax.Array) -> jax.Array:
        return function(*(a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays)).astype(dtype)

    return jax.checkpoint(run, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU, x·½(1 + erf(x/√2)), in float32: in this form, not jax.nn's with erfc, an eighth of the time on a CPU.

    In bfloat16 the sum 1 + erf would lose the digits that negative x have.
    """
    return in_float32(lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5)), x.dtype)(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
    """A kernel that a training step has rounded and gathered in advance, see `divided.py`.

    Attributes:
      stored: the kernel as the optimiser has it. Nothing reads it: it is there for its gradient.
      factor: what is multiplied by; no gradient reaches it.
      axes: of the mesh, that divide the last dimensions of the gradient: each entry in turn, the state's the last.
    """

    stored: jax.Array
    factor: jax.Array
    axes: tuple[tuple[str | tuple[str, ...] | None, ...], ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of both."""
        return self.factor.shape

    def reshape(self, *shape: int) -> "Prepared":
        """The same in another shape; the gradient is divided in the old one."""
        stored = self.stored
        for axes in reversed(self.axes):  # of gradients, the other way round
            stored = sharding.place(stored, PartitionSpec(*(None,) * (stored.ndim - len(axes)), *axes))
        return Prepared(stored.reshape(*shape), self.factor.reshape(*shape), ())


def multiply(
    x: Float[Array, "*rows in"],
    kernel: Float[Array, "in *out"] | Prepared,
    dtype: Any,
    *,
    out_dtype: Any = None,
    place: Callable[[jax.Array], jax.Array] = lambda kernel: kernel,
) -> Float[Array, "..."]:
    """x · kernel in `dtype`. The gradient of the kernel is a float32 sum, over rows and over devices.

    A plain product of bfloat16 has a bfloat16 gradient, which devices then add up in bfloat16. This one cannot be
    differentiated forwards.

    Args:
      x: rows, in any dtype.
      kernel: float32, rounded already, or prepared.
      dtype: of the factors.
      out_dtype: of the result; by default `dtype`.
      place: a hint how the kernel lies on the devices, applied to it after rounding and to its gradient.
    """
    stored, factor = (kernel.stored, kernel.factor) if isinstance(kernel, Prepared) else (kernel, None)
    dtypes = jnp.dtype(dtype), jnp.dtype(out_dtype or dtype)
    rows = (-1,) if platform() == "cpu" else x.shape[:-1]  # XLA's CPU backend copies a cotangent of more dimensions
    out = _multiply(x.astype(dtype).reshape(*rows, x.shape[-1]), stored, factor, dtypes, of_products(), place)
    return out.reshape(*x.shape[:-1], *out.shape[len(rows) :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _multiply(x, stored, factor, dtypes, precision, place):
    return _multiply_forward(x, stored, factor, dtypes, precision, place)[0]


def _multiply_forward(x, stored, factor, dtypes, precision, place):
    dtype, out_dtype = dtypes
    # kept as it comes, so that a scan over layers need not stack it once more
    factor = (stored if factor is None else factor).astype(dtype)
    pair = factors(x, place(factor), out_dtype)
    out = jnp.tensordot(*pair, 1, precision=precision, preferred_element_type=out_dtype)
    return out, (x, factor, jnp.empty(0, stored.dtype))


def _multiply_backward(dtypes, precision, place, kept, gradient):
    (x, factor, like), (dtype, _) = kept, dtypes
    rows, features = tuple(range(x.ndim - 1)), tuple(range(1, factor.ndim))
    gradient, axes = gradient.astype(dtype), (tuple(range(x.ndim - 1, gradient.ndim)), features)
    of_x = jnp.tensordot(gradient, place(factor), axes, precision=precision, preferred_element_type=dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    both = factors(x, gradient, wide)
    of_kernel = jnp.tensordot(*both, (rows, rows), precision=precision, preferred_element_type=wide)
    return of_x, place(of_kernel).astype(like.dtype), None


_multiply.defvjp(_multiply_forward, _multiply_backward)


class Linear(nn.Module):
    """A linear layer on [..., in].

    Attributes:
      features: of the result.
      dtype: of the product.
      use_bias: whether there is a bias; it is added in float32.
      kernel_init: how the kernel starts.
      window: leading axes of the kernel, where it is stored as that of a convolution: [*window, in / window, features].
      out_dtype: of the result; by default `dtype`.
    """

    features: int
    dtype: Any = jnp.float32
    use_bias: bool = True
    kernel_init: Any = nn.initializers.lecun_normal()
    window: tuple[int, ...] = ()
    out_dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... features"]:
        width, out_dtype = x.shape[-1], self.out_dtype or self.dtype
        cells = functools.reduce(int.__mul__, self.window, 1)
        shape = (*self.window, width // cells, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32).reshape(width, self.features)
        out = multiply(x, kernel, self.dtype, out_dtype=out_dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            out = add_bias(out, bias)
        return out


@jax.custom_vjp
def add_bias(x: Float[Array, "..."], bias: Float[Array, "*out"]) -> Float[Array, "..."]:
    """x + bias in float32, rounded to the dtype of x; the gradient of the bias is a float32 sum as well."""
    return _add_bias_forward(x, bias)[0]


def _add_bias_forward(x, bias):
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) + bias).astype(x.dtype), bias


def _add_bias_backward(bias, gradient):
    rows = tuple(range(gradient.ndim - bias.ndim))
    if platform() != "tpu" or gradient.dtype != jnp.bfloat16:
        wide = jnp.promote_types(gradient.dtype, jnp.float32)
        return gradient, jnp.sum(gradient, axis=rows, dtype=wide).astype(bias.dtype)
    # As a product: sums over rows on a TPU's vector unit are 7 % of a layer of reAR-B (benchmarks/TPU.md). The
    # compiler would make a product with a single row of ones a sum again, and any product with ones that it sees.
    ones = jax.lax.optimization_barrier(jnp.ones((8, *gradient.shape[: len(rows)]), gradient.dtype))
    of_bias = jnp.tensordot(ones, gradient, (tuple(1 + row for row in rows), rows), preferred_element_type=jnp.float32)
    return gradient, of_bias[0].astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)
