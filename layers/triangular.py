"""Triangular systems, solved by products of matrices."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["solve_lower"]


def _inverse_of_unit_lower(system):
    """(I + strictly lower part of the system)^-1, by blocks: [[A, 0], [C, B]]^-1 = [[A', 0], [-B' C A', B']].

    Products of matrices only, which every device is good at. LAPACK's batched solver is not an option on a CPU: two
    that run at once, as in a backward pass, wait for each other's threads for ever (seen with jax 0.10.2, 2 cores).
    """
    product = partial(jnp.matmul, precision="highest")
    size = system.shape[-1]
    if size <= 8:
        # The strictly lower part N is nilpotent: (I + N)^-1 = (I - N) (I + N^2) (I + N^4).
        one, power = jnp.eye(size, dtype=system.dtype), jnp.tril(system, -1)
        inverse = one - power
        for _ in range(max(size - 1, 1).bit_length() - 1):
            power = product(power, power)
            inverse = product(inverse, one + power)
        return inverse
    if size % 2:
        padded = jnp.pad(system, [(0, 0)] * (system.ndim - 2) + [(0, 1), (0, 1)])
        return _inverse_of_unit_lower(padded)[..., :size, :size]
    half = size // 2
    diagonal = jnp.stack([system[..., :half, :half], system[..., half:, half:]])
    first, second = _inverse_of_unit_lower(diagonal)
    corner = -product(second, product(system[..., half:, :half], first))
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)


@jax.custom_vjp
def _solve_unit_lower(system, sides):
    return _inverse_of_unit_lower(system) @ sides


def _solve_unit_lower_forward(system, sides):
    inverse = _inverse_of_unit_lower(system)
    solved = inverse @ sides
    return solved, (inverse, solved)


def _solve_unit_lower_backward(saved, d_solved):
    inverse, solved = saved
    d_sides = inverse.swapaxes(-1, -2) @ d_solved
    return jnp.tril(-d_sides @ solved.swapaxes(-1, -2), -1), d_sides


_solve_unit_lower.defvjp(_solve_unit_lower_forward, _solve_unit_lower_backward)


@partial(jax.jit, static_argnames=("unit_diagonal",))
def solve_lower(
    system: Float[Array, "*batch N N"], sides: Float[Array, "*batch N M"], *, unit_diagonal: bool = False
) -> Float[Array, "*batch N M"]:
    """x of L x = b, where L is the lower triangle of `system`; what stands above it is not read.

    With `unit_diagonal` the diagonal is not read either and counts as 1. L is inverted by blocks, which suits every
    device for systems of some hundred rows; float32 or float64. O(N^3 + N^2 M). Source: the inverse of a block
    triangular matrix.
    """
    if unit_diagonal:
        return _solve_unit_lower(system, sides)
    diagonal = jnp.diagonal(system, axis1=-2, axis2=-1)[..., None]
    return _solve_unit_lower(system / diagonal, sides / diagonal)
