"""The stand-in for aerial surveys: towns of points, one a voxel."""

import chex
import numpy as np
import pytest

import zoo
from trainers.data import towns
from trainers.data.towns import CLASSES, draw_town, load_towns, voxelised

SIZES = {"num_points": 600, "num_classes": 5, "cell": 0.75, "depth": 4}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(towns, "_COUNTS", {"train": 4, "valid": 2, "test": 3})


def test_a_town_has_everything_and_houses_of_both_kinds_share_their_colours():
    rng = np.random.default_rng(0)
    scenes = [draw_town(rng, side=12.0, density=6.0) for _ in range(60)]
    place, color, label = (np.concatenate(v) for v in zip(*scenes, strict=True))
    assert set(label) == set(range(len(CLASSES)))
    assert np.abs(place[:, :2]).max() <= 6
    assert 0 <= color.min() <= color.max() <= 1
    means = [color[label == k].mean(axis=0) for k in (1, 2)]
    np.testing.assert_allclose(*means, atol=0.08)
    # What fell down is lower than what stands, and there is more of it near the ground.
    assert place[label == 1, 2].mean() < 0.8 * place[label == 2, 2].mean()


def test_one_point_is_kept_of_every_voxel():
    rng = np.random.default_rng(1)
    place = rng.uniform(0, 3, (200, 3))
    kept, cells = voxelised(rng, place, cell=1.0, lower=np.zeros(3))
    np.testing.assert_array_equal(np.floor(place[kept]), cells)
    assert len({tuple(c) for c in cells.tolist()}) == len(cells) == len(np.unique(np.floor(place), axis=0))


def test_the_standin_is_the_same_everywhere_and_its_parts_are_distinct(few):
    data = load_towns("standin", data_dir=None, **SIZES)
    chex.assert_trees_all_equal(data.train, load_towns("standin", data_dir=None, **SIZES).train)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [4, 2, 3]
    batch = data.test.batch(np.array([1, 2]))
    shapes = [(2, 600, 3), (2, 600, 6), (2, 600, 3), (2, 600), (2, 5)]
    chex.assert_shape([batch[k] for k in ("coord", "feat", "cell", "label", "prior")], shapes)
    present = np.asarray(batch["point_mask"])
    assert 250 < present.sum(axis=1).min() < 600
    assert np.all((np.asarray(batch["label"]) >= 0) == present)
    for cells, there in zip(np.asarray(batch["cell"]), present, strict=True):
        assert len(np.unique(cells[there], axis=0)) == there.sum()
        assert cells.min() >= 0
        assert cells.max() < 16
    assert not np.allclose(data.valid.coord[0], data.test.coord[0])
    assert float(batch["prior"][0].sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "standing"}, "no set of point scenes is called 'standing'; did you mean 'standin'"),
        ({"data_dir": "somewhere"}, "the stand-in is generated and takes no --data-dir"),
        ({"num_classes": 4}, "towns have 5 classes, not 4: set --model.num-classes 5"),
    ],
)
def test_what_cannot_be_loaded(changes, message):
    arguments = {"name": "standin", "data_dir": None, **SIZES} | changes
    with pytest.raises(zoo.UserError, match=message):
        load_towns(arguments.pop("name"), **arguments)
