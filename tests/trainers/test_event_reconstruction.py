"""Events of a telescope: the stand-in, padding, and the baseline."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data.event_reconstruction import event_standin, load_events, module_places, padded_events
from zoo.tasks.event_reconstruction import charge_and_slope, metrics


@pytest.fixture(scope="module")
def events():
    return event_standin(0, 400)


def test_the_modules_hang_on_eight_strings():
    places = module_places()
    assert places.shape == (8, 36, 3)
    chex.assert_trees_all_close(np.linalg.norm(places[1:, :, :2], axis=-1), np.full((7, 36), 60.0))
    chex.assert_trees_all_close(np.diff(places[..., 2]), np.full((8, 35), 15.0))
    assert abs(places[..., 2].mean()) < 1e-9


def test_the_standin_is_the_same_everywhere(events):
    again = event_standin(0, 3)
    chex.assert_trees_all_equal(events[:3], again)
    assert len(event_standin(1, 1)[0]["hits"]) != len(events[0]["hits"])
    chex.assert_trees_all_close(events[2]["hits"][0], np.array(NUMBERS), atol=1e-4)


NUMBERS = [0.9649348, -1460.2548570, 37.4093881, -46.9098889, -52.5]


def test_the_standins_events_look_like_the_detectors(events):
    count = np.array([len(e["hits"]) for e in events])
    signal = np.concatenate([e["signal"] for e in events])
    late = np.concatenate([e["residual"] for e in events])
    assert 50 < count.mean() < 60
    assert count.min() >= 5
    assert 0.24 < signal.mean() < 0.31
    assert 2.7 < late[signal == 1].std() < 3.3
    assert late[signal == 0].std() > 300
    assert 0.45 < np.mean([e["event"] for e in events]) < 0.55
    for event in events[:20]:
        assert np.all(np.diff(event["hits"][:, 1]) >= 0)


def test_the_signal_rises_in_neutrinos_and_falls_in_background(events):
    for event in events[:50]:
        hits = event["hits"][event["signal"] == 1]
        if len(hits) > 5:
            slope = np.polyfit(hits[:, 1], hits[:, 4], 1)[0]  # m / ns, as the light of an almost level muon rises too
            assert abs(slope) < 0.1 or (slope > 0) == bool(event["event"])


def test_measured_events_have_more_charge_and_noise(events):
    measured = event_standin(0, 400, shifted=True)
    charge = [np.concatenate([e["hits"][e["signal"] == 0, 0] for e in one]) for one in (events, measured)]
    assert 1.25 < charge[1].mean() / charge[0].mean() < 1.35
    assert 1.4 < len(charge[1]) / len(charge[0]) < 1.6
    late = [np.concatenate([e["residual"][e["signal"] == 1] for e in one]) for one in (events, measured)]
    assert late[1].std() > 2 * late[0].std()
    assert {e["domain"] for e in measured} == {1}


def test_padding_comes_last_and_the_faintest_hits_go_first(events):
    split = padded_events(events[:30], 40)
    for i, event in enumerate(events[:30]):
        count = min(len(event["hits"]), 40)
        assert np.asarray(split.present[i]).tolist() == [True] * count + [False] * (40 - count)
        kept = np.asarray(split.hits[i, :count])
        chex.assert_trees_all_close(np.sort(kept[:, 0]), np.sort(event["hits"][:, 0])[-count:].astype(np.float32))
        assert np.all(np.diff(kept[:, 1]) >= 0)
        assert not np.any(split.hits[i, count:])


def test_parts_are_distinct_and_a_shifted_set_alternates():
    data = load_events("standin_shifted", data_dir=None, num_hits=32)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [4800, 600, 600]
    chex.assert_trees_all_equal(data.test.domain, jnp.arange(600) % 2)
    batch = data.test.batch(jnp.array([5, 7]))
    chex.assert_shape(batch["hits"], (2, 32, 5))
    chex.assert_trees_all_equal(batch["hits"][1], data.test.hits[7])
    assert not np.allclose(data.test.hits[0], data.valid.hits[0])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("standinn", {}, "no set of events is called 'standinn'; did you mean 'standin'"),
        ("standin", {"data_dir": "somewhere"}, "the stand-in is generated"),
        ("standin", {"num_hits": 4}, "at least 5 hits: num_hits is at least that, not 4"),
    ],
)
def test_what_cannot_be_loaded(name, changes, message):
    with pytest.raises(zoo.UserError, match=message):
        load_events(name, **{"data_dir": None, "num_hits": 32} | changes)


def test_the_baseline_reads_charges_and_slopes(events):
    batch = padded_events(events, 96).batch(jnp.arange(400))
    scores = {name: float(values.mean()) for name, values in metrics(charge_and_slope(batch), batch).items()}
    assert 0.55 < scores["event_accuracy"] < 0.75
    assert 0.45 < scores["hit_f1"] < 0.65


def test_metrics_count_hits_by_hand():
    batch = {
        "hit_mask": jnp.array([[True, True, True, True, False]]),
        "signal": jnp.array([[1, 1, 0, 0, 1]]),
        "residual": jnp.array([[1.0, -3.0, 100.0, 0.0, 50.0]]),
        "event": jnp.array([1]),
    }
    guess = jnp.array([[1.0, 0.0, 1.0, 0.0, 1.0]])
    outputs = {
        "event": jnp.array([[0.2, 0.1]]),
        "hits": jnp.stack([1 - guess, guess], axis=-1),
        "residual": jnp.zeros((1, 5)),
    }
    scores = {name: float(values[0]) for name, values in metrics(outputs, batch).items()}
    assert scores == {
        "event_accuracy": 0.0, "hit_precision": 0.5, "hit_recall": 0.5, "hit_f1": 0.5, "residual_mae": 2.0,
    }  # fmt: skip
