"""Windows of the forecasting sets with a random share of their values hidden.

What is hidden depends on the window and the seed alone: it is the same in every epoch (officially drawn anew; windows a
step apart hide different values of the same rows).
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from trainers.data.forecasting import WindowedSplit, load_forecasting
from zoo.errors import UserError

__all__ = ["GappySplit", "ImputationData", "load_imputation"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GappySplit:
    """All windows of one part of a series; what is hidden is drawn when a batch is."""

    windows: WindowedSplit
    key: Array
    hidden_share: float = field(metadata={"static": True})

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The windows of these numbers as an imputation batch; traceable."""
        y = self.windows.batch(indices)["x"]
        key = jax.random.wrap_key_data(self.key)
        draw = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), y.shape[1:]))
        mask = draw(jnp.asarray(indices)) > self.hidden_share
        return {"x": jnp.where(mask, y, 0.0), "mask": mask, "y": y}


@dataclass(frozen=True)
class ImputationData:
    """The three parts of a set."""

    train: GappySplit
    valid: GappySplit
    test: GappySplit


def load_imputation(
    name: str, *, data_dir: str | None, lookback: int, hidden_share: float, seed: int = 0
) -> ImputationData:
    """The forecasting set of that name, cut into windows of `lookback` steps with gaps."""
    if not 0 < hidden_share < 1:
        raise UserError(f"--model.hidden-share {hidden_share} leaves nothing to fill or to see: choose one in (0, 1)")
    data = load_forecasting(name, data_dir=data_dir, lookback=lookback, horizon=0, seed=seed)
    keys = (jax.random.key_data(key) for key in jax.random.split(jax.random.key(seed), 3))
    parts = (data.train, data.valid, data.test)
    return ImputationData(*(GappySplit(part, key, hidden_share) for part, key in zip(parts, keys, strict=True)))
