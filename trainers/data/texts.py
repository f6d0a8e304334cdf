"""Labelled texts as numbers of words: the reviews of IMDb, and a stand-in.

All reviews, of which at most 10,000 are drawn, are divided 70/10/20, every class alike (arXiv:2605.07811). Words are
what stands between blanks once tags, addresses and everything but letters are gone; the most frequent ones of the
training part are numbered from 2 on, 1 is any other, 0 none. A text is its first words.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from trainers.data.prepare import load_dataset
from zoo.catalogue import closest
from zoo.errors import UserError
from zoo.tasks.classification import class_prior

__all__ = ["TextData", "TextSplit", "load_texts", "negation_standin", "polar_standin", "words_of"]

_REVIEWS = 10_000
_SEED = 42  # of the division


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextSplit:
    """Texts of one part on the device."""

    tokens: Int[Array, "N T"]
    lengths: Int[Array, " N"]
    label: Int[Array, " N"]
    prior: Float[Array, " K"]  # of the training part

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The texts of these numbers as a batch of classification; traceable."""
        tokens, label = self.tokens[indices], self.label[indices]
        mask: Bool[Array, "B T"] = jnp.arange(tokens.shape[1]) < self.lengths[indices][:, None]
        prior = jnp.broadcast_to(self.prior, (*label.shape, *self.prior.shape))
        return {"x": tokens, "mask": mask, "label": label, "prior": prior}


@dataclass(frozen=True)
class TextData:
    """The three parts of a set, and the words by their number."""

    train: TextSplit
    valid: TextSplit
    test: TextSplit
    vocabulary: tuple[str, ...]


def words_of(text: str) -> list[str]:
    """Lower-case words of letters alone. Source: card imdb_bilstm_attention, Data."""
    text = re.sub(r"https?://\S+|www\.\S+|<[^>]*>", " ", text.lower())
    return re.sub(r"[^a-z\s]", "", text).split()


def negation_standin(
    seed: int, *, length: int, vocabulary: int, num_classes: int
) -> dict[str, tuple[list[np.ndarray], np.ndarray]]:
    """Texts of 5 to 40 words: 20 neutral, 10 good, 10 bad, and 4 that turn the next good or bad word around,
    however many of them stand before it.

    The label is the sign of the sum; texts without one are drawn again. What a word is worth depends on those before
    it, so that counting words gets little more than half. 8,000 texts to train on, 1,000 for validation, 2,000 for
    test. Source: card imdb_bilstm_attention, Data.
    """
    if (vocabulary, num_classes) != (50, 2) or length < 40:
        raise UserError(
            f"the stand-in of imdb_bilstm_attention has 50 words, 2 classes and up to 40 words a text: set "
            f"--model.vocabulary 50 --model.num-classes 2 --model.length 40 instead of {vocabulary}, {num_classes}, "
            f"{length}"
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    starts, sizes = np.array([2, 22, 32, 42]), np.array([20, 10, 10, 4])

    def draw(count: int) -> tuple[list[np.ndarray], np.ndarray]:
        texts, labels = [], []
        while len(texts) < count:
            kinds = rng.choice(4, size=rng.integers(5, 41), p=(0.5, 0.15, 0.15, 0.2))
            total, sign = 0, 1
            for kind in kinds:
                if kind == 3:
                    sign = -1
                elif kind:
                    total, sign = total + (sign if kind == 1 else -sign), 1
            if total:
                texts.append((starts[kinds] + rng.integers(0, sizes[kinds])).astype(np.int32))
                labels.append(int(total > 0))
        return texts, np.array(labels, np.int32)

    return {"train": draw(8_000), "valid": draw(1_000), "test": draw(2_000)}


def polar_standin(
    seed: int, *, length: int, vocabulary: int, num_classes: int
) -> dict[str, tuple[list[np.ndarray], np.ndarray]]:
    """Texts of 16 words: 160 neutral, 20 good, 20 bad; 2 to 4 of them good or bad, their majority the label.

    A tie is drawn again. What a word is worth never changes, so that a mean of words is enough. 4,000 texts to train
    on, 500 for validation, 1,000 for test. Source: card hardmax_clustering, Data.
    """
    if (vocabulary, num_classes) != (202, 2) or length < 16:
        raise UserError(
            f"standin_polar has 202 words, 2 classes and 16 words a text: set --model.vocabulary 202 "
            f"--model.num-classes 2 --model.length 16 instead of {vocabulary}, {num_classes}, {length}"
        )
    rng = np.random.Generator(np.random.PCG64(seed))

    def draw(count: int) -> tuple[list[np.ndarray], np.ndarray]:
        texts, labels = [], []
        while len(texts) < count:
            polar = rng.integers(0, 2, rng.integers(2, 5))
            if 2 * polar.sum() == len(polar):
                continue
            words = np.concatenate([162 + 20 * polar + rng.integers(0, 20, len(polar)), 2 + rng.integers(0, 160, 16)])
            texts.append(rng.permutation(words[:16]).astype(np.int32))
            labels.append(int(2 * polar.sum() < len(polar)))
        return texts, np.array(labels, np.int32)

    return {"train": draw(4_000), "valid": draw(500), "test": draw(1_000)}


def _divide(label: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers of the rows of each part, of at most `_REVIEWS`, all classes in their proportion."""
    rng = np.random.Generator(np.random.PCG64(_SEED))
    parts: dict[str, list] = {"train": [], "valid": [], "test": []}
    share = min(1.0, _REVIEWS / len(label))
    for k in np.unique(label):
        rows = rng.permutation(np.flatnonzero(label == k))
        rows = rows[: round(share * len(rows))]
        borders = np.round(np.array([0.7, 0.8]) * len(rows)).astype(int)
        for part, found in zip(parts, np.split(rows, borders), strict=True):
            parts[part].append(found)
    return {part: np.sort(np.concatenate(found)) for part, found in parts.items()}


_GENERATED = {  # the generator, and what its words are called
    "standin": (negation_standin, (("n", 20), ("+", 10), ("-", 10), ("not", 4))),
    "standin_polar": (polar_standin, (("n", 160), ("+", 20), ("-", 20))),
}


def _numbered(texts: Iterable[list[str]], vocabulary: tuple[str, ...]) -> list[np.ndarray]:
    number = {word: i for i, word in enumerate(vocabulary)}
    return [np.array([number.get(word, 1) for word in text], np.int32) for text in texts]


def load_texts(
    name: str, *, data_dir: str | None, length: int, vocabulary: int, num_classes: int, seed: int = 0
) -> TextData:
    """The set of that name: "standin", "standin_polar" or "imdb_sample". `seed` matters to the stand-ins alone."""
    if name in _GENERATED:
        if data_dir is not None:
            raise UserError("the stand-in is generated and takes no --data-dir; name the set, as in --data imdb_sample")
        generate, kinds = _GENERATED[name]
        parts = generate(seed, length=length, vocabulary=vocabulary, num_classes=num_classes)
        words = ("", "?", *(f"{kind}{i}" for kind, n in kinds for i in range(n)))
    elif name == "imdb_sample":
        if num_classes != 2:
            raise UserError(f"{name} has 2 classes, not {num_classes}: set --model.num-classes 2")
        reviews = [review for part in load_dataset(name, data_dir).values() for review in part]
        label = np.array([review["label"] for review in reviews], np.int32)
        rows = _divide(label)
        texts = {part: [words_of(reviews[i]["text"].decode()) for i in chosen] for part, chosen in rows.items()}
        count = Counter(word for text in texts["train"] for word in text)
        # Of equally frequent words the first in the alphabet.
        known = sorted(count, key=lambda word: (-count[word], word))[: vocabulary - 2]
        words = ("", "?", *known)
        parts = {part: (_numbered(texts[part], words), label[rows[part]]) for part in texts}
    else:
        raise UserError(f"no set of texts is called {name!r}{closest(name, [*_GENERATED, 'imdb_sample'])}")
    prior = jnp.asarray(class_prior(parts["train"][1], num_classes))

    def split(texts: list[np.ndarray], label: np.ndarray) -> TextSplit:
        tokens, lengths = np.zeros((len(texts), length), np.int32), np.ones(len(texts), np.int32)
        for i, text in enumerate(texts):
            lengths[i] = max(min(len(text), length), 1)  # an empty text is one place without a word
            tokens[i, : len(text)] = text[:length]
        return TextSplit(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(label), prior)

    return TextData(**{part: split(*columns) for part, columns in parts.items()}, vocabulary=words)
