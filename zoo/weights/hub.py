"""Folders as they lie on the hub: config.json and safetensors, in one file or sharded with an index."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from zoo.backbone import Backbone, answering
from zoo.errors import UserError
from zoo.paper import Official
from zoo.registry import backbone, record_of
from zoo.weights.convert import (
    backwards,
    check_shared,
    check_tensors,
    forwards,
    official_model,
    official_shapes,
    recognise,
)
from zoo.weights.files import read_tensors, write_safetensors
from zoo.weights.place import Placing, place

__all__ = ["SETTINGS", "load_folder", "read_folder", "read_settings", "save_folder"]

SETTINGS = "config.json"
_STEMS = ("model", "diffusion_pytorch_model")  # of transformers and timm; of diffusers
SHARD_BYTES = 5_000_000_000


def read_settings(folder: epath.Path) -> dict[str, Any]:
    """config.json."""
    try:
        settings = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / SETTINGS} is not a readable json file: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{folder / SETTINGS} does not hold the settings of a model")
    return settings


def read_folder(folder: epath.Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, as views into its mapped files."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        files = [folder / f"{stem}.safetensors" for stem in _STEMS]
        files = [file for file in files if file.exists()] or sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise UserError(f"{folder} should hold one .safetensors file, or several with an index; found {found}")
        return read_tensors(files[0])[0]
    try:
        places = json.loads(indices[0].read_text())["weight_map"]
        names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{indices[0]} is not an index of shards: {error}") from error
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder} lacks {', '.join(absent)}, which {indices[0].name} names: download them again")
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors.update(read_tensors(folder / name)[0])
    if lost := sorted(places.keys() - tensors.keys()):
        raise UserError(f"the shards in {folder} do not hold {', '.join(lost)}, which {indices[0].name} names")
    return tensors


def load_folder(folder: epath.Path, *, dtype: Any = None, sharding: Placing = None) -> tuple[nn.Module, dict[str, Any]]:
    """(model, variables) of the backbone that config.json names."""
    settings = read_settings(folder)
    if settings.get("quantization_config"):
        raise UserError(f"{folder} holds quantised weights, which are not supported: load the unquantised checkpoint")
    record = backbone(answering(settings).name)
    bridge = record.bridge()
    found = read_folder(folder)
    model = official_model(record, bridge, record.read_settings(settings), found)
    bridge = max(_as_saved(bridge), key=lambda b: len(found.keys() & _names(b, model.config)))
    expected = official_shapes(record, bridge, model)
    rows = list(bridge.table(model.config))
    tensors = recognise(found, expected, rows, bridge)
    check_tensors(tensors, expected, what=f"the weights in {folder}")
    check_shared(rows, tensors)
    return model, place(forwards(rows, tensors), dtype=dtype, sharding=sharding)


def save_folder(
    folder: epath.Path,
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json and safetensors, in shards of at most `shard_bytes`, each tensor in the type it has here.

    One tensor at a time is fetched from the devices. config.json is written last: a folder that has it is complete.
    """
    record = record_of(model)
    if not isinstance(record, Backbone):
        raise UserError(
            f"{record.slug} is a paper of the zoo: the hub's libraries have no such architecture to save as"
        )
    if folder.exists() and not overwrite and any(folder.iterdir()):
        raise UserError(f"{folder} exists already; choose another name or remove it")
    bridge = _as_saved(record.bridge())[0]
    rows = list(bridge.table(model.config))
    flat = flatten_dict(dict(variables), sep="/")
    zeros = {k: np.broadcast_to(np.zeros((), v.dtype), v.shape) for k, v in flat.items()}
    described = backwards(rows, unflatten_dict(zeros, sep="/"))
    row_of = {name: row for row in rows for name in (row.official[:1] if row.shared else row.official)}
    shapes = {name: (described[name].shape, described[name].dtype) for name in row_of}

    def read(name: str) -> np.ndarray:
        row = row_of[name]
        values = row.transform.to_official(*(jax.device_get(flat[path]) for path in row.ours))
        return values[row.official.index(name)]

    stem = _STEMS[1] if record.is_diffusers else _STEMS[0]
    shards = _shards(shapes, shard_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json"), folder / SETTINGS):
            old.unlink(missing_ok=True)
        places = {}
        for i, names in enumerate(shards):
            file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
            write_safetensors(folder / file, {n: shapes[n] for n in names}, read, {"format": "pt"})
            places |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = sum(described[name].nbytes for name in shapes)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        settings = record.write_settings(bridge.hparams(model.config), dtype=_main_type(described))
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error


def _as_saved(bridge: Official) -> list[Official]:
    """The bridges to the names that saved files may have, the usual ones first."""
    return [*(replace(bridge, table=table) for table in bridge.saved), bridge]


def _names(bridge: Official, config: Any) -> set[str]:
    return {name for row in bridge.table(config) for name in row.official}


def _shards(shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]], shard_bytes: int) -> list[list[str]]:
    """Names in order, as many a shard as fit; a tensor that is larger than a shard gets one of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, (shape, dtype) in shapes.items():
        own = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if shards[-1] and size + own > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    return shards


def _main_type(arrays: Mapping[str, np.ndarray]) -> str:
    """The type that most of the numbers have."""
    sizes: dict[str, int] = {}
    for array in arrays.values():
        sizes[str(array.dtype)] = sizes.get(str(array.dtype), 0) + array.size
    return max(sizes, key=sizes.__getitem__)
