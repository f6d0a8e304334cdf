"""Symbolic attention masks: small pytrees that say which query may see which key, and make an array only on demand.

Masks compose: `CausalMask() & SegmentMask(q, k)`, `a | b`, `~a`. They are arguments of jitted functions like any array.
"""

import abc
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

__all__ = [
    "BlockMask",
    "CausalMask",
    "DenseMask",
    "FullMask",
    "KeyMask",
    "LengthMask",
    "Mask",
    "PrefixMask",
    "SegmentMask",
    "WindowMask",
]

_static = {"metadata": {"static": True}}


class Mask(abc.ABC):
    """True where a query may see a key."""

    @abc.abstractmethod
    def allows(self, query: Int[Array, " Lq"], key: Int[Array, " Lk"]) -> Bool[Array, "b h Lq Lk"]:
        """The mask at these query and key positions; b and h are 1 where batch or head make no difference.

        Positions may be any part of the sequences, so that a blocked kernel never needs the whole table.
        """

    def materialize(self, query_length: int, key_length: int) -> Bool[Array, "b h Lq Lk"]:
        """The whole table."""
        return self.allows(jnp.arange(query_length), jnp.arange(key_length))

    def __and__(self, other: "Mask") -> "Mask":
        return _Combined(self, other, operator.and_)

    def __or__(self, other: "Mask") -> "Mask":
        return _Combined(self, other, operator.or_)

    def __invert__(self) -> "Mask":
        return _Inverted(self)


def _pytree(cls: type) -> type:
    """A frozen dataclass whose `static` fields are part of the type for JAX, the others its leaves."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True, eq=False)(cls))


@_pytree
class FullMask(Mask):
    """Everything is allowed."""

    def allows(self, query, key):
        return jnp.ones((1, 1, query.size, key.size), bool)


@_pytree
class CausalMask(Mask):
    """key <= query + offset. With a cache of c earlier keys, the new queries see them with `offset=c`."""

    offset: Int[Array, ""] | int = 0

    def allows(self, query, key):
        return (key[None, :] <= query[:, None] + self.offset)[None, None]


@_pytree
class WindowMask(Mask):
    """query + offset - left <= key <= query + offset + right, in tokens; `None` leaves a side open."""

    left: int | None = field(default=None, **_static)
    right: int | None = field(default=None, **_static)
    offset: Int[Array, ""] | int = 0

    def allows(self, query, key):
        distance = key[None, :] - query[:, None] - self.offset
        allowed = jnp.ones(distance.shape, bool)
        if self.left is not None:
            allowed &= distance >= -self.left
        if self.right is not None:
            allowed &= distance <= self.right
        return allowed[None, None]


@_pytree
class PrefixMask(Mask):
    """Causal, but the first `length` keys are seen by all: the mask of a prefix language model."""

    length: Int[Array, " B"] | Int[Array, ""] | int

    def allows(self, query, key):
        prefix = key[None, None, :] < jnp.reshape(jnp.asarray(self.length), (-1, 1, 1))
        return (prefix | (key[None, :] <= query[:, None])[None])[:, None]


@_pytree
class SegmentMask(Mask):
    """Queries see the keys of their own segment (document of a packed batch)."""

    query_segments: Int[Array, "B Lq"]
    key_segments: Int[Array, "B Lk"]

    def allows(self, query, key):
        return (self.query_segments[:, query, None] == self.key_segments[:, None, key])[:, None]


@_pytree
class LengthMask(Mask):
    """key < length of its batch row: padding at the end is not seen."""

    lengths: Int[Array, " B"]

    def allows(self, query, key):
        present = key[None, :] < self.lengths[:, None]
        return jnp.broadcast_to(present[:, None, None, :], (self.lengths.size, 1, query.size, key.size))


@_pytree
class KeyMask(Mask):
    """Keys that are present, wherever the padding is."""

    present: Bool[Array, "B Lk"]

    def allows(self, query, key):
        present = self.present[:, key]
        return jnp.broadcast_to(present[:, None, None, :], (present.shape[0], 1, query.size, key.size))


@_pytree
class BlockMask(Mask):
    """Block-sparse: query q sees key k where table[..., q // query_block, k // key_block] is True."""

    table: Bool[Array, "b h Nq Nk"]
    query_block: int = field(**_static)
    key_block: int = field(**_static)

    def allows(self, query, key):
        return self.table[:, :, query[:, None] // self.query_block, key[None, :] // self.key_block]


@_pytree
class DenseMask(Mask):
    """A given table, of any shape that broadcasts to (B, H, Lq, Lk)."""

    table: Bool[Array, "*broadcastable"]

    def allows(self, query, key):
        table = jnp.reshape(self.table, (1,) * (4 - self.table.ndim) + self.table.shape)
        if table.shape[2] > 1:
            table = table[:, :, query]
        if table.shape[3] > 1:
            table = table[:, :, :, key]
        return jnp.broadcast_to(table, (*table.shape[:2], query.size, key.size))


@_pytree
class _Combined(Mask):
    left: Mask
    right: Mask
    operation: Callable = field(**_static)

    def allows(self, query, key):
        return self.operation(self.left.allows(query, key), self.right.allows(query, key))


@_pytree
class _Inverted(Mask):
    mask: Mask

    def allows(self, query, key):
        return ~self.mask.allows(query, key)
