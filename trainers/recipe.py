"""A recipe: everything that decides a training run, as data that can be printed, stored and run again."""

import contextlib
import dataclasses
import functools
import importlib
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import tyro
import yaml
from etils import epath

import zoo
from zoo.catalogue import closest, entry
from zoo.errors import UserError

__all__ = [
    "Checkpoints",
    "Evaluation",
    "Optimizer",
    "Recipe",
    "differences",
    "named_recipes",
    "recipe_for",
    "recipe_from_file",
    "save_recipe",
]

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Optimizer:
    """The optax optimiser, its learning rate over time, and what happens to gradients before it."""

    name: Literal["adam", "adamw", "sgd", "lion", "adafactor", "muon", "meta_adamw", "fed_frozen"] = "adamw"
    """By its name in optax; meta_adamw is the paper metaadamw's, which also learns from the step's examples how to
    step; fed_frozen is the paper fedfrozen's, one round of four clients a step."""
    learning_rate: float = 1e-3
    """The peak of the schedule."""
    schedule: Literal[
        "constant", "cosine", "cosine_per_epoch", "halve_per_epoch", "tenth_in_last_fifth", "one_cycle"
    ] = "cosine"
    """cosine: to zero over the run; cosine_per_epoch: one value an epoch; halve_per_epoch: from the third epoch on;
    tenth_in_last_fifth: of the run; one_cycle: up from a 25th in 40 % of it, down to a 250,000th, along cosines."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero, before the schedule begins."""
    b1: float = 0.9
    """Decay of the first moment (momentum, for sgd)."""
    b2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment (adam, adamw, meta_adamw)."""
    weight_decay: float = 0.0
    """Decoupled weight decay (adamw, lion, muon); inside the corrected step (meta_adamw)."""
    no_decay: str = r"(^|/)(bias|scale)$"
    """Parameters whose path this regular expression finds are not decayed."""
    rates: dict[str, float] = field(default_factory=dict)
    """Multiples of the learning rate: of a parameter, that of the first regular expression that its path has in it."""
    clip_norm: float | None = None
    """Gradients are scaled down to this global norm."""
    meta: Literal["tiny", "etth1", "wikitext2", "multi30k", "cifar10", "imdb"] = "etth1"
    """Which of the paper's settings the encoder of meta_adamw has; it begins to learn after an epoch."""
    warmup_rounds: int = 10
    """Steps before fed_frozen freezes queries and keys."""
    local_steps: int = 5
    """Of each client of fed_frozen, on equal parts of its examples, at a constant learning rate."""
    average_decay: float | None = None
    """Evaluate and keep an exponential moving average of the weights with this decay, e.g. 0.999."""


@dataclass(frozen=True)
class Evaluation:
    """When the validation split is evaluated, and when its metric ends the run."""

    every: int | None = None
    """Steps between evaluations; None: once an epoch."""
    patience: int | None = None
    """Evaluations without improvement after which training stops; None: never."""
    batch_size: int = 256
    """Examples the model sees at once; the metrics do not depend on it."""


@dataclass(frozen=True)
class Checkpoints:
    """What is kept of a run; the two newest checkpoints always are."""

    every: int | None = None
    """Steps between checkpoints; None: at every evaluation. Every evaluation saves in any case."""
    keep_best: int = 1
    """How many of the best checkpoints by the validation metric stay."""
    keep_every: int | None = None
    """A checkpoint at each multiple of this number of steps stays for good."""


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
    data_on: Literal["auto", "device", "host"] = "auto"
    """Where examples lie: on the devices, or in the host's memory, from where batches are sent ahead of the step; auto:
    on the devices if that takes at most a quarter of a device's memory."""
    epochs: int | None = None
    """Passes over the training split, unless `steps` is given."""
    steps: int | None = None
    """Optimiser steps."""
    batch_size: int = 64
    """Examples a step, over all devices."""
    init_from: str | None = None
    """Weights to start from where path and shape match: a run folder, a checkpoint or a saved model; hf:// too."""
    seed: int = 0
    """Of initial weights, data order, dropout and stand-in data."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward pass; weights and optimiser state are float32."""
    mesh: str = "data=-1"
    """Devices an axis (data, fsdp, tensor, sequence), e.g. data=2,fsdp=4; -1: all the remaining ones."""
    rules: dict[str, str] = field(default_factory=dict)
    """Sharding rules before the default ones: a pattern of paths, and its axes, e.g. "head/kernel$" "-,tensor"."""
    accumulate: int = 1
    """Parts into which a step cuts its batch, one after the other, to save memory."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again instead of keeping: nothing, all but matrix products, or whole layers."""
    scan_layers: bool = False
    """Compile one layer of a stack and loop over it: compile time no longer grows with depth."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl; also the steps that run on the device without returning to Python."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)

    def __post_init__(self):
        if self.model is None:
            object.__setattr__(self, "model", zoo.paper(self.paper).config(self.config))
        for name in ("batch_size", "log_every", "steps", "accumulate", "checkpoints.keep_every"):
            value = functools.reduce(getattr, name.split("."), self)
            if value is not None and value < 1:
                raise UserError(f"{name.replace('_', '-')} must be at least 1, not {value}")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch-size {self.batch_size} cannot be cut into {self.accumulate} equal parts (accumulate)"
            )
        if self.optimizer.name == "meta_adamw" and self.batch_size < 4:
            raise UserError(f"meta_adamw learns from four parts of a batch: batch-size {self.batch_size} is below 4")
        if self.steps is None and self.epochs is None:
            raise UserError("a recipe needs either steps or epochs")

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, text: str, *, source: str) -> "Recipe":
        """The recipe that `to_yaml` wrote; `source` is named in errors."""
        try:
            raw = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{source} is not a recipe: {str(error).splitlines()[0]}") from error
        if not isinstance(raw, dict) or not isinstance(raw.get("paper"), str):
            raise UserError(f"{source} is not a recipe: it has no line like `paper: ister`")
        config = _typed(zoo.paper(raw["paper"]).config_class | None, raw.get("model"), f"{source}: model")
        return _typed(cls, raw | {"model": config}, source)


def recipe_from_file(file: str) -> Recipe:
    """The recipe in a yaml file, such as the one of a run folder."""
    path = epath.Path(file).expanduser()
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--config-file {file} cannot be read ({reason}); --save-config writes such a file") from error
    return Recipe.from_yaml(text, source=file)


def save_recipe(recipe: Recipe, file: str) -> None:
    """Writes a yaml file for `recipe_from_file`."""
    path = epath.Path(file).expanduser()
    if path.exists():
        raise UserError(f"--save-config {file} exists already; choose another name")
    try:
        path.write_text(recipe.to_yaml())
    except OSError as error:
        raise UserError(f"--save-config {file} cannot be written ({error.strerror or error})") from error


def _typed(kind: Any, value: Any, where: str) -> Any:
    """A value as YAML gives it, in its annotated type: YAML has no tuples, and takes 1e-3 for a string."""
    origin, inside = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in inside:
            return None
        *others, last = (option for option in inside if option is not types.NoneType)
        for option in others:
            with contextlib.suppress(UserError):
                return _typed(option, value, where)
        return _typed(last, value, where)
    if dataclasses.is_dataclass(origin) and isinstance(value, dict):
        hints = typing.get_type_hints(origin)
        for name in value:
            if name not in hints:
                raise UserError(f"{where}: unknown field {name!r}{closest(str(name), hints)}")
        return origin(**{name: _typed(hints[name], v, f"{where}: {name}") for name, v in value.items()})
    if origin is tuple and isinstance(value, list):
        kinds = inside if inside and inside[1:] != (...,) else (inside[:1] or (Any,)) * len(value)
        if len(kinds) == len(value):
            return tuple(_typed(k, v, where) for k, v in zip(kinds, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {name: _typed(inside[1] if inside else Any, v, f"{where}: {name}") for name, v in value.items()}
    elif origin is float and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            return float(value)
    elif origin is typing.Literal:
        if value in inside:
            return value
    elif type(value) is origin or not (
        dataclasses.is_dataclass(origin) or origin in (bool, int, str, float, tuple, dict)
    ):
        return value
    wanted = " or ".join(map(repr, inside)) if origin is typing.Literal else getattr(kind, "__name__", kind)
    raise UserError(f"{where}: wants {wanted}, not {value!r}")


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
    names = [
        n for n in {**before, **after} if n.partition(".")[0] not in ignore and not same(before.get(n), after.get(n))
    ]
    return [f"{name}: {before.get(name)} -> {after.get(name)}" for name in names]


def named_recipes(slug: str) -> dict[str, Recipe]:
    """The recipes of a paper by the name of their config."""
    row = entry(slug)
    if zoo.paper(slug).model is None:  # a planned paper raises its own clear error
        raise UserError(f"{slug} has claims to compute and nothing to train: zoo demo {slug}")
    return importlib.import_module(f"trainers.recipes.{row.room}.{slug}").RECIPES


def recipe_for(slug: str, config: str = "tiny") -> Recipe:
    """The recipe of a paper for one of its configs; misspelt names are answered by the closest."""
    recipes = named_recipes(slug)
    if config not in recipes:
        raise UserError(f"{slug} has no recipe for config {config!r}{closest(config, recipes)}")
    return recipes[config]
