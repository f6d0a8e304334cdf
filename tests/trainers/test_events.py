"""Events: the stand-in's glyphs, pictures that tremble, and what the loader answers."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data import events
from trainers.data.events import draw_glyphs, events_of_pictures, load_events

CONFIG = zoo.paper("neuromorphic_sign").config("tiny")
SIZE = {"num_classes": 8, "steps": 12, "height": 48, "width": 48, "size": 21, "anywhere": False}


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def test_a_glyph_trembles_and_only_its_coming_is_seen():
    found, label = draw_glyphs(rng(), 80, **SIZE)
    assert np.bincount(label).tolist() == [10] * 8
    for recording in found:
        step, caused = recording[:, 0], recording[:, 3]
        assert step.min() >= 0
        assert step.max() < 12
        # Of 48 pixels the glyph reaches the middle 21, four more for its place and two for its trembling.
        glyph = recording[caused == 1]
        assert glyph[:, 1:3].min() >= 13 - 6
        assert glyph[:, 1:3].max() < 13 + 21 + 6
        assert len(np.unique(recording[:, :3], axis=0)) == len(recording)
    noise = np.mean([np.sum(recording[:, 3] == 0) for recording in found]) / (12 * 48 * 48)
    assert 0.0015 < noise < 0.0025
    again, same = draw_glyphs(rng(), 80, **SIZE)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    assert np.array_equal(label, same)
    other, _ = draw_glyphs(rng(1), 80, **SIZE)
    assert not np.array_equal(found[0], other[0])


def test_glyphs_differ():
    shapes = [events._glyph(bars, 21) for bars in events._GLYPHS]
    assert len(shapes) == 26
    assert len({shape.tobytes() for shape in shapes}) == 26
    assert min(np.sum(a != b) for i, a in enumerate(shapes) for b in shapes[:i]) >= 30


def test_in_a_frame_a_glyph_is_anywhere():
    found, _ = draw_glyphs(rng(), 60, **SIZE | {"height": 80, "width": 100, "anywhere": True})
    centres = np.array([np.median(r[r[:, 3] == 1][:, 1:3], axis=0) for r in found])
    assert (centres.min(0) < 20).all()
    assert (centres.max(0) > np.array([60, 80])).all()


def test_a_batch_is_pictures_of_each_step(monkeypatch):
    monkeypatch.setattr(events, "_COUNTS", {"train": 40, "valid": 8, "test": 16})
    data = load_events("standin", data_dir=None, config=CONFIG)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [40, 8, 16]
    batch = data.train.batch(jnp.array([3, 0]))
    assert batch["x"].shape == (2, 12, 48, 48)
    for x, number in zip(np.asarray(batch["x"]), (3, 0), strict=True):
        listed = np.asarray(data.train.events[number])
        listed = listed[listed[:, 0] < 12]
        np.testing.assert_array_equal(np.argwhere(x), listed)
        assert set(np.unique(x)) == {0, 1}
    np.testing.assert_allclose(np.exp(batch["prior"]), 1 / 8, rtol=1e-5)
    parts = [np.asarray(part.events[:8]) for part in (data.train, data.test)]
    assert not np.array_equal(parts[0][:, :100], parts[1][:, :100])
    framed = replace(CONFIG, attend=True, attention=replace(CONFIG.attention, height=90, width=120, region=80))
    whole = load_events("standin", data_dir=None, config=framed).test.batch(jnp.arange(2))
    assert whole["x"].shape == (2, 12, 90, 120)


def test_pictures_that_stand_still_or_are_even_cause_nothing():
    even = np.full((1, 28, 28), 90, np.uint8)
    assert len(events_of_pictures(rng(), even, steps=5, height=48, width=48)[0]) == 0
    edge = even.copy()
    edge[:, :, 14:] = 250
    (found,) = events_of_pictures(rng(), edge, steps=30, height=48, width=48)
    # The edge, at column 24, moves by two to either side: brightness comes there alone.
    assert set(found[:, 2]) <= set(range(20, 28))
    assert len(found) > 48


def test_signs_are_divided(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTENTION_ZOO_CACHE", str(tmp_path / "cache"))
    numbers = [k for k in range(25) if k != 9]
    for part, each in (("train", 5), ("test", 1)):
        rows = [",".join(map(str, [k, *rng(k).integers(0, 256, 784)])) for k in numbers for _ in range(each)]
        (tmp_path / f"sign_mnist_{part}.csv").write_text("\n".join(rows) + "\n")
    config = replace(CONFIG, num_classes=24)
    data = load_events("sign_mnist_fragment", data_dir=str(tmp_path), config=config)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [96, 24, 24]
    assert sorted(data.valid.label.tolist()) == sorted(data.test.label.tolist()) == list(range(24))
    assert data.classes[9] == "K"
    assert data.test.batch(jnp.arange(3))["x"].sum() > 100


@pytest.mark.parametrize(
    ("name", "changes", "data_dir", "message"),
    [
        ("standin", {}, "x", "the stand-in is generated and takes no --data-dir"),
        ("standin", {"num_classes": 27}, None, "has 2 to 26 glyphs, not 27: set --model.num-classes"),
        ("sign_mnist_fragment", {}, "x", "has 24 letters, each in the middle: set --model.num-classes 24"),
        ("sign_mnist", {}, None, "no set of events is called 'sign_mnist'; did you mean 'sign_mnist_fragment'"),
    ],
)
def test_what_cannot_be_loaded(name, changes, data_dir, message):
    with pytest.raises(zoo.UserError, match=message):
        load_events(name, data_dir=data_dir, config=replace(CONFIG, **changes))
