"""Spiking neurons against loops in numpy, and their gradients against the adjoint of the recursion."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers

KEY = jax.random.key(7)
CURRENT = 0.6 * jax.random.normal(KEY, (2, 9, 3)) + 0.2
START = jax.random.normal(jax.random.fold_in(KEY, 1), (2, 3))
DECAY, SLOPE = 0.9, 25.0


def leaky_loop(current, start, threshold=1.0):
    v, membranes = np.asarray(start, np.float64), []
    for i in np.moveaxis(np.asarray(current, np.float64), 1, 0):
        v = DECAY * v + i - threshold * (v > threshold)
        membranes.append(v)
    return np.stack(membranes, 1)


def count_loop(current, start, threshold=1.0):
    v, counts = np.asarray(start, np.float64), []
    for i in np.moveaxis(np.asarray(current, np.float64), 1, 0):
        v = DECAY * v + (1 - DECAY) * i
        counts.append(np.where(v > 0, np.trunc(v / threshold), 0))
        v = v - threshold * counts[-1]
    return np.stack(counts, 1), v


@pytest.mark.parametrize("threshold", [1.0, 0.7])
def test_leaky_neurons_are_the_recursion_with_its_reset_a_step_later(threshold):
    membranes = leaky_loop(CURRENT, START, threshold)
    options = {"decay": DECAY, "threshold": threshold, "initial_state": START, "return_state": True}
    spikes, state = layers.leaky_integrate_fire(CURRENT, **options)
    np.testing.assert_array_equal(spikes, membranes > threshold)
    np.testing.assert_allclose(state, membranes[:, -1], rtol=1e-5, atol=1e-6)
    assert 0 < spikes.mean() < 0.9
    # In two parts, by way of the state, and one recording alone.
    first, middle = layers.leaky_integrate_fire(CURRENT[:, :4], **options)
    second, last = layers.leaky_integrate_fire(CURRENT[:, 4:], **options | {"initial_state": middle})
    chex.assert_trees_all_equal(jnp.concatenate([first, second], 1), spikes)
    chex.assert_trees_all_close(last, state, atol=1e-6)
    alone = layers.leaky_integrate_fire(CURRENT[1:], **options | {"initial_state": START[1:], "return_state": False})
    chex.assert_trees_all_equal(alone, spikes[1:])


def test_its_gradient_is_the_adjoint_with_the_surrogate_and_without_the_reset():
    weight = jax.random.normal(jax.random.fold_in(KEY, 2), CURRENT.shape)

    def loss(current, start):
        return jnp.sum(weight * layers.leaky_integrate_fire(current, decay=DECAY, initial_state=start))

    found = jax.grad(loss, argnums=(0, 1))(CURRENT, START)
    membranes, adjoint, expected = leaky_loop(CURRENT, START), 0.0, []
    for t in reversed(range(CURRENT.shape[1])):
        surrogate = 1 / (1 + SLOPE * np.abs(membranes[:, t] - 1)) ** 2
        adjoint = np.asarray(weight[:, t]) * surrogate + DECAY * adjoint
        expected.append(adjoint)
    np.testing.assert_allclose(found[0], np.stack(expected[::-1], 1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[1], DECAY * adjoint, rtol=1e-4, atol=1e-6)


def test_the_surrogate_is_a_step_with_the_slope_of_a_fast_sigmoid():
    x = jnp.array([-2.0, -0.1, 0.0, 0.1, 2.0])
    assert layers.surrogate_spike(x).tolist() == [0, 0, 0, 1, 1]
    for slope in (25.0, 5.0):
        gradient = jax.vmap(jax.grad(lambda v, slope=slope: layers.surrogate_spike(v, slope=slope)))(x)
        np.testing.assert_allclose(gradient, 1 / (1 + slope * np.abs(x)) ** 2, rtol=1e-6)


def test_a_leaky_neuron_fires_more_the_more_it_gets_and_never_below_its_leak():  # card, Acceptance 2
    drive = jnp.array([0.05, 0.0999, 0.12, 0.2, 0.5, 0.9])
    current = jnp.broadcast_to(drive, (1, 200, 6))
    spikes, state = layers.leaky_integrate_fire(current, decay=DECAY, return_state=True)
    rates = np.asarray(spikes.mean(axis=(0, 1)))
    assert (rates[:2] == 0).all()  # drive below 1 - decay ends below the threshold
    assert (np.diff(rates[1:]) > 0).all()
    # What is more than a threshold a step is not kept for long: v <= I / (1 - decay).
    assert (np.abs(state) <= drive / (1 - DECAY) + 1e-5).all()


def test_counts_are_the_recursion_and_their_gradient_that_of_the_mean_drive():
    current = 20 * CURRENT
    counts, state = layers.integrate_and_count(current, decay=DECAY, initial_state=START, return_state=True)
    expected = count_loop(current, START)
    np.testing.assert_array_equal(counts, expected[0])
    np.testing.assert_allclose(state, expected[1], atol=1e-5)
    assert counts.max() > 2
    halves = layers.integrate_and_count(current, decay=DECAY, threshold=0.5, initial_state=START)
    np.testing.assert_array_equal(halves, count_loop(current, START, 0.5)[0])
    strong = 50 + 10 * CURRENT  # fires in each step: all that comes is counted at once
    gradient = jax.grad(lambda i: jnp.sum(layers.integrate_and_count(i, decay=DECAY)))(strong)
    np.testing.assert_allclose(gradient, 1 - DECAY, rtol=1e-5)


def test_low_precision_and_vmap():
    low = CURRENT.astype(jnp.bfloat16)
    for function in (layers.leaky_integrate_fire, layers.integrate_and_count):
        spikes = function(low, decay=DECAY)
        assert spikes.dtype == jnp.bfloat16
        chex.assert_trees_all_equal(spikes, function(low.astype(jnp.float32), decay=DECAY).astype(jnp.bfloat16))
        chex.assert_trees_all_equal(jax.vmap(lambda c: function(c[None], decay=DECAY)[0])(low), spikes)  # noqa: B023


def test_current_based_neurons_are_the_recursion():
    rng = np.random.default_rng(0)
    arriving = rng.uniform(0, 3, (40, 2, 5)) * (rng.random((40, 2, 5)) < 0.4)
    constants = {"membrane_decay": 0.92, "excitatory_decay": 0.8, "inhibitory_decay": 0.7, "resistance": 2.0}
    v, e, i, waiting, expected = np.zeros(5), np.zeros(5), np.zeros(5), np.zeros(5, int), []
    for excitatory, inhibitory in arriving:
        e, i = 0.8 * e + excitatory, 0.7 * i + inhibitory
        fired = np.zeros(5)
        for k in range(5):
            if waiting[k]:
                v[k], waiting[k] = 0.0, waiting[k] - 1
                continue
            v[k] += 0.08 * (2.0 * (e[k] - i[k]) - v[k])
            if v[k] >= 0.5:
                v[k], waiting[k], fired[k] = 0.0, 2, 1.0
        expected.append(fired)
    quiet = jnp.zeros(5)
    state = layers.CurrentBasedState(quiet, quiet, quiet, jnp.zeros(5, jnp.int32))
    found = []
    for excitatory, inhibitory in jnp.asarray(arriving, jnp.float32):
        state, spikes = layers.current_based_step(
            state, excitatory, inhibitory, **constants, threshold=0.5, refractory=2
        )
        found.append(spikes)
    np.testing.assert_array_equal(found, expected)
    assert 0 < np.sum(expected) < 100
    np.testing.assert_allclose(state.voltage, v, atol=1e-5)
