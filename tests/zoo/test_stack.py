"""A stack of layers gives the same numbers, gradients and parameters however it is executed."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import zoo
from zoo.blocks import Dropout, Execution, execution, stack

KEY = jax.random.key(0)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        h = nn.Dense(x.shape[-1])(nn.LayerNorm()(x))
        return x + Dropout(0.5)(jnp.sin(h), train=train)


class Tower(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return stack(self, Layer, 4, x, name="block", train=train)


X = jax.random.normal(KEY, (2, 3, 8))
WAYS = [Execution(remat=remat, scan=scan) for remat in ("none", "dots", "full") for scan in (False, True)]


def test_layers_are_named_one_by_one():
    variables = Tower().init(KEY, X)
    assert sorted(variables["params"]) == [f"block_{i}" for i in range(4)]
    with execution(Execution(remat="full", scan=True)):
        chex.assert_trees_all_equal(Tower().init(KEY, X), variables)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_outputs_and_gradients_are_the_same(way):
    variables = Tower().init(KEY, X)

    def loss(params, x):
        return jnp.sum(jnp.square(Tower().apply({"params": params}, x)))

    expected = jax.value_and_grad(loss, (0, 1))(variables["params"], X)
    with execution(way):
        ours = jax.jit(jax.value_and_grad(loss, (0, 1)))(variables["params"], X)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=2e-5)  # of gradients up to 13


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_layer_draws_its_own_dropout(way):
    class Drops(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            self.param("unused", nn.initializers.zeros, ())
            return Dropout(0.5)(x, train=train)

    class Three(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return stack(self, Drops, 3, x, train=train)

    x = jnp.ones((64, 64))
    variables = Three().init({"params": KEY, "dropout": KEY}, x, train=False)
    with execution(way):
        y = Three().apply(variables, x, train=True, rngs={"dropout": KEY})
    assert abs(float(jnp.mean(y > 0)) - 0.125) < 0.02


def test_scanning_compiles_one_layer():
    def size(way):
        with execution(way):
            variables = jax.eval_shape(Tower().init, KEY, X)
            text = jax.jit(lambda v, x: Tower().apply(v, x)).lower(variables, X).as_text()
        return text.count("dot_general")

    assert size(Execution()) == 4
    assert size(Execution(scan=True)) == 1


def test_whole_layers_are_computed_again():
    variables = Tower().init(KEY, X)

    def products(way):
        with execution(way):
            gradient = jax.grad(lambda v: jnp.sum(Tower().apply(v, X)))
            return str(jax.make_jaxpr(gradient)(variables)).count("dot_general")

    # Forward, and one for the gradient of each input and kernel; recomputation repeats the forward ones.
    assert products(Execution(remat="full")) > products(Execution(remat="dots")) >= products(Execution())


def test_the_papers_use_it():
    model = zoo.create("ister", num_layers=4)
    batch = zoo.paper("ister").example(model.config, batch_size=2, key=KEY)
    variables = model.init(KEY, batch)
    with execution(Execution(scan=True, remat="full")):
        ours = model.apply(variables, batch)
    chex.assert_trees_all_close(ours, model.apply(variables, batch), rtol=1e-5, atol=1e-5)
