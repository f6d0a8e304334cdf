"""Mamba, Falcon Mamba and Mamba-2: state spaces in place of attention, one block a layer and no MLP.

Official code: huggingface/transformers@5.23.0 (Apache-2.0), models/{mamba,falcon_mamba,mamba2}.
Papers: Mamba arXiv:2312.00752, Falcon Mamba arXiv:2410.05355, Mamba-2 arXiv:2405.21060.
The cache of decoding does not grow with the text: a layer remembers a few inputs and its state.
Differs from the official code: padding at the end leaves no trace in the cache, so that rows of different lengths go on
side by side. Its `rms_norm` and `chunk_size` of Mamba-2 have no effect on what is computed, there or here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zoo.backbone import Backbone
from zoo.backbones import causal
from zoo.backbones.hooks import show
from zoo.backbones.naming import activation_from_hub, activation_to_hub, end_tokens_from_hub, end_tokens_to_hub
from zoo.blocks import Mamba, Mamba2, MambaState, RMSNorm, stack
from zoo.blocks.mamba import mamba, mamba2
from zoo.paper import Official
from zoo.weights.table import Table, layer_norm, linear, parameter, shared

__all__ = ["BACKBONES", "Config", "Model"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    family: str  # mamba | falcon_mamba | mamba2: whose block, names and settings the weights have
    vocab_size: int = 64
    hidden_size: int = 16  # width of a token
    inner_size: int = 32  # width inside a block
    state_size: int = 6  # states of a channel
    num_layers: int = 2
    conv_width: int = 4  # taps of the convolution
    step_rank: int = 3  # mamba, falcon_mamba: width of what the time steps are computed from
    num_heads: int = 4  # mamba2: a divisor of inner_size
    num_groups: int = 1  # mamba2: of heads with the same maps into and out of the state, a divisor of num_heads
    step_limits: tuple[float, float] = (0.0, math.inf)  # mamba2: time steps are cut to this range
    map_norm_epsilon: float = 1e-6  # falcon_mamba: of the norms of the maps and of what the steps are computed from
    activation: str = "silu"
    norm_epsilon: float = 1e-5  # added to the mean square under the root
    use_bias: bool = False  # of the projections into and out of a block
    conv_bias: bool = True
    wide_residual: bool = True  # what passes from layer to layer is float32, whatever the weights are
    tie_embeddings: bool = True  # the output layer is the embedding
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()  # tokens that end a generated text

    def __post_init__(self):
        if self.inner_size % self.num_heads:
            raise ValueError(f"inner_size {self.inner_size} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_groups:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_groups {self.num_groups}")

    def mixer(self, name: str) -> nn.Module:
        """The block of a layer."""
        shared = {
            "state_size": self.state_size, "conv_width": self.conv_width, "inner_size": self.inner_size,
            "use_bias": self.use_bias, "conv_bias": self.conv_bias, "activation": self.activation, "name": name,
        }  # fmt: skip
        if self.family == "mamba2":
            return Mamba2(
                num_heads=self.num_heads,
                num_groups=self.num_groups,
                step_limits=self.step_limits,
                norm_epsilon=self.norm_epsilon,
                **shared,
            )
        normed = self.map_norm_epsilon if self.family == "falcon_mamba" else None
        return Mamba(step_rank=self.step_rank, norm_epsilon=normed, **shared)


class MambaLayer(nn.Module):
    """x + block(norm(x)); with a state it gives back the state as well."""

    config: Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        present: Bool[Array, "B L"] | None,
        dtype: Any,
        state: MambaState | None = None,
    ):
        c = self.config
        show(self, "hidden_states", "input", x)
        normed = RMSNorm(c.norm_epsilon, name="norm")(x).astype(dtype)
        y, new_state = c.mixer("mixer")(normed, state, present=present, return_state=True)
        x = x + y.astype(x.dtype)
        return x if state is None else (x, new_state)


class Model(nn.Module):
    """Tokens to logits. `cache` makes it a step of decoding: see `zoo.backbones.generation`."""

    config: Config

    def setup(self):
        self.embedding = nn.Embed(self.config.vocab_size, self.config.hidden_size)

    def embed(self, input_ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """What enters the first layer, for callers that put other things between the tokens."""
        return self.embedding(input_ids)

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B L"] | None = None,
        *,
        embeddings: Float[Array, "B L D"] | None = None,
        attention_mask: Int[Array, "B L"] | Bool[Array, "B L"] | None = None,
        cache: causal.Cache | None = None,
        logits_at: Int[Array, " B"] | None = None,
    ) -> causal.Output:
        """`attention_mask` is 1 at real tokens; without a cache padding may be on either side, with one it is at the
        end. `embeddings` stand in for `input_ids`. `logits_at` gives the logits of one place a row only, (B, 1, V).
        """
        c = self.config
        x = self.embed(input_ids) if embeddings is None else embeddings
        dtype, present = x.dtype, None if attention_mask is None else attention_mask.astype(bool)
        x = x.astype(jnp.float32) if c.wide_residual else x
        if cache is None:
            x = stack(self, partial(MambaLayer, c), c.num_layers, x, present=present, dtype=dtype)
        else:
            states = []
            for index, state in enumerate(cache):
                layer = MambaLayer(c, name=f"layers_{index}")
                x, state = layer(x, present=present, dtype=dtype, state=state)
                states.append(state)
            cache = tuple(states)
        x = RMSNorm(c.norm_epsilon, name="norm")(x).astype(dtype)
        show(self, "hidden_states", "last", x)
        logits = causal.read_out(x, self.embedding if c.tie_embeddings else None, c.vocab_size, logits_at)
        return causal.Output(logits, x, cache)


def empty_cache(config: Config, batch_size: int, capacity: int, dtype: Any) -> causal.Cache:
    """The state before the first token: of one size, whatever the capacity."""
    c = config
    if c.family == "mamba2":
        width = c.inner_size + 2 * c.num_groups * c.state_size
        hidden = (c.num_heads, c.state_size, c.inner_size // c.num_heads)
    else:
        width, hidden = c.inner_size, (c.inner_size, c.state_size)
    return tuple(
        MambaState(jnp.zeros((batch_size, c.conv_width - 1, width), dtype), jnp.zeros((batch_size, *hidden)))
        for _ in range(c.num_layers)
    )


def example(config: Config, *, batch_size: int, key: jax.Array, length: int = 8) -> dict[str, jax.Array]:
    return {"input_ids": jax.random.randint(key, (batch_size, length), 0, config.vocab_size)}


# --- the official code ---------------------------------------------------------------------------------------------

_FIELDS = {  # theirs -> (ours, their default), the same in all families
    "vocab_size": ("vocab_size", 50280),
    "hidden_size": ("hidden_size", 768),
    "state_size": ("state_size", 16),
    "num_hidden_layers": ("num_layers", 32),
    "conv_kernel": ("conv_width", 4),
    "layer_norm_epsilon": ("norm_epsilon", 1e-5),
    "use_bias": ("use_bias", False),
    "use_conv_bias": ("conv_bias", True),
    "residual_in_fp32": ("wide_residual", True),
    "tie_word_embeddings": ("tie_embeddings", True),
    "pad_token_id": ("pad_token_id", 0),
    "bos_token_id": ("bos_token_id", 0),
}

_DEFAULTS = {
    "mamba2": {
        "vocab_size": 32768, "hidden_size": 4096, "state_size": 128, "num_hidden_layers": 64,
        "tie_word_embeddings": False, "pad_token_id": 1, "eos_token_id": 2,
    }
}  # fmt: skip


def config_from_official(family: str, hparams: Mapping[str, Any]) -> Config:
    h = _DEFAULTS.get(family, {}) | dict(hparams)
    values = {ours: h.get(theirs, default) for theirs, (ours, default) in _FIELDS.items()}
    # Some settings state the product and an expand that is not its factor.
    inner = h.get("intermediate_size") or int(h.get("expand", 2) * values["hidden_size"])
    rank = h.get("time_step_rank", "auto")
    if family == "mamba2":
        heads, head_dim = h.get("num_heads", 128), h.get("head_dim", 64)
        if heads * head_dim != inner:
            raise ValueError(f"num_heads {heads} of head_dim {head_dim} are not the inner width {inner}")
        limits = h.get("time_step_limit", (0.0, math.inf))
        values |= {"num_heads": heads, "num_groups": h.get("n_groups", 8), "step_limits": tuple(map(float, limits))}
    else:
        values |= {
            "step_rank": -(-values["hidden_size"] // 16) if rank == "auto" else rank,
            "num_heads": 1,
            "map_norm_epsilon": h.get("mixer_rms_eps", 1e-6),
        }
    return Config(
        family=family,
        inner_size=inner,
        activation=activation_from_hub(h.get("hidden_act", "silu")),
        eos_token_id=end_tokens_from_hub(h.get("eos_token_id", 0)),
        **values,
    )


def config_to_official(c: Config) -> dict[str, Any]:
    h: dict[str, Any] = {theirs: getattr(c, ours) for theirs, (ours, _) in _FIELDS.items()}
    expand = c.inner_size / c.hidden_size
    h |= {
        "intermediate_size": c.inner_size,
        "expand": int(expand) if expand == int(expand) else expand,
        "hidden_act": activation_to_hub(c.activation),
        "eos_token_id": end_tokens_to_hub(c.eos_token_id),
    }
    if c.family == "mamba2":
        return h | {
            "num_heads": c.num_heads,
            "head_dim": c.inner_size // c.num_heads,
            "n_groups": c.num_groups,
            "time_step_limit": list(c.step_limits),
        }
    h["time_step_rank"] = c.step_rank
    return h | {"mixer_rms_eps": c.map_norm_epsilon} if c.family == "falcon_mamba" else h


def official_table(c: Config) -> Table:
    embedding = "backbone.embeddings.weight", "embedding/embedding"
    if c.tie_embeddings:
        yield from shared((embedding[0], "lm_head.weight"), embedding[1])
    else:
        yield from parameter(*embedding)
        yield from linear("lm_head", "head", bias=False)
    block = mamba2 if c.family == "mamba2" else mamba
    for i in range(c.num_layers):
        theirs, ours = f"backbone.layers.{i}", f"layers_{i}"
        yield from layer_norm(f"{theirs}.norm", f"{ours}/norm", bias=False)
        yield from block(f"{theirs}.mixer", f"{ours}/mixer", bias=c.use_bias, conv_bias=c.conv_bias)
    yield from layer_norm("backbone.norm_f", "norm", bias=False)


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {"logits": model.apply(variables, inputs["input_ids"], attention_mask=inputs.get("attention_mask")).logits}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------


def _mamba(hidden: int, depth: int) -> Config:
    return config_from_official("mamba", {"hidden_size": hidden, "num_hidden_layers": depth})


def _mamba2(hidden: int, depth: int) -> Config:
    return config_from_official(
        "mamba2",
        {
            "vocab_size": 50288, "hidden_size": hidden, "num_hidden_layers": depth, "num_heads": hidden // 32,
            "n_groups": 1, "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 0,
        },
    )  # fmt: skip


_CONFIGS: dict[str, dict[str, Config]] = {
    "mamba": {
        "tiny": Config("mamba", num_heads=1, eos_token_id=(0,)),
        "mamba-130m-hf": _mamba(768, 24),
        "mamba-370m-hf": _mamba(1024, 48),
        "mamba-790m-hf": _mamba(1536, 48),
        "mamba-1.4b-hf": _mamba(2048, 48),
        "mamba-2.8b-hf": _mamba(2560, 64),
    },
    "falcon_mamba": {
        "tiny": Config("falcon_mamba", num_heads=1, use_bias=True, tie_embeddings=False, eos_token_id=(0,)),
        "falcon-mamba-7b": config_from_official(
            "falcon_mamba",
            {
                "vocab_size": 65024, "hidden_size": 4096, "num_hidden_layers": 64, "time_step_rank": 256,
                "intermediate_size": 8192, "tie_word_embeddings": False, "pad_token_id": 11, "eos_token_id": 11,
            },
        ),
    },
    "mamba2": {
        "tiny": Config("mamba2", num_groups=2, step_limits=(0.05, 0.6), tie_embeddings=False, eos_token_id=(0,)),
        "mamba2-130m-hf": _mamba2(768, 24),
        "mamba2-2.7b-hf": _mamba2(2560, 64),
        "Mamba-Codestral-7B-v0.1": config_from_official("mamba2", {}),
    },
}  # fmt: skip

_COUNTS = {  # of the published checkpoints
    "mamba": {"mamba-130m-hf": 129_135_360},
    "falcon_mamba": {"falcon-mamba-7b": 7_272_665_088},
    "mamba2": {"mamba2-130m-hf": 128_989_632, "Mamba-Codestral-7B-v0.1": 7_285_403_648},
}

BACKBONES = {
    family: Backbone(
        name=family,
        model=Model,
        configs=_CONFIGS[family],
        example=example,
        cache=empty_cache,
        parameter_counts=_COUNTS[family],
        officials=(
            Official(
                module=f"models/{family}/modeling_{family}.py:{name}ForCausalLM (slow path)",
                config=partial(config_from_official, family),
                hparams=config_to_official,
                table=official_table,
                call=official_call,
            ),
        ),
    )
    for family, name in {"mamba": "Mamba", "falcon_mamba": "FalconMamba", "mamba2": "Mamba2"}.items()
}
