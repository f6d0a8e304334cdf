"""Reading and writing files of named tensors: safetensors, npz, and torch pickles only through their safe loader."""

import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from zoo.errors import UserError

__all__ = ["SUFFIXES", "local_path", "read_tensors", "write_safetensors", "write_tensors"]

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)
_NPZ_METADATA = "__metadata__"
_DTYPES = {
    **{
        f"{kind}{bits}": np.dtype(f"{name}{bits}")
        for kind, name in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "C64": np.dtype("complex64"),
    "BOOL": np.dtype("bool"),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def local_path(source: str | os.PathLike[str]) -> epath.Path:
    """The file or folder behind a path or URI: local and gs:// as they are, hf:// downloaded.

    hf://owner/name is a repository, with @revision one of its states, with /path a file or folder in it. Of a folder,
    only what loading a model needs is fetched: settings, tokenizer files and safetensors.
    """
    text = os.fspath(source)
    if not text.startswith("hf://"):
        return epath.Path(text).expanduser()
    parts = text.removeprefix("hf://").rstrip("/").split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise UserError(f"{text} is not of the form hf://owner/name or hf://owner/name/file")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{text} needs the hub extra: pip install 'attention-zoo[hub]'") from error
    name, _, revision = parts[1].partition("@")
    repository, inside = f"{parts[0]}/{name}", parts[2] if len(parts) == 3 else ""
    try:
        if epath.Path(inside).suffix in (*SUFFIXES, ".json"):
            return epath.Path(huggingface_hub.hf_hub_download(repository, inside, revision=revision or None))
        wanted = [f"{inside}/{kind}" if inside else kind for kind in ("*.json", "*.safetensors", "*.model", "*.txt")]
        folder = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=wanted)
        return epath.Path(folder) / inside
    except (OSError, ValueError) as error:
        raise UserError(f"{text} could not be downloaded: {str(error).splitlines()[0]}") from error


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(name -> array, metadata) of a tensor file. Nothing in the file is ever executed."""
    path = local_path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the path of a {', '.join(SUFFIXES)} file")
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path), {}
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} has none of the known endings {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with path.open("rb") as file:
        head = file.read(2)
    if head != b"PK":
        raise UserError(f"{path} is not an npz archive (np.savez writes one)")
    return _read_npz(path)


def _read_safetensors(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Views into the mapped file: a tensor is read from disk when, and as far as, somebody looks at it."""
    try:
        if "://" in os.fspath(path):
            data = np.frombuffer(path.read_bytes(), np.uint8)
        else:
            data = np.memmap(path, np.uint8, mode="r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + length].tobytes().decode("utf-8"))
        metadata, body = header.pop("__metadata__", {}), data[8 + length :]
        tensors = {}
        for name, facts in header.items():
            start, stop = facts["data_offsets"]
            if not 0 <= start <= stop <= body.size:
                raise ValueError(f"the bytes of {name} lie beyond its end")
            tensors[name] = body[start:stop].view(_DTYPES[facts["dtype"]]).reshape(facts["shape"]).view(np.ndarray)
        return tensors, metadata
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        with path.open("rb") as file:
            head = file.read(2)
        # Only of a file that is none of ours: the length of a header may begin with the same bytes.
        if head[:1] == b"\x80" or head == b"PK":
            raise UserError(
                f"{path} is a pickle in spite of its name and was not opened; {_convert_hint(path)}"
            ) from error
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from error


def _read_npz(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            tensors = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or holds pickled objects, which are never opened: {error}") from error
    metadata = tensors.pop(_NPZ_METADATA, None)
    return tensors, json.loads(str(metadata)) if metadata is not None else {}


def _read_torch(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path} is a torch file and torch is not installed; {_convert_hint(path)}") from error
    try:
        state = torch.load(os.fspath(path), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here, all of which mean: not a plain state dict
        raise UserError(f"{path} is not a plain state dict that torch.load(weights_only=True) accepts") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path} does not hold a flat state dict of tensors; save model.state_dict() alone")
    return {
        name: value.float().numpy() if value.is_floating_point() else value.numpy() for name, value in state.items()
    }


def _convert_hint(path: epath.Path) -> str:
    return (
        'convert it where torch is installed: python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')\""
    )


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Writes a .safetensors or .npz file; it appears whole or not at all. Only `overwrite` replaces an existing one."""
    path = epath.Path(path)
    if path.suffix not in (".safetensors", ".npz"):
        raise UserError(f"{path}: tensors are written as .safetensors or .npz")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; choose another name or remove it")
    part = path.parent / f".{path.name}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            arrays = {name: np.asarray(jax.device_get(value)) for name, value in tensors.items()}
            with part.open("wb") as file:
                np.savez(file, **arrays, **{_NPZ_METADATA: np.array(json.dumps(dict(metadata)))})
        else:
            shapes = {name: (np.shape(value), np.dtype(value.dtype)) for name, value in tensors.items()}
            write_safetensors(part, shapes, tensors.__getitem__, metadata)
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def write_safetensors(
    path: epath.Path,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], Any],
    metadata: Mapping[str, str],
) -> None:
    """Writes the tensors of these shapes and types; `read` is asked for one after the other: only one is held."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    # Wide types first, as the format's own library does: then every tensor is aligned to its type.
    names = sorted(shapes, key=lambda name: (-shapes[name][1].itemsize, name))
    for name in names:
        shape, dtype = shapes[name]
        stop = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            shape, dtype = shapes[name]
            array = np.asarray(jax.device_get(read(name)))
            if array.shape != tuple(shape) or array.dtype != dtype:
                raise AssertionError(f"{name} turned out as {array.dtype}{array.shape}, not {dtype}{tuple(shape)}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
