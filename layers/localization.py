"""Local models: fit something simple around every target, with weights that fall off; attention is the local mean."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = [
    "epanechnikov_log_kernel",
    "gaussian_log_kernel",
    "hopfield_retrieve",
    "local_linear_regression",
    "local_mean",
    "mean_shift",
    "nearest_log_kernel",
    "reconstruction_weights",
]


def _square_distances(target, source):
    return jnp.sum(jnp.square(target[..., :, None, :] - source[..., None, :, :]), axis=-1)


@jax.jit
def gaussian_log_kernel(
    target: Float[Array, "*B T D"], source: Float[Array, "*B N D"], bandwidth: Float[Array, ""] | float
) -> Float[Array, "*B T N"]:
    """log K_tn = -|x_t - x_n|^2 / (2 h^2), `bandwidth` h in units of x. O(T N D). Source: card localization, 3."""
    return -_square_distances(target, source) / (2 * bandwidth**2)


@jax.jit
def epanechnikov_log_kernel(
    target: Float[Array, "*B T D"], source: Float[Array, "*B N D"], bandwidth: Float[Array, ""] | float
) -> Float[Array, "*B T N"]:
    """log K_tn = log max(1 - |x_t - x_n|^2 / h^2, 0): compact support, -inf beyond. Source: card localization, 3."""
    inside = 1 - _square_distances(target, source) / bandwidth**2
    return jnp.where(inside > 0, jnp.log(jnp.where(inside > 0, inside, 1.0)), -jnp.inf)


@partial(jax.jit, static_argnames=("neighbors",))
def nearest_log_kernel(
    target: Float[Array, "*B T D"], source: Float[Array, "*B N D"], *, neighbors: int
) -> Float[Array, "*B T N"]:
    """log K_tn = 0 for the k nearest sources of t, -inf for the others; ties go to the lower index.

    Source: card localization, 3.
    """
    if not 1 <= neighbors <= source.shape[-2]:
        raise ValueError(f"nearest_log_kernel: neighbors {neighbors} is not in 1..{source.shape[-2]}, the sources")
    index = jax.lax.top_k(-_square_distances(target, source), neighbors)[1]
    chosen = jnp.any(jax.nn.one_hot(index, source.shape[-2], dtype=bool), axis=-2)
    return jnp.where(chosen, 0.0, -jnp.inf)


def _wide(x):
    """float32, or float64 where that is what comes in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _weights(log_kernel):
    """Normalised kernel weights; zeros where the kernel vanishes everywhere."""
    wide = log_kernel.astype(_wide(log_kernel))
    top = jax.lax.stop_gradient(jnp.max(wide, axis=-1, keepdims=True))
    weights = jnp.exp(wide - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


@jax.jit
def local_mean(log_kernel: Float[Array, "*B T N"], value: Float[Array, "*B N M"]) -> Float[Array, "*B T M"]:
    """mu_t = sum_n K_tn y_n / sum_n K_tn (Nadaraya-Watson), from log K; 0 where no source is in reach.

    With log K = q.k / sqrt(d) it is softmax attention. O(T N M). Source: card localization, Mechanism 2.
    """
    return (_weights(log_kernel) @ value.astype(_wide(value))).astype(value.dtype)


@partial(jax.jit, static_argnames=("steps",))
def mean_shift(
    points: Float[Array, "*B T D"],
    source: Float[Array, "*B N D"],
    bandwidth: Float[Array, ""] | float,
    *,
    steps: int = 1,
) -> Float[Array, "*B T D"]:
    """x <- Gaussian local mean of the sources at x, `steps` times: climbs the kernel density of the sources.

    One step moves x by h^2 grad log p_h(x). O(steps T N D). Source: card localization, Mechanism 4c.
    """

    def step(_, points):
        return local_mean(gaussian_log_kernel(points, source, bandwidth), source).astype(points.dtype)

    return jax.lax.fori_loop(0, steps, step, points) if steps > 1 else step(0, points)


@partial(jax.jit, static_argnames=("steps",))
def hopfield_retrieve(
    state: Float[Array, "*B T D"],
    patterns: Float[Array, "*B N D"],
    beta: Float[Array, ""] | float,
    *,
    steps: int = 1,
) -> Float[Array, "*B T D"]:
    """x <- X^T softmax(beta X x), `steps` times: the modern Hopfield network with patterns X.

    The energy |x|^2 / 2 - logsumexp(beta X x) / beta never rises. O(steps T N D). Source: arXiv:2008.02217, equation 3.
    """

    def step(_, state):
        return local_mean(beta * (state @ jnp.swapaxes(patterns, -1, -2)), patterns).astype(state.dtype)

    return jax.lax.fori_loop(0, steps, step, state) if steps > 1 else step(0, state)


@jax.jit
def local_linear_regression(
    log_kernel: Float[Array, "*B T N"],
    target: Float[Array, "*B T D"],
    source: Float[Array, "*B N D"],
    value: Float[Array, "*B N M"],
    ridge: Float[Array, ""] | float = 1e-6,
) -> Float[Array, "*B T M"]:
    """Intercept of the weighted ridge fit y_n ~ a + b (x_n - x_t) around every target; `ridge` holds b alone.

    A huge ridge gives the local mean; small ones remove its bias at the border of the data. O(T N D^2 + T D^3).
    Source: card localization, Mechanism 4f.
    """
    weights = _weights(log_kernel)
    offsets = source[..., None, :, :] - target[..., :, None, :]
    features = jnp.concatenate([jnp.ones_like(offsets[..., :1]), offsets], axis=-1)
    gram = jnp.einsum("...tn,...tnd,...tne->...tde", weights, features, features)
    # A target that no source reaches has an empty system; the tiny number makes its answer 0.
    held = jnp.full(features.shape[-1], ridge).at[0].set(1e-30)
    empty = jnp.sum(weights, axis=-1)[..., None, None] == 0
    gram = gram + jnp.diag(held) + jnp.where(empty, jnp.eye(features.shape[-1]), 0.0)
    sides = jnp.einsum("...tn,...tnd,...nm->...tdm", weights, features, value.astype(_wide(value)))
    return jnp.linalg.solve(gram, sides)[..., 0, :].astype(value.dtype)


@jax.jit
def reconstruction_weights(
    target: Float[Array, "*B T D"], neighbors: Float[Array, "*B T K D"], ridge: Float[Array, ""] | float = 1e-3
) -> Float[Array, "*B T K"]:
    """argmin_w |x_t - sum_k w_k n_k|^2 with sum_k w_k = 1: the local weights of locally linear embedding.

    `ridge` is a share of the local Gram matrix's trace, needed where there are more neighbours than dimensions.
    O(T K^2 D + T K^3). Source: card localization, Mechanism 4g.
    """
    offsets = neighbors - target[..., None, :]
    gram = jnp.einsum("...kd,...ld->...kl", offsets, offsets)
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    # All neighbours on the target itself: any weights do, equal ones are given.
    gram = gram + jnp.where(trace > 0, ridge * trace, 1.0) * jnp.eye(gram.shape[-1])
    weights = jnp.linalg.solve(gram, jnp.ones_like(gram[..., :1]))[..., 0]
    return weights / jnp.sum(weights, axis=-1, keepdims=True)
