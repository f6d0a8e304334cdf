"""What decoders share: embedding, positions, masks, cache, output."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import layers
from layers import Mask
from zoo.backbones.hooks import AttentionHook, plain_attention
from zoo.blocks import Linear

__all__ = [
    "Cache",
    "Output",
    "embed",
    "empty_cache",
    "padding_positions",
    "read_out",
    "runs",
    "settled",
    "visible_keys",
]

CacheT = TypeVar("CacheT")  # a layer's, with the `length` of each row
Cache = tuple[Any, ...]  # one for each layer: keys and values, or what else it remembers


class Output(NamedTuple):
    logits: Float[Array, "B L V"]
    last_hidden_state: Float[Array, "B L D"]  # after the last norm
    cache: Cache | None


def embed(embedding: nn.Embed, input_ids: Int[Array, "B L"], padding: int | None) -> Float[Array, "B L D"]:
    """Rows of the table, of which the one of `padding` is never trained."""
    x = embedding(input_ids)
    return x if padding is None else jnp.where((input_ids == padding)[..., None], jax.lax.stop_gradient(x), x)


def read_out(
    x: Float[Array, "B L D"], tied: nn.Embed | None, vocab_size: int, at: Int[Array, " B"] | None
) -> Float[Array, "B M V"]:
    """Logits of all places, or of the one `at` of each row: by the tied table, or a layer `head` of the caller."""
    chosen = x if at is None else jnp.take_along_axis(x, at[:, None, None], axis=1)
    return Linear(vocab_size, use_bias=False, name="head")(chosen) if tied is None else tied.attend(chosen)


def padding_positions(
    shape: tuple[int, int],
    present: Bool[Array, "B L"] | None,
    positions: Int[Array, "B L"] | None,
    offset: Int[Array, " B"] | None,
) -> tuple[Int[Array, "B L"], Int[Array, " B"]]:
    """(positions of the tokens, tokens so far in each row): counted from a row's first real token, or from the cache.

    Positions that are given stand, and what they reach counts as the length.
    """
    if positions is not None:
        return positions, jnp.max(positions, axis=-1) + 1
    places = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    if offset is not None:
        count = jnp.full(shape[0], shape[1]) if present is None else jnp.sum(present, axis=-1)
        return offset[:, None] + places, offset + count
    if present is None:
        return places, jnp.full(shape[0], shape[1])
    places = jnp.maximum(places - jnp.argmax(present, axis=-1, keepdims=True), 0)
    return places, jnp.max(jnp.where(present, places, -1), axis=-1) + 1


def visible_keys(
    present: Bool[Array, "B L"] | None,
    offset: Int[Array, " B"] | None,
    *,
    window: int | None = None,
    bidirectional: bool = False,
) -> Mask | None:
    """Causal, inside the window, and no padding. In a cache (`offset` tokens so far) no key after a query is real."""
    if bidirectional:
        mask = None if window is None else layers.WindowMask(left=window - 1, right=window - 1)
    else:
        mask = layers.CausalMask(offset=offset)
        if window is not None:
            mask = mask & layers.WindowMask(left=window - 1, offset=offset)
    if present is None or offset is not None:
        return mask
    return layers.KeyMask(present) if mask is None else mask & layers.KeyMask(present)


def settled(grown: CacheT, before: CacheT, present: Bool[Array, "B L"] | None) -> CacheT:
    """The extended cache without the padding at the end of the new tokens: the next ones are written over it."""
    if present is None:
        return grown
    return grown._replace(length=before.length + jnp.sum(present, axis=-1, dtype=before.length.dtype))


def runs(count: int, kind: Callable[[int], Any], hook: AttentionHook = plain_attention) -> Iterator[tuple[int, int]]:
    """(first, number) of layers of one kind after one another, one by one where a hook may tell them apart."""
    first = 0
    for index in range(1, count + 1):
        alike = index < count and hook is plain_attention and kind(index) == kind(first)
        if not alike:
            yield first, index - first
            first = index


def empty_cache(num_layers: int, key_heads: int, head_dim: int, *, batch_size: int, capacity: int, dtype: Any) -> Cache:
    """Room for `capacity` tokens a row in every layer."""
    make = partial(layers.empty_cache, batch_size, capacity, key_heads, head_dim, dtype=jnp.dtype(dtype))
    return tuple(make() for _ in range(num_layers))
