"""What the zoo knows of a backbone: an architecture by configuration, its named sizes, and the bridge to its weights.

A backbone's module holds `BACKBONES`, one record for every name that its rows of `zoo/backbones/catalogue.csv` have.
"""

import csv
import fnmatch
import functools
import importlib.resources
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax

from zoo.catalogue import closest
from zoo.errors import UserError
from zoo.paper import Official, find_bridge, named_config, started

__all__ = ["PREFIX", "Backbone", "BackboneEntry", "answering", "backbone_entries", "backbone_entry"]

PREFIX = "backbone_"  # a backbone's slug, where papers and backbones stand side by side, is this and its name


@dataclass(frozen=True)
class BackboneEntry:
    """A row of the backbones' catalogue."""

    name: str
    module: str  # zoo/backbones/<module>.py
    answers_to: tuple[str, ...]
    """What config.json may call it (class, model_type, timm architecture). * stands for any; after a question mark
    there is what else config.json must say."""
    title: str
    code: str
    licence: str  # of the code, not of anyone's weights

    @property
    def works(self) -> bool:
        return importlib.resources.files("zoo").joinpath("backbones", f"{self.module}.py").is_file()


@functools.cache
def backbone_entries() -> tuple[BackboneEntry, ...]:
    """All backbones; no model is imported."""
    text = importlib.resources.files("zoo").joinpath("backbones", "catalogue.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return tuple(BackboneEntry(**row | {"answers_to": tuple(row["answers_to"].split())}) for row in rows)


def backbone_entry(name: str) -> BackboneEntry:
    """The row of that backbone; a misspelt name raises `UserError` with the closest ones."""
    by_name = {e.name: e for e in backbone_entries()}
    if name not in by_name:
        raise UserError(f"no backbone is called {name!r}{closest(name, by_name)}")
    return by_name[name]


def answering(settings: Mapping[str, Any]) -> BackboneEntry:
    """The backbone that a hub's config.json speaks of: by class or timm architecture, or else by model type."""
    named = [
        *(settings.get("architectures") or []),
        *(settings[key] for key in ("_class_name", "architecture") if settings.get(key)),
    ]
    if not named and settings.get("model_type"):
        named = [settings["model_type"]]
    for name in named:
        for entry in backbone_entries():
            if any(_answers(pattern, name, settings) for pattern in entry.answers_to):
                return entry
    if not named:
        raise UserError("config.json names no architecture: it has neither architectures nor model_type")
    known = {pattern.partition("?")[0] for entry in backbone_entries() for pattern in entry.answers_to}
    raise UserError(f"no backbone answers to {named[0]!r} of config.json{closest(named[0], known)}")


def _answers(pattern: str, name: str, settings: Mapping[str, Any]) -> bool:
    called, _, condition = pattern.partition("?")
    key, _, value = condition.partition("=")
    return fnmatch.fnmatchcase(name, called) and (not condition or settings.get(key) == value)


@dataclass(frozen=True)
class Backbone:
    """One architecture. What it is called and where it comes from stands in the catalogue: see `entry`.

    `example(config, batch_size=, key=)` gives the model's keyword arguments, of small but typical shapes; of those that
    take any it also takes `length`, in tokens, or `image_size`, in pixels. Language models also have
    `cache(config, batch_size, capacity, dtype)`: the empty cache of their decoding (see `zoo.backbones.generation`).
    """

    name: str
    model: Callable[[Any], nn.Module]
    configs: Mapping[str, Any]  # "tiny", and the sizes people know by the names they have on the hub
    example: Callable[..., dict[str, Any]]
    officials: tuple[Official, ...]  # the whole model first, then parts that have goldens or checkpoints of their own
    cache: Callable[..., Any] | None = None
    settings: tuple[Callable[..., Mapping[str, Any]], Callable[..., Mapping[str, Any]]] | None = None
    """config.json to the constructor's arguments and back, where they are not simply its entries."""
    idle: tuple[str, ...] = ()  # regular expressions: parameters of the checkpoints that no output depends on
    parameter_counts: Mapping[str, int] = field(default_factory=dict)  # config name -> what the official model has

    @property
    def slug(self) -> str:
        return PREFIX + self.name

    @property
    def entry(self) -> BackboneEntry:
        return backbone_entry(self.name)

    @property
    def config_class(self) -> type:
        return type(self.configs["tiny"])

    def config(self, name: str = "tiny", **overrides: Any) -> Any:
        """The named configuration with some fields replaced. A misspelt name or field is answered by the closest."""
        return named_config(self, name, overrides)

    def bridge(self, module: str | None = None) -> Official:
        """The bridge to the official module of that name (`None`: the whole model)."""
        return find_bridge(self, module)

    @property
    def is_diffusers(self) -> bool:
        return "/diffusers@" in self.entry.code

    def read_settings(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """The official constructor's arguments from a config.json."""
        return settings if self.settings is None else self.settings[0](settings)

    def write_settings(self, hparams: Mapping[str, Any], *, dtype: str) -> dict[str, Any]:
        """The config.json of these official constructor arguments."""
        names = [pattern.partition("?")[0] for pattern in self.entry.answers_to]
        if self.settings is not None:
            return dict(self.settings[1](hparams))
        if self.is_diffusers:
            return {"_class_name": names[0], **hparams}
        return {"architectures": [names[0]], "model_type": names[1], "dtype": dtype, **hparams}

    def initialize(self, model: nn.Module, keys: Any, example: Mapping[str, Any]) -> Any:
        """Fresh variables."""
        return model.init(keys, **example)

    def prompt(self, tokens: jax.Array) -> jax.Array:
        """What the model is called with to go on after these tokens (B, L)."""
        return tokens

    def start(self, config: Any, batch_size: int, capacity: int, dtype: Any = jax.numpy.float32) -> Any:
        """The empty cache with room for `capacity` tokens a row."""
        return started(self, config, batch_size, capacity, dtype)
