"""The smallest blocks: a linear layer and dropout that start and behave as PyTorch's do."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
from jaxtyping import Array, Float

import layers

__all__ = ["ActivationDropout", "Dropout", "Linear", "activation_function", "torch_uniform"]

_ACTIVATIONS: dict[str, Callable] = {
    "gelu": layers.gelu,
    "gelu_tanh": partial(layers.gelu, approximate=True),
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


@jax.custom_vjp
def matmul(x: Float[Array, "T D"], kernel: Float[Array, "D F"]) -> Float[Array, "T F"]:
    """x W of flat tokens, in the forms that XLA's CPU matrix products are fast at.

    The same product of a three-axis array takes up to twice as long, and so does the gradient of a tall kernel unless
    it is computed lying down.
    """
    return x @ kernel


def _matmul_fwd(x, kernel):
    return x @ kernel, (x, kernel)


def _matmul_bwd(residuals, dy):
    x, kernel = residuals
    tall = kernel.shape[0] > kernel.shape[1]
    # The barrier keeps XLA from turning (dy^T x)^T back into x^T dy.
    dkernel = jax.lax.optimization_barrier(dy.T @ x).T if tall else x.T @ dy
    return dy @ kernel.T, dkernel


matmul.defvjp(_matmul_fwd, _matmul_bwd)


class Linear(nn.Module):
    """y = x W + b over the last axis; starts as torch.nn.Linear does unless `kernel_init` says otherwise."""

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch F"]:
        start = torch_uniform(x.shape[-1])
        kernel = self.param("kernel", self.kernel_init or start, (x.shape[-1], self.features))
        y = matmul(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], self.features)
        return y + self.param("bias", start, (self.features,)) if self.use_bias else y


class Dropout(nn.Module):
    """Zeroes a share `rate` of x while training and rescales the rest; draws from the `dropout` RNG stream."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"], *, train: bool) -> Float[Array, "*shape"]:
        if not train or self.rate == 0.0:
            return x
        return layers.dropout(x, self.make_rng("dropout"), rate=self.rate)


class ActivationDropout(nn.Module):
    """drop(activation(x)), computed again in the backward pass instead of kept: the widest arrays of a transformer
    are cheaper to make twice than to write to memory and read back."""

    activation: str
    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"], *, train: bool) -> Float[Array, "*shape"]:
        function = activation_function(self.activation)
        if not train or self.rate == 0.0:
            return jax.checkpoint(function)(x)
        return jax.checkpoint(lambda x, key: layers.dropout(function(x), key, rate=self.rate))(
            x, self.make_rng("dropout")
        )
