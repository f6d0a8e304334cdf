"""How the hub's settings spell what many architectures have: activation functions, tokens that end a text."""

from collections.abc import Mapping, Sequence

from zoo.errors import UserError

__all__ = ["activation_from_hub", "activation_to_hub", "end_tokens_from_hub", "end_tokens_to_hub"]

_OURS: Mapping[str, str] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "leaky_relu": "leaky_relu",
    "linear": "identity",
    "mish": "mish",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def activation_from_hub(name: str) -> str:
    """Our name of the hub's `hidden_act` or the like."""
    if name not in _OURS:
        raise UserError(f"activation {name!r} of these settings is not one of {', '.join(_OURS)}")
    return _OURS[name]


def activation_to_hub(name: str) -> str:
    """The hub's name of ours, the first of several."""
    return next(theirs for theirs, ours in _OURS.items() if ours == name)


def end_tokens_from_hub(eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """None, one or several."""
    if eos_token_id is None:
        return ()
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)


def end_tokens_to_hub(tokens: tuple[int, ...]) -> int | list[int] | None:
    return (tokens[0] if len(tokens) == 1 else list(tokens)) if tokens else None
