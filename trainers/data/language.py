"""Texts to model token by token: recall as a stand-in, Tiny Shakespeare, captions packed into rows.

Characters of Shakespeare are numbered by their order in the alphabet of the whole file; captions are UTF-8 bytes, each
ended by a line feed (10). A text that is one is cut into rows, in training at four offsets; short ones are packed into
rows first fit, so that few places stay empty.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from trainers.data.prepare import load_dataset
from trainers.data.stream import Stream, packed_batches
from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = ["LanguageData", "LanguageSplit", "load_language", "packed_rows", "recall_standin"]

_OFFSETS = 4  # a training text is cut at
_NOISE = 0.2  # share of places of standin_noisy that are noise


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LanguageSplit:
    """Rows of one part on the device."""

    tokens: Int[Array, "N L"]
    segments: Int[Array, "N L"]
    positions: Int[Array, "N L"]
    scored: Bool[Array, "N L"]
    frequency: Float[Array, " V"]  # of the training part

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The rows of these numbers as a batch of language modelling; traceable."""
        names = ("tokens", "segments", "positions", "scored")
        rows = {name: getattr(self, name)[indices].astype(jnp.int32) for name in names[:3]}
        spread = jnp.broadcast_to(self.frequency, (rows["tokens"].shape[0], *self.frequency.shape))
        return rows | {"scored": self.scored[indices], "frequency": spread}


@dataclass(frozen=True)
class LanguageData:
    """The three parts of a set, and what each token is written as."""

    train: LanguageSplit
    valid: LanguageSplit
    test: LanguageSplit
    vocabulary: tuple[str, ...]

    def text(self, tokens: Int[Array | np.ndarray, " L"]) -> str:
        """What these tokens say."""
        return "".join(self.vocabulary[token] for token in np.asarray(tokens))


Rows = dict[str, np.ndarray]


def recall_standin(
    seed: int, rows: int, *, length: int, vocabulary: int, noise: float = 0.0
) -> dict[str, Int[np.ndarray, "N L"] | Bool[np.ndarray, "N L"]]:
    """`rows` texts of pairs, a key and its value; a key that comes again has the value it had, which is scored.

    The first half of the vocabulary are keys, the second values; each text draws a value for every key anew, and its
    keys at random. With `noise`, the last eighth of the values is no value but noise, and stands at that share of the
    places between pairs. Source: card cubit, Data ("Stand-in"); the task is MAD's (arXiv:2403.17844).
    """
    if vocabulary < 16 or vocabulary % 2 or length < 8:
        raise UserError(
            f"recall wants an even vocabulary of at least 16 and rows of at least 8 tokens, not {vocabulary} and "
            f"{length}: set --model.vocabulary 64 --model.length 128"
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    half = vocabulary // 2
    noises = max(half // 8, 1) if noise else 0
    tokens, scored = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for row in range(rows):
        value_of = half + rng.integers(0, half - noises, half)
        seen: set[int] = set()
        place = 0
        while place < length:
            if noises and rng.random() < noise:
                tokens[row, place] = vocabulary - 1 - rng.integers(0, noises)
                place += 1
                continue
            key = int(rng.integers(0, half))
            tokens[row, place] = key
            if place + 1 < length:
                tokens[row, place + 1], scored[row, place + 1] = value_of[key], key in seen
            seen.add(key)
            place += 2
    return {"tokens": tokens, "scored": scored}


def _whole(tokens: Int[np.ndarray, "N L"], scored: Bool[np.ndarray, "N L"] | None = None) -> Rows:
    """Rows of one text each, of which all tokens but the first count unless `scored` says which."""
    shape = tokens.shape
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    segments = np.ones(shape, np.int32)
    return {
        "tokens": tokens,
        "segments": segments,
        "positions": positions,
        "scored": positions > 0 if scored is None else scored,
    }


def _cut(text: Int[np.ndarray, " T"], length: int, offsets: int) -> Rows:
    """Rows of `length` that follow each other, begun at so many places of the first one."""
    if len(text) < length:
        raise UserError(f"a text of {len(text)} tokens has no row of {length}: set a smaller --model.length")
    starts = [np.arange(length * i // offsets, len(text) - length + 1, length) for i in range(offsets)]
    return _whole(text[np.concatenate(starts)[:, None] + np.arange(length)])


class _Texts:
    """Texts as bytes, each ended by a line feed: a source of tokens."""

    def __init__(self, texts: list[bytes]):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": np.frombuffer(self._texts[index] + b"\n", np.uint8).astype(np.int32)}


def packed_rows(texts: list[bytes], length: int, *, seed: int = 0) -> Rows:
    """All texts in rows of `length` bytes, one after the other where they fit; longer ones are cut into pieces."""
    bins = min(64, len(texts))  # rows that are filled at once
    batches = packed_batches(_Texts(texts), length=length, batch_size=bins, seed=seed, epochs=1)
    found = [jax.tree.map(np.asarray, batch) for batch in Stream(batches)]
    rows = {name: np.concatenate([batch[name] for batch in found]) for name in ("tokens", "segments", "positions")}
    return rows | {"scored": (rows["segments"] > 0) & (rows["positions"] > 0)}


def _recall(noise: float) -> Callable[..., dict[str, Rows]]:
    def parts(seed: int, *, length: int, vocabulary: int) -> dict[str, Rows]:
        sizes = {"train": 4096, "valid": 256, "test": 512}
        found = recall_standin(seed, sum(sizes.values()), length=length, vocabulary=vocabulary, noise=noise)
        borders = np.cumsum(list(sizes.values()))[:-1]
        columns = (np.split(found[name], borders) for name in ("tokens", "scored"))
        return {name: _whole(*part) for name, *part in zip(sizes, *columns, strict=True)}

    return parts


_GENERATED = {"standin": _recall(0.0), "standin_noisy": _recall(_NOISE)}
_REAL = ("tiny_shakespeare", "multi30k_de_en")


def load_language(name: str, *, data_dir: str | None, length: int, vocabulary: int, seed: int = 0) -> LanguageData:
    """The set of that name: "standin", "standin_noisy", "tiny_shakespeare" or "multi30k_de_en" (its English captions).

    `seed` matters to the stand-ins, and to which captions share a row. Shakespeare's last tenth is both validation and
    test, as everybody has it.
    """
    if name in _GENERATED:
        if data_dir is not None:
            raise UserError("the stand-in is generated and takes no --data-dir; name the set: --data tiny_shakespeare")
        parts = _GENERATED[name](seed, length=length, vocabulary=vocabulary)
        half = vocabulary // 2
        words = tuple(f"k{i} " if i < half else f"v{i - half} " for i in range(vocabulary))
    elif name == "tiny_shakespeare":
        texts = {part: source[0]["text"].decode() for part, source in load_dataset(name, data_dir).items()}
        words = tuple(sorted(set("".join(texts.values()))))
        _check(name, len(words), vocabulary)
        number = {character: i for i, character in enumerate(words)}
        numbered = {part: np.array([number[c] for c in text], np.int32) for part, text in texts.items()}
        held_out = _cut(numbered["valid"], length, 1)
        parts = {"train": _cut(numbered["train"], length, _OFFSETS), "valid": held_out, "test": held_out}
    elif name == "multi30k_de_en":
        _check(name, 256, vocabulary)
        words = tuple(chr(i) for i in range(256))
        sources = load_dataset(name, data_dir)
        parts = {
            part: packed_rows([example["en"] for example in sources[part]], length, seed=seed)
            for part in ("train", "valid", "test")
        }
    else:
        raise UserError(f"no text to model is called {name!r}{closest(name, [*_GENERATED, *_REAL])}")
    named = parts["train"]["tokens"][parts["train"]["scored"]]
    counts = np.bincount(named, minlength=vocabulary) + 1.0  # every token is possible
    frequency = jnp.asarray(np.log(counts / counts.sum()), jnp.float32)
    splits = {
        part: LanguageSplit(**jax.tree.map(jnp.asarray, rows), frequency=frequency) for part, rows in parts.items()
    }
    return LanguageData(**splits, vocabulary=words)


def _check(name: str, has: int, vocabulary: int) -> None:
    if has > vocabulary:
        raise UserError(f"{name} has {has} tokens, the model {vocabulary}: set --model.vocabulary {has}")
