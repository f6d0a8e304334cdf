"""Saving and loading models: `zoo.save`, `zoo.load`, and official weights."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import flax.linen as nn
import jax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from zoo.errors import UserError
from zoo.registry import create, record_of, variable_shapes
from zoo.registry import record as find_record
from zoo.weights.convert import check_tensors, from_official, to_official
from zoo.weights.files import SUFFIXES, local_path, read_tensors, write_tensors
from zoo.weights.hub import SETTINGS, load_folder, save_folder
from zoo.weights.place import Placing, place, placed_shapes

__all__ = ["load", "load_official", "save", "save_official"]

FORMAT = "attention-zoo/1"  # changes when a reader of the old format would misunderstand the new one
MODEL_FILE = "model.json"  # in an Orbax folder, what the metadata is in a safetensors file
WEIGHTS = "model.safetensors"  # the weights of a finished training run, inside its folder


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    overwrite: bool = False,
    layout: Literal["zoo", "hf"] = "zoo",
) -> None:
    """Writes a model with its weights: one .safetensors or .npz file by that ending, else an Orbax folder.

    What the model is and its configuration are stored beside the weights, so that `zoo.load(path)` needs nothing else.
    `layout="hf"` writes a backbone as the hub has it, for other libraries: a folder of config.json and safetensors.
    """
    target = epath.Path(path).expanduser()
    if layout == "hf":
        save_folder(target, model, variables, overwrite=overwrite)
        return
    record = record_of(model)
    config = json.dumps(dataclasses.asdict(model.config))
    metadata = {"format": FORMAT, "paper": record.slug, "config": config}
    if target.suffix in SUFFIXES:
        write_tensors(target, flatten_dict(dict(variables), sep="/"), metadata, overwrite=overwrite)
        return
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists already; choose another name or remove it")
    import orbax.checkpoint as ocp

    target = epath.Path(os.path.abspath(target)) if "://" not in os.fspath(target) else target
    # Orbax converts what it reads to the type it is asked for: ask for what is there.
    metadata["types"] = json.dumps({k: str(v.dtype) for k, v in flatten_dict(dict(variables), sep="/").items()})
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target, dict(variables), force=overwrite)
        (target / MODEL_FILE).write_text(json.dumps(metadata))
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from error


def load(
    source: str | os.PathLike[str], *, dtype: Any = None, sharding: Placing = None
) -> tuple[nn.Module, dict[str, Any]]:
    """(model, variables) from what `save` or a training run wrote, or from a folder in the hub's layout.

    A file, an Orbax folder, a run folder, a folder with config.json, or a URI: gs://, hf://owner/name for a whole model
    of the hub, hf://owner/name/file. Floating weights become `dtype` (None: stay as stored). `sharding` says where they
    go: a `jax.sharding.Mesh` (each tensor's largest axis split over its devices), a `Sharding` for all, or a function
    from the tree of shapes to a tree of shardings; every device's part is read by itself. Official weights without
    config.json say nothing of model and size: see `load_official`.
    """
    path = local_path(source)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir() and (path / SETTINGS).exists():
        return load_folder(path, dtype=dtype, sharding=sharding)
    if path.is_dir() and (path / WEIGHTS).exists():
        path = path / WEIGHTS
    if path.is_dir():
        if not (path / MODEL_FILE).exists():
            raise UserError(
                f"{path} holds neither {SETTINGS}, {WEIGHTS} nor {MODEL_FILE}: not a finished run or a saved model"
            )
        metadata = json.loads((path / MODEL_FILE).read_text())
        model = _model_from(metadata, path)
        return model, _read_orbax(path, model, metadata, dtype, sharding)
    tensors, metadata = read_tensors(path)
    if metadata.get("format", "").split("/")[0] != "attention-zoo":
        raise UserError(
            f"{path} was not written by the zoo; for official weights use `zoo convert`, or give the folder that also "
            f"holds their {SETTINGS}"
        )
    model = _model_from(metadata, path)
    shapes = flatten_dict(variable_shapes(record_of(model), model), sep="/")
    check_tensors(tensors, shapes, what=f"the weights in {path}")
    return model, place(unflatten_dict(tensors, sep="/"), dtype=dtype, sharding=sharding)


def _model_from(metadata: Mapping[str, str], path: epath.Path) -> nn.Module:
    if metadata["format"] != FORMAT:
        raise UserError(f"{path} has format {metadata['format']}, this version reads {FORMAT}: update attention-zoo")
    record = find_record(metadata["paper"])
    config = json.loads(metadata["config"])
    return create(metadata["paper"], "tiny", **_typed(config, record.config_class))


def _typed(values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """json knows neither tuples nor nested configurations: both are made again by what the fields of `kind` hold."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    return {name: _value(value, known[name].type if name in known else Any) for name, value in values.items()}


def _value(value: Any, annotation: Any) -> Any:
    if isinstance(value, dict):
        kinds = [a for a in (annotation, *get_args(annotation)) if dataclasses.is_dataclass(a)]
        return kinds[0](**_typed(value, kinds[0])) if kinds else value
    if isinstance(value, list):
        inner = next((a for a in (annotation, *get_args(annotation)) if get_origin(a) is tuple), None)
        item = get_args(inner)[0] if inner is not None and get_args(inner) else Any
        return tuple(_value(v, item) for v in value)
    return value


def _read_orbax(
    path: epath.Path, model: nn.Module, metadata: Mapping[str, str], dtype: Any, sharding: Placing
) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    path = epath.Path(os.path.abspath(path)) if "://" not in os.fspath(path) else path
    types = json.loads(metadata.get("types", "{}"))
    stored = {
        name: jax.ShapeDtypeStruct(s.shape, types.get(name, s.dtype))
        for name, s in flatten_dict(variable_shapes(record_of(model), model), sep="/").items()
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(
                path, placed_shapes(unflatten_dict(stored, sep="/"), dtype=dtype, sharding=sharding)
            )
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
        record = find_record(slug)
        hparams = record.bridge().hparams(record.config(config, **overrides))
    return from_official(slug, hparams, tensors)


def save_official(
    path: str | os.PathLike[str], model: nn.Module, variables: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Writes the weights under their official names and layouts, the official constructor arguments beside them."""
    record = record_of(model)
    hparams = record.bridge().hparams(model.config)
    metadata = {"paper": record.slug, "hparams": json.dumps(hparams)}
    write_tensors(path, to_official(record.slug, model, variables), metadata, overwrite=overwrite)
