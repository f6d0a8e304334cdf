"""Several papers of one task on the same data under the same budget: a table and a plot."""

import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

import zoo
from trainers import distributed
from trainers.datasets import data_of_all, shape_fields
from trainers.flops import matmul_flops
from trainers.logs import METRICS_FILE, read_metrics
from trainers.loop import prepare, train
from trainers.recipe import Recipe, named_recipes, recipe_for
from zoo.errors import UserError

__all__ = ["Contender", "Row", "compare", "contenders", "flops_per_example"]

TABLE_FILE = "comparison.csv"
PLOT_FILE = "comparison.png"


@dataclass(frozen=True)
class Contender:
    """A paper in one of its configs, with the recipe of its first seed."""

    name: str  # paper:config
    recipe: Recipe

    def folder(self, workdir: epath.Path, seed: int) -> epath.Path:
        return workdir / self.name.replace(":", "-") / f"seed-{seed}"

    def seeded(self, seed: int) -> Recipe:
        return dataclasses.replace(self.recipe, seed=seed)


@dataclass(frozen=True)
class Row:
    """A line of the table; what a baseline does not have is None."""

    name: str
    scores: dict[str, list[float]]  # metric -> one value a seed
    seconds: float | None = None
    parameters: int | None = None
    flops: float | None = None


def contenders(
    names: Sequence[str],
    *,
    data: str = "standin",
    data_dir: str | None = None,
    config: str | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
) -> list[Contender]:
    """The recipes to run, made equal in everything but the model and its optimiser.

    A name is PAPER or PAPER:CONFIG. Without a config of its own a paper takes `config`, which it must have, and without
    that its `tiny`. What is not given here (batch size; steps or epochs) is that of the first one's recipe, and so are
    the fields of the model that say what an example is: for forecasting, look-back and horizon.
    """
    if not names:
        raise UserError("zoo compare needs at least one paper, for example: zoo compare ister:tiny ister:ettm1")
    if steps is not None and epochs is not None:
        raise UserError(f"--steps {steps} and --epochs {epochs} are two budgets: give one of them")
    found: dict[str, Recipe] = {}
    for name in names:
        slug, _, own = name.partition(":")
        if not own and config is not None and config not in named_recipes(slug):
            raise UserError(
                f"{slug} has no recipe for config {config!r}: leave --config out to take each paper's tiny, or name "
                f"one for this paper alone, as {slug}:tiny"
            )
        recipe = recipe_for(slug, own or config or "tiny")
        if f"{slug}:{recipe.config}" in found:
            raise UserError(f"{slug}:{recipe.config} is named twice")
        found[f"{slug}:{recipe.config}"] = recipe

    first_name, first = next(iter(found.items()))
    tasks = {name: zoo.paper(recipe.paper).serving(recipe.model).task.name for name, recipe in found.items()}
    for name, task in tasks.items():
        if task != tasks[first_name]:
            raise UserError(
                f"{first_name} is a paper of {tasks[first_name]} and {name} one of {task}: "
                "only papers of one task can be compared"
            )
    if steps is None and epochs is None:
        steps, epochs = first.steps, first.epochs
    evaluation = dataclasses.replace(
        first.evaluation,
        every=max(1, steps // 20) if steps is not None else None,
        patience=None,  # an early stop would be a smaller budget
    )
    served = zoo.paper(first.paper).serving(first.model)
    data, fields = data_of_all(served, data), shape_fields(served)
    shapes = {field: getattr(first.model, field) for field in fields}
    for name, recipe in found.items():
        if missing := [field for field in fields if not hasattr(recipe.model, field)]:
            raise UserError(f"{name} has no {' and '.join(missing)}, unlike {first_name}: they take other inputs")
    return [
        Contender(
            name,
            dataclasses.replace(
                recipe,
                model=dataclasses.replace(recipe.model, **shapes),
                data=data,
                data_dir=data_dir,
                steps=steps,
                epochs=None if steps is not None else epochs,
                batch_size=first.batch_size if batch_size is None else batch_size,
                evaluation=evaluation,
                seed=0,
            ),
        )
        for name, recipe in found.items()
    ]


def compare(
    chosen: Sequence[Contender], *, seeds: int, workdir: epath.Path, console: Console | None = None
) -> list[Row]:
    """Trains each with seeds 0 to `seeds` - 1, or goes on with that, and writes comparison.csv and comparison.png.

    The rows of the table are returned; to the first process, if there are several.
    """
    console = console or Console(stderr=True, quiet=not distributed.is_first())
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, not {seeds}")
    sizes = [_size(contender.recipe) for contender in chosen]  # all are checked before the first one trains
    task = zoo.paper(chosen[0].recipe.paper).serving(chosen[0].recipe.model).task
    results: list[list[dict[str, float]]] = []
    for number, contender in enumerate(chosen):
        results.append([])
        for seed in range(seeds):
            done = number * seeds + seed
            console.print(f"\n{contender.name}, seed {seed}: run {done + 1} of {len(chosen) * seeds}", highlight=False)
            scores = train(contender.seeded(seed), contender.folder(workdir, seed), console=console)
            results[-1].append({name.removeprefix("test/"): value for name, value in scores.items()})

    if not distributed.is_first():  # the run folders are the first process's
        return []
    metrics = [name for name in results[0][0] if "/" not in name]
    rows = [
        Row(contender.name, {m: [r[m] for r in runs] for m in metrics}, _seconds(contender, workdir, seeds), *size)
        for contender, runs, size in zip(chosen, results, sizes, strict=True)
    ]
    # A baseline has no weights and sees the data alone, which is the same for all: the first one's is everyone's.
    rows += [Row(name, {m: [r[f"{name}/{m}"] for r in results[0]] for m in metrics}) for name in sorted(task.baselines)]
    (workdir / TABLE_FILE).write_text(_csv(rows, metrics))
    _plot(chosen, workdir, seeds, task.metric)
    first = chosen[0].recipe
    length = f"{first.steps} steps" if first.steps is not None else f"{first.epochs} epochs"
    title = f"{first.data}, test split: {length} of {first.batch_size}, {seeds} seed{'s' * (seeds > 1)}"
    Console().print(_table(rows, metrics, title))
    console.print(f"wrote {workdir / TABLE_FILE} and {PLOT_FILE} beside it", highlight=False, soft_wrap=True)
    return rows


def _size(recipe: Recipe) -> tuple[int, float]:
    """(parameters, FLOPs an example); the recipe is checked against data and devices on the way."""
    run = prepare(recipe)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.program.state_shapes.params))
    batch = jax.eval_shape(run.splits.train.batch, jax.ShapeDtypeStruct((1,), np.int32))
    return parameters, flops_per_example(run.model, run.program.state_shapes.variables, batch)


def flops_per_example(model, variables, batch) -> float:
    """FLOPs of the forward pass's products on a batch of one, of which only shapes are needed."""
    return matmul_flops(lambda variables, batch: model.apply(variables, batch, train=False), variables, batch).count


def _seconds(contender: Contender, workdir: epath.Path, seeds: int) -> float | None:
    """Of training, without compilation and evaluation: mean over seeds, at the median rate of each run.

    From the rate and not from a clock, because a run may have been interrupted.
    """
    seconds = []
    for seed in range(seeds):
        lines = read_metrics(contender.folder(workdir, seed) / METRICS_FILE)
        rates = [line["examples_per_second"] for line in lines if line.get("examples_per_second")]
        if rates:
            seconds.append(lines[-1]["step"] * contender.recipe.batch_size / float(np.median(rates)))
    return float(np.mean(seconds)) if seconds else None


def _mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _csv(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = [column for metric in metrics for column in (f"{metric}_mean", f"{metric}_sd")]
    writer.writerow(["paper", "config", "seeds", *columns, "seconds", "parameters", "flops_per_example"])
    for row in rows:
        paper, _, config = row.name.partition(":")
        scores = [value for metric in metrics for value in _mean_and_sd(row.scores[metric])]
        # csv writes None as nothing
        writer.writerow([paper, config, len(row.scores[metrics[0]]), *scores, row.seconds, row.parameters, row.flops])
    return out.getvalue()


def _table(rows: Sequence[Row], metrics: Sequence[str], title: str) -> Table:
    table = Table("paper", title=title)
    for column in (*metrics, "seconds", "parameters", "FLOPs/example"):
        table.add_column(column, justify="right")

    def score(values: Sequence[float]) -> str:
        mean, sd = _mean_and_sd(values)
        return f"{mean:.4f}" if sd is None else f"{mean:.4f} ± {sd:.4f}"

    for row in rows:
        table.add_row(
            row.name.replace("_", " ") if row.parameters is None else row.name,
            *(score(row.scores[metric]) for metric in metrics),
            "" if row.seconds is None else f"{row.seconds:.1f}",
            "" if row.parameters is None else f"{row.parameters:,}",
            "" if row.flops is None else f"{row.flops:.3g}",
        )
    return table


def _curves(contender: Contender, workdir: epath.Path, seeds: int, metric: str) -> Iterator[dict[int, float]]:
    for seed in range(seeds):
        lines = read_metrics(contender.folder(workdir, seed) / METRICS_FILE)
        yield {line["step"]: line[f"valid/{metric}"] for line in lines if line.get(f"valid/{metric}") is not None}


def _plot(chosen: Sequence[Contender], workdir: epath.Path, seeds: int, metric: str) -> None:
    """Validation metric over the steps: the mean line, and a band of one standard deviation to either side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for contender in chosen:
        curves = list(_curves(contender, workdir, seeds, metric))
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = np.asarray([[curve[step] for step in steps] for curve in curves])
        mean, sd = values.mean(axis=0), values.std(axis=0, ddof=min(1, seeds - 1))
        (line,) = axes.plot(steps, mean, marker="o", markersize=3, label=contender.name)
        axes.fill_between(steps, mean - sd, mean + sd, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel=f"valid {metric}")
    axes.legend(frameon=False)
    with (workdir / PLOT_FILE).open("wb") as file:
        figure.savefig(file, dpi=110, format="png")
