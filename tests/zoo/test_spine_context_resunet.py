"""SpineContextResUNet's card: how far it sees, what it shifts with, whole volumes, and what it learns."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from tests.weights import drawn
from trainers.data.segmentation import load_segmentation
from zoo.tasks import segmentation
from zoo.vision.spine_context_resunet import (
    ContextBlock,
    grad_cam,
    largest_component,
    loss,
    predict_volume,
    segment,
    window,
)

KEY = jax.random.key(4)
PAPER = zoo.paper("spine_context_resunet")


def moved(variables, scale=0.2):
    leaves, tree = jax.tree.flatten(variables["params"])
    keys = jax.random.split(KEY, len(leaves))
    params = [v + scale * jax.random.normal(k, v.shape) for v, k in zip(leaves, keys, strict=True)]
    return {**variables, "params": tree.unflatten(params)}


@pytest.fixture(scope="module")
def small():
    model = zoo.create("spine_context_resunet", "tiny", width=2, image_size=(16, 16, 8))
    batch = PAPER.example(model.config, batch_size=2, key=KEY)
    return model, batch, drawn(PAPER, model)


@pytest.mark.parametrize("dilations", [(1, 2, 4, 8), (1, 3)])
def test_a_voxel_of_the_context_block_sees_27_places_of_each_dilation(dilations):  # Acceptance 3
    block, x = ContextBlock(3, dilations, 1e-5), jax.random.normal(KEY, (1, 19, 19, 19, 2))
    variables = moved(block.init(KEY, x, train=False))
    # No rectifier may be shut: what is asked is what could be seen.
    for name in ("norm1", "norm2"):
        variables["params"][name]["bias"] += 20.0
    slope = jax.jit(jax.grad(lambda x: block.apply(variables, x, train=False)[0, 9, 9, 9].sum()))(x)
    seen = {tuple(place) for place in np.argwhere(np.abs(slope[0]).max(-1) > 0) - 9}
    steps = [(i, j, k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)]
    assert seen == {tuple(r * s for s in step) for r in dilations for step in steps}


def test_it_shifts_with_its_input_by_whole_cells():  # Acceptance 4
    model = zoo.create("spine_context_resunet", "tiny", width=2)
    volume = jax.random.normal(KEY, (1, 264, 8, 8, 1))
    variables = drawn(PAPER, model)
    apply = jax.jit(lambda x: model.apply(variables, {"x": x}, train=False)["logits"])
    first, second = apply(volume[:, 8:]), apply(volume[:, :-8])
    inside = slice(112, 136)
    np.testing.assert_allclose(second[:, 120:144], first[:, inside], atol=1e-4)
    assert np.abs(second[:, inside] - first[:, inside]).max() > 1e-2
    assert np.abs(second[:, 8:16] - first[:, :8]).max() > 1e-3  # there the border is in sight


def test_a_volume_is_blended_from_patches(small):  # Acceptance 5
    model, _, variables = small
    volume = jax.random.normal(KEY, (26, 16, 15, 1))
    shares, seen = jax.jit(lambda v, x: predict_volume(model, v, x))(variables, volume)
    assert shares.shape == volume.shape
    assert seen.shape == volume.shape[:-1]
    assert 0 < shares.min() <= shares.max() < 1  # the floor leaves no voxel without a weight
    # The official window is 0 at the first voxel of each axis; those of the volume are in no other patch.
    official = replace(model.config, window_floor=0.0)
    weight = window(official)
    assert float(weight[0].max()) == 0
    assert float(weight.max()) == 1
    identity = segmentation.sliding_window(
        lambda x: x, volume[None], tile=(16, 16, 8), overlap=0.5, weights=weight, overhang=True
    )[0]
    np.testing.assert_allclose(identity[1:, 1:, 1:], volume[1:, 1:, 1:], atol=1e-4)
    np.testing.assert_allclose(identity[0], 0)
    mask = segment(model, variables, volume)
    assert mask.shape == volume.shape[:-1]
    assert (mask <= (np.asarray(shares[..., 0]) > 0.5)).all()


def test_only_the_largest_component_is_kept():
    mask = np.zeros((6, 6, 6), bool)
    mask[0, 0, :3] = True
    mask[1, 1, 1:5] = True  # touches the first by an edge only
    mask[2, 1, 4] = True
    kept = largest_component(mask)
    assert kept.sum() == 5
    assert kept[2, 1, 4]
    assert not kept[0].any()
    assert not largest_component(np.zeros((2, 2, 2), bool)).any()


def test_the_loss_of_a_perfect_mask_is_0_and_of_an_empty_one_finite():  # Acceptance 6
    label = (jax.random.uniform(KEY, (2, 4, 4, 4)) > 0.5).astype(jnp.int32)
    sure = jnp.where(label > 0, 300.0, -300.0)[..., None]
    assert float(loss({"logits": sure}, {"label": label})[0]) == pytest.approx(0, abs=1e-6)
    empty = jnp.zeros_like(label)
    for logits in (sure, -sure):
        value, slope = jax.value_and_grad(lambda z: loss({"logits": z}, {"label": empty})[0])(logits)
        assert np.isfinite(value)
        assert np.isfinite(slope).all()


def test_the_map_is_of_what_raises_the_mean_probability(small):
    model, batch, variables = small
    shares, seen = jax.jit(lambda v, x: grad_cam(model, v, x))(variables, batch["x"])
    bottom, skips = model.apply(variables, batch["x"], method="encode")

    @jax.jit
    def mean(bottom):
        return jax.nn.sigmoid(model.apply(variables, bottom, skips, method="decode")).mean((1, 2, 3, 4))

    np.testing.assert_allclose(shares.mean((1, 2, 3, 4)), mean(bottom), rtol=1e-5)
    # The mean slope of a channel is what adding to all of it does.
    slopes = []
    for channel in range(bottom.shape[-1]):
        ahead, back = (mean(bottom.at[..., channel].add(h)) for h in (0.05, -0.05))
        slopes.append((ahead - back) / 0.1 / np.prod(bottom.shape[1:4]))
    expected = np.maximum(np.einsum("cb,bdhwc->bdhw", np.stack(slopes), bottom), 0)
    coarse = expected.reshape(2, -1)
    assert np.abs(coarse).max() > 0
    scale = np.abs(coarse).max()
    # Trilinear between cells, so a map of two cells an axis has its own values in the corners.
    corners = np.asarray(seen)[:, [0, -1]][:, :, [0, -1]][:, :, :, :1, 0]
    np.testing.assert_allclose(corners, expected[:, :, :, :1], atol=0.05 * scale)


def test_evaluation_shows_the_map_and_training_does_not(small):
    model, batch, variables = small
    outputs = jax.jit(model.apply)(variables, batch)
    assert outputs["attention"].shape == (2, 1, 16, 16, 8)
    np.testing.assert_allclose(outputs["attention"][:, 0], grad_cam(model, variables, batch["x"])[1][..., 0], atol=1e-6)
    shapes = jax.eval_shape(lambda v: model.apply(v, batch, train=True, mutable=["batch_stats"])[0], variables)
    assert set(shapes) == {"logits"}


def test_it_learns_the_standin():  # Acceptance 7; the recipe's run is longer
    size = {"image_size": (16, 16, 16), "num_classes": 1}
    model = zoo.create("spine_context_resunet", "tiny", **size)
    data = load_segmentation("standin", paper="spine_context_resunet", data_dir=None, channels=1, **size)
    variables, optimizer = drawn(PAPER, model), optax.adam(1e-2)

    @jax.jit
    def step(variables, state, rows):
        batch = data.train.batch(rows)

        def error(params):
            outputs, updated = model.apply({**variables, "params": params}, batch, train=True, mutable=["batch_stats"])
            scores = [
                segmentation.metrics(y, batch)["dice_per_image"].mean() for y in (outputs, segmentation.otsu(batch))
            ]
            return loss(outputs, batch)[0], (updated, scores)

        gradients, (updated, scores) = jax.grad(error, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradients, state)
        return {**updated, "params": optax.apply_updates(variables["params"], updates)}, state, scores

    state, course = optimizer.init(variables["params"]), []
    for i in range(24):
        variables, state, (dice, baseline) = step(variables, state, (jnp.arange(8) + 8 * i) % 64)
        course.append(float(dice))
    # As good as brightness tells already, having known nothing.
    assert course[-1] > max(course[0] + 0.3, float(baseline) - 0.1)
