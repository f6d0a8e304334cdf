"""Qwen2-VL beyond the sweeps: where tokens of images and videos lie, patches, windows, decoding after an image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.backbones.qwen2_vl import pack, to_patches, token_positions

KEY = jax.random.key(0)
IMAGE, VIDEO = 2, 1
CONFIG = zoo.backbone("qwen2_5_vl").config()


def by_hand(ids, grids, seconds, *, per_second=2, merge=2):
    """Token by token, from section 2.1 of the paper."""
    found, following, waiting = [], 0, list(zip(grids, seconds, strict=True))
    places = list(ids)
    while places:
        if places[0] not in (IMAGE, VIDEO):
            found.append((following,) * 3)
            following += 1
            places = places[1:]
            continue
        (depth, rows, columns), second = waiting.pop(0)
        own = [
            (int(f * per_second * second), r, c)
            for f in range(depth)
            for r in range(rows // merge)
            for c in range(columns // merge)
        ]
        found += [tuple(following + p for p in place) for place in own]
        following = max(max(place) for place in found) + 1
        places = places[len(own) :]
    return found, following


def test_positions_of_images_and_videos_on_either_side_of_padding():
    texts = [
        [9, *[IMAGE] * 6, 8, 7, *[VIDEO] * 12, 6, 5],
        [*[IMAGE] * 2, *[IMAGE] * 4, 9],
        [9, 8, 7, 6],
    ]
    grids = [[(1, 4, 6), (3, 4, 4)], [(1, 4, 2), (1, 4, 4)], [(0, 0, 0), (0, 0, 0)]]
    seconds = [[1.0, 0.75], [1.0, 1.0], [1.0, 1.0]]
    width = max(map(len, texts)) + 1
    for left in (False, True):
        ids, present = np.full((3, width), IMAGE), np.zeros((3, width), bool)
        for row, (text, line) in enumerate(zip(texts, present, strict=True)):
            place = slice(width - len(text), width) if left else slice(0, len(text))
            ids[row, place], line[place] = text, True
        made, following = token_positions(
            CONFIG, jnp.asarray(ids), jnp.asarray(grids), present=jnp.asarray(present), seconds=jnp.asarray(seconds)
        )
        for row, text in enumerate(texts):
            expected, end = by_hand(text, [g for g in grids[row] if g[0]], seconds[row][: 2 if row < 2 else 0])
            np.testing.assert_array_equal(made[row][present[row]], expected)
            np.testing.assert_array_equal(made[row][~present[row]], 0)
            assert following[row] == end


def test_patches_are_those_of_a_loop():
    c = CONFIG.vision
    frames = np.random.default_rng(0).normal(size=(3, 16, 24, 3)).astype(np.float32)
    patches, grid = to_patches(c, jnp.asarray(frames))
    assert grid == (2, 4, 6)
    whole, expected = np.concatenate([frames, frames[-1:]]), []
    for depth, block_row, block_column in np.ndindex(2, 2, 3):
        for row, column in np.ndindex(2, 2):
            top, left = 4 * (2 * block_row + row), 4 * (2 * block_column + column)
            cube = whole[2 * depth : 2 * depth + 2, top : top + 4, left : left + 4]
            expected.append(cube.transpose(3, 0, 1, 2).reshape(-1))
    np.testing.assert_array_equal(patches, expected)
    with pytest.raises(ValueError, match="not multiples of 8 pixels"):
        to_patches(c, jnp.zeros((1, 12, 16, 3)))


def test_decoding_goes_on_after_images_and_rows_keep_their_own():
    model = zoo.create("backbone_qwen2_5_vl")
    record = zoo.backbone("qwen2_5_vl")
    images = [to_patches(CONFIG.vision, jax.random.normal(k, (1, 16, n, 3))) for k, n in ((KEY, 24), (KEY, 8))]
    packed = pack([images[:1], images[1:]])
    ids = jnp.asarray([[9, *[IMAGE] * 6, 8, 7, 6], [9, IMAGE, IMAGE, 8, 7, 6, 5, 9, 0, 0]])
    mask = jnp.asarray([[1] * 10, [1] * 8 + [0, 0]])
    variables = jax.jit(lambda: model.init(KEY, ids, **packed))()
    apply = jax.jit(model.apply)
    more = jnp.asarray([[11, 12], [13, 14]])
    output = apply(variables, ids, attention_mask=mask, cache=record.start(CONFIG, 2, 16), **packed)
    output = apply(variables, more, cache=output.cache)
    joined = jnp.concatenate([ids, more], axis=1).at[1, 8:].set(jnp.asarray([13, 14, 0, 0]))
    whole = apply(variables, joined, attention_mask=jnp.asarray([[1] * 12, [1] * 10 + [0, 0]]), **packed).logits
    np.testing.assert_allclose(output.logits[0], whole[0, 10:], atol=1e-5)
    np.testing.assert_allclose(output.logits[1], whole[1, 8:10], atol=1e-5)
    other = packed | {"patches": packed["patches"].at[0].add(1.0)}
    changed = apply(variables, joined, attention_mask=jnp.asarray([[1] * 12, [1] * 10 + [0, 0]]), **other).logits
    np.testing.assert_array_equal(changed[1], whole[1])
    assert not np.allclose(changed[0, 6:], whole[0, 6:], atol=1e-4)
