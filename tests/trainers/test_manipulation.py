"""The stand-in for manipulation: its scenes, its windows, and acting in it."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data.manipulation import draw_scenes, load_scenes, roll_out
from zoo.tasks.manipulation import extrapolate, hold, metrics

CONFIG = zoo.paper("heterogenmanip").config("tiny", num_points=24, num_observations=3)


@pytest.fixture(scope="module")
def data():
    return load_scenes("standin", data_dir=None, config=CONFIG)


def test_the_standin_is_the_same_everywhere_and_its_parts_are_distinct(data):
    again = draw_scenes(0, 3, num_points=24)
    chex.assert_trees_all_close(data.train.way[:3], jnp.asarray(again["way"], jnp.float32))
    assert not np.allclose(again["way"], draw_scenes(1, 3, num_points=24)["way"])
    starts = np.concatenate([np.asarray(part.way[:, 0]) for part in (data.train, data.valid, data.test)])
    assert len(np.unique(starts, axis=0)) == 4400
    assert (len(data.valid), len(data.test)) == (200, 200)
    assert len(data.train) > 40_000


def test_the_goal_is_where_the_tip_meets_the_slot_and_features_are_needed_to_tell(data):
    part, rows = data.test, np.arange(200)
    ends = part.passive[rows[:, None], jnp.argmax(part.passive_features, axis=1)]  # (D, slot and other end, 3)
    handle, tip = jnp.moveaxis(part.active[rows[:, None], jnp.argmax(part.active_features, axis=1)], 1, 0)
    chex.assert_trees_all_close(handle, part.way[:, 0], atol=1e-6)
    brought = tip + part.way[:, -1] - part.way[:, 0]
    chex.assert_trees_all_close(brought, ends[:, 0], atol=1e-6)
    # The other end is as far from the middle: without features it might as well be the slot.
    chex.assert_trees_all_close(jnp.linalg.norm(ends[:, 0] - ends[:, 1], axis=-1), jnp.full(200, 0.5), atol=1e-6)
    for features in (part.active_features, part.passive_features):
        assert 0.0 <= float(features.min()) < float(features.max()) <= 1.0


def test_windows(data):
    batch = data.test.batch(np.arange(5))
    chex.assert_trees_all_equal(batch["state"], jnp.repeat(data.test.way[:5, :1], 3, axis=1))
    chex.assert_trees_all_equal(batch["y"][:, 2:], data.test.way[:5, 1:7])  # what follows now
    chex.assert_trees_all_equal(batch["y"][:, :2], batch["state"][:, :2])
    later = data.train.batch(np.array([4]))
    chex.assert_trees_all_equal(later["state"][0], data.train.way[0, 2:5])
    moved = later["active"][0] - data.train.active[0]
    way = (later["state"] - data.train.way[0, 0])[0]
    chex.assert_trees_all_close(moved, jnp.broadcast_to(way[:, None], (3, 24, 3)), atol=1e-6)
    chex.assert_shape(later["environment"], (1, 3, 24, 3))


def test_baselines_and_scores(data):
    batch = data.train.batch(np.array([2]))
    steady = extrapolate(batch)
    chex.assert_trees_all_close(steady["actions"], batch["y"], atol=1e-5)
    scores = metrics(steady, batch)
    assert (float(scores["success"][0]), float(scores["final_error"][0])) == (1.0, pytest.approx(0, abs=1e-5))
    assert float(metrics(hold(batch), batch)["final_error"][0]) == pytest.approx(0.6, abs=1e-4)


def test_acting(data):
    part = jax.tree.map(lambda a: a[:6] if a.shape[0] == 200 else a, data.test)

    def expert(seen):
        way = part.way[:, -1:] - seen["state"][:, -1:]
        distance = jnp.linalg.norm(way, axis=-1, keepdims=True)
        steps = 0.1 * jnp.arange(1, 5)[:, None]
        return seen["state"][:, -1:] + way * jnp.minimum(steps / jnp.maximum(distance, 1e-6), 1.0)

    ends, goals = roll_out(expert, part)
    chex.assert_trees_all_close(ends, goals, atol=1e-4)
    ends, _ = roll_out(lambda seen: jnp.repeat(seen["state"][:, -1:], 4, axis=1), part)
    chex.assert_trees_all_equal(ends, part.way[:, 0])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("hang_coat", {}, "no set of demonstrations is called 'hang_coat'"),
        ("standin", {"data_dir": "somewhere"}, "the stand-in is generated"),
        ("standin", {"config": dataclasses.replace(CONFIG, action_dim=9)}, "does not suit a model of action_dim 9"),
    ],
)
def test_what_cannot_be_loaded(name, arguments, message):
    with pytest.raises(zoo.UserError, match=message):
        load_scenes(name, **{"data_dir": None, "config": CONFIG} | arguments)
