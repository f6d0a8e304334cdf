"""A split for tests: its examples are the rows of arrays."""

import dataclasses
from typing import Any

import jax

__all__ = ["Rows"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rows:
    """Batches are gathered by row number."""

    arrays: dict[str, Any]

    def __len__(self) -> int:
        return jax.tree.leaves(self.arrays)[0].shape[0]

    def batch(self, indices: jax.Array) -> dict[str, jax.Array]:
        return {name: array[indices] for name, array in self.arrays.items()}
