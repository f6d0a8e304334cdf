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
    "ShiftedMask",
    "WindowMask",
    "as_mask",
]

Position = Int[Array, ""] | int
Offset = Int[Array, "*B"] | int | None

_static = {"metadata": {"static": True}}


class Mask(abc.ABC):
    """True where a query may see a key.

    Positions count from 0 in queries and keys alike. `shift` is the key position that query 0 stands on, for the masks
    that compare positions and have no `offset` of their own; the attention functions and `materialize` use Lk - Lq, so
    that the last query stands on the last key (bottom-right alignment).
    """

    @abc.abstractmethod
    def allows(self, query: Int[Array, " Lq"], key: Int[Array, " Lk"], *, shift: int = 0) -> Bool[Array, "b h Lq Lk"]:
        """The mask at any query and key positions; b and h are 1 where batch or head make no difference."""

    def block(
        self, query_start: Position, query_size: int, key_start: Position, key_size: int, *, shift: int = 0
    ) -> Bool[Array, "b h Lq Lk"]:
        """The mask on a range of queries and a range of keys; sizes are static, starts may be traced."""
        return self.allows(query_start + jnp.arange(query_size), key_start + jnp.arange(key_size), shift=shift)

    def covers(
        self, query_start: int, query_size: int, key_start: int, key_size: int, *, shift: int = 0
    ) -> bool | None:
        """What is known of a block without looking at array values: True all allowed, False none, None unknown."""
        return None

    def materialize(self, query_length: int, key_length: int) -> Bool[Array, "b h Lq Lk"]:
        """The whole table, aligned bottom-right."""
        return self.block(0, query_length, 0, key_length, shift=key_length - query_length)

    def __and__(self, other: "Mask") -> "Mask":
        return _Combined(self, other, operator.and_)

    def __or__(self, other: "Mask") -> "Mask":
        return _Combined(self, other, operator.or_)

    def __invert__(self) -> "Mask":
        return _Inverted(self)


def as_mask(mask: Mask | Bool[Array, "*broadcastable"] | None) -> Mask | None:
    """A mask from what callers pass: a mask, a table that broadcasts to (B, H, Lq, Lk), or None.

    Source: masks as objects that compose, as in JAX's splash attention for TPU.
    """
    return mask if mask is None or isinstance(mask, Mask) else DenseMask(mask)


def conjuncts(mask: Mask) -> list[Mask]:
    """The masks whose `&` it is."""
    if isinstance(mask, _Combined) and mask.operation is operator.and_:
        return [*conjuncts(mask.left), *conjuncts(mask.right)]
    return [mask]


def _pytree(cls: type) -> type:
    """A frozen dataclass whose `static` fields are part of the type for JAX, the others its leaves."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True, eq=False)(cls))


def _distance(query, key, offset, shift) -> Int[Array, "b Lq Lk"]:
    """How far the key lies after the query."""
    offset = jnp.reshape(jnp.asarray(shift if offset is None else offset), (-1, 1, 1))
    return key[None, None, :] - query[None, :, None] - offset


def _band_covers(block, shift, left: int | None, right: int | None) -> bool | None:
    """`covers` of -left <= distance <= right."""
    query_start, query_size, key_start, key_size = block
    nearest = key_start - (query_start + query_size - 1) - shift
    farthest = key_start + key_size - 1 - query_start - shift
    if (left is not None and farthest < -left) or (right is not None and nearest > right):
        return False
    inside = (left is None or nearest >= -left) and (right is None or farthest <= right)
    return True if inside else None


@_pytree
class FullMask(Mask):
    """Everything is allowed."""

    def allows(self, query, key, *, shift=0):
        return jnp.ones((1, 1, query.size, key.size), bool)

    def covers(self, *block, shift=0):
        return True


@_pytree
class CausalMask(Mask):
    """key <= query + offset.

    Without `offset` the last query sees the last key. After c earlier keys in a preallocated cache, new queries see
    them and each other with `offset=c`, a number or one per batch row; blocks are skipped only without `offset`.
    """

    offset: Offset = None

    def allows(self, query, key, *, shift=0):
        return (_distance(query, key, self.offset, shift) <= 0)[:, None]

    def covers(self, *block, shift=0):
        return _band_covers(block, shift, None, 0) if self.offset is None else None


@_pytree
class WindowMask(Mask):
    """query + offset - left <= key <= query + offset + right, in tokens; `None` leaves a side open.

    `offset` is that of `CausalMask`.
    """

    left: int | None = field(default=None, **_static)
    right: int | None = field(default=None, **_static)
    offset: Offset = None

    def allows(self, query, key, *, shift=0):
        distance = _distance(query, key, self.offset, shift)
        allowed = jnp.ones(distance.shape, bool)
        if self.left is not None:
            allowed &= distance >= -self.left
        if self.right is not None:
            allowed &= distance <= self.right
        return allowed[:, None]

    def covers(self, *block, shift=0):
        return _band_covers(block, shift, self.left, self.right) if self.offset is None else None


@_pytree
class PrefixMask(Mask):
    """Causal, but the first `length` keys are seen by all: the mask of a prefix language model.

    `length` is a number or one per batch row; `offset` is that of `CausalMask`.
    """

    length: Int[Array, "*B"] | int
    offset: Offset = None

    def allows(self, query, key, *, shift=0):
        prefix = key[None, None, :] < jnp.reshape(jnp.asarray(self.length), (-1, 1, 1))
        return (prefix | (_distance(query, key, self.offset, shift) <= 0))[:, None]


@_pytree
class SegmentMask(Mask):
    """Queries see the keys of their own segment (document of a packed batch)."""

    query_segments: Int[Array, "B Lq"]
    key_segments: Int[Array, "B Lk"]

    def allows(self, query, key, *, shift=0):
        return (self.query_segments[:, query, None] == self.key_segments[:, None, key])[:, None]


@_pytree
class LengthMask(Mask):
    """key < length of its batch row: padding at the end is not seen."""

    lengths: Int[Array, " B"]

    def allows(self, query, key, *, shift=0):
        present = key[None, :] < self.lengths[:, None]
        return jnp.broadcast_to(present[:, None, None, :], (self.lengths.size, 1, query.size, key.size))


@_pytree
class KeyMask(Mask):
    """Keys that are present, wherever the padding is."""

    present: Bool[Array, "B Lk"]

    def allows(self, query, key, *, shift=0):
        present = self.present[:, key]
        return jnp.broadcast_to(present[:, None, None, :], (present.shape[0], 1, query.size, key.size))


@_pytree
class BlockMask(Mask):
    """Block-sparse: query q sees key k where table[..., q // query_block, k // key_block] is True."""

    table: Bool[Array, "b h Nq Nk"]
    query_block: int = field(**_static)
    key_block: int = field(**_static)

    def allows(self, query, key, *, shift=0):
        return self.table[:, :, query[:, None] // self.query_block, key[None, :] // self.key_block]


@_pytree
class DenseMask(Mask):
    """A given table, of any shape that broadcasts to (B, H, Lq, Lk)."""

    table: Bool[Array, "*broadcastable"]

    def _wide(self):
        return jnp.reshape(self.table, (1,) * (4 - self.table.ndim) + self.table.shape)

    def allows(self, query, key, *, shift=0):
        table = self._wide()
        if table.shape[2] > 1:
            table = table[:, :, query]
        if table.shape[3] > 1:
            table = table[:, :, :, key]
        return jnp.broadcast_to(table, (*table.shape[:2], query.size, key.size))

    def block(self, query_start, query_size, key_start, key_size, *, shift=0):
        # A slice is much cheaper than the gather that arbitrary positions need.
        table = self._wide()
        if table.shape[2] > 1:
            table = jax.lax.dynamic_slice_in_dim(table, query_start, query_size, 2)
        if table.shape[3] > 1:
            table = jax.lax.dynamic_slice_in_dim(table, key_start, key_size, 3)
        return jnp.broadcast_to(table, (*table.shape[:2], query_size, key_size))


@_pytree
class ShiftedMask(Mask):
    """A mask of `size` keys that lie from `start` on among `total` keys; the other keys are forbidden.

    Bottom-right alignment inside is that of the `size` keys alone.
    """

    mask: Mask
    start: int = field(**_static)
    size: int = field(**_static)
    total: int = field(**_static)

    def allows(self, query, key, *, shift=0):
        local = key - self.start
        inside = (local >= 0) & (local < self.size)
        kept = self.mask.allows(query, jnp.clip(local, 0, self.size - 1), shift=shift - self.total + self.size)
        return kept & inside

    def covers(self, query_start, query_size, key_start, key_size, *, shift=0):
        first = max(key_start - self.start, 0)
        stop = min(key_start + key_size - self.start, self.size)
        if first >= stop:
            return False
        inner = self.mask.covers(query_start, query_size, first, stop - first, shift=shift - self.total + self.size)
        return inner if stop - first == key_size or inner is False else None


@_pytree
class _Combined(Mask):
    left: Mask
    right: Mask
    operation: Callable = field(**_static)

    def allows(self, query, key, *, shift=0):
        return self.operation(*(m.allows(query, key, shift=shift) for m in (self.left, self.right)))

    def block(self, *block, shift=0):
        return self.operation(*(m.block(*block, shift=shift) for m in (self.left, self.right)))

    def covers(self, *block, shift=0):
        known = {m.covers(*block, shift=shift) for m in (self.left, self.right)}
        decisive = self.operation is operator.or_
        if decisive in known:
            return decisive
        return None if None in known else not decisive


@_pytree
class _Inverted(Mask):
    mask: Mask

    def allows(self, query, key, *, shift=0):
        return ~self.mask.allows(query, key, shift=shift)

    def block(self, *block, shift=0):
        return ~self.mask.block(*block, shift=shift)

    def covers(self, *block, shift=0):
        known = self.mask.covers(*block, shift=shift)
        return None if known is None else not known
