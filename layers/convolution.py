"""Convolutions as matrix products, where XLA's own are slow."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

__all__ = ["conv_general_dilated"]

_MOST = 64  # places of a window for which a product each is still compiled


def conv_general_dilated(
    lhs: Float[Array, "B *size C"],
    rhs: Float[Array, "*window c D"],  # c: those of a group
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    **options: Any,
) -> Float[Array, "B *places D"]:
    """`jax.lax.conv_general_dilated`, faster on CPUs: y[p] = sum_t x[stride p + dilation t - padding] W[t].

    For `flax.linen.Conv(..., conv_general_dilated=layers.conv_general_dilated)`. On a CPU the gradient of W is one
    matrix product for each t, of what W[t] has seen with the output's gradient (XLA's convolution takes 2 to 12 times
    as long there), and a window of one pixel is a matrix product everywhere. Groups, dilated inputs, large windows and
    channels anywhere but at the end are left to XLA; so is all of it on other platforms. Reverse-mode derivatives only.
    Source: arXiv:1603.07285, chapters 2 and 4.
    """
    axes = lhs.ndim - 2
    window = rhs.shape[:-2]
    dilation = tuple(rhs_dilation or (1,) * axes)
    strides = tuple(window_strides)
    last = lax.conv_dimension_numbers(lhs.shape, rhs.shape, _channels_last(axes))
    given = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    plain = all(value in (None, 1) for value in options.values()) and set(lhs_dilation or (1,)) == {1}
    if not plain or given != last or math.prod(window) > _MOST:
        return lax.conv_general_dilated(
            lhs, rhs, strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, **options
        )
    if isinstance(padding, str):
        reach = [d * (w - 1) + 1 for d, w in zip(dilation, window, strict=True)]
        padding = lax.padtype_to_pads(lhs.shape[1:-1], reach, strides, padding)
    padding = tuple((int(before), int(after)) for before, after in padding)
    if set(window) == {1} and not np.any(padding):
        seen = lax.slice(lhs, (0,) * lhs.ndim, lhs.shape, (1, *strides, 1))
        return lax.dot_general(seen, rhs.reshape(rhs.shape[-2:]), (((lhs.ndim - 1,), (0,)), ((), ())))
    return _convolve(lhs, rhs, strides, padding, dilation)


def _channels_last(axes: int) -> tuple[str, str, str]:
    names = "DEHW"[-axes:]
    return f"N{names}C", f"{names}IO", f"N{names}C"


def _by_xla(x, kernel, strides, padding, dilation):
    names = _channels_last(x.ndim - 2)
    return lax.conv_general_dilated(x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=names)


_convolve = jax.custom_vjp(_by_xla, nondiff_argnums=(2, 3, 4))


def _forward(x, kernel, strides, padding, dilation):
    return _by_xla(x, kernel, strides, padding, dilation), (x, kernel)


def _backward(strides, padding, dilation, saved, slope):
    x, kernel = saved
    of_x = jax.linear_transpose(lambda x: _by_xla(x, kernel, strides, padding, dilation), x)
    of_kernel = jax.linear_transpose(lambda kernel: _by_xla(x, kernel, strides, padding, dilation), kernel)

    def products(x: Float[Array, "B *size C"], slope: Float[Array, "B *places D"]) -> Float[Array, "*window C D"]:
        padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        flat = slope.reshape(-1, slope.shape[-1])

        def at(t: tuple[int, ...]) -> Float[Array, "C D"]:
            start = [d * i for d, i in zip(dilation, t, strict=True)]
            end = [a + s * (n - 1) + 1 for a, s, n in zip(start, strides, slope.shape[1:-1], strict=True)]
            seen = lax.slice(padded, (0, *start, 0), (len(x), *end, x.shape[-1]), (1, *strides, 1))
            product = partial(lax.dot_general, preferred_element_type=jnp.float32)
            return product(seen.reshape(-1, x.shape[-1]), flat, (((0,), (0,)), ((), ())))

        every = jnp.stack([at(t) for t in np.ndindex(*kernel.shape[:-2])])
        return every.reshape(kernel.shape).astype(kernel.dtype)

    def convolution(x, slope):
        return of_kernel(slope)[0]

    return of_x(slope)[0], lax.platform_dependent(x, slope, cpu=products, default=convolution)


_convolve.defvjp(_forward, _backward)
