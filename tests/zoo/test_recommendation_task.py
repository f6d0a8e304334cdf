"""Ranking among candidates: loss, metrics, and what is no candidate."""

import jax.numpy as jnp
import numpy as np
import pytest

from zoo.tasks.recommendation import loss, metrics, pad, popularity

CANDIDATES = jnp.array([[5, 1, 2, 3], [5, 1, 2, 0]])


def test_metrics_follow_from_the_rank():
    many = jnp.arange(1, 13)[None]
    for rank in (1, 2, 10, 11):
        scores = jnp.where(jnp.arange(12) == 0, 12.5 - rank, 12.0 - jnp.arange(12))[None]
        found = {k: float(v[0]) for k, v in metrics(scores, {"candidates": many}).items()}
        expected = {"ndcg10": (rank <= 10) / np.log2(1 + rank), "hr10": rank <= 10, "hr1": rank == 1, "mrr": 1 / rank}
        assert found == pytest.approx({k: float(v) for k, v in expected.items()})


def test_ties_and_what_is_not_a_number_rank_last():
    equal = metrics(jnp.zeros((2, 4)), {"candidates": CANDIDATES})["mrr"]
    np.testing.assert_allclose(equal, [1 / 4, 1 / 3])
    broken = metrics(jnp.full((1, 4), jnp.nan), {"candidates": CANDIDATES[:1]})
    assert broken["mrr"][0] == pytest.approx(1 / 4)


def test_no_item_is_no_candidate():
    scores = jnp.array([[1.0, 0.0, 0.5, 9.0]] * 2)
    value, _ = loss(scores[1:], {"candidates": CANDIDATES[1:]})
    assert value == pytest.approx(np.log(np.exp([1.0, 0.0, 0.5]).sum()) - 1.0)
    assert metrics({"scores": scores}, {"candidates": CANDIDATES})["hr1"].tolist() == [0.0, 1.0]


def test_padding_adds_candidates_that_are_none():
    batch = {"candidates": CANDIDATES, "candidate_contexts": jnp.ones((2, 4, 6))}
    padded, unpad = pad(batch)
    assert padded["candidates"].tolist() == [[5, 1, 2, 3, 0, 0, 0], [5, 1, 2, 0, 0, 0, 0]]
    assert padded["candidate_contexts"].shape == (2, 7, 6)
    parts = unpad({"scores": jnp.zeros((2, 7)), "gate": jnp.zeros(2)})
    assert (parts["scores"].shape, parts["gate"].shape) == ((2, 4), (2,))


def test_popularity_goes_by_number():
    assert np.argsort(-popularity({"candidates": CANDIDATES[:1]}))[0].tolist() == [1, 2, 3, 0]
