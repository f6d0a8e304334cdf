"""From a recipe to its data: the one place that knows which loader serves which task."""

from typing import Any

from trainers.recipe import Recipe
from zoo.errors import UserError
from zoo.paper import Paper

__all__ = ["load"]


def load(paper: Paper, recipe: Recipe) -> Any:
    """The data of a recipe: an object with `train`, `valid` and `test` splits (see `trainers.step.Split`)."""
    if paper.task.name == "forecasting":
        from trainers.data import load_forecasting

        return load_forecasting(
            recipe.data,
            data_dir=recipe.data_dir,
            lookback=recipe.model.lookback,
            horizon=recipe.model.horizon,
            seed=recipe.seed,
        )
    raise UserError(f"{paper.slug}: no loader serves the task {paper.task.name} yet")
