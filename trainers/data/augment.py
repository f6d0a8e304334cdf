"""Augmentation on the device: pure functions of a key and a batch, jitted, every example with its own draw."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

__all__ = ["jitter", "random_crop", "random_flip", "random_scale"]


@partial(jax.jit, static_argnames="padding")
def random_crop(key: Key[Array, ""], images: Shaped[Array, "B H W C"], *, padding: int) -> Shaped[Array, "B H W C"]:
    """Each image moved by up to `padding` pixels in both directions, zeros moving in: pad, then crop back."""
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)
    return jax.vmap(lambda x, c: jax.lax.dynamic_slice(x, (c[0], c[1], 0), images.shape[1:]))(padded, corners)


@jax.jit
def random_flip(key: Key[Array, ""], images: Shaped[Array, "B H W C"]) -> Shaped[Array, "B H W C"]:
    """Left and right exchanged in every other image, on average."""
    flip = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


@jax.jit
def jitter(
    key: Key[Array, ""], series: Float[Array, "B T N"], deviation: Float[Array, ""] | float = 0.03
) -> Float[Array, "B T N"]:
    """x + normal noise of that standard deviation, each value its own."""
    return series + deviation * jax.random.normal(key, series.shape, series.dtype)


@jax.jit
def random_scale(
    key: Key[Array, ""], series: Float[Array, "B T N"], deviation: Float[Array, ""] | float = 0.1
) -> Float[Array, "B T N"]:
    """x * (1 + normal noise of that standard deviation), one factor for each series and column."""
    batch, _, columns = series.shape
    return series * (1 + deviation * jax.random.normal(key, (batch, 1, columns), series.dtype))
