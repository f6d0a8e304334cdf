"""Training a few of a model's numbers: low-rank adapters on its projections, and parameters that stay as they are.

    adapters = lora_init(jax.random.key(0), variables, targets=r"attention/(query|value)$", rank=8)
    logits = lora_apply(model, variables, adapters, input_ids).logits  # differentiate with respect to `adapters`
    zoo.save("tuned", model, lora_merge(variables, adapters), layout="hf")

LoRA: arXiv:2106.09685. Nothing of the model has to know of it: the projections are met by their paths.
"""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import layers
from zoo.errors import UserError

__all__ = ["freeze", "lora_apply", "lora_init", "lora_merge", "matching"]


def matching(params: Any, patterns: str | tuple[str, ...]) -> Any:
    """A tree of booleans: does any of the regular expressions occur in the parameter's path, such as
    layers_0/attention/query/kernel? A pattern that fits none is an error."""
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    paths = jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), params
    )
    names = jax.tree.leaves(paths)
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f"no parameter fits {pattern!r}; there are for example {', '.join(names[:3])}")
    return jax.tree.map(lambda name: any(re.search(pattern, name) for pattern in patterns), paths)


def freeze(
    optimizer: optax.GradientTransformation, params: Any, patterns: str | tuple[str, ...]
) -> optax.GradientTransformation:
    """The optimiser for all but the parameters that fit: those get no update and no state."""
    labels = jax.tree.map(lambda fits: "frozen" if fits else "trained", matching(params, patterns))
    return optax.multi_transform({"frozen": optax.set_to_zero(), "trained": optimizer}, labels)


def lora_init(
    key: jax.Array, variables: Mapping[str, Any], *, targets: str, rank: int, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Adapters of rank `rank` for every projection whose path fits `targets`: path -> down (Din, R), up (R, Dout).

    `up` starts as zero, so that the adapted model starts as the model itself.
    """
    kernels = {
        path[:-1]: leaf.shape
        for path, leaf in flatten_dict(dict(variables["params"])).items()
        if path[-1] == "kernel" and len(leaf.shape) == 2
    }
    chosen = {path: shape for path, shape in kernels.items() if re.search(targets, "/".join(path))}
    if not chosen:
        raise UserError(
            f"no projection fits targets {targets!r}; there are for example "
            f"{', '.join('/'.join(path) for path in list(kernels)[:3])}"
        )
    adapters = {}
    for i, (path, (inputs, outputs)) in enumerate(sorted(chosen.items())):
        if rank < 1 or rank > min(inputs, outputs):
            raise UserError(f"rank {rank} is not in 1..{min(inputs, outputs)}, the sides of {'/'.join(path)}")
        down = jax.random.normal(jax.random.fold_in(key, i), (inputs, rank), dtype) * inputs**-0.5
        adapters[path] = {"down": down, "up": jnp.zeros((rank, outputs), dtype)}
    return unflatten_dict(adapters)


def _by_path(adapters: Mapping[str, Any]) -> dict[tuple[str, ...], Mapping[str, jax.Array]]:
    flat = flatten_dict(dict(adapters))
    return {
        path[:-1]: {"down": flat[(*path[:-1], "down")], "up": value} for path, value in flat.items() if path[-1] == "up"
    }


def lora_apply(
    model: nn.Module, variables: Mapping[str, Any], adapters: Mapping[str, Any], *arguments: Any, scale: float = 1.0,
    **options: Any,
) -> Any:  # fmt: skip
    """`model.apply(variables, *arguments, **options)` with scale (x A) B added to every adapted projection of x."""
    waiting = _by_path(adapters)
    met = set()

    def add(call, given, named, context):
        y = call(*given, **named)
        path = tuple(context.module.path)
        if context.method_name != "__call__" or path not in waiting:
            return y
        met.add(path)
        down, up = (waiting[path][name].astype(y.dtype) for name in ("down", "up"))
        return y + (given[0] @ down) @ up * scale

    with nn.intercept_methods(add):
        result = model.apply(variables, *arguments, **options)
    if lost := waiting.keys() - met:
        raise UserError(
            f"the model did not compute {', '.join('/'.join(path) for path in sorted(lost))}: "
            "adapters work with layers that run one by one, not with scan"
        )
    return result


def lora_merge(variables: Mapping[str, Any], adapters: Mapping[str, Any], *, scale: float = 1.0) -> dict[str, Any]:
    """The variables with W + scale A B in place of every adapted W: the same model, at no extra cost."""
    flat = flatten_dict(dict(variables["params"]))
    for path, adapter in _by_path(adapters).items():
        name = (*path, "kernel")
        if name not in flat:
            raise UserError(f"the adapter of {'/'.join(path)} has no projection in these variables")
        flat[name] = layers.lora_merge(flat[name], adapter["down"], adapter["up"], scale=scale)
    return {**variables, "params": unflatten_dict(flat)}
