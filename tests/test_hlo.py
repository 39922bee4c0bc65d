"""Counting operations in what JAX traces, and reading compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from rear_jax import generators
from rear_jax.plan import chips, hlo, layouts
from rear_jax.runtime import flops
from rear_jax.runtime.mesh import make_mesh, split
from rear_jax.training import objectives
from rear_jax.training.state import adamw
from tests import toy

WIDTH, LAYERS, ROWS = 32, 6, 16


def traced_flops(function, *arguments) -> int:
    return flops.count(jax.jit(function).trace(*arguments).jaxpr)


def scanned(x, kernels):
    """tanh(x W) for each of the kernels [L, W, W] in turn."""
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0].sum()


X, KERNELS = jnp.ones((ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH, WIDTH))
ONE_LAYER = 2 * ROWS * WIDTH * WIDTH


def in_blocks(estimate: pl.CostEstimate | None):
    """x Wᵀ in blocks of 8 rows of x [16, 32] and of W [32, 32], as a Pallas kernel of bfloat16 products."""

    def kernel(x, kernel, out):
        out[...] = jax.lax.dot_general(
            x[...].astype(jnp.bfloat16), kernel[...].astype(jnp.bfloat16), (((1,), (1,)), ((), ()))
        ).astype(out.dtype)

    return pl.pallas_call(
        kernel,
        grid=(2, 4),
        in_specs=[pl.BlockSpec((8, WIDTH), lambda i, j: (i, 0)), pl.BlockSpec((8, WIDTH), lambda i, j: (j, 0))],
        out_specs=pl.BlockSpec((8, 8), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),
        cost_estimate=estimate,
        interpret=True,
    )


class TestFlops:
    def test_a_product_is_two_operations_a_multiplication(self):
        assert traced_flops(jnp.dot, jnp.ones((3, 5)), jnp.ones((5, 7))) == 2 * 3 * 5 * 7

    def test_a_batched_product(self):
        a, b = jnp.ones((4, 3, 5)), jnp.ones((4, 5, 7))
        assert traced_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), a, b) == 2 * 4 * 3 * 5 * 7

    def test_a_scanned_layer_counts_as_often_as_it_runs(self):
        assert traced_flops(scanned, X, KERNELS) == LAYERS * ONE_LAYER

    def test_backward_is_twice_forward_and_recomputation_adds_one(self):
        both = jax.grad(scanned, argnums=(0, 1))
        assert traced_flops(both, X, KERNELS) == 3 * LAYERS * ONE_LAYER

        def recomputed(x, kernels):
            body = jax.checkpoint(lambda x, kernel: (jnp.tanh(x @ kernel), None), prevent_cse=False)
            return jax.lax.scan(body, x, kernels)[0].sum()

        assert traced_flops(jax.grad(recomputed, argnums=(0, 1)), X, KERNELS) == 4 * LAYERS * ONE_LAYER

    def test_the_largest_branch_counts(self):
        def branches(x, kernel):
            return jax.lax.cond(x[0, 0] > 0, lambda: x @ kernel, lambda: x @ kernel @ kernel)

        assert traced_flops(branches, X, KERNELS[0]) == 2 * ONE_LAYER

    def test_a_kernel_counts_what_it_says_of_itself_or_every_step_of_its_grid(self):
        said = pl.CostEstimate(flops=ONE_LAYER // 2, transcendentals=0, bytes_accessed=0)  # half of it is skipped
        for estimate, operations in ((None, ONE_LAYER), (said, ONE_LAYER // 2)):
            traced = jax.jit(in_blocks(estimate)).trace(X, KERNELS[0])
            assert flops.by_precision(traced.jaxpr) == {"bfloat16": operations}

    def test_every_image_of_a_mapped_kernel_counts(self):
        said = pl.CostEstimate(flops=ONE_LAYER // 2, transcendentals=0, bytes_accessed=0)
        for estimate, operations in ((None, ONE_LAYER), (said, ONE_LAYER // 2)):
            mapped = jax.vmap(in_blocks(estimate), (None, 0))
            assert traced_flops(mapped, X, KERNELS) == LAYERS * operations

    def test_every_device_of_a_mapped_function_counts(self):
        """Each has its rows; all of them have all columns."""
        mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 1}, chips.topology("h100:4").devices)
        with jax.set_mesh(mesh):
            rows = jax.shard_map(
                jnp.dot, in_specs=(PartitionSpec("data"), PartitionSpec()), out_specs=PartitionSpec("data")
            )
            assert traced_flops(rows, jax.typeof(X), jax.typeof(KERNELS[0])) == 2 * ONE_LAYER

    @pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4)])
    def test_convolutions_and_their_gradients_agree_with_the_definition(self, stride, groups):
        images, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4 // groups, 8))

        def convolve(images, kernel):
            return jax.lax.conv_general_dilated(
                images,
                kernel,
                (stride, stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )

        forward = 2 * (2 * (8 // stride) ** 2 * 8) * (3 * 3 * 4 // groups)
        assert traced_flops(convolve, images, kernel) == forward
        both = jax.grad(lambda *inputs: convolve(*inputs).sum(), argnums=(0, 1))
        assert traced_flops(both, images, kernel) == 3 * forward

    def test_a_transformer_by_the_formula(self):
        """6 N D and attention (PaLM, appendix B), for a small LlamaGen without dropout."""
        config = toy.llamagen_config(depth=3, dropout=0.0, token_dropout=0.0)
        model = toy.generator(config)
        optimizer = adamw(config.train.optimizer, 10, generators.family_of(model).parameters)
        batch = {"codes": jnp.zeros((4, model.num_codes), jnp.int32), "label": jnp.zeros(4, jnp.int32)}
        state = jax.eval_shape(lambda: objectives.init_state(model, config, optimizer, {}))
        step = objectives.train_step(model, config, optimizer)
        counted = traced_flops(step, state, batch, jax.random.key(0), {"codebook": jnp.zeros((16, 8))})
        kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params) if path[-1].key == "kernel"]
        positions = model.num_codes  # the class takes the place of the last code, which nothing reads
        attention = 2 * 2 * positions * positions * model.width * model.depth
        expected = 3 * 4 * (2 * positions * sum(kernel.size for kernel in kernels) + attention)
        assert counted == pytest.approx(expected, rel=0.02)


def compiled_text(count: int) -> str:
    """A scan over layers whose kernels are divided over `count` stand-ins of the host."""
    devices = chips.topology(f"h100:{count}").devices
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, devices)
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=split(mesh))
    kernels = jax.ShapeDtypeStruct(
        KERNELS.shape, KERNELS.dtype, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    )
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(scanned, argnums=1)).lower(x, kernels).compile().as_text()


TPU_TEXT = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[8,64,64])) -> (s32[], f32[8,64,64]) {
  %p = (s32[]{:T(128)}, f32[8,64,64]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %w = f32[8,64,64]{2,1,0:T(8,128)} get-tuple-element(%p), index=1
  %cut = bf16[1,64,64]{2,1,0:T(8,128)(2,1)S(1)} fusion(%w, %i), calls=%slicing, backend_config={"estimated_cycles":"50"}
  %start = (bf16[1,64,64]{2,1,0}, bf16[1,256,64]{2,1,0}, u32[]{:S(2)}) fusion(%cut), kind=kCustom, calls=%gather_start
  %next = s32[]{:T(128)} add(%i, %i)
  ROOT %out = (s32[]{:T(128)}, f32[8,64,64]{2,1,0:T(8,128)}) tuple(%next, %w)
}

%cutting (d: f32[8,64,64], e: s32[]) -> f32[1,64,64] {
  %d = f32[8,64,64]{2,1,0:T(8,128)} parameter(0)
  %e = s32[]{:T(128)} parameter(1)
  ROOT %part = f32[1,64,64]{2,1,0} dynamic-slice(%d, %e, %e, %e), dynamic_slice_sizes={1,64,64}
}

%slicing (a: f32[8,64,64], b: s32[]) -> bf16[1,64,64] {
  %a = f32[8,64,64]{2,1,0:T(8,128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  %inner = f32[1,64,64]{2,1,0} fusion(%a, %b), kind=kLoop, calls=%cutting
  ROOT %half = bf16[1,64,64]{2,1,0:T(8,128)(2,1)S(1)} convert(%inner)
}

%gather_start (c: bf16[1,64,64]) -> (bf16[1,64,64], bf16[1,256,64], u32[]) {
  %c = bf16[1,64,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %ag = bf16[1,256,64]{2,1,0} all-gather(%c), channel_id=8, replica_groups=mesh['x'=4,'y'=4], device_ids=([4,4]) {'x'}
  ROOT %call = (bf16[1,64,64]{2,1,0}, bf16[1,256,64]{2,1,0}, u32[]{:S(2)}) custom-call(%ag)
}

%condition (q: (s32[], f32[8,64,64])) -> pred[] {
  %eight = s32[]{:T(128)} constant(8)
  %q = (s32[]{:T(128)}, f32[8,64,64]{2,1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %eight), direction=LT
}

ENTRY %main (x: s32[], y: f32[8,64,64]) -> f32[8,64,64] {
  %x = s32[]{:T(128)} parameter(0)
  %y = f32[8,64,64]{2,1,0:T(8,128)} parameter(1)
  %start_values = (s32[]{:T(128)}, f32[8,64,64]{2,1,0:T(8,128)}) tuple(%x, %y)
  %loop = (s32[]{:T(128)}, f32[8,64,64]{2,1,0:T(8,128)}) while(%start_values), condition=%condition, body=%body
  %z = f32[8,64,64]{2,1,0:T(8,128)} get-tuple-element(%loop), index=1
  %sum = f32[8,64,64]{2,1,0:T(8,128)} all-reduce(%z), channel_id=9, replica_groups=[2,8]<=[16], to_apply=%add
  ROOT %moved = f32[8,64,64]{2,1,0:T(8,128)} collective-permute(%sum), channel_id=10, source_target_pairs={{0,1},{1,0}}
}
"""
WHOLE = 8 * 64 * 128 * 4  # bytes of the stacked array: 64 of the 128 lanes of each of its tiles are filled


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("bf16[8,258,768]{2,1,0:T(8,128)(2,1)}", 8 * 264 * 768 * 2),  # 258 rows take 33 tiles of 8
        ("bf16[8,258,3,16,48]{4,3,2,1,0:T(8,128)(2,1)S(1)}", 8 * 258 * 3 * 16 * 128 * 2),
        ("bf16[8,16,258,258]{2,3,1,0:T(8,128)(2,1)}", 8 * 16 * 264 * 384 * 2),
        ("bf16[8,16,258,258]{1,0,3,2:T(8,128)(2,1)}", 258 * 258 * 8 * 128 * 2),  # 16 of the 128 lanes are filled
        ("f32[4,48,1]{0,1,2:T(4,128)}", 48 * 128 * 4),  # 4 of them
        ("f32[2,300]{1,0:T(2,128)}", 2 * 384 * 4),
        ("s8[1000,300]{1,0:T(8,128)(4,1)}", 1000 * 384),
        ("s32[]{:T(128)}", 128 * 4),
        ("f32[1000]{0:T(1024)}", 1024 * 4),
        ("f32[1000]{0}", 1000 * 4),
        ("f32[3,5]", 3 * 5 * 4),
    ],
)
def test_an_array_takes_whole_tiles(text, size):
    (found,) = layouts.arrays(text)
    assert (found.size, found.main) == (size, "S(1)" not in text)


class TestCompiledText:
    def test_collectives_of_a_tpu_program(self):
        """Those in a loop count as often as it runs; one that runs in the background is found in its fusion."""
        found = {one.kind: one for one in hlo.collectives(hlo.parse(TPU_TEXT))}
        assert found["all-gather"] == hlo.Collective("all-gather", 4 * 64 * 128 * 2, 4, 8, reach=16)
        assert found["all-reduce"] == hlo.Collective("all-reduce", WHOLE, 8, 1, reach=8)
        assert found["collective-permute"].size == WHOLE
        assert len(found) == 3

    def test_bytes_of_a_tpu_program(self):
        """Slices count, not what they are cut from; arrays in the chip's cache do not count."""
        sliced = 64 * 64 * 4  # the fusion's result is in the cache
        gathered = 64 * 64 * 2 + 4 * 64 * 64 * 2  # written by the start of the all-gather
        loop = 8 * (sliced + gathered + 4 * 128 * 4)  # and the counter, four times; a scalar takes a tile of 128
        assert hlo.bytes_moved(hlo.parse(TPU_TEXT)) == loop + 4 * WHOLE

    def test_an_array_that_comes_to_the_cache_in_slices_is_read_once(self):
        """Each slice reads itself, not all of the array; joining them in the cache moves nothing."""
        whole, half = "f32[8,64,64]{2,1,0:T(8,128)}", "f32[4,64,64]{2,1,0:T(8,128)S(1)}"
        start = f"(({whole}), {half}, s32[]{{:S(2)}}) slice-start(%y), slice="
        text = f"""ENTRY %main (y: f32[8,64,64]) -> f32[8,64,64] {{
  %y = {whole} parameter(0)
  %one = {start}{{[0:4], [0:64], [0:64]}}
  %two = {start}{{[4:8], [0:64], [0:64]}}
  %first = {half} slice-done(%one)
  %second = {half} slice-done(%two)
  ROOT %joined = {whole[:-1]}S(1)}} custom-call(%first, %second), custom_call_target="ConcatBitcast"
}}
"""
        assert hlo.bytes_moved(hlo.parse(text)) == WHOLE
        assert hlo.bytes_moved(hlo.parse(text.replace("S(1)", ""))) == 2 * WHOLE  # from main memory into it

    def test_a_kernel_whose_attributes_span_lines_ends_no_computation(self):
        """As a Pallas kernel is written; what follows it in a loop counts."""
        kernel = """  %kernel = s32[]{:T(128)} custom-call(%i), frontend_attributes={kernel_metadata={
"block": "128"
}}, metadata={op_name="kernel"}
  %start ="""
        text = TPU_TEXT.replace("  %start =", kernel, 1)
        assert text != TPU_TEXT
        assert hlo.collectives(hlo.parse(text)) == hlo.collectives(hlo.parse(TPU_TEXT))

    def test_a_loop_that_is_unrolled_runs_less_often(self):
        """Its counter goes up by two, in one step or in several, as in rings of collective-permutes."""
        once = "%next = s32[]{:T(128)} add(%i, %i)"
        two = "%two = s32[]{:T(128)} constant(2)\n  %next = s32[]{:T(128)} add(%i, %two)"
        ones = """%one = s32[]{:T(128)} constant(1)
  %half = s32[]{:T(128)} add(%one, %i)
  %next = s32[]{:T(128)} add(%half, %one)"""
        for text, times in ((once, 8), (two, 4), (ones, 4)):
            found = hlo.collectives(hlo.parse(TPU_TEXT.replace(once, text)))
            assert [one.times for one in found if one.kind == "all-gather"] == [times]

    def test_cycles_of_a_tpu_program(self):
        assert hlo.estimated_cycles(hlo.parse(TPU_TEXT)) == 8 * 50

    @pytest.mark.parametrize(
        ("kind", "sent"),
        [("all-reduce", 150.0), ("all-gather", 75.0), ("reduce-scatter", 75.0), ("all-to-all", 75.0)],
    )
    def test_bytes_sent_in_a_ring_of_four(self, kind, sent):
        assert hlo.Collective(kind, 100, 4, 3, reach=4).sent == 3 * sent

    @pytest.mark.parametrize(
        ("written", "groups", "reach"),
        [
            ("replica_groups=[4,2]<=[8], ", [[0, 1], [2, 3], [4, 5], [6, 7]], 2),
            ("replica_groups=[2,4]<=[4,2]T(1,0), ", [[0, 2, 4, 6], [1, 3, 5, 7]], 8),
            ("replica_groups={{0,4},{11,15}}, ", [[0, 4], [11, 15]], 8),
            ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, ", [[0, 1, 4, 5], [2, 3, 6, 7]], 8),
            ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, ", [[0, 4], [1, 5], [2, 6], [3, 7]], 8),
            ("source_target_pairs={{0,1},{7,8}}, ", [[0, 1], [7, 8]], 16),
            ("to_apply=%add", [[0]], 1),
        ],
    )
    def test_who_takes_part_and_how_far_apart_they_are(self, written, groups, reach):
        found = hlo._groups(f"channel_id=3, {written}use_global_device_ids=true")
        np.testing.assert_array_equal(found, groups)
        assert hlo._reach(found) == reach

    def test_a_loop_of_the_host_compiler(self):
        """Each layer's kernel is gathered in the forward and the backward loop, its gradient summed in the latter."""
        found = hlo.collectives(hlo.parse(compiled_text(4)))
        gathers = [one for one in found if one.kind == "all-gather"]
        assert sum(one.times for one in gathers) == 2 * LAYERS
        assert {one.size for one in gathers} == {WIDTH * WIDTH * 4}
        assert {one.group for one in found} == {4}
        reduced = sum(one.times * one.size for one in found if one.kind in ("all-reduce", "reduce-scatter"))
        assert reduced == LAYERS * WIDTH * WIDTH * 4

    def test_without_a_loop_the_bytes_are_those_of_cost_analysis(self):
        compiled = jax.jit(lambda x, w: jnp.tanh(x @ w) @ w).lower(X, KERNELS[0]).compile()
        expected = compiled.cost_analysis()["bytes accessed"]
        assert hlo.bytes_moved(hlo.parse(compiled.as_text())) == pytest.approx(expected, rel=0.1)

    @pytest.mark.parametrize("function", [scanned, jax.grad(scanned, argnums=1)])
    def test_a_loop_moves_its_body_as_often_as_it_runs(self, function):
        """In proportion to the layers, although each run is given all kernels, and all gradients to fill in."""

        def bytes_moved(layers):
            kernels = jnp.ones((layers, WIDTH, WIDTH))
            return hlo.bytes_moved(hlo.parse(jax.jit(function).lower(X, kernels).compile().as_text()))

        moved = [bytes_moved(layers) for layers in (8, 16, 24)]
        assert moved[2] - moved[1] == pytest.approx(moved[1] - moved[0], rel=0.01)
        assert moved[1] - moved[0] >= 8 * WIDTH * WIDTH * 4
