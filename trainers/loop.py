"""One training run from recipe to test metrics, resumable at any moment."""

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from rich.console import Console

import zoo
from trainers import datasets
from trainers.checkpoints import RunCheckpoints
from trainers.logs import MetricsLog, TrainingProgress, plot_curves
from trainers.optimizers import learning_rate, make_optimizer
from trainers.recipe import Recipe, differences
from trainers.sharding import make_mesh, replicated
from trainers.step import Program, TrainState, make_program
from zoo.errors import UserError
from zoo.weights.io import WEIGHTS

__all__ = ["RECIPE_FILE", "Run", "evaluate_run", "prepare", "read_recipe", "train"]

RECIPE_FILE = "recipe.yaml"
# A run may go on with its data elsewhere or on other devices: these do not change what is computed.
_NOT_COMPARED = ("data_dir", "mesh", "log_every")


@dataclass
class Progress:
    """What decides when training ends, stored with every checkpoint."""

    best_step: int = 0
    best: float = math.inf
    bad_evaluations: int = 0
    stopped: bool = False
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Run:
    """A recipe made concrete: its data on the device and its compiled functions."""

    recipe: Recipe
    paper: zoo.Paper
    model: Any
    splits: Any
    program: Program
    total_steps: int
    steps_per_epoch: int
    evaluate_every: int


def prepare(recipe: Recipe) -> Run:
    """Checks the recipe against devices and data, places the data, builds the functions; trains nothing."""
    paper = zoo.paper(recipe.paper)
    mesh = make_mesh(recipe.mesh, batch_size=recipe.batch_size)
    splits = datasets.load(paper, recipe)
    steps_per_epoch = len(splits.train) // recipe.batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"batch size {recipe.batch_size} is larger than the training split of {recipe.data}, "
            f"{len(splits.train)} examples: use a smaller --batch-size"
        )
    total_steps = recipe.steps or recipe.epochs * steps_per_epoch
    model = paper.model(recipe.model)
    try:
        program = make_program(
            paper,
            model,
            make_optimizer(recipe.optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch),
            mesh,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            max_steps=recipe.log_every,
            eval_batch_size=recipe.evaluation.batch_size,
            precision=recipe.precision,
        )
    except (ValueError, TypeError, flax.errors.FlaxError) as error:  # the model is traced here, with these sizes
        raise UserError(
            f"this configuration of {paper.slug} does not make a model: {str(error).splitlines()[0]}"
        ) from error
    on_device = jax.device_put((splits.train, splits.valid, splits.test), replicated(mesh))
    splits = dataclasses.replace(splits, **dict(zip(("train", "valid", "test"), on_device, strict=True)))
    every = recipe.evaluation.every or steps_per_epoch
    return Run(recipe, paper, model, splits, program, total_steps, steps_per_epoch, every)


def read_recipe(workdir: epath.Path) -> Recipe:
    """The recipe of an existing run folder."""
    path = workdir / RECIPE_FILE
    if not path.exists():
        raise UserError(f"{workdir} is not a run folder: it holds no {RECIPE_FILE}; `zoo train` makes one")
    return Recipe.from_yaml(path.read_text(), source=os.fspath(path))


def _claim_folder(workdir: epath.Path, recipe: Recipe) -> bool:
    """Makes the run folder this recipe's, or confirms that it is; True if there is a run to go on with."""
    path = workdir / RECIPE_FILE
    if path.exists():
        stored = read_recipe(workdir)
        if changed := differences(stored, recipe, ignore=_NOT_COMPARED):
            raise UserError(
                f"{workdir} holds a run of another recipe ({'; '.join(changed)}): "
                "choose another --workdir, or remove that folder to start over"
            )
        return True
    if workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"{workdir} is not empty and not a run folder: choose another --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        part = workdir / f".{RECIPE_FILE}.part"
        part.write_text(recipe.to_yaml())
        part.replace(path)
    except OSError as error:
        raise UserError(f"{workdir} cannot be written ({error.strerror or error}): choose another --workdir") from error
    return False


def epoch_order(seed: int, epoch: int, examples: int) -> jax.Array:
    """The order in which an epoch visits the training examples: a function of (seed, epoch) and nothing else."""
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    return jnp.asarray(generator.permutation(examples).astype(np.int32))


def train(recipe: Recipe, workdir: epath.Path, *, console: Console | None = None) -> dict[str, float]:
    """Trains, or goes on where the folder's run stopped, and returns the test metrics.

    Training state is saved at every evaluation; a run that was killed repeats the steps since then and ends with the
    same bits as one that was not. The weights of the best validation metric are the result.
    """
    console = console or Console(stderr=True)
    run = prepare(recipe)
    resuming = _claim_folder(workdir, recipe)
    task = run.paper.task
    checkpoints = RunCheckpoints(
        workdir / "checkpoints", keep_best=max(1, recipe.checkpoints.keep_best), lower_is_better=task.lower_is_better
    )
    for name in checkpoints.interrupted:
        console.print(f"ignored an interrupted save of step {name}", highlight=False)

    progress, step = Progress(), 0
    if checkpoints.latest_step is not None:
        step = checkpoints.latest_step
        state, stored = checkpoints.restore(step, run.program.state_shapes, run.program.state_shardings)
        progress = Progress(**stored)
        console.print(f"going on from step {step} of {workdir}", highlight=False, soft_wrap=True)
    else:
        if resuming:
            console.print(
                f"{workdir} has no checkpoint yet: starting from the beginning", highlight=False, soft_wrap=True
            )
        state = run.program.init()

    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    console.print(
        f"{recipe.paper} {recipe.config}: {count:,} parameters; {recipe.data}: {len(run.splits.train):,} training "
        f"examples, {run.steps_per_epoch} steps an epoch; {run.total_steps} steps on {jax.device_count()} "
        f"{jax.default_backend()} device{'s' if jax.device_count() > 1 else ''}",
        highlight=False,
        soft_wrap=True,
    )
    log = MetricsLog(workdir, resume_step=step)
    try:
        state = _run_steps(run, state, step, progress, checkpoints, log, console)
        best_state, _ = checkpoints.restore(progress.best_step, run.program.state_shapes, run.program.state_shardings)
        return _finish(run, best_state, int(state.step), progress, log, workdir, console)
    finally:
        log.close()
        checkpoints.close()


def _run_steps(
    run: Run,
    state: TrainState,
    step: int,
    progress: Progress,
    checkpoints: RunCheckpoints,
    log: MetricsLog,
    console: Console,
) -> TrainState:
    recipe, task = run.recipe, run.paper.task
    rate_at = learning_rate(recipe.optimizer, total_steps=run.total_steps, steps_per_epoch=run.steps_per_epoch)
    save_every = recipe.checkpoints.every or run.evaluate_every
    marks = (run.steps_per_epoch, run.evaluate_every, save_every, recipe.log_every)
    order, order_epoch = None, -1
    compiled = False

    with TrainingProgress(console, total=run.total_steps, done=step) as bar:
        while step < run.total_steps and not progress.stopped:
            epoch, position = divmod(step, run.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(recipe.seed, epoch, len(run.splits.train)), epoch
            # A dispatch never crosses a boundary at which something has to be done.
            chunk = min(*(mark - step % mark for mark in marks), run.total_steps - step)
            started = time.perf_counter()
            state, history = run.program.run(state, run.splits.train, order, position, chunk)
            losses = np.asarray(jax.device_get(history["loss"]))[:chunk]
            seconds = time.perf_counter() - started
            step += chunk
            progress.losses += tuple(float(loss) for loss in losses)

            ends = step == run.total_steps
            evaluates = ends or step % run.evaluate_every == 0
            saves = evaluates or step % save_every == 0
            loss = float(np.mean(progress.losses))
            rate = chunk * recipe.batch_size / seconds
            if saves or step % recipe.log_every == 0:
                line = {"train/loss": loss, "learning_rate": float(rate_at(step - 1))}
                line |= {"train/grad_norm": float(history["grad_norm"][chunk - 1])}
                if compiled:  # the first dispatch's time is compilation
                    line["examples_per_second"] = rate
                log.write(step, line)
                progress.losses = ()
            note = f"loss {loss:.4f}  {rate:,.0f} examples/s" if compiled else f"loss {loss:.4f}"
            compiled = True
            bar.update(step, note)
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss became {loss} before step {step}: lower --optimizer.learning-rate or set "
                    f"--optimizer.clip-norm; the last checkpoint is of step {checkpoints.latest_step}"
                )
            metric = None
            if evaluates:
                scores = _evaluate(run, state.variables, run.splits.valid)
                metric = scores[task.metric]
                value = metric if task.lower_is_better else -metric
                better = value <= progress.best  # of equals the newest: the one that is kept on disk
                progress.bad_evaluations = 0 if value < progress.best else progress.bad_evaluations + 1
                if better:
                    progress.best, progress.best_step = value, step
                patience = recipe.evaluation.patience
                progress.stopped = patience is not None and progress.bad_evaluations >= patience
                log.write(step, {f"valid/{k}": v for k, v in scores.items() if "/" not in k})
                bar.say(
                    f"step {step:>6}  epoch {step / run.steps_per_epoch:5.1f}  train loss {loss:.4f}  "
                    + "  ".join(f"valid {k} {v:.4f}" for k, v in scores.items() if "/" not in k)
                    + ("  (best)" if better else "")
                )
            if saves:
                checkpoints.save(step, state, progress.__dict__ | {"losses": list(progress.losses)}, metric)
    if progress.stopped:
        patience = recipe.evaluation.patience
        console.print(f"stopped early: no better validation {task.metric} in {patience} evaluations", highlight=False)
    return state


def _evaluate(run: Run, variables: Any, split: Any) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(run.program.evaluate(variables, split)).items()}


def _finish(
    run: Run,
    state: TrainState,
    last_step: int,
    progress: Progress,
    log: MetricsLog,
    workdir: epath.Path,
    console: Console,
) -> dict[str, float]:
    """Test metrics of the best weights, their file, and the pictures."""
    task = run.paper.task
    scores = {f"test/{name}": value for name, value in _evaluate(run, state.variables, run.splits.test).items()}
    log.write(last_step, {**scores, "best_step": progress.best_step})
    zoo.save(workdir / WEIGHTS, run.model, jax.device_get(state.variables), overwrite=True)
    plot_curves(workdir, task.metric)
    save_picture(run, state.variables, workdir)
    console.print(score_table(run, scores, f"best weights, of step {progress.best_step}"))
    console.print(f"run folder: {workdir}", highlight=False, soft_wrap=True)
    return scores


def save_picture(run: Run, variables: Any, workdir: epath.Path) -> None:
    """The task's picture for one example of the test split."""
    task = run.paper.task
    if task.picture is None:
        return
    middle = len(run.splits.test) // 2
    batch, outputs = run.program.predict(variables, run.splits.test, jnp.asarray([middle]))
    task.picture(batch, outputs).savefig(workdir / task.picture_name, dpi=110)


def score_table(run: Run, scores: dict[str, float], title: str):
    """Model and baselines side by side."""
    from rich.table import Table

    task = run.paper.task
    metrics = [name.removeprefix("test/") for name in scores if name.count("/") == 1]
    table = Table(title=f"{run.recipe.data}, test split: {title}")
    table.add_column("")
    for metric in metrics:
        table.add_column(metric, justify="right")
    table.add_row(run.recipe.paper, *(f"{scores[f'test/{m}']:.4f}" for m in metrics))
    for name in task.baselines:
        table.add_row(name.replace("_", " "), *(f"{scores[f'test/{name}/{m}']:.4f}" for m in metrics))
    return table


def evaluate_run(
    workdir: epath.Path, *, data_dir: str | None = None, console: Console | None = None
) -> dict[str, float]:
    """Test metrics of the weights that a finished run left in its folder."""
    recipe = read_recipe(workdir)
    if data_dir is not None:
        recipe = dataclasses.replace(recipe, data_dir=data_dir)
    run = prepare(recipe)
    model, variables = zoo.load(workdir)
    if model.config != run.model.config:
        raise UserError(f"{workdir / WEIGHTS} was made by another configuration than {workdir / RECIPE_FILE}")
    scores = {f"test/{name}": value for name, value in _evaluate(run, variables, run.splits.test).items()}
    (console or Console()).print(score_table(run, scores, f"weights of {workdir}"))
    return scores
