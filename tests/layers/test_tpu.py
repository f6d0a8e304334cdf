"""Primitives compile for TPUs without one, Pallas kernels included. Needs the `tpu` extra: `pytest -m tpu`."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # without it libtpu looks for a cloud machine's metadata server

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import layers
from trainers.layer_bench import CASES as BENCHMARKS
from trainers.layer_bench import gradient_of

B, L, H, D = 2, 256, 4, 128
TOKENS = (B, L, H, D)
CASES = {
    "attention": (layers.dot_product_attention, [TOKENS] * 3),
    "attention flash_tpu": (
        lambda *a: layers.dot_product_attention(*a, mask=layers.CausalMask(), implementation="flash_tpu"), [TOKENS] * 3
    ),
    "attention splash_tpu": (
        lambda *a: layers.dot_product_attention(
            *a, mask=layers.CausalMask() & layers.WindowMask(left=100), soft_cap=9.0, implementation="splash_tpu"
        ),
        [(B, L, H, 64), (B, L, 2, 64), (B, L, 2, D)],
    ),
    "attention splash_tpu odd": (
        lambda *a: layers.dot_product_attention(
            *a, mask=layers.LengthMask(jnp.array([77, 150])), implementation="splash_tpu"
        ),
        [(B, 200, H, 64), (B, 150, H, 64), (B, 150, H, 64)],
    ),
    "attention blocked": (lambda *a: layers.dot_product_attention(*a, implementation="blocked"), [TOKENS] * 3),
    "linear_attention": (lambda *a: layers.linear_attention(*a, causal=True), [TOKENS] * 3),
    "gated_linear_attention": (layers.gated_linear_attention, [*[TOKENS] * 3, (B, L, H)]),
    "delta_rule": (layers.delta_rule, [*[TOKENS] * 3, (B, L, H), (B, L, H)]),
    "neural_memory": (layers.neural_memory, [*[TOKENS] * 3, *[(B, L, H)] * 3]),
    "selective_scan": (layers.selective_scan, [(B, L, D), (B, L, D), (D, 16), (B, L, 16), (B, L, 16)]),
    "state_space_dual": (layers.state_space_dual, [TOKENS, (B, L, H), (H,), (B, L, 1, 16), (B, L, 1, 16)]),
    "linear_recurrence": (layers.linear_recurrence, [(B, L, D), (B, L, D)]),
}  # fmt: skip


# What is measured compiles in float32 below.
PAIRS = [(n, d) for n in CASES for d in (jnp.float32, jnp.bfloat16) if d == jnp.bfloat16 or n not in BENCHMARKS]


@pytest.mark.tpu
@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_forward_and_backward_compile(name, dtype):
    function, shapes = CASES[name]
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device)) for shape in shapes]
    loss = jax.grad(lambda *a: jnp.sum(function(*a).astype(jnp.float32)), argnums=tuple(range(len(shapes))))
    compiled = jax.jit(loss).lower(*arguments).compile()
    assert compiled.cost_analysis()["flops"] > 0
    if "_tpu" in name:
        assert "tpu_custom_call" in compiled.as_text()


SLOW = {"spectral_linear_attention"}


@pytest.mark.tpu
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in BENCHMARKS])
def test_every_measured_primitive_compiles(name):
    """Forward, and backward where there is one, of what `zoo bench layers` times."""
    case = BENCHMARKS[name]
    function, arguments = case.build(256)
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=SingleDeviceSharding(device)) for a in arguments]
    function = gradient_of(function, arguments) if case.gradient else function
    assert jax.jit(function).lower(*shapes).compile().memory_analysis().output_size_in_bytes > 0
