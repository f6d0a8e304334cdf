"""Plane-to-plane projective maps: estimated from matches, robustly too, applied to points and images."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from layers.resampling import sample_pixels

__all__ = ["homography_from_points", "project_points", "ransac_homography", "warp_homography"]


@jax.jit
def project_points(homography: Float[Array, "*B 3 3"], points: Float[Array, "*P N 2"]) -> Float[Array, "*P N 2"]:
    """(x', y') = (u, v) / w, (u, v, w) = H (x, y, 1); w = 0 is read as the smallest number, so results stay finite.

    H may have fewer leading axes than the points. Source: card dual_interval_motion, GMC.
    """
    wide = jnp.promote_types(points.dtype, jnp.float32)
    h, p = homography.astype(wide), points.astype(wide)
    image = jnp.einsum("...ij,...nj->...ni", h[..., :2], p, precision=jax.lax.Precision.HIGHEST) + h[..., None, :, 2]
    depth = image[..., 2:]
    safe = jnp.where(jnp.abs(depth) > 1e-12, depth, 1e-12)
    return (image[..., :2] / safe).astype(points.dtype)


def _normalisation(points: Array, weights: Array) -> tuple[Array, Array]:
    """Points about their weighted mean at a mean distance of sqrt(2), and the 3 x 3 map that does it."""
    total = jnp.maximum(jnp.sum(weights, -1), 1e-12)
    center = jnp.sum(points * weights[..., None], -2) / total[..., None]
    offset = points - center[..., None, :]
    square = jnp.sum(jnp.square(offset), -1)
    distance = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    mean = jnp.sum(distance * weights, -1) / total
    scale = jnp.sqrt(2.0) / jnp.where(mean > 0, mean, 1.0)
    zero, one = jnp.zeros_like(scale), jnp.ones_like(scale)
    x, y = -scale * center[..., 0], -scale * center[..., 1]
    transform = jnp.stack([scale, zero, x, zero, scale, y, zero, zero, one], -1)
    return offset * scale[..., None, None], transform.reshape(*scale.shape, 3, 3)


@jax.jit
def homography_from_points(
    source: Float[Array, "*B N 2"], target: Float[Array, "*B N 2"], weights: Float[Array, "*B N"] | None = None
) -> Float[Array, "*B 3 3"]:
    """H with target ~ H source: the normalised direct linear transform, least squares in h_33 = 1.

    Exact for 4 points of which no 3 are on a line. `weights` >= 0 (0 leaves a match out); with fewer than 4 left H is
    the identity with zero gradient. H is divided by its last entry. O(N). Source: card dual_interval_motion, GMC.
    """
    wide = jnp.promote_types(source.dtype, jnp.float32)
    source, target = source.astype(wide), target.astype(wide)
    weights = jnp.ones(source.shape[:-1], wide) if weights is None else weights.astype(wide)
    enough = jnp.sum(weights > 0, -1) >= 4
    (p, to_source), (q, to_target) = _normalisation(source, weights), _normalisation(target, weights)
    x, y = p[..., :1], p[..., 1:]
    one, zero = jnp.ones_like(x), jnp.zeros_like(x)
    rows = [[x, y, one, zero, zero, zero, -q[..., :1] * x, -q[..., :1] * y],
            [zero, zero, zero, x, y, one, -q[..., 1:] * x, -q[..., 1:] * y]]  # fmt: skip
    matrix = jnp.concatenate([jnp.concatenate(row, -1) for row in rows], -2)
    right = jnp.concatenate([q[..., 0], q[..., 1]], -1)
    positive = weights > 0
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, weights, 1.0)), 0.0)
    root = jnp.concatenate([root, root], -1)
    matrix = jnp.where(enough[..., None, None], matrix * root[..., None], jnp.eye(*matrix.shape[-2:]))
    # QR rather than the normal equations, which would square the condition number.
    basis, triangle = jnp.linalg.qr(matrix)
    answer = jnp.einsum("...ij,...i->...j", basis, right * root)
    solved = jax.scipy.linalg.solve_triangular(triangle, answer[..., None])[..., 0]
    normal = jnp.concatenate([solved, jnp.ones_like(solved[..., :1])], -1).reshape(*solved.shape[:-1], 3, 3)
    found = jnp.linalg.solve(to_target, normal @ to_source)
    found = found / jnp.where(jnp.abs(found[..., 2:, 2:]) > 1e-12, found[..., 2:, 2:], 1.0)
    return jnp.where(enough[..., None, None], found, jnp.eye(3)).astype(source.dtype)


@partial(jax.jit, static_argnames=("iterations",))
def ransac_homography(
    key: Key[Array, ""],
    source: Float[Array, "N 2"],
    target: Float[Array, "N 2"],
    *,
    threshold: Float[Array, ""] | float = 3.0,
    iterations: int = 500,
    mask: Bool[Array, " N"] | None = None,
) -> tuple[Float[Array, "3 3"], Bool[Array, " N"]]:
    """The map from 4 random matches that most matches agree with, refitted to those: (H, inliers).

    A match agrees when |H source - target| < `threshold` pixels. `mask` (True = present) leaves matches out.
    O(iterations N). Source: card dual_interval_motion, GMC (Fischler & Bolles 1981).
    """
    present = jnp.ones(source.shape[0], bool) if mask is None else mask
    noise = jax.random.uniform(key, (iterations, source.shape[0]))
    draws = jax.lax.top_k(jnp.where(present, noise, -1.0), 4)[1]
    maps = homography_from_points(source[draws], target[draws])
    everywhere = jnp.broadcast_to(source, (iterations, *source.shape))
    errors = jnp.sum(jnp.square(project_points(maps, everywhere) - target), -1)
    agree = (errors < threshold**2) & present
    inliers = agree[jnp.argmax(jnp.sum(agree, -1))]
    return homography_from_points(source, target, inliers.astype(source.dtype)), inliers


@partial(jax.jit, static_argnames=("size", "method", "padding"))
def warp_homography(
    x: Float[Array, "B H W C"],
    homography: Float[Array, "B 3 3"],
    *,
    size: tuple[int, int] | None = None,
    method: str = "linear",
    padding: str = "zeros",
) -> Float[Array, "B Ho Wo C"]:
    """y_p = x at H^-1 p: the image moved by H, which maps its pixels to those of the result (default: same `size`).

    Pixel centres are at whole numbers, as in OpenCV's warpPerspective; `method` and `padding` as in `sample_pixels`.
    Warp an image of ones to see what is valid. O(Ho Wo C). Source: card dual_interval_motion, GMC.
    """
    rows, columns = x.shape[1:3] if size is None else size
    grid = jnp.stack(jnp.meshgrid(jnp.arange(columns), jnp.arange(rows)), -1).astype(jnp.float32).reshape(-1, 2)
    inverse = jnp.linalg.inv(homography.astype(jnp.float32))
    position = project_points(inverse, jnp.broadcast_to(grid, (x.shape[0], *grid.shape)))
    return sample_pixels(x, position.reshape(-1, rows, columns, 2), method=method, padding=padding)
