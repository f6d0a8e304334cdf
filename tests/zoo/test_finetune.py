"""Adapters and frozen parameters, on every backbone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from tests.weights import drawn
from zoo.backbones.finetune import freeze, lora_apply, lora_init, lora_merge, matching
from zoo.blocks import Execution, execution

NAMES = list({e.module: e.name for e in zoo.backbones(status="works")}.values())  # one of each module
KEY = jax.random.key(0)


@functools.cache
def built(name):
    record = zoo.backbone(name)
    model = zoo.create(record.slug, "tiny")
    example = record.example(model.config, batch_size=2, key=KEY)
    return model, example, drawn(record, model)


def trained(adapters):
    """Adapters as they might be after training: no zeros left."""
    leaves, tree = jax.tree.flatten(adapters)
    return tree.unflatten(
        [v + 0.1 * jax.random.normal(jax.random.fold_in(KEY, i), v.shape) for i, v in enumerate(leaves)]
    )


def outputs(result):
    return [x for x in jax.tree.leaves(result) if jnp.issubdtype(x.dtype, jnp.floating)]


@pytest.mark.parametrize("name", NAMES)
def test_every_projection_of_every_model_can_be_adapted(name):
    model, example, variables = built(name)
    adapters = lora_init(KEY, variables, targets=r"", rank=2)
    # It refuses adapters of what the model does not compute, which tracing tells.
    adapted = jax.eval_shape(lambda a: lora_apply(model, variables, a, **example), adapters)
    plain = jax.eval_shape(lambda v: model.apply(v, **example), variables)
    chex.assert_trees_all_equal_shapes_and_dtypes(outputs(adapted), outputs(plain))


# One of each kind of layers: compiling all of them shows nothing more.
@pytest.mark.parametrize("name", ["gemma3", "t5", "mamba2", "qwen3_next", "clip", "swin", "resnet", "dit"])
def test_adapted_equals_merged_and_starts_as_the_model(name):
    model, example, variables = built(name)
    adapters = lora_init(KEY, variables, targets=r"", rank=2)
    plain = jax.jit(model.apply)(variables, **example)
    adapted = jax.jit(lambda a: lora_apply(model, variables, a, scale=0.5, **example))
    chex.assert_trees_all_close(outputs(adapted(adapters)), outputs(plain), atol=1e-5, rtol=1e-5)
    adapters = trained(adapters)
    merged = jax.jit(model.apply)(lora_merge(variables, adapters, scale=0.5), **example)
    chex.assert_trees_all_close(outputs(adapted(adapters)), outputs(merged), atol=1e-4, rtol=1e-4)
    assert not np.allclose(outputs(merged)[0], outputs(plain)[0], atol=1e-3)


def test_training_adapters_lowers_the_loss_and_survives_the_export(tmp_path):
    model, example, variables = built("qwen2")
    adapters = lora_init(KEY, variables, targets=r"attention/(query|value)$|mlp/", rank=4)
    ids = example["input_ids"]
    optimizer = optax.adam(2e-2)

    def loss(adapters):
        logits = lora_apply(model, variables, adapters, ids).logits[:, :-1]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]))

    @jax.jit
    def step(adapters, state):
        value, gradients = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(adapters, updates), state, value

    state, losses = optimizer.init(adapters), []
    for _ in range(60):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    zoo.save(tmp_path / "tuned", model, lora_merge(variables, adapters), layout="hf")
    again, restored = zoo.load(tmp_path / "tuned")
    logits = again.apply(restored, ids).logits
    np.testing.assert_allclose(logits, lora_apply(model, variables, adapters, ids).logits, atol=1e-4)


def test_frozen_parameters_stay_as_they_are():
    model, example, variables = built("llama")
    params, ids = variables["params"], example["input_ids"]
    optimizer = freeze(optax.adamw(1e-2), params, (r"embedding", r"layers_0/"))
    gradients = jax.grad(lambda p: jnp.sum(jnp.square(model.apply({"params": p}, ids).logits)))(params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    for (path, new), old, fits in zip(
        jax.tree_util.tree_leaves_with_path(after),
        jax.tree.leaves(params),
        jax.tree.leaves(matching(params, (r"embedding", r"layers_0/"))),
        strict=True,
    ):
        assert np.array_equal(new, old) == fits, path
    assert sum(jax.tree.leaves(matching(params, r"layers_0/"))) == 9


def test_mistakes_are_named():
    model, example, variables = built("llama")
    with pytest.raises(zoo.UserError, match="no projection fits targets 'atention'; there are for example"):
        lora_init(KEY, variables, targets="atention", rank=2)
    with pytest.raises(zoo.UserError, match=r"rank 100 is not in 1\.\."):
        lora_init(KEY, variables, targets="query", rank=100)
    with pytest.raises(zoo.UserError, match="no parameter fits 'layer0'"):
        matching(variables["params"], "layer0")
    adapters = lora_init(KEY, variables, targets="query", rank=2)
    with (
        execution(Execution(scan=True)),
        pytest.raises(zoo.UserError, match="one by one, not with scan"),
    ):
        lora_apply(model, variables, adapters, **example)
    with pytest.raises(zoo.UserError, match="has no projection in these variables"):
        lora_merge(variables, {"layers_9": {"query": {"down": jnp.ones((2, 1)), "up": jnp.ones((1, 2))}}})
