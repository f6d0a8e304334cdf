"""The 109 papers of the zoo as a table (`catalogue.csv`), readable without importing a single model."""

import csv
import difflib
import functools
import importlib.resources
from collections.abc import Iterable
from dataclasses import dataclass

from zoo.errors import UserError

__all__ = ["Entry", "closest", "entries", "entry"]


@dataclass(frozen=True)
class Entry:
    """A row of the catalogue."""

    slug: str
    room: str  # the package the module lives in: zoo/<room>/<slug>.py
    kind: str  # model | intervention | theory | optimizer | system
    task: str
    title: str
    arxiv: str
    year: str
    code: str  # owner/name of the official code, if there is any
    commit: str
    licence: str  # of the official code
    fidelity: str  # exact | partial | reading; empty while the paper is only planned

    @property
    def status(self) -> str:
        return "works" if self.fidelity else "planned"

    @property
    def module(self) -> str:
        return f"zoo.{self.room}.{self.slug}"


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All papers, in the order of the rooms."""
    text = importlib.resources.files("zoo").joinpath("catalogue.csv").read_text(encoding="utf-8")
    return tuple(Entry(**row) for row in csv.DictReader(text.splitlines()))


def entry(slug: str) -> Entry:
    """The row of that paper; a misspelt name raises `UserError` with the closest ones."""
    by_slug = {e.slug: e for e in entries()}
    if slug not in by_slug:
        raise UserError(f"no paper is called {slug!r}{closest(slug, by_slug)}")
    return by_slug[slug]


def closest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: "; did you mean 'a' or 'b'?", or the list itself where nothing is close."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(repr(n) for n in near)}?"
    return f"; known: {', '.join(known)}" if len(known) <= 20 else "; `zoo list` shows all"
