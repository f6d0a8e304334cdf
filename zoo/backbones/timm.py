"""config.json as timm has it on the hub: the name of an architecture, and what differs from it."""

from collections.abc import Callable, Mapping
from typing import Any

from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = ["activation_from_timm", "activation_to_timm", "norm_from_timm", "norm_to_timm", "timm_settings"]

Settings = Mapping[str, Any]

_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "identity": "identity", "leaky_relu": "leaky_relu",
                "mish": "mish", "quick_gelu": "quick_gelu", "relu": "relu", "relu6": "relu6", "sigmoid": "sigmoid",
                "silu": "silu", "swish": "silu", "tanh": "tanh"}  # fmt: skip
_NORMS = {"layernorm": "layer", "rmsnorm": "rms"}


def timm_settings(
    configs: Callable[[], Mapping[str, Any]],
    hparams: Callable[[Any], dict[str, Any]],
    fallback: Callable[[Settings], str],
    *,
    sized: bool = True,
    classes: Mapping[str, str] | None = None,
) -> tuple[Callable[[Settings], Settings], Callable[[Settings], Settings]]:
    """(reading, writing) for a family with these named configurations.

    `fallback` names timm's architecture for constructor arguments that no named configuration has. `sized`: images have
    one size, the pretrained configuration's. `classes`: what an architecture's name contains to its class, the first
    that fits, where a family has several.
    """

    def kind(architecture: str) -> dict[str, str]:
        found = (name for part, name in (classes or {}).items() if part in architecture)
        return {"class": next(found)} if classes else {}

    def read(settings: Settings) -> Settings:
        architecture = settings["architecture"].split(".")[0]
        changes = dict(settings.get("model_args") or {})
        known = configs()
        if architecture in known:
            found = hparams(known[architecture])
        elif changes.keys() & {"depth", "depths", "layers", "cfg"}:
            found = {}
        else:
            raise UserError(
                f"{architecture} is not an architecture whose sizes are known here{closest(architecture, known)}; its "
                "constructor's arguments may stand under model_args of config.json"
            )
        pretrained = settings.get("pretrained_cfg") or {}
        if sized and "input_size" in pretrained:
            found = found | {"img_size": tuple(pretrained["input_size"][-2:])}
        found |= {key: settings[key] for key in ("num_classes", "global_pool") if key in settings}
        return found | kind(architecture) | changes

    def write(arguments: Settings) -> Settings:
        named = (name for name, config in configs().items() if name != "tiny" and hparams(config) == arguments)
        architecture = next(named, None) or fallback(arguments)
        changes = {key: value for key, value in arguments.items() if key != "class"}
        settings = {"architecture": architecture, "num_classes": arguments["num_classes"], "model_args": changes}
        if "global_pool" in arguments:
            settings["global_pool"] = arguments["global_pool"]
        return settings

    return read, write


def activation_from_timm(name: str | None) -> str:
    """Our name of timm's `act_layer`."""
    name = name or "gelu"
    if name not in _ACTIVATIONS:
        raise UserError(f"act_layer {name!r} is not one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def activation_to_timm(name: str) -> str | None:
    return None if name == "gelu" else name


def norm_from_timm(name: str | None) -> str:
    """Our name of timm's `norm_layer`."""
    plain = (name or "layernorm").replace("_", "").lower()
    if plain not in _NORMS:
        raise UserError(f"norm_layer {name!r} is not one of {', '.join(_NORMS)}")
    return _NORMS[plain]


def norm_to_timm(kind: str) -> str | None:
    return None if kind == "layer" else "rmsnorm"
