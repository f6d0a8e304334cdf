"""ViT and DeiT: images as sequences of patches.

Official code: huggingface/pytorch-image-models@v1.0.31 (Apache-2.0), timm/models/vision_transformer.py and deit.py.
Papers: ViT arXiv:2010.11929, DeiT arXiv:2012.12877, DeiT III arXiv:2204.07118, registers arXiv:2309.16588.
What differs between checkpoints is a field of `Config`: class token or pooling, registers, layer scale, normalised
queries and keys, where the last norm stands, DeiT's distillation token with its own head.
Differs from the official code: images are (B, height, width, channels); there is no dropout and no stochastic depth.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.backbone import Backbone
from zoo.backbones.encoder import (
    MLP,
    LayerConfig,
    embed_patches,
    encode,
    fitting_positions,
    make_norm,
    norm_table,
    pair,
)
from zoo.backbones.hooks import AttentionHook, Layer, attend, plain_attention
from zoo.backbones.timm import (
    activation_from_timm,
    activation_to_timm,
    norm_from_timm,
    norm_to_timm,
    timm_settings,
)
from zoo.blocks import Linear
from zoo.errors import UserError
from zoo.paper import Official
from zoo.weights.table import Table, conv, fused_linear, linear, parameter, squeezed

__all__ = ["BACKBONES", "Config", "Model", "Output"]

_POOLS = ("token", "avg", "max", "avgmax", "map", "prr", "")


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    family: str = "vit"  # vit | deit: whose names the configurations have
    image_size: tuple[int, int] = (32, 32)  # height and width that the table of positions is for
    patch_size: tuple[int, int] = (8, 8)
    in_channels: int = 3
    num_classes: int = 10  # 0: the pooled features themselves are the output
    num_layers: int = 2
    layer: LayerConfig = field(default_factory=LayerConfig)
    mlp_ratio: float | int = 2.0  # layer.hidden / layer.width, before rounding down
    class_token: bool = True
    distilled: bool = False  # a second token after it, with a head of its own; logits are the mean of both heads'
    num_registers: int = 0  # tokens after these that stand for nothing
    positions: bool = True  # a learned table of positions is added
    prefix_positions: bool = True  # the tokens that are no patches have positions too
    resample_positions: bool = False  # images of any size: positions are interpolated (cubic, antialiased)
    pad_images: bool = False  # zeros at the bottom and on the right up to whole patches
    pool: str = "token"  # token | avg | max | avgmax | map (a learned query) | prr (attention of patches) | "" (none)
    pool_prefix: bool = False  # tokens that are no patches are pooled too
    first_norm: bool = False  # before the layers; the patches' map then has no bias
    last_norm: bool = True  # after them,
    norm_after_pool: bool = False  # or after pooling

    def __post_init__(self):
        if self.pool not in _POOLS:
            raise ValueError(f"pool {self.pool!r} is not one of {', '.join(map(repr, _POOLS))}")
        if (self.pool == "token" or self.distilled) and not self.class_token:
            raise ValueError("pool 'token' and a distillation token need class_token")
        if self.distilled and (self.pool != "token" or self.num_registers or not self.prefix_positions):
            raise ValueError("a distilled model pools its class token, has no registers and positions for every token")

    @property
    def num_prefix(self) -> int:
        return int(self.class_token) + int(self.distilled) + self.num_registers

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]


class Output(NamedTuple):
    logits: Float[Array, "B K"]
    features: Float[Array, "B L D"]  # all tokens after the last layer (and the last norm where it comes before pooling)
    head_logits: tuple[Float[Array, "B K"], Float[Array, "B K"]] | None  # of a distilled model: class, distillation


class LatentPool(nn.Module):
    """A learned query attends to all tokens; an MLP with a residual follows."""

    config: LayerConfig
    hook: AttentionHook
    layer: Layer

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        c = self.config
        latent = self.param("latent", nn.initializers.truncated_normal(c.width**-0.5), (c.width,)).astype(x.dtype)
        heads = (-1, c.num_heads, c.width // c.num_heads)
        entering = {"query": jnp.broadcast_to(latent, (x.shape[0], 1, c.width)), "key": x, "value": x}
        query, key, value = (Linear(c.width, name=name)(y).reshape(x.shape[0], *heads) for name, y in entering.items())
        y = attend(self, self.hook, self.layer, query, key, value).reshape(x.shape[0], c.width)
        y = Linear(c.width, name="out")(y)
        return y + MLP(c, name="mlp")(make_norm(c.norm, c.norm_epsilon, "norm")(y))


class Model(nn.Module):
    """Images to logits."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Output:
        c = self.config
        x = encode(self, c.layer, c.num_layers, self.attention, self.embed(images))
        if c.last_norm and not c.norm_after_pool:
            x = make_norm(c.layer.norm, c.layer.norm_epsilon, "norm")(x)
        if c.distilled:
            heads = Linear(c.num_classes, name="head"), Linear(c.num_classes, name="distillation_head")
            logits = [head(x[:, i]) if c.num_classes else x[:, i] for i, head in enumerate(heads)]
            return Output((logits[0] + logits[1]) / 2, x, tuple(logits))
        pooled = self.pool(x)
        if c.last_norm and c.norm_after_pool:
            pooled = make_norm(c.layer.norm, c.layer.norm_epsilon, "norm")(pooled)
        return Output(Linear(c.num_classes, name="head")(pooled) if c.num_classes else pooled, x, None)

    def embed(self, images: Float[Array, "B H W C"]) -> Float[Array, "B L D"]:
        """Patches and the tokens before them, with positions."""
        c, width, start = self.config, self.config.layer.width, nn.initializers.normal(0.02)
        if c.pad_images:
            rest = [(0, -n % p) for n, p in zip(images.shape[1:3], c.patch_size, strict=True)]
            images = jnp.pad(images, [(0, 0), *rest, (0, 0)])
        elif any(n % p for n, p in zip(images.shape[1:3], c.patch_size, strict=True)):
            raise ValueError(f"images of {images.shape[1:3]} pixels are not whole patches of {c.patch_size}")
        patches = embed_patches(images, width, c.patch_size, use_bias=not c.first_norm)
        grid = patches.shape[1:3]
        x = patches.reshape(patches.shape[0], -1, width)
        named = (("class_token", c.class_token), ("distillation_token", c.distilled), ("registers", c.num_registers))
        prefix = [self.param(name, start, (int(count), width)).astype(x.dtype) for name, count in named if count]
        prefix = [jnp.broadcast_to(token, (x.shape[0], *token.shape)) for token in prefix]
        if not c.positions:
            x = jnp.concatenate([*prefix, x], axis=1)
        else:
            rows = c.num_prefix if c.prefix_positions else 0
            table = jnp.asarray(self.param("positions", start, (rows + c.grid[0] * c.grid[1], width)), x.dtype)
            table = fitting_positions(table, c.grid, grid, prefix=rows, resample=c.resample_positions, antialias=True)
            if c.prefix_positions:
                x = jnp.concatenate([*prefix, x], axis=1) + table
            else:
                x = jnp.concatenate([*prefix, x + table], axis=1)
        return make_norm(c.layer.norm, c.layer.norm_epsilon, "first_norm")(x) if c.first_norm else x

    def pool(self, x: Float[Array, "B L D"]) -> Float[Array, "B D"] | Float[Array, "B L D"]:
        c = self.config
        if c.pool in ("", "token"):
            return x if c.pool == "" else x[:, 0]
        layer = Layer(c.num_layers, "pool", kind="cross" if c.pool == "map" else "self")
        if c.pool == "prr":
            heads = x.reshape(*x.shape[:-1], c.layer.num_heads, -1)
            x = attend(self, self.attention, layer, heads, heads, heads).reshape(x.shape)
            return x[:, 0] if c.class_token else jnp.mean(x, axis=1)
        x = x if c.pool_prefix else x[:, c.num_prefix :]
        if c.pool == "map":
            return LatentPool(_pool_layer(c), self.attention, layer, name="pool")(x)
        mean, largest = jnp.mean(x, axis=1), jnp.max(x, axis=1)
        return {"avg": mean, "max": largest, "avgmax": (mean + largest) / 2}[c.pool]


def _pool_layer(c: Config) -> LayerConfig:
    """Of the options only the sizes, the activation and the kind of norm are the layers'."""
    kept = ("width", "num_heads", "hidden", "activation", "norm", "norm_epsilon")
    return LayerConfig(**{name: getattr(c.layer, name) for name in kept})


def example(config: Config, *, batch_size: int, key: jax.Array) -> dict[str, jax.Array]:
    return {"images": jax.random.normal(key, (batch_size, *config.image_size, config.in_channels))}


# --- the official code ---------------------------------------------------------------------------------------------

_DEFAULTS: dict[str, Any] = {
    "img_size": 224, "patch_size": 16, "in_chans": 3, "num_classes": 1000, "global_pool": "token", "embed_dim": 768,
    "depth": 12, "num_heads": 12, "mlp_ratio": 4.0, "qkv_bias": True, "qk_norm": False, "scale_attn_norm": False,
    "scale_mlp_norm": False, "proj_bias": True, "init_values": None, "class_token": True, "pos_embed": "learn",
    "no_embed_class": False, "reg_tokens": 0, "pre_norm": False, "final_norm": True, "fc_norm": None,
    "pool_include_prefix": False, "dynamic_img_size": False, "dynamic_img_pad": False, "norm_layer": None,
    "act_layer": None,
}  # fmt: skip
_NOT_IN_EVAL = {"drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
                "weight_init", "fix_init", "class"}  # fmt: skip
_NORM_AFTER = ("avg", "avgmax", "max")  # pools that come before the last norm where fc_norm says nothing
_SAME = {  # theirs -> ours, of the arguments that are taken as they are
    "in_chans": "in_channels", "num_classes": "num_classes", "depth": "num_layers", "mlp_ratio": "mlp_ratio",
    "class_token": "class_token", "reg_tokens": "num_registers", "dynamic_img_size": "resample_positions",
    "dynamic_img_pad": "pad_images", "global_pool": "pool", "pool_include_prefix": "pool_prefix",
    "pre_norm": "first_norm", "final_norm": "last_norm",
}  # fmt: skip
_SAME_LAYER = {
    "embed_dim": "width", "num_heads": "num_heads", "qkv_bias": "query_bias", "proj_bias": "output_bias",
    "scale_attn_norm": "attention_norm", "scale_mlp_norm": "hidden_norm",
}  # fmt: skip


def config_from_official(hparams: Mapping[str, Any], family: str = "vit") -> Config:
    given = {name for name, value in hparams.items() if value is not None}
    if unknown := sorted(given - _DEFAULTS.keys() - _NOT_IN_EVAL):
        raise UserError(f"these arguments of a timm ViT are not supported: {', '.join(unknown)}")
    h = _DEFAULTS | dict(hparams)
    values = {ours: h[theirs] for theirs, ours in _SAME.items()}
    after = h["global_pool"] in _NORM_AFTER if h["fc_norm"] is None else h["fc_norm"]
    layer = LayerConfig(
        **{ours: h[theirs] for theirs, ours in _SAME_LAYER.items()},
        hidden=int(h["embed_dim"] * h["mlp_ratio"]),
        mlp_bias=h["proj_bias"],
        query_key_norm="head" if h["qk_norm"] else None,
        layer_scale=h["init_values"] or None,
        norm=norm_from_timm(h["norm_layer"]),
        activation=activation_from_timm(h["act_layer"]),
    )
    return Config(
        family=family,
        image_size=pair(h["img_size"]),
        patch_size=pair(h["patch_size"]),
        layer=layer,
        distilled=h.get("class") == "VisionTransformerDistilled",
        positions=h["pos_embed"] not in ("", "none"),
        prefix_positions=not h["no_embed_class"],
        norm_after_pool=bool(after),
        **values,
    )


def config_to_official(c: Config) -> dict[str, Any]:
    return {
        "class": "VisionTransformerDistilled" if c.distilled else "VisionTransformer",
        "img_size": c.image_size,
        "patch_size": c.patch_size,
        **{theirs: getattr(c, ours) for theirs, ours in _SAME.items()},
        **{theirs: getattr(c.layer, ours) for theirs, ours in _SAME_LAYER.items()},
        "qk_norm": c.layer.query_key_norm is not None,
        "init_values": c.layer.layer_scale,
        "pos_embed": "learn" if c.positions else "none",
        "no_embed_class": not c.prefix_positions,
        "fc_norm": None if c.norm_after_pool == (c.pool in _NORM_AFTER) else c.norm_after_pool,
        "norm_layer": norm_to_timm(c.layer.norm),
        "act_layer": activation_to_timm(c.layer.activation),
    }


def official_table(c: Config) -> Table:
    layer, norm = c.layer, c.layer.norm
    tokens = [("cls_token", "class_token", c.class_token), ("dist_token", "distillation_token", c.distilled)]
    tokens += [("reg_token", "registers", c.num_registers), ("pos_embed", "positions", c.positions)]
    for theirs, ours, there in tokens:
        if there:
            yield from parameter(theirs, ours, squeezed(1))
    yield from conv("patch_embed.proj", "patch_embedding", bias=not c.first_norm)
    if c.first_norm:
        yield from norm_table("norm_pre", "first_norm", norm)
    for i in range(c.num_layers):
        theirs, ours = f"blocks.{i}", f"layers_{i}"
        yield from norm_table(f"{theirs}.norm1", f"{ours}/attention_norm", norm)
        yield from norm_table(f"{theirs}.norm2", f"{ours}/mlp_norm", norm)
        names = tuple(f"{ours}/attention/{name}" for name in ("query", "key", "value"))
        yield from fused_linear(f"{theirs}.attn.qkv", names, layer.width, bias=layer.query_bias)
        if layer.query_key_norm:
            yield from norm_table(f"{theirs}.attn.q_norm", f"{ours}/attention/query_norm", norm)
            yield from norm_table(f"{theirs}.attn.k_norm", f"{ours}/attention/key_norm", norm)
        if layer.attention_norm:
            yield from norm_table(f"{theirs}.attn.norm", f"{ours}/attention/norm", norm)
        yield from linear(f"{theirs}.attn.proj", f"{ours}/attention/out", bias=layer.output_bias)
        for name in ("fc1", "fc2"):
            yield from linear(f"{theirs}.mlp.{name}", f"{ours}/mlp/{name}", bias=layer.mlp_bias)
        if layer.hidden_norm:
            yield from norm_table(f"{theirs}.mlp.norm", f"{ours}/mlp/norm", norm)
        if layer.layer_scale is not None:
            yield from parameter(f"{theirs}.ls1.gamma", f"{ours}/attention_scale")
            yield from parameter(f"{theirs}.ls2.gamma", f"{ours}/mlp_scale")
    if c.last_norm:
        yield from norm_table("fc_norm" if c.norm_after_pool else "norm", "norm", norm)
    if c.pool == "map":
        yield from _pool_table(c)
    if c.num_classes:
        yield from linear("head", "head")
        if c.distilled:
            yield from linear("head_dist", "distillation_head")


def _pool_table(c: Config) -> Table:
    yield from parameter("attn_pool.latent", "pool/latent", squeezed(2))
    yield from linear("attn_pool.q", "pool/query")
    yield from fused_linear("attn_pool.kv", ("pool/key", "pool/value"), c.layer.width)
    yield from linear("attn_pool.proj", "pool/out")
    yield from norm_table("attn_pool.norm", "pool/norm", c.layer.norm)
    for name in ("fc1", "fc2"):
        yield from linear(f"attn_pool.mlp.{name}", f"pool/mlp/{name}")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    output = model.apply(variables, inputs["x"].transpose(0, 2, 3, 1))
    named = {"logits": output.logits, "features": output.features}
    if output.head_logits is not None:
        named |= dict(zip(("logits_cls", "logits_dist"), output.head_logits, strict=True))
    return named


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "medium": {"embed_dim": 512, "num_heads": 8},
    "base": {},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}


def _named(architecture: str, **changes: Any) -> Config:
    family, size, *parts = architecture.split("_")
    pixels = int(parts[-1]) if parts[-1].isdigit() else 518
    patch = next(int(part.removeprefix("patch")) for part in parts if part.startswith("patch"))
    kind = "VisionTransformerDistilled" if "distilled" in parts else "VisionTransformer"
    arguments = {"class": kind, "img_size": pixels, "patch_size": patch, **_SIZES[size], **changes}
    return config_from_official(arguments, "deit" if family.startswith("deit") else "vit")


_DINO = {"init_values": 1e-5, "num_classes": 0}
_REGISTERS = _DINO | {"reg_tokens": 4, "no_embed_class": True}
_SIGLIP = {"class_token": False, "global_pool": "map", "num_classes": 0}
_DEIT3 = {"no_embed_class": True, "init_values": 1e-6}

_CONFIGS: dict[str, dict[str, Config]] = {
    "vit": {"tiny": Config(layer=LayerConfig(query_key_norm="head", layer_scale=0.5), num_registers=1)}
    | {
        f"vit_{name}": _named(f"vit_{name}")
        for name in (
            "tiny_patch16_224", "tiny_patch16_384", "small_patch32_224", "small_patch16_224", "small_patch16_384",
            "base_patch32_224", "base_patch32_384", "base_patch16_224", "base_patch16_384", "base_patch8_224",
            "large_patch32_384", "large_patch16_224", "large_patch16_384", "huge_patch14_224",
        )
    }
    | {
        f"vit_{size}_patch14_dinov2": _named(f"vit_{size}_patch14_dinov2", **_DINO)
        for size in ("small", "base", "large")
    }
    | {
        f"vit_{size}_patch14_reg4_dinov2": _named(f"vit_{size}_patch14_reg4_dinov2", **_REGISTERS)
        for size in ("small", "base", "large")
    }
    | {
        f"vit_base_patch16_siglip_{pixels}": _named(f"vit_base_patch16_siglip_{pixels}", **_SIGLIP)
        for pixels in (224, 256, 384, 512)
    },
    "deit": {"tiny": Config(family="deit", distilled=True)}
    | {
        f"deit_{name}": _named(f"deit_{name}")
        for name in (
            "tiny_patch16_224", "small_patch16_224", "base_patch16_224", "base_patch16_384",
            "tiny_distilled_patch16_224", "small_distilled_patch16_224", "base_distilled_patch16_224",
            "base_distilled_patch16_384",
        )
    }
    | {
        f"deit3_{name}": _named(f"deit3_{name}", **_DEIT3)
        for name in (
            "small_patch16_224", "small_patch16_384", "medium_patch16_224", "base_patch16_224", "base_patch16_384",
            "large_patch16_224", "large_patch16_384", "huge_patch14_224",
        )
    },
}  # fmt: skip


def _official(module: str, family: str) -> Official:
    return Official(
        module=module,
        config=lambda hparams: config_from_official(hparams, family),
        hparams=config_to_official,
        table=official_table,
        call=official_call,
    )


BACKBONES = {
    "vit": Backbone(
        name="vit",
        model=Model,
        configs=_CONFIGS["vit"],
        example=example,
        settings=timm_settings(
            lambda: _CONFIGS["vit"], config_to_official, lambda arguments: "vit_base_patch16_224",
            classes={"": "VisionTransformer"},
        ),
        officials=(_official("timm/models/vision_transformer.py:VisionTransformer", "vit"),),
        parameter_counts={
            "vit_tiny_patch16_224": 5_717_416, "vit_small_patch16_224": 22_050_664, "vit_base_patch16_224": 86_567_656,
            "vit_large_patch16_224": 304_326_632, "vit_base_patch14_reg4_dinov2": 86_582_016,
            "vit_base_patch16_siglip_224": 92_884_224,
        },
    ),
    "deit": Backbone(
        name="deit",
        model=Model,
        configs=_CONFIGS["deit"],
        example=example,
        settings=timm_settings(
            lambda: _CONFIGS["deit"], config_to_official,
            lambda arguments: "deit_base_distilled_patch16_224"
            if "Distilled" in arguments["class"]
            else "deit_base_patch16_224",
            classes={"distilled": "VisionTransformerDistilled", "": "VisionTransformer"},
        ),
        officials=(
            _official("timm/models/deit.py:VisionTransformerDistilled", "deit"),
            _official("timm/models/vision_transformer.py:VisionTransformer", "deit"),
        ),
        parameter_counts={"deit_tiny_distilled_patch16_224": 5_910_800, "deit_base_distilled_patch16_224": 87_338_192,
                          "deit3_small_patch16_384": 22_205_416},
    ),
}  # fmt: skip
