"""Converter tables: where every tensor of an official state dict lives in our variables, used in both directions.

A table is an iterable of `Row`s. A row joins one or more official tensors with one or more of ours through a
`Transform`, whose two functions undo each other exactly. They run on NumPy arrays when weights are loaded and on JAX
arrays when the parity tests differentiate through the conversion, hence the array-API style.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

__all__ = [
    "IDENTITY",
    "TRANSPOSE",
    "Row",
    "Table",
    "Transform",
    "batch_norm",
    "constant",
    "conv",
    "conv1x1",
    "conv_transpose",
    "end_to_end",
    "fused_linear",
    "layer_norm",
    "linear",
    "multihead_attention",
    "parameter",
    "permute",
    "shared",
    "split_columns",
    "split_heads",
    "split_rows",
    "squeezed",
    "stacked",
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


@dataclass(frozen=True)
class Row:
    """Official tensors and ours that hold the same numbers. Our paths read `collection/module/.../name`."""

    official: tuple[str, ...]
    ours: tuple[str, ...]
    transform: Transform = IDENTITY
    shared: bool = False  # the official names are of one tensor: files hold it under any of them, or under several


Table = Iterable[Row]


def parameter(
    official: str, ours: str, transform: Transform = IDENTITY, *, collection: str = "params"
) -> Iterator[Row]:
    """One tensor; `collection` is the Flax collection it lives in."""
    yield Row((official,), (f"{collection}/{ours}",), transform)


def shared(official: tuple[str, ...], ours: str, transform: Transform = IDENTITY) -> Iterator[Row]:
    """One tensor that the official model has under several names, such as an embedding that is also the output layer.

    The first name is read, all are written; files keep the first.
    """
    one = Transform(lambda *x: transform.from_official(x[0]), lambda x: transform.to_official(x) * len(official))
    yield Row(official, (f"params/{ours}",), one, shared=True)


def split_rows(*sizes: int) -> Transform:
    """A fused torch.nn.Linear weight (F, D), or its bias (F,), to one kernel (D, F_i), or bias, for each size F_i."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]

    def apart(x):
        return tuple(part.T for part in _cut(x, ends, 0))

    def together(*parts):
        return (_join([part.T for part in parts], 0),)

    return Transform(apart, together)


def split_columns(*sizes: int) -> Transform:
    """A fused weight (D, F) that is stored as a kernel already, or its bias, to one for each size."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return Transform(lambda x: tuple(_cut(x, ends, -1)), lambda *parts: (_join(parts, -1),))


def split_heads(heads: int, *sizes: int) -> Transform:
    """A fused torch.nn.Linear weight, or its bias, that has the F_i rows of each part head by head, to one kernel
    (D, heads F_i), or bias, for each part."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]

    def apart(x):
        parts = _cut(x.reshape(heads, sum(sizes), *x.shape[1:]), ends, 1)
        return tuple(part.reshape(-1, *x.shape[1:]).T for part in parts)

    def together(*parts):
        parts = [part.T.reshape(heads, -1, *part.shape[:-1]) for part in parts]
        return (_join(parts, 1).reshape(-1, *parts[0].shape[2:]),)

    return Transform(apart, together)


def end_to_end(count: int, *axes: int, axis: int = 0, stack: bool = False) -> Transform:
    """`count` tensors of one size, each with its axes in this order, as one: along `axis`, or with `stack` a new first
    axis."""
    back = tuple(sorted(range(len(axes)), key=axes.__getitem__))

    def together(*parts):
        parts = [part.transpose(axes) for part in parts]
        return (_join([part[None] for part in parts], 0) if stack else _join(parts, axis),)

    def apart(x):
        if stack:
            return tuple(x[i].transpose(back) for i in range(count))
        size = x.shape[axis] // count
        ends = [size * (i + 1) for i in range(count - 1)]
        return tuple(part.transpose(back) for part in _cut(x, ends, axis))

    return Transform(together, apart)


def _cut(x: Any, ends: list[int], axis: int) -> list[Any]:
    starts, stops = [0, *ends], [*ends, x.shape[axis]]
    before = (slice(None),) * (axis % x.ndim)
    return [x[(*before, slice(a, b))] for a, b in zip(starts, stops, strict=True)]


def _join(parts: Any, axis: int) -> Any:
    joined = np.concatenate if all(isinstance(part, np.ndarray) for part in parts) else jnp.concatenate
    return joined(list(parts), axis=axis)


def stacked(tables: Sequence[Table]) -> Iterator[Row]:
    """Alike modules, each with its table of single tensors to the same ones of ours, as one: ours lie behind one
    another along a new first axis."""

    def joint(rows: tuple[Row, ...]) -> Transform:
        def together(*parts):
            return (_join([r.transform.from_official(x)[0][None] for r, x in zip(rows, parts, strict=True)], 0),)

        def apart(x):
            return tuple(r.transform.to_official(x[i])[0] for i, r in enumerate(rows))

        return Transform(together, apart)

    for rows in zip(*tables, strict=True):
        yield Row(tuple(r.official[0] for r in rows), rows[0].ours, joint(rows))


def linear(official: str, ours: str, *, bias: bool = True) -> Iterator[Row]:
    """torch.nn.Linear (F, D) to a Flax kernel (D, F)."""
    yield from parameter(f"{official}.weight", f"{ours}/kernel", TRANSPOSE)
    if bias:
        yield from parameter(f"{official}.bias", f"{ours}/bias")


def conv1x1(official: str, ours: str, *, axes: int = 1, bias: bool = True) -> Iterator[Row]:
    """torch.nn.Conv1d, 2d or 3d (F, D, 1, ...), a linear layer over channels, to a Flax kernel (D, F)."""
    first, last = (slice(None), slice(None), *(0,) * axes), (slice(None), slice(None), *(None,) * axes)
    flat = Transform(lambda x: (x[first].transpose(1, 0),), lambda x: (x.transpose(1, 0)[last],))
    yield from parameter(f"{official}.weight", f"{ours}/kernel", flat)
    if bias:
        yield from parameter(f"{official}.bias", f"{ours}/bias")


def layer_norm(official: str, ours: str, *, bias: bool = True) -> Iterator[Row]:
    """torch.nn.LayerNorm to Flax's scale and bias."""
    yield from parameter(f"{official}.weight", f"{ours}/scale")
    if bias:
        yield from parameter(f"{official}.bias", f"{ours}/bias")


def squeezed(axes: int) -> Transform:
    """Ours is the official tensor without its first axes, which have size one."""
    return Transform(lambda x: (x[(0,) * axes],), lambda x: (x[(None,) * axes],))


def fused_linear(
    official: str, ours: tuple[str, ...], size: int, *, bias: bool = True, separator: str = "."
) -> Iterator[Row]:
    """One torch.nn.Linear of several projections of the same size after one another, such as qkv, to one each.

    `separator` stands between its name and weight or bias: torch.nn.MultiheadAttention has in_proj_weight.
    """
    cut = split_rows(*(size,) * len(ours))
    yield Row((f"{official}{separator}weight",), tuple(f"params/{name}/kernel" for name in ours), cut)
    if bias:
        yield Row((f"{official}{separator}bias",), tuple(f"params/{name}/bias" for name in ours), cut)


def conv(official: str, ours: str, *, axes: int = 2, bias: bool = True) -> Iterator[Row]:
    """torch.nn.Conv1d, 2d or 3d (F, C, *kernel) to a Flax kernel (*kernel, C, F), grouped ones too."""
    yield from parameter(f"{official}.weight", f"{ours}/kernel", permute(*range(2, 2 + axes), 1, 0))
    if bias:
        yield from parameter(f"{official}.bias", f"{ours}/bias")


def batch_norm(official: str, ours: str) -> Iterator[Row]:
    """torch.nn.BatchNorm to `zoo.blocks.BatchNorm`: scale and bias, and the statistics in `batch_stats`."""
    yield from layer_norm(official, ours)
    for theirs, own in (("running_mean", "mean"), ("running_var", "var"), ("num_batches_tracked", "count")):
        yield from parameter(f"{official}.{theirs}", f"{ours}/{own}", collection="batch_stats")


def multihead_attention(official: str, ours: str, size: int) -> Iterator[Row]:
    """torch.nn.MultiheadAttention of this width, which packs three projections into one, to query, key, value, out."""
    packed = tuple(f"{ours}/{name}" for name in ("query", "key", "value"))
    yield from fused_linear(f"{official}.in_proj", packed, size, separator="_")
    yield from linear(f"{official}.out_proj", f"{ours}/out")


def conv_transpose(official: str, ours: str, *, axes: int = 2, bias: bool = True) -> Iterator[Row]:
    """torch.nn.ConvTranspose (C, F, *kernel) to a Flax kernel (*kernel, C, F), which runs the other way."""
    order, flip = permute(*range(2, 2 + axes), 0, 1), (slice(None, None, -1),) * axes
    turned = Transform(lambda x: (order.from_official(x)[0][flip],), lambda x: order.to_official(x[flip]))
    yield from parameter(f"{official}.weight", f"{ours}/kernel", turned)
    if bias:
        yield from parameter(f"{official}.bias", f"{ours}/bias")


def constant(official: str, value: np.ndarray) -> Iterator[Row]:
    """A tensor of the official state dict that its sizes determine and ours has no need of."""
    yield Row((official,), (), Transform(lambda x: (), lambda: (value,)))
