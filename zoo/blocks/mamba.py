"""Mamba blocks: a selective state space behind a short causal convolution, gated (arXiv:2312.00752, arXiv:2405.21060).

Both are causal, and all they know of the past is their state: a sequence can be cut anywhere, with the state that one
part returned passed to the next. `present` marks real tokens: padding on either side changes nothing else, and padding
at the end leaves no trace in the state.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

import layers
from zoo.blocks.basic import CausalConv, Linear, RMSNorm, activation_function, torch_uniform
from zoo.weights.table import Row, conv, layer_norm, linear, parameter

__all__ = ["Mamba", "Mamba2", "MambaState", "mamba", "mamba2"]


class MambaState(NamedTuple):
    """What a block remembers of the past: the last inputs of its convolution, and the states of its scan."""

    window: Float[Array, "B P E"]
    hidden: Float[Array, "B *S"]  # (E, N) of Mamba, (H, N, P) of Mamba-2


def step_bias_init(smallest: float, largest: float, floor: float) -> nn.initializers.Initializer:
    """softplus(bias) is log-uniform between the two, and at least `floor`."""

    def init(key, shape, dtype=jnp.float32):
        low, high = jnp.log(smallest), jnp.log(largest)
        steps = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), floor)
        return steps + jnp.log(-jnp.expm1(-steps))  # the inverse of softplus

    return init


def log_rates_init(key, shape, dtype=jnp.float32):
    """A = -(1..N) along the last axis: in every channel of Mamba (the real part of S4D's diagonal), by head in
    Mamba-2."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


def _normalized(x: Float[Array, "*B D"], epsilon: float) -> Float[Array, "*B D"]:
    """RMS norm without a learned scale."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


def _where(present: Bool[Array, "B L"] | None, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """x without padding: an input of 0 writes nothing, a step of 0 leaves the state as it is."""
    return x if present is None else jnp.where(present[..., None], x, 0)


class Mamba(nn.Module):
    """y = W_out (S6(x) SiLU(z)), with [x, z] = W_in u, x through a causal depthwise convolution and SiLU.

    The steps are softplus(W_dt d + b_dt), where [d, B, C] = W_x x.
    """

    state_size: int = 16  # N, states of a channel
    conv_width: int = 4  # taps of the convolution
    expand: int | float = 2  # inner width E, as a multiple of the block's
    inner_size: int | None = None  # E itself
    step_rank: int | None = None  # R, width of d; None: a sixteenth of the block's width, rounded up
    steps: tuple[float, float, float] = (1e-3, 0.1, 1e-4)  # smallest, largest and floor of the steps it starts with
    use_bias: bool = False  # of W_in and W_out
    conv_bias: bool = True
    activation: str = "silu"  # after the convolution and of the gate
    norm_epsilon: float | None = None  # d, B and C pass RMS norms without a scale (Falcon Mamba); None: they do not
    kernel_init: nn.initializers.Initializer | None = None  # of all projections, W_dt's bias then 0; None: Mamba's own
    conv_init: nn.initializers.Initializer | None = None  # of the convolution's taps; None: torch's

    @nn.compact
    def __call__(
        self,
        u: Float[Array, "B L D"],
        state: MambaState | None = None,
        *,
        present: Bool[Array, "B L"] | None = None,
        return_state: bool = False,
    ) -> Float[Array, "B L D"] | tuple[Float[Array, "B L D"], MambaState]:
        width = u.shape[-1]
        inner = self.inner_size or int(self.expand * width)
        rank = self.step_rank or -(-width // 16)
        window, hidden = state or (None, None)
        dense = partial(Linear, kernel_init=self.kernel_init)

        x, z = jnp.split(dense(2 * inner, use_bias=self.use_bias, name="in_proj")(u), 2, axis=-1)
        convolve = CausalConv(self.conv_width, self.activation, self.conv_bias, self.conv_init, name="conv1d")
        x, window = convolve(x, window, present)
        x = _where(present, x)
        maps = dense(rank + 2 * self.state_size, use_bias=False, name="x_proj")(x)
        maps = jnp.split(maps, (rank, rank + self.state_size), axis=-1)
        if self.norm_epsilon is not None:
            maps = [_normalized(m, self.norm_epsilon) for m in maps]
        start = self.kernel_init or torch_uniform(rank)
        bias = step_bias_init(*self.steps) if self.kernel_init is None else nn.initializers.zeros
        step = Linear(inner, kernel_init=start, bias_init=bias, name="dt_proj")(maps[0])
        step = jax.nn.softplus(step.astype(jnp.float32))
        log_rates = self.param("A_log", log_rates_init, (inner, self.state_size))
        y, hidden = layers.selective_scan(
            x,
            _where(present, step),
            -jnp.exp(log_rates.astype(jnp.float32)),
            *maps[1:],
            skip=self.param("D", nn.initializers.ones, (inner,)),
            initial_state=hidden,
            return_state=True,
        )
        gated = y * activation_function(self.activation)(z)
        y = dense(width, use_bias=self.use_bias, name="out_proj")(gated)
        return (y, MambaState(window, hidden)) if return_state else y


class Mamba2(nn.Module):
    """y = W_out RMSNorm(SSD(x, B, C) SiLU(z)), with [z, x, B, C, d] = W_in u and one decay and step for a whole head.

    x, B and C pass a causal depthwise convolution and SiLU; the steps are softplus(d + b_dt), cut to `step_limits`.
    """

    state_size: int = 128  # N, rows of a head's state
    num_heads: int = 8  # H, which share out the inner width
    num_groups: int = 1  # G, of neighbouring heads that share B and C
    conv_width: int = 4  # taps of the convolution
    expand: int | float = 2  # inner width E, as a multiple of the block's
    inner_size: int | None = None  # E itself
    steps: tuple[float, float, float] = (1e-3, 0.1, 1e-4)  # smallest, largest and floor of the steps it starts with
    step_limits: tuple[float, float] = (0.0, math.inf)
    use_bias: bool = False  # of W_in and W_out
    conv_bias: bool = True
    activation: str = "silu"  # after the convolution
    norm_epsilon: float = 1e-5  # of the norm, whose mean is over each group of heads

    @nn.compact
    def __call__(
        self,
        u: Float[Array, "B L D"],
        state: MambaState | None = None,
        *,
        present: Bool[Array, "B L"] | None = None,
        return_state: bool = False,
    ) -> Float[Array, "B L D"] | tuple[Float[Array, "B L D"], MambaState]:
        width, heads, groups = u.shape[-1], self.num_heads, self.num_groups
        inner, maps = self.inner_size or int(self.expand * width), groups * self.state_size
        window, hidden = state or (None, None)

        projected = Linear(2 * inner + 2 * maps + heads, use_bias=self.use_bias, name="in_proj")(u)
        z, x, step = jnp.split(projected, (inner, 2 * inner + 2 * maps), axis=-1)
        convolve = CausalConv(self.conv_width, self.activation, self.conv_bias, name="conv1d")
        x, window = convolve(x, window, present)
        x = _where(present, x)
        x, input_map, output_map = jnp.split(x, (inner, inner + maps), axis=-1)
        bias = self.param("dt_bias", step_bias_init(*self.steps), (heads,))
        step = jax.nn.softplus(step.astype(jnp.float32) + bias.astype(jnp.float32))
        step = jnp.clip(step, *self.step_limits)
        log_rates = self.param("A_log", log_rates_init, (heads,))
        y, hidden = layers.state_space_dual(
            x.reshape(*x.shape[:2], heads, -1),
            _where(present, step),
            -jnp.exp(log_rates.astype(jnp.float32)),
            *(m.reshape(*m.shape[:2], groups, -1) for m in (input_map, output_map)),
            skip=self.param("D", nn.initializers.ones, (heads,)),
            initial_state=hidden,
            return_state=True,
        )
        y = RMSNorm(self.norm_epsilon, groups=groups, name="norm")(y.reshape(x.shape) * jax.nn.silu(z))
        y = Linear(width, use_bias=self.use_bias, name="out_proj")(y)
        return (y, MambaState(window, hidden)) if return_state else y


# --- rows of converter tables ----------------------------------------------------------------------------------------


def mamba(official: str, ours: str, *, bias: bool = False, conv_bias: bool = True) -> Iterator[Row]:
    """mamba_ssm's Mamba to ours; `bias` and `conv_bias` are the official arguments of these names."""
    yield from linear(f"{official}.in_proj", f"{ours}/in_proj", bias=bias)
    yield from conv(f"{official}.conv1d", f"{ours}/conv1d", axes=1, bias=conv_bias)
    yield from linear(f"{official}.x_proj", f"{ours}/x_proj", bias=False)
    yield from linear(f"{official}.dt_proj", f"{ours}/dt_proj")
    yield from parameter(f"{official}.A_log", f"{ours}/A_log")
    yield from parameter(f"{official}.D", f"{ours}/D")
    yield from linear(f"{official}.out_proj", f"{ours}/out_proj", bias=bias)


def mamba2(official: str, ours: str, *, bias: bool = False, conv_bias: bool = True) -> Iterator[Row]:
    """mamba_ssm's Mamba2 to ours."""
    yield from linear(f"{official}.in_proj", f"{ours}/in_proj", bias=bias)
    yield from conv(f"{official}.conv1d", f"{ours}/conv1d", axes=1, bias=conv_bias)
    for name in ("dt_bias", "A_log", "D"):
        yield from parameter(f"{official}.{name}", f"{ours}/{name}")
    yield from layer_norm(f"{official}.norm", f"{ours}/norm", bias=False)
    yield from linear(f"{official}.out_proj", f"{ours}/out_proj", bias=bias)
