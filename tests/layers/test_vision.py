"""Boxes, regions and small image functions against loops in numpy; homographies against the maps they come from."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from layers import homography, images, roi

KEYS = jax.random.split(jax.random.key(4), 12)
normal, uniform = jax.random.normal, jax.random.uniform
close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)
IMAGE = normal(KEYS[0], (2, 9, 11, 2))


def random_boxes(key, shape, extent=10.0):
    low, size = uniform(key, (2, *shape, 2), maxval=extent / 2)
    return jnp.concatenate([low, low + size], -1)


A, B = random_boxes(KEYS[1], (2, 6)), random_boxes(KEYS[2], (2, 6))

# ---- boxes -----------------------------------------------------------------------------------------------------------


def overlap_loop(a, b, kind):
    """From the papers' definitions, for one pair of boxes."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    size_a, size_b = (a[2] - a[0], a[3] - a[1]), (b[2] - b[0], b[3] - b[1])
    union = size_a[0] * size_a[1] + size_b[0] * size_b[1] - shared
    iou = shared / union
    hull = (max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1]))
    if kind == "iou":
        return iou
    if kind == "giou":
        return iou - (hull[0] * hull[1] - union) / (hull[0] * hull[1])
    offset = ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2
    diou = iou - offset / (hull[0] ** 2 + hull[1] ** 2)
    if kind == "diou":
        return diou
    v = 4 / np.pi**2 * (np.arctan(size_a[0] / size_a[1]) - np.arctan(size_b[0] / size_b[1])) ** 2
    return diou - v / (1 - iou + v) * v


@pytest.mark.parametrize("kind", roi.KINDS)
def test_iou_of_every_kind_is_its_definition(kind):
    expected = np.array([[[overlap_loop(p, q, kind) for q in B[i]] for p in A[i]] for i in range(2)])
    close(roi.box_iou(A, B, kind=kind), jnp.asarray(expected, jnp.float32))
    close(roi.paired_box_iou(A, B, kind=kind), jnp.diagonal(jnp.asarray(expected, jnp.float32), axis1=1, axis2=2))
    close(roi.paired_box_iou(A, A, kind=kind), jnp.ones((2, 6)))


@pytest.mark.parametrize("kind", ["iou", "giou", "diou"])
def test_gradients_of_iou(kind):
    check_grads(partial(roi.paired_box_iou, kind=kind), (A[0], B[0]), order=1, modes=["rev"], rtol=5e-2, atol=5e-2)


def test_the_weight_of_the_aspect_term_is_constant_in_the_gradient():
    a, b = A[0, 0], B[0, 0]
    iou = roi.paired_box_iou(a, b)

    def aspect(box):
        angles = [jnp.arctan((x[2] - x[0]) / (x[3] - x[1])) for x in (box, b)]
        return 4 / jnp.pi**2 * (angles[0] - angles[1]) ** 2

    alpha = aspect(a) / (1 - iou + aspect(a))
    by_hand = jax.grad(lambda x: roi.paired_box_iou(x, b, kind="diou") - alpha * aspect(x))(a)
    close(jax.grad(lambda x: roi.paired_box_iou(x, b, kind="ciou"))(a), by_hand)


@pytest.mark.parametrize("kind", roi.KINDS)
def test_empty_and_equal_boxes_have_finite_values_and_gradients(kind):
    empty, box = jnp.array([1.0, 1.0, 1.0, 1.0]), jnp.array([0.0, 0.0, 2.0, 2.0])
    for pair in ((empty, empty), (empty, box), (box, box)):
        value, slopes = jax.value_and_grad(partial(roi.paired_box_iou, kind=kind), argnums=(0, 1))(*pair)
        assert jnp.isfinite(value)
        assert all(jnp.all(jnp.isfinite(s)) for s in slopes)
    assert roi.paired_box_iou(empty, empty) == 0


def test_spans_and_solids_are_boxes_too():
    close(roi.box_iou(jnp.array([[0.0, 2.0]]), jnp.array([[1.0, 3.0], [5.0, 6.0]])), jnp.array([[1 / 3, 0.0]]))
    cube = jnp.array([[0.0, 0, 0, 1, 1, 1]])
    close(roi.box_iou(cube, cube + jnp.array([0.5, 0, 0] * 2), kind="giou"), jnp.array([[1 / 3]]))


def test_box_formats_are_inverse_to_each_other():
    for source in roi.FORMATS:
        for target in roi.FORMATS:
            there = roi.convert_boxes(A, source, target)
            close(roi.convert_boxes(there, target, source), A)
    close(roi.convert_boxes(jnp.array([2.0, 3.0, 2.0, 4.0]), "center_size", "corners"), jnp.array([1.0, 1.0, 3.0, 5.0]))
    close(roi.convert_boxes(jnp.array([1.0, 4.0]), "corners", "center_size"), jnp.array([2.5, 3.0]))


def test_boxes_name_what_is_wrong():
    with pytest.raises(ValueError, match="source 'xyxy' is not one of corners, corner_size, center_size"):
        roi.convert_boxes(A, "xyxy", "corners")
    with pytest.raises(ValueError, match="boxes of 3 numbers are not two corners"):
        roi.convert_boxes(jnp.ones(3), "corners", "center_size")
    with pytest.raises(ValueError, match="kind 'siou' is not one of iou, giou, diou, ciou"):
        roi.box_iou(A, B, kind="siou")
    with pytest.raises(ValueError, match="kind 'ciou' is not defined for boxes of 2 numbers"):
        roi.box_iou(A[..., :2], B[..., :2], kind="ciou")


# ---- suppression -----------------------------------------------------------------------------------------------------


def greedy_nms(boxes, scores, threshold, classes=None):
    iou = np.asarray(roi.box_iou(boxes, boxes), np.float64)
    left, kept = list(np.argsort(-np.asarray(scores), kind="stable")), []
    while left:
        best = left.pop(0)
        kept.append(int(best))
        left = [i for i in left if iou[best, i] <= threshold or (classes is not None and classes[i] != classes[best])]
    return kept


CROWD = random_boxes(KEYS[3], (2, 20), extent=6.0)
# Scores with ties.
CROWD_SCORES = jnp.round(uniform(KEYS[4], (2, 20)), 1) + 0.05


@pytest.mark.parametrize("with_classes", [False, True])
def test_suppression_is_the_greedy_definition(with_classes):
    classes = jax.random.randint(KEYS[5], (2, 20), 0, 2) if with_classes else None
    index, valid = roi.non_maximum_suppression(CROWD, CROWD_SCORES, max_outputs=20, iou_threshold=0.3, classes=classes)
    counts = set()
    for i in range(2):
        expected = greedy_nms(CROWD[i], CROWD_SCORES[i], 0.3, None if classes is None else classes[i])
        assert index[i][valid[i]].tolist() == expected
        assert not jnp.any(index[i][~valid[i]])
        counts.add(len(expected))
    assert max(counts) < 20


def test_suppression_stops_at_its_outputs_scores_and_mask():
    run = partial(roi.non_maximum_suppression, CROWD[0], CROWD_SCORES[0], iou_threshold=0.3)
    all_of_them, _ = run(max_outputs=20)
    chex.assert_trees_all_equal(run(max_outputs=3)[0], all_of_them[:3])
    index, valid = run(max_outputs=20, score_threshold=0.5)
    assert jnp.all(CROWD_SCORES[0][index[valid]] > 0.5)
    hidden = jnp.ones(20, bool).at[all_of_them[0]].set(False)
    masked, _ = run(max_outputs=20, mask=hidden)
    assert masked[0] != all_of_them[0]
    assert not jnp.any(run(max_outputs=4, mask=jnp.zeros(20, bool))[1])


def test_empty_boxes_are_taken_once():
    index, valid = roi.non_maximum_suppression(jnp.zeros((3, 4)), jnp.array([0.1, 0.9, 0.5]), max_outputs=5)
    assert index[valid].tolist() == [1, 2, 0]


def test_temporal_suppression_of_spans():
    spans = jnp.array([[0.0, 10.0], [1.0, 10.0], [8.0, 12.0]])
    index, valid = roi.non_maximum_suppression(spans, jnp.array([0.5, 0.9, 0.8]), max_outputs=3, iou_threshold=0.7)
    assert index[valid].tolist() == [1, 2]


# ---- RoIAlign and pasting --------------------------------------------------------------------------------------------


def bilinear(x, y, column):
    height, width = x.shape[:2]
    if y < -1 or y > height or column < -1 or column > width:
        return np.zeros(x.shape[2])
    y, column = max(y, 0), max(column, 0)
    low, left = int(y), int(column)
    if low >= height - 1:
        low, y = height - 1, height - 1
    if left >= width - 1:
        left, column = width - 1, width - 1
    up, right = min(low + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - low, column - left
    return (
        (1 - dy) * ((1 - dx) * x[low, left] + dx * x[low, right]) + dy * ((1 - dx) * x[up, left] + dx * x[up, right])
    )  # fmt: skip


def roi_align_loop(x, box, size, scale, ratio, aligned):
    """torchvision.ops.roi_align as its documentation defines it, one box."""
    x, box = np.asarray(x, np.float64), np.asarray(box, np.float64) * scale - (0.5 if aligned else 0)
    extent = box[2:] - box[:2] if aligned else np.maximum(box[2:] - box[:2], 1)
    out = np.zeros((*size, x.shape[2]))
    for i, j, a, b in np.ndindex(*size, ratio, ratio):
        y = box[1] + (i + (a + 0.5) / ratio) * extent[1] / size[0]
        column = box[0] + (j + (b + 0.5) / ratio) * extent[0] / size[1]
        out[i, j] += bilinear(x, y, column) / ratio**2
    return out


# Fractional, over the border, empty and inverted boxes.
ROIS = jnp.array(
    [
        [[1.3, 2.1, 15.7, 11.2], [-9.0, -3.0, 6.0, 30.0], [4.0, 4.0, 4.0, 4.0]],
        [[0.0, 0.0, 22.0, 18.0], [18.2, 14.9, 40.0, 40.0], [8.0, 9.0, 5.0, 7.0]],
    ]
)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [1, 2])
def test_roi_align_is_torchvisions_definition(aligned, ratio):
    ours = roi.roi_align(IMAGE, ROIS, (3, 2), spatial_scale=0.5, sampling_ratio=ratio, aligned=aligned)
    expected = [[roi_align_loop(IMAGE[b], box, (3, 2), 0.5, ratio, aligned) for box in ROIS[b]] for b in range(2)]
    close(ours, jnp.asarray(np.array(expected), jnp.float32))


def test_gradients_of_roi_align_in_image_and_boxes():
    inner = jnp.array([[[1.3, 2.1, 7.7, 6.2]], [[0.9, 1.2, 5.3, 7.1]]])
    check_grads(lambda x, b: roi.roi_align(x, b, 2), (IMAGE, inner), order=1, modes=["rev"], rtol=2e-2, atol=2e-2)


def test_a_crop_at_whole_pixels_copies_and_masked_boxes_are_zero():
    boxes = jnp.broadcast_to(jnp.array([[2.0, 1.0, 6.0, 4.0]]), (2, 1, 4))
    close(roi.roi_align(IMAGE, boxes, (3, 4), sampling_ratio=1)[:, 0], IMAGE[:, 1:4, 2:6])
    assert not jnp.any(roi.roi_align(IMAGE, boxes, 2, mask=jnp.zeros((2, 1), bool)))
    with pytest.raises(ValueError, match="sampling_ratio 0 is not a fixed number"):
        roi.roi_align(IMAGE, boxes, 2, sampling_ratio=0)


def test_pasting_puts_a_mask_in_its_box():
    masks = uniform(KEYS[6], (2, 2, 3, 4))
    boxes = jnp.broadcast_to(jnp.array([[2.0, 1.0, 6.0, 4.0], [3.0, 3.0, 3.0, 5.0]]), (2, 2, 4))
    pasted = roi.paste_masks(masks, boxes, (6, 8))
    close(pasted[:, 0, 1:4, 2:6], masks[:, 0])
    close(jnp.sum(pasted[:, 0]), jnp.sum(masks[:, 0]))
    assert not jnp.any(pasted[:, 1])
    assert jnp.all(jnp.isfinite(jax.grad(lambda b: jnp.sum(roi.paste_masks(masks, b, (6, 8))))(boxes)))


# ---- filters and statistics ------------------------------------------------------------------------------------------


def filter_loop(x, kernel, mode):
    """Two-dimensional cross-correlation of (H, W) with an odd square kernel."""
    reach = kernel.shape[0] // 2
    padded = np.pad(np.asarray(x, np.float64), reach, mode=mode)
    rows, columns = x.shape
    out = np.zeros(x.shape)
    for i, j in np.ndindex(*kernel.shape):
        out += kernel[i, j] * padded[i : i + rows, j : j + columns]
    return out


def gaussian_kernel(sigma, window):
    g = np.exp(-((np.arange(window) - window // 2) ** 2) / (2 * sigma**2))
    return np.outer(g, g) / g.sum() ** 2


@pytest.mark.parametrize("padding", images.PADDINGS)
def test_blur_and_sobel_are_their_kernels(padding):
    mode = images.PADDINGS[padding]
    x = IMAGE[0, ..., 0]
    blurred = images.gaussian_blur(IMAGE, sigma=1.0, window=5, padding=padding)[0, ..., 0]
    close(blurred, jnp.asarray(filter_loop(x, gaussian_kernel(1.0, 5), mode), jnp.float32))
    kernel = np.outer([1, 2, 1], [-1, 0, 1])
    across, down = images.sobel(IMAGE, padding=padding)
    close(across[0, ..., 0], jnp.asarray(filter_loop(x, kernel, mode), jnp.float32))
    close(down[0, ..., 0], jnp.asarray(filter_loop(x, kernel.T, mode), jnp.float32))


def test_blur_keeps_constants_and_takes_its_width_from_sigma():
    close(images.gaussian_blur(jnp.ones((1, 12, 3)), sigma=0.7), jnp.ones((1, 12, 3)))
    spike = jnp.zeros((1, 31, 1)).at[0, 15].set(1.0)
    positions = jnp.arange(31) - 15.0
    spread = jnp.sum(images.gaussian_blur(spike, sigma=2.0, padding="zeros")[0, :, 0] * positions**2)
    close(spread, jnp.asarray(4.0), rtol=1e-2)


def ssim_loop(x, y, mode):
    kernel = gaussian_kernel(1.5, 11)

    def local(z):
        full = filter_loop(z, kernel, "constant")
        return full if mode == "zeros" else full[5:-5, 5:-5]

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    mx, my = local(x), local(y)
    xx, yy, xy = local(x * x) - mx**2, local(y * y) - my**2, local(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return np.mean((2 * mx * my + c1) * (2 * xy + c2) / ((mx**2 + my**2 + c1) * (xx + yy + c2)))


@pytest.mark.parametrize("padding", ["zeros", "valid"])
def test_ssim_is_its_definition(padding):
    x, y = uniform(KEYS[7], (2, 2, 13, 14, 2))
    ours = images.ssim(x, y, padding=padding)
    expected = [np.mean([ssim_loop(x[i, ..., c], y[i, ..., c], padding) for c in range(2)]) for i in range(2)]
    close(ours, jnp.asarray(expected, jnp.float32))
    close(images.ssim(x, x, padding=padding), jnp.ones(2))
    close(images.ssim(255 * x, 255 * y, data_range=255.0, padding=padding), ours, rtol=1e-4)


def test_gradients_of_ssim_even_for_flat_images():
    x, y = uniform(KEYS[8], (2, 1, 6, 6, 1))
    check_grads(lambda a: images.ssim(a, y), (x,), order=1, modes=["rev"], rtol=5e-2, atol=5e-2)
    slope = jax.grad(lambda a: jnp.sum(images.ssim(a, jnp.zeros_like(a))))(jnp.zeros((1, 12, 12, 1)))
    assert jnp.all(jnp.isfinite(slope))


FOOTPRINTS = {
    ("square", 3): np.ones((3, 3), bool),
    ("ellipse", 3): np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool),
    ("ellipse", 5): np.array([[0, 0, 1, 0, 0], *[[1] * 5] * 3, [0, 0, 1, 0, 0]], bool),
}


@pytest.mark.parametrize(("shape", "window"), FOOTPRINTS)
def test_morphology_is_extrema_over_the_footprint(shape, window):
    """Footprints as cv2.getStructuringElement draws them."""
    footprint, reach = FOOTPRINTS[shape, window], window // 2
    x = np.asarray(IMAGE[0, ..., 0])

    def extremum(values, outside, choose):
        padded = np.pad(values, reach, constant_values=outside)
        return np.array(
            [[choose(padded[i : i + window, j : j + window][footprint]) for j in range(11)] for i in range(9)]
        )

    wide, narrow = extremum(x, -np.inf, np.max), extremum(x, np.inf, np.min)
    close(images.dilate(IMAGE, window, shape=shape)[0, ..., 0], jnp.asarray(wide))
    close(images.erode(IMAGE, window, shape=shape)[0, ..., 0], jnp.asarray(narrow))
    opened = images.morphological_open(IMAGE > 0.3, window, shape=shape)[0, ..., 0]
    expected = extremum(extremum(x > 0.3, True, np.min), False, np.max)
    chex.assert_trees_all_equal(opened, jnp.asarray(expected))
    closed = images.morphological_close(IMAGE > 0.3, window, shape=shape)[0, ..., 0]
    expected = extremum(extremum(x > 0.3, False, np.max), True, np.min)
    chex.assert_trees_all_equal(closed, jnp.asarray(expected))


def test_opening_and_closing_bracket_the_image_and_are_idempotent():
    opened, closed = images.morphological_open(IMAGE, 3), images.morphological_close(IMAGE, 3)
    assert jnp.all((opened <= IMAGE) & (closed >= IMAGE))
    close(images.morphological_open(opened, 3), opened)
    close(images.morphological_close(closed, 3), closed)
    assert images.dilate(jnp.zeros((1, 3, 3, 3, 1)).at[0, 1, 1, 1].set(1.0), 3).sum() == 27
    assert images.dilate(jnp.zeros((1, 3, 3, 3, 1)).at[0, 1, 1, 1].set(1.0), 3, shape="ellipse").sum() == 7


def otsu_loop(values, bins=256):
    """Every cut of the histogram tried out; the first best one."""
    place = np.clip(np.floor(np.clip(np.asarray(values, np.float64), 0, 1) * bins), 0, bins - 1).astype(int)
    best, cut = 0.0, 0
    for t in range(bins):
        back, front = place[place <= t], place[place > t]
        if len(back) and len(front):
            between = len(back) * len(front) * (back.mean() - front.mean()) ** 2
            if between > best * (1 + 1e-12):
                best, cut = between, t
    return cut / (bins - 1)


def test_otsu_is_the_brute_force_maximiser():
    two_humps = jnp.concatenate([0.2 + 0.05 * normal(KEYS[9], (3, 40)), 0.7 + 0.1 * normal(KEYS[10], (3, 25))], -1)
    ours = images.otsu_threshold(two_humps)
    close(ours, jnp.asarray([otsu_loop(row) for row in two_humps], jnp.float32))
    assert images.otsu_threshold(jnp.full((5,), 0.4)) == 0
    # A wide gap of empty bins: the first cut of the plateau.
    close(images.otsu_threshold(jnp.array([0.1, 0.1, 0.9])), jnp.asarray(25 / 255))
    masked = images.otsu_threshold(two_humps, mask=jnp.broadcast_to(jnp.arange(65) < 50, (3, 65)))
    close(masked, jnp.asarray([otsu_loop(row[:50]) for row in two_humps], jnp.float32))
    assert not jnp.any(jax.grad(lambda v: jnp.sum(images.otsu_threshold(v)))(two_humps))


def test_statistics_are_taken_over():
    style = 3 + 2 * normal(KEYS[11], (2, 5, 2))
    y = images.match_color_statistics(IMAGE, style, epsilon=0.0)
    close(jnp.mean(y, (1, 2)), jnp.mean(style, 1), atol=1e-4)
    close(jnp.std(y, (1, 2), ddof=1), jnp.std(style, 1, ddof=1), rtol=1e-4)
    scale, shift = jnp.ones((2, 2)), jnp.zeros((2, 2))
    z = images.adaptive_instance_norm(IMAGE, scale, shift)
    expected = (IMAGE - IMAGE.mean((1, 2), keepdims=True)) / np.sqrt(IMAGE.var((1, 2), keepdims=True) + 1e-5)
    close(z, expected)
    close(images.adaptive_instance_norm(IMAGE, 2 * scale, shift + 1), 2 * z + 1)
    flat = jax.grad(lambda x: jnp.sum(images.match_color_statistics(x, style) ** 2))(jnp.ones((2, 3, 3, 2)))
    assert jnp.all(jnp.isfinite(flat))


def test_density_maps_count_their_points():
    """A map is the sum of unit spikes filtered with zeros outside (scipy's gaussian_filter, mode constant)."""
    points = jnp.array([[[8.2, 7.9], [9.0, 6.5], [0.5, 0.1], [40.0, 3.0], [6.0, 6.0]]])
    present = jnp.array([[True, True, True, True, False]])
    sigma = jnp.array([[1.0, 1.5, 1.0, 1.0, 1.0]])
    density = images.gaussian_density_map(points, sigma, (16, 18), mask=present)
    expected = np.zeros((16, 18))
    for (x, y), s, there in zip(points[0], sigma[0], present[0], strict=True):
        spike = np.zeros((16, 18))
        if there and x < 18:
            spike[int(y), int(x)] = 1
        expected += filter_loop(spike, gaussian_kernel(float(s), 2 * int(4 * float(s) + 0.5) + 1), "constant")
    close(density[0], jnp.asarray(expected, jnp.float32))
    inner = images.gaussian_density_map(points[:, :2], jnp.ones((1, 1)), (16, 18))
    close(jnp.sum(inner), jnp.asarray(2.0), atol=1e-4)
    assert jnp.all(jnp.isfinite(images.gaussian_density_map(points, jnp.zeros((1, 1)), (16, 18))))


def test_image_functions_name_what_is_wrong():
    with pytest.raises(ValueError, match="gaussian_blur: padding 'wrap' is not one of zeros, replicate, reflect"):
        images.gaussian_blur(IMAGE, sigma=1.0, padding="wrap")
    with pytest.raises(ValueError, match="ssim: padding 'reflect' is not one of zeros, valid"):
        images.ssim(IMAGE, IMAGE, padding="reflect")
    with pytest.raises(ValueError, match="dilate: shape 'disc' is not one of square, ellipse"):
        images.dilate(IMAGE, 3, shape="disc")
    with pytest.raises(ValueError, match="erode: window 4 is not odd"):
        images.erode(IMAGE, 4)


# ---- homographies ----------------------------------------------------------------------------------------------------

TILT = jnp.array([[1.1, 0.1, 2.0], [-0.05, 0.95, -1.0], [0.002, -0.001, 1.0]])


def test_a_homography_comes_back_from_four_points_and_from_many():
    corners = jnp.array([[0.0, 0.0], [60.0, 0.0], [60.0, 40.0], [0.0, 40.0]])
    many = uniform(KEYS[0], (2, 30, 2), maxval=60.0)
    for points in (corners, many):
        found = homography.homography_from_points(points, homography.project_points(TILT, points))
        close(homography.project_points(found, points), homography.project_points(TILT, points), atol=2e-4, rtol=1e-5)
        close(found, jnp.broadcast_to(TILT, found.shape), atol=1e-3, rtol=1e-3)


def test_weights_leave_points_out_and_scale_does_not_matter():
    points = uniform(KEYS[0], (12, 2), maxval=60.0)
    target = homography.project_points(TILT, points).at[:3].add(7.0)
    weights = jnp.ones(12).at[:3].set(0.0)
    for factor in (1.0, 10.0):
        close(homography.homography_from_points(points, target, factor * weights), TILT, atol=2e-3, rtol=2e-3)
    for weights in (jnp.zeros(12), jnp.zeros(12).at[:3].set(1.0)):
        value, slope = jax.value_and_grad(
            lambda p, w: jnp.sum(homography.homography_from_points(p, target, w)), argnums=0
        )(points, weights)
        assert value == 3
        assert not jnp.any(slope)


def test_gradients_of_the_homography():
    points = uniform(KEYS[0], (8, 2), maxval=2.0)
    target = homography.project_points(TILT, points) + 0.05 * normal(KEYS[1], (8, 2))
    check_grads(homography.homography_from_points, (points, target), order=1, modes=["rev"], rtol=5e-2, atol=5e-2)


def test_ransac_finds_the_map_among_outliers():
    """200 matches with noise, 40 % of them wrong: corner error below 1 px (card dual_interval_motion, Acceptance)."""
    points = uniform(KEYS[2], (200, 2), maxval=200.0)
    target = homography.project_points(TILT, points) + 0.3 * normal(KEYS[3], (200, 2))
    target = jnp.where(jnp.arange(200)[:, None] < 80, uniform(KEYS[4], (200, 2), maxval=200.0), target)
    found, inliers = homography.ransac_homography(KEYS[5], points, target, iterations=128)
    corners = jnp.array([[0.0, 0.0], [200.0, 0.0], [200.0, 200.0], [0.0, 200.0]])
    errors = homography.project_points(found, corners) - homography.project_points(TILT, corners)
    assert jnp.max(jnp.linalg.norm(errors, axis=-1)) < 1
    assert jnp.sum(inliers[80:]) > 110
    assert jnp.sum(inliers[:80]) < 5


def test_ransac_never_draws_absent_points():
    points = uniform(KEYS[2], (40, 2), maxval=50.0)
    present = jnp.arange(40) < 12
    target = jnp.where(present[:, None], homography.project_points(TILT, points), 1e6)
    found, inliers = homography.ransac_homography(KEYS[5], points, target, iterations=8, mask=present)
    close(homography.project_points(found, points[:12]), target[:12], atol=1e-2)
    chex.assert_trees_all_equal(inliers, present)


def test_warping_by_a_shift_moves_pixels_and_by_the_identity_nothing():
    shift = jnp.broadcast_to(jnp.array([[1.0, 0, 2], [0, 1, 1], [0, 0, 1]]), (2, 3, 3))
    moved = homography.warp_homography(IMAGE, shift)
    close(moved[:, 1:, 2:], IMAGE[:, :-1, :-2])
    assert not jnp.any(moved[:, 0])
    assert not jnp.any(moved[:, :, :2])
    close(homography.warp_homography(IMAGE, jnp.broadcast_to(jnp.eye(3), (2, 3, 3))), IMAGE)
    valid = homography.warp_homography(jnp.ones((2, 9, 11, 1)), shift, size=(4, 5))
    assert valid.shape == (2, 4, 5, 1)
    slope = jax.grad(lambda h: jnp.sum(homography.warp_homography(IMAGE, h) ** 2))(shift)
    assert jnp.all(jnp.isfinite(slope))


def test_points_at_infinity_stay_finite():
    horizon = jnp.array([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])
    value, slope = jax.value_and_grad(lambda p: jnp.sum(homography.project_points(horizon, p)))(jnp.zeros((1, 2)))
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(slope))


# ---- what holds for every function -----------------------------------------------------------------------------------

SWEEP = {
    "box_iou": (partial(roi.box_iou, kind="giou"), (A, B)),
    "paired_box_iou": (partial(roi.paired_box_iou, kind="ciou"), (A, B)),
    "convert_boxes": (partial(roi.convert_boxes, source="corners", target="center_size"), (A,)),
    "roi_align": (partial(roi.roi_align, size=2), (IMAGE, A)),
    "paste_masks": (partial(roi.paste_masks, size=(5, 5)), (jnp.ones((2, 6, 2, 2)), A)),
    "gaussian_blur": (partial(images.gaussian_blur, sigma=0.8), (IMAGE,)),
    "sobel": (images.sobel, (IMAGE,)),
    "dilate": (partial(images.dilate, window=3), (IMAGE,)),
    "close": (partial(images.morphological_close, window=3, shape="ellipse"), (IMAGE,)),
    "ssim": (images.ssim, (IMAGE, IMAGE[::-1])),
    "match_color_statistics": (images.match_color_statistics, (IMAGE, IMAGE[::-1])),
    "adaptive_instance_norm": (images.adaptive_instance_norm, (IMAGE, jnp.ones((2, 2)), jnp.ones((2, 2)))),
    "density": (partial(images.gaussian_density_map, size=(4, 5)), (A[..., :2], jnp.ones((2, 1)))),
    "warp_homography": (homography.warp_homography, (IMAGE, jnp.stack([TILT, jnp.eye(3)]))),
    "project_points": (homography.project_points, (jnp.stack([TILT, jnp.eye(3)]), A[..., :2])),
}


@pytest.mark.parametrize("name", SWEEP)
def test_every_function_under_jit_vmap_eval_shape_and_bfloat16(name):
    function, arguments = SWEEP[name]
    y = function(*arguments)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(function, *arguments), jax.eval_shape(lambda: y))
    with jax.disable_jit():
        close(function(*arguments), y)
    twice = jax.vmap(function)(*(jnp.stack([a, a[::-1]]) for a in arguments))
    close(jax.tree.map(lambda z: z[0], twice), y)
    half = function(*(a.astype(jnp.bfloat16) for a in arguments))
    for ours, exact in zip(jax.tree.leaves(half), jax.tree.leaves(y), strict=True):
        assert ours.dtype == (jnp.float32 if name == "ssim" else jnp.bfloat16)
        if name not in ("roi_align", "paste_masks", "density", "warp_homography"):  # their positions are rounded
            close(ours.astype(jnp.float32), exact, atol=0.1, rtol=0.05)


# ---- arcs ------------------------------------------------------------------------------------------------------------


def test_von_mises_filters_are_their_formula_pixel_by_pixel():
    angles, (across, down) = np.array([0.0, 0.7, np.pi, 4.0]), (3.0, 2.5)
    options = {"size": 7, "radius": 4.0, "concentration": 2.0, "shift": (across, down)}
    expected = np.zeros((4, 7, 7))
    for k, angle in enumerate(angles):
        for row in range(7):
            for column in range(7):
                x = column - 3.5 + across * np.cos(angle)
                y = 3.5 - row + down * np.sin(angle)
                turn = np.arctan2(y, x) % (2 * np.pi) - angle
                expected[k, row, column] = np.exp(2.0 * np.cos(turn)) / np.i0(np.hypot(x, y) - 4.0)
    found = images.von_mises_filters(jnp.asarray(angles, jnp.float32), **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    low = images.von_mises_filters(jnp.asarray([0.0], jnp.bfloat16), **options)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), expected[:1], rtol=1e-2)
    arcs = partial(images.von_mises_filters, **options)
    check_grads(arcs, (jnp.asarray([0.7, 4.0]),), 1, modes=("rev",), eps=1e-2, rtol=1e-2, atol=1e-2)


def test_von_mises_filters_have_an_origin():
    options = {"size": 4, "radius": 1.0, "concentration": 1.0, "shift": (0.0, 0.0)}
    angles = jnp.array([0.0, 2.0])
    found = images.von_mises_filters(angles, **options)
    np.testing.assert_allclose(found[:, 2, 2], np.exp(np.cos(angles)) / np.i0(1.0), rtol=1e-5)
    assert np.isfinite(jax.grad(lambda a: jnp.sum(images.von_mises_filters(a, **options)))(angles)).all()
