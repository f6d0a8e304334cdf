"""Boxes and regions: formats, IoU and its kin, non-maximum suppression, RoIAlign, masks pasted back.

A box is (lower corner, upper corner) of any dimension: spans (start, end), boxes (x1, y1, x2, y2), 3-D boxes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from layers.resampling import grid_sample

__all__ = ["box_iou", "convert_boxes", "non_maximum_suppression", "paired_box_iou", "paste_masks", "roi_align"]

FORMATS = ("corners", "corner_size", "center_size")
KINDS = ("iou", "giou", "diou", "ciou")


@partial(jax.jit, static_argnames=("source", "target"))
def convert_boxes(boxes: Float[Array, "*B S"], source: str, target: str) -> Float[Array, "*B S"]:
    """Between "corners" (x1, y1, x2, y2), "corner_size" (x1, y1, w, h) and "center_size" (cx, cy, w, h).

    For spans (start, end), (start, width), (centre, width), and for 3-D boxes alike. Source: card wd_fqdet, decoder;
    card demaformer, inference.
    """
    for name, value in (("source", source), ("target", target)):
        if value not in FORMATS:
            raise ValueError(f"convert_boxes: {name} {value!r} is not one of {', '.join(FORMATS)}")
    first, second = _halves("convert_boxes", boxes)
    low = first - second / 2 if source == "center_size" else first
    high = second if source == "corners" else low + second
    if target == "corners":
        return jnp.concatenate([low, high], -1)
    return jnp.concatenate([(low + high) / 2 if target == "center_size" else low, high - low], -1)


def _halves(function: str, boxes: Array) -> tuple[Array, Array]:
    if boxes.shape[-1] % 2:
        raise ValueError(f"{function}: boxes of {boxes.shape[-1]} numbers are not two corners")
    return tuple(jnp.split(boxes, 2, axis=-1))


def _ratio(x: Array, y: Array) -> Array:
    """x / y, and 0 with zero gradient where y is not positive."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1.0), 0.0)


def _overlap(function: str, kind: str, a: Array, b: Array) -> Array:
    if kind not in KINDS:
        raise ValueError(f"{function}: kind {kind!r} is not one of {', '.join(KINDS)}")
    wide = jnp.promote_types(a.dtype, jnp.float32)
    (low_a, high_a), (low_b, high_b) = (_halves(function, x.astype(wide)) for x in (a, b))
    if kind == "ciou" and a.shape[-1] != 4:
        raise ValueError(f"{function}: kind 'ciou' is not defined for boxes of {a.shape[-1]} numbers, only of 4")
    size_a, size_b = (jnp.maximum(high - low, 0) for low, high in ((low_a, high_a), (low_b, high_b)))
    shared = jnp.prod(jnp.maximum(jnp.minimum(high_a, high_b) - jnp.maximum(low_a, low_b), 0), -1)
    union = jnp.prod(size_a, -1) + jnp.prod(size_b, -1) - shared
    iou = _ratio(shared, union)
    if kind == "iou":
        return iou
    hull = jnp.maximum(high_a, high_b) - jnp.minimum(low_a, low_b)
    if kind == "giou":
        volume = jnp.prod(hull, -1)
        return iou - _ratio(volume - union, volume)
    offset = jnp.sum(jnp.square(low_a + high_a - low_b - high_b), -1) / 4
    iou_d = iou - _ratio(offset, jnp.sum(jnp.square(hull), -1))
    if kind == "diou":
        return iou_d

    def slope(size):
        width, height = size[..., 0], size[..., 1]
        flat = (width <= 0) & (height <= 0)
        return jnp.arctan2(width, jnp.where(flat, 1.0, height))

    aspect = 4 / np.pi**2 * jnp.square(slope(size_a) - slope(size_b))
    return iou_d - jax.lax.stop_gradient(_ratio(aspect, 1 - iou + aspect)) * aspect


@partial(jax.jit, static_argnames=("kind",))
def box_iou(a: Float[Array, "*B N S"], b: Float[Array, "*B M S"], *, kind: str = "iou") -> Float[Array, "*B N M"]:
    """|A and B| / |A or B| of every pair of boxes given by their corners; 0 where the union is empty.

    `kind` "giou" subtracts the share of the hull that neither covers, "diou" the squared distance of the centres over
    the hull's squared diagonal, "ciou" the aspect term as well (its weight is constant in the gradient; boxes of 4
    only). Spans, boxes or 3-D boxes. O(N M). Source: arXiv:1902.09630; arXiv:1911.08287, equations 7-11; card
    dual_interval_motion, Training; card wd_fqdet, Training.
    """
    return _overlap("box_iou", kind, a[..., :, None, :], b[..., None, :, :]).astype(a.dtype)


@partial(jax.jit, static_argnames=("kind",))
def paired_box_iou(a: Float[Array, "*B S"], b: Float[Array, "*B S"], *, kind: str = "iou") -> Float[Array, "*B"]:
    """`box_iou` of matched boxes, as losses need it: 1 - this. Source: arXiv:1911.08287; card dual_interval_motion."""
    return _overlap("paired_box_iou", kind, a, b).astype(a.dtype)


@partial(jax.jit, static_argnames=("max_outputs",))
def non_maximum_suppression(
    boxes: Float[Array, "*B N S"],
    scores: Float[Array, "*B N"],
    *,
    max_outputs: int,
    iou_threshold: Float[Array, ""] | float = 0.5,
    score_threshold: Float[Array, ""] | float | None = None,
    classes: Int[Array, "*B N"] | None = None,
    mask: Bool[Array, "*B N"] | None = None,
) -> tuple[Int[Array, "*B K"], Bool[Array, "*B K"]]:
    """Greedy NMS: take the best box left, drop all of IoU > `iou_threshold` with it, repeat: (index, valid).

    K = `max_outputs`, by falling score, ties by index; where `valid` is False nothing was left and the index is 0.
    Boxes are corners, spans (N, 2) give temporal NMS. With `classes` only boxes of one class suppress each other.
    Scores must exceed `score_threshold`; `mask` (True = present). O(K N), no gradient.
    Source: card dual_interval_motion, Training; card soft_attention_mask; card demaformer, inference.
    """
    boxes, scores = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (boxes, scores))
    alive = scores > -jnp.inf if score_threshold is None else scores > score_threshold
    alive = alive if mask is None else alive & mask

    def take(alive, _):
        best = jnp.argmax(jnp.where(alive, scores, -jnp.inf), axis=-1)
        valid = jnp.any(alive, axis=-1)
        chosen = jnp.take_along_axis(boxes, best[..., None, None], axis=-2)
        rivals = _overlap("non_maximum_suppression", "iou", chosen, boxes) > iou_threshold
        if classes is not None:
            rivals = rivals & (jnp.take_along_axis(classes, best[..., None], axis=-1) == classes)
        # The chosen box goes by its index: an empty one has no IoU, even with itself.
        itself = jnp.arange(scores.shape[-1]) == best[..., None]
        return alive & ~rivals & ~itself, (jnp.where(valid, best, 0), valid)

    _, (index, valid) = jax.lax.scan(take, alive, length=max_outputs)
    return jnp.moveaxis(index, 0, -1), jnp.moveaxis(valid, 0, -1)


def _roi_taps(low: Array, size: Array, bins: int, samples: int, extent: int) -> list[tuple[Array, Array]]:
    """For each sample of a bin, [(index, weight)] of the two pixels around it, (B, R, bins) each."""
    taps = []
    for k in range(samples):
        position = low[..., None] + (np.arange(bins) + (k + 0.5) / samples) * (size / bins)[..., None]
        inside = (position >= -1) & (position <= extent)
        position = jnp.clip(position, 0, extent - 1)
        first = jnp.floor(position)
        fraction = position - first
        for index, weight in ((first, 1 - fraction), (jnp.minimum(first + 1, extent - 1), fraction)):
            taps.append((index.astype(jnp.int32), jnp.where(inside, weight, 0.0) / samples))
    return taps


@partial(jax.jit, static_argnames=("size", "spatial_scale", "sampling_ratio", "aligned"))
def roi_align(
    x: Float[Array, "B H W C"],
    boxes: Float[Array, "B R 4"],
    size: int | tuple[int, int],
    *,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    aligned: bool = True,
    mask: Bool[Array, "B R"] | None = None,
) -> Float[Array, "B R h w C"]:
    """y_bin = mean of x, read bilinearly, at `sampling_ratio`^2 points of each of h x w bins of a box.

    torchvision's conventions: corners in input pixels times `spatial_scale`; `aligned` shifts by half a pixel (else
    boxes are at least 1 wide); points over 1 pixel outside give 0, others the border. The ratio is fixed, not
    ceil(box / size). Differentiable in the boxes too: with ratio 1 a soft crop. `mask` (True = present) zeroes boxes.
    O(R h w C ratio^2). Source: arXiv:1703.06870, section 3; card soft_attention_mask, Parity.
    """
    height, width = size if isinstance(size, tuple) else (size, size)
    if sampling_ratio < 1:
        raise ValueError(f"roi_align: sampling_ratio {sampling_ratio} is not a fixed number of samples, at least 1")
    batch, rows, columns, channels = x.shape
    corners = boxes.astype(jnp.float32) * spatial_scale - (0.5 if aligned else 0.0)
    low, high = _halves("roi_align", corners)
    extent = high - low if aligned else jnp.maximum(high - low, 1)
    down = _roi_taps(low[..., 1], extent[..., 1], height, sampling_ratio, rows)
    across = _roi_taps(low[..., 0], extent[..., 0], width, sampling_ratio, columns)
    flat = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(batch, rows * columns, channels)
    total = 0.0
    for row, row_weight in down:
        for column, weight in across:
            index = (row[..., :, None] * columns + column[..., None, :]).reshape(batch, -1, 1)
            read = jnp.take_along_axis(flat, index, axis=1).reshape(*row.shape, width, channels)
            total = total + read * (row_weight[..., :, None] * weight[..., None, :])[..., None]
    if mask is not None:
        total = jnp.where(mask[..., None, None, None], total, 0.0)
    return total.astype(x.dtype)


@partial(jax.jit, static_argnames=("size",))
def paste_masks(
    masks: Float[Array, "B R h w"], boxes: Float[Array, "B R 4"], size: tuple[int, int]
) -> Float[Array, "B R H W"]:
    """Each mask stretched over its box (corners in pixels) in an image of `size`, bilinear, 0 outside.

    Pixel centres lie at half numbers, so a box of the mask's own size at whole numbers copies it. Empty boxes give 0.
    O(R H W). Source: arXiv:1703.06870, section 3; card soft_attention_mask, SAME.
    """
    batch, count, h, w = masks.shape
    low, high = _halves("paste_masks", boxes.astype(jnp.float32))
    extent = high - low
    full = jnp.all(extent > 0, axis=-1)
    safe = jnp.where(extent > 0, extent, 1.0)
    axes = [
        (jnp.arange(n) + 0.5 - low[..., i, None]) / safe[..., i, None] * 2 - 1 for i, n in enumerate((size[1], size[0]))
    ]
    shape = (batch, count, *size)
    grid = jnp.stack(
        [jnp.broadcast_to(axes[0][..., None, :], shape), jnp.broadcast_to(axes[1][..., :, None], shape)], axis=-1
    )
    pasted = grid_sample(masks.reshape(batch * count, h, w, 1), grid.reshape(batch * count, *size, 2))
    return jnp.where(full[..., None, None], pasted.reshape(shape), 0.0).astype(masks.dtype)
