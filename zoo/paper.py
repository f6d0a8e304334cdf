"""What the zoo knows of a paper: `Entry` (one row of the catalogue) and `Paper` (an entry with its implementation)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import flax.linen as nn
import jax

from zoo.catalogue import Entry, closest, entry
from zoo.demo import Demo
from zoo.errors import UserError
from zoo.tasks.task import Batch, Task
from zoo.weights.table import Table

__all__ = ["Official", "Paper", "find_bridge", "named_config", "started"]


@dataclass(frozen=True)
class Official:
    """The bridge to one module of the official code.

    `config` reads our configuration from the official constructor arguments, `hparams` writes them back; `table` names
    every tensor of the official state dict and where it lives in ours; `call` runs our model on the official forward
    arguments and returns the official outputs, by the names that golden cases use.
    """

    module: str  # where it is in the official code, as "path/file.py:Class"
    config: Callable[[Mapping[str, Any]], Any]
    hparams: Callable[[Any], dict[str, Any]]
    table: Callable[[Any], Table]
    call: Callable[[nn.Module, Mapping[str, Any], Mapping[str, jax.Array]], dict[str, jax.Array]]
    model: Callable[[Any], nn.Module] | None = None  # where it is not the paper's own model but a part of it
    example: Callable[..., Any] | None = None  # of that part, where it takes other inputs than the paper's model
    refine: Callable[[Any, Mapping[str, Any]], Any] | None = (
        None  # configuration, tensors: where settings say too little
    )
    saved: tuple[Callable[[Any], Table], ...] = ()
    """The names in saved files, where they are not the state dict's: the first are written, all are read."""
    prefix: str = ""  # of the official names, which some files leave out
    float64: bool = False  # golden cases are compared in float64: float32's rounding, magnified, would hide a fault
    ignored: tuple[str, ...] = ()  # regular expressions: tensors of some files in which nothing learned is stored


@dataclass(frozen=True)
class Paper:
    """One paper's implementation. Bibliography, room and fidelity stand in the catalogue: see `entry`.

    What a model takes from its data set as a whole and does not train (attributes of items, a graph) is the collection
    `constants`: the model initialises it with noise, and the trainer puts in what `constants` makes of the data.
    """

    slug: str
    task: Task | None = None  # None, like the next three, where a paper has claims to compute and no model to train
    configs: Mapping[str, Any] = field(default_factory=dict)  # named configurations, "tiny" among them
    model: Callable[[Any], nn.Module] | None = None
    example: Callable[..., Batch] | None = None  # (config, *, batch_size, key) -> inputs and targets, rightly shaped
    demo: Demo | None = None  # its claims, computed
    task_of: Callable[[Any], Task] | None = None  # config -> task, for models that serve several; default: `task`
    loss: Callable[[Any, Batch], tuple[jax.Array, dict[str, jax.Array]]] | None = None  # default: the task's
    constants: Callable[[Any, Any], dict[str, Any]] | None = None  # (config, data) -> its collection `constants`
    cache: Callable[..., Any] | None = None  # of what writes text: (config, batch size, capacity, dtype) -> empty cache
    officials: tuple[Official, ...] = ()  # the main model first, then parts that have goldens of their own
    parameter_counts: Mapping[str, int] = field(default_factory=dict)  # config name -> what the official code has
    reported: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # data set -> metric -> the paper's value
    quirks: tuple[str, ...] = ()  # of the official code: reproduced or repaired
    inert: tuple[str, ...] = ()  # paths of tiny's parameters that, as in the official code, nothing depends on

    @property
    def entry(self) -> Entry:
        return entry(self.slug)

    @property
    def config_class(self) -> type:
        return type(self.configs["tiny"])

    def config(self, name: str = "tiny", **overrides: Any) -> Any:
        """The named configuration with some fields replaced. A misspelt name or field is answered by the closest."""
        return named_config(self, name, overrides)

    def serving(self, config: Any) -> "Paper":
        """This paper with the task that a model of this configuration serves."""
        return replace(self, task=self.task_of(config)) if self.task_of else self

    def compute_loss(self, outputs: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(mean loss, further named scalars) of the model's outputs on a batch."""
        return (self.loss or self.task.loss)(outputs, batch)

    def prompt(self, tokens: jax.Array) -> Batch:
        """What the model is called with to go on after these tokens (B, L)."""
        return {"tokens": tokens}

    def start(self, config: Any, batch_size: int, capacity: int, dtype: Any = jax.numpy.float32) -> Any:
        """The empty cache with room for `capacity` tokens a row."""
        return started(self, config, batch_size, capacity, dtype)

    def bridge(self, module: str | None = None) -> Official:
        """The bridge to the official module of that name (`None`: the main model)."""
        return find_bridge(self, module)

    def initialize(self, model: nn.Module, keys: Any, example: Any) -> Any:
        """Fresh variables, of the model or of a part of it with inputs of its own."""
        return model.init(keys, example)


def named_config(record: Any, name: str, overrides: Mapping[str, Any], slug: str | None = None) -> Any:
    """`record.configs[name]` with some fields replaced, for a paper, its demonstration (of `slug`) or a backbone."""
    slug = slug or record.slug
    if name not in record.configs:
        raise UserError(f"{slug} has no config {name!r}{closest(name, record.configs)}")
    known = {f.name for f in fields(record.configs[name])}
    for key in overrides:
        if key not in known:
            raise UserError(f"the config of {slug} has no field {key!r}{closest(key, known)}")
    try:
        return replace(record.configs[name], **overrides)
    except (TypeError, ValueError) as error:
        raise UserError(f"the config of {slug} does not accept these values: {error}") from error


def started(record: Any, config: Any, batch_size: int, capacity: int, dtype: Any) -> Any:
    """The empty cache of a paper or a backbone."""
    if record.cache is None:
        raise UserError(f"{record.slug} does not generate token by token: it has no cache")
    return record.cache(config, batch_size, capacity, dtype)


def find_bridge(record: Any, module: str | None) -> Official:
    """The one of `record.officials` to the module of that name, for a paper or a backbone."""
    if not record.officials:
        raise UserError(f"{record.slug} has no official weights: no official code is known for it")
    for official in record.officials:
        if module in (None, official.module):
            return official
    raise UserError(f"{record.slug} has no bridge to {module}{closest(module, [o.module for o in record.officials])}")
