"""Weights that a run starts from: `--init-from`, for fine-tuning; what does not fit keeps its fresh initialisation."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

import zoo
from trainers.checkpoints import read_variables, stored_steps
from trainers.step import Program, TrainState
from zoo.errors import UserError
from zoo.weights.files import local_path
from zoo.weights.hub import SETTINGS
from zoo.weights.io import MODEL_FILE, WEIGHTS

__all__ = ["REPORT_FILE", "Report", "initial_state"]

REPORT_FILE = "init_report.txt"
_SHOWN = 10  # names of each kind on the console; the file has all


@dataclass(frozen=True)
class Report:
    """What became of each array, by path."""

    source: str
    matched: list[str]
    missing: list[str]
    """In the model only: freshly initialised."""
    unexpected: list[str]
    """In the source only: ignored."""
    misshapen: list[str]
    """In both, of different shapes: freshly initialised."""

    def text(self, shown: int | None = None) -> str:
        """Counts, and the names of each kind, at most `shown`."""
        kinds = {
            "matched": (self.matched, "taken"),
            "missing": (self.missing, "not in the source, freshly initialised"),
            "misshapen": (self.misshapen, "of another shape, freshly initialised"),
            "unexpected": (self.unexpected, "not in the model, ignored"),
        }
        lines = [f"initial weights from {self.source}"]
        for kind, (names, what) in kinds.items():
            lines.append(f"  {len(names):>5} {kind} ({what})")
            if shown is None or kind != "matched":
                lines += [f"        {name}" for name in names[:shown]]
                if shown is not None and len(names) > shown:
                    lines.append(f"        and {len(names) - shown} more, see {REPORT_FILE}")
        return "\n".join(lines)


def initial_state(program: Program, init_from: str | None) -> tuple[TrainState, Report | None]:
    """The state of step 0: fresh weights, those that `init_from` has in path and shape replaced."""
    if init_from is None:
        return program.init(), None
    found = flatten_dict(_read(init_from), sep="/")
    shapes = program.state_shapes
    wanted = flatten_dict({"params": shapes.params, **shapes.collections}, sep="/")
    report = _compare(init_from, found, wanted)
    state = program.init()
    variables = flatten_dict({"params": state.params, **state.collections}, sep="/")
    for name in report.matched:
        value = found[name].astype(variables[name].dtype)
        variables[name] = jax.device_put(value, variables[name].sharding)
    tree = unflatten_dict(variables, sep="/")
    return program.begin(tree.pop("params"), tree), report


def _compare(source: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Report:
    both = sorted(found.keys() & wanted.keys())
    report = Report(
        source,
        matched=[name for name in both if found[name].shape == wanted[name].shape],
        missing=sorted(wanted.keys() - found.keys()),
        unexpected=sorted(found.keys() - wanted.keys()),
        misshapen=[
            f"{name}: {found[name].shape} instead of {wanted[name].shape}"
            for name in both
            if found[name].shape != wanted[name].shape
        ],
    )
    if not report.matched:
        raise UserError(
            f"--init-from {source} has nothing that fits this model ({len(report.misshapen)} arrays of another shape, "
            f"{len(report.unexpected)} of other names): give weights of this paper or train without it"
        )
    return report


def _read(source: str) -> dict[str, Any]:
    """Variables of whatever `source` is: what `zoo.load` reads, or checkpoints of a run that goes on."""
    path = local_path(source)
    if path.is_dir() and not any((path / name).exists() for name in (WEIGHTS, MODEL_FILE, SETTINGS)):
        for folder in (path / "checkpoints", path):
            if steps := stored_steps(folder):
                return read_variables(folder / str(max(steps)))
        if (path / "state").is_dir():
            return read_variables(path)
        raise UserError(
            f"--init-from {os.fspath(epath.Path(source))} holds no weights: give a run folder, one of its checkpoints, "
            "a model saved by the zoo, or a folder of the hub"
        )
    return zoo.load(source)[1]
