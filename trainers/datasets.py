"""From a recipe to its data: the one place that knows which loader serves which task."""

from typing import Any

from trainers.recipe import Recipe
from zoo.errors import UserError
from zoo.paper import Paper

__all__ = ["SHAPE_FIELDS", "load"]

# The fields of a model's config that say what an example is: models that are compared must agree in them.
SHAPE_FIELDS = {
    "beam_tracking": ("lookback", "image_size", "echo_channels"),
    "forecasting": ("lookback", "horizon"),
    "recommendation": ("history",),
    "trajectory_forecasting": ("lookback", "horizon", "num_agents", "num_modes"),
}


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
    if paper.task.name == "trajectory_forecasting":
        from trainers.data.trajectories import load_trajectories

        return load_trajectories(
            recipe.data,
            data_dir=recipe.data_dir,
            lookback=recipe.model.lookback,
            horizon=recipe.model.horizon,
            num_agents=recipe.model.num_agents,
            seed=recipe.seed,
        )
    if paper.task.name == "beam_tracking":
        from trainers.data.beam_tracking import load_beam_tracking

        return load_beam_tracking(
            recipe.data,
            data_dir=recipe.data_dir,
            lookback=recipe.model.lookback,
            image_size=recipe.model.image_size,
            echo_channels=recipe.model.echo_channels,
            seed=recipe.seed,
        )
    if paper.task.name == "recommendation":
        from trainers.data import load_recommendation

        return load_recommendation(
            recipe.data,
            data_dir=recipe.data_dir,
            history=recipe.model.history,
            num_items=recipe.model.num_items,
            seed=recipe.seed,
        )
    raise UserError(f"{paper.slug}: no loader serves the task {paper.task.name} yet")
