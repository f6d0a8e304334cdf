"""A recipe: everything that decides a training run, as data that can be printed, stored and run again."""

import dataclasses
import importlib
import typing
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import tyro
import yaml

import zoo
from zoo.catalogue import closest, entry
from zoo.errors import UserError

__all__ = ["Checkpoints", "Evaluation", "Optimizer", "Recipe", "differences", "named_recipes", "recipe_for"]

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Optimizer:
    """The optax optimiser, its learning rate over time, and what happens to gradients before it."""

    name: Literal["adam", "adamw", "sgd", "lion", "adafactor"] = "adamw"
    learning_rate: float = 1e-3
    """The peak of the schedule."""
    schedule: Literal["constant", "cosine", "cosine_per_epoch", "halve_per_epoch"] = "cosine"
    """cosine: to zero over the run; cosine_per_epoch: one value an epoch; halve_per_epoch: from the third epoch on."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero, before the schedule begins."""
    b1: float = 0.9
    """Decay of the first moment (momentum, for sgd)."""
    b2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment (adam, adamw)."""
    weight_decay: float = 0.0
    """Decoupled weight decay (adamw, lion)."""
    clip_norm: float | None = None
    """Gradients are scaled down to this global norm."""


@dataclass(frozen=True)
class Evaluation:
    """When the validation split is evaluated, and when its metric ends the run."""

    every: int | None = None
    """Steps between evaluations; None: once an epoch."""
    patience: int | None = None
    """Evaluations without improvement after which training stops; None: never."""
    batch_size: int = 256


@dataclass(frozen=True)
class Checkpoints:
    """What is kept of a run; the newest checkpoint always is."""

    every: int | None = None
    """Steps between checkpoints; None: at every evaluation. Every evaluation saves in any case."""
    keep_best: int = 1
    """How many of the best checkpoints by the validation metric stay."""


@dataclass(frozen=True)
class Recipe(Generic[ConfigT]):
    """One training run of one paper."""

    paper: tyro.conf.Suppress[str]
    config: str = "tiny"
    """The paper's named configuration that `model` started from."""
    model: ConfigT = None
    """The model's configuration."""
    data: str = "standin"
    """The data set: `zoo list --data` shows them. `standin` is generated and needs no download."""
    data_dir: str | None = None
    """A folder that holds the data set's original files (gzip or not). Without it they are downloaded."""
    epochs: int | None = None
    """Passes over the training split, unless `steps` is given."""
    steps: int | None = None
    """Optimiser steps."""
    batch_size: int = 64
    """Examples a step, over all devices."""
    seed: int = 0
    """Of initial weights, data order, dropout and stand-in data."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward pass; weights and optimiser state are float32."""
    mesh: str = "data=-1"
    """Devices an axis (data, fsdp, tensor, sequence), e.g. data=2,fsdp=4; -1: all the remaining ones."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl; also the steps that run on the device without returning to Python."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)

    def __post_init__(self):
        if self.model is None:
            object.__setattr__(self, "model", zoo.paper(self.paper).config(self.config))
        for name, value in (("batch_size", self.batch_size), ("log_every", self.log_every), ("steps", self.steps)):
            if value is not None and value < 1:
                raise UserError(f"{name.replace('_', '-')} must be at least 1, not {value}")
        if self.steps is None and self.epochs is None:
            raise UserError("a recipe needs either steps or epochs")

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, text: str, *, source: str) -> "Recipe":
        """The recipe that `to_yaml` wrote; `source` is named in errors."""
        try:
            raw = yaml.safe_load(text)
            raw["model"] = _dataclass_from(zoo.paper(raw["paper"]).config_class, raw["model"], source)
            return _dataclass_from(cls, raw, source)
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise UserError(f"{source} is not a recipe: {str(error).splitlines()[0]}") from error


def _dataclass_from(cls: type, raw: dict[str, Any], source: str) -> Any:
    hints = typing.get_type_hints(cls)
    for name in raw:
        if name not in hints:
            raise UserError(f"{source}: unknown field {name!r}{closest(name, hints)}")
    nested = {
        name: _dataclass_from(hints[name], value, source)
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict)
        else value
        for name, value in raw.items()
    }
    return cls(**nested)


def differences(old: Recipe, new: Recipe, *, ignore: tuple[str, ...] = ()) -> list[str]:
    """Each field in which two recipes differ, as "optimizer.learning_rate: 0.001 -> 0.01"."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        out = {}
        for name, value in tree.items():
            out.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
        return out

    before, after = flat(dataclasses.asdict(old)), flat(dataclasses.asdict(new))
    # YAML has no tuples: what was stored as a list is the same value.
    same = lambda a, b: a == b or (isinstance(a, list | tuple) and isinstance(b, list | tuple) and list(a) == list(b))  # noqa: E731
    names = [n for n in {**before, **after} if n not in ignore and not same(before.get(n), after.get(n))]
    return [f"{name}: {before.get(name)} -> {after.get(name)}" for name in names]


def named_recipes(slug: str) -> dict[str, Recipe]:
    """The recipes of a paper by the name of their config."""
    row = entry(slug)
    zoo.paper(slug)  # a planned paper raises its own clear error
    return importlib.import_module(f"trainers.recipes.{row.room}.{slug}").RECIPES


def recipe_for(slug: str, config: str = "tiny") -> Recipe:
    """The recipe of a paper for one of its configs; misspelt names are answered by the closest."""
    recipes = named_recipes(slug)
    if config not in recipes:
        raise UserError(f"{slug} has no recipe for config {config!r}{closest(config, recipes)}")
    return recipes[config]
