"""Saving and loading models: `zoo.save`, `zoo.load`, and official weights."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from zoo.errors import UserError
from zoo.registry import create, paper_of, variable_shapes
from zoo.registry import paper as find_paper
from zoo.weights.convert import check_tensors, from_official, to_official
from zoo.weights.files import SUFFIXES, local_path, read_tensors, write_tensors

__all__ = ["load", "load_official", "save", "save_official"]

FORMAT = "attention-zoo/1"  # changes when a reader of the old format would misunderstand the new one
MODEL_FILE = "model.json"  # in an Orbax folder, what the metadata is in a safetensors file
WEIGHTS = "model.safetensors"  # the weights of a finished training run, inside its folder


def save(
    path: str | os.PathLike[str], model: nn.Module, variables: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Writes a model with its weights: one .safetensors or .npz file by that ending, else an Orbax folder.

    The paper and its configuration are stored beside the weights, so that `zoo.load(path)` needs nothing else.
    """
    metadata = {"format": FORMAT, "paper": paper_of(model).slug, "config": json.dumps(dataclasses.asdict(model.config))}
    target = epath.Path(path).expanduser()
    if target.suffix in SUFFIXES:
        write_tensors(target, flatten_dict(dict(variables), sep="/"), metadata, overwrite=overwrite)
        return
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists already; choose another name or remove it")
    import orbax.checkpoint as ocp

    target = epath.Path(os.path.abspath(target)) if "://" not in os.fspath(target) else target
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target, dict(variables), force=overwrite)
        (target / MODEL_FILE).write_text(json.dumps(metadata))
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from error


def load(source: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """(model, variables) from what `save` or a training run wrote: a file, an Orbax folder, a run folder, or a URI.

    gs:// and hf://owner/name/file are understood. Official weights say nothing of paper and size: see `load_official`.
    """
    path = local_path(source)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir() and (path / WEIGHTS).exists():
        path = path / WEIGHTS
    if path.is_dir():
        if not (path / MODEL_FILE).exists():
            raise UserError(f"{path} holds neither {WEIGHTS} nor {MODEL_FILE}: not a finished run or a saved model")
        metadata = json.loads((path / MODEL_FILE).read_text())
        model = _model_from(metadata, path)
        return model, _read_orbax(path, model)
    tensors, metadata = read_tensors(path)
    if metadata.get("format", "").split("/")[0] != "attention-zoo":
        raise UserError(f"{path} was not written by the zoo; for official weights use `zoo convert` or load_official")
    model = _model_from(metadata, path)
    shapes = flatten_dict(variable_shapes(paper_of(model), model), sep="/")
    check_tensors(
        {k: np.shape(v) for k, v in tensors.items()},
        {k: s.shape for k, s in shapes.items()},
        what=f"the weights in {path}",
    )
    return model, jax.tree.map(jnp.asarray, unflatten_dict(tensors, sep="/"))


def _model_from(metadata: Mapping[str, str], path: epath.Path) -> nn.Module:
    if metadata["format"] != FORMAT:
        raise UserError(f"{path} has format {metadata['format']}, this version reads {FORMAT}: update attention-zoo")
    return create(metadata["paper"], "tiny", **json.loads(metadata["config"]))


def _read_orbax(path: epath.Path, model: nn.Module) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    path = epath.Path(os.path.abspath(path)) if "://" not in os.fspath(path) else path
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, variable_shapes(paper_of(model), model))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged or incomplete: {reason}") from error


def load_official(
    path: str | os.PathLike[str],
    slug: str,
    *,
    hparams: Mapping[str, Any] | None = None,
    config: str = "tiny",
    **overrides: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """(model, variables) from a file of official weights.

    The sizes come from `hparams` (the official constructor arguments), from those that `save_official` stored in the
    file, or from one of our named configurations.
    """
    tensors, metadata = read_tensors(path)
    if hparams is None and "hparams" in metadata:
        hparams = json.loads(metadata["hparams"])
    if hparams is None:
        record = find_paper(slug)
        hparams = record.bridge().hparams(record.config(config, **overrides))
    return from_official(slug, hparams, tensors)


def save_official(
    path: str | os.PathLike[str], model: nn.Module, variables: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Writes the weights under their official names and layouts, the official constructor arguments beside them."""
    record = paper_of(model)
    hparams = record.bridge().hparams(model.config)
    metadata = {"paper": record.slug, "hparams": json.dumps(hparams)}
    write_tensors(path, to_official(record.slug, model, variables), metadata, overwrite=overwrite)
