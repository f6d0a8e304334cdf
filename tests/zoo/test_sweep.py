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
from tests.weights import drawn
from trainers.recipe import named_recipes
from trainers.sharding import make_mesh
from trainers.step import make_program
from zoo.registry import variable_shapes

SLUGS = [e.slug for e in zoo.papers(status="works") if zoo.paper(e.slug).model is not None]
KEY = jax.random.key(0)
BATCH = 8

each_paper = pytest.mark.parametrize("slug", SLUGS)
# Of these, an operation at a time takes longest; CI has them jitted, which JAX promises to be the same.
LARGE = {
    "alda4rec", "attention_mamba", "camera_isac", "ga_wireless_splat", "gelgt", "mamba_complete_3d", "optnet",
    "r_dmesh", "rctea", "sid_mlp", "social_mamba", "spine_context_resunet",
}  # fmt: skip
WAYS = [("jitted", slug) for slug in sorted(LARGE)]
WAYS += [pytest.param("eager", slug, marks=[pytest.mark.slow] if slug in LARGE else []) for slug in SLUGS]


# Rounding decides what drawn weights make of these: which way a rectifier falls, how far apart two close points are.
DELICATE = {"baikal_gvd", "hyperpose", "sid_mlp"}


@functools.cache
def built(slug):
    """(paper, model, batch, variables, jitted apply) of the tiny config, compiled once for all tests.

    `apply` has a key for dropout, which evaluation must not ask for.
    """
    paper = zoo.paper(slug)
    model = zoo.create(slug, "tiny")
    batch = paper.example(model.config, batch_size=BATCH, key=KEY)
    if slug in DELICATE:
        variables = jax.jit(model.init)({"params": KEY, "dropout": KEY}, batch)
        variables = {k: v for k, v in variables.items() if k != "intermediates"}
    else:  # compiling the initialisers would take longer than all the rest
        variables = drawn(paper, model)

    @jax.jit
    def keyed(variables, batch, key):
        return model.apply(variables, batch, rngs={"dropout": key})

    return paper, model, batch, variables, lambda variables, batch, key=KEY: keyed(variables, batch, key)


def training(slug, mesh_spec, devices):
    """(program, i -> what its step gives from a state after i steps): gradient descent on one batch."""
    paper, model, batch, _, _ = built(slug)
    mesh = make_mesh(mesh_spec, batch_size=BATCH, devices=jax.devices()[:devices])
    optimizer = optax.sgd(0.02, momentum=0.9)
    program = make_program(paper, model, optimizer, mesh, seed=0, batch_size=BATCH, max_steps=3, eval_batch_size=BATCH)
    order = np.tile(np.arange(BATCH, dtype=np.int32), 3)

    def step(state, i):
        state, history = program.run(jax.device_put(state, program.state_shardings), Rows(batch), order, i, 1)
        return jax.device_get((state, history["loss"][0]))

    return program, step


@functools.cache
def trained(slug):
    """The states before and after each of three steps, and the losses; momentum adds up the gradients."""
    variables = built(slug)[3]
    program, step = training(slug, "data=1", 1)
    params, collections = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    states, losses = [jax.device_get(program.begin(params, collections))], []
    for i in range(3):
        state, loss = step(states[-1], i)
        states.append(state)
        losses.append(loss)
    return states, losses


@each_paper
def test_forward_is_finite_and_fits_the_targets(slug):
    paper, _, batch, variables, apply = built(slug)
    outputs = apply(variables, batch)
    chex.assert_tree_all_finite(outputs)
    loss, _ = paper.compute_loss(outputs, batch)
    assert loss.shape == ()
    assert np.isfinite(loss)


@each_paper
def test_every_parameter_has_a_finite_gradient_that_is_not_zero(slug):
    states, losses = trained(slug)
    gradients = optax.tree.get(states[-1].opt_state, "trace")
    chex.assert_tree_all_finite((gradients, losses))
    dead = {path for path, gradient in flatten_dict(gradients, sep="/").items() if not np.any(gradient)}
    assert dead == set(zoo.paper(slug).inert)


@each_paper
def test_a_batch_of_one_is_a_slice_of_the_batch_and_padding_never_leaks(slug):
    paper, _, batch, variables, apply = built(slug)
    one = jax.tree.map(lambda a: a[2:3], batch)
    expected = jax.tree.map(lambda a: a[2:3], apply(variables, batch))
    if paper.task.pad is None:
        # A task of fixed sizes has nothing to pad: then its batches may hold no mask either.
        assert not [name for name in batch if "mask" in name]
        outputs = apply(variables, one)
    else:
        padded, unpad = paper.task.pad(one)
        outputs = unpad(apply(variables, padded))
    chex.assert_trees_all_close(outputs, expected, atol=1e-5, rtol=1e-5)


@each_paper
def test_evaluation_ignores_the_dropout_key(slug):
    _, _, batch, variables, apply = built(slug)
    chex.assert_trees_all_equal(apply(variables, batch, jax.random.key(1)), apply(variables, batch))


@each_paper
def test_bfloat16_runs_and_stays_close(slug):
    paper, _, batch, variables, apply = built(slug)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, (variables, batch))
    outputs = apply(*low)
    loss = paper.compute_loss(outputs, batch)[0]
    assert loss == pytest.approx(float(paper.compute_loss(apply(variables, batch), batch)[0]), rel=0.05)


@each_paper
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
@each_paper
def test_saves_and_restores(slug, name, tmp_path):
    _, model, _, variables, _ = built(slug)
    zoo.save(tmp_path / name, model, variables)
    again, restored = zoo.load(tmp_path / name)
    assert again.config == model.config
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(variables))


@pytest.mark.parametrize(("how", "slug"), WAYS)
def test_as_an_nnx_module_it_equals_the_linen_one(slug, how):
    _, model, batch, variables, apply = built(slug)
    bridged = nnx.eval_shape(lambda: nnx.bridge.ToNNX(model, rngs=nnx.Rngs(params=0, dropout=0)).lazy_init(batch))
    state = nnx.to_flat_state(nnx.state(bridged, nnx.Not(nnx.RngState)))
    assert {path for path, v in state if isinstance(v, nnx.Param)} == set(flatten_dict(variables["params"]))
    values = {path: v for tree in variables.values() for path, v in flatten_dict(tree).items()}
    nnx.update(bridged, nnx.from_flat_state([(path, v.replace(values[path])) for path, v in state]))

    definition, params, rest = nnx.split(bridged, nnx.Param, ...)

    def call(params, batch):
        return nnx.merge(definition, params, rest)(batch, rngs=nnx.Rngs(dropout=0))

    outputs = (jax.jit(call) if how == "jitted" else call)(params, batch)
    chex.assert_trees_all_close(apply(variables, batch), outputs, atol=1e-5, rtol=1e-5)


# Their programs for eight devices take longest to compile.
HEAVY = {"attention_mamba", "gelgt", "mamba_complete_3d", "optnet", "social_mamba", "spine_context_resunet"}


@pytest.mark.parametrize("slug", [pytest.param(s, marks=[pytest.mark.slow] if s in HEAVY else []) for s in SLUGS])
def test_eight_devices_compute_the_steps_of_one(slug):
    states, losses = trained(slug)
    _, step = training(slug, "data=2,fsdp=2,tensor=2", 8)
    # Each from the state that one device was in: what rounding makes of several steps is no fault.
    for i in range(3):
        state, loss = step(states[i], i)
        np.testing.assert_allclose(loss, losses[i], rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(state.params, states[i + 1].params, atol=1e-4)
    assert losses[2] != losses[0]
