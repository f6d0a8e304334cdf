"""Weights in and out: strict accounting, and files that are refused rather than guessed at."""

import json
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

import zoo
from zoo.weights.files import read_tensors, write_tensors
from zoo.weights.io import load_official, save_official
from zoo.weights.table import TRANSPOSE, conv1x1, permute

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model_and_variables():
    model = zoo.create("ister", "tiny")
    return model, jax.device_get(model.init(KEY, zoo.paper("ister").example(model.config, batch_size=1, key=KEY)))


@pytest.fixture(scope="module")
def official(model_and_variables):
    return zoo.to_official("ister", *model_and_variables)


HPARAMS = zoo.paper("ister").bridge().hparams(zoo.paper("ister").configs["tiny"])


@pytest.mark.parametrize("transform", [TRANSPOSE, permute(2, 0, 1)], ids=["transpose", "permute"])
def test_transforms_undo_each_other(transform):
    x = np.random.default_rng(0).normal(size=(3, 4) if transform is TRANSPOSE else (3, 4, 5))
    (there,) = transform.from_official(x)
    assert there.shape != x.shape
    chex.assert_trees_all_equal(transform.to_official(there)[0], x)


def test_a_pointwise_convolution_becomes_a_linear_layer():
    kernel = np.random.default_rng(0).normal(size=(4, 3, 1))
    row, _ = conv1x1("conv", "linear")
    assert (row.official, row.ours) == (("conv.weight",), ("params/linear/kernel",))
    (ours,) = row.transform.from_official(kernel)
    chex.assert_trees_all_equal(ours, kernel[:, :, 0].T)
    chex.assert_trees_all_equal(row.transform.to_official(ours)[0], kernel)


def test_from_official_undoes_to_official(model_and_variables, official):
    model, variables = model_and_variables
    again, restored = zoo.from_official("ister", HPARAMS, official)
    assert again.config == model.config
    chex.assert_trees_all_equal(restored, variables)


def test_all_faults_are_named_in_one_sentence(official):
    broken = dict(official)
    del broken["Linear_Trend.bias"]
    broken["surplus"] = np.zeros(3)
    broken["backbone.mlp.fc1.bias"] = np.zeros(5)
    with pytest.raises(zoo.UserError) as caught:
        zoo.from_official("ister", HPARAMS, broken)
    message = str(caught.value)
    assert "Linear_Trend.bias is missing" in message
    assert "surplus is not part of this model" in message
    assert "backbone.mlp.fc1.bias has shape (5,) instead of (8,)" in message
    assert "\n" not in message


def test_a_wider_convolution_is_not_cut_to_size(official):
    name = "backbone.encoder.attn_layers.0.conv1.weight"
    with pytest.raises(zoo.UserError, match=r"has shape \(32, 16, 3\) instead of \(32, 16, 1\)"):
        zoo.from_official("ister", HPARAMS, official | {name: np.zeros((32, 16, 3))})


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_official_files_round_trip(model_and_variables, tmp_path, ending):
    model, variables = model_and_variables
    path = tmp_path / f"official.{ending}"
    save_official(path, model, variables)
    again, restored = load_official(path, "ister")
    assert again.config == model.config
    chex.assert_trees_all_equal(jax.device_get(restored), variables)


def test_bfloat16_survives(tmp_path):
    x = np.asarray(jnp.arange(7, dtype=jnp.bfloat16))
    write_tensors(tmp_path / "x.safetensors", {"x": x}, {"note": "ä"})
    tensors, metadata = read_tensors(tmp_path / "x.safetensors")
    assert tensors["x"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(tensors["x"], x)
    assert metadata == {"note": "ä"}


def test_nothing_is_overwritten_unless_asked(model_and_variables, tmp_path):
    for name in ("m.safetensors", "orbax"):
        zoo.save(tmp_path / name, *model_and_variables)
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(zoo.UserError, match="exists already; choose another name or remove it"):
            zoo.save(tmp_path / name, *model_and_variables)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        zoo.save(tmp_path / name, *model_and_variables, overwrite=True)


def refused(path, message):
    with pytest.raises(zoo.UserError, match=message) as caught:
        zoo.load(path)
    assert "\n" not in str(caught.value)


def test_pickles_are_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    for name in ("x.safetensors", "x.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path / "x.safetensors", "is a pickle in spite of its name and was not opened; convert it")
    refused(tmp_path / "x.pt", "x.pt is (a torch file and torch is not installed|not a plain state dict)")
    np.savez(tmp_path / "objects.npz", x=np.array([Bomb()], dtype=object))
    refused(tmp_path / "objects.npz", "holds pickled objects, which are never opened")


@pytest.mark.parametrize("length", [0x80, 0x4B50])  # the header's length begins as pickles and zip files do
def test_a_header_of_any_length_is_read(tmp_path, length):
    path, x = tmp_path / "x.safetensors", np.arange(3, dtype=np.float32)
    save_file({"x": x}, path)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    note = "n" * (length - size - len(',"__metadata__":{"note":""}'))
    save_file({"x": x}, path, metadata={"note": note})
    assert abs(int.from_bytes(path.read_bytes()[:8], "little") - length) <= 8
    data = path.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip().ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + header + x.tobytes())
    chex.assert_trees_all_equal(read_tensors(path)[0]["x"], x)


def test_damaged_and_foreign_files_are_refused(model_and_variables, tmp_path):
    path = tmp_path / "m.safetensors"
    zoo.save(path, *model_and_variables)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "is damaged or not a safetensors file")
    (tmp_path / "m.npz").write_bytes(b"PK\x03\x04 and then nothing")
    refused(tmp_path / "m.npz", "is damaged")
    (tmp_path / "x.txt").write_text("hello")
    refused(tmp_path / "x.txt", "has none of the known endings")
    refused(tmp_path / "missing.safetensors", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "not a finished run or a saved model")
    save_file({"x": np.zeros(3)}, tmp_path / "foreign.safetensors")
    refused(tmp_path / "foreign.safetensors", "was not written by the zoo")


def test_weights_of_another_size_are_refused(model_and_variables, tmp_path):
    _model, variables = model_and_variables
    metadata = {"format": "attention-zoo/1", "paper": "ister", "config": json.dumps({"d_model": 8})}
    flat = {"/".join(k): v for k, v in flatten_dict(variables).items()}
    write_tensors(tmp_path / "m.safetensors", flat, metadata)
    refused(tmp_path / "m.safetensors", r"params/encoder_norm/scale has shape \(16,\) instead of \(8,\)")
    write_tensors(tmp_path / "n.safetensors", flat, metadata | {"format": "attention-zoo/9"})
    refused(tmp_path / "n.safetensors", "has format attention-zoo/9, this version reads attention-zoo/1")


def test_a_damaged_orbax_folder_is_named(model_and_variables, tmp_path):
    zoo.save(tmp_path / "orbax", *model_and_variables)
    for path in (tmp_path / "orbax").rglob("*"):
        if path.is_file() and path.name not in ("model.json",):
            path.write_bytes(b"garbage")
    refused(tmp_path / "orbax", "orbax is damaged or incomplete")
