"""Reading and writing files of named tensors: safetensors, npz, and torch pickles only through their safe loader."""

import json
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from zoo.errors import UserError

__all__ = ["SUFFIXES", "local_path", "read_tensors", "write_tensors"]

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)
_NPZ_METADATA = "__metadata__"


def local_path(source: str | os.PathLike[str]) -> epath.Path:
    """The file or folder behind a path or URI: local and gs:// as they are, hf://owner/name/file downloaded."""
    text = os.fspath(source)
    if not text.startswith("hf://"):
        return epath.Path(text).expanduser()
    parts = text.removeprefix("hf://").split("/", 2)
    if len(parts) != 3:
        raise UserError(f"{text} is not of the form hf://owner/name/file")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{text} needs the hub extra: pip install 'attention-zoo[hub]'") from error
    try:
        return epath.Path(huggingface_hub.hf_hub_download("/".join(parts[:2]), parts[2]))
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
    with path.open("rb") as file:
        head = file.read(2)
    if path.suffix == ".safetensors":
        if head[:1] == b"\x80" or head == b"PK":
            raise UserError(f"{path} is a pickle in spite of its name and was not opened; {_convert_hint(path)}")
        return _read_safetensors(path)
    if head != b"PK":
        raise UserError(f"{path} is not an npz archive (np.savez writes one)")
    return _read_npz(path)


def _read_safetensors(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    import safetensors

    try:
        # The flax framework knows bfloat16; arrays stay on the host whatever the default device is.
        with (
            jax.default_device(jax.local_devices(backend="cpu")[0]),
            safetensors.safe_open(os.fspath(path), framework="flax") as file,
        ):
            tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
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
    arrays = {name: np.ascontiguousarray(jax.device_get(value)) for name, value in tensors.items()}
    part = path.parent / f".{path.name}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            with part.open("wb") as file:
                np.savez(file, **arrays, **{_NPZ_METADATA: np.array(json.dumps(dict(metadata)))})
        else:
            from safetensors.flax import save

            part.write_bytes(save({k: jax.numpy.asarray(v) for k, v in arrays.items()}, dict(metadata)))
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
