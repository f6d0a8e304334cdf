"""Segmentation: losses and scores against loops, what is not counted, tiles and reflections, pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.tasks import segmentation as task

KEY = jax.random.key(0)
RNG = np.random.default_rng(1)
SIZE = (5, 7)
LABEL = RNG.integers(-1, 3, (3, *SIZE))
LOGITS = RNG.normal(size=(3, *SIZE, 3)).astype(np.float32)


def shares(logits):
    if logits.shape[-1] == 1:
        return 1 / (1 + np.exp(-logits))
    top = np.exp(logits - logits.max(-1, keepdims=True))
    return top / top.sum(-1, keepdims=True)


def pixels(label):
    return [tuple(place) for place in np.argwhere(label >= 0)]


@pytest.mark.parametrize("classes", [3, 1])
def test_losses_are_the_loops_over_counted_pixels(classes):
    label = np.minimum(LABEL, classes)
    logits, p = LOGITS[..., :classes], shares(np.float64(LOGITS[..., :classes]))
    if classes == 1:
        errors = [-np.log(p[i][0] if label[i] else 1 - p[i][0]) for i in pixels(label)]
    else:
        errors = [-np.log(p[i][label[i]]) for i in pixels(label)]
    assert float(task.pixel_errors(jnp.asarray(logits), jnp.asarray(label))) == pytest.approx(np.mean(errors), rel=1e-5)

    def dice(rows, squares, smooth):
        found = []
        for k in range(classes):
            both = claimed = there = 0.0
            for i in pixels(label):
                if i[0] in rows:
                    right = label[i] == k + (classes == 1)
                    both, there = both + p[i][k] * right, there + right
                    claimed += p[i][k] ** (2 if squares else 1)
            found.append(1 - (2 * both + smooth) / (claimed + there + smooth))
        return np.mean(found)

    arrays = jnp.asarray(logits), jnp.asarray(label)
    each = np.mean([dice([row], False, 1.0) for row in range(3)])
    assert float(task.dice_errors(*arrays, smooth=1.0)) == pytest.approx(each, rel=1e-5)
    whole = dice(range(3), True, 1e-5)
    found = task.dice_errors(*arrays, smooth=1e-5, whole_batch=True, squares=True)
    assert float(found) == pytest.approx(whole, rel=1e-5)
    total, parts = task.loss({"logits": arrays[0]}, {"label": arrays[1]})
    assert float(total) == pytest.approx(np.mean(errors) + each, rel=1e-5)
    assert set(parts) == {"pixel_loss", "dice_loss"}


def test_a_perfect_mask_has_no_dice_error_and_an_empty_one_a_finite_gradient():
    label = jnp.asarray(RNG.integers(0, 2, (2, 6, 6)))
    sure = jnp.where(label > 0, 200.0, -200.0)[..., None]
    assert float(task.dice_errors(sure, label, smooth=1.0)) == pytest.approx(0, abs=1e-6)
    # The logarithm of a probability that is 0 counts 100, as in torch.
    assert float(task.pixel_errors(-sure, label)) == pytest.approx(100)
    empty = jnp.zeros_like(label)
    value, slope = jax.value_and_grad(lambda z: task.loss(z, {"label": empty})[0])(0 * sure)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()
    nothing = task.loss(sure, {"label": jnp.full_like(label, -1)})[0]
    assert np.isfinite(nothing)


@pytest.mark.parametrize("classes", [3, 1])
def test_scores_count_pixels(classes):
    label, logits = np.minimum(LABEL, classes), LOGITS[..., :classes]
    guess = (logits[..., 0] > 0).astype(int) if classes == 1 else logits.argmax(-1)
    counted = label >= 0
    found = task.metrics(jnp.asarray(logits), {"label": jnp.asarray(label)})
    kinds = max(classes, 2)
    for row in range(3):
        for k in range(kinds):
            claimed, there = (guess[row] == k) & counted[row], label[row] == k
            assert found["hits"][row, k] == (claimed & there).sum()
            assert found["guessed"][row, k] == claimed.sum()
            assert found["there"][row, k] == there.sum()
    totals = {name: np.asarray(v, np.float64).sum(0) for name, v in found.items()} | {"examples": 3}
    scores = task.summarise(totals, None)
    h, g, t = (totals[name][1:] for name in ("hits", "guessed", "there"))
    assert scores["dice"] == pytest.approx(np.mean(2 * h / (g + t)))
    assert scores["iou"] == pytest.approx(np.mean(h / (g + t - h)))
    assert scores["sensitivity"] == pytest.approx(np.mean(h / t))
    assert scores["precision"] == pytest.approx(np.mean(h / g))
    assert scores["accuracy"] == pytest.approx((guess == label)[counted].mean())
    each = [np.mean(2 * found["hits"][i, 1:] / (found["guessed"] + found["there"])[i, 1:]) for i in range(3)]
    assert scores["dice_per_image"] == pytest.approx(np.mean(each), rel=1e-6)


def test_classes_that_are_nowhere_are_left_out_and_what_is_not_a_number_is_wrong():
    label = jnp.zeros((2, 4, 4), jnp.int32).at[0, 0, 0].set(1)
    found = task.metrics(jax.nn.one_hot(label, 3), {"label": label})
    np.testing.assert_allclose(found["dice_per_image"], [1, 1])
    broken = task.metrics(jnp.full((2, 4, 4, 1), jnp.nan), {"label": label})
    assert not broken["hits"].any()
    np.testing.assert_allclose(broken["dice_per_image"], [0, 1])


def test_the_baseline_finds_bright_blocks():
    label = np.zeros((2, 8, 8), int)
    label[:, 2:5, 1:4] = 1
    batch = {"x": jnp.asarray(label[..., None] + 0.05 * RNG.normal(size=(2, 8, 8, 1)), jnp.float32)}
    batch["label"] = jnp.asarray(label)
    for classes in (1, 3):
        row = task.pixel_prior(np.bincount(label.ravel(), minlength=max(classes, 2)).astype(np.float64), classes)
        assert row.shape == (classes,)
        batch["prior"] = jnp.broadcast_to(row, (2, classes))
        assert np.all(task.metrics(task.otsu(batch), batch)["dice_per_image"] > 0.9)


@pytest.mark.parametrize("overhang", [False, True])
@pytest.mark.parametrize(("size", "tile"), [((11, 9), (4, 6)), ((3, 13), (4, 5)), ((7, 8, 5), (4, 4, 4))])
def test_tiles_of_the_identity_are_the_image(size, tile, overhang):
    x = jax.random.normal(KEY, (2, *size, 2))
    weights = 0.1 + jax.random.uniform(KEY, tile)
    found = task.sliding_window(lambda y: y, x, tile=tile, overlap=0.5, weights=weights, overhang=overhang)
    np.testing.assert_allclose(found, x, atol=1e-5)
    # Where every weight is 0 the result is 0; elsewhere it is the image.
    masked = task.sliding_window(lambda y: y, x, tile=tile, overlap=0.5, weights=weights.at[0].set(0.0))
    np.testing.assert_allclose(masked[:, 0], 0)
    np.testing.assert_allclose(masked[:, 1:], x[:, 1:], atol=1e-5)


def test_tiles_lie_where_they_should():
    starts = []

    def record(y):
        jax.debug.callback(lambda first: starts.append(int(first)), y[0, 0, 0])
        return y

    x = jnp.arange(1.0, 27.0)[None, :, None]
    for overhang, expected in ((False, [1, 9, 11]), (True, [1, 9, 11, 17])):
        starts.clear()
        jax.block_until_ready(task.sliding_window(record, x, tile=(16,), overlap=0.5, overhang=overhang))
        jax.effects_barrier()
        assert sorted(set(starts)) == expected
    with pytest.raises(ValueError, match=r"overlap 0\.99 of tiles of 16 leaves no step"):
        task.sliding_window(record, x, tile=(16,), overlap=0.99)


def test_reflections_are_averaged():
    x = jax.random.normal(KEY, (2, 4, 6, 3))
    np.testing.assert_allclose(task.flip_average(lambda y: y, x), x, atol=1e-6)
    ramp = jnp.arange(4.0)[:, None, None] * jnp.ones((4, 6, 1))
    np.testing.assert_allclose(task.flip_average(lambda y: y + ramp, x), x + 1.5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "channels", "classes", "attention"),
    [((12, 10), 3, 4, (2, 3, 3)), ((12, 10), 1, 1, None), ((8, 9, 10), 1, 1, (1, 8, 9, 10))],
)
def test_images_and_volumes_have_a_picture(size, channels, classes, attention):
    batch = task.example(size=size, channels=channels, num_classes=classes, batch_size=2, key=KEY)
    assert batch["label"].shape == (2, *size)
    assert int(batch["label"].max()) <= max(classes - 1, 1)
    logits = jax.random.normal(KEY, (2, *size, classes))
    outputs = logits if attention is None else {"logits": logits, "attention": jnp.ones((2, *attention))}
    figure = task.picture(batch, outputs)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles[:3] == ["image", "truth", "prediction"]
    assert len(titles) == 3 + (0 if attention is None else attention[0])
