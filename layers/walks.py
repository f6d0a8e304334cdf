"""Walks on graphs that run in continuous time: the quantum walk exp(-i t H) and the classical heat kernel exp(-t L)."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float, Inexact

__all__ = ["heat_kernel", "quantum_walk_probabilities", "quantum_walk_propagator", "walk_hamiltonian"]


def _adjoint(x):
    return jnp.conj(jnp.swapaxes(x, -1, -2))


# Unitarity is lost with factors rounded to bfloat16, as matrix units may.
_dot = partial(jnp.matmul, precision="highest")


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@partial(jax.jit, static_argnames=("normalize", "epsilon"))
def walk_hamiltonian(
    coupling: Float[Array, "*B N N"],
    potential: Float[Array, "*B N"] | None = None,
    *,
    strength: Float[Array, ""] | float = 1.0,
    node_mask: Bool[Array, "*B N"] | None = None,
    normalize: bool = True,
    epsilon: float = 1e-6,
) -> Float[Array, "*B N N"]:
    """H = strength (D - W) + diag(potential), W the symmetric part of `coupling`, D its row sums.

    `normalize` divides by the largest Gershgorin radius + epsilon, so that |H| <= 1 and times mean the same in every
    graph. Absent nodes (`node_mask` True = present) get rows and columns of 0: the walk leaves them where they are.
    O(N^2). Source: card ctqwformer, Mechanism 1.
    """
    wide = _wide(coupling)
    wide = (wide + jnp.swapaxes(wide, -1, -2)) / 2
    if node_mask is not None:
        wide = jnp.where(node_mask[..., :, None] & node_mask[..., None, :], wide, 0.0)
    diagonal = strength * jnp.sum(wide, axis=-1)
    if potential is not None:
        held = _wide(potential)
        diagonal = diagonal + (held if node_mask is None else jnp.where(node_mask, held, 0.0))
    hamiltonian = diagonal[..., None] * jnp.eye(wide.shape[-1], dtype=wide.dtype) - strength * wide
    if normalize:
        radius = jnp.max(jnp.sum(jnp.abs(hamiltonian), axis=-1), axis=-1)
        hamiltonian = hamiltonian / (radius[..., None, None] + epsilon)
    return hamiltonian.astype(coupling.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _exponential(rate, hermitian, times):
    """exp(rate t H) for every t, by eigenvectors."""
    values, vectors = jnp.linalg.eigh(hermitian, symmetrize_input=False)
    powers = jnp.exp(rate * times[:, None] * values[..., None, :])
    return _dot(vectors[..., None, :, :] * powers[..., None, :], _adjoint(vectors)[..., None, :, :])


@_exponential.defjvp
def _exponential_jvp(rate, primals, tangents):
    """Divided differences of exp between pairs of eigenvalues are smooth where the eigenvalues meet; eigenvectors,
    which plain differentiation would go through, are not."""
    hermitian, times = primals
    d_hermitian, d_times = tangents
    values, vectors = jnp.linalg.eigh(hermitian, symmetrize_input=False)
    left, right = vectors[..., None, :, :], _adjoint(vectors)[..., None, :, :]
    powers = jnp.exp(rate * times[:, None] * values[..., None, :])
    output = _dot(left * powers[..., None, :], right)
    time = times[:, None, None]
    middle = (values[..., None, :, None] + values[..., None, None, :]) / 2
    half = time * (values[..., None, :, None] - values[..., None, None, :]) / 2
    if isinstance(rate, complex):
        quotient = rate * time * jnp.exp(rate * time * middle) * jnp.sinc(half / jnp.pi)
    else:
        # sinh(h)/h with the growth of sinh put into the exponent: exp(-t min) stays finite where sinh does not.
        height = jnp.abs(half)
        safe = jnp.where(height > 1e-3, height, 1.0)
        ratio = jnp.where(height > 1e-3, -jnp.expm1(-2 * safe) / (2 * safe), jnp.exp(-height) * (1 + height**2 / 6))
        quotient = rate * time * jnp.exp(rate * time * middle + height) * ratio
    turned = _dot(_dot(right, d_hermitian.astype(output.dtype)[..., None, :, :]), left)
    d_output = _dot(_dot(left, quotient * turned), right)
    d_powers = rate * values[..., None, :] * powers * d_times[:, None]
    return output, d_output + _dot(left * d_powers[..., None, :], right)


def _evolve(function, rate, matrix, times, implementation):
    matrix = _wide(matrix)
    hermitian = (matrix + _adjoint(matrix)) / 2
    times = times.astype(hermitian.real.dtype)
    if implementation in (None, "eigh"):
        return _exponential(rate, hermitian, times)
    if implementation == "reference":
        return jax.scipy.linalg.expm(rate * times[:, None, None] * hermitian[..., None, :, :])
    raise ValueError(f"{function}: implementation {implementation!r} is not one of reference, eigh")


@partial(jax.jit, static_argnames=("implementation",))
def quantum_walk_propagator(
    hamiltonian: Inexact[Array, "*B N N"],
    times: Float[Array, " T"],
    *,
    implementation: str | None = None,
) -> Complex[Array, "*B T N N"]:
    """U_k = exp(-i t_k H) of the Hermitian part of `hamiltonian`, complex64: unitary, U(s) U(t) = U(s + t).

    implementation: "eigh" (default) diagonalises once for all times and has exact first derivatives whatever the
    eigenvalues, equal ones included; "reference" is a matrix exponential a time by scaling and squaring, with
    derivatives of every order, for |H| t below some 10^5. O(N^3 + T N^3). Source: card ctqwformer, Mechanism 2.
    """
    return _evolve("quantum_walk_propagator", -1j, hamiltonian, times, implementation)


@partial(jax.jit, static_argnames=("implementation",))
def quantum_walk_probabilities(
    hamiltonian: Inexact[Array, "*B N N"],
    times: Float[Array, " T"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*B T N N"]:
    """P_k[i, j] = |<i| exp(-i t_k H) |j>|^2: where a quantum walk that starts at j is found after time t_k.

    Doubly stochastic, and symmetric for a real Hamiltonian. An isolated node stays where it is. Implementations as in
    `quantum_walk_propagator`. O(T N^3). Source: card ctqwformer, Mechanism 2.
    """
    waves = _evolve("quantum_walk_probabilities", -1j, hamiltonian, times, implementation)
    return (jnp.square(waves.real) + jnp.square(waves.imag)).astype(hamiltonian.real.dtype)


@partial(jax.jit, static_argnames=("implementation",))
def heat_kernel(
    laplacian: Float[Array, "*B N N"], times: Float[Array, " T"], *, implementation: str | None = None
) -> Float[Array, "*B T N N"]:
    """K_k = exp(-t_k L) of the symmetric part of L: the classical walk in continuous time, doubly stochastic for D - A.

    Implementations as in `quantum_walk_propagator`. O(T N^3). Source: card ctqwformer, "Ablations".
    """
    return _evolve("heat_kernel", -1.0, laplacian, times, implementation).astype(laplacian.dtype)
