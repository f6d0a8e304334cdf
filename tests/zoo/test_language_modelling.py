"""Language modelling: what counts, what a row's texts see of each other, the scores of a whole split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.tasks import language_modelling as task

KEY = jax.random.key(0)
BATCH = task.example(length=12, vocabulary=10, batch_size=5, key=KEY)
LOGITS = jax.random.normal(KEY, (5, 12, 10))


def by_loop():
    """-log p of each scored token, and whether it was the likeliest."""
    logits, tokens, scored = (np.asarray(x, np.float64) for x in (LOGITS, BATCH["tokens"], BATCH["scored"]))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = [(b, t) for b in range(5) for t in range(12) if scored[b, t]]
    errors = [-log_p[b, t - 1, int(tokens[b, t])] for b, t in places]
    hits = [logits[b, t - 1].argmax() == tokens[b, t] for b, t in places]
    return np.array(errors), np.array(hits)


def test_an_example_has_two_texts_a_row_and_padding():
    segments, positions, scored = (np.asarray(BATCH[name]) for name in ("segments", "positions", "scored"))
    assert set(np.unique(segments)) == {0, 1, 2}
    assert np.array_equal(positions == 0, (segments == 0) | (np.diff(segments, axis=1, prepend=0) > 0))
    assert np.array_equal(scored, (segments > 0) & (positions > 0))


def test_loss_and_scores_are_means_over_what_counts():
    errors, hits = by_loop()
    loss, _ = task.loss(task.Output(LOGITS), BATCH)
    np.testing.assert_allclose(loss, errors.mean(), rtol=1e-5)
    totals = {name: float(x.sum()) for name, x in task.metrics(task.Output(LOGITS), BATCH).items()}
    found = task.summarise(totals, None)
    assert found == pytest.approx({
        "nll": errors.mean(), "bits": errors.mean() / np.log(2), "perplexity": np.exp(errors.mean()),
        "accuracy": hits.mean(),
    }, rel=1e-5)  # fmt: skip
    other = {**BATCH, "tokens": jnp.where(BATCH["scored"], BATCH["tokens"], 9)}
    np.testing.assert_allclose(task.loss(task.Output(LOGITS), other)[0], loss, rtol=1e-6)


def test_rows_without_a_scored_token_cost_nothing():
    nothing = {**BATCH, "scored": jnp.zeros((5, 12), bool)}
    assert task.loss(task.Output(LOGITS), nothing)[0] == 0
    assert task.summarise(dict.fromkeys(("errors", "hits", "tokens"), 0.0), None)["nll"] == 0


def test_the_unigram_knows_frequencies_alone():
    share = jnp.log(jnp.arange(1.0, 11) / 55)
    outputs = task.unigram({**BATCH, "frequency": jnp.tile(share, (5, 1))})
    tokens = np.asarray(BATCH["tokens"])[np.asarray(BATCH["scored"])]
    loss, _ = task.loss(outputs, BATCH)
    np.testing.assert_allclose(loss, -np.asarray(share)[tokens].mean(), rtol=1e-5)


def test_padding_stands_on_both_sides_and_is_taken_out_again():
    padded, unpad = task.pad(BATCH)
    assert padded["tokens"].shape == (5, 18)
    assert not np.any(padded["segments"][:, :3])
    assert not np.any(padded["scored"][:, 15:])
    assert np.any(np.asarray(padded["tokens"])[:, :3])
    wide = jnp.pad(LOGITS, ((0, 0), (3, 3), (0, 0)))
    np.testing.assert_array_equal(unpad(task.Output(wide)).logits, LOGITS)


def test_the_picture_shows_what_counts():
    figure = task.picture(BATCH, task.Output(LOGITS))
    shown = figure.axes[0].images[0].get_array()
    assert np.array_equal(np.isfinite(np.ma.filled(shown, np.nan)), np.asarray(BATCH["scored"])[:, 1:])
