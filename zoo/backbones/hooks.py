"""What a backbone lets its user replace and see: the attention of every layer, hidden states, attention weights.

A hook is `layers.dot_product_attention` with a layer in front:

    def without_distant_keys(layer, query, key, value, *, mask, **options):
        if layer.index >= 8:
            mask = layers.WindowMask(left=64) if mask is None else mask & layers.WindowMask(left=64)
        return layers.dot_product_attention(query, key, value, mask=mask, **options)

    model = model.clone(attention=without_distant_keys)

What is to be seen is asked for when the model is applied, and comes back in collections of these names:

    output, seen = model.apply(variables, input_ids, mutable=["hidden_states", "attention_weights"])
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

import layers
from layers import Mask

__all__ = ["AttentionHook", "Layer", "attend", "plain_attention", "relocated", "show"]


@dataclass(frozen=True)
class Layer:
    """Which attention of a backbone is computed."""

    index: int  # counted through the network, in the order of computation
    name: str  # the path of the module that it belongs to, as in the tree of parameters
    kind: str = "self"  # self | cross


AttentionHook = Callable[..., Any]
"""(layer, query (B, Lq, H, D), key (B, Lk, K, D), value (B, Lk, K, Dv), *, mask, bias, scale, soft_cap, return_weights)
to (B, Lq, H, Dv), or to that and the weights (B, H, Lq, Lk) if `return_weights`. Keys and values are those of the
cache where there is one; queries and keys are rotated already where the model rotates them."""


def plain_attention(layer: Layer, query: Array, key: Array, value: Array, **options: Any) -> Any:
    """The attention the backbone was trained with."""
    return layers.dot_product_attention(query, key, value, **options)


def relocated(hook: AttentionHook, index: int, path: str) -> AttentionHook:
    """The hook for a model inside another one, at `path` (ending in a slash), after `index` attentions."""
    if hook is plain_attention:
        return hook

    def inner(layer: Layer, *arrays: Array, **options: Any) -> Any:
        return hook(replace(layer, index=index + layer.index, name=path + layer.name), *arrays, **options)

    return inner


def attend(
    module: nn.Module,
    hook: AttentionHook,
    layer: Layer,
    query: Float[Array, "B Lq H D"],
    key: Float[Array, "B Lk K D"],
    value: Float[Array, "B Lk K Dv"],
    *,
    mask: Mask | None = None,
    bias: Float[Array, "*broadcastable"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B Lq H Dv"]:
    """The hook's attention; its weights are shown where somebody asks for them."""
    options = {"mask": mask, "bias": bias, "scale": scale, "soft_cap": soft_cap}
    if not _asked(module, "attention_weights"):
        return hook(layer, query, key, value, return_weights=False, **options)
    output, weights = hook(layer, query, key, value, return_weights=True, **options)
    show(module, "attention_weights", "weights", weights)
    return output


def show(module: nn.Module, collection: str, name: str, value: Any) -> None:
    """Leaves a value in a collection, if the caller of `apply` asked for that collection."""
    if _asked(module, collection):
        module.sow(collection, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def _asked(module: nn.Module, collection: str) -> bool:
    return module.is_mutable_collection(collection) and not module.is_initializing()
