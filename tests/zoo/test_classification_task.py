"""Classification: loss and metrics with one label and with several, what ties get, scores of a whole split, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.tasks import classification as task

KEY = jax.random.key(0)
LOGITS = jnp.array([[2.0, 0.0, -1.0], [0.0, 0.0, -1.0], [1.0, 3.0, 0.0]])
LABEL = jnp.array([0, 1, 2])


def test_loss_and_metrics_follow_their_definitions():
    batch = {"label": LABEL}
    found = task.metrics({"logits": LOGITS}, batch)
    np.testing.assert_allclose(found["accuracy"], [1, 0.5, 0])  # a tie of two is half a hit
    shares = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    np.testing.assert_allclose(found["nll"], -np.log(shares[[0, 1, 2], LABEL]), rtol=1e-6)
    assert float(task.loss(LOGITS, batch)[0]) == pytest.approx(float(found["nll"].mean()))


def test_what_is_not_a_number_is_never_right():
    assert task.metrics(jnp.full((3, 3), jnp.nan), {"label": LABEL})["accuracy"].tolist() == [0, 0, 0]
    one = LOGITS.at[0, 1].set(jnp.nan)
    assert float(task.metrics(one, {"label": LABEL})["accuracy"][0]) == 0


def test_several_labels_are_as_many_questions():
    label = jnp.array([[1, 0, 1], [0, 0, 0], [0, 1, 1]])
    found = task.metrics(LOGITS, {"label": label})
    np.testing.assert_allclose(found["accuracy"], [2 / 3, 1, 1 / 3], rtol=1e-6)
    share = 1 / (1 + np.exp(-np.asarray(LOGITS)))
    expected = -np.mean(np.where(label, np.log(share), np.log(1 - share)), axis=1)
    np.testing.assert_allclose(found["nll"], expected, rtol=1e-6)


def test_the_prior_is_what_guessing_by_frequency_gets():
    label = np.array([0, 0, 0, 1, 2, 2])
    row = task.class_prior(label, 3)
    np.testing.assert_allclose(np.exp(row), np.array([3.5, 1.5, 2.5]) / 7.5, rtol=1e-6)
    batch = {"label": jnp.asarray(label), "prior": jnp.broadcast_to(row, (6, 3))}
    assert float(task.metrics(task.prior(batch), batch)["accuracy"].mean()) == pytest.approx(0.5)
    several = np.array([[1, 0], [1, 0], [0, 0]])
    np.testing.assert_allclose(task.class_prior(several, 2), np.log([2.5 / 1.5, 0.5 / 3.5]), rtol=1e-6)


def test_scores_of_a_split_equal_the_loops_of_their_definitions():
    rng = np.random.default_rng(3)
    logits, label = np.round(rng.normal(size=(60, 4)), 1), rng.integers(0, 3, 60)  # class 3 is only ever guessed
    found = task.report(jnp.asarray(logits), {"label": jnp.asarray(label)})
    logits = np.float64(np.float32(logits))
    guess, shares = logits.argmax(1), np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    precisions, recalls, f1s, areas = [], [], [], []
    for k in range(4):
        hit = np.sum((guess == k) & (label == k))
        precisions.append(hit / max(np.sum(guess == k), 1))
        recalls.append(hit / max(np.sum(label == k), 1))
        f1s.append(2 * hit / max(np.sum(guess == k) + np.sum(label == k), 1))
        if k < 3:
            for_it, against = shares[label == k, k], shares[label != k, k]
            pairs = (for_it[:, None] > against) + 0.5 * (for_it[:, None] == against)
            areas.append(pairs.mean())
    wanted = {"macro_precision": precisions, "macro_recall": recalls, "macro_f1": f1s, "auroc": areas}
    for name, values in wanted.items():
        assert found[name] == pytest.approx(np.mean(values)), name
    # Either class has its two examples at places 1 and 3.
    ranked = task.report(jnp.array([[0, 4.0], [0, 3.0], [0, 2.0], [0, 1.0]]), {"label": jnp.array([1, 0, 1, 0])})
    assert ranked["auprc"] == pytest.approx((1 + 2 / 3) / 2)


def test_scores_of_classes_without_examples_are_left_out():
    found = task.report(LOGITS[:2], {"label": jnp.array([0, 0])})
    assert (found["macro_recall"], found["macro_precision"]) == (1.0, 1.0)
    assert np.isnan(found["auroc"])  # one class alone has no ranking
    several = task.report(LOGITS, {"label": jnp.array([[1, 0, 0], [0, 0, 0], [1, 1, 0]])})
    assert several["macro_f1"] == pytest.approx(1.0)


def test_the_confusion_matrix_counts_pairs():
    counts = task.confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 1]), 3)
    assert counts.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]


def test_padding_fills_masked_sequences_only():
    plain = task.example(shape=(5, 2), num_classes=3, batch_size=4, key=KEY)
    assert task.pad(plain)[0] is plain
    batch = task.example(shape=(5,), num_classes=3, batch_size=4, key=KEY, vocabulary=9, masked=True)
    padded, unpad = task.pad(batch)
    assert (padded["x"].shape, padded["mask"].shape) == ((4, 8), (4, 8))
    assert not padded["mask"][:, 5:].any()
    assert padded["x"].dtype == batch["x"].dtype
    parts = unpad({"logits": jnp.zeros((4, 8)), "attention": jnp.zeros((4, 8))})
    assert {name: part.shape for name, part in parts.items()} == {"logits": (4, 8), "attention": (4, 5)}


@pytest.mark.parametrize(
    "options",
    [{"shape": (30, 3)}, {"shape": (8, 8, 3)}, {"shape": (6,), "vocabulary": 9}, {"shape": (30, 3), "several": True}],
)
def test_every_modality_has_a_picture(options):
    batch = task.example(num_classes=4, batch_size=2, key=KEY, **options)
    assert task.picture(batch, jnp.zeros((2, 4))).axes
