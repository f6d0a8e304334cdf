"""Neighbourhood attention: blocks and dense form against loops in numpy, official numbers, locality, cost."""

from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.neighborhood import neighborhood_attention_1d, neighborhood_attention_2d, neighborhood_mask

KEYS = jax.random.split(jax.random.key(0), 5)
close = partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-5)


def tokens(*grid, heads=2, key_heads=2, width=3, batch=2):
    shapes = [(batch, *grid, h, width) for h in (heads, key_heads, key_heads)]
    return tuple(jax.random.normal(k, shape) for k, shape in zip(KEYS, shapes, strict=False))


def start(i, length, k):
    """NATTEN's rule, as the card states it."""
    left, right = k // 2, k // 2 + k % 2 - 1
    return max(i - left, 0) + (length - right - i - 1 if i + right >= length else 0)


def neighbours(i, length, k, d):
    members = range(i % d, length, d)
    first = start(i // d, len(members), k)
    return [members[p] for p in range(first, first + k)]


def loop(q, k, v, grid, kernel, dilation, bias, present):
    """Query by query; arrays are (B, *grid, H, D), kernel and dilation one number an axis."""
    q, k, v, bias = (np.asarray(x, np.float64) for x in (q, k, v, bias))
    output = np.zeros((*q.shape[:-1], v.shape[-1]))
    for place in np.ndindex(q.shape[0], *grid):
        b, query = place[0], place[1:]
        near = [neighbours(*axis) for axis in zip(query, grid, kernel, dilation, strict=True)]
        keys = [c for c in np.array(np.meshgrid(*near, indexing="ij")).reshape(len(grid), -1).T if present[(b, *c)]]
        for h in range(q.shape[-2]):
            scores = []
            for c in keys:
                offset = tuple((c - query) // dilation + np.array(kernel) - 1)
                scores.append(q[(*place, h)] @ k[(b, *c, h)] / np.sqrt(q.shape[-1]) + bias[(h, *offset)])
            if keys:
                weights = np.exp(scores - np.max(scores))
                output[(*place, h)] = sum(w * v[(b, *c, h)] for w, c in zip(weights, keys, strict=True)) / sum(weights)
    return output


@pytest.mark.parametrize(
    ("length", "kernel", "dilation"),
    [(7, 7, 1), (12, 5, 2), (100, 4, 1), (101, 3, 3), (1, 1, 1)],
)
@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_1d_is_the_loop_over_windows(length, kernel, dilation, implementation):
    q, k, v = tokens(length)
    bias = jax.random.normal(KEYS[3], (2, 2 * kernel - 1))
    present = jax.random.uniform(KEYS[4], (2, length)) > 0.4
    options = {"kernel_size": kernel, "dilation": dilation, "bias": bias, "implementation": implementation}
    output = neighborhood_attention_1d(q, k, v, token_mask=present, **options)
    close(output, loop(q, k, v, (length,), (kernel,), (dilation,), bias, np.asarray(present)))


@pytest.mark.parametrize(
    ("grid", "kernel", "dilation"), [((4, 5), 3, 1), ((9, 13), (3, 2), 1), ((7, 10), 3, (1, 2)), ((8, 8), 3, 2)]
)
@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_2d_is_the_loop_over_windows(grid, kernel, dilation, implementation):
    q, k, v = tokens(*grid)
    kernels, dilations = ((x, x) if isinstance(x, int) else x for x in (kernel, dilation))
    bias = jax.random.normal(KEYS[3], (2, *(2 * n - 1 for n in kernels)))
    present = jax.random.uniform(KEYS[4], (2, *grid)) > 0.4
    options = {"kernel_size": kernel, "dilation": dilation, "bias": bias, "implementation": implementation}
    output = neighborhood_attention_2d(q, k, v, token_mask=present, **options)
    close(output, loop(q, k, v, grid, kernels, dilations, bias, np.asarray(present)))


@pytest.mark.parametrize(("case", "kernel", "dilation"), [("na1d", 5, 1), ("na1d_dilated", 3, 3)])
def test_1d_equals_natten(case, kernel, dilation):
    # NATTEN 0.14.6's CPU kernels: projected input, table and result before the output projection.
    stored = np.load(Path(__file__).parent / "data" / "natten_1d.npz")
    qkv, bias = stored[f"{case}/qkv"], stored[f"{case}/rpb"]
    q, k, v = jnp.moveaxis(jnp.asarray(qkv).reshape(*qkv.shape[:2], 3, len(bias), -1), 2, 0)
    output = neighborhood_attention_1d(q, k, v, kernel_size=kernel, dilation=dilation, bias=jnp.asarray(bias))
    close(output.reshape(*output.shape[:2], -1), stored[f"{case}/context"].reshape(*output.shape[:2], -1))


@pytest.mark.parametrize("dilation", [1, 3])
def test_causal_windows_reach_back_only(dilation):
    length, kernel = 80, 4
    mask = neighborhood_mask(length, kernel, dilation=dilation, causal=True)
    distance = np.arange(length)[:, None] - np.arange(length)
    np.testing.assert_array_equal(mask, (distance >= 0) & (distance < kernel * dilation) & (distance % dilation == 0))
    q, k, v = tokens(length)
    options = {"kernel_size": kernel, "dilation": dilation, "causal": True}
    output = neighborhood_attention_1d(q, k, v, bias=jax.random.normal(KEYS[3], (2, 7)), **options)
    dense = neighborhood_attention_1d(
        q, k, v, bias=jax.random.normal(KEYS[3], (2, 7)), implementation="reference", **options
    )
    close(output, dense)
    assert neighborhood_attention_1d(q[:, :2], k[:, :2], v[:, :2], kernel_size=9, causal=True).shape == (2, 2, 2, 3)


@pytest.mark.parametrize(("length", "kernel", "dilation"), [(12, 5, 1), (13, 3, 4), (9, 4, 2)])
def test_every_query_has_exactly_kernel_keys(length, kernel, dilation):
    mask = neighborhood_mask(length, kernel, dilation=dilation)
    np.testing.assert_array_equal(mask.sum(1), kernel)
    for i in range(length):
        assert np.flatnonzero(mask[i]).tolist() == neighbours(i, length, kernel, dilation)


def test_only_window_members_influence_a_query():
    q, k, v = tokens(40, batch=1)
    jacobian = jax.jacobian(lambda v: jnp.sum(neighborhood_attention_1d(q, k, v, kernel_size=5), (2, 3))[0])(v)
    np.testing.assert_array_equal(np.abs(jacobian).sum((1, 3, 4)) > 0, neighborhood_mask(40, 5))


def test_a_window_over_everything_is_plain_attention():
    q, k, v = tokens(3, 5)
    expected = jax.nn.dot_product_attention(*(x.reshape(2, 15, 2, 3) for x in (q, k, v)))
    close(neighborhood_attention_2d(q, k, v, kernel_size=(3, 5)).reshape(2, 15, 2, 3), expected)


def test_key_heads_are_shared_by_query_heads():
    q, k, v = tokens(50, heads=4, key_heads=2)
    output = neighborhood_attention_1d(q, k, v, kernel_size=3)
    close(output, neighborhood_attention_1d(q, *(jnp.repeat(x, 2, 2) for x in (k, v)), kernel_size=3))


@pytest.mark.parametrize(
    ("function", "grid"), [(neighborhood_attention_1d, (70,)), (neighborhood_attention_2d, (8, 7))]
)
def test_gradients_are_those_of_the_dense_form_and_finite_without_keys(function, grid):
    present = jnp.ones((2, *grid), bool).at[:, :5].set(False)
    bias = jax.random.normal(KEYS[3], (2, *[5] * len(grid)))

    def loss(q, k, v, bias, implementation):
        options = {"kernel_size": 3, "bias": bias, "token_mask": present, "implementation": implementation}
        return jnp.sum(jnp.sin(function(q, k, v, **options)))

    gradients = [jax.grad(loss, (0, 1, 2, 3))(*tokens(*grid), bias, name) for name in ("reference", "blocked")]
    close(*gradients)
    chex.assert_tree_all_finite(gradients)
    assert not np.any(gradients[1][0][:, 0])
    assert not np.any(gradients[1][2][:, :5])


@pytest.mark.parametrize(
    ("function", "grid"), [(neighborhood_attention_1d, (70,)), (neighborhood_attention_2d, (8, 7))]
)
def test_bfloat16_vmap_and_eager(function, grid):
    arguments = tokens(*grid)
    run = partial(function, kernel_size=3)
    expected = run(*arguments)
    low = run(*(x.astype(jnp.bfloat16) for x in arguments))
    assert low.dtype == jnp.bfloat16
    chex.assert_trees_all_close(low.astype(jnp.float32), expected, atol=0.05)
    close(jax.vmap(run)(*(x[:, None] for x in arguments))[:, 0], expected)
    with jax.disable_jit():
        close(run(*arguments), expected)


def test_cost_grows_linearly_with_length():
    def flops(length):
        q = jnp.zeros((1, length, 2, 8))
        run = jax.jit(partial(neighborhood_attention_1d, kernel_size=7)).lower(q, q, q).compile()
        return run.cost_analysis()["flops"]

    assert 1.9 < flops(4096) / flops(2048) < 2.1
    assert flops(2048) < 2048 * 2048 * 2 * 8 / 10


def test_errors_name_the_argument():
    q, k, v = tokens(8)
    with pytest.raises(ValueError, match="kernel_size 5 times dilation 2 is not at most the length 8"):
        neighborhood_attention_1d(q, k, v, kernel_size=5, dilation=2)
    with pytest.raises(ValueError, match="kernel_size 0"):
        neighborhood_mask(4, 0)
    with pytest.raises(ValueError, match="implementation 'fast' is not one of reference, blocked"):
        neighborhood_attention_1d(q, k, v, kernel_size=3, implementation="fast")
    with pytest.raises(ValueError, match=r"bias of \(3,\) relative positions is not one of \(5,\)"):
        neighborhood_attention_1d(q, k, v, kernel_size=3, bias=jnp.zeros((2, 3)))
