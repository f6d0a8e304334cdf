"""Diffusion backbones beyond the sweep: they are sampled from, start as nothing, and meet one another."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

import layers
import zoo
from zoo.backbones.flux import image_positions, pack_latents, unpack_latents
from zoo.backbones.vae_kl import scale_latents, unscale_latents
from zoo.blocks import Execution, execution
from zoo.registry import variable_shapes

KEY = jax.random.key(0)


@functools.cache
def made(name, batch_size=2):
    """(model, example, fresh variables, the same with noise on all parameters)."""
    record = zoo.backbone(name)
    model = zoo.create(record.slug, "tiny")
    example = record.example(model.config, batch_size=batch_size, key=KEY)
    fresh = jax.jit(lambda e: record.initialize(model, {"params": KEY}, e))(example)
    return model, example, fresh, {**fresh, "params": noisy(fresh["params"])}


def noisy(params):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def test_ddim_samples_a_dit_with_guidance():
    model, example, fresh, trained = made("dit")
    levels = layers.diffusion_schedule(1000)
    steps = layers.diffusion_timesteps(1000, 4, spacing="trailing")
    noise = example["latents"]

    @jax.jit
    def sample(variables, labels, scale):
        def predicted(x, step):
            both = model.apply(
                variables,
                jnp.tile(x, (2, 1, 1, 1)),
                jnp.full(2 * len(x), step),
                jnp.concatenate([labels, jnp.full_like(labels, model.config.num_classes)]),
            ).sample[..., : x.shape[-1]]  # the rest is about variances
            return layers.classifier_free_guidance(*jnp.split(both, 2), scale)

        def denoise(x, pair):
            step, following = pair
            after = jnp.where(following < 0, 1.0, levels[following])
            return layers.ddim_step(x, predicted(x, step), levels[step], after), None

        return jax.lax.scan(denoise, noise, (steps, jnp.append(steps[1:], -1)))[0]

    some, others = jnp.array([1, 2]), jnp.array([3, 2])
    # A fresh model sees no noise, so that only the scale is undone.
    np.testing.assert_allclose(sample(fresh, some, 2.0), noise / jnp.sqrt(levels[999]), rtol=1e-4)
    unguided = sample(trained, some, 0.0)
    chex.assert_tree_all_finite(unguided)
    np.testing.assert_allclose(unguided, sample(trained, others, 0.0), rtol=1e-5)
    guided = sample(trained, some, 2.0), sample(trained, others, 2.0)
    np.testing.assert_allclose(guided[0][1], guided[1][1], rtol=1e-5)
    assert not np.allclose(guided[0][0], guided[1][0], rtol=1e-2)


def test_rectified_flow_samples_flux_which_knows_differences_of_positions_only():
    model, example, fresh, trained = made("flux")
    noise, given = example["latents"], {k: v for k, v in example.items() if k not in ("latents", "timestep")}
    times = layers.shift_times(jnp.linspace(0, 1, 5), 3.0)

    @jax.jit
    def sample(variables, given):
        def velocity(x, time):
            # Flux speaks of the share of noise, and of noise - data.
            return -model.apply(variables, x, jnp.full(len(x), 1 - time), **given).sample

        return layers.integrate_flow(velocity, noise, times)

    text = jnp.zeros((example["context"].shape[1], 3))
    given["context_positions"] = text
    np.testing.assert_allclose(sample(fresh, given), noise)
    here = sample(trained, given)
    chex.assert_tree_all_finite(here)
    moved = {"positions": given["positions"] + jnp.array([2, 5, 9]), "context_positions": text + jnp.array([2, 5, 9])}
    np.testing.assert_allclose(sample(trained, given | moved), here, atol=1e-4)
    apart = sample(trained, given | {"positions": moved["positions"]})
    assert not np.allclose(apart, here, atol=1e-3)


def test_latents_are_packed_channel_by_channel_and_back():
    latents = jax.random.normal(KEY, (2, 4, 6, 3))
    tokens = pack_latents(latents)
    np.testing.assert_array_equal(unpack_latents(tokens, (4, 6)), latents)
    np.testing.assert_array_equal(tokens[0, 4].reshape(3, 2, 2), latents[0, 2:4, 2:4].transpose(2, 0, 1))
    np.testing.assert_array_equal(image_positions((2, 3))[4], [0, 1, 1])


def test_a_fresh_controlnet_changes_nothing_and_another_something():
    unet, example, _, weights = made("sd_unet")
    control, more, fresh, trained = made("controlnet")
    image = {"image": more["image"]}
    residuals = jax.jit(lambda v: control.apply(v, **example, **image, scale=0.5))
    apply = jax.jit(lambda residuals: unet.apply(weights, **example, residuals=residuals).sample)
    nothing = jax.tree.map(jnp.zeros_like, residuals(fresh))
    chex.assert_trees_all_equal(residuals(fresh), nothing)
    plain = jax.jit(lambda: unet.apply(weights, **example).sample)()
    np.testing.assert_allclose(apply(nothing), plain, atol=1e-5)
    assert not np.allclose(apply(residuals(trained)), plain, atol=1e-2)


def test_unets_attend_to_the_tokens_that_are_there_and_take_odd_sizes():
    unet, example, _, weights = made("sd_unet", 1)
    odd = example | {"latents": jax.random.normal(KEY, (1, 5, 7, 4))}
    apply = jax.jit(lambda **given: unet.apply(weights, **given).sample)
    there = jnp.array([[True, True, True, False, False]])
    changed = odd["context"].at[:, 3:].add(5.0)
    masked = apply(**odd, context_mask=there)
    assert masked.shape == (1, 5, 7, 4)
    np.testing.assert_allclose(apply(**odd | {"context": changed}, context_mask=there), masked, atol=1e-5)
    assert not np.allclose(apply(**odd, context_mask=jnp.ones_like(there)), masked, atol=1e-3)


def test_joint_layers_are_scanned_beside_constants():
    record = zoo.backbone("mmdit")
    model = zoo.create(record.slug, "tiny", num_layers=3, dual_layers=())
    example = record.example(model.config, batch_size=1, key=KEY)
    variables = noisy(jax.tree.map(lambda s: jnp.zeros(s.shape), variable_shapes(record, model)))

    def apply(options):
        with execution(options):
            jaxpr = jax.make_jaxpr(lambda v: model.apply(v, **example).sample)(variables)
            return jaxpr, jax.jit(lambda v: model.apply(v, **example).sample)(variables)

    scanned, values = apply(Execution(scan=True, remat="full"))
    assert "scan" in str(scanned)
    np.testing.assert_allclose(values, apply(Execution())[1], atol=1e-5)


def test_scaled_latents_go_back():
    config = zoo.backbone("vae_kl").config("flux.1")
    latents = jax.random.normal(KEY, (1, 2, 2, 16))
    scaled = scale_latents(config, latents)
    np.testing.assert_allclose(scaled, (latents - 0.1159) * 0.3611, rtol=1e-5)
    np.testing.assert_allclose(unscale_latents(config, scaled), latents, rtol=1e-4, atol=1e-6)
