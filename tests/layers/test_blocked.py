"""Attention in blocks, caches, streams and kernels of the platforms, all against the plain reference."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from layers import kernels
from layers.blocked import _bands

KEYS = jax.random.split(jax.random.key(3), 8)
normal = jax.random.normal
close = partial(chex.assert_trees_all_close, rtol=3e-5, atol=3e-5)


def arrays(queries, keys, *, heads=4, key_heads=2, batch=2, dim=8, value_dim=6):
    return (
        normal(KEYS[0], (batch, queries, heads, dim)),
        normal(KEYS[1], (batch, keys, key_heads, dim)),
        normal(KEYS[2], (batch, keys, key_heads, value_dim)),
    )


def gradients(function, arguments):
    return jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), argnums=tuple(range(len(arguments))))(*arguments)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Blocks of 16 queries, so that short inputs have several bands and a rest."""
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layers.blocked._BLOCK_ELEMENTS", 16 * 16)
        patch.setattr("layers.blocked._MIN_QUERIES", 16)
        yield
    jax.clear_caches()


SEGMENTS = jnp.repeat(jnp.arange(4), 20)


def masks(queries, keys):
    present = jnp.arange(keys) % 5 != 2
    return {
        "none": None,
        "causal": layers.CausalMask(),
        "window": layers.WindowMask(left=9, right=2),
        "prefix": layers.PrefixMask(jnp.array([3, 11])),
        "segments": layers.SegmentMask(
            jnp.broadcast_to(SEGMENTS[:queries], (2, queries)), jnp.broadcast_to(SEGMENTS[:keys], (2, keys))
        ),
        "keys": layers.KeyMask(jnp.stack([present, jnp.zeros(keys, bool)])),
        "dense by head": jax.random.bernoulli(KEYS[5], 0.7, (1, 4, queries, keys)),
        "causal and keys": layers.CausalMask() & layers.KeyMask(jnp.stack([present, ~present])),
        "offset by row": layers.CausalMask(offset=jnp.array([2, 7])),
    }


LENGTHS = [((40, 71), name) for name in masks(1, 1)] + [((53, 53), "none"), ((53, 53), "causal"), ((1, 33), "window")]


@pytest.mark.parametrize(("lengths", "name"), LENGTHS, ids=str)
def test_blocks_equal_the_reference_under_every_mask(lengths, name):
    arguments = arrays(*lengths)
    attend = partial(layers.dot_product_attention, mask=masks(*lengths)[name])
    blocked, reference = (partial(attend, implementation=x) for x in ("blocked", "reference"))
    close(blocked(*arguments), reference(*arguments))
    close(gradients(blocked, arguments), gradients(reference, arguments))


@pytest.mark.parametrize("shape", [(1, 1, 1, 53), (2, 1, 53, 1), (4, 53, 53), (2, 4, 53, 53), (53, 53)], ids=str)
def test_biases_of_every_shape_and_their_gradients(shape):
    arguments = *arrays(53, 53), normal(KEYS[4], shape)

    def run(implementation, query, key, value, bias):
        return layers.dot_product_attention(
            query, key, value, bias=bias, mask=layers.CausalMask(), soft_cap=2.0, implementation=implementation
        )

    close(run("blocked", *arguments), run("reference", *arguments))
    close(gradients(partial(run, "blocked"), arguments), gradients(partial(run, "reference"), arguments))


def sinks_by_hand(query, key, value, sinks):
    """A sink is one more key, of score `sink` and value 0."""
    scores = jnp.einsum("bqhd,bshd->bhqs", query, jnp.repeat(key, 2, axis=2)) / np.sqrt(8)
    extra = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, extra], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bhqs,bshd->bqhd", weights, jnp.repeat(value, 2, axis=2))


@pytest.mark.parametrize("implementation", ["blocked", "reference", "xla"])
def test_sinks_are_keys_without_values(implementation):
    arguments = *arrays(53, 53), normal(KEYS[6], (4,))

    def run(query, key, value, sinks):
        return layers.dot_product_attention(query, key, value, sinks=sinks, implementation=implementation)

    close(run(*arguments), sinks_by_hand(*arguments))
    close(gradients(run, arguments), gradients(sinks_by_hand, arguments))


def test_sinks_belong_to_softmax():
    query, key, value = arrays(5, 5)
    with pytest.raises(ValueError, match="sinks belong to a softmax over the keys, not to normalizer 'relu'"):
        layers.dot_product_attention(query, key, value, sinks=jnp.zeros(4), normalizer="relu")


def test_memory_does_not_grow_with_the_square_of_the_length():
    """16 times the tokens, at most 24 times the temporary memory, forwards and backwards: far from 256 times."""

    def temporary(length):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(length, length, batch=1)]
        loss = jax.grad(
            lambda *a: jnp.sum(layers.dot_product_attention(*a, implementation="blocked")), argnums=(0, 1, 2)
        )
        return jax.jit(loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 24 * temporary(512)


def test_scores_under_a_window_grow_with_the_length(monkeypatch):
    monkeypatch.setattr("layers.blocked._MIN_QUERIES", 128)
    bands = {n: _bands(n, n, layers.WindowMask(255, 0)) for n in (4096, 65536)}
    scores = {n: sum(band.size * band.count * band.width for band in bands[n]) for n in bands}
    assert scores[65536] < 16.5 * scores[4096]
    assert scores[4096] < 4096 * (2 * 256 + 3 * 128)


def test_bfloat16_in_blocks():
    narrow = [x.astype(jnp.bfloat16) for x in arrays(53, 53)]
    output = layers.dot_product_attention(*narrow, implementation="blocked")
    assert output.dtype == jnp.bfloat16
    wide = layers.dot_product_attention(*(x.astype(jnp.float32) for x in narrow), implementation="reference")
    np.testing.assert_allclose(output.astype(jnp.float32), wide, rtol=1e-2, atol=1e-2)


def test_vmap_and_eager_in_blocks():
    arguments = arrays(37, 37)
    run = partial(layers.dot_product_attention, mask=layers.CausalMask(), implementation="blocked")
    expected = run(*arguments)
    close(jax.vmap(lambda *row: run(*(x[None] for x in row))[0])(*arguments), expected)
    with jax.disable_jit():
        close(run(*(x[:1, :17] for x in arguments)), expected[:1, :17])


def test_the_choice_follows_the_request(monkeypatch):
    """Blocks for long inputs, the table where blocks cannot serve; both give the same numbers."""
    monkeypatch.setattr("layers.softmax._CPU_DENSE_SCORES", 100)
    monkeypatch.setattr("layers.softmax._DENSE_SCORES", 100)
    arguments = arrays(41, 41)
    reference = partial(layers.dot_product_attention, implementation="reference")
    close(layers.dot_product_attention(*arguments), reference(*arguments))
    close(
        layers.dot_product_attention(*arguments, normalizer="sparsemax"),
        reference(*arguments, normalizer="sparsemax"),
    )


# ---- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"soft_cap": 2.0, "scale": 0.2}], ids=str)
def test_cached_steps_equal_the_whole(options):
    query, key, value = arrays(23, 23)
    expected = layers.dot_product_attention(query, key, value, mask=layers.CausalMask(), **options)
    cache = layers.empty_cache(2, 30, 2, 8, value_dim=6)
    outputs = []
    for start, stop in ((0, 10), (10, 11), (11, 12), (12, 23)):
        part = (x[:, start:stop] for x in (query, key, value))
        output, cache = layers.decode_step(*part, cache, **options)
        outputs.append(output)
    close(jnp.concatenate(outputs, axis=1), expected)
    np.testing.assert_array_equal(cache.length, [23, 23])


def test_rows_of_a_cache_may_have_different_lengths():
    query, key, value = arrays(12, 12)
    cache = layers.extend_cache(layers.empty_cache(2, 16, 2, 8, value_dim=6), key[:, :7], value[:, :7])
    # The second row goes on from its fourth token.
    cache = cache._replace(length=jnp.array([7, 4]))
    new = [jnp.stack([x[0, 7:9], x[1, 4:6]]) for x in (query, key, value)]
    output, _ = layers.decode_step(*new, cache)
    whole = layers.dot_product_attention(query, key, value, mask=layers.CausalMask())
    close(output, jnp.stack([whole[0, 7:9], whole[1, 4:6]]))


def test_a_window_in_a_cache_and_overflow():
    query, key, value = arrays(12, 12)
    window = layers.WindowMask(left=3)
    whole = layers.dot_product_attention(query, key, value, mask=layers.CausalMask() & window)
    cache = layers.extend_cache(layers.empty_cache(2, 12, 2, 8, value_dim=6), key[:, :11], value[:, :11])
    last = [x[:, 11:] for x in (query, key, value)]
    output, full = layers.decode_step(*last, cache, mask=layers.WindowMask(left=3, offset=cache.length))
    close(output, whole[:, 11:])
    beyond = layers.extend_cache(full, key[:, :1], value[:, :1])
    np.testing.assert_array_equal(beyond.key, full.key)
    np.testing.assert_array_equal(beyond.length, [13, 13])
    with pytest.raises(ValueError, match="13 tokens do not fit the cache's capacity 12"):
        layers.extend_cache(full, jnp.zeros((2, 13, 2, 8)), jnp.zeros((2, 13, 2, 6)))


# ---- streams and head norms ------------------------------------------------------------------------------------------


def test_streams_are_attended_together():
    query, key, value = arrays(9, 9)
    _, memory_key, memory_value = (normal(KEYS[7], x.shape)[:, :5] for x in (query, key, value))
    present = jnp.array([[True] * 5, [True, False, False, True, True]])
    keys, values, mask = layers.concatenate_streams(
        [(memory_key, memory_value, layers.KeyMask(present)), (key, value, layers.CausalMask())]
    )
    ours = layers.dot_product_attention(query, keys, values, mask=mask)
    causal = jnp.tril(jnp.ones((9, 9), bool))
    table = jnp.stack([jnp.concatenate([jnp.broadcast_to(row, (9, 5)), causal], axis=1) for row in present])
    close(ours, layers.dot_product_attention(query, keys, values, mask=table[:, None], implementation="reference"))
    *_, nothing = layers.concatenate_streams([(memory_key, memory_value), (key, value)])
    assert nothing is None


def test_norms_of_heads():
    x = normal(KEYS[0], (2, 3, 4, 8))
    close(jnp.mean(jnp.square(layers.normalize_heads(x)), -1), jnp.ones((2, 3, 4)), rtol=1e-4)
    close(jnp.linalg.norm(layers.normalize_heads(x, kind="l2"), axis=-1), jnp.ones((2, 3, 4)))
    temperature = jnp.arange(1.0, 5.0)[:, None]
    scaled = layers.normalize_heads(x, kind="l2", scale=temperature)
    close(jnp.linalg.norm(scaled, axis=-1), jnp.broadcast_to(temperature[:, 0], (2, 3, 4)))
    slope = jax.grad(lambda x: jnp.sum(layers.normalize_heads(x, kind="l2")))(jnp.zeros((1, 1, 1, 4)))
    assert bool(jnp.all(jnp.isfinite(slope)))
    with pytest.raises(ValueError, match="kind 'layer' is not one of rms, l2"):
        layers.normalize_heads(x, kind="layer")


# ---- kernels of the platforms ----------------------------------------------------------------------------------------


def test_kernels_say_what_they_cannot_do():
    query, key, value = arrays(128, 128)
    run = partial(layers.dot_product_attention, query, key, value)
    with pytest.raises(ValueError, match="implementation 'fast' is not one of reference, xla, blocked, cudnn"):
        run(implementation="fast")
    with pytest.raises(ValueError, match="implementation 'blocked' does not support return_weights"):
        run(implementation="blocked", return_weights=True)
    with pytest.raises(ValueError, match=r"implementation 'cudnn' does not support .*platform 'cpu', only 'gpu'"):
        run(implementation="cudnn")
    with pytest.raises(ValueError, match="implementation 'cudnn' does not support soft_cap; dtype float32"):
        run(implementation="cudnn", soft_cap=3.0)
    with pytest.raises(ValueError, match="implementation 'flash_tpu' does not support grouped heads; value"):
        run(implementation="flash_tpu")
    with pytest.raises(ValueError, match="lengths 100 and 100, only multiples of 128; masks other than"):
        layers.dot_product_attention(
            *arrays(100, 100, key_heads=4, value_dim=8), mask=layers.WindowMask(left=1), implementation="flash_tpu"
        )
    with pytest.raises(ValueError, match="'flash_tpu' does not support CausalMask with 128 queries and 256 keys"):
        layers.dot_product_attention(
            *arrays(128, 256, key_heads=4, value_dim=8), mask=layers.CausalMask(), implementation="flash_tpu"
        )
    mask = layers.DenseMask(jnp.ones((128, 128), bool)) & (layers.CausalMask() | layers.WindowMask(left=1))
    with pytest.raises(ValueError, match="'splash_tpu' does not support bias; DenseMask, Combined, only bands"):
        run(implementation="splash_tpu", bias=jnp.zeros(()), mask=mask)
    with pytest.raises(ValueError, match="'tokamax' does not support sinks"):
        run(implementation="tokamax", sinks=jnp.zeros(4))


@pytest.mark.parametrize("name", ["none", "causal", "segments", "bias"])
def test_the_flash_kernel_for_tpu_in_interpret_mode(name):
    from jax.experimental.pallas import tpu as pltpu

    arguments = arrays(128, 128, heads=2, key_heads=2, batch=1, dim=128, value_dim=128)
    segments = (jnp.arange(128) // 50)[None]
    options = {
        "none": {},
        "causal": {"mask": layers.CausalMask()},
        # No key is of the segment of the last queries.
        "segments": {"mask": layers.SegmentMask(segments, jnp.minimum(segments, 1))},
        "bias": {"bias": normal(KEYS[4], (2, 128, 128))},
    }[name]
    with pltpu.force_tpu_interpret_mode():
        ours = layers.dot_product_attention(*arguments, **options, implementation="flash_tpu")
    close(ours, layers.dot_product_attention(*arguments, **options, implementation="reference"), atol=1e-4)


@pytest.mark.parametrize("name", ["none", "causal", "window", "padding", "all"])
def test_the_splash_kernel_for_tpu_in_interpret_mode(name, monkeypatch):
    kernel = kernels.KERNELS["splash_tpu"]
    monkeypatch.setitem(kernels.KERNELS, "splash_tpu", kernel._replace(run=partial(kernel.run, interpret=True)))
    lengths = {"none": (128, 128), "causal": (256, 128), "window": (100, 300), "padding": (40, 130), "all": (130, 130)}
    query_length, key_length = lengths[name]
    arguments = arrays(query_length, key_length, heads=4, key_heads=2, batch=2, dim=64, value_dim=32)
    segments = jnp.broadcast_to(jnp.arange(key_length) // 50, (2, key_length))
    padding = layers.LengthMask(jnp.array([key_length - 7, 0]))
    options = {
        "none": {"scale": 0.3},
        # The first 128 queries see nothing.
        "causal": {"mask": layers.CausalMask()},
        "window": {"mask": layers.WindowMask(left=20, right=70) & layers.WindowMask(right=60)},
        "padding": {"mask": padding},
        "all": {
            "mask": layers.CausalMask()
            & layers.SegmentMask(segments, segments)
            & layers.KeyMask(segments != 1)
            & layers.LengthMask(jnp.array([key_length, 7])),
            "soft_cap": 2.0,
            "sinks": normal(KEYS[5], (4,)),
        },
    }[name]

    def outcome(implementation):
        def loss(arguments):
            return jnp.sum(jnp.sin(layers.dot_product_attention(*arguments, **options, implementation=implementation)))

        return layers.dot_product_attention(*arguments, **options, implementation=implementation), jax.grad(loss)(
            arguments
        )

    close(outcome("splash_tpu"), outcome("reference"), atol=1e-4)
