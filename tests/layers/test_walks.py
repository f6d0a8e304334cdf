"""Quantum and classical walks against closed forms and eigenvectors in float64."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from layers import graph, walks

RANDOM = np.random.default_rng(0)
close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


def draw(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


TIMES = jnp.array([0.0, 0.7, 1.4])
COMPLETE = jnp.ones((5, 5)) - jnp.eye(5)
HERMITIAN = (lambda a: jnp.asarray(a + a.conj().T))(
    (RANDOM.normal(size=(2, 4, 4)) + 1j * RANDOM.normal(size=(2, 4, 4))).astype(np.complex64)[0]
)
REAL = (lambda a: (a + jnp.swapaxes(a, -1, -2)) / 2)(draw(2, 4, 4))


@pytest.mark.parametrize("hamiltonian", [REAL, HERMITIAN, COMPLETE], ids=["real", "complex", "degenerate"])
def test_the_propagator_is_unitary_a_group_and_the_matrix_exponential(hamiltonian):
    ours = walks.quantum_walk_propagator(hamiltonian, TIMES)
    size = hamiltonian.shape[-1]
    close(ours @ jnp.swapaxes(ours.conj(), -1, -2), jnp.broadcast_to(jnp.eye(size, dtype=ours.dtype), ours.shape))
    close(ours[..., 1, :, :] @ ours[..., 1, :, :], ours[..., 2, :, :])
    values, vectors = np.linalg.eigh(np.asarray(hamiltonian, np.complex128))
    powers = np.exp(-1j * np.asarray(TIMES)[:, None] * values[..., None, :])
    expected = np.einsum("...ij,...tj,...kj->...tik", vectors, powers, vectors.conj())
    close(ours, expected.astype(np.complex64))


def test_the_reference_is_the_same_exponential():
    ours, reference = (walks.quantum_walk_propagator(REAL, TIMES, implementation=name) for name in (None, "reference"))
    close(ours, reference, atol=3e-5)


def test_quantum_walks_in_closed_form():
    pair = graph.graph_laplacian(jnp.array([[0.0, 1], [1, 0]]))
    close(walks.quantum_walk_probabilities(pair, TIMES)[:, 0, 1], jnp.sin(TIMES) ** 2)
    wave = np.exp(-4j * np.asarray(TIMES)) + 4 * np.exp(1j * np.asarray(TIMES))
    close(walks.quantum_walk_probabilities(COMPLETE, TIMES)[:, 2, 2], np.abs(wave / 5) ** 2)


def test_probabilities_are_doubly_stochastic_and_padding_stays_put():
    coupling, mask = jnp.abs(draw(2, 6, 6)), jnp.arange(6) < jnp.array([[6], [4]])
    hamiltonian = walks.walk_hamiltonian(coupling, draw(2, 6), strength=2.0, node_mask=mask)
    assert float(jnp.max(jnp.abs(jnp.linalg.eigvalsh(hamiltonian)))) <= 1.0 + 1e-5
    walk = walks.quantum_walk_probabilities(hamiltonian, TIMES)
    close(jnp.sum(walk, -1), jnp.ones((2, 3, 6)))
    close(walk, jnp.swapaxes(walk, -1, -2))
    close(walk[1, :, 4:], jnp.broadcast_to(jnp.eye(6)[4:], (3, 2, 6)))
    small = walks.walk_hamiltonian(coupling[1, :4, :4], normalize=False)
    big = walks.walk_hamiltonian(coupling[1], node_mask=mask[1], normalize=False)
    close(small, big[:4, :4])
    close(small, graph.graph_laplacian((coupling[1, :4, :4] + coupling[1, :4, :4].T) / 2 * (1 - 0 * jnp.eye(4))))


def test_heat_is_the_exponential_and_spreads_evenly():
    laplacian = graph.graph_laplacian(COMPLETE)
    ours = walks.heat_kernel(laplacian, TIMES)
    close(ours, walks.heat_kernel(laplacian, TIMES, implementation="reference"))
    close(ours[:, 0, 0], (1 + 4 * np.exp(-5 * np.asarray(TIMES))) / 5)
    assert jnp.all(jnp.isfinite(jax.grad(lambda a: jnp.sum(walks.heat_kernel(a, TIMES * 100) ** 2))(laplacian)))


@pytest.mark.parametrize("walk", [walks.quantum_walk_probabilities, walks.heat_kernel])
def test_gradients_are_those_of_the_matrix_exponential_even_where_eigenvalues_meet(walk):
    star = jnp.zeros((5, 5)).at[0].set(1.0).at[:, 0].set(1.0)
    matrices = jnp.stack([jnp.pad(REAL[0], (0, 1)), COMPLETE, jnp.zeros((5, 5)), star])
    weights = draw(4, 3, 5, 5)

    def loss(matrices, times, implementation):
        return jnp.sum(weights * walk(matrices, times, implementation=implementation))

    ours = jax.grad(loss, argnums=(0, 1))(matrices, TIMES, None)
    close(ours, jax.grad(loss, argnums=(0, 1))(matrices, TIMES, "reference"), rtol=1e-4, atol=2e-4)


def test_gradient_of_a_complex_hamiltonian():
    def loss(real, imaginary):
        waves = walks.quantum_walk_propagator(jax.lax.complex(real, imaginary), TIMES)
        return jnp.sum(jnp.sin(waves.real) + jnp.cos(2 * waves.imag))

    check_grads(loss, (HERMITIAN.real, HERMITIAN.imag), 1, modes=["rev"], eps=1e-2, rtol=2e-2, atol=1e-2)


def test_walk_errors():
    with pytest.raises(ValueError, match="implementation 'pade' is not one of"):
        walks.quantum_walk_propagator(COMPLETE, TIMES, implementation="pade")


# ---- every function: bfloat16, jit = eager, vmap ---------------------------------------------------------------------

SWEEP = {
    "probabilities": (
        lambda h: walks.quantum_walk_probabilities(walks.walk_hamiltonian(h), TIMES.astype(h.dtype)),
        (jnp.abs(REAL),),
    ),
    "heat": (lambda h: walks.heat_kernel(graph.graph_laplacian(h), TIMES.astype(h.dtype)), (jnp.abs(REAL),)),
}


@pytest.mark.parametrize("name", SWEEP)
def test_bfloat16_eager_and_vmap(name):
    function, arguments = SWEEP[name]
    expected = function(*arguments)
    with jax.disable_jit():
        close(function(*arguments), expected)
    half = jax.vmap(function)(*jax.tree.map(lambda x: jnp.stack([x, x * 0.5]).astype(jnp.bfloat16), arguments))[0]
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), expected, rtol=0.05, atol=0.05)
