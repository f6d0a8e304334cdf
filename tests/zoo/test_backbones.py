"""What every backbone must do, run over all that work with each one's tiny config."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import layers
import zoo
from zoo.backbone import answering
from zoo.blocks import Execution, execution
from zoo.registry import record_of, variable_shapes

NAMES = [e.name for e in zoo.backbones(status="works")]
KEY = jax.random.key(0)

MODULES = {e.module: e.name for e in reversed(zoo.backbones(status="works"))}

each_backbone = pytest.mark.parametrize("name", NAMES)
each_module = pytest.mark.parametrize("name", sorted(MODULES.values()))  # of the names that share a module, the first


@functools.cache
def built(name):
    """(record, model, example, variables at random parameters, jitted apply) of the tiny config."""
    record = zoo.backbone(name)
    model = zoo.create(record.slug, "tiny")
    example = record.example(model.config, batch_size=3, key=KEY)
    # Zeros and ones of the initialisation would hide paths that are not there, and it takes as long to compile as
    # all the rest: parameters are drawn, scales around one.
    variables = {
        collection: {path: drawn(i, path[-1], shape) for i, (path, shape) in enumerate(flatten_dict(tree).items())}
        for collection, tree in variable_shapes(record, model).items()
    }
    return record, model, example, {k: unflatten_dict(v) for k, v in variables.items()}, jax.jit(model.apply)


def drawn(seed, name, like):
    random = np.random.default_rng(seed).normal(0.0, 0.15, like.shape)
    return jnp.asarray(random + (name in ("scale", "var")), like.dtype)


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def test_the_catalogue_and_the_modules_agree():
    for entry in zoo.backbones(status="works"):
        record = zoo.backbone(entry.name)
        assert record.name == entry.name
        assert record.entry is entry
        assert "tiny" in record.configs
    assert {e.name for e in zoo.backbones()} >= set(NAMES)
    assert len({e.name for e in zoo.backbones()}) == len(zoo.backbones())


def test_what_is_not_there_is_answered_by_the_closest():
    with pytest.raises(zoo.UserError, match="no backbone is called 'lama'; did you mean 'llama'"):
        zoo.backbone("lama")
    with pytest.raises(
        zoo.UserError, match=r"backbone_llama has no config 'llama-3\.2-1'; did you mean 'llama-3\.2-1b'"
    ):
        zoo.create("backbone_llama", "llama-3.2-1")
    with pytest.raises(zoo.UserError, match="no backbone answers to 'LlamaForCausalLMs'"):
        answering({"architectures": ["LlamaForCausalLMs"]})
    with pytest.raises(zoo.UserError, match="names no architecture"):
        answering({})


@each_backbone
def test_the_record_of_a_model_is_its_own(name):
    record = zoo.backbone(name)
    for config in record.configs.values():
        assert record_of(record.model(config)) is record


@each_backbone
def test_every_config_survives_the_official_arguments(name):
    record = zoo.backbone(name)
    bridge = record.bridge()
    for config in record.configs.values():
        again = bridge.config(record.read_settings(record.write_settings(bridge.hparams(config), dtype="float32")))
        # What only the weights say is not in the arguments.
        assert bridge.hparams(again) == bridge.hparams(config)
        assert again == config or bridge.refine is not None


@each_backbone
def test_configs_build_without_computing_and_have_the_published_number_of_parameters(name):
    record = zoo.backbone(name)
    for config in record.parameter_counts or record.configs:
        shapes = variable_shapes(record, record.model(record.configs[config]))
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        assert count == record.parameter_counts.get(config, count) > 0


@pytest.mark.parametrize("name", ["llama", "resnet", "mamba"])
def test_initial_values_are_finite_and_alike_in_scale(name):
    record, model, example, variables, apply = built(name)
    fresh = jax.jit(lambda example: record.initialize(model, {"params": KEY, "dropout": KEY}, example))(example)
    chex.assert_trees_all_equal_shapes_and_dtypes(fresh, variables)
    outputs = floats(apply(fresh, **example))
    chex.assert_tree_all_finite(outputs)
    assert 1e-3 < float(jnp.std(outputs[0])) < 10


@each_module
def test_rows_of_a_batch_do_not_see_one_another(name):
    _, _, example, variables, apply = built(name)
    whole = floats(apply(variables, **example))
    chex.assert_tree_all_finite(whole)
    order = jnp.array([1, 0, 1])

    def reordered(tree):
        return jax.tree.map(lambda a: a[order] if a.shape[0] == 3 else a, tree)

    chex.assert_trees_all_close(floats(apply(variables, **reordered(example))), reordered(whole), atol=1e-5, rtol=1e-5)


@each_module
def test_every_parameter_has_a_gradient(name):
    record, model, example, variables, _ = built(name)

    def loss(params):
        outputs = floats(model.apply({**variables, "params": params}, **example))
        return sum(jnp.sum(jnp.sin(3 * x + 1)) for x in outputs)

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    chex.assert_tree_all_finite(gradients)
    dead = {"/".join(path) for path, g in flatten_dict(gradients).items() if not np.any(g)}
    idle = {n for n in flatten_dict(gradients, sep="/") if any(re.search(pattern, n) for pattern in record.idle)}
    assert dead == idle


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # layers alike, and of two kinds
def test_remat_and_scan_change_nothing(name):
    _, model, example, variables, _ = built(name)

    def gradients(options):
        with execution(options):
            return jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(model.apply(v, **example).logits))))(variables)

    plain = gradients(Execution())
    chex.assert_trees_all_close(gradients(Execution(remat="full", scan=True)), plain, atol=1e-4, rtol=1e-4)


@each_module
def test_bfloat16_stays_close(name):
    _, _, example, variables, apply = built(name)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, (variables, example))
    for narrow, wide in zip(floats(apply(low[0], **low[1])), floats(apply(variables, **example)), strict=True):
        assert narrow.dtype == jnp.bfloat16
        scale = float(jnp.std(wide))
        # Eight bits of mantissa through a few layers: a few percent of the outputs' own spread.
        assert float(jnp.sqrt(jnp.mean(jnp.square(narrow.astype(jnp.float32) - wide)))) < 0.06 * scale


@each_module
def test_hooks_meet_every_layer_once_and_change_what_it_computes(name):
    _, model, example, variables, apply = built(name)
    if not hasattr(model, "attention"):
        return
    seen = []

    def same(layer, query, key, value, **options):
        seen.append(layer)
        return layers.dot_product_attention(query, key, value, **options)

    def uniform(layer, query, key, value, **options):
        return layers.dot_product_attention(0 * query, key, value, **options)

    jax.eval_shape(lambda: model.clone(attention=same).apply(variables, **example))
    assert len({layer.name for layer in seen}) == len(seen) > 0
    assert [layer.index for layer in seen] == sorted(layer.index for layer in seen)
    plain = floats(apply(variables, **example))
    other = floats(jax.jit(model.clone(attention=uniform).apply)(variables, **example))
    assert any(not np.allclose(a, b, atol=1e-3) for a, b in zip(other, plain, strict=True))


@each_module
def test_attention_weights_and_hidden_states_come_on_request(name):
    _, model, example, variables, apply = built(name)
    if not hasattr(model, "attention"):
        return
    run = jax.jit(lambda v, e: model.apply(v, **e, mutable=["attention_weights", "hidden_states"]))
    outputs, shown = run(variables, example)
    chex.assert_trees_all_close(floats(outputs), floats(apply(variables, **example)), atol=1e-5, rtol=1e-5)
    weights = flatten_dict(shown["attention_weights"])
    assert weights
    for value in weights.values():
        np.testing.assert_allclose(jnp.sum(value, axis=-1), 1.0, atol=1e-5)
    assert flatten_dict(shown["hidden_states"])
    assert not {"attention_weights", "hidden_states"} & set(variables)


@each_backbone
def test_works_as_an_nnx_module(name):
    _, model, example, variables, apply = built(name)

    def build():
        bridged = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(params=0, dropout=0)).lazy_init(**example)
        return bridged, bridged(**example)

    bridged, outputs = nnx.eval_shape(build)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(bridged, nnx.Param))) == sum(
        v.size for v in jax.tree.leaves(variables["params"])
    )
    assert [x.shape for x in floats(outputs)] == [x.shape for x in floats(apply(variables, **example))]


@each_backbone
@pytest.mark.parametrize("target", ["model.safetensors", "orbax"])
def test_saves_and_restores(name, target, tmp_path):
    _, model, _, variables, _ = built(name)
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.ndim > 1 else a, variables)
    zoo.save(tmp_path / target, model, narrow)
    again, restored = zoo.load(tmp_path / target)
    assert again.config == model.config
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(narrow))


@each_backbone
def test_goes_to_the_official_layout_and_back(name):
    record, model, _, variables, _ = built(name)
    official = zoo.to_official(record.slug, model, variables)
    again, restored = zoo.from_official(record.slug, record.bridge().hparams(model.config), official)
    assert again.config == model.config
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(variables))


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "clip"])
def test_texts_longer_than_the_table_of_positions_are_refused(name):
    _, model, example, variables, _ = built(name)
    long = example | {"input_ids": jnp.full((1, 100), 5)}
    with pytest.raises(ValueError, match="texts of 100 tokens are longer than"):
        jax.eval_shape(lambda: model.apply(variables, **long))
