"""Custom kernels in a plan: which there are, what they move, and their cycles."""

import ast
import importlib.util
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from rear_jax.generators.attention_kernels import splash_attention
from rear_jax.plan import chips, hlo, kernels, roofline
from tests.test_architecture import FILES
from tests.toy import ROOT, environment

TPU_TEXT = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], bf16[8,258,2304])) -> (s32[], bf16[8,258,2304]) {
  %p = (s32[]{:T(128)}, bf16[8,258,2304]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %qkv = bf16[8,258,2304]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %jvp_mine_.3 = bf16[8,258,768]{2,1,0:T(8,128)(2,1)} custom-call(%qkv, %qkv, /*index=2*/%qkv), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block_q": 128
}}, metadata={op_name="jit(f)/transpose(jvp(mine))/pallas_call" stack_frame_id=8}, backend_config={"custom_call_config":{"body":""}}
  %wide = bf16[8,258,2304]{2,1,0:T(8,128)(2,1)S(1)} fusion(%jvp_mine_.3), calls=%widen, backend_config={"estimated_cycles":"50"}
  ROOT %out = (s32[]{:T(128)}, bf16[8,258,2304]{2,1,0:T(8,128)(2,1)}) tuple(%i, %wide)
}

%widen (a: bf16[8,258,768]) -> bf16[8,258,2304] {
  %a = bf16[8,258,768]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %pad = bf16[8,258,2304]{2,1,0:T(8,128)(2,1)S(1)} pad(%a)
}

%condition (q: (s32[], bf16[8,258,2304])) -> pred[] {
  %q = (s32[]{:T(128)}, bf16[8,258,2304]{2,1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %lt = pred[]{:T(512)} constant(true)
}

ENTRY %main (x: (s32[], bf16[8,258,2304])) -> (s32[], bf16[8,258,2304]) {
  %x = (s32[]{:T(128)}, bf16[8,258,2304]{2,1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, bf16[8,258,2304]{2,1,0:T(8,128)(2,1)}) while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"24"}}
}
"""  # noqa: E501 - as the compiler writes it
MODULE = hlo.parse(TPU_TEXT)
SCHEDULE = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 0  ;;  %s2 = inlined_call_operand.hbm [shape: f32[8]] }
   0x1 LB: > { %s3 = sadd.s32 4294967295, %s9 /* iteration index, stage = 1 */  ;;  %s9 = sphi %s1, %s4 /* phi copy */ }
   0x2   : > { %5 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s2, /*dma_strides=*/
window_bounds: (1, 3, 16, 6)
iteration_bounds: (8, 2) */ } /* Start region 29 */
   0x3   :  {} /* End region 30 */
   0x4 LB: >> { %s6 = sadd.s32 1, %s7  ;;  %s7 = sphi %s8, %s6 /* phi copy */ }
   0x5   : >> { %p1 = scmp.ge.s32.totalorder %s6, 12 /* loop exit test */ }
   0x6   : >> { %11 = sbr.rel (!%p1) target = $region40 }
   0x7   :  {}
   0x8 LB: >> { %s16 = sadd.s32 1, %s17  ;;  %s17 = sphi %s18, %s16 /* phi copy */ }
   0x9   : >> { %v1 = vadd.f32 %v2, %v3 }
   0xa PF: > { %p2 = scmp.ge.s32.totalorder %s16, %s20 /* loop exit test */ }
   0xb   :  { %p3 = scmp.ge.s32.totalorder %s4, 18 /* loop exit test */  ;;  %12 = sbr.rel (!%p3) target = $region30 }
   0xc   :  {} /* exit bundle: %mine.1 = custom-call(%x) */
"""


def test_a_kernel_is_found_by_the_name_that_it_gives_itself():
    """In a loop, behind gradients, and with words of its own that take several lines."""
    (kernel,) = kernels.found(MODULE)
    assert (kernel.name, kernel.instruction, kernel.times) == ("mine", "jvp_mine_.3", 24)
    assert [array.dims for array in kernel.operands] == [(8, 258, 2304)] * 3
    assert [array.dims for array in kernel.results] == [(8, 258, 768)]


def test_an_operand_that_a_kernel_is_given_three_times_is_read_once():
    kernel = 8 * 264 * (2304 + 768) * 2
    assert hlo.bytes_moved(MODULE) == 24 * (kernel + 8 * 264 * 768 * 2)  # and what follows reads the result


@pytest.mark.parametrize(("chip", "cores"), [("v5e", 1), ("v5p", 2)])
def test_cycles_are_the_compilers_and_those_of_the_kernels_formula(monkeypatch, chip, cores):
    topology = chips.Topology("", chips.TPUS[chip], [None], "nobody", True)
    unknown = roofline._cycles(MODULE, topology)
    assert unknown == {"cycles": 24 * 50, "kernel_cycles": 0, "notes": ("The cost model counts no cycle of mine.",)}
    monkeypatch.setattr(kernels, "CYCLES", {"mine": lambda kernel: 10 * kernel.operands[0].dims[0]})
    known = 24 * 80 // cores
    assert roofline._cycles(MODULE, topology) == {"cycles": 24 * 50 + known, "kernel_cycles": known, "notes": ()}


def unnamed(text: str) -> list[int]:
    """Lines of a file where a Pallas kernel does not say its name or its cost."""
    calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    kernels = (call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "pallas_call")
    return [call.lineno for call in kernels if not {one.arg for one in call.keywords} >= {"name", "cost_estimate"}]


def test_our_kernels_say_their_name_and_cost():
    assert [(file, unnamed(file.read_text())) for file in FILES if unnamed(file.read_text())] == []
    assert unnamed('pl.pallas_call(k, name="k", cost_estimate=c)\npl.pallas_call(k, name="k")') == [2]


def test_bundles_count_as_often_as_their_loops_run(monkeypatch):
    """The grid's loop runs twice more than there are steps, to fetch and to write; one of unknown end counts once."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from kernel_bundles import schedule

    loops = schedule(SCHEDULE)
    assert str(loops) == "3 + 16 * (4 + 12 * (4) + ? * (2))"
    assert loops.body == 3 + 16 * (4 + 48 + 2)


LOOPING = """
import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def kernel(x, out):
    out[...] = jax.lax.fori_loop(0, 50, lambda _, y: y * y + 1, x[...])


def function(x):
    block = pl.BlockSpec((1, 256, 128), lambda i: (i, 0, 0))
    parallel = pltpu.CompilerParams(dimension_semantics=("parallel",))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    settings = {"in_specs": [block], "out_specs": block, "out_shape": shape, "compiler_params": parallel}
    return pl.pallas_call(kernel, grid=(16,), name="looping", **settings)(x)
"""
needs_tpu_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def bundles(*flags: str) -> list[list[str]]:
    """The rows of the table that the tool prints; it must succeed."""
    command = [sys.executable, ROOT / "benchmarks/kernel_bundles.py", *flags]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| v5")]


def compiled_for_tpu(function, *arrays: tuple):
    """For one chip of v5e; each array by its shape and type."""
    here = jax.sharding.SingleDeviceSharding(chips.topology("v5e:1x1").devices[0])
    given = (jax.ShapeDtypeStruct(shape, kind, sharding=here) for shape, kind in arrays)
    return jax.jit(function).lower(*given).compile()


@pytest.mark.slow
@needs_tpu_compiler
def test_with_the_tpu_compiler_arrays_take_the_bytes_that_are_counted():
    shapes = ((258, 768), (16, 258, 258), (3, 16, 48), (5,), ())
    arrays = [(shape, kind) for shape in shapes for kind in (jnp.bfloat16, jnp.float32, jnp.int8)]
    program = compiled_for_tpu(lambda *arrays: [one + one for one in arrays], *arrays)
    module = hlo.parse(program.as_text())
    taken = [one.size for one in module.computations[module.entry].instructions.values() if one.opcode == "parameter"]
    assert len(taken) == len(arrays)
    assert sum(taken) == program.memory_analysis().argument_size_in_bytes


@pytest.mark.slow
@needs_tpu_compiler
def test_with_the_tpu_compiler_every_splash_kernel_has_a_formula():
    def attend(x):
        return splash_attention(x, x, x).astype(jnp.float32).sum()

    programs = [compiled_for_tpu(function, ((2, 258, 4, 48), jnp.bfloat16)) for function in (attend, jax.grad(attend))]
    found = [kernel for program in programs for kernel in kernels.found(hlo.parse(program.as_text()))]
    assert len(found) == 4
    heads, pairs = 2 * 4, 3 * 3  # 258 positions are three blocks
    assert all(300 < kernels.cycles(kernel, "v5e") / (heads * pairs) < 1000 for kernel in found)


@pytest.mark.slow
@needs_tpu_compiler
def test_with_the_tpu_compiler_bundles_of_a_kernel_are_counted(tmp_path):
    """Sixteen steps, which two cores share on v5p, of a loop that runs fifty times."""
    (tmp_path / "looping.py").write_text(LOOPING)
    flags = (f"{tmp_path}/looping.py:function", "float32[16,256,128]", "--topology", "v5e:1x1", "v5p:1x1x1")
    rows = bundles(*flags)
    assert [row[:2] for row in rows] == [["v5e:1x1", "looping"], ["v5p:1x1x1", "looping"]]
    loops = r"\d+ \+ (\d+) \* \(\d+ \+ (\d+) \* \(\d+\)\)"
    assert [re.fullmatch(loops, row[2]).groups() for row in rows] == [("16", "50"), ("8", "50")]


FUSED = """
from rear_jax.generators.fused_attention import fused_attention
from rear_jax.generators.heads import Norm, Preparation


def function(qkv, norms, words):
    preparation = Preparation(Norm(norms[0], norms[1]), Norm(norms[2], norms[3]))
    return fused_attention(qkv, preparation, 16, rate=0.1, words=words)
"""


@pytest.mark.slow
@needs_tpu_compiler
def test_with_the_tpu_compiler_the_formula_of_fused_attention_meets_its_bundles(tmp_path):
    """Of reAR-B and of LlamaGen-L's width; the tool prints the formula's cycles beside the bundles."""
    (tmp_path / "fused.py").write_text(FUSED)
    for size in (48, 64):
        arrays = f"bfloat16[2,258,{48 * size}]", f"float32[4,{size}]", "int32[2,16,2]"
        rows = bundles(f"{tmp_path}/fused.py:function", *arrays, "--gradient")
        assert len(rows) == 2
        for row in rows:
            counted, formula = (float(cell) for cell in row[-2:])
            assert abs(formula / counted - 1) < 0.15
