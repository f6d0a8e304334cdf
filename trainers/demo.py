"""`zoo demo PAPER`: computes a paper's claims, prints them beside their bounds, writes them and pictures."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import zoo
from zoo.demo import Check, Findings
from zoo.errors import UserError

__all__ = ["demonstrate", "plot"]


def demonstrate(slug: str, config: Any, *, seed: int, output: Path, console: Console | None = None) -> Findings:
    """Runs the demonstration in float64; writes SLUG.json and pictures. A claim that does not hold raises `UserError`,
    after everything is written."""
    console = console or Console()
    demo = demo_of(slug)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}): choose another folder") from error
    start = time.perf_counter()
    with console.status(f"{slug}: computing"), jax.enable_x64(True):
        findings = demo.run(config, jax.random.key(seed))
        pictures = {f"{slug}-claims.png": plot(findings.checks)}
        if findings.picture is not None:
            pictures[f"{slug}.png"] = findings.picture()
    seconds = time.perf_counter() - start

    console.print(f"{slug}, {seconds:.1f} s", highlight=False)
    for check in findings.checks:
        predicted = "" if check.predicted is None else f"predicted {_short(check.predicted)}, "
        console.print(
            f"  {'holds' if check.holds else 'FAILS'}  {check.claim}\n         measured {_short(check.measured)}; "
            f"{predicted}must lie in [{_short(check.low)}, {_short(check.high)}]",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    file = output / f"{slug}.json"
    file.write_text(json.dumps([_as_json(check) for check in findings.checks], indent=1) + "\n")
    for name, figure in pictures.items():
        if figure is not None:
            figure.savefig(output / name, dpi=120)
            console.print(f"wrote {output / name}", highlight=False)
    console.print(f"wrote {file}", highlight=False)
    if failed := [check.claim for check in findings.checks if not check.holds]:
        raise UserError(f"{slug}: {len(failed)} of {len(findings.checks)} claims do not hold: {'; '.join(failed)}")
    return findings


def demo_of(slug: str) -> Any:
    """The demonstration of a paper; one without raises `UserError`."""
    demo = zoo.paper(slug).demo
    if demo is None:
        raise UserError(f"{slug} has no demonstration: it is trained, with `zoo train {slug}`")
    return demo


def plot(checks: tuple[Check, ...]):
    """Each claim that was measured over a range of sizes, with its prediction and its bounds; None without any."""
    from matplotlib.figure import Figure

    curves = [check for check in checks if check.over is not None]
    if not curves:
        return None
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, check in zip(panels, curves, strict=False):
        name, sizes = check.over
        series = {"measured": check.measured, "predicted": check.predicted, "bound": check.high, "lower": check.low}
        styles = {"measured": "o-", "predicted": "--", "bound": ":", "lower": ":"}
        positive = True
        for label, values in series.items():
            if values is None or not np.all(np.isfinite(values := np.asarray(values, float))):
                continue
            values = np.broadcast_to(values, len(sizes))
            positive &= bool(np.all(values > 0)) or label == "lower"
            color = {"measured": "tab:red", "predicted": "black"}.get(label, "0.6")
            axes.plot(sizes, values, styles[label], color=color, markersize=4, label=label)
        axes.set_xscale("log" if min(sizes) > 0 else "linear")
        axes.set_yscale("log" if positive else "linear")
        axes.set_xlabel(name)
        axes.set_title(check.claim, fontsize=8, wrap=True)
        axes.legend(frameon=False, fontsize=7)
    for axes in list(figure.axes)[len(curves) :]:
        axes.set_axis_off()
    return figure


def _short(value: Any) -> str:
    values = np.atleast_1d(np.asarray(value, float)).ravel()
    if len(values) > 6:
        values = values[[0, 1, -2, -1]]
        return " ".join([*(f"{v:.3g}" for v in values[:2]), "...", *(f"{v:.3g}" for v in values[2:])])
    return " ".join(f"{v:.3g}" for v in values)


def _as_json(check: Check) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if value is None:
            return None
        # JSON has no infinity.
        return np.vectorize(lambda v: float(v) if np.isfinite(v) else str(v), otypes=[object])(value).tolist()

    over = None if check.over is None else {"name": check.over[0], "sizes": plain(check.over[1])}
    return {"claim": check.claim, "holds": check.holds, "over": over} | {
        name: plain(getattr(check, name)) for name in ("measured", "predicted", "low", "high")
    }
