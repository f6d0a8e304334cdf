"""The arguments of diffusers' models: config.json has them all, most with values that no checkpoint changes."""

from collections.abc import Iterable, Mapping
from typing import Any

from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = ["hashable", "supported_arguments"]


def supported_arguments(
    hparams: Mapping[str, Any],
    kind: str,
    defaults: Mapping[str, Any],
    *,
    fixed: Mapping[str, Iterable[Any]],
    ignored: Iterable[str] = (),
) -> dict[str, Any]:
    """The arguments of `defaults`, where given. Of `fixed` ones, only these values are ours; `ignored` ones change no
    output. Any other raises `UserError`. Names that begin with an underscore describe the file."""
    given = {name: hashable(value) for name, value in hparams.items() if not name.startswith("_")}
    for name, value in given.items():
        if name in fixed and value not in tuple(fixed[name]):
            raise UserError(f"a {kind} with {name} {value!r} is not supported")
        if name not in defaults and name not in fixed and name not in ignored:
            raise UserError(f"{name} is not an argument of {kind} that is supported{closest(name, defaults)}")
    return {name: given.get(name, default) for name, default in defaults.items()}


def hashable(value: Any) -> Any:
    """json's lists as tuples."""
    return tuple(map(hashable, value)) if isinstance(value, list | tuple) else value
