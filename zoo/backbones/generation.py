"""Text, token by token: one compiled loop for every backbone and paper with a cache.

The contract. `start(config, batch_size, capacity)` of a backbone or paper is an empty cache, a pytree of arrays.
`model.apply(variables, prompt(ids), attention_mask=, cache=, logits_at=)` gives an output with `logits` and the
extended `cache`; nothing else is kept anywhere. Padding of such a call stands at the end of a row and leaves no trace
in the cache, so that rows of different lengths go on side by side. L tokens in one call equal L calls of one token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zoo.errors import UserError
from zoo.registry import record_of

__all__ = ["Generation", "generate", "left_align", "sample"]


class Generation(NamedTuple):
    tokens: Int[Array, "B N"]  # the new tokens only; padding after a row's end
    lengths: Int[Array, " B"]  # how many of them each row has, the one that ended it among them


@dataclass(frozen=True)
class _Settings:
    """What the loop is compiled for."""

    max_new_tokens: int
    greedy: bool
    top_k: int | None
    nucleus: bool
    eos: tuple[int, ...]
    pad: int


def generate(
    model: nn.Module,
    variables: Mapping[str, Any],
    input_ids: Any,
    *,
    attention_mask: Any = None,
    max_new_tokens: int,
    key: jax.Array | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | tuple[int, ...] | None = None,
    pad_token_id: int = 0,
    inputs: Mapping[str, Any] | None = None,
) -> Generation:
    """Up to `max_new_tokens` tokens after each row of `input_ids` (B, L).

    Rows may be padded on either side, where `attention_mask` is 0. Temperature 0 takes the likeliest token; otherwise
    tokens are drawn with `key`, from the `top_k` likeliest, and of these from the fewest that have probability `top_p`
    together. A row ends with one of `eos_token_id` (None: the model's own; (): never). `inputs` are further arguments
    of the model's first call, such as images. Compiled once for each shape and choice of options.
    """
    ids = jnp.asarray(input_ids)
    mask = jnp.ones(ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
    if ids.ndim != 2 or mask.shape != ids.shape or not ids.size:
        raise UserError(
            f"generate wants input_ids (batch, length) and a mask of that shape, got {ids.shape}, {mask.shape}"
        )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens} should be at least 1")
    if temperature < 0 or (temperature > 0 and key is None):
        raise UserError(f"temperature {temperature} should be 0, or positive together with a key: jax.random.key(0)")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p} should be above 0 and at most 1")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k} should be at least 1")
    eos = getattr(model.config, "eos_token_id", ()) if eos_token_id is None else eos_token_id
    settings = _Settings(
        max_new_tokens=max_new_tokens,
        greedy=temperature == 0,
        top_k=top_k,
        nucleus=top_p is not None,
        eos=tuple(eos) if isinstance(eos, tuple) else (eos,),
        pad=pad_token_id,
    )
    return _generate(
        model,
        settings,
        dict(variables),
        ids,
        mask,
        jax.random.key(0) if key is None else key,
        jnp.float32(temperature),
        jnp.float32(1.0 if top_p is None else top_p),
        dict(inputs or {}),
    )


@partial(jax.jit, static_argnames=("model", "settings"))
def _generate(model, settings, variables, ids, mask, key, temperature, top_p, inputs) -> Generation:
    s, batch = settings, ids.shape[0]
    ids, present = left_align(ids, mask)
    # Keys and values have the type of the projections; norms may be wider.
    largest = max((x for x in jax.tree.leaves(variables) if jnp.issubdtype(x.dtype, jnp.floating)), key=jnp.size)
    record = record_of(model)
    cache = record.start(model.config, batch, ids.shape[1] + s.max_new_tokens, largest.dtype)
    last = jnp.maximum(jnp.sum(present, axis=-1) - 1, 0)
    output = model.apply(variables, record.prompt(ids), attention_mask=present, cache=cache, logits_at=last, **inputs)

    def draw(logits, step, done):
        token = sample(
            logits[:, -1], jax.random.fold_in(key, step), temperature=None if s.greedy else temperature, top_k=s.top_k,
            top_p=top_p if s.nucleus else None,
        )  # fmt: skip
        token = jnp.where(done, s.pad, token).astype(ids.dtype)
        return token, done | jnp.isin(token, jnp.asarray(s.eos, ids.dtype))

    def step(state):
        i, token, done, tokens, cache = state
        output = model.apply(variables, record.prompt(token[:, None]), attention_mask=~done[:, None], cache=cache)
        token, now_done = draw(output.logits, i, done)
        return i + 1, token, now_done, tokens.at[:, i].set(token), output.cache

    token, done = draw(output.logits, 0, jnp.zeros(batch, bool))
    tokens = jnp.full((batch, s.max_new_tokens), s.pad, ids.dtype).at[:, 0].set(token)
    *_, tokens, _ = jax.lax.while_loop(
        lambda state: (state[0] < s.max_new_tokens) & ~jnp.all(state[2]),
        step,
        (jnp.int32(1), token, done, tokens, output.cache),
    )
    ends = jnp.isin(tokens, jnp.asarray(s.eos, ids.dtype))
    lengths = jnp.where(jnp.any(ends, axis=-1), jnp.argmax(ends, axis=-1) + 1, s.max_new_tokens)
    return Generation(tokens, lengths)


def left_align(ids: Int[Array, "B L"], present: Bool[Array, "B L"]) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """The real tokens of each row first, in their order, padding after them; also the mask of the result."""
    order = jnp.argsort(~present, axis=-1, stable=True)
    return jnp.take_along_axis(ids, order, axis=-1), jnp.take_along_axis(present, order, axis=-1)


def sample(
    logits: Float[Array, "B V"],
    key: jax.Array,
    *,
    temperature: Float[Array, ""] | float | None = None,
    top_k: int | None = None,
    top_p: Float[Array, ""] | float | None = None,
) -> Int[Array, " B"]:
    """One token a row: the likeliest without a temperature, otherwise drawn from softmax(logits / temperature), cut to
    the `top_k` likeliest and then to the fewest whose probabilities add up to `top_p`."""
    if temperature is None:
        return jnp.argmax(logits, axis=-1)
    logits = logits.astype(jnp.float32) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = -jnp.sort(-logits, axis=-1)
        shares = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1)
