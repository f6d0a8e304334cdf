"""Layers of one kind after one another; how they are executed is the trainer's business, not the model's."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["Execution", "execution", "stack"]

Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a stack of layers runs: for memory and compile time. The tree of parameters stays what it is."""

    remat: Remat = "none"
    """What the backward pass computes again instead of keeping: nothing, all but matrix products, or whole layers."""
    scan: bool = False
    """Compile one layer and loop over it: compile time no longer grows with depth."""
    place: Callable[[Any], Any] | None = None
    """Applied to what passes from layer to layer: where it lies on the devices."""


_CURRENT = Execution()


@contextlib.contextmanager
def execution(options: Execution) -> Iterator[None]:
    """Models traced inside run their stacks in this way."""
    global _CURRENT
    before, _CURRENT = _CURRENT, options
    try:
        yield
    finally:
        _CURRENT = before


_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def stack(
    parent: nn.Module,
    make: Callable[..., nn.Module],
    count: int,
    x: Any,
    *,
    name: str = "layers",
    first: int = 0,
    **arguments: Any,
) -> Any:
    """x after `count` layers `make(name=...)(x, **arguments)`, called inside `parent`'s compact method.

    The layers are `parent`'s own submodules `{name}_{first}` and so on, whichever way they run; how they run changes
    nothing but which numbers dropout draws. Several of them must give back the shape they take. `arguments` are static,
    such as `train`.
    """
    names = [f"{name}_{i}" for i in range(first, first + count)]
    options = _CURRENT
    if parent.is_initializing():
        options = Execution()
    # Every module sees a collection that any other has, if only as an empty one; constants may be the parent's own.
    filled = {kind for kind, values in parent.variables.items() if values and kind != "constants"}
    constants = bool(names) and names[0] in parent.variables.get("constants", {})
    if options.scan and count > 1 and filled == {"params"} and not constants:
        return _scanned(parent, make, names, x, arguments, options)
    for layer in names:
        module = make(name=layer)
        if options.remat == "none":
            x = module(x, **arguments)
        else:
            call = nn.remat(lambda m, x: m(x, **arguments), policy=_POLICIES[options.remat], prevent_cse=True)
            x = call(module, x)
        x = options.place(x) if options.place else x
    return x


def _scanned(parent, make, names: list[str], x, arguments: Mapping[str, Any], options: Execution):
    # Stacked here and not in the tree, so that weights, converters and checkpoints know one layout only.
    own = [parent.variables["params"][name] for name in names]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
    keys = {}
    if parent.has_rng("dropout"):
        keys["dropout"] = jax.random.split(parent.make_rng("dropout"), len(names))
    layer = make(name=None, parent=None)

    def body(x, row):
        params, keys = row
        x = layer.apply({"params": params}, x, rngs=keys, **arguments)
        return options.place(x) if options.place else x, None

    if options.remat != "none":
        body = jax.checkpoint(body, policy=_POLICIES[options.remat], prevent_cse=False)
    return jax.lax.scan(body, x, (stacked, keys))[0]
