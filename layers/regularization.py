"""Dropout whose mask is cheap to draw and does not depend on how the array is sharded; gradients turned round."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt32

__all__ = ["dropout", "dropout_mask", "reverse_gradient"]


def _mix(bits: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A bijection of 32-bit words in which every input bit flips every output bit with probability about one half."""
    # Multiply-xorshift finaliser; constants of the "lowbias32" search by C. Wellons (public domain).
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


@partial(jax.jit, static_argnames=("shape", "rate"))
def dropout_mask(
    key: Key[Array, ""] | UInt32[Array, "2"], *, shape: tuple[int, ...], rate: float
) -> Bool[Array, "..."]:
    """Keep-mask with P(True) = 1 - rate, independent over positions: mix(position s0 + s1) >= rate 2^32.

    s0 (odd) and s1 are words drawn from `key`, mix is a 32-bit finaliser. A counter hashed once per element costs a
    dozen integer operations, where the generators behind `jax.random.bernoulli` cost about ten times more on CPU; being
    a function of the position alone it gives the same mask on any mesh. Meant for dropout, not for sampling.
    Source: ours.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"dropout_mask: rate {rate} is not a probability between 0 and 1")
    if rate == 0.0 or rate == 1.0:
        return jnp.full(shape, rate == 0.0)
    seeds = jax.random.bits(key, (2,), jnp.uint32)
    position = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        position = position + index * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    bits = _mix(position * (seeds[0] | 1) + seeds[1])
    return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


@partial(jax.jit, static_argnames=("rate",))
def dropout(
    x: Float[Array, "*shape"], key: Key[Array, ""] | UInt32[Array, "2"], *, rate: float
) -> Float[Array, "*shape"]:
    """y = x m / (1 - rate) with m the 0/1 mask of `dropout_mask`: zeroes a share `rate` of x and keeps its mean.

    `rate` 1 gives zeros. Source: Srivastava et al. 2014.
    """
    keep = dropout_mask(key, shape=x.shape, rate=rate)
    return jnp.where(keep, x / max(1.0 - rate, 1e-12), jnp.zeros_like(x))


@jax.custom_vjp
def reverse_gradient(x: Float[Array, "*shape"], factor: Float[Array, ""] | float) -> Float[Array, "*shape"]:
    """x itself, whose gradient is -factor times the one that comes back; `factor` gets none.

    Between features and a classifier of what they should not tell: it learns to tell, they learn not to. The plain
    alternative, (1 + factor) stop_gradient(x) - factor x, costs rounding. Source: arXiv:1409.7495, equation 10.
    """
    return x


def _reverse_forward(x, factor):
    return x, factor


def _reverse_backward(factor, dy):
    return (-factor * dy).astype(dy.dtype), jnp.zeros_like(factor)


reverse_gradient.defvjp(_reverse_forward, _reverse_backward)
