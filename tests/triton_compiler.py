"""Compiles flash attention for GPUs that are not here; `test_flash_attention.py` runs it, with JAX's plugin for CUDA.

It prints a line for each kernel: capability, element type, head size, name, bytes of a core's own memory, instructions
of tensor cores, bytes of asynchronous copies.
"""

import re
import sys

import jax
import jax.numpy as jnp
from jax._src.lib import triton
from jaxlib.mlir.ir import WalkResult

from rear_jax.generators.dropout import Dropout
from rear_jax.generators.flash_attention import flash_attention

BATCH, HEADS, LENGTH = 2, 4, 258


def program(size: int, dtype: str):
    """Forward and backward for CUDA, with everything that the kernels can do."""
    heads = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, size), jnp.dtype(dtype))
    words = Dropout.of(jax.random.key(0), jnp.arange(BATCH)).of_heads(HEADS)
    visible = jnp.arange(LENGTH) % jnp.array([[2], [3]]) > 0

    def loss(queries, keys, values):
        given = {"visible": visible, "rate": 0.1, "words": words, "precision": "high"}
        return flash_attention(queries, keys, values, **given).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(heads, heads, heads)
    return traced.lower(lowering_platforms=("cuda",)).compiler_ir()


def kernels(module) -> list[dict]:
    """What Triton is given of each kernel."""
    found = []

    def visit(operation):
        if operation.name == "stablehlo.custom_call" and "triton" in str(operation.attributes["call_target_name"]):
            config = operation.attributes["mhlo.backend_config"]
            found.append({one.name: one.attr for one in config})
        return WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


def main(capabilities: str, dtypes: str, sizes: str) -> None:
    jax.devices()  # JAX finds its plugins, and Triton with one
    for dtype in dtypes.split(","):
        for size in sizes.split(","):
            for kernel in kernels(program(int(size), dtype)):
                for capability in capabilities.split(","):
                    counts = {"num_warps": kernel["num_warps"].value, "num_stages": kernel["num_stages"].value}
                    made = triton.compile("cuda", kernel["ir"].value_bytes, capability, num_ctas=1, **counts)
                    products = len(re.findall(r"\bmma\.sync|\bwgmma\.mma_async|\btcgen05\.mma", made.asm))
                    copies = set(re.findall(r"cp\.async\.cg\.\S+ \[.*?\], \[.*?\], 0x(\w+)", made.asm))
                    print(capability, dtype, size, kernel["name"].value, made.smem_bytes, products, *copies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
