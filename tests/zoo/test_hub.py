"""Folders in the hub's layout: written, read back bit for bit, spread over devices, refused where they are wrong."""

import functools
import json
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import zoo
from tests.weights import drawn
from trainers.sharding import make_mesh, tree_shardings
from zoo.backbone import answering
from zoo.weights.hub import read_folder, save_folder

KEY = jax.random.key(0)
NAMES = [e.name for e in zoo.backbones(status="works")]


@functools.cache
def built(name):
    record = zoo.backbone(name)
    model = zoo.create(record.slug, "tiny")
    return model, jax.device_get(drawn(record, model))


@pytest.fixture
def llama(tmp_path):
    """(folder, model, variables) of a llama whose weights lie in several shards."""
    model, variables = built("llama")
    save_folder(epath.Path(tmp_path / "llama"), model, variables, shard_bytes=20_000)
    return tmp_path / "llama", model, variables


def rewrite(folder, change):
    """The folder's tensors in one file, changed."""
    tensors = change({name: np.array(value) for name, value in read_folder(epath.Path(folder)).items()})
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")


def refused(folder, *messages):
    with pytest.raises(zoo.UserError) as caught:
        zoo.load(folder)
    assert "\n" not in str(caught.value)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_written_folder_loads_back_bit_for_bit(name, tmp_path):
    model, variables = built(name)
    mixed = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.ndim > 1 else a, variables)
    zoo.save(tmp_path / "mixed", model, mixed, layout="hf")
    again, restored = zoo.load(tmp_path / "mixed")
    assert again.config == model.config
    restored = jax.device_get(restored)
    chex.assert_trees_all_equal_dtypes(restored, mixed)
    chex.assert_trees_all_equal(restored, mixed)


def test_shards_and_their_index_are_those_of_the_hub(llama):
    folder, model, variables = llama
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    # Another reader of the format agrees with ours about every shard.
    for shard in shards:
        tensors = load_file(shard)
        assert {name for name, place in index["weight_map"].items() if place == shard.name} == set(tensors)
        for name, value in tensors.items():
            np.testing.assert_array_equal(value, read_folder(epath.Path(folder))[name])
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in jax.tree.leaves(variables))
    settings = json.loads((folder / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLM"]
    assert settings["model_type"] == "llama"
    assert settings["dtype"] == "float32"
    again, restored = zoo.load(folder)
    assert again.config == model.config
    chex.assert_trees_all_equal(jax.device_get(restored), variables)


def test_tensors_are_views_into_the_mapped_files(llama):
    folder, _, _ = llama
    for value in read_folder(epath.Path(folder)).values():
        while value.base is not None and not isinstance(value, np.memmap):
            value = value.base
        assert isinstance(value, np.memmap)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16])
def test_weights_take_another_type_on_loading(llama, dtype):
    folder, _, variables = llama
    restored = zoo.load(folder, dtype=dtype)[1]
    chex.assert_trees_all_equal(
        jax.device_get(restored), jax.tree.map(lambda a: np.asarray(a.astype(jnp.dtype(dtype))), variables)
    )


def test_a_mesh_of_three_gets_each_its_third(tmp_path):
    config = zoo.backbone("llama").config(hidden_size=48, vocab_size=96, intermediate_size=96, num_heads=6, head_dim=6)
    model = zoo.backbone("llama").model(config)
    variables = jax.device_get(model.init(KEY, jnp.ones((1, 2), jnp.int32)))
    save_folder(epath.Path(tmp_path / "m"), model, variables, shard_bytes=20_000)
    devices = jax.devices()[:3]
    mesh = jax.sharding.Mesh(np.asarray(devices), ("all",))
    _, spread = zoo.load(tmp_path / "m", sharding=mesh)
    chex.assert_trees_all_equal(jax.device_get(spread), variables)
    total = sum(v.nbytes for v in jax.tree.leaves(variables))
    for device in devices:
        held = sum(s.data.nbytes for v in jax.tree.leaves(spread) for s in v.addressable_shards if s.device == device)
        assert held < 0.35 * total  # a third; nothing of this model is too odd to be split


def test_no_more_is_read_for_a_device_than_it_gets(tmp_path, monkeypatch):
    model, variables = built("llama")
    zoo.save(tmp_path / "m", model, variables, layout="hf")
    mesh = make_mesh("fsdp=4,tensor=2", batch_size=4)
    read = []
    original = np.array

    def recorded(value, *arguments, **options):
        read.append(np.shape(value))
        return original(value, *arguments, **options)

    monkeypatch.setattr("zoo.weights.place.np.array", recorded)
    _, spread = zoo.load(tmp_path / "m", sharding=lambda shapes: tree_shardings(shapes, mesh))
    chex.assert_trees_all_equal(jax.device_get(spread), variables)
    kernel = spread["params"]["layers_0"]["mlp"]["gate"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (kernel.shape[0] // 4, kernel.shape[1] // 2)
    assert kernel.shape not in read


def test_settings_choose_the_architecture(tmp_path):
    for name in ("qwen3", "gpt2"):
        model, variables = built(name)
        zoo.save(tmp_path / name, model, variables, layout="hf")
        settings = json.loads((tmp_path / name / "config.json").read_text())
        del settings["architectures"]  # older folders have the model type only
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        assert type(zoo.load(tmp_path / name)[0]) is type(model)


def test_class_names_of_diffusers_choose_the_architecture(tmp_path):
    unet = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0"}
    assert answering(unet | {"addition_embed_type": None}).name == "sd_unet"
    assert answering(unet | {"addition_embed_type": "text_time"}).name == "sdxl_unet"
    old = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    assert answering(old).name == "dit"
    with pytest.raises(zoo.UserError, match="no backbone answers to 'Transformer2DModel'"):
        answering(old | {"norm_type": "layer_norm"})

    model, variables = built("dit")
    zoo.save(tmp_path / "dit", model, variables, layout="hf")
    assert sorted(p.name for p in (tmp_path / "dit").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    settings = json.loads((tmp_path / "dit" / "config.json").read_text())
    assert settings["_class_name"] == "DiTTransformer2DModel"
    # As older versions wrote it, with arguments that change nothing.
    beside = {"_name_or_path": "x", "dropout": 0.1, "cross_attention_dim": None, "upcast_attention": True}
    (tmp_path / "dit" / "config.json").write_text(json.dumps(settings | old | beside))
    again, restored = zoo.load(tmp_path / "dit")
    assert again.config == model.config
    chex.assert_trees_all_equal(jax.device_get(restored), variables)
    for change, message in [
        ({"activation_fn": "geglu"}, "a DiTTransformer2DModel with activation_fn 'geglu' is not supported"),
        ({"num_layer": 3}, "num_layer is not an argument of DiTTransformer2DModel that is supported; did you mean"),
    ]:
        (tmp_path / "dit" / "config.json").write_text(json.dumps(settings | change))
        refused(tmp_path / "dit", message)


def test_autoencoders_of_older_files_name_their_projections_otherwise(tmp_path):
    model, variables = built("vae_kl")
    zoo.save(tmp_path / "m", model, variables, layout="hf")
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def older(name):
        return next((name.replace(now, then) for now, then in names.items() if now in name), name)

    rewrite(tmp_path / "m", lambda tensors: {older(name): value for name, value in tensors.items()})
    chex.assert_trees_all_equal(jax.device_get(zoo.load(tmp_path / "m")[1]), variables)


def test_tied_tensors_lie_once_on_disk_and_may_lie_there_twice(tmp_path):
    model, variables = built("qwen2")
    zoo.save(tmp_path / "m", model, variables, layout="hf")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    assert head not in read_folder(epath.Path(tmp_path / "m"))
    rewrite(tmp_path / "m", lambda t: t | {head: t[embedding]})
    chex.assert_trees_all_equal(jax.device_get(zoo.load(tmp_path / "m")[1]), variables)
    rewrite(tmp_path / "m", lambda t: t | {head: t[embedding] + 1})
    refused(tmp_path / "m", "lm_head.weight are one tensor in this model but differ", "tie_word_embeddings")
    rewrite(tmp_path / "m", lambda t: {k: v for k, v in t.items() if k != embedding} | {head: t[embedding]})
    chex.assert_trees_all_equal(jax.device_get(zoo.load(tmp_path / "m")[1]), variables)


def test_older_names_and_what_they_carry_along(tmp_path):
    model, variables = built("gpt2")
    zoo.save(tmp_path / "m", model, variables, layout="hf")

    def older(tensors):
        tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        return tensors | {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.uint8), "h.1.attn.masked_bias": np.float32(-1e4)}

    rewrite(tmp_path / "m", older)
    chex.assert_trees_all_equal(jax.device_get(zoo.load(tmp_path / "m")[1]), variables)


def test_the_oldest_names_of_norms_and_heads_that_are_not_ours(tmp_path):
    model, variables = built("bert")
    zoo.save(tmp_path / "m", model, variables, layout="hf")

    def older(tensors):
        def rename(name):
            return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

        beside = {"bert.pooler.dense.weight": np.ones((2, 2), np.float32), "cls.seq_relationship.bias": np.ones(2)}
        return {rename(name): value for name, value in tensors.items()} | beside

    rewrite(tmp_path / "m", older)
    chex.assert_trees_all_equal(jax.device_get(zoo.load(tmp_path / "m")[1]), variables)


def test_all_faults_are_in_one_sentence_with_the_nearest_names(llama):
    folder, _, _ = llama

    def spoil(tensors):
        tensors["model.layers.0.mlp.gate_prj.weight"] = tensors.pop("model.layers.0.mlp.gate_proj.weight")
        tensors["model.norm.weight"] = np.ones(5, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
        return tensors

    rewrite(folder, spoil)
    refused(
        folder,
        "model.layers.0.mlp.gate_proj.weight is missing",
        "model.layers.0.mlp.gate_prj.weight is not part of this model (nearest: model.layers.0.mlp.gate_proj.weight)",
        "model.norm.weight has shape (5,) instead of (32,)",
        "lm_head.weight has type int8 instead of float32",
    )


def test_incomplete_and_foreign_folders_are_refused(llama, tmp_path):
    folder, _, _ = llama
    settings = json.loads((folder / "config.json").read_text())
    for changes, message in [
        ({"architectures": ["BloomForCausalLM"]}, "no backbone answers to 'BloomForCausalLM' of config.json"),
        ({"quantization_config": {"bits": 4}}, "holds quantised weights"),
        ({"hidden_act": "swosh"}, "activation 'swosh' of these settings is not one of gelu"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_key_heads 3"),
    ]:
        (folder / "config.json").write_text(json.dumps(settings | changes))
        refused(folder, message)
    (folder / "config.json").write_text("not json")
    refused(folder, "config.json is not a readable json file")
    (folder / "config.json").write_text(json.dumps(settings))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    refused(folder, f"{shard.name} is damaged or not a safetensors file")
    shard.unlink()
    refused(folder, f"lacks {shard.name}, which model.safetensors.index.json names")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "is not an index of shards")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"\x80")
    refused(tmp_path / "bin", "should hold one .safetensors file, or several with an index; found none")


def test_a_folder_is_not_overwritten_unless_asked(llama):
    folder, model, variables = llama
    with pytest.raises(zoo.UserError, match="exists already"):
        zoo.save(folder, model, variables, layout="hf")
    zoo.save(folder, model, variables, layout="hf", overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_repository_is_downloaded_without_its_pickles(llama, monkeypatch):
    folder, model, _ = llama
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(folder.parent if "llama" in allow_patterns[0] else folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert zoo.load("hf://owner/name")[0].config == model.config
    assert zoo.load("hf://owner/name@v2/llama")[0].config == model.config
    assert [(name, revision) for name, revision, _ in asked] == [("owner/name", None), ("owner/name", "v2")]
    assert asked[0][2] == ["*.json", "*.safetensors", "*.model", "*.txt"]
    assert asked[1][2][0] == "llama/*.json"
    refused("hf://owner", "is not of the form hf://owner/name")


def test_papers_have_no_place_on_the_hub(tmp_path):
    model = zoo.create("ister")
    with pytest.raises(zoo.UserError, match="ister is a paper of the zoo"):
        zoo.save(tmp_path / "x", model, {}, layout="hf")


def test_what_was_saved_by_the_zoo_goes_to_a_mesh_too(tmp_path):
    model, variables = built("llama")
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("all",))
    for name in ("model.safetensors", "orbax"):
        zoo.save(tmp_path / name, model, variables)
        _, spread = zoo.load(tmp_path / name, sharding=mesh, dtype="bfloat16")
        for path, value in flatten_dict(spread).items():
            assert value.dtype == jnp.bfloat16
            assert len(value.sharding.device_set) == 2, path
        chex.assert_trees_all_equal(
            jax.device_get(spread), jax.tree.map(lambda a: np.asarray(a.astype(jnp.bfloat16)), variables)
        )
