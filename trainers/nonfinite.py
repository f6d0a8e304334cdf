"""A loss that is no longer a number: which step, which batch, which module."""

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from trainers.step import Program, TrainState
from zoo.tasks.task import Batch

__all__ = ["BATCH_FILE", "FOLDER", "REPORT_FILE", "Finding", "all_finite", "examine", "first_bad_step", "write_report"]

FOLDER = "nonfinite"
BATCH_FILE = "batch.npz"
REPORT_FILE = "report.txt"


@dataclass(frozen=True)
class Finding:
    """What one step computed, looked at module by module, with the parameters from before it."""

    where: str
    """The first thing that is not finite, in words."""
    loss: float
    modules: list[str] = field(default_factory=list)
    """Those with an output that is not finite, in the order of their computation."""
    parameters: list[str] = field(default_factory=list)
    """Those that were not finite before the step."""
    gradients: list[str] = field(default_factory=list)
    """Parameters whose gradient is not finite; looked at only where everything before is finite."""


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a tree is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def first_bad_step(losses: np.ndarray, grad_norms: np.ndarray) -> int:
    """The first of some steps that a non-finite loss or gradient shows; the last if none does."""
    bad = ~(np.isfinite(losses) & np.isfinite(grad_norms))
    return int(np.argmax(bad)) if bad.any() else len(losses) - 1


def examine(program: Program, state: TrainState, batch: Batch, *, parts: int) -> Finding:
    """Computes the step of `state` on its batch again, outside of the compiled program, and looks inside."""
    if names := _bad_paths(batch):
        return Finding(f"the batch's {', '.join(names)}", float("nan"))
    parameters = _bad_paths(state.params)
    records: list[tuple[str, bool, bool]] = []
    losses = []
    for part in range(parts):
        with nn.intercept_methods(_recorder(records)):
            losses.append(float(program.loss(state.params, state, batch, part)))
        if not np.isfinite(losses[-1]):
            break
    loss = float(np.mean(losses))
    modules = list(dict.fromkeys(name for name, _, finite in records if not finite))
    if parameters:
        where = f"parameter {parameters[0]}, which the step before had moved out of range"
    elif modules:
        name, inputs_finite, _ = next(record for record in records if not record[2])
        where = f"module {name}" if inputs_finite else f"what is computed right before module {name}"
    elif not np.isfinite(loss):
        where = "the loss itself, the model's outputs are finite"
    else:
        gradients = [name for part in range(parts) for name in _bad_gradients(program, state, batch, part)]
        gradients = list(dict.fromkeys(gradients))
        where = f"the gradient of parameter {gradients[0]}" if gradients else "the update of the parameters"
        return Finding(where, loss, modules, parameters, gradients)
    return Finding(where, loss, modules, parameters)


def _recorder(records: list[tuple[str, bool, bool]]):
    def record(call, args, kwargs, context):
        outputs = call(*args, **kwargs)
        if context.method_name != "setup":
            name = "/".join(context.module.path) or type(context.module).__name__
            records.append((name, not _bad_paths((args, kwargs)), not _bad_paths(outputs)))
        return outputs

    return record


def _bad_gradients(program: Program, state: TrainState, batch: Batch, part: int) -> list[str]:
    gradient = jax.jit(jax.grad(program.loss), static_argnums=3)
    return _bad_paths(gradient(state.params, state, batch, part))


def _bad_paths(tree: Any) -> list[str]:
    """Paths of the floating arrays of a tree that hold a number that is not finite."""

    def bad(leaf: Any) -> bool:
        # Inside a scan or a transformed function there are no numbers to look at; the module around it has them.
        if not isinstance(leaf, jax.Array | np.ndarray) or isinstance(leaf, jax.core.Tracer):
            return False
        return bool(jnp.issubdtype(leaf.dtype, jnp.inexact)) and not bool(jnp.all(jnp.isfinite(leaf)))

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in leaves if bad(leaf)]


def write_report(workdir: epath.Path, step: int, batch: Batch, finding: Finding, kept: str) -> epath.Path:
    """Leaves the batch and what was found about it in the run folder, and gives the folder."""
    folder = workdir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(jax.device_get(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    with (folder / BATCH_FILE).open("wb") as file:
        np.savez(file, **arrays)
    lines = [f"step {step}: first not finite is {finding.where}", f"loss of the step: {finding.loss}", kept]
    for title, names in (
        ("parameters that were not finite before the step", finding.parameters),
        ("modules whose output is not finite, in the order of their computation", finding.modules),
        ("parameters whose gradient is not finite", finding.gradients),
    ):
        if names:
            lines += ["", f"{title}:", *(f"  {name}" for name in names)]
    lines += ["", f"{BATCH_FILE} holds the arrays of the batch: " + ", ".join(arrays)]
    (folder / REPORT_FILE).write_text("\n".join(lines) + "\n")
    return folder
