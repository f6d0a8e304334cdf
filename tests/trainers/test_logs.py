"""What a run leaves to read: compile time apart, rates, and TensorBoard with the same numbers and the pictures."""

import dataclasses
import io
import json
import struct
from types import SimpleNamespace

import chex
import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event

from trainers.logs import MetricsLog, Speed, TrainingProgress, plot_curves, read_metrics
from trainers.loop import train
from trainers.recipe import Evaluation, recipe_for

RECIPE = dataclasses.replace(
    recipe_for("ister"), steps=4, batch_size=8, mesh="data=1", log_every=2, evaluation=Evaluation(every=2)
)


def events(folder):
    """The records of TensorBoard's files: length, its checksum, the event, its checksum."""
    for path in sorted(folder.glob("tensorboard/*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def logged(folder):
    values = [(event.step, value) for event in events(folder) for value in event.summary.value]
    scalars = {(step, v.tag): v.simple_value for step, v in values if v.WhichOneof("value") == "simple_value"}
    images = {v.tag: (step, v.image) for step, v in values if v.WhichOneof("value") == "image"}
    return scalars, images


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("logs")) / "run"
    output = io.StringIO()
    train(RECIPE, workdir, console=Console(file=output, width=200))
    return workdir, output.getvalue()


def test_compile_time_is_said_and_logged_once(finished):
    workdir, output = finished
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows if "compile_seconds" in row] == [2]
    assert "compile_seconds" in rows[0]
    assert output.count(f"compiled the training step in {rows[0]['compile_seconds']:.1f} s") == 1
    # The time of the first steps does not hold it: two steps on eight examples take no second.
    assert 2 * 8 / rows[0]["examples_per_second"] < rows[0]["compile_seconds"]


def test_tensorboard_has_the_same_scalars_and_the_pictures(finished):
    workdir, _ = finished
    scalars, images = logged(workdir)
    expected = {
        (row["step"], name): value
        for row in read_metrics(workdir / "metrics.jsonl")
        for name, value in row.items()
        if name != "step"
    }
    assert scalars.keys() == expected.keys()
    for key, value in expected.items():
        assert scalars[key] == pytest.approx(value, rel=1e-6), key
    assert images.keys() == {"curves", "forecast"}
    for name, (step, image) in images.items():
        assert step == 4
        ours = np.asarray(Image.open(workdir / f"{name}.png").convert("RGB"), np.int32)
        theirs = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"), np.int32)
        assert abs(ours - theirs).max() <= 1


def test_no_steps_compile_the_step_and_leave_the_state_alone():
    from trainers.feed import epoch_order
    from trainers.loop import prepare

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    run = prepare(RECIPE)
    state, order = run.program.init(), epoch_order(0, 0, len(run.splits.train))
    before = jax.device_get(state)
    said = []
    speed = Speed(run.splits.train, batch_size=8)
    compiled.clear()
    state, _ = speed.compile(said.append, run.program.run, state, run.splits.train, order, 0, 0)
    assert len(compiled) == 1
    assert said[0].startswith("compiled the training step in ")
    chex.assert_trees_all_equal(jax.device_get(state), before)
    state, _ = run.program.run(state, run.splits.train, order, 0, 2)
    assert int(state.step) == 2
    assert len(compiled) == 1  # not a second time


class FakeSplit:
    def __init__(self, **fields):
        self.fields = fields

    def batch(self, indices):
        return {name: jnp.zeros((len(indices), *shape)) for name, shape in self.fields.items()}


def test_rates_are_of_examples_and_of_tokens_where_there_are_any():
    speed = Speed(FakeSplit(x=(96, 7)), batch_size=4)
    assert speed.line(10.0) == {"examples_per_second": 40.0}
    assert speed.note(1000.0) == "4,000 examples/s"
    speed = Speed(FakeSplit(tokens=(512,), segments=(512,)), batch_size=4)
    assert speed.line(10.0) == {"examples_per_second": 40.0, "tokens_per_second": 40.0 * 512}
    assert speed.note(10.0) == "20,480 tokens/s"


def test_the_progress_line_shows_the_rate():
    output = io.StringIO()
    speed = Speed(FakeSplit(tokens=(512,)), batch_size=4)
    with TrainingProgress(Console(file=output, force_terminal=True, width=120), total=10, done=0) as bar:
        bar.update(3, f"loss 1.0000  {speed.note(10.0)}")
    assert "20,480 tokens/s" in output.getvalue()


def test_what_follows_a_resumed_step_is_replaced(tmp_path):
    folder = epath.Path(tmp_path)
    for resume, values in ((0, {1: 1.0, 2: 2.0}), (1, {2: 3.0})):
        log = MetricsLog(folder, resume_step=resume)
        for step, value in values.items():
            log.write(step, {"train/loss": value})
        log.close()
    assert read_metrics(folder / "metrics.jsonl") == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 3.0}]
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["train/loss"] == 3.0


def test_pictures_are_those_of_the_folder(tmp_path):
    figure = Figure(figsize=(1, 1))
    figure.subplots().imshow(np.arange(4).reshape(2, 2))
    figure.savefig(tmp_path / "attention.png")
    log = MetricsLog(epath.Path(tmp_path), resume_step=0)
    log.pictures(epath.Path(tmp_path), 9)
    log.close()
    assert {name: step for name, (step, _) in logged(tmp_path)[1].items()} == {"attention": 9}


class Bucket(MemoryFileSystem):
    """An object store that forgets with the process; like the real ones, it cannot append."""

    protocol = "gcs"
    cachable = False

    def __init__(self, **options):
        super().__init__()

    def open(self, path, mode="rb", **options):
        assert "a" not in mode
        return super().open(path, mode, **options)


def test_metrics_go_to_an_object_store_too(monkeypatch):
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    nowhere = SimpleNamespace(write=lambda data: None, flush=lambda: None, close=lambda: None)
    factory = SimpleNamespace(open=lambda path: nowhere, directory_check=lambda path: None)
    monkeypatch.setitem(record_writer.REGISTERED_FACTORIES, "gs", factory)
    folder = epath.Path("gs://bucket/run")
    for resume, values in ((0, {1: 1.0, 2: 2.0}), (1, {2: 3.0})):
        log = MetricsLog(folder, resume_step=resume)
        for step, value in values.items():
            log.write(step, {"train/loss": value})
            assert read_metrics(folder / "metrics.jsonl")[-1] == {"step": step, "train/loss": value}
        log.close()
    assert [row["train/loss"] for row in read_metrics(folder / "metrics.jsonl")] == [1.0, 3.0]
    plot_curves(folder, "mse")
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
