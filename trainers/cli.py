"""The `zoo` command."""

import argparse
import contextlib
import dataclasses
import functools
import io
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from etils import epath
from rich.console import Console
from rich.table import Table

from trainers.host_memory import keep_freed_memory
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

        table = Table("data set", "task", "size", "what", "licence", title=f"{len(DATASETS)} data sets")
        for name, facts in DATASETS.items():
            names = "\n".join([name, *(f"  /{member}" for member in facts.members), *["  /..."] * facts.other_members])
            table.add_row(names, facts.task, facts.size, facts.description, facts.licence)
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
    if record.demo is not None:
        configs = ", ".join(record.demo.configs)
        console.print(f"\ncompute its claims:  zoo demo {paper}  (--config {configs})", highlight=False)
    if record.model is None:
        return
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


def _starting_recipe(command: str, argv: Sequence[str], wants_help: bool) -> tuple[Any, list[str]]:
    """The recipe that `[PAPER] [--config NAME | --config-file FILE]` names, and the other arguments."""
    from trainers.recipe import recipe_for, recipe_from_file

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config")
    first.add_argument("--config-file")
    try:
        known, rest = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(f"zoo {command}: {error.argument_name} wants a value") from error
    paper = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if known.config_file is not None:
        recipe = recipe_from_file(known.config_file)
        if paper not in (None, recipe.paper):
            raise UserError(f"--config-file {known.config_file} is a recipe of {recipe.paper}, not of {paper}")
        if known.config is not None:
            raise UserError(
                f"--config {known.config} and --config-file {known.config_file} both say where to start: give one"
            )
        return recipe, rest
    if paper is None and not wants_help:
        raise UsageError(f"zoo {command} needs the name of a paper, for example: zoo {command} ister")
    return recipe_for(paper or "ister", known.config or "tiny"), rest


def _recipe_arguments(command: str, argv: Sequence[str], about: str, **own: tuple[type, Any, str]) -> Any:
    """A parsed command line PAPER [--config NAME] [fields of its recipe] [options of the command itself]."""
    from trainers.recipe import Recipe

    wants_help = "-h" in argv or "--help" in argv
    recipe, rest = _starting_recipe(command, argv, wants_help)
    slug = recipe.paper
    config_file = {
        "config_file": (str | None, None, "Start from the recipe in this yaml file, e.g. a run folder's recipe.yaml.")
    }

    arguments = dataclasses.make_dataclass(
        command.capitalize(),
        [
            (
                "recipe",
                Annotated[Recipe[type(recipe.model)], tyro.conf.arg(name="")],
                dataclasses.field(default=recipe),
            ),
            *(
                (name, Annotated[kind, tyro.conf.arg(help=text)], dataclasses.field(default=default))
                for name, (kind, default, text) in (own | config_file).items()
            ),
        ],
    )
    arguments.__doc__ = ""
    if wants_help:
        print(
            f"usage: zoo {command} PAPER [--config NAME | --config-file FILE] [OPTIONS]\n\n{about}\n"
            f"Below, the defaults of `zoo {command} {slug} --config {recipe.config}`; `zoo show {slug}` lists them.\n"
        )
    return _parse(arguments, rest, prog=f"zoo {command} {slug}")


def train(argv: Sequence[str]) -> None:
    from trainers.loop import train as run_training
    from trainers.recipe import save_recipe

    parsed = _recipe_arguments(
        "train",
        argv,
        "Train a paper's model, or go on with its run.",
        workdir=(
            str | None,
            None,
            "The run folder (default: runs/PAPER); the same command again goes on where it stopped.",
        ),
        save_config=(str | None, None, "Write the recipe that these options make to this yaml file, and do not train."),
        profile=(bool, False, "Write a trace of a few steps into the run folder."),
        coordinator=(
            str | None,
            None,
            "Of several processes: host:port of the first. Not needed on Cloud TPU, GKE and Slurm.",
        ),
        process=(str | None, None, "Of several processes: which one this is, the first of four being 0/4."),
    )
    if parsed.save_config is not None:
        save_recipe(parsed.recipe, parsed.save_config)
        print(f"wrote {parsed.save_config}")
        return
    workdir = epath.Path(parsed.workdir or f"runs/{parsed.recipe.paper}").expanduser()
    with _joined(parsed.coordinator, parsed.process):
        run_training(parsed.recipe, workdir, profile=parsed.profile)


@contextlib.contextmanager
def _joined(coordinator: str | None, process: str | None) -> Iterator[None]:
    """Inside, this process is one of all that run the command together."""
    from trainers import distributed

    distributed.connect(coordinator, process)
    try:
        yield
    except UserError as error:
        if distributed.several():  # waiting for the others to say good-bye would take minutes
            print(f"zoo: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        raise


def demo(argv: Sequence[str]) -> None:
    from trainers.demo import demo_of, demonstrate
    from zoo.paper import named_config

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", default="tiny")
    try:
        known, rest = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(f"zoo demo: {error.argument_name} wants a value") from error
    wants_help = "-h" in argv or "--help" in argv
    slug = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if slug is None:
        if wants_help:
            print(
                "usage: zoo demo PAPER [--config NAME] [OPTIONS]\n\nCompute the claims of a paper: each measured "
                "quantity beside its bounds, as a table, json and pictures.\nExit code 1 where one does not hold. "
                "`zoo list --kind theory` lists papers, `zoo demo PAPER --help` the options."
            )
            return
        raise UsageError("zoo demo needs the name of a paper, for example: zoo demo covariance_readout")
    config = named_config(demo_of(slug), known.config, {}, slug=slug)
    arguments = dataclasses.make_dataclass(
        "Demo",
        [
            ("config", Annotated[type(config), tyro.conf.arg(name="")], dataclasses.field(default=config)),
            ("seed", Annotated[int, tyro.conf.arg(help="Of everything that is drawn at random.")], 0),
            ("output", Annotated[str, tyro.conf.arg(help="Folder for json and pictures.")], "runs/demo"),
        ],
    )
    arguments.__doc__ = f"Compute the claims of {slug}. Configs (--config): {', '.join(demo_of(slug).configs)}."
    parsed = _parse(arguments, rest, prog=f"zoo demo {slug}")
    demonstrate(slug, parsed.config, seed=parsed.seed, output=Path(parsed.output).expanduser())


def compile_(argv: Sequence[str]) -> None:
    from trainers.compile import compile_recipe

    parsed = _recipe_arguments(
        "compile",
        argv,
        "Compile the training step of a recipe, without data and, for a TPU, without one: memory of each device,\n"
        "arithmetic, communication, the least time of a step and what limits it, as text and json.",
        topology=(str, "local", "The devices: local, or a TPU slice such as v5e:4x4, v5p:2x2x1, v6e:4x4."),
        output=(str, "runs/compile", "Folder for the report; earlier ones stay."),
    )
    compile_recipe(parsed.recipe, topology=parsed.topology, output=Path(parsed.output).expanduser())


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
    to: Literal["zoo", "official", "hf"] = "zoo",
    dtype: str | None = None,
) -> None:
    """Convert weights: official file or hub folder to ours, ours to official, or between our formats.

    SOURCE is a run folder, a model saved by the zoo, a folder or repository in the hub's layout (config.json and
    safetensors), or (with --paper) a file of official weights. DESTINATION ends in .safetensors or .npz, or is a folder
    to be made: Orbax, or with --to hf the hub's layout. Existing files are never overwritten.

    Args:
        source: Weights to read: a path, gs://..., hf://owner/name or hf://owner/name/file.
        destination: Where to write.
        paper: SOURCE holds official weights of this paper (or backbone_NAME) and no config.json.
        config: Which of the paper's configurations they belong to.
        hparams: A json file with the official constructor arguments, instead of --config.
        to: Names and layout of the result: zoo, official (.safetensors or .npz only), or hf (a folder; backbones only).
        dtype: The type that the floating weights take, such as bfloat16 (default: the one they have).
    """
    import json

    import jax
    import jax.numpy as jnp

    import zoo
    from zoo.weights.io import load_official, save_official

    if dtype is not None and dtype not in ("float32", "float16", "bfloat16"):
        raise UserError(f"--dtype {dtype} is not one of float32, float16, bfloat16")
    if paper is None:
        model, variables = zoo.load(source, dtype=dtype)
    else:
        settings = None
        if hparams is not None:
            try:
                settings = json.loads(Path(hparams).read_text())
            except (OSError, ValueError) as error:
                raise UserError(f"--hparams {hparams} is not a readable json file: {error}") from error
        model, variables = load_official(source, paper, hparams=settings, config=config)
        if dtype is not None:
            cast = jnp.dtype(dtype)
            variables = jax.tree.map(
                lambda x: x.astype(cast) if jnp.issubdtype(x.dtype, jnp.floating) else x, variables
            )
    if to == "official":
        save_official(destination, model, variables)
    else:
        zoo.save(destination, model, variables, layout=to)
    print(f"wrote {destination}")


def compare(
    papers: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="PAPER[:CONFIG] ...", help="Papers of one task, or one paper in several configs."),
    ] = (),
    data: str = "standin",
    data_dir: str | None = None,
    seeds: int = 3,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    config: str | None = None,
    workdir: str | None = None,
    coordinator: str | None = None,
    process: str | None = None,
) -> None:
    """Train several papers of one task on the same data under equal budget; writes a table and a plot.

    Each paper keeps its own model and optimiser; data, batch size, steps and seeds are the same, nobody stops early,
    and the best weights by the validation split are tested. What is not given is as in the recipe of the first one,
    and so is what an example is (for forecasting, look-back and horizon). The same command again goes on where it
    stopped, and with more seeds trains only the new ones. WORKDIR gets comparison.csv, comparison.png and a run folder
    for each paper and seed.

    Args:
        data: The data set; `zoo list --data` shows them.
        data_dir: A folder that holds its original files.
        seeds: How many runs of each: seeds 0, 1, ...
        steps: Optimiser steps of each run.
        epochs: Passes over the training split, instead of steps.
        batch_size: Examples a step.
        config: The config of the papers that are named without one, which each of them must have (default: tiny).
        workdir: The folder (default: runs/compare-PAPERS-DATA).
        coordinator: Of several processes: host:port of the first. Not needed on Cloud TPU, GKE and Slurm.
        process: Of several processes: which one this is, the first of four being 0/4.
    """
    from trainers.compare import compare as run_comparison
    from trainers.compare import contenders

    if not papers:
        raise UsageError("zoo compare needs the names of papers, for example: zoo compare ister:tiny ister:ettm1")
    chosen = contenders(
        papers, data=data, data_dir=data_dir, config=config, steps=steps, epochs=epochs, batch_size=batch_size
    )
    names = "-".join(contender.name.replace(":", "-") for contender in chosen)
    folder = epath.Path(workdir or f"runs/compare-{names}-{data.replace('/', '-')}").expanduser()
    with _joined(coordinator, process):
        run_comparison(chosen, seeds=seeds, workdir=folder)


def bench(argv: Sequence[str]) -> None:
    if argv[:1] == ["layers"]:
        return _parse(_deferred(bench_layers), argv, prog="zoo bench")()
    if argv[:1] == ["backbones"]:
        return _parse(_deferred(bench_backbones), argv, prog="zoo bench")()
    from trainers.bench import bench_paper

    parsed = _recipe_arguments(
        "bench",
        argv,
        "Time a paper's model on this machine's devices: the forward pass and a training step of its recipe, as a\n"
        "table and a csv. `zoo bench layers` times the primitives of `layers` instead, `zoo bench backbones`\n"
        "pretrained architectures: see their --help.",
        output=(str, "runs/bench", "Folder for the csv; earlier ones stay."),
    )
    bench_paper(parsed.recipe, output=Path(parsed.output).expanduser())


def bench_layers(
    what: Annotated[Literal["layers"], tyro.conf.Positional, tyro.conf.arg(metavar="layers")],
    only: tuple[str, ...] = (),
    sizes: tuple[int, ...] = (1024, 4096, 16384, 65536),
    dtype: Literal["float32", "bfloat16"] = "float32",
    seconds: float = 10.0,
    output: str = "runs/bench",
) -> None:
    """Time the primitives of `layers` on this machine's default device: a line each, a csv and a plot.

    For every primitive and length, forward and forward+backward: median time, GFLOP/s of the equation's matrix
    products, GB/s of arguments and results, compile time, peak memory, and how much of what the machine's own measured
    rates allow was reached; then the exponent with which time grows with length.

    Args:
        what: layers.
        only: Names of primitives, e.g. --only attention delta_rule (default: all).
        sizes: Lengths in tokens.
        dtype: Of the float inputs.
        seconds: Leave out a length whose single call should take longer.
        output: Folder for the csv and the plot; earlier ones stay.
    """
    from trainers import layer_bench

    layer_bench.bench_layers(only=only, sizes=sizes, dtype=dtype, seconds=seconds, output=Path(output))


def bench_backbones(
    what: Annotated[Literal["backbones"], tyro.conf.Positional, tyro.conf.arg(metavar="backbones")],
    only: tuple[str, ...] = (),
    batch_size: int = 2,
    length: int | None = None,
    image_size: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    output: str = "runs/bench",
) -> None:
    """Time pretrained architectures on this machine's default device: a line each, and a csv.

    Forward, and forward+backward (the gradients of all parameters): median time, GFLOP/s of the matrix products, peak
    memory and compile time. Parameters are drawn; nothing is downloaded.

    Args:
        what: backbones.
        only: Names, with or without a configuration, e.g. --only resnet:resnet50 bert:bert-base-uncased (default: all).
        batch_size: Examples.
        length: Tokens, of those that read text of any length (default: a few).
        image_size: Pixels, of those that see images of any size (default: few).
        dtype: Of parameters and float inputs.
        output: Folder for the csv; earlier ones stay.
    """
    from trainers import backbone_bench

    backbone_bench.bench_backbones(
        only=only, batch_size=batch_size, length=length, image_size=image_size, dtype=dtype, output=Path(output)
    )


# These read their own command line: their options depend on the paper.
_OF_A_RECIPE = (train, demo, bench, compile_)
COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "list": (list_, "the papers of the zoo, and the data sets (--data)"),
    "show": (show, "one paper: source, fidelity, configurations, results"),
    "train": (train, "train a paper's model; the same command again resumes"),
    "eval": (eval_, "test metrics of a trained run"),
    "predict": (predict, "predict with a trained run"),
    "demo": (demo, "compute a paper's claims: measured beside predicted, a table and a plot"),
    "compare": (compare, "train several papers on the same data under equal budget: a table and a plot"),
    "bench": (bench, "time a paper's forward pass and training step, the primitives of layers, or backbones"),
    "compile": (compile_, "memory, communication and least time of a training step, for machines you need not have"),
    "convert": (convert, "weights between official files, the hub's folders and the zoo's formats"),
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
        keep_freed_memory()
        command = COMMANDS[name][0]
        if command in _OF_A_RECIPE:
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
    except KeyboardInterrupt as stop:
        # A training run that was stopped says how far it came and what its exit code is (trainers.faults).
        what = str(stop) or "interrupted"
        print(f"\nzoo: {what}; resume with: {shlex.join(['zoo', *argv])}", file=sys.stderr)
        sys.exit(getattr(stop, "exit_code", 130))


if __name__ == "__main__":
    main()
