"""Golden cases: numbers of the official code that ours must equal, values and gradients.

A case is an .npz with `meta` (json), `param/*`, `input/*`, `output/*` and, where there are gradients, `cotangent/*`,
`grad_input/*` and `grad_param/*`: the derivatives of the sum of output times cotangent.
"""

import fnmatch
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from zoo.registry import record
from zoo.weights.convert import forwards

NO_TOLERANCE_STATED = {"rtol": 1e-4, "atol": 1e-5}


@dataclass(frozen=True)
class Case:
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays under `prefix/`, by the rest of their name."""
        return {k.removeprefix(f"{prefix}/"): v for k, v in self.arrays.items() if k.startswith(f"{prefix}/")}


def load_case(path: Path) -> Case:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return Case(json.loads(str(arrays.pop("meta"))), arrays)


def find_cases(folder: Path) -> list[Path]:
    """Every case under a folder that holds one folder per paper, or under one paper's folder."""
    return sorted([*folder.glob("*.npz"), *folder.glob("*/*.npz")])


def gradient_tolerance(meta: dict[str, Any]) -> tuple[float, float]:
    """(share of the largest reference entry, absolute part) that a gradient array may be off by."""
    words = str(meta.get("grad_tol", meta.get("grad_rtol", "")))
    stated = re.search(r"([0-9.e-]+)\s*(?:\*|of)\s*max\|(?:ref\w*|grad)\|(?:\s*\+\s*([0-9.e-]+))?", words)
    if stated:
        return float(stated[1]), float(stated[2] or 0.0)
    return float(meta.get("grad_rtol", meta.get("rtol", NO_TOLERANCE_STATED["rtol"]))), float(
        meta.get("atol", NO_TOLERANCE_STATED["atol"])
    )


def scaled_outputs(meta: dict[str, Any]) -> tuple[re.Pattern, float]:
    """(names of the outputs that are measured against their largest entry instead of one by one, the share)."""
    stated = re.search(r"for ([^:]+): max\|diff\| <= ([0-9.e-]+)\s*\*\s*max\|ref\|", meta.get("tol_rule", ""))
    if not stated:
        return re.compile("(?!)"), 0.0
    names = re.split(r", | and ", stated[1])
    return re.compile("|".join(fnmatch.translate(name.strip()) for name in names)), float(stated[2])


def own_atol(meta: dict[str, Any]) -> dict[str, float]:
    """Outputs for which the notes of a case state an absolute tolerance of their own."""
    stated = re.search(r"compare ([\w, ]+?) with atol ([0-9.e-]*[0-9])", meta.get("notes", ""))
    return {} if not stated else {name: float(stated[2]) for name in re.split(r", | and ", stated[1])}


def mismatches(case: Case) -> list[str]:
    """One line for every array that is not what the official code computed; in float64 where the case is, or where the
    bridge asks for it."""
    widened = record(case.meta["slug"]).bridge(case.meta["module"]).float64
    if widened:
        wide = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in case.arrays.items()}
        case = Case(case.meta, wide)
    with jax.enable_x64(widened or case.meta.get("dtype") == "float64"):
        return list(_mismatches(case))


def _mismatches(case: Case) -> Iterator[str]:
    meta = case.meta
    slug, module = meta["slug"], meta["module"]
    bridge = record(slug).bridge(module)
    params, cotangents = case.group("param"), case.group("cotangent")
    inputs = {name: jnp.asarray(value) for name, value in case.group("input").items()} | meta.get("call_kwargs", {})
    model, variables = zoo.from_official(slug, meta["hparams"], params, module=module)

    back = zoo.to_official(slug, model, variables, module=module)
    for name in sorted(params.keys() | back.keys()):
        if name not in back or name not in params or not np.array_equal(back[name], params[name]):
            yield f"round trip: {name}"

    grad_params, grad_inputs = case.group("grad_param"), case.group("grad_input")
    table = list(bridge.table(model.config))

    def run(chosen_params, chosen_inputs):
        tensors = jax.tree.map(jnp.asarray, params | chosen_params)
        outputs = bridge.call(model, forwards(table, tensors), inputs | chosen_inputs)
        return sum((jnp.sum(outputs[k] * c) for k, c in cotangents.items()), jnp.zeros(())), outputs

    with jax.default_matmul_precision("highest"):
        chosen = ({k: params[k] for k in grad_params}, {k: inputs[k] for k in grad_inputs})
        (_, outputs), gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(*chosen)

    rtol, atol = (float(meta.get(k, v)) for k, v in NO_TOLERANCE_STATED.items())
    scaled, scaled_share = scaled_outputs(meta)
    stated = own_atol(meta)
    for name, expected in case.group("output").items():
        if name not in outputs:
            yield f"output {name}: not computed"
            continue
        if expected.dtype.kind == "i" and np.ndim(outputs[name]) == expected.ndim:
            # How long a list is can depend on the data: its end is then filled with -1.
            filled = np.asarray(outputs[name])[..., expected.shape[-1] :]
            outputs[name] = outputs[name][..., : expected.shape[-1]] if np.all(filled == -1) else outputs[name]
        if np.shape(outputs[name]) != expected.shape:
            yield f"output {name}: shape {np.shape(outputs[name])} instead of {expected.shape}"
        elif scaled.fullmatch(name):
            error = float(np.max(np.abs(np.asarray(outputs[name]) - expected), initial=0.0))
            if not error <= scaled_share * np.max(np.abs(expected), initial=0.0):
                yield f"output {name}: off by {error:.2e} where the largest is {np.abs(expected).max():.2e}"
        elif not np.allclose(outputs[name], expected, rtol=rtol, atol=stated.get(name, atol)):
            yield f"output {name}: off by {np.max(np.abs(np.asarray(outputs[name]) - expected)):.2e}"

    share, absolute = gradient_tolerance(meta)
    largest = max((np.max(np.abs(v), initial=0.0) for v in (*grad_params.values(), *grad_inputs.values())), default=0.0)
    for kind, ours, theirs in (("parameter", gradients[0], grad_params), ("input", gradients[1], grad_inputs)):
        for name, expected in theirs.items():
            error = float(np.max(np.abs(np.asarray(ours[name]) - expected), initial=0.0))
            scale = float(np.max(np.abs(expected), initial=0.0))
            # A gradient that is zero by the mathematics (a bias inside a softmax) is float64 rounding in the golden and
            # float32 rounding in ours: both are measured against the other gradients of the case.
            vanishes = scale < 1e-12 * largest
            if not error <= (1e-6 * largest if vanishes else share * scale + absolute):
                yield f"gradient of {kind} {name}: off by {error:.2e} where the largest is {np.abs(expected).max():.2e}"
