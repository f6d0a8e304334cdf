"""From a recipe to its data: the one place that knows which loader serves which task."""

import importlib
from dataclasses import dataclass
from typing import Any

from trainers.recipe import Recipe
from zoo.errors import UserError
from zoo.paper import Paper

__all__ = ["data_of_all", "load", "shape_fields"]


@dataclass(frozen=True)
class Loader:
    """Where a task's loader is, as "module.function" under `trainers.data`, and what it takes of the model's config."""

    function: str
    fields: tuple[str, ...] = ()  # passed by their names
    whole: tuple[str, ...] = ()  # the config is passed as a whole, and these say what an example is
    shape: tuple[str, ...] = ()  # fields that further say what an example is
    sizes: tuple[str, ...] = ()  # passed too, but each paper's own
    own_standin: bool = False  # every paper has a stand-in of its own


_SIGNALS = Loader("signals.load_signals", ("length", "channels", "num_classes"), own_standin=True)
_TEXTS = Loader("texts.load_texts", ("length", "vocabulary", "num_classes"))

# By task; classification by task and room, since its papers take signals, texts or images, or by task and paper.
_LOADERS = {
    "anomaly_detection": Loader("attacks.load_attacks", ("lookback",), shape=("channels",)),
    "beam_tracking": Loader("beam_tracking.load_beam_tracking", ("lookback", "image_size", "echo_channels")),
    "causal_discovery": Loader("systems.load_system", ("lookback",), shape=("variates",)),
    "classification/language": _TEXTS,
    "classification/neuromorphic_sign": Loader(
        "events.load_events", whole=("steps", "height", "width", "num_classes", "attend")
    ),
    "classification/series": _SIGNALS,
    "classification/signals": _SIGNALS,
    "classification/systems": Loader("federated.load_federated", ("image_size", "channels", "num_classes")),
    "classification/theory": _TEXTS,
    "density_regression": Loader("crowds.load_crowds", ("height", "width")),
    "classification/vision": Loader("images.load_images", ("image_size", "channels", "num_classes")),
    "entity_alignment": Loader(
        "alignment.load_alignment", whole=("num_entities", "num_relations", "num_times", "num_intervals")
    ),
    "event_reconstruction": Loader("event_reconstruction.load_events", ("num_hits",)),
    "forecasting": Loader("forecasting.load_forecasting", ("lookback", "horizon")),
    "imputation": Loader("imputation.load_imputation", ("lookback", "hidden_share")),
    "language_modelling": Loader("language.load_language", ("length", "vocabulary")),
    "manipulation": Loader(
        "manipulation.load_scenes",
        whole=(
            "horizon",
            "num_observations",
            "num_points",
            "state_dim",
            "action_dim",
            "environment_channels",
            "active_features",
            "passive_features",
        ),
    ),
    "mesh_animation": Loader(
        "meshes.load_meshes", ("frames", "num_vertices", "num_edges", "video_tokens", "video_channels")
    ),
    "molecules": Loader(
        "molecules.load_molecules", whole=("length", "vocabulary", "num_targets", "targets", "num_descriptors")
    ),
    "patient_classification": Loader("cohorts.load_cohort", whole=("block_widths", "num_classes")),
    "point_completion": Loader("completion.load_completion", ("num_points", "num_targets")),
    "point_segmentation": Loader("towns.load_towns", ("num_points", "num_classes", "cell", "depth")),
    "pose_lifting": Loader("poses.load_poses", ("frames",)),
    "recommendation": Loader("recommendation.load_recommendation", ("history",), sizes=("num_items",)),
    "reconstruction": Loader("telemetry.load_telemetry", ("lookback",)),
    "row_prediction": Loader("relational.load_rows", whole=("tables",)),
    "segmentation": Loader(
        "segmentation.load_segmentation", ("image_size", "channels", "num_classes"), own_standin=True
    ),
    "spectrum_rendering": Loader("spectra.load_spectra", ("height", "width")),
    "trajectory_forecasting": Loader(
        "trajectories.load_trajectories", ("lookback", "horizon", "num_agents"), shape=("num_modes",)
    ),
}


def _loader(paper: Paper) -> Loader:
    task = paper.task.name
    for name in (f"{task}/{paper.slug}", task, f"{task}/{paper.entry.room}"):
        if name in _LOADERS:
            return _LOADERS[name]
    raise UserError(f"{paper.slug}: no loader serves the task {task} yet")


def shape_fields(paper: Paper) -> tuple[str, ...]:
    """The fields of a model's config that say what an example is: models that are compared must agree in them."""
    loader = _loader(paper)
    return (*loader.fields, *loader.whole, *loader.shape)


def data_of_all(first: Paper, name: str) -> str:
    """The name of the data for all that are compared with `first`: where every paper has a stand-in of its own, that
    of the first."""
    return f"standin/{first.slug}" if name == "standin" and _loader(first).own_standin else name


def load(paper: Paper, recipe: Recipe) -> Any:
    """The data of a recipe: an object with `train`, `valid` and `test` splits (see `trainers.step.Split`)."""
    loader = _loader(paper)
    module, _, name = loader.function.rpartition(".")
    options = {field: getattr(recipe.model, field) for field in (*loader.fields, *loader.sizes)}
    if loader.whole:
        options["config"] = recipe.model
    if loader.own_standin:
        options["paper"] = paper.slug
    function = getattr(importlib.import_module(f"trainers.data.{module}"), name)
    return function(recipe.data, data_dir=recipe.data_dir, seed=recipe.seed, **options)
