"""One training run from recipe to test metrics, resumable at any moment."""

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from rich.console import Console

import zoo
from trainers import datasets, distributed, initial, nonfinite
from trainers.checkpoints import RunCheckpoints, stored_steps
from trainers.compile import utilisation
from trainers.faults import LOCK_FILE, Preemption, explained, locked
from trainers.feed import DeviceFeed, HostFeed, evaluate, make_feed, place, predict, split_report
from trainers.logs import MetricsLog, Speed, TrainingProgress, plot_curves
from trainers.optimizers import learning_rate
from trainers.profile import StepTrace
from trainers.recipe import Recipe, differences
from trainers.sharding import make_mesh, placement_summary, placement_table, placements, recipe_rules
from trainers.step import Program, TrainState, recipe_program
from zoo.errors import UserError
from zoo.weights.io import WEIGHTS

__all__ = ["RECIPE_FILE", "Run", "evaluate_run", "prepare", "read_recipe", "train"]

RECIPE_FILE = "recipe.yaml"
SHARDING_FILE = "sharding.txt"
# A run may go on with its data elsewhere or on other devices: these do not change what is computed.
_NOT_COMPARED = ("data_dir", "data_on", "mesh", "rules", "log_every")


@dataclass
class Progress:
    """What decides when training ends, stored with every checkpoint."""

    best_step: int = 0
    best: float = math.inf
    bad_evaluations: int = 0
    stopped: bool = False
    losses: tuple[float, ...] = ()

    def stored(self) -> dict[str, Any]:
        return self.__dict__ | {"losses": list(self.losses)}


class Splits(NamedTuple):
    """Where `trainers.feed.place` put them."""

    train: Any
    valid: Any
    test: Any


@dataclass(frozen=True)
class Run:
    """A recipe made concrete: its data in place and its compiled functions."""

    recipe: Recipe
    paper: zoo.Paper
    model: Any
    splits: Splits
    program: Program
    total_steps: int
    steps_per_epoch: int
    evaluate_every: int

    def feed(self) -> DeviceFeed | HostFeed:
        """Of training batches; to be closed."""
        return make_feed(
            self.recipe,
            self.program,
            self.splits.train,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )


def prepare(recipe: Recipe) -> Run:
    """Checks the recipe against devices and data, places the data, builds the functions; trains nothing."""
    paper = zoo.paper(recipe.paper).serving(recipe.model)
    mesh = make_mesh(recipe.mesh, batch_size=recipe.batch_size // recipe.accumulate)
    splits = datasets.load(paper, recipe)
    steps_per_epoch = len(splits.train) // recipe.batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"batch size {recipe.batch_size} is larger than the training split of {recipe.data}, "
            f"{len(splits.train)} examples: use a smaller --batch-size"
        )
    total_steps = recipe.steps or recipe.epochs * steps_per_epoch
    model = paper.model(recipe.model)
    constants = paper.constants(recipe.model, splits) if paper.constants else None
    lengths = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
    program = recipe_program(recipe, paper, model, mesh, **lengths, constants=constants)
    splits = Splits(*place((splits.train, splits.valid, splits.test), mesh, recipe.data_on))
    every = recipe.evaluation.every or steps_per_epoch
    return Run(recipe, paper, model, splits, program, total_steps, steps_per_epoch, every)


def read_recipe(workdir: epath.Path) -> Recipe:
    """The recipe of an existing run folder."""
    path = workdir / RECIPE_FILE
    if not path.exists():
        raise UserError(f"{workdir} is not a run folder: it holds no {RECIPE_FILE}; `zoo train` makes one")
    return Recipe.from_yaml(path.read_text(), source=os.fspath(path))


def _check_folder(workdir: epath.Path, recipe: Recipe) -> tuple[bool, list[int]]:
    """Whether there is a run of this recipe to go on with, and its checkpoints; an error if the folder is not free."""
    path = workdir / RECIPE_FILE
    if path.exists():
        stored = read_recipe(workdir)
        if changed := differences(stored, recipe, ignore=_NOT_COMPARED):
            raise UserError(
                f"{workdir} holds a run of another recipe ({'; '.join(changed)}): "
                "choose another --workdir, or remove that folder to start over"
            )
        return True, stored_steps(workdir / "checkpoints")
    # A process killed at its very beginning leaves no more than these.
    ours = {LOCK_FILE, f".{RECIPE_FILE}.part"}
    if workdir.exists() and any(path.name not in ours for path in workdir.iterdir()):
        raise UserError(f"{workdir} is not empty and not a run folder: choose another --workdir")
    return False, []


def _claim_folder(workdir: epath.Path, recipe: Recipe) -> None:
    """Makes the folder, whose lock is held, this recipe's."""
    part = workdir / f".{RECIPE_FILE}.part"
    part.write_text(recipe.to_yaml())
    part.replace(workdir / RECIPE_FILE)


def train(
    recipe: Recipe, workdir: epath.Path, *, console: Console | None = None, profile: bool = False
) -> dict[str, float]:
    """Trains, or goes on where the folder's run stopped, and returns the test metrics.

    Training state is saved at every evaluation; a run that was killed repeats the steps since then and ends with the
    same bits as one that was not. The weights of the best validation metric are the result. SIGTERM and SIGINT save
    and end the run with `trainers.faults.Interrupted`. With `profile`, a trace of a few steps is left in the folder.
    """
    console = console or Console(stderr=True, quiet=not distributed.is_first())
    with Preemption() as preemption:
        run = prepare(recipe)
        with explained(recipe, workdir), contextlib.ExitStack() as held:
            resuming, steps = distributed.on_first(lambda: _check_folder(workdir, recipe))
            # Made before anything is written, so that initial weights which do not fit leave no folder behind.
            fresh = None if steps else initial.initial_state(run.program, recipe.init_from)

            def claim() -> None:
                held.enter_context(locked(workdir))
                if _check_folder(workdir, recipe) != (resuming, steps):
                    raise UserError(f"another process has just written to {workdir}: run the same command again")
                if not resuming:
                    _claim_folder(workdir, recipe)

            distributed.on_first(claim)
            trace = StepTrace(workdir if profile and distributed.is_first() else None, console)
            return _train(run, workdir, fresh, preemption, trace, console, resuming=resuming)


def _train(
    run: Run,
    workdir: epath.Path,
    fresh: tuple[TrainState, initial.Report | None] | None,
    preemption: Preemption,
    trace: StepTrace,
    console: Console,
    *,
    resuming: bool,
) -> dict[str, float]:
    recipe = run.recipe
    checkpoints = RunCheckpoints(
        workdir / "checkpoints",
        keep_best=max(1, recipe.checkpoints.keep_best),
        keep_every=recipe.checkpoints.keep_every,
        lower_is_better=run.paper.task.lower_is_better,
        recipe=recipe.to_yaml(),
    )
    with contextlib.closing(checkpoints):
        say = functools.partial(console.print, highlight=False, soft_wrap=True)
        for name in checkpoints.interrupted:
            say(f"ignored an interrupted save of step {name}")
        if fresh is None:
            state, step, progress, skipped = _restore(run, checkpoints)
            for line in skipped:
                say(line)
            best = f"; the best validation so far is of step {progress.best_step}" if progress.best_step else ""
            say(f"restored step {step} of {run.total_steps} from {workdir}: weights, optimiser state, data order{best}")
        else:
            (state, report), step, progress = fresh, 0, Progress()
            if resuming:
                say(f"{workdir} has no checkpoint yet: starting from the beginning")
            if report is not None:
                if distributed.is_first():
                    (workdir / initial.REPORT_FILE).write_text(report.text() + "\n")
                say(report.text(shown=10))
        _describe(run, state, workdir, say)
        with contextlib.closing(MetricsLog(workdir, resume_step=step)) as log:
            state = _run_steps(run, state, step, progress, checkpoints, log, workdir, preemption, trace, console)
            trace.report()
            if not progress.best_step:
                raise UserError(
                    f"no evaluation gave a number as valid/{run.paper.task.metric}: nothing to call the best"
                )
            shapes, shardings = run.program.state_shapes, run.program.state_shardings
            best_state, _ = checkpoints.restore(progress.best_step, shapes, shardings)
            return _finish(run, best_state, int(state.step), progress, log, workdir, console)


def _restore(run: Run, checkpoints: RunCheckpoints) -> tuple[TrainState, int, Progress, list[str]]:
    """(state, step, progress, lines on what was skipped) of the newest checkpoint."""
    step, state, stored, skipped = checkpoints.restore_newest(run.program.state_shapes, run.program.state_shardings)
    return state, step, Progress(**stored), skipped


def _describe(run: Run, state: TrainState, workdir: epath.Path, say: Callable[[str], None]) -> None:
    """What is about to run, on the console, and how it lies on the devices, in a file."""
    recipe = run.recipe
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    say(
        f"{recipe.paper} {recipe.config}: {count:,} parameters; {recipe.data}: {len(run.splits.train):,} training "
        f"examples, {run.steps_per_epoch} steps an epoch; {run.total_steps} steps on {jax.device_count()} "
        f"{jax.default_backend()} device{'s' if jax.device_count() > 1 else ''}"
        + (f" of {jax.process_count()} processes" if distributed.several() else "")
    )
    rows = placements(run.program.state_shapes.params, run.program.mesh, recipe_rules(recipe.rules))
    if distributed.is_first():
        (workdir / SHARDING_FILE).write_text(f"mesh {recipe.mesh}\n\n{placement_table(rows)}")
    if run.program.mesh.size > 1:
        say(placement_summary(rows))


def _run_steps(
    run: Run,
    state: TrainState,
    step: int,
    progress: Progress,
    checkpoints: RunCheckpoints,
    log: MetricsLog,
    workdir: epath.Path,
    preemption: Preemption,
    trace: StepTrace,
    console: Console,
) -> TrainState:
    recipe, task = run.recipe, run.paper.task
    rate_at = learning_rate(recipe.optimizer, total_steps=run.total_steps, steps_per_epoch=run.steps_per_epoch)
    save_every = recipe.checkpoints.every or run.evaluate_every
    keep_every = recipe.checkpoints.keep_every or run.total_steps
    marks = (run.steps_per_epoch, run.evaluate_every, save_every, keep_every, recipe.log_every)
    speed = Speed(run.splits.train, recipe.batch_size)
    mfu = utilisation(recipe, run.program.mesh.size)

    with (
        TrainingProgress(console, total=run.total_steps, done=step) as bar,
        contextlib.closing(run.feed()) as feed,
        preemption.deferred(),
    ):
        while step < run.total_steps and not progress.stopped:
            # A dispatch never crosses a boundary at which something has to be done.
            chunk = trace.limit(min(*(mark - step % mark for mark in marks), run.total_steps - step))
            if not speed.compiled:  # by taking no steps
                state = speed.compile(bar.say, feed.compile, state, step)
            started = time.perf_counter()
            with trace.dispatch(step):
                state, history = feed.advance(state, step, chunk)
            losses = history["loss"]
            seconds = time.perf_counter() - started
            step += chunk
            progress.losses += tuple(float(loss) for loss in losses)

            ends = step == run.total_steps
            evaluates = ends or step % run.evaluate_every == 0
            saves = evaluates or step % save_every == 0 or step % keep_every == 0
            # Weights can be beyond repair a step before the loss shows it: they must not be saved.
            broken = not np.isfinite(losses).all() or (saves and not nonfinite.all_finite(state.params))
            loss = float(np.mean(progress.losses))
            if saves or broken or step % recipe.log_every == 0:
                line = {"train/loss": loss, "learning_rate": float(rate_at(step - 1))}
                line |= {"train/grad_norm": float(history["grad_norm"][-1])}
                line |= {**speed.line(chunk / seconds), **mfu(chunk / seconds)}
                log.write(step, line)
                progress.losses = ()
            bar.update(step, f"loss {loss:.4f}  {speed.note(chunk / seconds)}")
            if broken:
                first = step - chunk + nonfinite.first_bad_step(losses, history["grad_norm"])
                bar.say(f"not finite at step {first}: repeating the steps up to there, to look inside")
                raise UserError(_nonfinite(run, first, checkpoints, workdir))
            metric = None
            if evaluates:
                scores = evaluate(run.program, state.variables, run.splits.valid)
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
                checkpoints.save(step, state, progress.stored(), metric)
            if preemption.requested_anywhere() and not (ends or progress.stopped):  # else what remains takes a moment
                if not saves:
                    checkpoints.save(step, state, progress.stored(), None)
                checkpoints.wait()
                raise preemption.interrupted(f"stopped and saved at step {step} of {run.total_steps}")
    if progress.stopped:
        patience = recipe.evaluation.patience
        console.print(f"stopped early: no better validation {task.metric} in {patience} evaluations", highlight=False)
    return state


def _nonfinite(run: Run, step: int, checkpoints: RunCheckpoints, workdir: epath.Path) -> str:
    """Repeats the run up to that step, looks at what the step computes, and says so."""
    checkpoints.wait()
    if checkpoints.latest_step is None:
        (state, _), done = initial.initial_state(run.program, run.recipe.init_from), 0
        kept = "there was no checkpoint yet"
    else:
        state, done, _, _ = _restore(run, checkpoints)
        kept = f"the last good checkpoint is of step {done}"
    with contextlib.closing(run.feed()) as feed:
        while done < step:
            position = done % run.steps_per_epoch
            chunk = min(run.steps_per_epoch - position, run.recipe.log_every, step - done)
            state, _ = feed.advance(state, done, chunk)
            done += chunk
        batch = feed.batch(step)
    finding = nonfinite.examine(run.program, state, batch, parts=run.recipe.accumulate)
    folder = nonfinite.write_report(workdir, step, batch, finding, kept)
    return (
        f"the loss or the weights are no longer finite after step {step}; first is {finding.where} ({folder} has the "
        f"batch and a report): lower --optimizer.learning-rate or set --optimizer.clip-norm; {kept}"
    )


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
    scores = {f"test/{name}": value for name, value in _test(run, state.variables).items()}
    log.write(last_step, {**scores, "best_step": progress.best_step})
    variables = distributed.gathered(state.variables)
    if distributed.is_first():
        zoo.save(workdir / WEIGHTS, run.model, variables, overwrite=True)
        plot_curves(workdir, task.metric)
    save_picture(run, state.variables, workdir)
    log.pictures(workdir, last_step)
    console.print(score_table(run, scores, f"best weights, of step {progress.best_step}"))
    console.print(f"run folder: {workdir}", highlight=False, soft_wrap=True)
    return scores


def _test(run: Run, variables: Any) -> dict[str, float]:
    return split_report(run.program, variables, run.splits.test, tuned_on=run.splits.valid)


def save_picture(run: Run, variables: Any, workdir: epath.Path) -> None:
    """The task's picture for one example of the test split."""
    task = run.paper.task
    if task.picture is None:
        return
    middle = len(run.splits.test) // 2
    batch, outputs = predict(run.program, variables, run.splits.test, np.asarray([middle]))
    if distributed.is_first():
        with (workdir / task.picture_name).open("wb") as file:
            task.picture(batch, outputs).savefig(file, format="png", dpi=110)


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
        # A baseline may lack some: the last echo says nothing of what the camera sees.
        found = [scores.get(f"test/{name}/{m}") for m in metrics]
        table.add_row(name.replace("_", " "), *("-" if score is None else f"{score:.4f}" for score in found))
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
    scores = {f"test/{name}": value for name, value in _test(run, variables).items()}
    (console or Console()).print(score_table(run, scores, f"weights of {workdir}"))
    return scores
