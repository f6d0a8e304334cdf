"""What the zoo knows of a paper: `Entry` (one row of the catalogue) and `Paper` (an entry with its implementation)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import flax.linen as nn
import jax

from zoo.catalogue import Entry, closest, entry
from zoo.errors import UserError
from zoo.tasks.task import Batch, Task
from zoo.weights.table import Table

__all__ = ["Official", "Paper"]


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


@dataclass(frozen=True)
class Paper:
    """One paper's implementation. Bibliography, room and fidelity stand in the catalogue: see `entry`."""

    slug: str
    task: Task
    configs: Mapping[str, Any]  # named configurations, "tiny" among them
    model: Callable[[Any], nn.Module]
    example: Callable[..., Batch]  # (config, *, batch_size, key) -> inputs and targets of the right shapes
    loss: Callable[[Any, Batch], tuple[jax.Array, dict[str, jax.Array]]] | None = None  # default: the task's
    officials: tuple[Official, ...] = ()  # the main model first, then parts that have goldens of their own
    parameter_counts: Mapping[str, int] = field(default_factory=dict)  # config name -> what the official code has
    reported: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # data set -> metric -> the paper's value
    quirks: tuple[str, ...] = ()  # of the official code: reproduced or repaired

    @property
    def entry(self) -> Entry:
        return entry(self.slug)

    @property
    def config_class(self) -> type:
        return type(self.configs["tiny"])

    def config(self, name: str = "tiny", **overrides: Any) -> Any:
        """The named configuration with some fields replaced. A misspelt name or field is answered by the closest."""
        if name not in self.configs:
            raise UserError(f"{self.slug} has no config {name!r}{closest(name, self.configs)}")
        known = {f.name for f in fields(self.config_class)}
        for key in overrides:
            if key not in known:
                raise UserError(f"the config of {self.slug} has no field {key!r}{closest(key, known)}")
        try:
            return replace(self.configs[name], **overrides)
        except (TypeError, ValueError) as error:
            raise UserError(f"the config of {self.slug} does not accept these values: {error}") from error

    def compute_loss(self, outputs: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(mean loss, further named scalars) of the model's outputs on a batch."""
        return (self.loss or self.task.loss)(outputs, batch)

    def bridge(self, module: str | None = None) -> Official:
        """The bridge to the official module of that name (`None`: the main model)."""
        if not self.officials:
            raise UserError(f"{self.slug} has no official weights: no official code is known for it")
        for official in self.officials:
            if module in (None, official.module):
                return official
        raise UserError(f"{self.slug} has no bridge to {module}{closest(module, [o.module for o in self.officials])}")
