"""What is read from compiled programs, against programs whose arithmetic, traffic and exchanges are known by hand."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainers.flops import matmul_flops
from trainers.hlo import Hlo

KEY = jax.random.key(0)


def compiled(function, *arguments) -> Hlo:
    return Hlo(jax.jit(function).lower(*arguments).compile().as_text(), devices=8)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def tower(weights, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


PRODUCTS = {
    "product": (lambda a, b: a @ b, [floats(8, 16), floats(16, 4)], 2 * 8 * 16 * 4),
    "batched": (partial(jnp.einsum, "bij,bjk->bik"), [floats(3, 8, 16), floats(3, 16, 4)], 3 * 2 * 8 * 16 * 4),
    "scan": (tower, [floats(5, 32, 32), floats(8, 32)], 5 * 2 * 8 * 32 * 32),
    "scan and its gradient": (
        jax.grad(lambda w, x: jnp.sum(tower(w, x))), [floats(5, 32, 32), floats(8, 32)],
        # Backward: two products a layer.
        3 * 5 * 2 * 8 * 32 * 32,
    ),
    "scan in a scan": (
        lambda w, x: lax.scan(lambda x, _: (tower(w, x), None), x, length=7)[0], [floats(5, 32, 32), floats(8, 32)],
        7 * 5 * 2 * 8 * 32 * 32,
    ),
    "counted loop": (
        lambda w, x: lax.while_loop(lambda c: c[0] < 6, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (2, x))[1],
        [floats(32, 32), floats(8, 32)],
        4 * 2 * 8 * 32 * 32,
    ),
    "dearest branch": (
        lambda p, w, x: lax.cond(p, lambda: jnp.tanh(x @ w @ w), lambda: x),
        [jax.ShapeDtypeStruct((), bool), floats(32, 32), floats(8, 32)],
        2 * 2 * 8 * 32 * 32,
    ),
    "convolution": (
        lambda x, w: lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")),
        [floats(2, 20, 3), floats(5, 3, 7)],
        2 * 2 * 16 * 5 * 3 * 7,
    ),
    "grouped": (
        lambda x, w: lax.conv_general_dilated(
            x, w, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=6
        ),
        [floats(2, 21, 6), floats(5, 1, 6)],
        2 * 2 * 9 * 5 * 6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_counted_as_often_as_they_run(name):
    function, arguments, expected = PRODUCTS[name]
    assert compiled(function, *arguments).matmul_flops() == expected
    if name != "counted loop":  # as a while loop, its count is in the compiled program only
        counted = matmul_flops(function, *arguments)
        assert (counted.count, counted.exact) == (expected, True)


@pytest.mark.parametrize("name", ["scan", "scan and its gradient", "scan in a scan", "counted loop"])
def test_counts_are_found_where_the_compiler_does_not_note_them(name):
    # As in programs for a TPU.
    function, arguments, expected = PRODUCTS[name]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    bare = re.sub(r',?"known_trip_count":\{[^}]*\}', "", text)
    assert bare != text
    assert Hlo(bare).exact
    assert Hlo(bare).matmul_flops() == expected


def test_a_loop_without_a_known_count_says_so():
    def function(w, x):
        return lax.while_loop(lambda x: jnp.sum(x) < 100.0, lambda x: jnp.tanh(x @ w) + 1, x)

    arguments = floats(32, 32), floats(8, 32)
    hlo, counted = compiled(function, *arguments), matmul_flops(function, *arguments)
    assert not hlo.exact
    assert not counted.exact
    assert hlo.matmul_flops() == counted.count == 2 * 8 * 32 * 32
    assert compiled(tower, floats(5, 32, 32), floats(8, 32)).exact


def test_flops_are_those_of_the_compilers_own_analysis_but_for_loops():
    def costs(function):
        step = jax.jit(function).lower(floats(5, 32, 32), floats(8, 32)).compile()
        return step.cost_analysis()["flops"], Hlo(step.as_text()).flops()

    def row(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w) * x + 1
        return x

    theirs_of_loop, loop = costs(lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w) * x + 1, None), x, w)[0])
    theirs, flat = costs(row)
    assert flat == pytest.approx(5 * (2 * 8 * 32 * 32 + 3 * 8 * 32), rel=0.1)
    assert flat == pytest.approx(theirs, rel=0.1)
    assert loop == pytest.approx(flat, rel=0.1)
    assert theirs_of_loop < theirs / 3


# What XLA wrote for an H100, shortened: products that cuBLAS and cuDNN do, and a slice that runs beside other work.
GPU = """HloModule gpu, is_scheduled=true

%slice (p: f32[5,16,16], k: s32[]) -> f32[1,16,16] {
  %p = f32[5,16,16]{2,1,0} parameter(0)
  %k = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = f32[1,16,16]{2,1,0} dynamic-slice(%p, %k, %zero, %zero), dynamic_slice_sizes={1,16,16}
}

ENTRY %main (a.1: f32[3,8,16], b.1: f32[3,16,4], x.1: f32[2,9,9,3], w.1: f32[6,3,3,3], s.1: f32[5,16,16], k.1: s32[]) -> f32[] {
  %a.1 = f32[3,8,16]{2,1,0} parameter(0)
  %b.1 = f32[3,16,4]{2,1,0} parameter(1)
  %x.1 = f32[2,9,9,3]{3,2,1,0} parameter(2)
  %w.1 = f32[6,3,3,3]{3,2,1,0} parameter(3)
  %s.1 = f32[5,16,16]{2,1,0} parameter(4), metadata={op_name="stack"}
  %k.1 = s32[] parameter(5)
  %fusion-start.1 = ((f32[5,16,16]{2,1,0}, s32[]), f32[1,16,16]{2,1,0}, u32[]) fusion-start(%s.1, %k.1), kind=kLoop, calls=%slice
  %cublas = (f32[3,8,4]{2,1,0}, s8[33554432]{0}) custom-call(%a.1, %b.1), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_batch_dimensions":["0"],"lhs_contracting_dimensions":["2"],"rhs_batch_dimensions":["0"],"rhs_contracting_dimensions":["1"]}}}
  %cudnn = (f32[2,7,7,6]{3,2,1,0}, u8[131]{0}) custom-call(%x.1, %w.1), window={size=3x3}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", backend_config={}
  %y = f32[2,7,7,6]{3,2,1,0} get-tuple-element(%cudnn), index=0
  %back = (f32[2,9,9,3]{3,2,1,0}, u8[131]{0}) custom-call(%y, %w.1), window={size=3x3}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput", backend_config={}
  %filter = (f32[6,3,3,3]{3,2,1,0}, u8[131]{0}) custom-call(%x.1, %y), window={size=3x3}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter", backend_config={}
  %fusion-done.1 = f32[1,16,16]{2,1,0} fusion-done(%fusion-start.1)
  ROOT %gather = f32[1,16,64]{2,1,0} all-gather(%fusion-done.1), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={2}
}
"""  # noqa: E501


def test_programs_of_a_gpu_with_its_libraries():
    hlo = Hlo(GPU, devices=4)
    convolution = 2 * 2 * 7 * 7 * 6 * 3 * 3 * 3
    assert hlo.matmul_flops() == 3 * 2 * 8 * 16 * 4 + 3 * convolution
    (gather,) = hlo.collectives()
    assert (gather.source, gather.bytes, gather.sent) == ("stack", 4 * 16 * 16 * 4, 3 * 16 * 16 * 4)


def test_what_nobody_uses_is_not_counted():
    @jax.jit
    def both(x, w):
        return x @ w, x @ w @ w

    counted = matmul_flops(lambda x, w: both(x, w)[0], floats(8, 32), floats(32, 32))
    assert counted.count == 2 * 8 * 32 * 32


def test_a_product_without_a_sum_is_not_a_matrix_product():
    def function(x, y):
        return jnp.einsum("a,bc->abc", x, y)

    arguments = floats(4), floats(3, 5)
    assert compiled(function, *arguments).matmul_flops() == matmul_flops(function, *arguments).count == 0


def test_padding_needs_no_arithmetic():
    # A window of five over eight places, padded by two: the outer windows see three and four of them.
    def function(x, w):
        return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    arguments, expected = (floats(1, 8, 3), floats(5, 3, 7)), 2 * 3 * 7 * (3 + 4 + 5 * 4 + 4 + 3)
    assert compiled(function, *arguments).matmul_flops() == matmul_flops(function, *arguments).count == expected


def test_the_gradient_of_a_strided_convolution_costs_what_the_convolution_does():
    def function(x, w):
        return jnp.sum(lax.conv_general_dilated(x, w, (3,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")) ** 2)

    arguments = floats(2, 30, 4), floats(3, 4, 8)
    once = 2 * 2 * 10 * 3 * 4 * 8
    assert compiled(jax.grad(function, argnums=(0, 1)), *arguments).matmul_flops() == 3 * once
    assert matmul_flops(jax.grad(function, argnums=(0, 1)), *arguments).count == 3 * once


def test_the_gradient_of_a_grouped_convolutions_kernel_costs_what_the_convolution_does():
    def function(w, x):
        options = {"dimension_numbers": ("NWC", "WIO", "NWC"), "feature_group_count": 6}
        return jnp.sum(lax.conv_general_dilated(x, w, (1,), "VALID", **options) ** 2)

    once = 2 * 2 * 17 * 5 * 6
    assert matmul_flops(jax.grad(function), floats(5, 1, 6), floats(2, 21, 6)).count == 2 * once


def test_what_is_computed_again_counts_again():
    def function(w, x):
        return jnp.sum(jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w))(x))

    arguments = floats(32, 32), floats(8, 32)
    plain = lambda w, x: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w))  # noqa: E731
    again, once = (matmul_flops(jax.value_and_grad(f), *arguments).count for f in (function, plain))
    # Forward two products, backward three.
    assert once == 5 * 2 * 8 * 32 * 32
    assert again == once + 2 * 2 * 8 * 32 * 32


def test_traffic_of_an_elementwise_operation_is_its_arrays():
    assert compiled(lambda x: jnp.sin(x) * 2 + 1, floats(2**18)).bytes() == 2 * 4 * 2**18
    assert compiled(lambda x: jnp.sin(x.astype(jnp.float32)), jax.ShapeDtypeStruct((2**18,), jnp.bfloat16)).bytes() == (
        (2 + 4) * 2**18
    )


def test_a_loop_moves_the_slices_of_a_stack_and_not_the_stack():
    gradient = jax.grad(lambda w, x: jnp.sum(tower(w, x)))
    moved = [compiled(gradient, floats(n, 128, 128), floats(4, 128)).bytes() for n in (8, 16, 32)]
    assert moved[2] - moved[1] == pytest.approx(2 * (moved[1] - moved[0]), rel=0.05)
    # Read forward and backward, their gradient made, added to the stack and the stack started at zero.
    assert moved[2] < 12 * 32 * 128 * 128 * 4


MESH = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("outer", "inner"))
N = 4 * 6 * 5 * 4  # bytes of what a device holds below
# kind, group, bytes, sent
EXCHANGES = {
    "psum": (lambda x: lax.psum(x, "inner"), "all-reduce", 4, N, N * 2 * 3 / 4),
    "psum over both": (lambda x: lax.psum(x, ("outer", "inner")), "all-reduce", 8, N, N * 2 * 7 / 8),
    "psum over the outer": (lambda x: lax.psum(x, "outer"), "all-reduce", 2, N, N),
    "gather": (lambda x: lax.all_gather(x, "inner", tiled=True), "all-gather", 4, 4 * N, 3 * N),
    "scatter": (lambda x: lax.psum_scatter(x, "inner", tiled=True), "reduce-scatter", 4, N, N * 3 / 4),
    "all to all": (lambda x: lax.all_to_all(x, "inner", 0, 1, tiled=True), "all-to-all", 4, N, N * 3 / 4),
    "ring": (
        lambda x: lax.ppermute(x, "inner", [(i, (i + 1) % 4) for i in range(4)]), "collective-permute", 8, N, N
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXCHANGES)
def test_exchanges_have_the_bytes_that_they_should(name):
    function, kind, group, bytes, sent = EXCHANGES[name]
    split = PartitionSpec(("outer", "inner"))
    spread = jax.shard_map(function, mesh=MESH, in_specs=split, out_specs=split, check_vma=False)
    x = jax.ShapeDtypeStruct((8 * 4, 6, 5), jnp.float32, sharding=NamedSharding(MESH, split))
    (found,) = compiled(spread, x).collectives()
    assert (found.kind, found.group, found.times, found.bytes, found.sent) == (kind, group, 1, bytes, sent)


def test_exchanges_in_a_loop_count_as_often_as_it_runs():
    def function(x):
        return lax.scan(lambda x, _: (jnp.tanh(lax.psum(x, "inner")), None), x, length=9)[0]

    split = PartitionSpec(("outer", "inner"))
    spread = jax.shard_map(function, mesh=MESH, in_specs=split, out_specs=split, check_vma=False)
    x = jax.ShapeDtypeStruct((8 * 4, 6, 5), jnp.float32, sharding=NamedSharding(MESH, split))
    (found,) = compiled(spread, x).collectives()
    assert (found.times, found.bytes) == (9, N)


def test_the_source_of_a_gather_is_named_through_a_loop():
    def function(weights, x):
        return tower(weights, x)

    weights = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32, sharding=NamedSharding(MESH, PartitionSpec(None, "inner")))
    x = jax.ShapeDtypeStruct((8, 32), jnp.float32, sharding=NamedSharding(MESH, PartitionSpec("outer")))
    whole = NamedSharding(MESH, PartitionSpec())

    def gathered(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ lax.with_sharding_constraint(w, whole)), None

        return lax.scan(layer, x, weights)[0]

    found = [c for c in compiled(gathered, weights, x).collectives() if c.kind == "all-gather" and c.source]
    assert {c.source for c in found} == {"weights"}
    assert sum(c.times * c.bytes for c in found) == 5 * 32 * 32 * 4


# The three ways in which XLA writes who takes part.
@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([4,2]T(1,0)) {'a'}", 4),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([4,2]T(1,0)) {'a','c'}", 8),
        ("{}", 8),
    ],
)
def test_groups(groups, size):
    text = f"""HloModule m
ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
}}
%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}
"""
    (found,) = Hlo(text, devices=8).collectives()
    assert found.group == size
