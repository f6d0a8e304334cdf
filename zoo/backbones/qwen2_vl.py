"""Qwen2-VL and Qwen2.5-VL: images and videos of any size as tokens of a Qwen2, with positions on three axes.

Official code: huggingface/transformers@5.23.0 (Apache-2.0), models/{qwen2_vl,qwen2_5_vl}. Papers: arXiv:2409.12191,
arXiv:2502.13923.
An image is as many patches as it has pixels for; squares of patches become one token each. Qwen2.5-VL sees most layers
of the vision tower in windows, and counts a video's frames in seconds.
Differs from the official code: every row of a batch has its own patches, those of its images and videos after one
another as they stand in its text, with padding at the end (`pack`), so that a batch is cut and sharded by rows; a
window is a mask on all patches of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real

import layers
from zoo.backbone import Backbone
from zoo.backbones import causal, decoder
from zoo.backbones.encoder import EncoderLayer, LayerConfig, make_norm, norm_table
from zoo.backbones.hooks import AttentionHook, Layer, plain_attention, relocated, show
from zoo.backbones.multimodal import place_features, text_config_from_official, text_config_to_official
from zoo.backbones.naming import activation_from_hub, activation_to_hub
from zoo.backbones.rope import rotary_angles
from zoo.blocks import Linear, stack
from zoo.blocks.basic import activation_function
from zoo.paper import Official
from zoo.weights.table import Table, Transform, fused_linear, linear, parameter

__all__ = ["BACKBONES", "Cache", "Config", "Model", "VisionConfig", "VisionEncoder", "pack", "to_patches"]


@dataclass(frozen=True)
class VisionConfig:
    """Sizes and constants of the vision tower."""

    patch_size: int = 4  # pixels along each side of a patch
    frames: int = 2  # of a video that a patch spans; an image is such a video of one picture
    in_channels: int = 3
    merge: int = 2  # patches along each side of the square that becomes one token
    num_layers: int = 2
    layer: LayerConfig = field(default_factory=lambda: LayerConfig(16, 2, hidden=32, activation="quick_gelu"))
    window: int | None = None  # side of a window in pixels; None: every layer sees a whole frame
    full: tuple[int, ...] = ()  # where there are windows, the layers that see a whole frame
    rope_theta: float = 10000.0

    def __post_init__(self):
        if self.window is not None and self.window < self.patch_size * self.merge:
            raise ValueError(f"window {self.window} is less than the {self.patch_size * self.merge} pixels of a token")

    def is_windowed(self, layer: int) -> bool:
        return self.window is not None and layer not in self.full


@dataclass(frozen=True)
class Config:
    """Sizes and constants."""

    family: str  # qwen2_vl | qwen2_5_vl: whose names and settings the weights have
    text: decoder.Config = field(default_factory=lambda: decoder.Config("qwen2", query_bias=True, eos_token_id=(0,)))
    vision: VisionConfig = field(default_factory=VisionConfig)
    sections: tuple[int, int, int] = (1, 1, 2)  # frequencies of a head for time, rows and columns
    tokens_per_second: int | float | None = None  # steps of time that a second of a video is; None: a frame is one step
    image_token_id: int = 2  # stands in the text where a token of an image goes
    video_token_id: int = 1
    vision_start_token_id: int = 3  # before and after an image or a video, for whoever writes the text
    vision_end_token_id: int = 4

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def eos_token_id(self) -> tuple[int, ...]:
        return self.text.eos_token_id


class Cache(NamedTuple):
    own: causal.Cache
    position: Int[Array, " B"]  # of the next token: images advance it by less than they have tokens


# --- where patches and tokens lie ------------------------------------------------------------------------------------


def _owner(ends: Int[Array, "B N"], places: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """The image that each place falls in, N after the last."""
    return jnp.sum(ends[:, None, :] <= places[:, :, None], axis=-1)


def _of_owner(values: Real[Array, "B N"], owner: Int[Array, "B L"]) -> Real[Array, "B L"]:
    return jnp.take_along_axis(values, jnp.minimum(owner, values.shape[1] - 1), axis=1)


class _Layout(NamedTuple):
    places: Int[Array, "B P 2"]  # row and column of each patch in its frame
    frames: Int[Array, "B P"]  # patches of one frame have one number, padding has -1
    windows: Int[Array, "B P"]  # the same of windows


def _layout(config: VisionConfig, grids: Int[Array, "B N 3"], count: int) -> _Layout:
    merge, (depth, rows, columns) = config.merge, jnp.moveaxis(grids, -1, 0)
    ends = jnp.cumsum(depth * rows * columns, axis=-1)
    places = jnp.broadcast_to(jnp.arange(count), (len(grids), count))
    owner = _owner(ends, places)
    area, wide = (jnp.maximum(_of_owner(n, owner), 1) for n in (rows * columns, columns // merge))
    index = (places - _of_owner(ends - depth * rows * columns, owner)) % area
    # The patches of a token come after one another, the tokens of a frame row by row.
    token, cell = index // merge**2, index % merge**2
    row, column = token // wide, token % wide
    first, side = places - index, 1 if config.window is None else config.window // (merge * config.patch_size)
    window = first + row // side * -(-wide // side) + column // side
    places = jnp.stack([row * merge + cell // merge, column * merge + cell % merge], axis=-1)
    real = owner < grids.shape[1]
    return _Layout(places, jnp.where(real, first, -1), jnp.where(real, window, -1))


def token_positions(
    config: Config,
    input_ids: Int[Array, "B L"],
    grids: Int[Array, "B N 3"] | None,
    *,
    present: Bool[Array, "B L"] | None = None,
    seconds: Float[Array, "B N"] | None = None,
) -> tuple[Int[Array, "B L 3"], Int[Array, " B"]]:
    """(time, row and column of every token, position of the token after the last). Padding is at 0.

    Text advances all three by one. A token of an image is at its place in the image, from where the text before stood;
    the text after goes on from the farthest of the three.
    """
    grids = jnp.zeros((len(input_ids), 1, 3), jnp.int32) if grids is None else grids
    depth, rows, columns = (
        jnp.moveaxis(grids, -1, 0) // jnp.asarray([1, config.vision.merge, config.vision.merge])[:, None, None]
    )
    present = jnp.ones(input_ids.shape, bool) if present is None else present
    sizes = depth * rows * columns
    ends = jnp.cumsum(sizes, axis=-1)
    step = jnp.ones(sizes.shape) if seconds is None else seconds.astype(jnp.float32)
    step = jnp.ones(sizes.shape) if config.tokens_per_second is None else config.tokens_per_second * step
    visual = present & ((input_ids == config.image_token_id) | (input_ids == config.video_token_id))
    before = jnp.cumsum(visual, axis=-1) - visual
    visual &= before < ends[:, -1:]  # without its image such a token is text
    text = present & ~visual
    owner = _owner(ends, before)
    last = jnp.floor((depth - 1) * step).astype(jnp.int32)
    farthest = jnp.maximum(last, jnp.maximum(rows, columns) - 1)
    spans = jnp.pad(jnp.cumsum(jnp.where(sizes > 0, farthest + 1, 0), axis=-1), ((0, 0), (1, 0)))
    index = before - _of_owner(ends - sizes, owner)
    area, wide = (jnp.maximum(_of_owner(n, owner), 1) for n in (rows * columns, columns))
    time = jnp.floor(index // area * _of_owner(step, owner)).astype(jnp.int32)
    inside = jnp.stack([time, index % area // wide, index % wide], axis=-1)
    start = jnp.cumsum(text, axis=-1) - text + jnp.take_along_axis(spans, owner, axis=1)
    positions = start[..., None] + jnp.where(visual[..., None], inside, 0)
    done = _owner(ends, jnp.sum(visual, axis=-1, keepdims=True))
    following = jnp.sum(text, axis=-1) + jnp.take_along_axis(spans, done, axis=1)[:, 0]
    return jnp.where(present[..., None], positions, 0), following


def to_patches(
    config: VisionConfig, frames: Float[Array, "T H W C"]
) -> tuple[Float[Array, "P F"], tuple[int, int, int]]:
    """(patches in the tower's order, their grid of frames, rows, columns) of a video, or of an image with T = 1.

    Sides should be multiples of `patch_size * merge`; the last frame is repeated to fill its patches.
    """
    patch, merge, span = config.patch_size, config.merge, config.frames
    length, height, width, channels = frames.shape
    if height % (patch * merge) or width % (patch * merge):
        raise ValueError(f"pictures of {height} x {width} are not multiples of {patch * merge} pixels: resize them")
    frames = jnp.concatenate([frames, *[frames[-1:]] * (-length % span)])
    grid = len(frames) // span, height // patch, width // patch
    blocks = frames.reshape(grid[0], span, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch, channels)
    return blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(grid[0] * grid[1] * grid[2], -1), grid


def pack(rows: Sequence[Sequence[tuple[Array, Sequence[int]]]]) -> dict[str, Array]:
    """`patches` and `grids` for the model, of the (patches, grid) of each row's images and videos in order."""
    most = max(1, *(len(row) for row in rows))
    some = next(patches for row in rows for patches, _ in row)
    joined = [jnp.concatenate([some[:0], *(patches for patches, _ in row)]) for row in rows]
    longest = max(map(len, joined))
    grids = [[*(tuple(map(int, grid)) for _, grid in row), *[(0, 0, 0)] * (most - len(row))] for row in rows]
    return {
        "patches": jnp.stack([jnp.pad(patches, ((0, longest - len(patches)), (0, 0))) for patches in joined]),
        "grids": jnp.asarray(grids, jnp.int32),
    }


# --- the model -------------------------------------------------------------------------------------------------------


class VisionEncoder(nn.Module):
    """Patches to tokens: each frame by itself, each square of `merge` by `merge` patches one token."""

    config: VisionConfig
    out_size: int
    attention: AttentionHook = plain_attention
    path: str = ""  # of this module, ending in a slash

    @nn.compact
    def __call__(self, patches: Float[Array, "B P F"], grids: Int[Array, "B N 3"]) -> Float[Array, "B T D"]:
        c = self.config
        layout = _layout(c, grids, patches.shape[1])
        frequencies = layers.rope_frequencies(c.layer.width // c.layer.num_heads // 2, base=c.rope_theta)
        angles = layers.axial_rope_angles(layout.places, (frequencies, frequencies))
        masks = {False: layers.SegmentMask(layout.frames, layout.frames)}
        if c.window is not None:
            masks[True] = layers.SegmentMask(layout.windows, layout.windows)
        x = Linear(c.layer.width, use_bias=False, name="patch_embedding")(patches)
        for first, count in causal.runs(c.num_layers, c.is_windowed, self.attention):
            make = partial(EncoderLayer, c.layer, self.attention, Layer(first, f"{self.path}layers_{first}/attention"))
            x = stack(self, make, count, x, first=first, mask=masks[c.is_windowed(first)], angles=angles)
        show(self, "hidden_states", "last", x)
        x = make_norm(c.layer.norm, c.layer.norm_epsilon, "merger_norm")(x)
        x = x.reshape(len(x), -1, c.merge**2 * c.layer.width)
        x = activation_function("gelu")(Linear(x.shape[-1], name="merger_in")(x))
        return Linear(self.out_size, name="merger_out")(x)


class Model(nn.Module):
    """Tokens and patches to logits. `cache` makes it a step of decoding: see `zoo.backbones.generation`."""

    config: Config
    attention: AttentionHook = plain_attention

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        *,
        patches: Float[Array, "B P F"] | None = None,
        grids: Int[Array, "B N 3"] | None = None,
        seconds: Float[Array, "B N"] | None = None,
        attention_mask: Int[Array, "B L"] | Bool[Array, "B L"] | None = None,
        positions: Int[Array, "B L 3"] | None = None,
        cache: Cache | None = None,
        logits_at: Int[Array, " B"] | None = None,
    ) -> causal.Output:
        """`patches` of a row are those of its images and videos in order, `grids` their (frames, rows, columns) in
        patches: see `to_patches` and `pack`. `seconds` is the time between the frames of each grid. The merged patches
        go where `input_ids` have the image's or the video's token. `positions` stand in for those that all this
        implies; the other arguments are the decoder's.
        """
        c = self.config
        language = decoder.Model(c.text, relocated(self.attention, c.vision.num_layers, "language/"), name="language")
        embeddings = language.embed(input_ids)
        present = None if attention_mask is None else attention_mask.astype(bool)
        if patches is not None:
            if grids is None:
                raise ValueError("patches need their grids: the (frames, rows, columns) of each image")
            tower = VisionEncoder(c.vision, c.text.hidden_size, self.attention, "vision/", name="vision")
            features = tower(patches, grids)
            places = (input_ids == c.image_token_id) | (input_ids == c.video_token_id)
            places = places if present is None else places & present

            def place(embeddings: Array, places: Array, features: Array) -> Array:
                return place_features(embeddings[None], places[None], features[None])[0]

            embeddings = jax.vmap(place)(embeddings, places, features)
        if positions is None:
            positions, following = token_positions(c, input_ids, grids, present=present, seconds=seconds)
            if cache is not None:
                positions, following = positions + cache.position[:, None, None], following + cache.position
        else:
            following = jnp.max(positions, axis=(1, 2)) + 1
        # The angles of position 1 are the frequencies, scaled where the settings say so.
        frequencies = rotary_angles(c.text.rope, c.text.head_dim, jnp.ones((1, 1), jnp.int32), following[:1])[0, 0]
        output = language(
            embeddings=embeddings,
            attention_mask=attention_mask,
            angles=layers.multimodal_rope_angles(positions, frequencies, sections=c.sections),
            cache=None if cache is None else cache.own,
            logits_at=logits_at,
        )
        return output if cache is None else output._replace(cache=Cache(output.cache, following))


def empty_cache(config: Config, batch_size: int, capacity: int, dtype: Any) -> Cache:
    """Room for `capacity` tokens a row."""
    own = decoder.empty_cache(config.text, batch_size, capacity, dtype)
    return Cache(own, jnp.zeros((batch_size,), jnp.int32))


def example(config: Config, *, batch_size: int, key: jax.Array) -> dict[str, jax.Array]:
    """Two images of different sizes a row, and padding after their patches."""
    merge, image, c = config.vision.merge, config.image_token_id, config.vision
    grids = ((1, 2 * merge, 3 * merge), (1, 2 * merge, merge))
    text = jax.random.randint(key, (batch_size, 4), 5, config.vocab_size)
    first, second = (jnp.full((batch_size, n), image) for n in (6, 2))
    ids = jnp.concatenate([text[:, :1], first, text[:, 1:3], second, text[:, 3:]], axis=1)
    shape = (batch_size, 9 * merge**2, c.in_channels * c.frames * c.patch_size**2)
    grids = jnp.broadcast_to(jnp.asarray(grids, jnp.int32), (batch_size, 2, 3))
    return {"input_ids": ids, "patches": jax.random.normal(key, shape), "grids": grids}


# --- the official code ---------------------------------------------------------------------------------------------

_TOKENS = {
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
}  # fmt: skip

_TEXT = {  # defaults of the official text settings, where they are not Qwen2's
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_window_layers": 80,
}  # fmt: skip


def vision_config_from_official(family: str, h: Mapping[str, Any]) -> VisionConfig:
    newer = family == "qwen2_5_vl"
    width = h.get("hidden_size", 3584) if newer else h.get("embed_dim", 1280)
    hidden = h.get("intermediate_size", 3420) if newer else int(width * h.get("mlp_ratio", 4))
    layer = LayerConfig(
        width=width,
        num_heads=h.get("num_heads", 16),
        hidden=hidden,
        activation=activation_from_hub(h.get("hidden_act", "silu" if newer else "quick_gelu")),
        gated=newer,
        norm="rms" if newer else "layer",
    )
    return VisionConfig(
        patch_size=h.get("patch_size", 14),
        frames=h.get("temporal_patch_size", 2),
        in_channels=h.get("in_channels", h.get("in_chans", 3)),
        merge=h.get("spatial_merge_size", 2),
        num_layers=h.get("depth", 32),
        layer=layer,
        window=h.get("window_size", 112) if newer else None,
        full=tuple(h.get("fullatt_block_indexes", (7, 15, 23, 31))) if newer else (),
    )


def config_from_official(family: str, hparams: Mapping[str, Any]) -> Config:
    # Older settings have those of the text beside the others.
    text = _TEXT | dict(hparams.get("text_config") or hparams)
    text.pop("model_type", None)
    rope = dict(text.pop("rope_scaling", None) or text.get("rope_parameters") or {})
    sections = tuple(rope.pop("mrope_section", (16, 24, 24)))
    text["rope_parameters"] = {k: "default" if v == "mrope" else v for k, v in rope.items()}
    vision = hparams.get("vision_config") or {}
    return Config(
        family=family,
        text=text_config_from_official(text, family="qwen2", tied=hparams.get("tie_word_embeddings", False)),
        vision=vision_config_from_official(family, vision),
        sections=sections,
        tokens_per_second=vision.get("tokens_per_second", 4) if family == "qwen2_5_vl" else None,
        **{name: hparams.get(name, default) for name, default in _TOKENS.items()},
    )


def config_to_official(c: Config) -> dict[str, Any]:
    layer, text = c.vision.layer, text_config_to_official(c.text)
    text |= {"model_type": f"{c.family}_text"}
    text["rope_parameters"] |= {"mrope_section": list(c.sections)}
    vision = {
        "model_type": f"{c.family}_vision" if c.family == "qwen2_vl" else c.family,
        "depth": c.vision.num_layers,
        "num_heads": layer.num_heads,
        "hidden_act": activation_to_hub(layer.activation),
        "in_channels": c.vision.in_channels,
        "patch_size": c.vision.patch_size,
        "spatial_merge_size": c.vision.merge,
        "temporal_patch_size": c.vision.frames,
    }
    if c.family == "qwen2_vl":
        ratio = layer.hidden / layer.width
        ratio = int(ratio) if ratio == int(ratio) else ratio
        vision |= {"embed_dim": layer.width, "hidden_size": c.text.hidden_size, "mlp_ratio": ratio}
    else:
        vision |= {
            "hidden_size": layer.width,
            "out_hidden_size": c.text.hidden_size,
            "intermediate_size": layer.hidden,
            "window_size": c.vision.window,
            "fullatt_block_indexes": list(c.vision.full),
            "tokens_per_second": c.tokens_per_second,
        }
    own = {name: getattr(c, name) for name in _TOKENS}
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": c.text.tie_embeddings, **own}


def _table(c: Config, vision: str, language: str) -> Table:
    v = c.vision
    patch = v.in_channels, v.frames, v.patch_size, v.patch_size
    flat = Transform(lambda x: (x.reshape(len(x), -1).T,), lambda x: (x.T.reshape(-1, *patch),))
    yield from parameter(f"{vision}.patch_embed.proj.weight", "vision/patch_embedding/kernel", flat)
    names = (
        {"gate_proj": "gate", "up_proj": "fc1", "down_proj": "fc2"} if v.layer.gated else {"fc1": "fc1", "fc2": "fc2"}
    )
    for i in range(v.num_layers):
        theirs, ours = f"{vision}.blocks.{i}", f"vision/layers_{i}"
        yield from norm_table(f"{theirs}.norm1", f"{ours}/attention_norm", v.layer.norm)
        yield from norm_table(f"{theirs}.norm2", f"{ours}/mlp_norm", v.layer.norm)
        parts = tuple(f"{ours}/attention/{name}" for name in ("query", "key", "value"))
        yield from fused_linear(f"{theirs}.attn.qkv", parts, v.layer.width)
        yield from linear(f"{theirs}.attn.proj", f"{ours}/attention/out")
        for name, own in names.items():
            yield from linear(f"{theirs}.mlp.{name}", f"{ours}/mlp/{own}")
    yield from norm_table(f"{vision}.merger.ln_q", "vision/merger_norm", v.layer.norm)
    yield from linear(f"{vision}.merger.mlp.0", "vision/merger_in")
    yield from linear(f"{vision}.merger.mlp.2", "vision/merger_out")
    yield from decoder.official_table(c.text, language, "lm_head", "language/")


def official_table(c: Config) -> Table:
    return _table(c, "model.visual", "model.language_model")


def saved_table(c: Config) -> Table:
    return _table(c, "visual", "model")


def _packed(c: Config, inputs: Mapping[str, jax.Array]) -> dict[str, Array]:
    """The official patches of all images, and of all videos, sorted into the rows whose text has their tokens."""
    waiting = {
        c.image_token_id: _cut(inputs.get("pixel_values"), inputs.get("image_grid_thw")),
        c.video_token_id: _cut(
            inputs.get("pixel_values_videos"), inputs.get("video_grid_thw"), inputs.get("second_per_grid_ts")
        ),
    }
    rows, seconds = [], []
    for ids in np.asarray(inputs["input_ids"]):
        places = [int(i) for i in ids if i in waiting]
        found, times = [], []
        while places:
            patches, grid, time = waiting[places[0]].pop(0)
            found.append((patches, grid))
            times.append(time)
            places = places[int(np.prod(grid)) // c.vision.merge**2 :]
        rows.append(found)
        seconds.append(times)
    if not any(rows):
        return {}
    packed = pack(rows)
    widest = packed["grids"].shape[1]
    return packed | {"seconds": jnp.asarray([[*times, *[1.0] * (widest - len(times))] for times in seconds])}


def _cut(patches: jax.Array | None, grids: Any, seconds: Any = None) -> list[tuple[jax.Array, list[int], float]]:
    if patches is None:
        return []
    grids = np.asarray(grids)
    ends = np.cumsum(np.prod(grids, axis=-1))
    seconds = np.ones(len(grids)) if seconds is None else np.asarray(seconds)
    starts = [0, *ends[:-1]]
    return [(patches[a:b], g, float(s)) for a, b, g, s in zip(starts, ends, grids.tolist(), seconds, strict=True)]


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    ids, mask, packed = inputs["input_ids"], inputs.get("attention_mask"), _packed(model.config, inputs)
    positions, _ = token_positions(
        model.config,
        ids,
        packed.get("grids"),
        present=None if mask is None else mask.astype(bool),
        seconds=packed.get("seconds"),
    )
    if "position_ids" in inputs:
        positions = jnp.moveaxis(inputs["position_ids"], 0, -1)
    output = model.apply(variables, ids, attention_mask=mask, positions=positions, **packed)
    return {"logits": output.logits, "position_ids": jnp.moveaxis(positions, -1, 0)}


# --- named configurations: sizes of published checkpoints ------------------------------------------------------------


def _named(family: str, hidden: int, inner: int, depth: int, heads: int, keys: int, vocab: int, tied: bool) -> Config:
    text = {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": depth,
        "num_attention_heads": heads, "num_key_value_heads": keys, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": 32768 if family == "qwen2_vl" else 128000, "bos_token_id": 151643,
        "eos_token_id": 151645,
    }  # fmt: skip
    vision = {"hidden_size": 1280, "tokens_per_second": 2} if family == "qwen2_5_vl" else {}
    return config_from_official(family, {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied})


_CONFIGS = {
    "qwen2_vl": {
        "tiny": Config("qwen2_vl"),
        "Qwen2-VL-2B-Instruct": _named("qwen2_vl", 1536, 8960, 28, 12, 2, 151936, True),
        "Qwen2-VL-7B-Instruct": _named("qwen2_vl", 3584, 18944, 28, 28, 4, 152064, False),
    },
    "qwen2_5_vl": {
        "tiny": Config(
            "qwen2_5_vl",
            vision=VisionConfig(
                window=16, full=(1,), layer=LayerConfig(16, 2, hidden=24, activation="silu", gated=True, norm="rms")
            ),
            tokens_per_second=2,
        ),
        "Qwen2.5-VL-3B-Instruct": _named("qwen2_5_vl", 2048, 11008, 36, 16, 2, 151936, True),
        "Qwen2.5-VL-7B-Instruct": _named("qwen2_5_vl", 3584, 18944, 28, 28, 4, 152064, False),
    },
}

_COUNTS = {  # of the published checkpoints
    "qwen2_vl": {"Qwen2-VL-2B-Instruct": 2_208_985_600},
    "qwen2_5_vl": {"Qwen2.5-VL-3B-Instruct": 3_754_622_976},
}

BACKBONES = {
    family: Backbone(
        name=family,
        model=Model,
        configs=_CONFIGS[family],
        example=example,
        cache=empty_cache,
        parameter_counts=_COUNTS[family],
        officials=(
            Official(
                module=f"models/{family}/modeling_{family}.py:{prefix}ForConditionalGeneration",
                config=partial(config_from_official, family),
                hparams=config_to_official,
                table=official_table,
                saved=(saved_table,),
                call=official_call,
                ignored=(r"rotary_(pos_)?emb\.inv_freq$",),
            ),
        ),
    )
    for family, prefix in {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}.items()
}
