"""What image backbones do beyond the sweep: windows, statistics, positions, names in files, images among tokens."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import layers
import zoo
from tests.parity.harness import load_case
from zoo.backbones.encoder import fitting_positions
from zoo.backbones.hooks import Layer, plain_attention
from zoo.backbones.multimodal import place_features
from zoo.backbones.windows import WindowAttention
from zoo.blocks import BatchNorm

KEY = jax.random.key(0)
GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"


def made(name, batch_size=2, **overrides):
    """(record, model, example, variables, jitted apply) of the tiny config."""
    record = zoo.backbone(name)
    model = zoo.create(record.slug, "tiny", **overrides)
    example = record.example(model.config, batch_size=batch_size, key=KEY)
    variables = jax.jit(lambda e: record.initialize(model, {"params": KEY}, e))(example)
    return record, model, example, variables, jax.jit(model.apply)


def test_batch_norm_trains_on_the_batch_and_remembers_it_unbiased():
    x = 2 + 3 * jax.random.normal(KEY, (4, 5, 6, 3))
    model = BatchNorm()
    variables = model.init(KEY, x, train=False)
    y, moved = model.apply(variables, x, train=True, mutable=["batch_stats"])
    wide = np.asarray(x, np.float64).reshape(-1, 3)
    expected = (np.asarray(x, np.float64) - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    stats = moved["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * wide.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * wide.var(0, ddof=1), rtol=1e-5)
    assert stats["count"] == 1
    stats = {**variables, **moved}
    z = model.apply(stats, x, train=False)
    np.testing.assert_allclose(z, (x - stats["batch_stats"]["mean"]) / np.sqrt(stats["batch_stats"]["var"]), atol=1e-4)


@pytest.mark.parametrize("pad_first", [False, True])
def test_shifted_windows_equal_masked_attention_over_the_whole_grid(pad_first):
    x = jax.random.normal(KEY, (2, 6, 4, 8))
    attention = WindowAttention(2, 4, (3, 2), (1, 1), (3, 2), plain_attention, Layer(0, "x"), pad_first=pad_first)
    variables = attention.init(KEY, x)
    params = variables["params"]

    def heads(name):
        return (x @ params[name]["kernel"] + params[name]["bias"]).reshape(2, 6, 4, 2, 4)

    bias = layers.window_relative_bias(params["bias_table"], (3, 2))
    mixed = layers.window_attention(
        heads("query"), heads("key"), heads("value"), window=(3, 2), shift=(1, 1), bias=bias, implementation="reference"
    )
    expected = mixed.reshape(2, 6, 4, 8) @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(attention.apply(variables, x), expected, atol=1e-5)


def test_positions_are_resampled_only_when_asked_for():
    table = jnp.concatenate([jnp.full((1, 2), 9.0), jnp.ones((6, 2))])
    assert fitting_positions(table, (2, 3), (2, 3), prefix=1, resample=False) is table
    with pytest.raises(ValueError, match="set resample_positions"):
        fitting_positions(table, (2, 3), (3, 3), prefix=1, resample=False)
    for antialias in (False, True):
        wider = fitting_positions(table, (2, 3), (5, 4), prefix=1, resample=True, antialias=antialias)
        np.testing.assert_allclose(wider, jnp.concatenate([table[:1], jnp.ones((20, 2))]), atol=1e-6)
    _, model, _, variables, _ = made("vit")
    images = jnp.zeros((1, 40, 32, 3))
    with pytest.raises(ValueError, match="set resample_positions"):
        model.apply(variables, images)
    larger = zoo.create("backbone_vit", "tiny", resample_positions=True)
    assert jax.eval_shape(larger.apply, variables, images).features.shape == (1, 5 * 4 + 2, 24)


def test_features_go_to_their_places_in_order():
    places = jnp.asarray([[False, True, True, False], [True, False, False, True]])
    features = jnp.arange(1.0, 5.0).reshape(2, 2, 1)
    placed = place_features(-jnp.ones((2, 4, 1)), places, features)
    np.testing.assert_array_equal(placed[..., 0], [[-1, 1, 2, -1], [3, -1, -1, 4]])


def test_an_image_reaches_its_own_row_only():
    _, _, example, variables, apply = made("llava")
    before = apply(variables, **example).logits
    after = apply(variables, **example | {"images": example["images"].at[1].add(1.0)}).logits
    np.testing.assert_array_equal(after[0], before[0])
    assert not np.allclose(after[1], before[1], atol=1e-4)
    np.testing.assert_array_equal(after[1, 0], before[1, 0])  # before the image


def test_texts_and_images_may_come_alone():
    _, _, example, variables, apply = made("clip")
    both = apply(variables, **example)
    text = apply(variables, input_ids=example["input_ids"])
    image = apply(variables, images=example["images"])
    np.testing.assert_allclose(text.text_embeds, both.text_embeds, atol=1e-6)
    np.testing.assert_allclose(image.image_embeds, both.image_embeds, atol=1e-6)
    assert text.logits_per_image is None
    assert image.text is None
    np.testing.assert_allclose(jnp.linalg.norm(both.text_embeds, axis=-1), 1.0, atol=1e-6)


@pytest.mark.parametrize("case", ["llava/open_a", "internvl/open_a", "dinov2/open_a", "qwen2_5_vl/open_b"])
def test_folders_with_the_names_of_saved_files_load(case, tmp_path):
    case = load_case(GOLDENS / f"backbone_{case}.npz")
    slug, hparams, tensors = case.meta["slug"], case.meta["hparams"], case.group("param")
    names = case.meta["hub_keys"]
    save_file({names.get(name, name): value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    record = zoo.backbone(slug.removeprefix("backbone_"))
    (tmp_path / "config.json").write_text(json.dumps(record.write_settings(hparams, dtype="float32")))
    model, variables = zoo.load(tmp_path)
    expected_model, expected = zoo.from_official(slug, hparams, tensors)
    assert model.config == expected_model.config
    chex.assert_trees_all_equal(jax.device_get(variables), jax.device_get(expected))


def test_timm_names_say_the_sizes():
    record = zoo.backbone("vit")

    def config(**settings):
        return record.bridge().config(record.read_settings(settings))

    tuned = config(
        architecture="vit_tiny_patch16_224.augreg_in21k", num_classes=5, pretrained_cfg={"input_size": [3, 384, 384]}
    )
    assert tuned == record.config("vit_tiny_patch16_384", num_classes=5)
    changed = config(architecture="vit_tiny_patch16_224", model_args={"reg_tokens": 2, "global_pool": "avg"})
    assert (changed.num_registers, changed.pool, changed.norm_after_pool) == (2, "avg", True)
    with pytest.raises(zoo.UserError, match="vit_tinny_patch16_224 is not an architecture whose sizes are known"):
        config(architecture="vit_tinny_patch16_224")
    distilled = zoo.backbone("deit").read_settings({"architecture": "deit_tiny_distilled_patch16_224.fb_in1k"})
    assert distilled["class"] == "VisionTransformerDistilled"
