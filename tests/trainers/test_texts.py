"""Texts as numbers of words: cleaning, vocabulary, division; the stand-in with negations."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data.texts import load_texts, negation_standin, polar_standin, words_of

SIZES = {"length": 40, "vocabulary": 50, "num_classes": 2}


def test_words_are_letters_between_blanks():
    text = 'A <br />"great" film; see https://x.org/y?z or www.a.de! It\'s 10/10\tfun.'
    assert words_of(text) == ["a", "great", "film", "see", "or", "its", "fun"]
    assert words_of("<br /> 1999 !") == []


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTENTION_ZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Reviews of two classes; each has a word of its own."""
    path = tmp_path_factory.mktemp("reviews")
    rows = [
        {"split": ("train", "test")[i % 2], "label": i // 2 % 2, "rating": 1, "text": f"film {'bad' if i % 3 else ''} "
         + "".join(chr(97 + int(d)) for d in str(1000 + i))}
        for i in range(40)
    ]  # fmt: skip
    rows[0]["text"] = "..."
    (path / "imdb_sample.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_reviews_are_divided_and_words_counted_on_the_training_part(folder):
    data = load_texts("imdb_sample", data_dir=folder, length=3, vocabulary=30, num_classes=2)
    parts = (data.train, data.valid, data.test)
    assert [len(part) for part in parts] == [28, 4, 8]
    assert [int(part.label.sum()) for part in parts] == [14, 2, 4]
    assert data.vocabulary[:4] == ("", "?", "film", "bad")
    assert len(data.vocabulary) == 30
    assert int(data.train.tokens.max()) == 29
    held = np.concatenate([part.tokens for part in parts[1:]])
    assert (held == 1).any()  # their own words are unknown
    whole = np.concatenate([part.lengths for part in parts])
    assert whole.min() == 1  # the empty review
    batch = data.train.batch(jnp.arange(5))
    assert np.array_equal(batch["mask"].sum(1), data.train.lengths[:5])
    again = load_texts("imdb_sample", data_dir=folder, length=3, vocabulary=30, num_classes=2)
    assert np.array_equal(again.test.tokens, data.test.tokens)


def test_long_texts_are_cut(folder):
    data = load_texts("imdb_sample", data_dir=folder, length=1, vocabulary=30, num_classes=2)
    assert data.train.tokens.shape == (28, 1)
    assert data.train.lengths.max() == 1


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("imdb_smple", {}, "no set of texts is called 'imdb_smple'; did you mean 'imdb_sample'"),
        ("imdb_sample", {"num_classes": 3}, "imdb_sample has 2 classes, not 3"),
        ("standin", {}, "the stand-in is generated and takes no --data-dir"),
    ],
)
def test_what_cannot_be_loaded(folder, name, changes, message):
    with pytest.raises(zoo.UserError, match=message):
        load_texts(name, data_dir=folder, **SIZES | changes)


def test_the_standin_has_its_own_sizes():
    with pytest.raises(zoo.UserError, match=r"50 words, 2 classes and up to 40 words a text: .* instead of 40, 2, 40"):
        load_texts("standin", data_dir=None, **SIZES | {"vocabulary": 40})


def test_in_the_standin_negators_turn_the_next_word_around():
    texts, label = negation_standin(0, **SIZES)["test"]
    again, other = (negation_standin(seed, **SIZES)["test"] for seed in (0, 1))
    assert all(map(np.array_equal, texts, again[0]))
    assert not all(map(np.array_equal, texts, other[0]))
    assert (len(texts), {len(t) for t in texts} <= set(range(5, 41))) == (2000, True)
    for text, expected in zip(texts[:200], label, strict=False):
        total, turned = 0, False
        for token in text:
            if token >= 42:
                turned = True
            elif token >= 22:
                total += (1 if token < 32 else -1) * (-1 if turned else 1)
                turned = False
        assert (total > 0) == expected
        assert total
    assert 0.45 < label.mean() < 0.55


def test_the_polar_stand_in_is_a_majority_of_words():
    sizes = {"length": 16, "vocabulary": 202, "num_classes": 2}
    parts, again, other = (polar_standin(seed, **sizes) for seed in (3, 3, 4))
    texts, label = parts["train"]
    assert np.array_equal(texts[:9], again["train"][0][:9])
    assert not np.array_equal(texts[0], other["train"][0][0])
    assert [len(part[1]) for part in parts.values()] == [4_000, 500, 1_000]
    assert 0.45 < label.mean() < 0.55
    for words, positive in zip(texts[:200], label[:200], strict=True):
        good, bad = np.sum((words >= 162) & (words < 182)), np.sum(words >= 182)
        assert 1 <= good + bad <= 4
        assert (good > bad) == bool(positive)
    with pytest.raises(zoo.UserError, match="standin_polar has 202 words, 2 classes and 16 words a text: set --model"):
        load_texts("standin_polar", data_dir=None, length=16, vocabulary=50, num_classes=2)
