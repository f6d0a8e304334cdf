"""A backbone whose sequences lie along eight devices, against the same backbone on one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import zoo
from zoo.backbones.context_parallel import ring

KEY = jax.random.key(3)
MESH = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "sequence"))


@pytest.fixture(scope="module")
def setting():
    model = zoo.create("backbone_llama", "tiny")
    ids = jax.random.randint(KEY, (2, 16), 0, model.config.vocab_size)
    return model, model.init(KEY, ids), ids


def loss_and_gradients(model, variables, ids):
    def loss(variables, ids):
        return jnp.mean(jnp.square(model.apply(variables, ids).logits))

    return jax.jit(jax.value_and_grad(loss))(variables, ids)


def test_values_and_gradients_are_those_of_one_device(setting):
    model, variables, ids = setting
    expected = loss_and_gradients(model, variables, ids)
    split = jax.device_put(ids, NamedSharding(MESH, PartitionSpec("data", "sequence")))
    chex.assert_trees_all_close(
        loss_and_gradients(model.clone(attention=ring(MESH)), variables, split), expected, rtol=1e-4, atol=1e-6
    )


def test_no_device_gathers_the_keys(setting):
    model, variables, ids = setting
    split = jax.device_put(ids, NamedSharding(MESH, PartitionSpec("data", "sequence")))
    ringed = jax.jit(model.clone(attention=ring(MESH)).apply)
    text = ringed.lower(variables, split).compile().as_text()
    assert "collective-permute" in text
    assert "all-gather" not in text


@pytest.mark.parametrize(
    ("mesh", "mask", "message"),
    [
        (Mesh(np.array(jax.devices()[:2]), ("data",)), None, "no axis named sequence"),
        (MESH, jnp.ones((2, 16), jnp.int32), "knows nothing of a mask other than the causal one"),
        (Mesh(np.array(jax.devices()[:3]), ("sequence",)), None, "16 queries cannot be shared by the 3 devices"),
    ],
)
def test_what_a_ring_cannot_do_is_said(setting, mesh, mask, message):
    model, variables, ids = setting
    with pytest.raises(zoo.UserError, match=message):
        jax.eval_shape(lambda: model.clone(attention=ring(mesh)).apply(variables, ids, attention_mask=mask))
