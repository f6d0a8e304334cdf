"""The fused attention kernels that come with JAX and tokamax, behind one signature: what each can take, and the call.

A kernel takes a mask apart into what it computes by itself (a band around the diagonal, segments, lengths) and is given
a table for the rest, or refuses.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layers.masks import CausalMask, FullMask, KeyMask, LengthMask, Mask, SegmentMask, WindowMask, conjuncts

__all__ = ["KERNELS", "Request", "obstacles", "run"]


@dataclass
class Request:
    """One call of `dot_product_attention`, in terms that every kernel understands."""

    query: Float[Array, "B Lq H D"]
    key: Float[Array, "B Lk K D"]
    value: Float[Array, "B Lk K Dv"]
    bias: Float[Array, "b h q k"] | None
    mask: Mask | None
    sinks: Float[Array, " H"] | None
    scale: float
    soft_cap: float | None
    parts: "_Parts" = field(init=False)

    def __post_init__(self):
        self.parts = _take_apart(self.mask)

    @property
    def lengths(self) -> tuple[int, int]:
        return self.query.shape[1], self.key.shape[1]

    def seen(self) -> Bool[Array, "b Lq h 1"]:
        """Which queries see any key."""
        return jnp.moveaxis(jnp.any(self.mask.materialize(*self.lengths), axis=-1), 1, 2)[..., None]


class _Parts(NamedTuple):
    """A conjunction of masks: -left <= key - query - shift <= right, segments, present keys, and names of the rest."""

    left: int | None
    right: int | None
    segments: SegmentMask | None
    lengths: Int[Array, " B"] | None
    present: Bool[Array, "B Lk"] | None
    other: tuple[str, ...]


def _take_apart(mask: Mask | None) -> _Parts:
    parts = _Parts(None, None, None, None, None, ())

    def least(a, b):
        return b if a is None else a if b is None else min(a, b)

    for part in () if mask is None else conjuncts(mask):
        if isinstance(part, CausalMask) and part.offset is None:
            parts = parts._replace(right=least(parts.right, 0))
        elif isinstance(part, WindowMask) and part.offset is None:
            parts = parts._replace(left=least(parts.left, part.left), right=least(parts.right, part.right))
        elif isinstance(part, SegmentMask) and parts.segments is None:
            parts = parts._replace(segments=part)
        elif isinstance(part, LengthMask) and parts.lengths is None:
            parts = parts._replace(lengths=part.lengths)
        elif isinstance(part, KeyMask) and parts.present is None:
            parts = parts._replace(present=part.present)
        elif not isinstance(part, FullMask):
            parts = parts._replace(other=(*parts.other, type(part).__name__.strip("_")))
    return parts


def _narrow(request: Request) -> str | None:
    if request.query.dtype not in (jnp.float16, jnp.bfloat16):
        return f"dtype {request.query.dtype}, only float16 and bfloat16"
    return None


def _same_width(request: Request) -> str | None:
    query_width, value_width = request.query.shape[-1], request.value.shape[-1]
    if query_width != value_width:
        return f"value heads of another width ({value_width}) than query heads ({query_width})"
    return None


def _no_option(request: Request, *names: str) -> str | None:
    asked = [name for name in names if getattr(request, name) is not None]
    return ", ".join(asked) or None


# ---- cuDNN, NVIDIA GPUs ----------------------------------------------------------------------------------------------


def _cudnn_obstacles(request: Request):
    width = request.query.shape[-1]
    yield _no_option(request, "soft_cap", "sinks")
    yield _narrow(request)
    yield _same_width(request)
    if width % 8 or width > 128:
        yield f"head width {width}, only multiples of 8 up to 128"


def _cudnn(request: Request) -> Float[Array, "B Lq H Dv"]:
    query, parts = request.query, request.parts
    attention = partial(
        jax.nn.dot_product_attention, query, request.key, request.value, scale=request.scale, implementation="cudnn"
    )
    bias = None if request.bias is None else request.bias.astype(query.dtype)
    square = request.lengths[0] == request.lengths[1]
    if parts.segments is None and parts.present is None and not parts.other and (square or parts.right is None):
        lengths = None if parts.lengths is None else jnp.broadcast_to(parts.lengths, query.shape[:1]).astype(jnp.int32)
        options = {"key_value_seq_lengths": lengths, "is_causal": parts.right == 0}
        if parts.left is not None and parts.right == 0:
            options["local_window_size"] = parts.left, 0
        if (parts.left is None and parts.right is None) or parts.right == 0:
            output = attention(bias, **options)
            return output if lengths is None else jnp.where(lengths[:, None, None, None] > 0, output, 0)
    # The kernel averages the values where nothing is allowed.
    return jnp.where(request.seen(), attention(bias, request.mask.materialize(*request.lengths)), 0)


# ---- Pallas, TPUs ----------------------------------------------------------------------------------------------------


def _flash_tpu_obstacles(request: Request):
    parts, lengths = request.parts, request.lengths
    yield _no_option(request, "soft_cap", "sinks")
    if request.query.shape[2] != request.key.shape[2]:
        yield "grouped heads"
    yield _same_width(request)
    if lengths[0] % 128 or lengths[1] % 128:
        yield f"lengths {lengths[0]} and {lengths[1]}, only multiples of 128"
    causal = parts.right == 0 and parts.left is None
    if (
        parts.other
        or parts.lengths is not None
        or parts.present is not None
        or not (parts[:2] == (None, None) or causal)
    ):
        yield "masks other than CausalMask and SegmentMask"
    elif causal and lengths[0] != lengths[1]:
        yield f"CausalMask with {lengths[0]} queries and {lengths[1]} keys"


def _flash_tpu(request: Request) -> Float[Array, "B Lq H Dv"]:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    query, key, parts = request.query, request.key, request.parts
    segments = None
    if parts.segments is not None:
        segments = flash.SegmentIds(parts.segments.query_segments, parts.segments.key_segments)
    bias = request.bias
    if bias is not None:
        # The kernel scales the sum of product and bias.
        shape = query.shape[0], query.shape[2], query.shape[1], key.shape[1]
        bias = jnp.broadcast_to(bias.astype(jnp.float32) / request.scale, shape)
    output = flash.flash_attention(
        *(jnp.moveaxis(x, 2, 1) for x in (query, key, request.value)), bias, segments,
        causal=parts.right == 0, sm_scale=request.scale,
    )  # fmt: skip
    output = jnp.moveaxis(output, 1, 2)
    return output if parts.segments is None else jnp.where(request.seen(), output, 0)


# Queries and keys of a block, at most: near the best on v5e and v6e for head widths of 64 to 256.
_SPLASH_BLOCK = 512


def _splash_tpu_obstacles(request: Request):
    yield _no_option(request, "bias")
    if request.parts.other:
        yield f"{', '.join(request.parts.other)}, only bands, segments, lengths and key masks joined by &"


@lru_cache(maxsize=64)
def _splash_kernel(heads: int, lengths: tuple[int, int], left, right, shift: int, soft_cap, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def block(length):
        return max(size for size in (128, 256, _SPLASH_BLOCK) if length % size == 0)

    if left is None and right is None:
        mask = splash.FullMask(lengths)
    elif left is None and right == 0:
        mask = splash.CausalMask(lengths, shift)
    else:
        mask = splash.LocalMask(lengths, (left, right), shift)
    q, kv = map(block, lengths)
    sizes = splash.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv, block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip
    # The kernel's tables of blocks must not be traced into whichever function is compiled first.
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(
            mask=splash.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
            attn_logits_soft_cap=soft_cap, interpret=interpret,
        )  # fmt: skip


def _splash_tpu(request: Request, interpret: bool = False) -> Float[Array, "B Lq H Dv"]:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    parts, (query_length, key_length) = request.parts, request.lengths
    batch = request.query.shape[0]
    query, key, value = (
        jnp.pad(jnp.moveaxis(x, 2, 1), ((0, 0), (0, 0), (0, -x.shape[1] % 128), (0, 0)))
        for x in (request.query * request.scale, request.key, request.value)
    )
    query_ids = key_ids = None
    if parts.segments is not None or parts.lengths is not None or parts.present is not None or key_length % 128:
        query_ids, key_ids = jnp.zeros((batch, query_length), int), jnp.zeros((batch, key_length), int)
        if parts.segments is not None:
            query_ids = jnp.broadcast_to(parts.segments.query_segments, query_ids.shape)
            key_ids = jnp.broadcast_to(parts.segments.key_segments, key_ids.shape)
        absent = jnp.min(query_ids) - 1
        if parts.lengths is not None:
            key_ids = jnp.where(jnp.arange(key_length) < parts.lengths[:, None], key_ids, absent)
        if parts.present is not None:
            key_ids = jnp.where(parts.present, key_ids, absent)
        query_ids = jnp.pad(query_ids, ((0, 0), (0, query.shape[2] - query_length)))
        key_ids = jnp.concatenate([key_ids, jnp.broadcast_to(absent, (batch, key.shape[2] - key_length))], axis=1)
    kernel = _splash_kernel(
        query.shape[1], (query.shape[2], key.shape[2]), parts.left, parts.right, key_length - query_length,
        request.soft_cap, interpret,
    )  # fmt: skip

    def one(query, key, value, query_ids, key_ids):
        segments = None if query_ids is None else splash.SegmentIds(query_ids, key_ids)
        return kernel(query, key, value, segments, request.sinks)

    output = jax.vmap(one)(query, key, value, query_ids, key_ids)
    output = jnp.moveaxis(output[:, :, :query_length], 1, 2)
    return output if request.mask is None else jnp.where(request.seen(), output, 0)


# ---- tokamax ---------------------------------------------------------------------------------------------------------


def _tokamax_obstacles(request: Request):
    yield _no_option(request, "sinks")
    if request.soft_cap is not None and request.bias is not None:
        yield "soft_cap beside a bias, which it adds before the cap"
    try:
        import tokamax  # noqa: F401
    except ImportError:
        yield "a machine without tokamax (pip install tokamax)"


def _tokamax(request: Request) -> Float[Array, "B Lq H Dv"]:
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():
        # It reads absl flags, and would parse the command line of whichever program this is.
        flags.FLAGS.mark_as_parsed()
    parts, (query_length, key_length) = request.parts, request.lengths
    attention = partial(
        tokamax.dot_product_attention, request.query, request.key, request.value, request.bias, scale=request.scale,
        logits_soft_cap=request.soft_cap,
    )  # fmt: skip
    mask = request.mask
    if mask is None:
        return attention()
    if query_length == key_length and parts[2:] == (None, None, None, ()) and parts[:2] == (None, 0):
        return attention(is_causal=True)
    return jnp.where(request.seen(), attention(mask=mask.materialize(query_length, key_length)), 0)


class _Kernel(NamedTuple):
    platform: str | None
    obstacles: Callable
    run: Callable


KERNELS = {
    "cudnn": _Kernel("gpu", _cudnn_obstacles, _cudnn),
    "flash_tpu": _Kernel(None, _flash_tpu_obstacles, _flash_tpu),
    "splash_tpu": _Kernel(None, _splash_tpu_obstacles, _splash_tpu),
    "tokamax": _Kernel(None, _tokamax_obstacles, _tokamax),
}


def obstacles(name: str, request: Request) -> list[str]:
    """Why the kernel cannot serve the request; nothing if it can."""
    kernel = KERNELS[name]
    found = [obstacle for obstacle in kernel.obstacles(request) if obstacle is not None]
    if kernel.platform not in (None, jax.default_backend()):
        found.append(f"platform {jax.default_backend()!r}, only {kernel.platform!r}")
    return found


def run(name: str, request: Request) -> Float[Array, "B Lq H Dv"]:
    """Attention by the kernel; ValueError where it cannot serve the request."""
    if found := obstacles(name, request):
        raise ValueError(f"dot_product_attention: implementation {name!r} does not support {'; '.join(found)}")
    return KERNELS[name].run(request).astype(request.value.dtype)
