"""Small image functions: blur, Sobel, SSIM, morphology, Otsu's threshold, statistics transfer, density maps, arcs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

__all__ = [
    "adaptive_instance_norm",
    "dilate",
    "erode",
    "gaussian_blur",
    "gaussian_density_map",
    "match_color_statistics",
    "morphological_close",
    "morphological_open",
    "otsu_threshold",
    "sobel",
    "ssim",
    "von_mises_filters",
]

PADDINGS = {"zeros": "constant", "replicate": "edge", "reflect": "reflect"}
FOOTPRINTS = ("square", "ellipse")


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _filter(x: Array, axis: int, taps: np.ndarray, padding: str) -> Array:
    """Cross-correlation along one axis; `padding` "valid" keeps only what needs none."""
    if padding != "valid":
        before = (len(taps) - 1) // 2
        widths = [(0, 0)] * x.ndim
        widths[axis] = (before, len(taps) - 1 - before)
        x = jnp.pad(x, widths, mode=PADDINGS[padding])
    n = x.shape[axis] - len(taps) + 1
    return sum(float(tap) * jax.lax.slice_in_dim(x, k, k + n, axis=axis) for k, tap in enumerate(taps))


def _gaussian_taps(sigma: float, window: int) -> np.ndarray:
    distance = np.arange(window) - (window - 1) / 2
    taps = np.exp(-(distance**2) / (2 * sigma**2))
    return taps / taps.sum()


def _check_padding(function: str, padding: str, allowed: tuple):
    if padding not in allowed:
        raise ValueError(f"{function}: padding {padding!r} is not one of {', '.join(allowed)}")


@partial(jax.jit, static_argnames=("sigma", "window", "padding"))
def gaussian_blur(
    x: Float[Array, "B *size C"], *, sigma: float, window: int | None = None, padding: str = "reflect"
) -> Float[Array, "B *size C"]:
    """y = x * g along every spatial axis, g a normalised Gaussian of `window` taps (default 2 ceil(4 sigma) + 1).

    `sigma` in pixels. `padding` "zeros", "replicate", or "reflect" (the edge pixel once, as OpenCV does by default).
    O(window) a pixel and axis. Source: card dual_interval_motion, motion extraction.
    """
    _check_padding("gaussian_blur", padding, tuple(PADDINGS))
    taps = _gaussian_taps(sigma, 2 * int(np.ceil(4 * sigma)) + 1 if window is None else window)
    y = _wide(x)
    for axis in range(1, x.ndim - 1):
        y = _filter(y, axis, taps, padding)
    return y.astype(x.dtype)


@partial(jax.jit, static_argnames=("padding",))
def sobel(
    x: Float[Array, "B H W C"], *, padding: str = "replicate"
) -> tuple[Float[Array, "B H W C"], Float[Array, "B H W C"]]:
    """(x * [-1 0 1], [1 2 1] across) and the same downwards: the unscaled 3 x 3 slopes (d/dx, d/dy).

    A ramp of slope 1 gives 8. Source: card dual_path_dun, gradient prior; card wd_fqdet, gradient consistency.
    """
    _check_padding("sobel", padding, tuple(PADDINGS))
    slope, smooth = np.array([-1, 0, 1]), np.array([1, 2, 1])
    wide = _wide(x)
    across = _filter(_filter(wide, 2, slope, padding), 1, smooth, padding)
    down = _filter(_filter(wide, 1, slope, padding), 2, smooth, padding)
    return across.astype(x.dtype), down.astype(x.dtype)


@partial(jax.jit, static_argnames=("window", "sigma", "padding"))
def ssim(
    x: Float[Array, "B *size C"],
    y: Float[Array, "B *size C"],
    *,
    window: int = 11,
    sigma: float = 1.5,
    data_range: Float[Array, ""] | float = 1.0,
    padding: str = "zeros",
) -> Float[Array, " B"]:
    """Mean over pixels of (2 m_x m_y + c1)(2 s_xy + c2) / ((m_x^2 + m_y^2 + c1)(s_x^2 + s_y^2 + c2)), float32.

    Means m and (co)variances s under a Gaussian window; c1, c2 = (0.01, 0.03)^2 `data_range`^2. `padding` "zeros" as
    splatting codes do, or "valid" as the original. O(window) a pixel and axis. Source: card ga_wireless_splat,
    Training (Wang et al. 2004, equation 13); card opengaff, L_rgb.
    """
    _check_padding("ssim", padding, ("zeros", "valid"))
    taps, (x, y) = _gaussian_taps(sigma, window), (_wide(x), _wide(y))
    products = jnp.stack([x, y, x * x, y * y, x * y])
    for axis in range(2, products.ndim - 1):
        products = _filter(products, axis, taps, padding)
    mean_x, mean_y, xx, yy, xy = products
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    return jnp.mean(luminance * structure, axis=tuple(range(1, x.ndim)))


def _footprint(function: str, axes: int, window: int, shape: str) -> np.ndarray:
    if shape not in FOOTPRINTS:
        raise ValueError(f"{function}: shape {shape!r} is not one of {', '.join(FOOTPRINTS)}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"{function}: window {window} is not odd, so it has no centre")
    if shape == "square" or window == 1:
        return np.ones((window,) * axes, bool)
    # As OpenCV draws it: on each line, the half-width of the ellipse rounded to whole pixels.
    radius = window // 2
    offsets = np.stack(np.meshgrid(*[np.arange(-radius, radius + 1)] * axes, indexing="ij"))
    height = np.sqrt(np.maximum(radius**2 - np.sum(offsets[:-1] ** 2, axis=0), 0))
    return (np.sum(offsets[:-1] ** 2, axis=0) <= radius**2) & (np.abs(offsets[-1]) <= np.round(height))


def _dilate(x: Array, footprint: np.ndarray) -> Array:
    axes, reach = footprint.ndim, footprint.shape[0] // 2
    outside = False if x.dtype == bool else -jnp.inf
    wide = jnp.pad(x, ((0, 0), *((reach, reach),) * axes, (0, 0)), constant_values=outside)
    y = None
    for offset in np.argwhere(footprint):
        place = tuple(slice(o, o + n) for o, n in zip(offset, x.shape[1:-1], strict=True))
        part = wide[(slice(None), *place)]
        y = part if y is None else jnp.maximum(y, part)
    return y


def _erode(x: Array, footprint: np.ndarray) -> Array:
    return ~_dilate(~x, footprint) if x.dtype == bool else -_dilate(-x, footprint)


@partial(jax.jit, static_argnames=("window", "shape"))
def dilate(
    x: Float[Array, "B *size C"] | Bool[Array, "B *size C"], window: int, *, shape: str = "square"
) -> Float[Array, "B *size C"] | Bool[Array, "B *size C"]:
    """y_p = max of x over the footprint around p; what lies outside the image never wins.

    `shape` "square" or "ellipse" (OpenCV's; 3 is a cross), `window` odd, in pixels. O(window^d) a pixel.
    Source: card dual_interval_motion, motion extraction and MGA; card stepwise_breast, guidance loss.
    """
    return _dilate(x, _footprint("dilate", x.ndim - 2, window, shape))


@partial(jax.jit, static_argnames=("window", "shape"))
def erode(
    x: Float[Array, "B *size C"] | Bool[Array, "B *size C"], window: int, *, shape: str = "square"
) -> Float[Array, "B *size C"] | Bool[Array, "B *size C"]:
    """y_p = min of x over the footprint: `dilate` of the complement. Source: card dual_interval_motion, GMC."""
    return _erode(x, _footprint("erode", x.ndim - 2, window, shape))


@partial(jax.jit, static_argnames=("window", "shape"))
def morphological_open(
    x: Float[Array, "B *size C"] | Bool[Array, "B *size C"], window: int, *, shape: str = "square"
) -> Float[Array, "B *size C"] | Bool[Array, "B *size C"]:
    """Erosion, then dilation: specks smaller than the footprint go. Source: card dual_interval_motion."""
    footprint = _footprint("morphological_open", x.ndim - 2, window, shape)
    return _dilate(_erode(x, footprint), footprint)


@partial(jax.jit, static_argnames=("window", "shape"))
def morphological_close(
    x: Float[Array, "B *size C"] | Bool[Array, "B *size C"], window: int, *, shape: str = "square"
) -> Float[Array, "B *size C"] | Bool[Array, "B *size C"]:
    """Dilation, then erosion: holes smaller than the footprint fill. Source: card dual_interval_motion."""
    footprint = _footprint("morphological_close", x.ndim - 2, window, shape)
    return _erode(_dilate(x, footprint), footprint)


@partial(jax.jit, static_argnames=("bins",))
def otsu_threshold(
    values: Float[Array, "*B N"], *, bins: int = 256, mask: Bool[Array, "*B N"] | None = None
) -> Float[Array, "*B"]:
    """t / (bins - 1), t the first maximum of w_b w_f (m_b - m_f)^2 over a histogram of [0, 1]; keep values > it.

    Background b is bins 0 .. t, foreground f the rest. Values are clipped to [0, 1] (min-max normalise first); `mask`
    (True = counted) leaves some out; a single bin gives 0. Float32, no gradient, O(N + bins).
    Source: card realdiffusion, (5); card vggt4d, 1.
    """
    values = jax.lax.stop_gradient(values.astype(jnp.float32))
    place = jnp.clip(jnp.floor(jnp.clip(values, 0, 1) * bins), 0, bins - 1).astype(jnp.int32)
    counted = jnp.ones(values.shape, bool) if mask is None else mask
    flat, weight = place.reshape(-1, place.shape[-1]), counted.reshape(-1, place.shape[-1]).astype(jnp.int32)
    rows = jnp.arange(flat.shape[0])[:, None]
    # Whole numbers, so that empty bins leave the criterion exactly as it was and the first maximum is well defined.
    histogram = jnp.zeros((flat.shape[0], bins), jnp.int32).at[rows, flat].add(weight)
    back, moment = jnp.cumsum(histogram, -1), jnp.cumsum(histogram * jnp.arange(bins), -1)
    front = back[:, -1:] - back
    both = (back > 0) & (front > 0)
    gap = moment / jnp.maximum(back, 1) - (moment[:, -1:] - moment) / jnp.maximum(front, 1)
    between = jnp.where(both, back.astype(jnp.float32) * front.astype(jnp.float32) * jnp.square(gap), 0.0)
    return (jnp.argmax(between, -1).astype(jnp.float32) / (bins - 1)).reshape(values.shape[:-1])


def _standardise(x: Array, epsilon: float, correction: int) -> tuple[Array, Array, Array]:
    """x of mean 0 and deviation 1 over space; the mean and the deviation it had, (B, C)."""
    axes = tuple(range(1, x.ndim - 1))
    wide = _wide(x)
    mean = jnp.mean(wide, axis=axes, keepdims=True)
    count = max(np.prod([x.shape[a] for a in axes]) - correction, 1)
    deviation = jnp.sqrt(jnp.sum(jnp.square(wide - mean), axis=axes, keepdims=True) / count + epsilon)
    return (wide - mean) / deviation, jnp.squeeze(mean, axes), jnp.squeeze(deviation, axes)


def _restyle(x: Array, scale: Array, shift: Array) -> Array:
    space = (slice(None), *(None,) * (x.ndim - 2))
    return x * scale[space] + shift[space]


@partial(jax.jit, static_argnames=("epsilon",))
def adaptive_instance_norm(
    x: Float[Array, "B *size C"], scale: Float[Array, "B C"], shift: Float[Array, "B C"], *, epsilon: float = 1e-5
) -> Float[Array, "B *size C"]:
    """y = scale (x - mean) / sqrt(var + epsilon) + shift, statistics over the space of each instance and channel.

    The variance is the biased one. O(inputs). Source: arXiv:1703.06868, equation 8; card mamba_complete_3d, Model 7.
    """
    return _restyle(_standardise(x, epsilon, correction=0)[0], scale, shift).astype(x.dtype)


@partial(jax.jit, static_argnames=("epsilon", "correction"))
def match_color_statistics(
    x: Float[Array, "B *size C"],
    reference: Float[Array, "B *size_of_reference C"],
    *,
    epsilon: float = 1e-5,
    correction: int = 1,
) -> Float[Array, "B *size C"]:
    """y = (x - m_x) s_r / s_x + m_r: each channel takes mean and deviation of the reference image (AdaIN transfer).

    s = sqrt(var + epsilon), var over n - `correction` pixels. Nothing is clipped. O(inputs).
    Source: arXiv:1703.06868, equation 8; card magicbokeh, large images.
    """
    _, mean, deviation = _standardise(reference, epsilon, correction)
    return _restyle(_standardise(x, epsilon, correction)[0], deviation, mean).astype(x.dtype)


@partial(jax.jit, static_argnames=("size", "truncate"))
def gaussian_density_map(
    points: Float[Array, "B N 2"],
    sigma: Float[Array, "B #N"],
    size: tuple[int, int],
    *,
    mask: Bool[Array, "B N"] | None = None,
    truncate: float = 4.0,
) -> Float[Array, "B H W"]:
    """D = sum_n g_n, g_n a Gaussian of unit mass on the pixel that point n = (x, y) falls in: its sum counts points.

    `sigma` in pixels, for each point or for all; kernels end at `truncate` sigma (whole pixels) and are cut, not
    renormalised, at the border. Points outside the image or with `mask` False add nothing. No gradient in `points`.
    O(N (H + W) + N H W). Source: card csrnet_attention, Data.
    """
    height, width = size
    pixel = jnp.floor(points.astype(jnp.float32))
    inside = jnp.all((pixel >= 0) & (pixel < jnp.array([width, height])), axis=-1)
    inside = inside if mask is None else inside & mask
    sigma = jnp.broadcast_to(sigma.astype(jnp.float32), pixel.shape[:2])
    safe = jnp.where(sigma > 0, sigma, 1.0)
    radius = jnp.floor(truncate * safe + 0.5)[..., None]

    def profile(distance):
        return jnp.where(jnp.abs(distance) <= radius, jnp.exp(-jnp.square(distance / safe[..., None]) / 2), 0.0)

    mass = jnp.sum(profile(jnp.arange(-height - width, height + width + 1.0)), axis=-1, keepdims=True)
    across, down = (profile(jnp.arange(n) - pixel[..., i, None]) / mass for i, n in enumerate((width, height)))
    down = jnp.where(inside[..., None], down, 0.0)
    return jnp.einsum("bnh,bnw->bhw", down, across, precision=jax.lax.Precision.HIGHEST).astype(points.dtype)


@partial(jax.jit, static_argnames=("size", "radius", "concentration", "shift"))
def von_mises_filters(
    orientation: Float[Array, " K"],
    *,
    size: int,
    radius: float,
    concentration: float,
    shift: tuple[float, float],
) -> Float[Array, "K size size"]:
    """exp(concentration cos(phi - orientation)) / I_0(r - radius): an arc for each orientation (radians), unnormalised.

    r and phi are polar coordinates of x - size / 2 + shift_x cos(orientation) and size / 2 - y + shift_y
    sin(orientation) for column x and row y from 0: an even grid around a corner of the middle pixel, so that filters
    are no rotations of each other. I_0 is the modified Bessel function. Source: card neuromorphic_sign, von Mises
    filter bank.
    """
    wide = orientation.astype(jnp.promote_types(orientation.dtype, jnp.float32))
    cosine, sine = jnp.cos(wide)[:, None, None], jnp.sin(wide)[:, None, None]
    place = jnp.arange(size, dtype=wide.dtype) - size / 2
    x, y = place + shift[0] * cosine, -place[:, None] + shift[1] * sine
    r = jnp.hypot(x, y)
    # cos(phi - orientation); phi is 0 in the origin, as atan2 has it.
    along = jnp.where(r > 0, (x * cosine + y * sine) / jnp.where(r > 0, r, 1.0), cosine)
    apart = r - radius
    filters = jnp.exp(concentration * along - jnp.abs(apart)) / jax.scipy.special.i0e(apart)
    return filters.astype(orientation.dtype)
