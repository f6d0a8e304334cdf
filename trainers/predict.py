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
from zoo.tasks import classification, smiles

__all__ = ["predict_run"]


def predict_run(workdir: epath.Path, *, data_dir: str | None, output: Path, console: Console | None = None) -> Path:
    """Forecasts what follows the last row of the run's data, in its own units, gives the probability of each class for
    each test example, or generates molecules; writes a csv and, of the first two, a picture."""
    recipe = read_recipe(workdir)
    paper = zoo.paper(recipe.paper).serving(recipe.model)
    if paper.task.name not in ("forecasting", "classification", "molecules"):
        raise UserError(f"zoo predict does not know what to predict for the task {paper.task.name}")
    if data_dir is not None:
        recipe = dataclasses.replace(recipe, data_dir=data_dir)
    model, variables = zoo.load(workdir)
    data = datasets.load(paper, recipe)
    if paper.task.name == "classification":
        return _classes(model, variables, data, output, recipe.evaluation.batch_size, console or Console())
    if paper.task.name == "molecules":
        return _molecules(model, variables, data, output, recipe, console or Console())
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


def _molecules(model, variables, data, output: Path, recipe, console: Console) -> Path:
    """A line for each of as many new strings as an evaluation's batch: whether they can be molecules, whether they
    are among the training ones, and what the same model predicts of them."""
    tokens = model.generate(variables, jax.random.key(recipe.seed), count=recipe.evaluation.batch_size)
    found = np.asarray(model.apply(variables, tokens, tokens != recipe.model.pad_id, method="predict"), np.float64)
    if recipe.model.targets == "measurements":
        found = found * np.asarray(data.train.unit) + np.asarray(data.middle)
    else:
        found = 1 / (1 + np.exp(-found))
    strings = [data.text(row) for row in np.asarray(tokens)]
    known = set(data.strings)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["smiles", "fault", "known", *(f"predicted {k}" for k in range(found.shape[1]))])
            for string, row in zip(strings, found, strict=True):
                numbers = (f"{value:.6g}" for value in row)
                writer.writerow([string, smiles.fault(string) or "", int(string in known), *numbers])
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}): give another --output") from error
    shares = smiles.quality(strings, known)
    console.print(
        f"{len(strings)} strings in {os.fspath(output)}: "
        + ", ".join(f"{name} {share:.3f}" for name, share in shares.items()),
        highlight=False,
        soft_wrap=True,
    )
    return output


def _classes(model, variables, data, output: Path, batch_size: int, console: Console) -> Path:
    """A line for each test example: its number, its class, the most probable one and all probabilities."""
    apply = jax.jit(model.apply)
    parts = []
    for first in range(0, len(data.test), batch_size):
        batch = data.test.batch(np.arange(first, min(first + batch_size, len(data.test))))
        parts.append((np.asarray(classification.logits_of(apply(variables, batch))), np.asarray(batch["label"])))
    logits, label = (np.concatenate(column) for column in zip(*parts, strict=True))
    several = label.ndim == 2
    shares = np.asarray(jax.nn.sigmoid(logits) if several else jax.nn.softmax(logits))
    names = getattr(data, "classes", None) or tuple(str(k) for k in range(logits.shape[1]))

    def named(row) -> str:
        return " ".join(names[k] for k in np.flatnonzero(row)) if several else names[row]

    guess = shares > 0.5 if several else shares.argmax(axis=1)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["example", "class", "predicted", *(f"p({name})" for name in names)])
            for i, row in enumerate(shares):
                writer.writerow([i, named(label[i]), named(guess[i]), *(f"{share:.4f}" for share in row)])
        figure = _bars(label, guess, names) if several else _confusion(label, guess, names)
        figure.savefig(output.with_suffix(".png"), dpi=110)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}): give another --output") from error
    console.print(
        f"{len(label)} test examples: {os.fspath(output)} and {output.with_suffix('.png').name}",
        highlight=False,
        soft_wrap=True,
    )
    return output


def _confusion(label: np.ndarray, guess: np.ndarray, names):
    """How often each class was taken for which."""
    from matplotlib.figure import Figure

    counts = classification.confusion_matrix(label, guess, len(names))
    size = 2.2 + 0.45 * min(len(names), 20)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Greys", vmin=0, vmax=1)
    if len(names) <= 20:
        for (row, column), count in np.ndenumerate(counts):
            shade = "white" if count > 0.5 * counts[row].sum() else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=shade, fontsize=8)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="class")
    return figure


def _bars(label: np.ndarray, guess: np.ndarray, names):
    """Of each class: how many examples have it, are said to have it, and both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.7 * len(names), 3.5), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(names))
    for shift, (what, counts) in enumerate(
        {"has it": label > 0, "predicted": guess, "both": guess & (label > 0)}.items()
    ):
        axes.bar(place + 0.27 * (shift - 1), counts.sum(axis=0), 0.25, label=what)
    axes.set_xticks(place, names, rotation=90)
    axes.set_ylabel("test examples")
    axes.legend(frameon=False)
    return figure


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
