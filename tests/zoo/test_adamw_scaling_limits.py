"""Scaling limits of AdamW: the explicit adjoint and update against JAX's and optax's, and what masks mean."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zoo.theory.adamw_scaling_limits import AdamW, Heads, _draw, _task, adjoint, flow_map, forward, shares, train

KEYS = jax.random.split(jax.random.key(1), 4)
SIZE = (5, 3)


@pytest.fixture(scope="module")
def network():
    with jax.enable_x64(True):
        yield _draw(KEYS[0], SIZE, 3), *_task(KEYS[1], 6, 3), shares(4, 2, SIZE)


def everyone(x):
    return jnp.ones((len(x), len(x)), bool)


def loss(heads, x, target, share):
    return jnp.mean(jnp.square(forward(heads, x, share, everyone(x))[-1] - target)) / 2


def test_the_adjoint_and_the_gradients_are_those_of_autodiff(network):
    heads, x, target, share = network
    states = forward(heads, x, share, everyone(x))
    last = (states[-1] - target) / target.size
    adjoints, gradients = adjoint(heads, states, last, share, everyone(x))
    wanted = jax.grad(loss, argnums=(0, 1))(heads, x, target, share)
    chex.assert_trees_all_close(adjoints[0], wanted[1], rtol=1e-10, atol=1e-12)
    # Times L H = 8; heads beyond the network's size have no gradient of the loss.
    used = (share > 0)[..., None, None]
    scaled = jax.tree.map(lambda g: g * used / 8, gradients)
    chex.assert_trees_all_close(scaled, wanted[0], rtol=1e-10, atol=1e-12)


def test_a_step_is_that_of_optax(network):
    heads, x, target, share = network
    adamw = AdamW()
    losses = train(heads, x, target, share, steps=3, adamw=adamw)[2]
    optimizer = optax.adamw(
        adamw.rate, adamw.decay_mean, adamw.decay_square, adamw.epsilon, weight_decay=adamw.weight_decay
    )
    state = optimizer.init(heads)
    for expected in losses:
        value, gradient = jax.value_and_grad(loss)(heads, x, target, share)
        np.testing.assert_allclose(value, expected, rtol=1e-9)
        updates, state = optimizer.update(jax.tree.map(lambda g: 8 * g, gradient), state, heads)
        heads = optax.apply_updates(heads, updates)


def test_blockwise_normalises_a_matrix_as_one(network):
    heads, x, target, share = network
    plain, blockwise = (
        train(heads, x, target, share, steps=1, adamw=AdamW(epsilon=1e-9, weight_decay=0.0), blockwise=b)[0]
        for b in (False, True)
    )
    chex.assert_trees_all_close(plain[0], blockwise[0])
    assert float(jnp.abs(plain[1] - blockwise[1]).max()) > 1e-3
    # With one entry a matrix is one number, and the two are the same.
    x, target = _task(KEYS[2], 4, 1)
    scalar = _draw(KEYS[3], SIZE, 1)
    both = [train(scalar, x, target, share, steps=2, blockwise=b)[0] for b in (False, True)]
    chex.assert_trees_all_close(*both, rtol=1e-12)


def test_only_the_share_decides_the_size(network):
    heads, x, _, share = network
    states = forward(heads, x, share, everyone(x))
    small = Heads(*(w[:4, :2] for w in heads))
    chex.assert_trees_all_close(forward(small, x, shares(4, 2, (4, 2)), everyone(x)), states[:5], rtol=1e-12)
    chex.assert_trees_all_equal(states[4], states[5])


def test_order_masks_and_particles_without_weight(network):
    heads, x, _, share = network
    states = forward(heads, x, share, everyone(x))
    order = jnp.array([3, 0, 5, 1, 2, 4])
    chex.assert_trees_all_close(forward(heads, x[order], share, everyone(x)), states[:, order], rtol=1e-10)
    causal = jnp.tril(everyone(x))
    changed = x.at[4:].add(1.0)
    first, second = (forward(heads, a, share, causal) for a in (x, changed))
    chex.assert_trees_all_equal(first[:, :4], second[:, :4])
    assert float(jnp.abs(first[-1, 4:] - second[-1, 4:]).max()) > 0.1
    # A particle that nobody sees leaves the others alone, and goes where the flow takes it.
    unseen = everyone(x).at[:, 5].set(False)
    part = forward(heads, x, share, unseen)
    alone = forward(heads, x[:5], share, everyone(x[:5]))
    chex.assert_trees_all_close(part[:, :5], alone, rtol=1e-12)
    chex.assert_trees_all_close(flow_map(heads, alone, x[5:], share)[0], part[-1, 5], rtol=1e-10)
