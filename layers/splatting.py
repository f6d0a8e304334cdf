"""Gaussian splatting without a rasteriser: project 3-D Gaussians and composite every one of them on every pixel.

Pixel centres lie at whole numbers: a principal point given in pixel edges needs -0.5. One view; `jax.vmap` for more.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

__all__ = [
    "composite_gaussians",
    "densify_gaussians",
    "gaussian_color",
    "gaussian_covariance",
    "gaussian_tiles",
    "project_gaussians",
    "project_gaussians_equirectangular",
    "spherical_harmonics",
]

HIGHEST = jax.lax.Precision.HIGHEST


def _rotation(quaternion: Array) -> Array:
    """(w, x, y, z) to a matrix, without normalising."""
    w, x, y, z = jnp.moveaxis(quaternion, -1, 0)
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]  # fmt: skip
    return jnp.stack(rows, -1).reshape(*quaternion.shape[:-1], 3, 3)


@partial(jax.jit, static_argnames=("normalize",))
def gaussian_covariance(
    scale: Float[Array, "*B 3"], quaternion: Float[Array, "*B 4"], *, normalize: bool = True
) -> Float[Array, "*B 3 3"]:
    """Sigma = R diag(s^2) R^T, R from the quaternion (w, x, y, z), normalised first or used as it is.

    A zero quaternion is the identity where it is normalised. Source: arXiv:2308.04079, equation 6; card
    ga_wireless_splat, Rendering (`normalize=False`).
    """
    wide = jnp.promote_types(scale.dtype, jnp.float32)
    s, q = scale.astype(wide), quaternion.astype(wide)
    if normalize:
        square = jnp.sum(jnp.square(q), -1, keepdims=True)
        q = jnp.where(square > 0, q / jnp.sqrt(jnp.where(square > 0, square, 1.0)), jnp.array([1.0, 0, 0, 0]))
    spread = _rotation(q) * s[..., None, :]
    return jnp.einsum("...ik,...jk->...ij", spread, spread, precision=HIGHEST).astype(scale.dtype)


def _splat(jacobian: Array, rotation: Array, covariance: Array, dilation: float) -> Array:
    """J R Sigma R^T J^T + dilation I."""
    to_pixels = jnp.einsum("nij,jk->nik", jacobian, rotation, precision=HIGHEST)
    flat = jnp.einsum("nij,njk,nlk->nil", to_pixels, covariance, to_pixels, precision=HIGHEST)
    return flat + dilation * jnp.eye(2)


def _camera(mean: Array, rotation: Array, translation: Array) -> Array:
    return jnp.einsum("ij,nj->ni", rotation, mean, precision=HIGHEST) + translation


@partial(jax.jit, static_argnames=("near", "dilation", "limit"))
def project_gaussians(
    mean: Float[Array, "N 3"],
    covariance: Float[Array, "N 3 3"],
    rotation: Float[Array, "3 3"],
    translation: Float[Array, " 3"],
    intrinsics: Float[Array, "3 3"],
    *,
    near: float = 0.2,
    dilation: float = 0.3,
    limit: tuple[float, float] | None = None,
) -> tuple[Float[Array, "N 2"], Float[Array, "N 2 2"], Float[Array, " N"], Bool[Array, " N"]]:
    """Pinhole projection, t = R mu + translation, p = (f_x x / z + c_x, f_y y / z + c_y): (p, Sigma_2D, z, visible).

    Sigma_2D = J R Sigma R^T J^T + `dilation` I with J the slope of p at t (EWA). Visible: z > `near`. `limit` bounds
    |x / z| and |y / z| inside J alone (3DGS: 1.3 times the half-field's tangents). R is world to camera, z forward, y
    down. Float32. Source: arXiv:2308.04079, equation 5; cards zorder_splat, opengaff.
    """
    point = _camera(*(v.astype(jnp.float32) for v in (mean, rotation, translation)))
    depth = point[:, 2]
    visible = depth > near
    z = jnp.where(visible, depth, 1.0)
    slope = jnp.where(visible[:, None], point[:, :2], 0.0) / z[:, None]
    k = intrinsics.astype(jnp.float32)
    center = jnp.einsum("ij,nj->ni", k[:2, :2], slope, precision=HIGHEST) + k[:2, 2]
    bounded = slope if limit is None else jnp.clip(slope, -jnp.array(limit), jnp.array(limit))
    # d(x / z, y / z) / d(x, y, z)
    unit = jnp.broadcast_to(jnp.eye(2), (*z.shape, 2, 2))
    jacobian = jnp.einsum("ij,njk->nik", k[:2, :2], jnp.concatenate([unit, -bounded[..., None]], -1) / z[:, None, None])
    flat = _splat(jacobian, rotation.astype(jnp.float32), covariance.astype(jnp.float32), dilation)
    return center, flat, depth, visible


@partial(jax.jit, static_argnames=("size", "near", "dilation"))
def project_gaussians_equirectangular(
    mean: Float[Array, "N 3"],
    covariance: Float[Array, "N 3 3"],
    rotation: Float[Array, "3 3"],
    translation: Float[Array, " 3"],
    size: tuple[int, int],
    *,
    near: float = 0.2,
    dilation: float = 0.3,
) -> tuple[Float[Array, "N 2"], Float[Array, "N 2 2"], Float[Array, " N"], Bool[Array, " N"]]:
    """Projection to longitude atan2(x, z) and latitude asin(y / r), image `size` (H, W): (p, Sigma_2D, r, visible).

    A coordinate v in [-1, 1] lands on pixel ((v + 1) S - 1) / 2; Gaussians do not wrap around at +-180 degrees.
    Visible: r > `near`. Float32, finite at the poles. Source: card ga_wireless_splat, Rendering.
    """
    point = _camera(*(v.astype(jnp.float32) for v in (mean, rotation, translation)))
    square = jnp.sum(jnp.square(point), -1)
    visible = square > near**2
    x, y, z = jnp.moveaxis(jnp.where(visible[:, None], point, jnp.array([0.0, 0.0, 1.0])), -1, 0)
    depth = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    flat_square = x * x + z * z
    # The longitude is undefined on the poles' axis; a bound on its radius keeps what is next to it finite.
    off_axis = flat_square > 1e-12
    x, z = jnp.where(off_axis, x, 0.0), jnp.where(off_axis, z, 1e-6)
    flat_square = x * x + z * z
    flat_radius = jnp.sqrt(flat_square)
    r_square = flat_square + y * y
    height, width = size
    turn = jnp.stack([jnp.arctan2(x, z) / jnp.pi, 2 * jnp.arctan2(y, flat_radius) / jnp.pi], -1)
    center = ((turn + 1) * jnp.array([width, height]) - 1) / 2
    zero = jnp.zeros_like(x)
    across = width / (2 * jnp.pi) * jnp.stack([z, zero, -x], -1) / flat_square[:, None]
    down = height / jnp.pi * jnp.stack([-x * y / flat_radius, flat_radius, -z * y / flat_radius], -1)
    jacobian = jnp.stack([across, down / r_square[:, None]], -2)
    flat = _splat(jacobian, rotation.astype(jnp.float32), covariance.astype(jnp.float32), dilation)
    return center, flat, depth, visible


@partial(jax.jit, static_argnames=("size", "tile"))
def gaussian_tiles(
    center: Float[Array, "N 2"], covariance: Float[Array, "N 2 2"], size: tuple[int, int], *, tile: int = 16
) -> tuple[Int[Array, "N 4"], Int[Array, " N"]]:
    """(left, top, right, bottom) of the tiles that a square of half-width r around each Gaussian meets, and r.

    r = ceil(3 sqrt(l)), l the larger eigenvalue, m + sqrt(max(0.1, m^2 - det)) with m half the trace. A rasteriser that
    works tile by tile leaves out what lies beyond, up to 1 % of a Gaussian's height. `size` (H, W). No slope. Source:
    card ga_wireless_splat, Rendering.
    """
    center, covariance = (jax.lax.stop_gradient(v.astype(jnp.float32)) for v in (center, covariance))
    a, b, c = covariance[:, 0, 0], covariance[:, 0, 1], covariance[:, 1, 1]
    middle = (a + c) / 2
    spread = jnp.sqrt(jnp.maximum(0.1, middle**2 - (a * c - b * b)))
    radius = jnp.ceil(3 * jnp.sqrt(jnp.maximum(middle + spread, middle - spread)))
    tiles = jnp.array([-(-size[1] // tile), -(-size[0] // tile)])
    # As C does it: rounded towards zero, which on the negative side the limits undo.
    low = jnp.clip(jnp.trunc((center - radius[:, None]) / tile), 0, tiles)
    high = jnp.clip(jnp.trunc((center + radius[:, None] + tile - 1) / tile), 0, tiles)
    return (jnp.concatenate([low, high], axis=1) * tile).astype(jnp.int32), radius.astype(jnp.int32)


@partial(jax.jit, static_argnames=("size", "max_alpha", "min_alpha", "min_transmittance", "chunk"))
def composite_gaussians(
    center: Float[Array, "N 2"],
    covariance: Float[Array, "N 2 2"],
    depth: Float[Array, " N"],
    opacity: Float[Array, " N"],
    features: Float[Array, "N C"],
    size: tuple[int, int],
    *,
    visible: Bool[Array, " N"] | None = None,
    bounds: Int[Array, "N 4"] | None = None,
    background: Float[Array, " C"] | None = None,
    max_alpha: float = 0.99,
    min_alpha: float = 1 / 255,
    min_transmittance: float = 1e-4,
    chunk: int = 1024,
) -> tuple[Float[Array, "H W C"], Float[Array, "H W"], Float[Array, "H W"]]:
    """F(p) = sum_i w_i f_i, w_i = a_i prod_{j<i} (1 - a_j), a_i = o_i exp(-d^T Sigma_i^-1 d / 2), by rising depth.

    Returns (F + T background, sum_i w_i, sum_i w_i depth_i), T the light that is left; divide by the second for means.
    a is cut at `max_alpha` (the gradient passes, as in 3DGS) and dropped below `min_alpha`; a pixel ends before T would
    fall below `min_transmittance`. Every Gaussian reaches every pixel, or those within its `bounds` (left, top, right,
    bottom; the last two excluded; see `gaussian_tiles`). Any C, same-depth ties by index.
    O(N H W), memory O(N `chunk` + H W C), backwards too. Source: arXiv:2308.04079, equations 2-4; cards opengaff,
    zorder_splat, ga_wireless_splat.
    """
    kind = features.dtype
    center, covariance, depth, opacity, features = (
        v.astype(jnp.float32) for v in (center, covariance, depth, opacity, features)
    )
    if visible is not None:
        opacity = jnp.where(visible, opacity, 0.0)
    order = jnp.argsort(depth, stable=True)
    center, covariance, depth, opacity, features = (v[order] for v in (center, covariance, depth, opacity, features))
    bounds = None if bounds is None else bounds[order]
    a, b, c = covariance[:, 0, 0], covariance[:, 0, 1], covariance[:, 1, 1]
    determinant = a * c - b * b
    solid = determinant > 0
    opacity, inverse = jnp.where(solid, opacity, 0.0), 1 / jnp.where(solid, determinant, 1.0)
    channels = jnp.concatenate([features, jnp.ones_like(depth)[:, None], depth[:, None]], -1)

    @jax.checkpoint
    def shade(pixels):
        dx, dy = (pixels[:, None, i] - center[None, :, i] for i in range(2))
        power = ((c * dx - b * dy) * dx + (a * dy - b * dx) * dy) * inverse / 2
        alpha = opacity * jnp.exp(-power)
        alpha = alpha + jax.lax.stop_gradient(jnp.minimum(alpha, max_alpha) - alpha)
        alpha = jnp.where(alpha >= min_alpha, alpha, 0.0)
        if bounds is not None:
            x, y = pixels[:, None, 0], pixels[:, None, 1]
            left, top, right, bottom = bounds.T
            alpha = jnp.where((x >= left) & (x < right) & (y >= top) & (y < bottom), alpha, 0.0)
        through = jnp.cumprod(1 - alpha, axis=1)
        before = jnp.concatenate([jnp.ones_like(through[:, :1]), through[:, :-1]], axis=1)
        weight = jnp.where(through >= min_transmittance, alpha * before, 0.0)
        return jnp.einsum("pn,nc->pc", weight, channels, precision=HIGHEST)

    height, width = size
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).reshape(-1, 2).astype(np.float32)
    pieces = -(-len(pixels) // chunk)
    if pieces == 1:
        image = shade(jnp.asarray(pixels))
    else:
        padded = np.pad(pixels, ((0, pieces * chunk - len(pixels)), (0, 0))).reshape(pieces, chunk, 2)
        image = jax.lax.map(shade, jnp.asarray(padded)).reshape(pieces * chunk, -1)[: len(pixels)]
    image = image.reshape(height, width, -1)
    color, weight, far = image[..., :-2], image[..., -2], image[..., -1]
    if background is not None:
        color = color + (1 - weight)[..., None] * background.astype(jnp.float32)
    return color.astype(kind), weight.astype(kind), far.astype(kind)


@jax.jit
def densify_gaussians(
    place: Float[Array, "N 3"],
    log_scale: Float[Array, "N 3"],
    quaternion: Float[Array, "N 4"],
    opacity: Float[Array, " N"],
    alive: Bool[Array, " N"],
    gradient: Float[Array, " N"],
    key: Key[Array, ""],
    *,
    extent: Float[Array, ""] | float = 1.0,
    threshold: Float[Array, ""] | float = 2e-4,
    dense_share: Float[Array, ""] | float = 0.01,
    min_opacity: Float[Array, ""] | float = 0.005,
) -> tuple[Int[Array, " N"], Float[Array, "N 3"], Float[Array, "N 3"], Bool[Array, " N"]]:
    """3DGS's adaptive density in N places, some of them empty: (whose attributes each place has, place, log scale,
    alive).

    Whoever is below `min_opacity` (in [0, 1], not a logit) dies. Whoever's mean `gradient` on screen reaches
    `threshold` is doubled: as it is where its largest scale is at most `dense_share` times `extent`, and else cut in
    two, each 1.6 times smaller and drawn from the Gaussian itself. Births take the empty places in order, the greatest
    gradients first; where none is left the others stay as they are. All other attributes follow by x[index]. Source:
    arXiv:2308.04079, section 5; card ga_wireless_splat, Model (densification).
    """
    count, number = len(alive), jnp.arange(len(alive))
    alive = alive & (opacity >= min_opacity)
    hot = alive & (gradient >= threshold)
    parents = jnp.argsort(jnp.where(hot, -gradient, jnp.inf), stable=True)
    free = jnp.argsort(alive, stable=True)
    granted = number < jnp.minimum(jnp.sum(hot), count - jnp.sum(alive))
    index = number.at[jnp.where(granted, free, count)].set(parents, mode="drop")
    doubled = jnp.zeros(count, bool).at[jnp.where(granted, parents, count)].set(True, mode="drop")
    cut = (doubled & (jnp.max(jnp.exp(log_scale), axis=-1) > dense_share * extent))[index, None]
    place, log_scale, quaternion = (x[index] for x in (place, log_scale, quaternion))
    unit = quaternion / jnp.maximum(jnp.linalg.norm(quaternion, axis=-1, keepdims=True), 1e-12)
    offset = jnp.exp(log_scale) * jax.random.normal(key, place.shape, place.dtype)
    drawn = place + jnp.einsum("nij,nj->ni", _rotation(unit), offset, precision=HIGHEST)
    alive = alive | jnp.zeros(count, bool).at[jnp.where(granted, free, count)].set(True, mode="drop")
    return index, jnp.where(cut, drawn, place), jnp.where(cut, log_scale - np.log(1.6), log_scale), alive


@partial(jax.jit, static_argnames=("degree",))
def spherical_harmonics(direction: Float[Array, "*B 3"], degree: int) -> Float[Array, "*B K"]:
    """The K = (degree + 1)^2 real spherical harmonics of unit vectors, degree 0 to 3, ordered (l, m) with m = -l .. l.

    Signs are 3DGS's: those with odd m carry a minus, Y_11 = -0.4886 x. Source: arXiv:2308.04079; card zorder_splat.
    """
    if degree not in (0, 1, 2, 3):
        raise ValueError(f"spherical_harmonics: degree {degree} is not one of 0, 1, 2, 3")
    x, y, z = jnp.moveaxis(direction.astype(jnp.promote_types(direction.dtype, jnp.float32)), -1, 0)
    xx, yy, zz = x * x, y * y, z * z
    basis = [(1, jnp.ones_like(x))]
    if degree > 0:
        basis += [(3, -y), (3, z), (3, -x)]
    if degree > 1:
        basis += [(15, x * y), (15, -y * z), (5 / 4, 2 * zz - xx - yy), (15, -x * z), (15 / 4, xx - yy)]
    if degree > 2:
        basis += [(35 / 8, -y * (3 * xx - yy)), (105, x * y * z), (21 / 8, -y * (4 * zz - xx - yy)),
                  (7 / 4, z * (2 * zz - 3 * xx - 3 * yy)), (21 / 8, -x * (4 * zz - xx - yy)),
                  (105 / 4, z * (xx - yy)), (35 / 8, -x * (xx - 3 * yy))]  # fmt: skip
    return jnp.stack([np.sqrt(norm / (4 * np.pi)) * value for norm, value in basis], -1).astype(direction.dtype)


@partial(jax.jit, static_argnames=("offset",))
def gaussian_color(
    coefficients: Float[Array, "*B K C"], direction: Float[Array, "*B 3"], *, offset: float = 0.5
) -> Float[Array, "*B C"]:
    """max(sum_k c_k Y_k(d) + offset, 0), d the normalised `direction` from camera to Gaussian; K = 1, 4, 9 or 16.

    The DC coefficient of a colour I is (I - 0.5) / 0.28209479. There is no upper bound. Source: arXiv:2308.04079;
    card ga_wireless_splat, Rendering; card zorder_splat, 4.
    """
    degree = {1: 0, 4: 1, 9: 2, 16: 3}.get(coefficients.shape[-2])
    if degree is None:
        raise ValueError(f"gaussian_color: {coefficients.shape[-2]} coefficients are not 1, 4, 9 or 16")
    wide = jnp.promote_types(coefficients.dtype, jnp.float32)
    direction = direction.astype(wide)
    square = jnp.sum(jnp.square(direction), -1, keepdims=True)
    unit = jnp.where(square > 0, direction / jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    basis = spherical_harmonics(unit, degree)
    color = jnp.einsum("...k,...kc->...c", basis, coefficients.astype(wide), precision=HIGHEST)
    return jnp.maximum(color + offset, 0).astype(coefficients.dtype)
