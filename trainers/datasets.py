"""From a recipe to its data: the one place that knows which loader serves which task."""

from typing import Any

from trainers.recipe import Recipe
from zoo.errors import UserError
from zoo.paper import Paper

__all__ = ["SHAPE_FIELDS", "data_of_all", "load"]

# The fields of a model's config that say what an example is: models that are compared must agree in them.
SHAPE_FIELDS = {
    "anomaly_detection": ("lookback", "channels"),
    "beam_tracking": ("lookback", "image_size", "echo_channels"),
    "causal_discovery": ("lookback", "variates"),
    "classification": ("length", "channels", "image_size", "vocabulary", "num_classes"),  # those it has
    "entity_alignment": ("num_entities", "num_relations", "num_times", "num_intervals"),
    "forecasting": ("lookback", "horizon"),
    "imputation": ("lookback", "hidden_share"),
    "patient_classification": ("block_widths", "num_classes"),
    "recommendation": ("history",),
    "reconstruction": ("lookback",),
    "row_prediction": ("tables",),
    "trajectory_forecasting": ("lookback", "horizon", "num_agents", "num_modes"),
}

_SIGNAL_ROOMS = ("signals", "series")


def data_of_all(first: Paper, name: str) -> str:
    """The name of the data for all that are compared with `first`: where every paper has a stand-in of its own, that
    of the first."""
    own = first.task.name == "classification" and first.entry.room in _SIGNAL_ROOMS
    return f"standin/{first.slug}" if own and name == "standin" else name


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
    if paper.task.name == "anomaly_detection":
        from trainers.data.attacks import load_attacks

        return load_attacks(recipe.data, data_dir=recipe.data_dir, lookback=recipe.model.lookback, seed=recipe.seed)
    if paper.task.name == "causal_discovery":
        from trainers.data.systems import load_system

        return load_system(recipe.data, data_dir=recipe.data_dir, lookback=recipe.model.lookback, seed=recipe.seed)
    if paper.task.name == "imputation":
        from trainers.data.imputation import load_imputation

        return load_imputation(
            recipe.data,
            data_dir=recipe.data_dir,
            lookback=recipe.model.lookback,
            hidden_share=recipe.model.hidden_share,
            seed=recipe.seed,
        )
    if paper.task.name == "reconstruction":
        from trainers.data.telemetry import load_telemetry

        return load_telemetry(recipe.data, data_dir=recipe.data_dir, lookback=recipe.model.lookback, seed=recipe.seed)
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
    if paper.task.name == "patient_classification":
        from trainers.data.cohorts import load_cohort

        return load_cohort(recipe.data, data_dir=recipe.data_dir, config=recipe.model, seed=recipe.seed)
    if paper.task.name == "entity_alignment":
        from trainers.data.alignment import load_alignment

        return load_alignment(recipe.data, data_dir=recipe.data_dir, config=recipe.model, seed=recipe.seed)
    if paper.task.name == "row_prediction":
        from trainers.data.relational import load_rows

        return load_rows(recipe.data, data_dir=recipe.data_dir, config=recipe.model, seed=recipe.seed)
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
    if paper.task.name == "classification" and paper.entry.room in _SIGNAL_ROOMS:
        from trainers.data.signals import load_signals

        return load_signals(
            recipe.data,
            paper=paper.slug,
            data_dir=recipe.data_dir,
            length=recipe.model.length,
            channels=recipe.model.channels,
            num_classes=recipe.model.num_classes,
            seed=recipe.seed,
        )
    if paper.task.name == "classification" and paper.entry.room == "language":
        from trainers.data.texts import load_texts

        return load_texts(
            recipe.data,
            data_dir=recipe.data_dir,
            length=recipe.model.length,
            vocabulary=recipe.model.vocabulary,
            num_classes=recipe.model.num_classes,
            seed=recipe.seed,
        )
    raise UserError(f"{paper.slug}: no loader serves the task {paper.task.name} yet")
