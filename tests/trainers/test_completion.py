"""Shapes of which one side was seen: the stand-in's bodies, their crops, and real scans."""

import chex
import numpy as np
import pytest

import zoo
from trainers.data import completion
from trainers.data.completion import crop, draw_body, load_completion, resampled

SIZES = {"num_points": 24, "num_targets": 40}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(completion, "_COUNTS", {"train": 6, "valid": 2, "test": 4})


def test_bodies_fill_the_unit_sphere():
    rng = np.random.default_rng(0)
    for _ in range(20):
        body = draw_body(rng, 300)
        assert body.shape == (300, 3)
        np.testing.assert_allclose(body.mean(0), 0, atol=1e-9)
        assert np.linalg.norm(body, axis=1).max() == pytest.approx(1)


def test_a_crop_loses_the_points_nearest_to_the_view():
    points = np.random.default_rng(1).normal(size=(50, 3))
    view = np.array([0.0, 0.0, 1.0])
    left = crop(points, view, 20)
    gone = np.array([p for p in points.tolist() if p not in left.tolist()])
    assert len(left) == 30
    assert len(gone) == 20
    assert np.linalg.norm(gone - view, axis=1).max() < np.linalg.norm(left - view, axis=1).min()


def test_resampling_takes_a_part_or_fills_up():
    rng, points = np.random.default_rng(2), np.arange(1.0, 22.0).reshape(7, 3)
    part, present = resampled(rng, points, 4)
    assert present.all()
    assert len({tuple(p) for p in part.tolist()} & {tuple(p) for p in points.tolist()}) == 4
    whole, present = resampled(rng, points, 9)
    assert present.tolist() == [True] * 7 + [False] * 2
    np.testing.assert_array_equal(np.sort(whole[:7], axis=0), points)
    assert not whole[7:].any()


def test_the_standin_is_the_same_everywhere_and_its_parts_are_distinct(few):
    data = load_completion("standin", data_dir=None, **SIZES)
    again = load_completion("standin", data_dir=None, **SIZES)
    chex.assert_trees_all_equal(data.train, again.train)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [6, 2, 4]
    batch = data.test.batch(np.array([2, 0]))
    chex.assert_shape([batch["x"], batch["y"]], [(2, 24, 3), (2, 40, 3)])
    assert bool(batch["point_mask"].all())
    assert not np.allclose(data.valid.complete[0], data.test.complete[0])
    other = load_completion("standin", data_dir=None, seed=1, **SIZES)
    assert not np.allclose(data.train.seen, other.train.seen)


def test_real_scans_are_cropped_from_eight_sides(few, tmp_path):
    rng = np.random.default_rng(3)
    for name, count in (("chair", 20), ("lamp", 60)):
        points = rng.normal(size=(count, 3))
        header = f"VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH {count}\nHEIGHT 1\n"
        rows = "".join(f"{x} {y} {z}\n" for x, y, z in points)
        (tmp_path / f"{name}.pcd").write_text(f"{header}VIEWPOINT 0 0 0 1 0 0 0\nPOINTS {count}\nDATA ascii\n{rows}")
    data = load_completion("pcn_demo_clouds", data_dir=str(tmp_path), **SIZES)
    assert len(data.test) == 16
    assert np.asarray(data.test.present).sum(1).tolist() == [15] * 8 + [24] * 8
    assert len(data.train) == 6


@pytest.mark.parametrize(
    ("name", "data_dir", "message"),
    [
        ("standin", "somewhere", "the stand-in is generated and takes no --data-dir"),
        ("pcn_demo_cloud", None, "no set of point clouds is called 'pcn_demo_cloud'; did you mean 'pcn_demo_clouds'"),
    ],
)
def test_what_cannot_be_loaded(name, data_dir, message):
    with pytest.raises(zoo.UserError, match=message):
        load_completion(name, data_dir=data_dir, **SIZES)
