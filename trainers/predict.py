"""Predictions of a trained run beyond its data."""

import csv
import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
from etils import epath
from rich.console import Console

import zoo
from trainers import datasets
from trainers.loop import read_recipe
from zoo.errors import UserError

__all__ = ["predict_run"]


def predict_run(workdir: epath.Path, *, data_dir: str | None, output: Path, console: Console | None = None) -> Path:
    """Forecasts what follows the last row of the run's data; writes a csv in the data's own units and a picture."""
    recipe = read_recipe(workdir)
    paper = zoo.paper(recipe.paper).serving(recipe.model)
    if paper.task.name != "forecasting":
        raise UserError(f"zoo predict does not know what to predict for the task {paper.task.name}")
    if data_dir is not None:
        recipe = dataclasses.replace(recipe, data_dir=data_dir)
    model, variables = zoo.load(workdir)
    data = datasets.load(paper, recipe)
    batch = data.last_window()
    forecast = np.asarray(jax.device_get(jax.jit(model.apply)(variables, batch)))[0]
    times, values = data.future_times(), data.unscale(forecast)

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["date" if data.times.size else "row", *data.columns])
            for time, row in zip(times, values, strict=True):
                writer.writerow([str(time).replace("T", " "), *(f"{value:.6g}" for value in row)])
        _picture(data, batch, values, output.with_suffix(".png"))
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}): give another --output") from error
    (console or Console()).print(
        f"{len(times)} steps from {times[0]} to {times[-1]}: {os.fspath(output)} and {output.with_suffix('.png').name}",
        highlight=False,
        soft_wrap=True,
    )
    return output


def _picture(data, batch, values: np.ndarray, path: Path) -> None:
    from matplotlib.figure import Figure

    past = data.unscale(jax.device_get(batch["x"])[0])
    shown = min(4, past.shape[-1])
    figure = Figure(figsize=(9, 1.9 * shown + 0.6), layout="constrained")
    for variate, axes in enumerate(figure.subplots(shown, 1, sharex=True, squeeze=False)[:, 0]):
        axes.plot(range(-len(past) + 1, 1), past[:, variate], color="0.45", linewidth=1.2, label="last values")
        axes.plot(range(1, len(values) + 1), values[:, variate], color="tab:red", linewidth=1.4, label="forecast")
        axes.axvline(0.5, color="0.8", linewidth=0.8)
        axes.set_ylabel(data.columns[variate])
        if variate == 0:
            axes.legend(loc="upper left", ncols=2, frameon=False)
    axes.set_xlabel("steps from now")
    figure.savefig(path, dpi=110)
