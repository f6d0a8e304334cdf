"""The smallest blocks: a linear layer and dropout that start and behave as PyTorch's do."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
from jaxtyping import Array, Float

import layers

__all__ = ["Dropout", "Linear", "activation_function", "torch_uniform"]

_ACTIVATIONS: dict[str, Callable] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jax.numpy.tanh,
}


def activation_function(name: str) -> Callable:
    """The activation of that name, in torch's conventions: "gelu" is the exact (erf) form, "gelu_tanh" the other."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; choose one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what torch's Linear and Conv draw weights and biases from by default."""

    def init(key, shape, dtype=jax.numpy.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Linear(nn.Module):
    """y = x W + b over the last axis; starts as torch.nn.Linear does unless `kernel_init` says otherwise."""

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch F"]:
        start = torch_uniform(x.shape[-1])
        y = x @ self.param("kernel", self.kernel_init or start, (x.shape[-1], self.features))
        return y + self.param("bias", start, (self.features,)) if self.use_bias else y


class Dropout(nn.Module):
    """Zeroes a share `rate` of x while training and rescales the rest; draws from the `dropout` RNG stream."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"], *, train: bool) -> Float[Array, "*shape"]:
        if not train or self.rate == 0.0:
            return x
        return layers.dropout(x, self.make_rng("dropout"), rate=self.rate)
