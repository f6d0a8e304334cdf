"""Token by token equals all at once, and padding changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.backbones.generation import generate, left_align, sample

NAMES = [e.name for e in zoo.backbones(status="works") if zoo.backbone(e.name).cache is not None]
KEY = jax.random.key(0)

each_decoder = pytest.mark.parametrize("name", NAMES)


@functools.cache
def built(name):
    """(record, model, variables at random parameters, jitted apply, what is given beside the tokens) of tiny."""
    record = zoo.backbone(name)
    model = zoo.create(record.slug, "tiny")
    example = record.example(model.config, batch_size=2, key=KEY)
    variables = jax.jit(lambda example: record.initialize(model, {"params": KEY}, example))(example)
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(KEY, len(leaves))
    leaves = [v + 0.3 * jax.random.normal(k, v.shape) for k, v in zip(keys, leaves, strict=True)]
    beside = {k: v for k, v in example.items() if k != "input_ids"}  # an encoder's tokens, where there is one
    return record, model, tree.unflatten(leaves), jax.jit(model.apply), beside


def row_of(beside, i):
    return {k: v[i : i + 1] for k, v in beside.items()}


WIDTH = 12  # of every call without a cache, so that each backbone is compiled once


def prompts(model, *lengths):
    """Rows of random tokens, ragged."""
    numbers = np.random.default_rng(0)
    return [numbers.integers(3, model.config.vocab_size, n) for n in lengths]


def padded(rows, side, width):
    ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = row, 1
    return jnp.asarray(ids), jnp.asarray(mask)


def alone(name, i, row):
    """Logits of one row, without a cache or a mask: what lies behind its tokens cannot be seen from them."""
    _, _, variables, apply, beside = built(name)
    ids = jnp.asarray([[*row, *[0] * (WIDTH - len(row))]])
    return apply(variables, ids, **row_of(beside, i)).logits[0, : len(row)]


@each_decoder
def test_pieces_of_ragged_rows_with_a_cache_equal_the_whole(name):
    record, model, variables, apply, beside = built(name)
    rows = prompts(model, 8, 6)
    firsts, mask = padded([row[:-3] for row in rows], "right", 5)
    output = apply(variables, firsts, attention_mask=mask, cache=record.start(model.config, 2, 10), **beside)
    pieces = [[output.logits[i, : len(row) - 3]] for i, row in enumerate(rows)]
    for step in (-3, -2, -1):
        output = apply(variables, jnp.asarray([[row[step]] for row in rows]), cache=output.cache)
        for i in range(2):
            pieces[i].append(output.logits[i])
    for i, row in enumerate(rows):
        np.testing.assert_allclose(jnp.concatenate(pieces[i]), alone(name, i, row), atol=1e-5)


@each_decoder
def test_padding_on_either_side_changes_no_real_token(name):
    _, model, variables, apply, beside = built(name)
    rows = prompts(model, 6, 3)
    for side in ("left", "right"):
        ids, mask = padded(rows, side, 8)
        logits = apply(variables, ids, attention_mask=mask, **beside).logits
        for i, row in enumerate(rows):
            np.testing.assert_allclose(logits[i][np.asarray(mask[i], bool)], alone(name, i, row), atol=1e-5)


@each_decoder
def test_generation_is_the_greedy_loop_whatever_the_padding(name):
    _, model, variables, _, beside = built(name)
    rows, steps = prompts(model, 6, 3), 5
    expected = []
    for i, row in enumerate(rows):
        tokens = list(row)
        for _ in range(steps):
            tokens.append(int(jnp.argmax(alone(name, i, tokens)[-1])))
        expected.append(tokens[len(row) :])
    for side in ("left", "right"):
        ids, mask = padded(rows, side, 7)
        made = generate(
            model, variables, ids, attention_mask=mask, max_new_tokens=steps, eos_token_id=(), inputs=beside
        )
        np.testing.assert_array_equal(made.tokens, expected)
        np.testing.assert_array_equal(made.lengths, steps)


def test_a_row_ends_with_the_end_token_and_the_others_go_on():
    _, model, variables, _, _ = built("llama")
    ids, mask = padded(prompts(model, 6, 3), "left", 6)
    free = np.asarray(generate(model, variables, ids, attention_mask=mask, max_new_tokens=8, eos_token_id=()).tokens)
    end = int(free[0, 2])
    assert end not in free[0, :2]
    made = generate(
        model, variables, ids, attention_mask=mask, max_new_tokens=8, eos_token_id=(end, 10_000), pad_token_id=63
    )
    np.testing.assert_array_equal(made.tokens[0], [*free[0, :3], *[63] * 5])
    assert made.lengths[0] == 3
    stop = int(made.lengths[1])
    np.testing.assert_array_equal(made.tokens[1, :stop], free[1, :stop])


def test_bfloat16_weights_generate_with_norms_in_float32():
    _, model, variables, _, _ = built("llama")
    mixed = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.ndim > 1 else a, variables)
    made = generate(model, mixed, jnp.ones((1, 3), jnp.int32), max_new_tokens=3, eos_token_id=())
    assert made.tokens.shape == (1, 3)


def test_sampling_follows_the_distribution_and_its_cuts():
    logits = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1]))
    many = jnp.tile(logits, (4000, 1))

    def shares(**options):
        return np.bincount(sample(many, KEY, **options), minlength=4) / 4000

    np.testing.assert_allclose(shares(temperature=1.0), [0.4, 0.3, 0.2, 0.1], atol=0.03)
    squared = np.square([0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(shares(temperature=0.5), squared / squared.sum(), atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0], atol=0.03)
    # The first two have 0.7 together: 0.75 needs the third.
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0], atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.65), [4 / 7, 3 / 7, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_k=3, top_p=0.7), [4 / 7, 3 / 7, 0, 0], atol=0.03)
    assert set(np.asarray(sample(many, KEY))) == {0}
    assert set(np.asarray(sample(many, KEY, temperature=1.0, top_p=1e-6))) == {0}


def test_drawn_text_depends_on_the_key_alone():
    _, model, variables, _, _ = built("llama")
    ids = jnp.asarray(np.stack(prompts(model, 5, 5)))

    def draw(key, **options):
        options = {"temperature": 1.0, **options}
        return np.asarray(generate(model, variables, ids, max_new_tokens=8, key=key, eos_token_id=(), **options).tokens)

    np.testing.assert_array_equal(draw(KEY), draw(KEY))
    assert not np.array_equal(draw(KEY), draw(jax.random.key(1)))
    greedy = generate(model, variables, ids, max_new_tokens=8, eos_token_id=()).tokens
    np.testing.assert_array_equal(draw(KEY, top_k=1), greedy)


def test_real_tokens_move_to_the_left_in_their_order():
    ids, present = jnp.asarray([[9, 1, 9, 2, 3]]), jnp.asarray([[0, 1, 0, 1, 1]], bool)
    moved, mask = left_align(ids, present)
    np.testing.assert_array_equal(moved[0, :3], [1, 2, 3])
    np.testing.assert_array_equal(mask, [[True, True, True, False, False]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 should be at least 1"),
        ({"temperature": 1.0}, "temperature 1.0 should be 0, or positive together with a key"),
        ({"top_p": 1.5}, "top_p 1.5 should be above 0 and at most 1"),
        ({"top_k": 0}, "top_k 0 should be at least 1"),
        ({"attention_mask": np.ones((1, 2))}, "a mask of that shape"),
    ],
)
def test_nonsense_is_refused(options, message):
    _, model, variables, _, _ = built("llama")
    with pytest.raises(zoo.UserError, match=message):
        generate(model, variables, jnp.ones((1, 3), jnp.int32), **{"max_new_tokens": 2, **options})
