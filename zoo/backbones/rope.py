"""Rotary positions as the hub's configurations describe them, and their angles."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
from jaxtyping import Array, Float, Int

import layers
from zoo.errors import UserError

__all__ = ["Rope", "rope_from_hub", "rope_to_hub", "rotary_angles"]

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class Rope:
    """Frequencies of the rotation. Fields that a kind does not use keep their defaults; the names are the hub's."""

    rope_type: str = "default"  # default | linear | dynamic | yarn | longrope | llama3
    rope_theta: float = 10000.0  # base of the geometric series of frequencies
    partial_rotary_factor: float = 1.0  # share of a head's channels that are rotated, the first ones
    factor: float = 1.0  # by how much the longest sequence outgrows the trained length
    original_max_position_embeddings: int = 0  # the trained length, in tokens
    attention_factor: float = 1.0  # what the rotated channels are multiplied by (yarn, longrope)
    beta_fast: float = 32.0  # yarn: channels with more turns in the trained length keep their frequency
    beta_slow: float = 1.0  # yarn: channels with fewer are interpolated
    truncate: bool = True  # yarn: the ramp between them begins and ends at whole channels
    low_freq_factor: float = 1.0  # llama3: as beta_slow
    high_freq_factor: float = 4.0  # llama3: as beta_fast
    short_factor: tuple[float, ...] = ()  # longrope: divisors of the frequencies up to the trained length
    long_factor: tuple[float, ...] = ()  # and of longer sequences


_USED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


def rope_from_hub(
    parameters: Mapping[str, Any], *, max_positions: int, theta: float = 10000.0, partial: float | None = None
) -> Rope:
    """From `rope_parameters` (or the older `rope_scaling`); `theta` and `partial` are for what it does not say."""
    given = {k: v for k, v in parameters.items() if v is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in KINDS:
        raise UserError(f"rope_type {kind!r} of these settings is not one of {', '.join(KINDS)}")
    values: dict[str, Any] = {
        "rope_type": kind,
        "rope_theta": float(given.get("rope_theta", theta)),
        "partial_rotary_factor": float(given.get("partial_rotary_factor", 1.0 if partial is None else partial)),
    }
    trained = int(given.get("original_max_position_embeddings", max_positions))
    if kind == "dynamic":
        trained = max_positions
    factor = float(given.get("factor", max_positions / trained))
    known = {f.name for f in fields(Rope)}
    for name in _USED[kind]:
        if name in given and name in known:
            values[name] = (
                tuple(map(float, given[name])) if name.endswith(("short_factor", "long_factor")) else given[name]
            )
    if kind != "default":
        values |= {"factor": factor, "original_max_position_embeddings": trained}
    if kind == "yarn" and "attention_factor" not in given:
        both = given.get("mscale") and given.get("mscale_all_dim")
        scales = {"scale": given["mscale"], "scale_all": given["mscale_all_dim"]} if both else {}
        values["attention_factor"] = layers.yarn_attention_factor(factor, **scales)
    if kind == "longrope" and "attention_factor" not in given:
        values["attention_factor"] = layers.longrope_attention_factor(factor, original_length=trained)
    return Rope(**values)


def rope_to_hub(rope: Rope) -> dict[str, Any]:
    """`rope_parameters`: what this kind uses."""
    values = {name: getattr(rope, name) for name in ("rope_type", "rope_theta", *_USED[rope.rope_type])}
    if rope.partial_rotary_factor != 1.0:
        values["partial_rotary_factor"] = rope.partial_rotary_factor
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def rotary_angles(
    rope: Rope, head_dim: int, positions: Int[Array, "B L"], lengths: Int[Array, " B"]
) -> Float[Array, "B L F"]:
    """The angles of these positions; `lengths` counts the tokens of each row, which two kinds of scaling depend on."""
    dim, theta = int(head_dim * rope.partial_rotary_factor), rope.rope_theta
    trained = rope.original_max_position_embeddings
    if rope.rope_type == "dynamic":
        frequencies = jax.vmap(
            lambda n: layers.dynamic_ntk_rope_frequencies(
                dim, n, original_length=trained, factor=rope.factor, base=theta
            )
        )(lengths)
    elif rope.rope_type == "longrope":
        short, long = jax.numpy.asarray(rope.short_factor), jax.numpy.asarray(rope.long_factor)
        frequencies = jax.vmap(
            lambda n: layers.longrope_frequencies(dim, n, short, long, original_length=trained, base=theta)
        )(lengths)
    elif rope.rope_type == "yarn":
        frequencies = layers.yarn_rope_frequencies(
            dim, factor=rope.factor, original_length=trained, base=theta, fast_turns=rope.beta_fast,
            slow_turns=rope.beta_slow, truncate=rope.truncate,
        )  # fmt: skip
    else:
        frequencies = layers.rope_frequencies(dim, base=theta)
        if rope.rope_type == "linear":
            frequencies = frequencies / rope.factor
        elif rope.rope_type == "llama3":
            frequencies = layers.llama3_rope_frequencies(
                frequencies, factor=rope.factor, low_factor=rope.low_freq_factor, high_factor=rope.high_freq_factor,
                original_length=trained,
            )  # fmt: skip
    if frequencies.ndim == 1:
        return layers.rope_angles(positions, frequencies)
    return jax.vmap(layers.rope_angles)(positions, frequencies)
