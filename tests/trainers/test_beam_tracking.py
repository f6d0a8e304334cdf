"""Flights: the stand-in, the windows cut from it, and the baselines that need no model."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data.beam_tracking import flight_standin, load_beam_tracking, paint, project
from trainers.loop import Run, score_table
from trainers.recipe import recipe_for
from zoo.tasks.beam_tracking import OFFSET, SPAN, beam_probes, codebook, denormalize, echo_hold, kalman_filter, metrics

SIZES = {"data_dir": None, "lookback": 7, "image_size": (64, 62)}


@pytest.fixture(scope="module")
def data():
    return load_beam_tracking("standin", **SIZES)


def test_the_standin_is_the_same_everywhere_and_its_parts_are_different_flights(data):
    box, echo, truth = flight_standin(0, 60)
    assert (box.shape, echo.shape, truth.shape) == ((60, 80, 4), (60, 80, 3), (60, 80, 3))
    chex.assert_trees_all_close(truth[[0, 59], -1], np.array(NUMBERS, np.float32), atol=1e-5)
    assert not np.allclose(truth, flight_standin(1, 60)[2])
    assert [len(part) for part in (data.train, data.valid, data.test)] == [48 * 74, 6 * 74, 6 * 74]
    chex.assert_trees_all_equal(data.test.truth, jnp.asarray(truth[54:].reshape(-1, 3)))
    assert 0.09 < np.mean(np.all(echo == 0, axis=-1)) < 0.11


NUMBERS = [[0.11823756, 0.87021363, 0.33711332], [0.28808889, 0.13015397, 0.6273971]]


def test_a_batch_is_a_window_of_one_flight_and_hides_the_last_echo(data):
    batch = data.train.batch(jnp.array([3, 74]))
    chex.assert_trees_all_equal(batch["y"], jnp.stack([data.train.truth[3:10], data.train.truth[80:87]]))
    chex.assert_trees_all_equal(batch["echo"][:, :-1], jnp.stack([data.train.echo[3:9], data.train.echo[80:86]]))
    assert not np.any(batch["echo"][:, -1])
    chex.assert_shape(batch["image"], (2, 7, 64, 62, 3))
    assert (np.diff(data.train.start) > 0).all()
    assert np.all(data.train.start % 80 <= 73)


def test_the_spot_is_where_the_box_is():
    box = jnp.array([[0.25, 0.75, 0.05, 0.03], [0.6, 0.1, 0.08, 0.05]])
    image = paint(box, (64, 77))[..., 0]
    rows, columns = (jnp.sum(image, axis=a) / jnp.sum(image, axis=(1, 2))[:, None] for a in (2, 1))
    chex.assert_trees_all_close(columns @ ((jnp.arange(77) + 0.5) / 77), box[:, 0], atol=0.01)
    chex.assert_trees_all_close(rows @ ((jnp.arange(64) + 0.5) / 64), box[:, 1], atol=0.01)


def test_every_direction_is_seen_in_another_place():
    grid = np.stack(np.meshgrid(np.linspace(110, 150, 21), np.linspace(10, 80, 36), [100.0, 300.0]), axis=-1)
    box = project(grid)
    assert 0 < box[..., :2].min() < box[..., :2].max() < 1
    flat = box[:, :, 0, :2].reshape(-1, 2)
    apart = np.linalg.norm(flat[:, None] - flat, axis=-1) + np.eye(len(flat))
    assert apart.min() > 0.004
    chex.assert_trees_all_close(box[..., 0, 2:], 3 * box[..., 1, 2:])
    chex.assert_trees_all_close(box[..., 0, :2], box[..., 1, :2])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("deepsense", {}, "no set of tracked flights is called 'deepsense'"),
        ("standin", {"data_dir": "somewhere"}, "the stand-in is generated"),
        ("standin", {"lookback": 81}, "has 80 frames: lookback must be from 2 to that, not 81"),
    ],
)
def test_what_cannot_be_loaded(name, changes, message):
    with pytest.raises(zoo.UserError, match=message):
        load_beam_tracking(name, **SIZES | changes)


def test_echo_hold_takes_the_last_echo_there_was(data):
    batch = data.train.batch(jnp.arange(4))
    echo = batch["echo"].at[0, 3:].set(0.0).at[1].set(0.0)
    held = echo_hold(batch | {"echo": echo})["now"]
    chex.assert_trees_all_equal(held[0], batch["echo"][0, 2, :2])
    chex.assert_trees_all_equal(held[1], jnp.array([0.5, 0.5]))


def test_the_kalman_filter_is_the_posterior_mean(data):
    """Against the normal equations of all states and echoes of a window at once."""
    batch = data.test.batch(jnp.array([0, 100, 333]))
    found = denormalize(kalman_filter(batch, acceleration=0.2, noise=0.3)["now"])
    for i in range(3):
        for angle in range(2):
            chex.assert_trees_all_close(float(found[i, angle]), _posterior(batch["echo"][i], angle), rtol=1e-4)


def _posterior(echo, angle):
    steps = len(echo)
    centre = OFFSET[angle] + SPAN[angle] / 2
    # Unknowns: the position and speed before the first step, and the acceleration of each step.
    to_state = [np.eye(2, 2 + steps)]
    for t in range(steps):
        moved = np.array([[1.0, 1.0], [0.0, 1.0]]) @ to_state[-1]
        moved[:, 2 + t] += [0.5, 1.0]
        to_state.append(moved)
    precision = np.diag([1e-4, 0.25, *[0.2**-2] * steps])
    information = np.zeros(2 + steps)
    for t in range(steps):
        if np.any(echo[t] != 0):
            row = to_state[t + 1][0]
            precision += np.outer(row, row) / 0.3**2
            information += row * (OFFSET[angle] + SPAN[angle] * float(echo[t, angle]) - centre) / 0.3**2
    return float(centre + to_state[-1][0] @ np.linalg.solve(precision, information))


def test_beams_are_probed_in_the_order_of_their_distance():
    beams = codebook(4, 5)
    predicted, truth = (denormalize(jax.random.uniform(jax.random.key(i), (50, 2))) for i in range(2))
    probes = beam_probes(predicted, truth, beams)
    for p, t, count in zip(np.asarray(predicted), np.asarray(truth), probes, strict=True):
        order = np.argsort(((np.asarray(beams) - p) ** 2).sum(-1))
        assert 1 + list(order).index(np.argmin(((np.asarray(beams) - t) ** 2).sum(-1))) == count
    chex.assert_trees_all_equal(beam_probes(truth, truth, beams), jnp.ones(50))


def test_metrics_are_in_degrees(data):
    batch = data.test.batch(jnp.arange(5))
    off = batch["y"][:, -1, :2] + jnp.array([2.0 / 40, -1.0 / 70])
    scores = metrics({"now": off, "camera": batch["y"][..., :2] + jnp.array([1.0 / 40, 0.0])}, batch)
    chex.assert_trees_all_close(scores["mse"], jnp.full(5, 2.5), rtol=1e-3)
    chex.assert_trees_all_close(scores["mae"], jnp.full(5, 1.5), rtol=1e-3)
    chex.assert_trees_all_close(scores["camera_mse"], jnp.full(5, 0.5), rtol=1e-3)


def test_the_table_of_scores_leaves_out_what_a_baseline_lacks():
    """The last echo says nothing of what the camera sees."""
    run = object.__new__(Run)  # of a whole run, the table takes these two
    for name, value in (("recipe", recipe_for("camera_isac")), ("paper", zoo.paper("camera_isac"))):
        object.__setattr__(run, name, value)
    scores = {"test/mse": 1.0, "test/camera_mse": 2.0, "test/echo_hold/mse": 3.0, "test/kalman/mse": 4.0}
    cells = [list(column.cells) for column in score_table(run, scores, "").columns]
    assert cells[1:] == [["1.0000", "3.0000", "4.0000"], ["2.0000", "-", "-"]]
