"""Labelled events of an event camera: a stand-in of shaken glyphs, and pictures of signing hands that are shaken.

Sign-Language MNIST is magnified to 48 x 48 (nearest), moved by up to two pixels each millisecond and seen by an ideal
sensor: an event where the logarithm of the brightness has grown by 0.4 since the pixel's last one (card
neuromorphic_sign, Data, whose simulated sensor also has latencies, noise and dead times). Every fifth training picture
of a letter is for validation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from trainers.data.prepare import load_dataset
from zoo.catalogue import closest
from zoo.errors import UserError
from zoo.tasks.classification import class_prior

__all__ = ["EventData", "EventSplit", "draw_glyphs", "events_of_pictures", "load_events"]

_LETTERS = "ABCDEFGHIKLMNOPQRSTUVWXY"  # J and Z are movements
# Which of the bars left, top, bottom, middle and right a glyph has: at least two, those without a right one first.
_GLYPHS = sorted((bars for bars in range(32) if bars.bit_count() > 1), key=lambda bars: (bars & 16, bars))
_COUNTS = {"train": 2_400, "valid": 400, "test": 800}
_NOISE = 0.002  # events of a pixel and step that nothing causes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EventSplit:
    """Recordings of one part: their events one by one, from which a batch makes pictures of each step."""

    events: Int[Array, "N E 3"]  # step, row, column; the step `shape[0]` stands for none
    label: Int[Array, " N"]
    prior: Float[Array, " K"]  # of the training part
    shape: tuple[int, int, int] = field(metadata={"static": True})  # T, H, W

    def __len__(self) -> int:
        return self.label.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The recordings of these numbers as a batch of classification; traceable."""
        label, places = self.label[indices], self.events[indices].astype(jnp.int32)
        rows = jnp.arange(label.shape[0])[:, None]
        nothing = jnp.zeros((label.shape[0], *self.shape), jnp.float32)
        x = nothing.at[rows, places[..., 0], places[..., 1], places[..., 2]].set(1.0, mode="drop")
        return {"x": x, "label": label, "prior": jnp.broadcast_to(self.prior, (*label.shape, *self.prior.shape))}


@dataclass(frozen=True)
class EventData:
    """The three parts of a set, and what its classes are called."""

    train: EventSplit
    valid: EventSplit
    test: EventSplit
    classes: tuple[str, ...]


def _glyph(bars: int, size: int) -> np.ndarray:
    """(size, size) 0 or 1: bars a fourth as thick as the glyph is wide."""
    thick, middle = round(5 * size / 21), (size - round(5 * size / 21)) // 2
    image = np.zeros((size, size), bool)
    places = (np.s_[:, :thick], np.s_[:thick], np.s_[-thick:], np.s_[middle : middle + thick], np.s_[:, -thick:])
    for bar, place in enumerate(places):
        if bars >> bar & 1:
            image[place] = True
    return image


def draw_glyphs(
    rng: np.random.Generator,
    count: int,
    *,
    num_classes: int,
    steps: int,
    height: int,
    width: int,
    size: int,
    anywhere: bool,
) -> tuple[list[np.ndarray], np.ndarray]:
    """(of each recording its events (E, 4): step, row, column and whether the glyph caused it; class (N,)).

    A glyph of `size` pixels stands in the middle, within a fifth of its size, or anywhere in the frame, and trembles by
    a tenth of it; where it comes is an event, where it leaves none; 0.2 % of all pixels have one in any step. Source:
    card neuromorphic_sign, Data.
    """
    label = rng.permutation(np.arange(count) % num_classes)
    tremble, reach = max(round(2 * size / 21), 1), round(4 * size / 21)
    glyphs = [_glyph(bars, size) for bars in _GLYPHS[:num_classes]]
    room = np.array([height - size, width - size])
    found = []
    for kind in label:
        if anywhere:
            corner = rng.integers(tremble, room - tremble + 1)
        else:
            corner = room // 2 + rng.integers(-reach, reach + 1, 2)
        scene = np.zeros((steps + 1, height, width), bool)
        for frame, (row, column) in zip(
            scene, corner + rng.integers(-tremble, tremble + 1, (steps + 1, 2)), strict=True
        ):
            frame[row : row + size, column : column + size] = glyphs[kind]
        came = scene[1:] & ~scene[:-1]
        place = np.argwhere(came | (rng.random(came.shape) < _NOISE))
        found.append(np.column_stack([place, came[tuple(place.T)]]).astype(np.int16))
    return found, label.astype(np.int32)


def events_of_pictures(
    rng: np.random.Generator, pictures: np.ndarray, *, steps: int, height: int, width: int
) -> list[np.ndarray]:
    """Events (E, 3): step, row and column, of grey pictures (N, H, W), 0 to 255, that tremble."""
    rows, columns = (np.arange(n) * m // n for n, m in zip((height, width), pictures.shape[1:], strict=True))
    found = []
    for picture in pictures:
        still = np.log(np.pad(picture[rows][:, columns].astype(np.float32) + 1, 2, mode="reflect"))
        offset = rng.integers(0, 5, (steps + 1, 2))
        seen = [still[r : r + height, c : c + width] for r, c in offset]
        level, events = seen[0].copy(), []
        for step, now in enumerate(seen[1:]):
            place = np.argwhere(now > level + 0.4)
            events.append(np.column_stack([np.full(len(place), step), place]))
            changed = np.abs(now - level) > 0.4
            level[changed] = now[changed]
        found.append(np.concatenate(events).astype(np.int16))
    return found


def load_events(name: str, *, data_dir: str | None, config: Any, seed: int = 0) -> EventData:
    """The set of that name in the sizes of the model's `config`; `seed` draws glyphs, and how all tremble."""
    rng = np.random.Generator(np.random.PCG64(seed))
    frame = config.attention if config.attend else config
    size = {"steps": config.steps, "height": frame.height, "width": frame.width}
    if name == "standin":
        parts, classes = _standin(rng, data_dir, config, size)
    elif name == "sign_mnist_fragment":
        if config.attend or config.num_classes != len(_LETTERS):
            raise UserError(
                f"{name} has {len(_LETTERS)} letters, each in the middle: set --model.num-classes {len(_LETTERS)} "
                "--no-model.attend"
            )
        parts, classes = _signs(rng, name, data_dir, size), tuple(_LETTERS)
    else:
        known = ("standin", "sign_mnist_fragment")
        raise UserError(f"no set of events is called {name!r}{closest(name, known)}")
    prior = jnp.asarray(class_prior(parts["train"][1], config.num_classes))
    shape = (size["steps"], size["height"], size["width"])

    def split(events: Sequence[np.ndarray], label: np.ndarray) -> EventSplit:
        filled = np.zeros((len(events), max(map(len, events)), 3), np.int16)
        filled[..., 0] = shape[0]
        for row, found in zip(filled, events, strict=True):
            row[: len(found)] = found[:, :3]
        return EventSplit(jnp.asarray(filled), jnp.asarray(label), prior, shape)

    return EventData(**{part: split(*columns) for part, columns in parts.items()}, classes=classes)


def _standin(rng: np.random.Generator, data_dir: str | None, config: Any, size: dict[str, int]):
    if data_dir is not None:
        raise UserError(
            "the stand-in is generated and takes no --data-dir; name the set with --data, e.g. sign_mnist_fragment"
        )
    if not 2 <= config.num_classes <= len(_GLYPHS):
        raise UserError(
            f"the stand-in of events has 2 to {len(_GLYPHS)} glyphs, not {config.num_classes}: set --model.num-classes"
        )
    # Of the region that is read, a glyph takes 21 pixels of 48.
    glyph = round(21 / 48 * (config.attention.region if config.attend else min(config.height, config.width)))
    options = {**size, "num_classes": config.num_classes, "size": glyph, "anywhere": config.attend}
    parts = {part: draw_glyphs(rng, count, **options) for part, count in _COUNTS.items()}
    return parts, tuple(str(k) for k in range(config.num_classes))


def _signs(rng: np.random.Generator, name: str, data_dir: str | None, size: dict[str, int]):
    found = {}
    for part, examples in load_dataset(name, data_dir).items():
        rows = [(example["image"][..., 0], int(example["label"])) for example in examples]
        # The files number the letters of the whole alphabet.
        label = np.array([number - (number > 9) for _, number in rows], np.int32)
        found[part] = events_of_pictures(rng, np.stack([image for image, _ in rows]), **size), label
    events, label = found["train"]
    held = np.zeros(len(label), bool)
    for letter in np.unique(label):
        held[np.flatnonzero(label == letter)[4::5]] = True
    if not held.any():
        raise UserError(f"{name} has fewer than five training pictures of each letter: nothing is left for validation")

    def rows_of(chosen: np.ndarray):
        return [events[i] for i in np.flatnonzero(chosen)], label[chosen]

    return {"train": rows_of(~held), "valid": rows_of(held), "test": found["test"]}
