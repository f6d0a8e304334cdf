"""What every paper must do, run over the whole registry with each paper's tiny config."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import zoo
from tests.splits import Rows
from trainers.recipe import named_recipes
from trainers.sharding import make_mesh
from trainers.step import make_program
from zoo.registry import variable_shapes

SLUGS = [e.slug for e in zoo.papers(status="works") if zoo.paper(e.slug).model is not None]
KEY = jax.random.key(0)
BATCH = 8

pytestmark = pytest.mark.parametrize("slug", SLUGS)


@functools.cache
def built(slug):
    """(paper, model, batch, variables, jitted apply) of the tiny config, compiled once for all tests."""
    paper = zoo.paper(slug)
    model = zoo.create(slug, "tiny")
    batch = paper.example(model.config, batch_size=BATCH, key=KEY)
    variables = jax.jit(model.init)({"params": KEY, "dropout": KEY}, batch)
    return paper, model, batch, {k: v for k, v in variables.items() if k != "intermediates"}, jax.jit(model.apply)


def test_forward_is_finite_and_fits_the_targets(slug):
    paper, _, batch, variables, apply = built(slug)
    outputs = apply(variables, batch)
    chex.assert_tree_all_finite(outputs)
    loss, _ = paper.compute_loss(outputs, batch)
    assert loss.shape == ()
    assert np.isfinite(loss)


def test_every_parameter_has_a_finite_gradient_that_is_not_zero(slug):
    paper, model, batch, variables, _ = built(slug)
    others = {k: v for k, v in variables.items() if k != "params"}
    # Constant and zero initial values can hide a path: gradients are taken at random parameters.
    leaves, tree = jax.tree.flatten(variables["params"])
    keys = jax.random.split(KEY, len(leaves))
    params = tree.unflatten([0.3 * jax.random.normal(k, v.shape) + v for k, v in zip(keys, leaves, strict=True)])

    def loss(params):
        outputs = model.apply(
            {"params": params, **others}, batch, train=True, rngs={"dropout": KEY}, mutable=list(others)
        )
        return paper.compute_loss(outputs[0], batch)[0]

    gradients = jax.jit(jax.grad(loss))(params)
    chex.assert_tree_all_finite(gradients)
    dead = {path for path, gradient in flatten_dict(gradients, sep="/").items() if not np.any(gradient)}
    assert dead == set(paper.inert)


def test_a_batch_of_one_is_a_slice_of_the_batch(slug):
    _, _, batch, variables, apply = built(slug)
    whole = apply(variables, batch)
    one = apply(variables, jax.tree.map(lambda a: a[2:3], batch))
    chex.assert_trees_all_close(one, jax.tree.map(lambda a: a[2:3], whole), atol=1e-5, rtol=1e-5)


def test_padding_never_leaks(slug):
    paper, _, batch, variables, apply = built(slug)
    if paper.task.pad is None:
        # A task of fixed sizes has nothing to pad: then its batches may hold no mask either.
        assert not [name for name in batch if "mask" in name]
        return
    padded, unpad = paper.task.pad(batch)
    chex.assert_trees_all_close(unpad(apply(variables, padded)), apply(variables, batch), atol=1e-5)


def test_evaluation_ignores_the_dropout_key(slug):
    _, _, batch, variables, apply = built(slug)
    keys = [jax.random.key(i) for i in (1, 2)]
    first, second = (apply(variables, batch, rngs={"dropout": key}) for key in keys)
    chex.assert_trees_all_equal(first, second)


def test_bfloat16_runs_and_stays_close(slug):
    paper, model, batch, variables, apply = built(slug)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, (variables, batch))
    outputs = jax.jit(model.apply)(*low)
    loss = paper.compute_loss(outputs, batch)[0]
    assert loss == pytest.approx(float(paper.compute_loss(apply(variables, batch), batch)[0]), rel=0.05)


def test_every_config_builds_with_the_official_number_of_parameters_and_every_recipe_names_one(slug):
    paper = zoo.paper(slug)
    assert "tiny" in paper.configs
    assert paper.parameter_counts.keys() <= paper.configs.keys()
    sizes = []  # configs of several names are often the same
    for name, config in paper.configs.items():
        size = next((size for other, size in sizes if other == config), None)
        if size is None:
            size = sum(s.size for s in jax.tree.leaves(variable_shapes(paper, paper.model(config))["params"]))
            sizes.append((config, size))
        assert size == paper.parameter_counts.get(name, size), name
        assert size > 0
    recipes = named_recipes(slug)
    assert "tiny" in recipes
    assert recipes.keys() <= paper.configs.keys()


@pytest.mark.parametrize("name", ["model.safetensors", "model.npz", "orbax"])
def test_saves_and_restores(slug, name, tmp_path):
    _, model, _, variables, _ = built(slug)
    zoo.save(tmp_path / name, model, variables)
    again, restored = zoo.load(tmp_path / name)
    assert again.config == model.config
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(variables))


def test_eager_as_an_nnx_module_it_equals_the_jitted_linen_one(slug):
    _, model, batch, variables, apply = built(slug)
    bridged = nnx.eval_shape(lambda: nnx.bridge.ToNNX(model, rngs=nnx.Rngs(params=0, dropout=0)).lazy_init(batch))
    state = nnx.to_flat_state(nnx.state(bridged, nnx.Not(nnx.RngState)))
    assert {path for path, v in state if isinstance(v, nnx.Param)} == set(flatten_dict(variables["params"]))
    values = {path: v for tree in variables.values() for path, v in flatten_dict(tree).items()}
    nnx.update(bridged, nnx.from_flat_state([(path, v.replace(values[path])) for path, v in state]))
    eager = bridged(batch, rngs=nnx.Rngs(dropout=0))
    chex.assert_trees_all_close(apply(variables, batch), eager, atol=1e-5, rtol=1e-5)


def test_eight_devices_compute_the_step_of_one(slug):
    paper, model, batch, variables, _ = built(slug)
    collections = {k: v for k, v in variables.items() if k != "params"}

    def three_steps(mesh_spec, devices):
        mesh = make_mesh(mesh_spec, batch_size=BATCH, devices=devices)
        program = make_program(
            paper, model, optax.sgd(0.05), mesh, seed=0, batch_size=BATCH, max_steps=3, eval_batch_size=BATCH
        )
        order = jnp.tile(jnp.arange(BATCH, dtype=jnp.int32), 3)
        state, history = program.run(program.begin(variables["params"], collections), Rows(batch), order, 0, 3)
        return jax.device_get(state.params), jax.device_get(history["loss"])

    params, losses = three_steps("data=1", jax.devices()[:1])
    sharded_params, sharded_losses = three_steps("data=2,fsdp=2,tensor=2", jax.devices()[:8])
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(sharded_params, params, atol=1e-4)
    assert losses[2] != losses[0]
