"""Texts to model: recall means what it says, nothing of a text is lost, texts of a row are told apart."""

import gzip

import numpy as np
import pytest

from trainers.data.language import load_language, packed_rows, recall_standin
from zoo.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTENTION_ZOO_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_what_is_scored_was_said_before(noise):
    found = recall_standin(0, 20, length=65, vocabulary=32, noise=noise)
    tokens, scored = found["tokens"], found["scored"]
    assert scored.any()
    assert not scored[:, :3].any()
    for row, counts in zip(tokens, scored, strict=True):
        values = {}
        for place in range(1, 65):
            key, value = row[place - 1], row[place]
            if key < 16 <= value:
                assert counts[place] == (key in values)
                assert values.setdefault(key, value) == value
            else:
                assert not counts[place]
    assert (tokens >= 30).any()
    shares = [(row >= 30).mean() for row in tokens] if noise else [0.3]
    assert np.mean(shares) == pytest.approx(0.3, abs=0.15)


def test_the_standin_is_a_function_of_its_seed_and_its_parts_differ():
    def load(seed, name="standin"):
        return load_language(name, data_dir=None, length=16, vocabulary=16, seed=seed)

    data, again, other = load(1), load(1), load(2)
    np.testing.assert_array_equal(data.train.tokens, again.train.tokens)
    assert np.any(np.asarray(data.train.tokens) != np.asarray(other.train.tokens))
    assert (len(data.train), len(data.valid), len(data.test)) == (4096, 256, 512)
    parts = [{row.tobytes() for row in np.asarray(part.tokens)} for part in (data.train, data.valid, data.test)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    batch = data.test.batch(np.arange(3))
    named = np.asarray(data.train.tokens)[np.asarray(data.train.scored)]
    assert np.exp(np.asarray(batch["frequency"][0])).sum() == pytest.approx(1, rel=1e-5)
    assert np.exp(float(batch["frequency"][0, 12])) == pytest.approx((named == 12).mean(), rel=0.01)
    assert data.text(np.array([0, 8])) == "k0 v0 "


def test_packed_rows_hold_every_text_once_and_whole():
    texts = [b"x" * n + bytes([65 + n]) for n in (3, 9, 1, 0, 5, 2, 7, 4)] + [bytes(range(97, 122))]
    rows = packed_rows(texts, 12)
    found = []
    for tokens, segments, positions in zip(rows["tokens"], rows["segments"], rows["positions"], strict=True):
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            np.testing.assert_array_equal(positions[inside], np.arange(inside.sum()))
            found.append(bytes(tokens[inside].astype(np.uint8)))
    # The last, too long for a row, in three pieces.
    pieces = [texts[-1][:12], texts[-1][12:24], texts[-1][24:] + b"\n"]
    assert sorted(found) == sorted([text + b"\n" for text in texts[:-1]] + pieces)
    assert (rows["segments"] > 0).mean() > 0.8
    np.testing.assert_array_equal(rows["scored"], (rows["segments"] > 0) & (rows["positions"] > 0))


def test_shakespeare_is_cut_without_a_gap(tmp_path):
    text = "".join(chr(97 + i * i % 26) for i in range(1000))
    (tmp_path / "input.txt").write_text(text)
    data = load_language("tiny_shakespeare", data_dir=str(tmp_path), length=30, vocabulary=26)
    words = len(data.vocabulary)
    assert words == len(set(text))
    assert "".join(data.text(row) for row in data.train.tokens[:30]) == text[:900]
    # Cut again at other places, from a quarter of a row on.
    assert data.text(data.train.tokens[30]) == text[7:37]
    assert len(data.train) == 30 + 3 * 29
    assert data.text(data.test.tokens[0]) == text[900:930]
    with pytest.raises(UserError, match=f"tiny_shakespeare has {words} tokens, the model 4: set --model.vocabulary"):
        load_language("tiny_shakespeare", data_dir=str(tmp_path), length=30, vocabulary=4)
    with pytest.raises(UserError, match="a text of 100 tokens has no row of 1000"):
        load_language("tiny_shakespeare", data_dir=str(tmp_path), length=1000, vocabulary=26)


def test_captions_are_packed(tmp_path):
    for part, lines in (("train", 40), ("val", 4), ("test_2016_flickr", 4)):
        for language in ("de", "en"):
            text = "".join(f"{language} {part} {'o' * (i % 7)}\n" for i in range(lines))
            (tmp_path / f"{part}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    data = load_language("multi30k_de_en", data_dir=str(tmp_path), length=64, vocabulary=256)
    whole = "".join(data.text(row) for row in data.train.tokens)
    assert whole.count("en train") == 40
    assert "de" not in whole
    assert int((np.asarray(data.train.positions) == 0)[np.asarray(data.train.segments) > 0].sum()) == 40
    assert len(data.train) < 20


def test_a_wrong_name_or_size_is_answered():
    with pytest.raises(UserError, match=r"no text to model is called 'tiny_shakespear'.*tiny_shakespeare"):
        load_language("tiny_shakespear", data_dir=None, length=16, vocabulary=64)
    with pytest.raises(UserError, match="the stand-in is generated and takes no --data-dir"):
        load_language("standin", data_dir="x", length=16, vocabulary=64)
    with pytest.raises(UserError, match="recall wants an even vocabulary of at least 16"):
        load_language("standin", data_dir=None, length=16, vocabulary=15)
