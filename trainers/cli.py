"""The `zoo` command."""

import argparse
import contextlib
import dataclasses
import functools
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from etils import epath
from rich.console import Console
from rich.table import Table

from zoo.catalogue import closest, entries, entry
from zoo.errors import UserError

__all__ = ["main"]

Slug = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PAPER", help="The paper's short name; `zoo list`.")]


def list_(
    room: str | None = None,
    task: str | None = None,
    kind: str | None = None,
    fidelity: str | None = None,
    status: Literal["works", "planned"] | None = None,
    data: bool = False,
) -> None:
    """List the papers, all of them or those with given properties; or the data sets.

    Args:
        room: vision, spatial, series, signals, language, multimodal, generation, graphs, ...
        task: forecasting, classification, segmentation, language_modelling, ...
        kind: model, intervention, theory, optimizer or system.
        fidelity: exact (equals the official code), partial, or reading (no official code exists).
        status: works or planned.
        data: List the data sets instead.
    """
    console = Console()
    if data:
        from trainers.data import DATASETS

        table = Table("data set", "task", "what", "licence", title="data sets")
        for name, facts in DATASETS.items():
            table.add_row(name, facts.task, facts.description, facts.licence)
        console.print(table)
        return
    from zoo.registry import papers

    chosen = papers(room=room, task=task, kind=kind, fidelity=fidelity, status=status)
    table = Table("paper", "room", "kind", "task", "status", "title", title=f"{len(chosen)} of {len(entries())} papers")
    for e in chosen:
        table.add_row(e.slug, e.room, e.kind, e.task, e.fidelity or e.status, e.title)
    console.print(table)


def show(paper: Slug) -> None:
    """Show what is known of a paper: source, fidelity, configurations, recipes, results."""
    row = entry(paper)
    console = Console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts = {
        "title": row.title,
        "arXiv": row.arxiv and f"https://arxiv.org/abs/{row.arxiv}",
        "official code": row.code and f"https://github.com/{row.code} @ {row.commit} (licence: {row.licence})",
        "room, kind, task": f"{row.room}, {row.kind}, {row.task}",
        "status": {"": "planned", "exact": "works; equals the official code on golden cases"}.get(
            row.fidelity, f"works; fidelity: {row.fidelity}"
        ),
    }
    for name, value in facts.items():
        if value:
            table.add_row(f"[bold]{name}[/bold]", value)
    console.print(table)
    if row.status == "planned":
        return
    import jax

    import zoo
    from trainers.recipe import named_recipes
    from zoo.registry import variable_shapes

    record = zoo.paper(paper)
    for quirk in record.quirks:
        console.print(f"  - {quirk}", highlight=False)
    recipes = named_recipes(paper)
    table = Table(
        "config", "parameters", "recipe: data", "batch", "length", title="configurations", title_justify="left"
    )
    for name, config in record.configs.items():
        count = sum(s.size for s in jax.tree.leaves(variable_shapes(record, record.model(config))["params"]))
        recipe = recipes.get(name)
        length = (f"{recipe.steps} steps" if recipe.steps else f"{recipe.epochs} epochs") if recipe else ""
        table.add_row(
            name, f"{count:,}", recipe.data if recipe else "-", str(recipe.batch_size) if recipe else "-", length or "-"
        )
    console.print(table)
    for data, metrics in record.reported.items():
        console.print(f"reported on {data}: " + ", ".join(f"{k} {v}" for k, v in metrics.items()), highlight=False)
    console.print(f"\ntrain it:  zoo train {paper}", highlight=False)


def train(argv: Sequence[str]) -> None:
    from trainers.loop import train as run_training
    from trainers.recipe import Recipe, recipe_for

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("paper", nargs="?")
    first.add_argument("--config", default="tiny")
    known, rest = first.parse_known_args(argv)
    wants_help = "-h" in argv or "--help" in argv
    if known.paper is None and not wants_help:
        raise UsageError("zoo train needs the name of a paper, for example: zoo train ister")
    slug = known.paper if known.paper is not None else "ister"
    recipe = recipe_for(slug, known.config)

    arguments = dataclasses.make_dataclass(
        "Train",
        [
            (
                "recipe",
                Annotated[Recipe[type(recipe.model)], tyro.conf.arg(name="")],
                dataclasses.field(default=recipe),
            ),
            ("workdir", str, dataclasses.field(default=f"runs/{slug}")),
        ],
    )
    arguments.__doc__ = "Arguments:\n    workdir: The run folder; the same command again goes on where it stopped."
    if wants_help:
        print(
            "usage: zoo train PAPER [--config NAME] [OPTIONS]\n\nTrain a paper's model, or go on with its run. "
            f"Below, the defaults of\n`zoo train {slug} --config {known.config}`; `zoo show {slug}` lists them.\n"
        )
    parsed = _parse(arguments, rest, prog=f"zoo train {slug}")
    run_training(parsed.recipe, epath.Path(parsed.workdir).expanduser())


def eval_(paper: Slug, workdir: str | None = None, data_dir: str | None = None) -> None:
    """Evaluate a trained run on the test split of its data.

    Args:
        workdir: The run folder (default: runs/PAPER).
        data_dir: Where the data set's files are now, if not where training found them.
    """
    from trainers.loop import evaluate_run

    evaluate_run(_run_folder(paper, workdir), data_dir=data_dir)


def predict(paper: Slug, workdir: str | None = None, data_dir: str | None = None, output: str | None = None) -> None:
    """Predict with a trained run what comes after the last row of its data; writes a csv and a picture.

    Args:
        workdir: The run folder (default: runs/PAPER).
        data_dir: Where the data set's files are now, if not where training found them.
        output: The csv to write (default: WORKDIR/prediction.csv); the picture lies beside it.
    """
    from trainers.predict import predict_run

    folder = _run_folder(paper, workdir)
    predict_run(folder, data_dir=data_dir, output=Path(output) if output else Path(folder / "prediction.csv"))


def _run_folder(paper: str, workdir: str | None) -> epath.Path:
    from trainers.loop import read_recipe

    entry(paper)
    folder = epath.Path(workdir or f"runs/{paper}").expanduser()
    if (recipe := read_recipe(folder)).paper != paper:
        raise UserError(f"{folder} is a run of {recipe.paper}, not of {paper}: give its folder with --workdir")
    return folder


def convert(
    source: Annotated[str, tyro.conf.Positional],
    destination: Annotated[str, tyro.conf.Positional],
    paper: str | None = None,
    config: str = "tiny",
    hparams: str | None = None,
    to: Literal["zoo", "official"] = "zoo",
) -> None:
    """Convert weights: official file to ours, ours to official, or between our formats.

    SOURCE is a run folder, a model saved by the zoo, or (with --paper) a file of official weights. DESTINATION ends in
    .safetensors or .npz, or is a folder to be made (Orbax). Existing files are never overwritten.

    Args:
        source: Weights to read: a path, gs://..., or hf://owner/name/file.
        destination: Where to write.
        paper: SOURCE holds official weights of this paper.
        config: Which of the paper's configurations they belong to.
        hparams: A json file with the official constructor arguments, instead of --config.
        to: Names and layout of the result: zoo, or official (.safetensors or .npz only).
    """
    import json

    import zoo
    from zoo.weights.io import load_official, save_official

    if paper is None:
        model, variables = zoo.load(source)
    else:
        settings = None
        if hparams is not None:
            try:
                settings = json.loads(Path(hparams).read_text())
            except (OSError, ValueError) as error:
                raise UserError(f"--hparams {hparams} is not a readable json file: {error}") from error
        model, variables = load_official(source, paper, hparams=settings, config=config)
    (save_official if to == "official" else zoo.save)(destination, model, variables)
    print(f"wrote {destination}")


COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "list": (list_, "the papers of the zoo, and the data sets (--data)"),
    "show": (show, "one paper: source, fidelity, configurations, results"),
    "train": (train, "train a paper's model; the same command again resumes"),
    "eval": (eval_, "test metrics of a trained run"),
    "predict": (predict, "predict with a trained run"),
    "convert": (convert, "weights between official files and the zoo's formats"),
}


class UsageError(Exception):
    """The command line itself is wrong: exit code 2."""


def _parse(target: Any, argv: Sequence[str], *, prog: str) -> Any:
    """tyro's parse, its boxed error reduced to one line."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(target, args=list(argv), prog=prog)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_one_line(captured.getvalue(), prog)) from None


def _one_line(box: str, prog: str) -> str:
    """What went wrong, as one sentence, from the panel that tyro draws."""
    text = " ".join(re.sub(r"[│╭╮╰╯─]+", " ", box).split())
    help_hint = f"`{prog} --help` shows the options"
    if found := re.search(r"Unrecognized options: (\S+?),? ", text):
        near = re.search(r"Perhaps you meant: (--\S+)", text)
        return f"{prog} has no option {found[1]}; " + (f"did you mean {near[1]}?" if near else help_hint)
    if found := re.search(r"Missing from [^:]*: (\S+)", text):
        return f"{prog} needs {found[1]}; {help_hint}"
    if found := re.search(r"Error parsing (\S+): (.*?) Argument helptext: \S+ (.*?) (?:For full helptext|$)", text):
        got = re.findall(r"'([^']*)'", found[2])
        wanted = re.match(r"(?:\{None\} ?\|? ?)?(\{[^}]*\}|[A-Z]+)?", found[3])[1]
        return f"{prog}: {found[1]} wants {wanted or 'another value'}, not {got[-1] if got else 'that'!r}; {help_hint}"
    return f"{prog}: {text}"


def _deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The command with its arguments bound, to be called once parsing, and the capture of its errors, is over."""

    @functools.wraps(command)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    return bind


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. Exit codes: 0 done, 1 an error the user can fix, 2 wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(
            "usage: zoo COMMAND [OPTIONS]\n\nThe JAX/Flax zoo of papers on attention and what replaces it.\n\ncommands:"
        )
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:<{width}}  {what}")
        print("\nStart with:  zoo train ister\nAll options of a command:  zoo COMMAND --help")
        sys.exit(0 if argv else 2)
    try:
        name, *rest = argv
        if name == "--version":
            import importlib.metadata

            print(importlib.metadata.version("attention-zoo"))
            return
        if name not in COMMANDS:
            raise UsageError(f"zoo has no command {name!r}{closest(name, COMMANDS)}")
        command = COMMANDS[name][0]
        if name == "train":
            command(rest)
        else:
            _parse(_deferred(command), rest, prog=f"zoo {name}")()
    except UsageError as error:
        print(f"zoo: {error}", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        if os.environ.get("ZOO_TRACEBACK"):
            traceback.print_exc()
        print(f"zoo: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nzoo: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
