"""Circuits on state vectors against the Kronecker products of their gates, in float64."""

from functools import partial, reduce

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers

KEYS = jax.random.split(jax.random.key(5), 8)
PAULI = {
    "x": np.array([[0, 1], [1, 0]], complex),
    "y": np.array([[0, -1j], [1j, 0]]),
    "z": np.diag([1.0 + 0j, -1.0]),
}
close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=2e-6)


def rotation(angle, axis):
    return np.cos(angle / 2) * np.eye(2) - 1j * np.sin(angle / 2) * PAULI[axis]


def on_qubit(gate, qubit, count):
    return reduce(np.kron, [gate if i == qubit else np.eye(2) for i in range(count)])


def cnot(control, target, count):
    zero, one = np.diag([1.0, 0]), np.diag([0, 1.0])
    flip = [zero if i == control else np.eye(2) for i in range(count)]
    kept = [one if i == control else PAULI["x"] if i == target else np.eye(2) for i in range(count)]
    return reduce(np.kron, flip) + reduce(np.kron, kept)


def circuit(angles, axes, count):
    """The product over qubits of three rotations each, the first axis applied first."""
    matrix = np.eye(2**count)
    for qubit in range(count):
        for angle, axis in zip(angles[qubit], axes, strict=True):
            matrix = on_qubit(rotation(float(angle), axis), qubit, count) @ matrix
    return matrix


def ring(count):
    matrix = np.eye(2**count)
    for i in range(count if count > 2 else count - 1):
        matrix = cnot(i, (i + 1) % count, count) @ matrix
    return matrix


def some_state(count, batch=()):
    real, imaginary = jax.random.normal(KEYS[0], (2, *batch, 2**count))
    state = real + 1j * imaginary
    return (state / jnp.linalg.norm(state, axis=-1, keepdims=True)).astype(jnp.complex64)


def test_the_first_amplitude_of_the_zero_state_is_one():
    close(layers.zero_state(3), jnp.eye(8, dtype=jnp.complex64)[0])


@pytest.mark.parametrize("axis", "xyz")
def test_rotations_are_exponentials_of_pauli_matrices(axis):
    angles = jnp.array([0.0, 0.7, -2.0, jnp.pi])
    close(layers.rotation_gate(angles, axis=axis), np.stack([rotation(float(a), axis) for a in angles]))
    with pytest.raises(ValueError, match="axis 'w' is not one of x, y, z"):
        layers.rotation_gate(angles, axis="w")


@pytest.mark.parametrize("qubit", [0, 1, 2])
def test_a_gate_is_its_kronecker_product(qubit):
    state, gate = some_state(3, (2,)), layers.rotation_gate(jnp.array(0.9), axis="x")
    close(layers.apply_gate(state, gate, qubit=qubit), state @ on_qubit(np.asarray(gate), qubit, 3).T)
    with pytest.raises(ValueError, match=r"qubit 3 is not one of 0\.\.2"):
        layers.apply_gate(state, gate, qubit=3)
    with pytest.raises(ValueError, match="6 amplitudes is not one of whole qubits"):
        layers.apply_gate(state[:, :6], gate, qubit=0)


@pytest.mark.parametrize(("control", "target"), [(0, 1), (2, 0), (1, 2)])
def test_cnot_is_its_permutation(control, target):
    state = some_state(3)
    close(layers.apply_cnot(state, control=control, target=target), cnot(control, target, 3) @ np.asarray(state))
    close(layers.apply_cnot(layers.apply_cnot(state, control=0, target=1), control=0, target=1), state)
    with pytest.raises(ValueError, match="control 1 and target 1 are not two different qubits"):
        layers.apply_cnot(state, control=1, target=1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_layers_are_products_of_their_gates(count):
    state, angles = some_state(count), jax.random.normal(KEYS[1], (count, 3))
    close(layers.encoding_layer(state, angles), circuit(angles, "xyz", count) @ np.asarray(state))
    close(layers.entangling_layer(state, angles), ring(count) @ circuit(angles, "zyz", count) @ np.asarray(state))


def recurrence_loop(angles, weights, scales, state):
    count, states = angles.shape[-2], []
    for token in np.asarray(angles, np.float64):
        if scales is None:
            state = circuit(token, "xyz", count) @ state
        for i, weight in enumerate(np.asarray(weights, np.float64)):
            if scales is not None:
                state = circuit(token * np.asarray(scales[i], np.float64), "xyz", count) @ state
            state = ring(count) @ circuit(weight, "zyz", count) @ state
        states.append(state)
    return np.stack(states)


@pytest.mark.parametrize("reupload", [False, True])
def test_unitary_recurrence_is_its_loop_and_keeps_the_norm(reupload):
    angles, weights = jax.random.normal(KEYS[2], (2, 7, 3, 3)), jax.random.normal(KEYS[3], (2, 3, 3))
    scales = jax.random.normal(KEYS[4], (2, 3, 3)) if reupload else None
    initial = some_state(3, (2,))
    run = partial(layers.unitary_recurrence, encoding_scales=scales, return_state=True, renormalize_every=3)
    states, final = run(angles, weights, initial_state=initial)
    close(
        states,
        np.stack([recurrence_loop(a, weights, scales, np.asarray(s)) for a, s in zip(angles, initial, strict=True)]),
    )
    close(final, states[:, -1])
    close(jnp.linalg.norm(states, axis=-1), jnp.ones((2, 7)))
    first, middle = run(angles[:, :4], weights, initial_state=initial)
    close(jnp.concatenate([first, run(angles[:, 4:], weights, initial_state=middle)[0]], axis=1), states)


def test_unitary_recurrence_starts_from_zero_and_wants_weights_of_its_qubits():
    angles, weights = jax.random.normal(KEYS[2], (1, 2, 2, 3)), jax.random.normal(KEYS[3], (1, 2, 3))
    initial = jnp.broadcast_to(layers.zero_state(2), (1, 4))
    close(layers.unitary_recurrence(angles, weights), layers.unitary_recurrence(angles, weights, initial_state=initial))
    with pytest.raises(ValueError, match="weights are for 3 qubits, angles for 2"):
        layers.unitary_recurrence(angles, jnp.zeros((1, 3, 3)))


def test_the_memory_can_be_run_backwards():
    """Inverse circuits in reverse order give the first state back: nothing is lost."""
    angles, weights = jax.random.normal(KEYS[5], (1, 5, 2, 3)), jax.random.normal(KEYS[6], (1, 2, 3))
    state = np.asarray(layers.unitary_recurrence(angles, weights)[0, -1], complex)
    for token in np.asarray(angles[0])[::-1]:
        forward = ring(2) @ circuit(np.asarray(weights[0]), "zyz", 2) @ circuit(token, "xyz", 2)
        state = forward.conj().T @ state
    close(state, np.eye(4)[0].astype(complex), atol=1e-4)


def test_expectations_are_those_of_the_observables():
    state = some_state(3, (2,))
    z = [on_qubit(PAULI["z"], i, 3) for i in range(3)]
    observables = [*z, z[0] @ z[1], z[0] @ z[2], z[1] @ z[2]]
    s = np.asarray(state, complex)
    close(
        layers.pauli_z_expectations(state),
        np.stack([np.einsum("bi,ij,bj->b", s.conj(), o, s).real for o in observables], -1).astype(np.float32),
    )
    angles = jax.random.normal(KEYS[7], (2, 4, 3))
    expected = [
        [
            layers.pauli_z_expectations(
                jnp.asarray(reduce(np.kron, [rotation(float(a), "y") for a in q]) @ s[b], jnp.complex64)
            )
            for q in angles[b]
        ]
        for b in range(2)
    ]
    close(layers.query_observables(state, angles), jnp.array(expected))


def test_gradients_are_finite_differences():
    weights = jax.random.normal(KEYS[3], (1, 2, 3))

    def loss(angles, weights):
        states = layers.unitary_recurrence(angles, weights)
        return jnp.sum(jnp.sin(layers.pauli_z_expectations(states)))

    angles = jax.random.normal(KEYS[2], (1, 3, 2, 3))
    for i, argument in enumerate((angles, weights)):
        gradient = jax.grad(loss, argnums=i)(angles, weights)
        direction = jax.random.normal(KEYS[4], argument.shape)
        shifted = [
            (angles + e * direction, weights) if i == 0 else (angles, weights + e * direction) for e in (1e-2, -1e-2)
        ]
        slope = (loss(*shifted[0]) - loss(*shifted[1])) / 2e-2
        assert abs(slope - jnp.vdot(gradient, direction)) < 2e-3


def test_vmap_and_eager_agree():
    angles, weights = jax.random.normal(KEYS[2], (2, 3, 2, 3)), jax.random.normal(KEYS[3], (1, 2, 3))
    whole = layers.unitary_recurrence(angles, weights)
    close(jax.vmap(lambda a: layers.unitary_recurrence(a[None], weights)[0])(angles), whole)
    with jax.disable_jit():
        close(layers.unitary_recurrence(angles[:, :1], weights), whole[:, :1])
