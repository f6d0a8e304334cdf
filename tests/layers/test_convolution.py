"""The drop-in convolution against XLA's own: values, both gradients, and what is left to XLA."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import conv_general_dilated, convolution

KEYS = jax.random.split(jax.random.key(0), 3)
close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)

CASES = {  # size, window, strides, padding, dilation of the window
    "same": ((6, 5), (3, 3), (1, 1), ((1, 1), (1, 1)), None),
    "strided, uneven": ((7, 9), (3, 2), (2, 3), ((0, 2), (1, 0)), None),
    "dilated": ((8, 7), (3, 3), (1, 2), ((2, 2), (1, 1)), (2, 1)),
    "by name": ((7, 6), (4, 3), (2, 2), "SAME", (1, 2)),
    "one axis": ((11,), (5,), (2,), ((2, 2),), None),
    "three axes": ((4, 5, 3), (3, 2, 3), (1, 1, 1), ((1, 1),) * 3, None),
    "one pixel": ((5, 4), (1, 1), (2, 1), "VALID", None),
    "one pixel, padded": ((5, 4), (1, 1), (1, 1), ((1, 0), (0, 0)), None),
}


def drawn(size, window):
    return jax.random.normal(KEYS[0], (2, *size, 3)), jax.random.normal(KEYS[1], (*window, 3, 4))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_xla(name):
    size, window, strides, padding, dilation = CASES[name]
    arguments = drawn(size, window)
    names = convolution._channels_last(len(size))

    def outcome(convolve, x, kernel):
        apply = partial(
            convolve, window_strides=strides, padding=padding, rhs_dilation=dilation, dimension_numbers=names
        )
        y, back = jax.vjp(apply, x, kernel)
        return y, back(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))

    ours = jax.jit(partial(outcome, conv_general_dilated))
    expected = jax.jit(partial(outcome, jax.lax.conv_general_dilated))(*arguments)
    close(ours(*arguments), expected)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(ours, *half))} == {jnp.dtype(jnp.bfloat16)}
    if name == "same":
        with jax.disable_jit():
            close(outcome(conv_general_dilated, *arguments), expected)
        close(jax.tree.map(lambda a: a[0], jax.vmap(ours)(*(a[None] for a in arguments))), expected)
        chex.assert_trees_all_close(ours(*half)[1][1].astype(jnp.float32), expected[1][1], rtol=0.03, atol=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"feature_group_count": 3, "features": 6},
        {"kernel_size": (9, 9)},
        {"input_dilation": 2, "padding": 1},
        {"precision": "high"},
    ],
    ids=str,
)
def test_the_rest_is_left_to_xla(options, monkeypatch):
    x, options = drawn((9, 9), ())[0], {"features": 4, "kernel_size": (3, 3)} | options
    variables = nn.Conv(**options).init(KEYS[2], x)
    monkeypatch.setattr(convolution, "_convolve", None)  # whoever calls it fails
    close(
        nn.Conv(**options, conv_general_dilated=conv_general_dilated).apply(variables, x),
        nn.Conv(**options).apply(variables, x),
    )


def test_the_kernels_gradient_is_products_on_a_cpu_and_a_convolution_elsewhere():
    x, kernel = drawn((6, 5), (3, 3))

    def loss(kernel):
        return jnp.sum(conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))

    traced = jax.jit(jax.grad(loss)).trace(kernel)
    counts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.dot_general")
        for platform in ("cpu", "tpu", "cuda")
    }
    assert counts == {"cpu": 9, "tpu": 0, "cuda": 0}
    assert np.all(np.isfinite(jax.grad(lambda k: jnp.sum(jax.grad(loss)(k) * k))(kernel)))
