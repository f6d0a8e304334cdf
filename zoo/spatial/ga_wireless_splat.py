"""GAI-GS: geometric-algebra-informed Gaussian splatting of wireless scenes (arXiv:2605.19065).

Official code: NorahCSJZ/GAI-GS@cb1dec3 (MIT). Fidelity: partial (the number of Gaussians is fixed while training: the
trainer's step adds to parameters and cannot move, double or drop them. `layers.densify_gaussians` does that in a fixed
number of places, for loops of one's own).
New: Gaussians are re-radiators; a transformer over multivectors of projective geometric algebra (GATr) sees the
transmitter and the most opaque Gaussians and says in one token how they lie to each other, and a network that reads it
changes every Gaussian's opacity, shape and signal.
Differs: every Gaussian reaches every pixel (`tiles`; officially those of 16 x 16 tiles near it, which drops up to a
hundredth). The receiver's place is the world-to-camera translation, as there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import layers
from zoo.blocks import Linear
from zoo.paper import Official, Paper
from zoo.tasks import spectrum_rendering
from zoo.tasks.task import Batch
from zoo.weights.table import Table, Transform, constant, linear, parameter


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the network that changes the Gaussians."""

    layers: int = 8  # D of the first stage; the second has half as many
    width: int = 256  # of every layer of both stages
    skips: tuple[int, ...] = (4,)  # after these layers of the first stage, its input is attached again
    place_octaves: int = 10  # of the Gaussians' places
    tx_octaves: int = 5  # of the transmitter's place
    tx_hidden: int = 256  # of the layer that reads the transmitter's place
    tx_width: int = 90  # of what is made of the transmitter's place
    token: int = 16  # width of the token, and multivectors in the transformer
    anchors: int = 16  # Gaussians that the transformer sees
    blocks: int = 1  # of attention and GeoMLP
    scalars: int = 2  # beside the multivector of an item
    hidden_scalars: int = 4  # beside the multivectors inside
    heads: int = 8  # of attention, with one key and value for all
    rope_base: float = 4096.0  # of the rotation of scalars by the item's number
    distance_epsilon: float = 1e-3  # added to the squared weight that points are divided by
    multivector_epsilon: float = 0.01  # the least mean square that a norm divides by
    scalar_epsilon: float = 1e-5  # added to the variance under the root

    @property
    def head_multivectors(self) -> int:
        return max(2 * self.token // self.heads, 1)

    @property
    def head_scalars(self) -> int:
        return max((max(2 * self.hidden_scalars // self.heads, 4) + 1) // 2 * 2, 8)


@dataclass(frozen=True)
class Config:
    """Sizes and constants; the paper's on RFID spectra."""

    height: int = 90  # of a spectrum: elevations
    width: int = 360  # of a spectrum: azimuths
    gaussians: int = 20_000  # how many there are
    spread: float = 20.0  # deviation of their places at the start, in metres
    opacity: float = 0.1  # at the start
    mapping: NetworkConfig = field(default_factory=NetworkConfig)
    tiles: bool = False  # True: as the official rasteriser, see above
    near: float = 0.2  # metres: Gaussians nearer to the receiver are not seen
    dilation: float = 0.3  # squared pixels, added to every splat
    max_alpha: float = 0.99  # of a Gaussian at a pixel
    min_alpha: float = 1 / 255  # below, it is left out
    min_transmittance: float = 1e-4  # a pixel is done before less light than this is left
    attenuation_weight: float = 0.01  # of the norm of the changes of opacity, in the loss
    use_token: bool = True  # False: zeros, to see what it is good for
    use_tx: bool = True  # False: likewise, of what is made of the transmitter's place


# --- geometric algebra ----------------------------------------------------------------------------------------------

_FACTORS = np.sqrt([1.0, 4.0, 6.0, 2.0, 0.5, 0.5, 1.5, 1.5, 0.5])


def _uniform(bound: float | np.ndarray, middle: float = 0.0) -> nn.initializers.Initializer:
    def init(key, shape, dtype=jnp.float32):
        return middle + jnp.asarray(bound, dtype) * jax.random.uniform(key, shape, dtype, -1.0, 1.0)

    return init


class EquiLinear(nn.Module):
    """Multivectors to multivectors by every map that commutes with motions; scalars add to component 0, and are made of
    component 0 and of scalars."""

    features: int
    scalars: int | None  # that come out
    gain: float = 1.0
    unit: bool = False  # component 0 starts around 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L C 16"], s: Float[Array, "B L S"]
    ) -> tuple[Float[Array, "B L F 16"], Float[Array, "B L E"] | None]:
        channels, given = x.shape[-2], s.shape[-1]
        bounds = self.gain * _FACTORS / np.sqrt(channels)
        bounds[0] /= np.sqrt(2)
        weight = self.param("kernel", _uniform(bounds), (self.features, channels, 9))
        from_scalars = Linear(
            self.features,
            kernel_init=_uniform(self.gain / np.sqrt(2 * given)),
            bias_init=_uniform(1 / np.sqrt(given + channels), float(self.unit)),
            name="s2mvs",
        )
        y = layers.pga_linear(x, weight, scalar_bias=from_scalars(s))
        if self.scalars is None:
            return y, None
        share = 0.1 if self.gain == 0.1 else 1.0
        out = Linear(
            self.scalars,
            kernel_init=_uniform(share / np.sqrt(2 * channels)),
            bias_init=_uniform(share / np.sqrt(channels + given)),
            name="mvs2s",
        )(x[..., 0])
        kernel = _uniform(share / np.sqrt(2 * given))
        return y, out + Linear(self.scalars, use_bias=False, kernel_init=kernel, name="s2s")(s)


class EquiAttention(nn.Module):
    """Attention by inner products and distances, one key and value for all heads; scalars turn with the item."""

    config: NetworkConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L C 16"], s: Float[Array, "B L S"]):
        c = self.config
        channels, scalars, (batch, items) = c.head_multivectors, c.head_scalars, x.shape[:2]
        query = EquiLinear(channels * c.heads, scalars * c.heads, name="query")(x, s)
        key = EquiLinear(channels, scalars, name="key")(x, s)
        value = EquiLinear(channels, scalars, name="value")(x, s)
        # The heads are fastest among what comes out of the projection.
        queries = jnp.swapaxes(query[0].reshape(batch, items, channels, c.heads, 16), 2, 3)
        query_scalars = jnp.swapaxes(query[1].reshape(batch, items, scalars, c.heads), 2, 3)
        angles = layers.rope_angles(jnp.arange(items), layers.rope_frequencies(scalars, base=c.rope_base))
        query_scalars, key_scalars = (layers.apply_rope(v, angles) for v in (query_scalars, key[1][:, :, None]))
        far = self.param("distance_table", nn.initializers.zeros, (c.heads, channels))
        mixed = layers.pga_attention(
            queries,
            key[0][:, :, None],
            value[0][:, :, None],
            query_scalars,
            key_scalars,
            value[1][:, :, None],
            log_distance_weight=far,
            epsilon=c.distance_epsilon,
        )
        mixed = mixed[0].reshape(batch, items, -1, 16), mixed[1].reshape(batch, items, -1)
        return EquiLinear(x.shape[-2], s.shape[-1], gain=0.1, name="out")(*mixed)


class GeoMLP(nn.Module):
    """Products and joins of projections, gated by their scalars."""

    @nn.compact
    def __call__(self, x: Float[Array, "B L C 16"], s: Float[Array, "B L S"], reference: Float[Array, "B 16"]):
        channels, scalars = x.shape[-2], s.shape[-1]
        part = partial(EquiLinear, channels, None)
        right = part(gain=0.5, unit=True, name="right")(x, s)[0]
        product = layers.pga_geometric_product(part(name="left")(x, s)[0], right)
        right = part(name="join_right")(x, s)[0]
        join = layers.pga_join(part(name="join_left")(x, s)[0], right, reference[:, None, None])
        both = jnp.concatenate([product, join], axis=-2)
        y, hidden = EquiLinear(2 * channels, 2 * scalars, name="hidden")(both, s)
        return EquiLinear(channels, scalars, name="out")(layers.pga_gated_gelu(y), layers.gelu(hidden))


class GATr(nn.Module):
    """A transformer on multivectors and scalars: linear, blocks of attention and GeoMLP, linear."""

    config: NetworkConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L C 16"], s: Float[Array, "B L S"]):
        c = self.config
        # Joins are taken to the mean of all that comes in, so that reflections change them as they should.
        reference, scalars = jnp.mean(x, axis=(1, 2)), s.shape[-1]

        plain = {"use_bias": False, "use_scale": False, "use_fast_variance": False}

        def normed(x, s):
            s = nn.LayerNorm(epsilon=c.scalar_epsilon, **plain)(s)
            return layers.pga_layer_norm(x, epsilon=c.multivector_epsilon), s

        x, s = EquiLinear(c.token, c.hidden_scalars, name="linear_in")(x, s)
        for i in range(c.blocks):
            y, t = EquiAttention(c, name=f"attention_{i}")(*normed(x, s))
            x, s = x + y, s + t
            y, t = GeoMLP(name=f"mlp_{i}")(*normed(x, s), reference)
            x, s = x + y, s + t
        return EquiLinear(1, scalars, name="linear_out")(x, s)


class SceneToken(nn.Module):
    """What the first item hears of the transmitter and of the most opaque Gaussians, in the order of their opacity."""

    config: NetworkConfig

    @nn.compact
    def __call__(
        self, place: Float[Array, "N 3"], tx: Float[Array, "B 3"], opacity: Float[Array, " N"]
    ) -> Float[Array, "B T"]:
        c = self.config
        count = min(c.anchors, place.shape[0])
        chosen = jnp.arange(count)
        if place.shape[0] > c.anchors:
            # Sorted stably: all are the same at the start, and top_k of a table on several devices takes others then.
            chosen = jnp.argsort(-jax.lax.stop_gradient(opacity), stable=True)[:count]
        start = self.param("cls_token", nn.initializers.zeros, (1, 3))
        shape = (tx.shape[0], count, 3)
        first = jnp.broadcast_to(start.astype(tx.dtype), (tx.shape[0], 1, 3))
        items = jnp.concatenate([first, tx[:, None], jnp.broadcast_to(place[chosen], shape).astype(tx.dtype)], axis=1)
        kinds = self.param("type_table", nn.initializers.normal(1.0), (3, c.scalars))
        kinds = kinds[jnp.minimum(jnp.arange(count + 2), 2)]
        scalars = jnp.broadcast_to(kinds, (tx.shape[0], *kinds.shape)).astype(tx.dtype)
        x, s = GATr(c, name="gatr")(layers.pga_embed_point(items)[:, :, None], scalars)
        return Linear(c.token, name="projection")(jnp.concatenate([x[:, 0, 0], s[:, 0]], axis=-1))


# --- from the transmitter to the Gaussians, from them to a spectrum ---------------------------------------------------


class Network(nn.Module):
    """Changes of rotation (4), scale (3), signal (3) and opacity (1) of every Gaussian for every transmitter."""

    config: NetworkConfig
    use_token: bool = True
    use_tx: bool = True

    @nn.compact
    def __call__(self, scene: Mapping[str, Array]) -> dict[str, Float[Array, "B N _"]]:
        """`scene`: `place` (N, 3) and `opacity` (N,) of the Gaussians, `tx` (B, M, 3) of the transmitters, as every
        Gaussian knows it (M = 1) or each by itself (M = N; the token is of the first)."""
        c = self.config
        place, tx, opacity = (scene[name] for name in ("place", "tx", "opacity"))
        octaves = [2.0 ** jnp.arange(n) for n in (c.place_octaves, c.tx_octaves)]
        encode = partial(layers.fourier_encoding, order=("frequency", "function", "axis"))
        heard = jax.nn.relu(Linear(c.tx_hidden, name="tx_hidden")(encode(tx, octaves[1])))
        heard = Linear(c.tx_width, name="tx_out")(heard)
        token = SceneToken(c, name="token")(place, tx[:, 0], opacity)[:, None]
        heard, token = (v if used else 0 * v for v, used in ((heard, self.use_tx), (token, self.use_token)))

        def each(x):
            return jnp.broadcast_to(x, (tx.shape[0], place.shape[0], x.shape[-1]))

        where = each(encode(place, octaves[0]).astype(tx.dtype))
        seen = jnp.concatenate([where, each(heard), each(token)], axis=-1)
        x = seen
        for i in range(c.layers):
            x = layers.gelu(Linear(c.width, name=f"attenuation_{i}")(x))
            x = jnp.concatenate([seen, x], axis=-1) if i in c.skips else x
        attenuation = layers.gelu(Linear(c.width // 2, name="attenuation_hidden")(x))
        attenuation = Linear(1, name="attenuation_out")(attenuation)
        y = jnp.concatenate([where, each(heard), x, each(token)], axis=-1)
        for i in range(c.layers // 2):
            y = layers.gelu(Linear(c.width, name=f"signal_{i}")(y))
        both = jnp.concatenate([x, y], axis=-1)
        changes = {name: Linear(n, name=name)(both) for name, n in (("rotation", 4), ("scale", 3), ("signal", 3))}
        return changes | {"attenuation": attenuation}


def _root(square: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Square root, with slope 0 at 0."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def magnitude(image: Float[Array, "*B C"]) -> Float[Array, "*B"]:
    """|I_0 + i I_1|; the third channel is not used."""
    return _root(jnp.sum(jnp.square(image[..., :2]), axis=-1))


def norm(changes: Float[Array, "*B N 1"]) -> Float[Array, "*B"]:
    """Euclidean, over all Gaussians."""
    return _root(jnp.sum(jnp.square(changes.astype(jnp.float32)), axis=(-1, -2)))


def render(
    gaussians: Mapping[str, Float[Array, "N _"]],
    changes: Mapping[str, Float[Array, "N _"]],
    rotation: Float[Array, "3 3"],
    receiver: Float[Array, " 3"],
    config: Config,
) -> dict[str, Array]:
    """`image` (H, W, 3) of all directions, and where each Gaussian's splat lies.

    `gaussians`: place, color (of degree 0), opacity (a logit), scale (its logarithm), quaternion. Source: card
    ga_wireless_splat, Rendering.
    """
    c, size = config, (config.height, config.width)
    g = {name: value.astype(jnp.float32) for name, value in gaussians.items()}
    d = {name: value.astype(jnp.float32) for name, value in changes.items()}
    opacity = jnp.clip(jax.nn.sigmoid(g["opacity"]) + d["attenuation"], 0.0, 1.0)[:, 0]
    length = _root(jnp.sum(jnp.square(g["quaternion"]), axis=-1, keepdims=True))
    quaternion = g["quaternion"] / jnp.maximum(length, 1e-12) + d["rotation"]
    covariance = layers.gaussian_covariance(jnp.exp(g["scale"]) + d["scale"], quaternion, normalize=False)
    color = layers.gaussian_color((g["color"] + d["signal"])[:, None], jnp.zeros_like(g["place"]))
    center, splat, depth, visible = layers.project_gaussians_equirectangular(
        g["place"], covariance, rotation.T, receiver, size, near=c.near, dilation=c.dilation
    )
    bounds, radius = layers.gaussian_tiles(center, splat, size)
    limits = {name: getattr(c, name) for name in ("max_alpha", "min_alpha", "min_transmittance")}
    image, weight, _ = layers.composite_gaussians(
        center, splat, depth, opacity, color, size, visible=visible, bounds=bounds if c.tiles else None, **limits
    )
    met = visible & (bounds[:, 0] < bounds[:, 2]) & (bounds[:, 1] < bounds[:, 3])
    return {"image": image, "weight": weight, "center": center, "radius": jnp.where(met, radius, 0)}


class Model(nn.Module):
    """Places of the transmitter to `spectrum` (B, H, W), and the changes of opacity with their weight in the loss."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Float[Array, "B *shape"]]:
        c, count = self.config, self.config.gaussians
        place = self.param("place_table", nn.initializers.normal(c.spread), (count, 3))

        def start_scale(_key, shape, dtype=jnp.float32):
            square = layers.nearest_points(place[None], place[None], 4)[1][0, :, 1:]
            size = jnp.log(jnp.sqrt(jnp.maximum(jnp.mean(square, axis=1), 1e-7)))
            return jnp.broadcast_to(size[:, None], shape).astype(dtype)

        def start_color(key, shape, dtype=jnp.float32):
            return (jax.random.uniform(key, shape, dtype) - 0.5) / 0.28209479177387814

        logit = float(np.log(c.opacity / (1 - c.opacity)))
        gaussians = {
            "place": place,
            "color": self.param("color_table", start_color, (count, 3)),
            "opacity": self.param("opacity_table", nn.initializers.constant(logit), (count, 1)),
            "scale": self.param("scale_table", start_scale, (count, 3)),
            "quaternion": self.param("quaternion_table", lambda *_: jnp.tile(jnp.eye(1, 4), (count, 1)), (count, 4)),
        }
        network = Network(c.mapping, c.use_token, c.use_tx, name="network")
        seen = {"place": jax.lax.stop_gradient(place), "opacity": gaussians["opacity"][:, 0]}
        changes = network(seen | {"tx": batch["tx"][:, None]})
        rendered = jax.vmap(partial(render, gaussians, config=c))
        image = rendered(changes=changes, rotation=batch["rotation"], receiver=batch["receiver"])["image"]
        return {
            "spectrum": magnitude(image),
            "attenuation": changes["attenuation"],
            "attenuation_weight": jnp.full(image.shape[:1], c.attenuation_weight),
        }


def loss(outputs: Mapping[str, Array], batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The task's, plus the weighted norm of all changes of opacity, mean over spectra."""
    error, _ = spectrum_rendering.loss(outputs, batch)
    return error + jnp.mean(outputs["attenuation_weight"] * norm(outputs["attenuation"])), {}


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    sizes = {"height": config.height, "width": config.width}
    return spectrum_rendering.example(**sizes, batch_size=batch_size, key=key)


# --- the official code ----------------------------------------------------------------------------------------------


class Scene(nn.Module):
    """Rendering by itself, which has no weights; `scene` has `gaussians`, `changes`, `rotation` and `receiver`."""

    config: Config

    def __call__(self, scene: Mapping[str, Any]) -> dict[str, Array]:
        return render(scene["gaussians"], scene["changes"], scene["rotation"], scene["receiver"], self.config)


_HPARAMS = {
    "D": "layers",
    "W": "width",
    "skips": "skips",
    "token_dim": "token",
    "num_anchors": "anchors",
    "gatr_blocks": "blocks",
}


def network_from_official(hparams: Mapping[str, Any]) -> NetworkConfig:
    given = hparams.get("mapping", hparams)
    if given.get("use_view", False):
        raise ValueError("ga_wireless_splat: use_view is for a path of the official code that does not run")
    ours = {ours: given[theirs] for theirs, ours in _HPARAMS.items() if theirs in given}
    ours |= {"skips": tuple(ours["skips"])} if "skips" in ours else {}
    for theirs, name in (("pts", "place_octaves"), ("tx", "tx_octaves")):
        if theirs in given.get("multires", {}):
            ours[name] = given["multires"][theirs] if given.get("is_embeded", {}).get(theirs, True) else 0
    return NetworkConfig(**ours)


def network_to_official(config: NetworkConfig) -> dict[str, Any]:
    named = {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()} | {"skips": list(config.skips)}
    octaves = {"pts": config.place_octaves, "view": 10, "tx": config.tx_octaves}
    return {"mapping": named | {"multires": octaves, "use_view": False}}


def network_example(config: NetworkConfig, *, batch_size: int, key: jax.Array) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 3)
    count = config.anchors + 5
    return {
        "place": jax.random.normal(keys[0], (count, 3)),
        "tx": jax.random.normal(keys[1], (batch_size, 1, 3)),
        "opacity": jax.random.uniform(keys[2], (count,)),
    }


def _equi(theirs: str, ours: str, *, scalars: bool = True) -> Table:
    yield from parameter(f"{theirs}.weight", f"{ours}/kernel")
    yield from linear(f"{theirs}.s2mvs", f"{ours}/s2mvs")
    if scalars:
        yield from linear(f"{theirs}.mvs2s", f"{ours}/mvs2s")
        yield from linear(f"{theirs}.s2s", f"{ours}/s2s", bias=False)


_SQUEEZE = Transform(lambda x: (x[:, 0],), lambda x: (x[:, None],))


def network_table(config: NetworkConfig, ours: str = "") -> Table:
    c, gatr = config, "cls_encoder.gatr"
    for theirs, name in (
        ("tx_posnet.0", "tx_hidden"), ("tx_posnet.2", "tx_out"), ("attenuation_head.0", "attenuation_hidden"),
        ("attenuation_head.2", "attenuation_out"), ("rotation_linear", "rotation"), ("scaling_linear", "scale"),
        ("signal_head", "signal"), ("cls_encoder.cls_proj", "token/projection"),
    ):  # fmt: skip
        yield from linear(theirs, f"{ours}{name}")
    for kind, count in (("attenuation", c.layers), ("signal", c.layers // 2)):
        for i in range(count):
            yield from linear(f"{kind}_linears.{i}", f"{ours}{kind}_{i}")
    yield from parameter("cls_encoder.cls_point", f"{ours}token/cls_token")
    yield from parameter("cls_encoder.type_embedding.weight", f"{ours}token/type_table")
    for name in ("linear_in", "linear_out"):
        yield from _equi(f"{gatr}.{name}", f"{ours}token/gatr/{name}")
    pairs = np.arange(0, c.head_scalars, 2, dtype=np.float32)
    frequencies = (1 / np.float32(c.rope_base) ** (pairs / np.float32(c.head_scalars))).astype(np.float32)
    for i in range(c.blocks):
        theirs, own = f"{gatr}.blocks.{i}", f"{ours}token/gatr"
        for name, part in (("q", "query"), ("k", "key"), ("v", "value")):
            yield from _equi(f"{theirs}.attention.qkv_module.{name}_linear", f"{own}/attention_{i}/{part}")
        yield from _equi(f"{theirs}.attention.out_linear", f"{own}/attention_{i}/out")
        yield from parameter(
            f"{theirs}.attention.attention.log_weights", f"{own}/attention_{i}/distance_table", _SQUEEZE
        )
        yield from constant(f"{theirs}.attention.pos_encoding.inv_freq", frequencies)
        for name in ("left", "right", "join_left", "join_right"):
            yield from _equi(f"{theirs}.mlp.layers.0.linear_{name}", f"{own}/mlp_{i}/{name}", scalars=False)
        yield from _equi(f"{theirs}.mlp.layers.0.linear_out", f"{own}/mlp_{i}/hidden")
        yield from _equi(f"{theirs}.mlp.layers.2", f"{own}/mlp_{i}/out")


_CHANGES = {"d_rotation": "rotation", "d_scaling": "scale", "d_signal": "signal", "delta_f": "attenuation"}


def network_call(model: Network, variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    scene = {"place": inputs["pts"], "tx": inputs["tx"][None], "opacity": inputs["opacities"]}
    changes = model.apply(variables, scene)
    return {theirs: changes[ours][0] for theirs, ours in _CHANGES.items()}


def _rendered(changes: Mapping[str, Array], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    truth = jnp.asarray(inputs["gt_spectrum"])
    config = Config(height=truth.shape[0], width=truth.shape[1], tiles=True)
    gaussians = {
        "place": inputs["xyz"],
        "color": inputs["features_dc"][:, 0],
        "opacity": inputs["opacity"],
        "scale": inputs["scaling"],
        "quaternion": inputs["rotation"],
    }
    scene = {"gaussians": gaussians, "changes": changes, "rotation": inputs["R"], "receiver": inputs["r_o"]}
    found = Scene(config).apply({}, scene)
    spectrum = magnitude(found["image"])
    scores = spectrum_rendering.metrics({"spectrum": spectrum[None]}, {"y": truth[None]})
    outputs = {"spectrum": spectrum[None], "attenuation": changes["attenuation"][None]}
    outputs["attenuation_weight"] = jnp.full(1, config.attenuation_weight)
    camera = jnp.zeros((4, 4)).at[:3, :3].set(inputs["R"]).at[3].set(jnp.append(inputs["r_o"], 1.0))
    return {
        "world_view_transform": camera,
        "image": jnp.moveaxis(found["image"], -1, 0),
        "pred_spectrum": spectrum,
        "l1": scores["l1"][0],
        "ssim": scores["ssim"][0],
        "loss": loss(outputs, {"y": truth[None]})[0],
        "radii": found["radius"],
    }


def scene_call(model: Scene, variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    names = {"d_rotation": "rotation", "d_scaling": "scale", "d_signal": "signal", "d_attenuation": "attenuation"}
    return _rendered({ours: inputs[theirs] for theirs, ours in names.items()}, inputs)


def step_call(model: Network, variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    seen = {"place": jax.lax.stop_gradient(inputs["xyz"]), "tx": inputs["tx"][None], "opacity": inputs["opacity"][:, 0]}
    changes = {name: value[0] for name, value in model.apply(variables, seen).items()}
    return _rendered(changes, inputs) | {theirs: changes[ours] for theirs, ours in _CHANGES.items()}


def scene_from_official(hparams: Mapping[str, Any]) -> Config:
    data = hparams.get("data", {})
    return Config(height=data.get("H", 90), width=data.get("Wimg", 360), gaussians=data.get("N", 20_000), tiles=True)


def scene_to_official(config: Config) -> dict[str, Any]:
    return {"part": "render", "data": {"H": config.height, "Wimg": config.width, "N": config.gaussians}}


def scene_example(config: Config, *, batch_size: int, key: jax.Array) -> dict[str, Any]:
    widths = {"place": 3, "color": 3, "opacity": 1, "scale": 3, "quaternion": 4}
    changed = {"rotation": 4, "scale": 3, "signal": 3, "attenuation": 1}
    count = config.gaussians
    return {
        "gaussians": {name: jax.random.normal(key, (count, width)) for name, width in widths.items()},
        "changes": {name: jnp.zeros((count, width)) for name, width in changed.items()},
        "rotation": jnp.eye(3),
        "receiver": jnp.zeros(3),
    }


_network = partial(
    Official, config=network_from_official, hparams=network_to_official, table=network_table, model=Network,
    example=network_example,
)  # fmt: skip

_TINY = Config(
    height=18,
    width=36,
    gaussians=128,
    spread=1.0,
    min_alpha=0.0,  # without jumps, so that results do not depend on the last bit
    min_transmittance=0.0,
    mapping=NetworkConfig(
        layers=2,
        width=32,
        skips=(0,),
        place_octaves=4,
        tx_octaves=3,
        tx_hidden=32,
        tx_width=16,
        token=4,
        anchors=4,
        heads=2,
    ),
)

PAPER = Paper(
    slug="ga_wireless_splat",
    task=spectrum_rendering.TASK,
    model=Model,
    example=example,
    loss=loss,
    configs={
        "tiny": _TINY,
        "deaf": replace(_TINY, use_token=False, use_tx=False),  # to nothing of the transmitter
        "rfid": Config(),
    },
    officials=(
        _network(module="utils/pos_utils.py:MappingNetwork (with GATrEncoder)", call=network_call),
        _network(module="MappingNetwork + render + loss (one training step of train.py)", call=step_call),
        Official(
            module="gaussian_renderer/__init__.py:render + submodules/diff-gaussian-rasterization + train.py loss",
            config=scene_from_official,
            hparams=scene_to_official,
            table=lambda config: (),
            call=scene_call,
            model=Scene,
            example=scene_example,
        ),
    ),
    parameter_counts={"rfid": 962_293 + 14 * 20_000},
    inert=("network/token/gatr/linear_in/mvs2s/kernel",),  # of the scalar part, which points do not have
    quirks=(
        "the receiver's place is the translation from world to camera: the camera is at minus its rotation of it",
        "rows are elevations from -90 to 90 degrees, though spectra cover 0 to 90",
        "items are rotated by their number, so that the token depends on the order of the anchors",
        "quaternions are normalised and then changed; colours have no upper bound",
        "nothing wraps around at an azimuth of 180 degrees",
    ),
)
