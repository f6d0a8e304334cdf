"""Attention of sequences that are longer than a device: the hook that sends keys and values around a ring.

mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "sequence"))
model = model.clone(attention=ring(mesh))
output = jax.jit(model.apply)(variables, jax.device_put(input_ids, NamedSharding(mesh, P("data", "sequence"))))
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

import layers
from zoo.backbones.hooks import AttentionHook, Layer
from zoo.errors import UserError

__all__ = ["ring"]


def ring(mesh: Mesh) -> AttentionHook:
    """An attention hook for sequences that lie along the mesh axis `sequence`, batches along `data` and `fsdp`.

    Equal to the backbone's own attention where that is causal or sees all; a device holds two parts of the keys at a
    time. Padding, windows, biases and caches are not part of it: they raise `UserError`.
    """
    if "sequence" not in mesh.shape:
        raise UserError(
            f"the mesh has no axis named sequence, only {', '.join(mesh.shape)}: name the one time lies along"
        )
    return _Ring(mesh)


@dataclass(frozen=True)
class _Ring:
    mesh: Mesh

    def __call__(
        self,
        layer: Layer,
        query: Float[Array, "B Lq H D"],
        key: Float[Array, "B Lk K D"],
        value: Float[Array, "B Lk K Dv"],
        *,
        mask: layers.Mask | None = None,
        bias: Any = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        return_weights: bool = False,
    ) -> Float[Array, "B Lq H Dv"]:
        causal = isinstance(mask, layers.CausalMask) and mask.offset is None
        asked = {"bias": bias is not None, "soft_cap": soft_cap is not None, "attention weights": return_weights}
        asked["a mask other than the causal one (padding, a window or a cache)"] = not (mask is None or causal)
        if refused := [name for name, is_there in asked.items() if is_there]:
            raise UserError(f"ring attention in {layer.name} knows nothing of {' and '.join(refused)}")
        pieces = self.mesh.shape["sequence"]
        for name, length in (("queries", query.shape[1]), ("keys", key.shape[1])):
            if length % pieces:
                raise UserError(
                    f"{length} {name} cannot be shared by the {pieces} devices of the sequence axis: use a multiple"
                )
        rows = tuple(axis for axis in ("data", "fsdp") if axis in self.mesh.shape)
        if query.shape[0] % math.prod(self.mesh.shape[axis] for axis in rows):
            rows = ()
        places = PartitionSpec(rows or None, "sequence")

        def attend(query, key, value):
            return layers.ring_attention(query, key, value, axis_name="sequence", causal=causal, scale=scale)

        # Other axes hold copies.
        return jax.shard_map(attend, mesh=self.mesh, in_specs=(places,) * 3, out_specs=places, check_vma=False)(
            query, key, value
        )
