"""Cubit: Token Mixer with Kernel Ridge Regression (arXiv:2605.06501).

No official code. Fidelity: the paper's formulas and the sizes of a public reproduction.
New: softmax attention averages values by a kernel, which is Nadaraya-Watson regression; Cubit puts kernel ridge
regression in its place. Values are first de-correlated by the inverse of a kernel among tokens ("references", a fourth
projection), causal and hence triangular; a learned scale of each token's value keeps the solution small.
Differs: the paper's optimiser and sizes are not known; ours are named below. Decoding from a cache is ours.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import layers
from layers import KernelRidgeCache, KeyValueCache
from zoo.backbones import causal
from zoo.backbones.decoder import GatedMLP
from zoo.blocks import Linear, RMSNorm, stack
from zoo.paper import Paper
from zoo.tasks import language_modelling
from zoo.tasks.language_modelling import Output
from zoo.tasks.task import Batch

_NORMAL = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    vocabulary: int = 64  # V, tokens there are
    length: int = 128  # L, of the rows it is trained on; no limit of the code
    hidden_size: int = 64  # D, width of a token
    intermediate_size: int = 172  # width inside the MLP
    num_layers: int = 2  # of attention and MLP
    num_heads: int = 4  # H, all of keys and values too
    ridge_layers: tuple[int, int] | None = None  # [first, end) of the layers that are Cubit, None: all; others attend
    share_reference: bool = False  # references are the keys, without a projection of their own
    query_key_norm: Literal["none", "head", "width"] = "none"  # RMS norm of each head, or over all heads at once
    reference_scale: float = 1.0  # s at the start, a learned scalar a head
    log_ridge: float = -23.025850929940457  # log lambda at the start, learned a head: log 1e-10
    rescale_low: float = 0.5  # of the values' scale c at the start, learned a head
    rescale_range: float = 1.5  # c = low + range sigmoid(W_c x)
    rope_base: float = 10_000.0  # of the rotation's wavelengths
    window: int | None = None  # tokens a token sees, itself among them; both kernels'
    norm_epsilon: float = 1e-6  # added to the mean square under the root
    tie_embeddings: bool = False  # the output layer is the embedding
    eos_token_id: tuple[int, ...] = ()  # tokens that end a generated text

    def __post_init__(self):
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not twice a multiple of num_heads {self.num_heads}: widen it"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def is_ridge(self, layer: int) -> bool:
        first, end = self.ridge_layers or (0, self.num_layers)
        return first <= layer < end


class Mixer(nn.Module):
    """A S (K + lambda I)^-1 (c v): A is causal softmax attention, K that of references, c a token's scale.

    K_ij = softmax_{j <= i}(r_i . s r_j / |r_j|), not divided by sqrt(dim). Without `ridge`, plain attention. `cache`
    makes it a step of decoding.
    """

    config: Config
    ridge: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        angles: Float[Array, "*B L F"],
        mask: layers.Mask | None,
        cache: KernelRidgeCache | KeyValueCache | None,
    ) -> tuple[Float[Array, "B L D"], KernelRidgeCache | KeyValueCache | None]:
        c = self.config

        def heads(name: str, norm: str = "none") -> Float[Array, "B L H Dh"]:
            y = Linear(c.hidden_size, use_bias=False, kernel_init=_NORMAL, name=name)(x)
            if norm == "width":
                y = RMSNorm(c.norm_epsilon, name=f"{name}_norm")(y)
            y = y.reshape(*x.shape[:-1], c.num_heads, c.head_dim)
            return RMSNorm(c.norm_epsilon, name=f"{name}_norm")(y) if norm == "head" else y

        query, key = (heads(name, c.query_key_norm) for name in ("query", "key"))
        value = heads("value")
        query, key = (layers.apply_rope(head, angles) for head in (query, key))
        if not self.ridge:
            if cache is None:
                mixed = layers.dot_product_attention(query, key, value, mask=mask)
            else:
                mixed, cache = layers.decode_step(query, key, value, cache, mask=mask)
        else:
            # Keys stay short under a norm; a projection of its own, with unit variance, makes references long.
            reference = key if c.share_reference else layers.apply_rope(heads("reference"), angles)
            by_head = {
                name: self.param(name, nn.initializers.constant(start), (c.num_heads,)).astype(jnp.float32)
                for name, start in (
                    ("reference_scale", c.reference_scale), ("log_ridge", c.log_ridge),
                    ("rescale_low", c.rescale_low), ("rescale_range", c.rescale_range),
                )
            }  # fmt: skip
            gate = Linear(c.num_heads, use_bias=False, kernel_init=_NORMAL, name="rescale")(x).astype(jnp.float32)
            scale = by_head["rescale_low"] + by_head["rescale_range"] * jax.nn.sigmoid(gate)
            self.sow("intermediates", "scale", scale)
            value = (scale[..., None] * value).astype(x.dtype)
            options = {"ridge": jnp.exp(by_head["log_ridge"]), "reference_scale": by_head["reference_scale"]}
            if cache is None:
                mixed = layers.kernel_ridge_attention(query, key, value, reference, mask=mask, **options)
            else:
                mixed, cache = layers.kernel_ridge_step(query, key, value, reference, cache, mask=mask, **options)
        return Linear(c.hidden_size, use_bias=False, kernel_init=_NORMAL, name="out")(mixed.reshape(x.shape)), cache


class Layer(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)); with a cache it gives back the cache as well."""

    config: Config
    ridge: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], *, angles, mask, cache=None):
        c = self.config
        mixer = Mixer(c, self.ridge, name="mixer")
        mixed, grown = mixer(RMSNorm(c.norm_epsilon, name="mixer_norm")(x), angles, mask, cache)
        x = x + mixed
        x = x + GatedMLP(c.intermediate_size, name="mlp")(RMSNorm(c.norm_epsilon, name="mlp_norm")(x))
        return x if cache is None else (x, grown)


class Model(nn.Module):
    """Tokens to logits; `zoo.backbones.generation.generate` writes with it.

    `cache`, `attention_mask` (padding, at the end of a step) and `logits_at` (one place a row) are of decoding.
    """

    config: Config

    @nn.compact
    def __call__(
        self,
        batch: Batch,
        *,
        train: bool = False,
        attention_mask: Array | None = None,
        cache: causal.Cache | None = None,
        logits_at: Int[Array, " B"] | None = None,
    ) -> Output:
        c, tokens = self.config, batch["tokens"]
        embedding = nn.Embed(c.vocabulary, c.hidden_size, name="embedding")
        present = None if attention_mask is None else attention_mask.astype(bool)
        offset = None if cache is None else cache[0].length
        positions, _ = causal.padding_positions(tokens.shape, present, batch.get("positions"), offset)
        angles = layers.rope_angles(positions, layers.rope_frequencies(c.head_dim, base=c.rope_base))
        mask = causal.visible_keys(present, offset, window=c.window)
        if "segments" in batch:
            segments = batch["segments"]
            mask = mask & layers.SegmentMask(segments, segments) & layers.KeyMask(segments > 0)
        x = embedding(tokens)
        if cache is None:
            for first, count in causal.runs(c.num_layers, c.is_ridge):
                x = stack(self, partial(Layer, c, c.is_ridge(first)), count, x, first=first, angles=angles, mask=mask)
        else:
            extended = []
            for i, before in enumerate(cache):
                x, grown = Layer(c, c.is_ridge(i), name=f"layers_{i}")(x, angles=angles, mask=mask, cache=before)
                extended.append(causal.settled(grown, before, present))
            cache = tuple(extended)
        x = RMSNorm(c.norm_epsilon, name="norm")(x)
        return Output(causal.read_out(x, embedding if c.tie_embeddings else None, c.vocabulary, logits_at), cache)


def empty_cache(config: Config, batch_size: int, capacity: int, dtype: Any) -> causal.Cache:
    """Room for `capacity` tokens a row."""
    size = batch_size, capacity, config.num_heads, config.head_dim
    make = {True: layers.empty_kernel_ridge_cache, False: layers.empty_cache}
    return tuple(make[config.is_ridge(i)](*size, dtype=jnp.dtype(dtype)) for i in range(config.num_layers))


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return language_modelling.example(
        length=config.length, vocabulary=config.vocabulary, batch_size=batch_size, key=key
    )


_SHAKESPEARE = Config(vocabulary=65, length=128, hidden_size=128, intermediate_size=344, num_layers=4)
_SMALL = Config(
    vocabulary=50_304, length=1024, hidden_size=768, intermediate_size=2048, num_layers=12, num_heads=12,
    tie_embeddings=True,
)  # fmt: skip
_MEDIUM = Config(
    vocabulary=50_304, length=1024, hidden_size=1024, intermediate_size=2816, num_layers=24, num_heads=16,
    tie_embeddings=True,
)  # fmt: skip
_OLMO = {
    "vocabulary": 100_352, "length": 2048, "hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16,
    "num_heads": 16, "query_key_norm": "width", "rope_base": 500_000.0,
}  # fmt: skip

PAPER = Paper(
    slug="cubit",
    task=language_modelling.TASK,
    model=Model,
    example=example,
    cache=empty_cache,
    configs={
        "tiny": Config(vocabulary=16, length=64),
        "tiny_transformer": Config(vocabulary=16, length=64, ridge_layers=(0, 0)),
        "shakespeare": _SHAKESPEARE,
        "captions": Config(vocabulary=256, length=256, hidden_size=128, intermediate_size=344, num_layers=4),
        "125m": _SMALL,
        "350m": _MEDIUM,
        "olmo3_1b": Config(**_OLMO),
        "olmo3_1b_shared": Config(**_OLMO, share_reference=True),
        "olmo3_1b_transformer": Config(**_OLMO, ridge_layers=(0, 0)),
    },
    parameter_counts={
        "olmo3_1b": 1_552_550_912, "olmo3_1b_shared": 1_485_442_048, "olmo3_1b_transformer": 1_484_916_736,
    },
    quirks=(
        "the scale of values has no bias: the reproduction's count of parameters leaves no room for one",
        "a diagonal of the kernel near 1/t lets values grow like t: references must not be short",
    ),
)  # fmt: skip
