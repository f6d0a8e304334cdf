"""Diffusion, flows, vector quantisation and low-rank maps against closed forms."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers

KEYS = jax.random.split(jax.random.key(2), 8)
normal = jax.random.normal
close = partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-5)
X, NOISE = normal(KEYS[0], (3, 4, 5)), normal(KEYS[1], (3, 4, 5))
LEVELS = jnp.array([0.9, 0.5, 0.1])


# ---- schedules and noise ---------------------------------------------------------------------------------------------


def test_schedules_are_products_of_their_betas():
    betas = np.linspace(1e-4, 0.02, 1000)
    close(layers.diffusion_schedule(1000), np.cumprod(1 - betas).astype(np.float32))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    latent = layers.diffusion_schedule(1000, kind="scaled_linear", first=0.00085, last=0.012)
    close(latent, np.cumprod(1 - betas).astype(np.float32))
    cosine = layers.diffusion_schedule(100, kind="squaredcos")
    expected = (
        np.cos((np.arange(1, 100) / 100 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    )
    close(cosine[:99], expected.astype(np.float32))
    # The last beta would be 1; it is held at 0.999.
    np.testing.assert_allclose(cosine[99] / cosine[98], 0.001, rtol=1e-4)
    with pytest.raises(ValueError, match="kind 'cosine' is not one of linear"):
        layers.diffusion_schedule(10, kind="cosine")


def test_timesteps_by_hand():
    np.testing.assert_array_equal(layers.diffusion_timesteps(1000, 4), [750, 500, 250, 0])
    np.testing.assert_array_equal(layers.diffusion_timesteps(1000, 4, offset=1), [751, 501, 251, 1])
    np.testing.assert_array_equal(layers.diffusion_timesteps(1000, 4, spacing="trailing"), [999, 749, 499, 249])
    np.testing.assert_array_equal(layers.diffusion_timesteps(1000, 4, spacing="linspace"), [999, 666, 333, 0])
    with pytest.raises(ValueError, match="spacing 'even' is not one of"):
        layers.diffusion_timesteps(10, 2, spacing="even")
    with pytest.raises(ValueError, match=r"steps 11 is not in 1\.\.10"):
        layers.diffusion_timesteps(10, 11)


def test_noise_keeps_variance_and_renoising_is_consistent():
    ones = jnp.ones(20000)
    noisy = layers.add_noise(normal(KEYS[2], ones.shape), normal(KEYS[3], ones.shape), 0.3)
    np.testing.assert_allclose(jnp.var(noisy), 1.0, atol=0.03)
    # 0 noise: only the signal's share matters.
    close(layers.renoise(layers.add_noise(X, 0 * X, 0.8), 0 * X, 0.8, 0.2), layers.add_noise(X, 0 * X, 0.2))


@pytest.mark.parametrize("prediction", ["noise", "sample", "velocity"])
def test_a_perfect_model_is_split_into_what_was_mixed(prediction):
    x = layers.add_noise(X, NOISE, LEVELS)
    output = layers.prediction_target(X, NOISE, LEVELS, prediction=prediction)
    close(layers.split_prediction(x, output, LEVELS, prediction=prediction), (X, NOISE))
    step = partial(layers.ddim_step, x, output, LEVELS, prediction=prediction)
    # Deterministic steps of a perfect model stay on the line of this sample and this noise, either way.
    for direction in ("consistent", "clipped"):
        close(step(jnp.full(3, 0.95), direction=direction), layers.add_noise(X, NOISE, 0.95))
    close(step(LEVELS / 2), layers.add_noise(X, NOISE, LEVELS / 2))
    close(step(jnp.ones(3), clip=0.5), jnp.clip(X, -0.5, 0.5))


def test_a_raw_direction_is_the_output_itself():
    x = layers.add_noise(X, NOISE, 0.5)
    ours = layers.ddim_step(x, X, 0.5, 0.8, prediction="sample", direction="raw", clip=1.0)
    close(ours, np.sqrt(0.8) * np.clip(X, -1, 1) + np.sqrt(0.2) * np.asarray(X))


def test_ddim_with_eta_one_has_the_posterior_of_ddpm():
    x, fresh = layers.add_noise(X, NOISE, 0.5), normal(KEYS[4], X.shape)
    close(
        layers.ddim_step(x, NOISE, 0.5, 0.7, eta=1.0, noise=fresh), layers.ddpm_step(x, NOISE, 0.5, 0.7, fresh),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    large = layers.ddpm_step(x, NOISE, 0.5, 0.7, fresh, variance="large")
    small = layers.ddpm_step(x, NOISE, 0.5, 0.7, fresh)
    beta = 1 - 0.5 / 0.7
    close(large - small, (np.sqrt(beta) - np.sqrt(beta * 0.3 / 0.5)) * fresh, atol=1e-5)
    close(layers.ddpm_step(x, NOISE, 0.5, 1.0, fresh, clip=0.5), jnp.clip(X, -0.5, 0.5), atol=1e-4)


def test_inversion_comes_back():
    """A model that is right about Gaussian data: noise up along the levels, then down again."""
    levels = jnp.linspace(0.99, 0.05, 200)

    def model(x, abar):
        # E[noise | x] for data of variance 4.
        return jnp.sqrt(1 - abar) * x / (4 * abar + 1 - abar)

    def walk(x, levels):
        for start, stop in itertools.pairwise(levels):
            x = layers.ddim_step(x, model(x, start), start, stop)
        return x

    back = walk(walk(X, levels), levels[::-1])
    np.testing.assert_allclose(back, X, atol=0.05)


def test_diffusion_names_what_is_wrong():
    with pytest.raises(ValueError, match="prediction 'v' is not one of noise, sample, velocity"):
        layers.prediction_target(X, NOISE, 0.5, prediction="v")
    with pytest.raises(ValueError, match="split_prediction: prediction 'v'"):
        layers.ddim_step(X, NOISE, 0.5, 0.7, prediction="v")
    with pytest.raises(ValueError, match="direction 'back' is not one of"):
        layers.ddim_step(X, NOISE, 0.5, 0.7, direction="back")
    with pytest.raises(ValueError, match="variance 'tiny' is not one of"):
        layers.ddpm_step(X, NOISE, 0.5, 0.7, NOISE, variance="tiny")


# ---- flows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint"])
def test_a_straight_flow_needs_one_step(method):
    x, velocity = layers.flow_pair(X, NOISE, jnp.zeros(3))
    close(x, NOISE)
    close(layers.integrate_flow(lambda x, t: velocity, x, jnp.array([0.0, 1.0]), method=method), X)
    final, path = layers.integrate_flow(
        lambda x, t: velocity, x, jnp.linspace(0, 1, 5), method=method, return_path=True
    )
    close(path[2], layers.flow_pair(X, NOISE, jnp.full(3, 0.5))[0])
    close(path[-1], final)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_order_of_the_solvers(method, order):
    """dx/dt = t x has the solution exp(t^2 / 2)."""

    def error(steps):
        final = layers.integrate_flow(lambda x, t: t * x, jnp.ones(1), jnp.linspace(0, 1, steps + 1), method=method)
        return abs(float(final[0]) - np.exp(0.5))

    assert abs(np.log2(error(8) / error(16)) - order) < 0.35


def test_times():
    times = layers.logit_normal_times(KEYS[0], shape=(20000,), mean=-0.8, deviation=0.8)
    logits = np.log(times / (1 - times))
    np.testing.assert_allclose([logits.mean(), logits.std()], [-0.8, 0.8], atol=0.03)
    sigma = jnp.linspace(0, 1, 6)
    close(1 - layers.shift_times(1 - sigma, 5.0), 5 * sigma / (1 + 4 * sigma))
    close(layers.shift_times(sigma, 1.0), sigma)
    with pytest.raises(ValueError, match="method 'rk4' is not one of euler, heun, midpoint"):
        layers.integrate_flow(lambda x, t: x, X, sigma, method="rk4")


def test_guidance_only_inside_its_interval():
    close(layers.classifier_free_guidance(X, NOISE, 1.0), X)
    close(layers.classifier_free_guidance(X, NOISE, 0.0), NOISE)
    ours = layers.classifier_free_guidance(X, NOISE, 3.0, time=jnp.array([0.05, 0.5, 1.0]), interval=(0.1, 1.0))
    close(ours[0], X[0])
    close(ours[1:], (NOISE + 3 * (X - NOISE))[1:])
    with pytest.raises(ValueError, match="an interval needs the time"):
        layers.classifier_free_guidance(X, NOISE, 3.0, interval=(0.1, 1.0))


# ---- vector quantisation ---------------------------------------------------------------------------------------------

CODES = normal(KEYS[5], (7, 5))


def test_the_nearest_code_and_a_gradient_straight_through():
    quantized, index = layers.vector_quantize(X, CODES)
    distance = np.linalg.norm(np.asarray(X)[..., None, :] - np.asarray(CODES), axis=-1)
    np.testing.assert_array_equal(index, distance.argmin(-1))
    close(quantized, CODES[index])
    weight = normal(KEYS[6], X.shape)
    to_x, to_codes = jax.grad(lambda x, c: jnp.sum(weight * layers.vector_quantize(x, c)[0]), argnums=(0, 1))(X, CODES)
    close(to_x, weight)
    assert not jnp.any(to_codes)
    loss, slope = jax.value_and_grad(layers.commitment_loss)(X, CODES, index)
    close(loss, np.mean(np.square(X - CODES[index])))
    close(slope, 2 * (X - CODES[index]) / X.size)


def test_cosine_quantisation_ignores_length():
    _, index = layers.vector_quantize(X, CODES, metric="cosine")
    _, scaled = layers.vector_quantize(7 * X, CODES * jnp.arange(1.0, 8.0)[:, None], metric="cosine")
    np.testing.assert_array_equal(index, scaled)
    with pytest.raises(ValueError, match="metric 'dot' is not one of euclidean, cosine"):
        layers.vector_quantize(X, CODES, metric="dot")


def test_codebooks_move_to_the_means_of_their_vectors():
    state = layers.CodebookState(CODES, jnp.ones(7), CODES)
    _, index = layers.vector_quantize(X, CODES)
    mask = jnp.arange(12).reshape(3, 4) < 10
    moved = layers.update_codebook(state, X, index, decay=0.0, epsilon=0.0, mask=mask)
    flat, where = np.asarray(X).reshape(12, 5)[:10], np.asarray(index).reshape(-1)[:10]
    for code in set(where.tolist()):
        np.testing.assert_allclose(moved.codes[code], flat[where == code].mean(0), rtol=1e-4, atol=1e-5)
    half = layers.update_codebook(state, X, index, decay=0.5)
    close(half.counts, 0.5 + 0.5 * np.bincount(np.asarray(index).reshape(-1), minlength=7))
    assert bool(jnp.all(jnp.isfinite(half.codes)))


def test_residual_codes_leave_less_each_time():
    codebooks = jnp.concatenate([normal(KEYS[7], (3, 16, 5)) * jnp.array([1.0, 0.5, 0.2])[:, None, None]])
    quantized, index = layers.residual_quantize(X, codebooks)
    assert index.shape == (3, 4, 3)
    close(quantized, sum(codebooks[q][index[..., q]] for q in range(3)), rtol=1e-4, atol=1e-5)
    first, _ = layers.vector_quantize(X, codebooks[0])
    assert float(jnp.sum(jnp.square(X - quantized))) < float(jnp.sum(jnp.square(X - first)))
    close(jax.grad(lambda x: jnp.sum(layers.residual_quantize(x, codebooks)[0]))(X), jnp.ones_like(X))


def test_perplexity_counts_the_codes_in_use():
    np.testing.assert_allclose(layers.code_perplexity(jnp.arange(8) % 4, size=16), 4.0, rtol=1e-5)
    np.testing.assert_allclose(layers.code_perplexity(jnp.zeros(8, int), size=16), 1.0, rtol=1e-5)


# ---- low-rank maps ---------------------------------------------------------------------------------------------------

KERNEL, DOWN, UP, BIAS = (normal(KEYS[i], shape) for i, shape in enumerate([(5, 6), (5, 2), (2, 6), (6,)]))


def test_lora_equals_its_merged_kernel():
    ours = layers.lora_linear(X, KERNEL, DOWN, UP, scale=0.5, bias=BIAS)
    close(ours, X @ layers.lora_merge(KERNEL, DOWN, UP, scale=0.5) + BIAS)
    some = jnp.arange(4) < 2
    masked = layers.lora_linear(X, KERNEL, DOWN, UP, token_mask=jnp.broadcast_to(some, (3, 4)))
    close(masked[:, 2:], X[:, 2:] @ KERNEL)
    close(masked[:, :2], layers.lora_linear(X, KERNEL, DOWN, UP)[:, :2])


def test_mixtures_of_experts():
    down, up = normal(KEYS[5], (3, 5, 2)), normal(KEYS[6], (3, 2, 6))
    one = jax.nn.one_hot(jnp.full((3, 4), 1), 3)
    close(
        layers.lora_mixture(X, KERNEL, down, up, one, scale=2.0),
        layers.lora_linear(X, KERNEL, down[1], up[1], scale=2.0),
    )
    mean = jnp.mean(jnp.einsum("eir,ero->eio", down, up), axis=0)
    close(layers.lora_mixture(X, KERNEL, down, up, jnp.full((3, 4, 3), 1 / 3)), X @ (KERNEL + mean), atol=1e-4)


def test_gates_keep_the_largest_and_may_pass_gradients_to_all():
    logits = jnp.array([[1.0, 3.0, 2.0, 0.0]])
    sparse, dense = layers.top_k_gates(logits, k=2)
    close(dense, jax.nn.softmax(logits))
    close(sparse, jnp.array([[0.0, dense[0, 1], dense[0, 2], 0.0]]) / (dense[0, 1] + dense[0, 2]))
    weight = jnp.arange(4.0)
    through = jax.grad(lambda x: jnp.sum(weight * layers.top_k_gates(x, k=2, straight_through=True)[0]))(logits)
    close(through, jax.grad(lambda x: jnp.sum(weight * jax.nn.softmax(x)))(logits))
    close(layers.top_k_gates(logits, k=2, straight_through=True)[0], sparse)
    with pytest.raises(ValueError, match=r"k 5 is not in 1\.\.4"):
        layers.top_k_gates(logits, k=5)


def test_gated_maps_are_exact_or_within_their_bound():
    basis = jnp.linalg.qr(normal(KEYS[3], (5, 3)))[0]
    inside = normal(KEYS[4], (6, 3)) @ basis.T
    x = jnp.concatenate([inside + 0.01 * normal(KEYS[5], (6, 5)), normal(KEYS[6], (6, 5)), jnp.zeros((1, 5))])
    y, fast = layers.gated_low_rank_linear(x, KERNEL, basis, 0.1, bias=BIAS)
    assert bool(jnp.all(fast[:6]))
    assert not bool(fast[12])
    error = jnp.linalg.norm(y - (x @ KERNEL + BIAS), axis=-1)
    norm = jnp.linalg.norm(KERNEL, ord=2)
    assert bool(jnp.all(error <= jnp.where(fast, norm * 0.1 * jnp.linalg.norm(x, axis=-1), 1e-5) + 1e-5))
    assert float(error[:6].max()) > 1e-4
    exact, never = layers.gated_low_rank_linear(x, KERNEL, basis, 0.0)
    assert not jnp.any(never)
    close(exact, x @ KERNEL)
    bad = layers.gated_low_rank_linear(x.at[0, 0].set(jnp.inf), KERNEL, basis, 0.1)[1]
    assert not bool(bad[0])


def test_the_subspace_is_that_of_the_singular_vectors():
    samples = normal(KEYS[4], (50, 5)) * jnp.array([9.0, 6.0, 3.0, 0.2, 0.1])
    basis = layers.principal_subspace(samples, normal(KEYS[5], (5, 3)), iterations=20)
    right = np.linalg.svd(np.asarray(samples))[2][:3]
    close(jnp.abs(right @ basis), jnp.eye(3), atol=1e-3)


# ---- what holds for all ----------------------------------------------------------------------------------------------


def test_bfloat16_in_bfloat16_out_and_vmap():
    x, noise = X.astype(jnp.bfloat16), NOISE.astype(jnp.bfloat16)
    runs = {
        "add_noise": lambda x, n: layers.add_noise(x, n, 0.5),
        "ddim_step": lambda x, n: layers.ddim_step(x, n, 0.5, 0.7),
        "ddpm_step": lambda x, n: layers.ddpm_step(x, n, 0.5, 0.7, n),
        "flow_pair": lambda x, n: layers.flow_pair(x, n, 0.5)[0],
        "vector_quantize": lambda x, n: layers.vector_quantize(x, CODES)[0],
        "lora_linear": lambda x, n: layers.lora_linear(x, KERNEL.astype(x.dtype), DOWN, UP),
        "gated": lambda x, n: layers.gated_low_rank_linear(x, KERNEL, jnp.eye(5)[:, :2], 0.5)[0],
    }
    for name, run in runs.items():
        narrow, wide = run(x, noise), run(x.astype(jnp.float32), noise.astype(jnp.float32))
        assert narrow.dtype == jnp.bfloat16, name
        np.testing.assert_allclose(narrow.astype(jnp.float32), wide, rtol=3e-2, atol=6e-2, err_msg=name)
        close(jax.vmap(run)(X, NOISE), run(X, NOISE))
        with jax.disable_jit():
            close(run(X, NOISE), jax.jit(run)(X, NOISE))
