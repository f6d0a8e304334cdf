"""Converter tables: where every tensor of an official state dict lives in our variables, used in both directions.

A table is an iterable of `Row`s. A row joins one or more official tensors with one or more of ours through a
`Transform`, whose two functions undo each other exactly. They run on NumPy arrays when weights are loaded and on JAX
arrays when the parity tests differentiate through the conversion, hence the array-API style.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = [
    "IDENTITY",
    "TRANSPOSE",
    "Row",
    "Table",
    "Transform",
    "conv1x1",
    "layer_norm",
    "linear",
    "parameter",
    "permute",
]


@dataclass(frozen=True)
class Transform:
    """A pair of inverse maps between official tensors and ours, each from a tuple of arrays to a tuple of arrays."""

    from_official: Callable[..., tuple[Any, ...]]
    to_official: Callable[..., tuple[Any, ...]]


def permute(*axes: int) -> Transform:
    """Ours is the official tensor with its axes in this order."""
    back = tuple(sorted(range(len(axes)), key=axes.__getitem__))
    return Transform(lambda x: (x.transpose(axes),), lambda x: (x.transpose(back),))


IDENTITY = Transform(lambda *x: x, lambda *x: x)
TRANSPOSE = permute(1, 0)
_SQUEEZE_CONV = Transform(lambda x: (x[:, :, 0].transpose(1, 0),), lambda x: (x.transpose(1, 0)[:, :, None],))


@dataclass(frozen=True)
class Row:
    """Official tensors and ours that hold the same numbers. Our paths read `collection/module/.../name`."""

    official: tuple[str, ...]
    ours: tuple[str, ...]
    transform: Transform = IDENTITY


Table = Iterable[Row]


def parameter(
    official: str, ours: str, transform: Transform = IDENTITY, *, collection: str = "params"
) -> Iterator[Row]:
    """One tensor; `collection` is the Flax collection it lives in."""
    yield Row((official,), (f"{collection}/{ours}",), transform)


def linear(official: str, ours: str, *, bias: bool = True) -> Iterator[Row]:
    """torch.nn.Linear (F, D) to a Flax kernel (D, F)."""
    yield from parameter(f"{official}.weight", f"{ours}/kernel", TRANSPOSE)
    if bias:
        yield from parameter(f"{official}.bias", f"{ours}/bias")


def conv1x1(official: str, ours: str, *, bias: bool = True) -> Iterator[Row]:
    """torch.nn.Conv1d (F, D, 1), a linear layer over channels, to a Flax kernel (D, F)."""
    yield from parameter(f"{official}.weight", f"{ours}/kernel", _SQUEEZE_CONV)
    if bias:
        yield from parameter(f"{official}.bias", f"{ours}/bias")


def layer_norm(official: str, ours: str, *, bias: bool = True) -> Iterator[Row]:
    """torch.nn.LayerNorm to Flax's scale and bias."""
    yield from parameter(f"{official}.weight", f"{ours}/scale")
    if bias:
        yield from parameter(f"{official}.bias", f"{ours}/bias")
