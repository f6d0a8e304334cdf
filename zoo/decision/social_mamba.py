"""Social-Mamba: socially-aware trajectory forecasting with state-space models (EPFL VITA, arXiv:2605.15424).

Official code: vita-epfl/Social-Mamba@022da14 (no licence). Fidelity: exact.
New: Cycle Mamba, one causal scan over a sequence and its reversal, so that the state flows from the end back to the
start; three such views of a scene (each agent in time, around the ego's goal, around the ego's present) mixed by a
learned gate; then one scan over all agents and times. Linear in agents and frames.
Differs: agents that are absent take no part (`mask_absent`; the official code scans over them as over any other);
layers of one stack start with weights of their own (officially with copies of one draw); rows of the tables start at
norm 1, where the first look-up officially puts them. The head for poses, which the official code holds and never runs,
lies in the collection `unused`, so that its weights survive the way there and back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

import layers
from zoo.blocks import Dropout, Linear, Mamba, stack
from zoo.blocks.mamba import mamba
from zoo.paper import Official, Paper
from zoo.tasks import trajectory_forecasting
from zoo.tasks.task import Batch
from zoo.weights.table import TRANSPOSE, Table, layer_norm, linear, multihead_attention, parameter

Order = Literal["none", "distance", "random", "kinematic", "risk", "intent"]


@dataclass(frozen=True)
class Config:
    """Sizes and constants; lengths are in frames."""

    lookback: int = 10  # T_o, frames seen
    horizon: int = 20  # T_f, frames to forecast
    num_agents: int = 8  # N, places in a scene; the first is the ego's
    num_modes: int = 20  # K, futures to choose from; the official code knows 20 only
    d_model: int = 128  # D, width of a token; a token is one agent in one frame
    temporal_layers: int = 6  # Cycle Mamba over the frames of each agent
    goal_layers: int = 4  # bidirectional Mamba, the ego's last token after each agent's frames
    ego_layers: int = 4  # Cycle Mamba, the ego's present token between each agent's past and future
    global_layers: int = 4  # Cycle Mamba over all frames of all agents
    num_heads: int = 4  # of the attention from the ego's result to everyone's
    state_size: int = 16  # of every Mamba: states of a channel
    conv_width: int = 4  # of every Mamba: taps of its convolution
    expand: int | float = 2  # of every Mamba: inner width / D
    dropout_rate: float = 0.1  # of tokens and feed-forward outputs
    output_scale: float = 1.0  # s, weight of the local and of the global part beside their residuals
    agent_order: Order = "none"  # of the neighbours in the global scan; random: anew in every training step
    mask_absent: bool = True  # False: absent agents take part as any other, as in the official code
    layer_norm_epsilon: float = 1e-5  # added to the variance under the root

    def __post_init__(self):
        if self.agent_order not in Order.__args__:
            raise ValueError(f"agent_order {self.agent_order!r} is not one of {', '.join(Order.__args__)}")


# Of the official tables: rows, and the largest norm of a row with the number that keeps its division finite.
_PAST_ROWS, _FUTURE_ROWS, _AGENT_ROWS = 200, 300, 1000
_LARGEST_NORM, _NORM_EPSILON = 1.0, 1e-7
# A frame stands for ten of a virtual 50 Hz, of which it keeps the first.
_ROWS_PER_FRAME = 10


class FeedForward(nn.Module):
    """drop(W_2 GELU(W_1 x)), hidden width 2D."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], *, train: bool) -> Float[Array, "*B D"]:
        hidden = layers.gelu(Linear(2 * x.shape[-1], name="ffn_in")(x))
        return Dropout(self.config.dropout_rate)(Linear(x.shape[-1], name="ffn_out")(hidden), train=train)


def _mixer(c: Config, name: str) -> Mamba:
    return Mamba(state_size=c.state_size, conv_width=c.conv_width, expand=c.expand, name=name)


def there_and_back(x: Float[Array, "B L D"], lengths: Int[Array, " B"] | None) -> Float[Array, "B 2*L D"]:
    """The first n tokens of each row and the same again from the last to the first; what comes after has no meaning."""
    if lengths is None:
        return jnp.concatenate([x, jnp.flip(x, axis=1)], axis=1)
    position, last = jnp.arange(2 * x.shape[1]), x.shape[1] - 1
    source = jnp.where(position < lengths[:, None], position, 2 * lengths[:, None] - 1 - position)
    return jnp.take_along_axis(x, jnp.clip(source, 0, last)[..., None], axis=1)


def fold_back(x: Float[Array, "B M D"], lengths: Int[Array, " B"] | None) -> Float[Array, "B L D"]:
    """Of each token the sum of its two places in `there_and_back`."""
    length = x.shape[1] // 2
    if lengths is None:
        return x[:, :length] + jnp.flip(x[:, length:], axis=1)
    back = 2 * lengths[:, None] - 1 - jnp.arange(length)
    return x[:, :length] + jnp.take_along_axis(x, jnp.maximum(back, 0)[..., None], axis=1)


class CycleMambaBlock(nn.Module):
    """x + FFN(c), c_t = s_t + s_{2L-1-t}, s = Mamba([n, flip(n)]), n = LN(x): no residual around the scan alone.

    With `lengths`, only the first tokens of each row are scanned, and the others neither inform nor are informed.
    """

    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], *, lengths: Int[Array, " B"] | None = None, train: bool = False
    ) -> Float[Array, "B L D"]:
        c = self.config
        normed = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="norm")(x)
        scanned = _mixer(c, "mamba")(there_and_back(normed, lengths))
        return x + FeedForward(c, name="ffn")(fold_back(scanned, lengths), train=train)


class BiMambaBlock(nn.Module):
    """x = x + M_f(n) + flip(M_b(flip(n))), n = LN(x); then x + FFN(LN(x))."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], *, train: bool = False) -> Float[Array, "B L D"]:
        c = self.config
        normed = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="mamba_norm")(x)
        backward = _mixer(c, "backward_mamba")(jnp.flip(normed, axis=1))
        x = x + _mixer(c, "forward_mamba")(normed) + jnp.flip(backward, axis=1)
        normed = nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="ffn_norm")(x)
        return x + FeedForward(c, name="ffn")(normed, train=train)


def _limited(rows: Float[Array, "R D"]) -> Float[Array, "R D"]:
    norms = jnp.linalg.norm(rows.astype(jnp.float32), axis=-1, keepdims=True)
    return rows * jnp.where(norms > _LARGEST_NORM, _LARGEST_NORM / (norms + _NORM_EPSILON), 1.0).astype(rows.dtype)


def _table_init(key, shape, dtype=jnp.float32):
    return _limited(jax.random.normal(key, shape, dtype))


class Encoding(nn.Module):
    """What frame and which agent a token is: the frame's row on even channels, the agent's on odd ones.

    A frame seen is numbered back from the present, one of the future forward from it. Rows longer than 1 are cut to
    length 1 when they are looked up, and no gradient flows through that.
    """

    @nn.compact
    def __call__(self, agents: int, past: int, future: int, width: int) -> Float[Array, "N T D"]:
        def look_up(name: str, size: int, rows) -> Float[Array, "R _"]:
            if rows.shape[0] and int(rows.max()) >= size:
                raise ValueError(f"social_mamba: {rows.shape[0]} of the {name} are more than its {size} rows serve")
            found = jnp.asarray(self.param(name, _table_init, (size, width // 2)))[rows]
            # Limited in value, untouched in gradient; the subtraction is exactly zero.
            return jax.lax.stop_gradient(_limited(found)) + (found - jax.lax.stop_gradient(found))

        seen = _ROWS_PER_FRAME * np.arange(past, 0, -1) - 1
        frames = jnp.concatenate(
            [
                look_up("past_table", _PAST_ROWS, seen),
                look_up("future_table", _FUTURE_ROWS, _ROWS_PER_FRAME * np.arange(future)),
            ]
        )
        names = look_up("agent_table", _AGENT_ROWS, np.arange(agents))
        pairs = jnp.broadcast_arrays(frames[None, :, :], names[:, None, :])
        return jnp.stack(pairs, axis=-1).reshape(agents, past + future, width)


class EgoQuery(nn.Module):
    """LN(r_0 + Attn(r_0, r)): what the ego makes of its results with everyone, itself included."""

    config: Config

    @nn.compact
    def __call__(self, results: Float[Array, "B N D"], present: Bool[Array, "B N"] | None) -> Float[Array, "B D"]:
        c = self.config
        width, ego = results.shape[-1], results[:, :1]
        # torch draws the three projections as one matrix, whose fans are 3D and D.
        start = {"kernel_init": nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")}
        start["bias_init"] = nn.initializers.zeros
        heads = [
            Linear(width, **start, name=name)(x).reshape(*x.shape[:2], c.num_heads, -1)
            for name, x in (("query", ego), ("key", results), ("value", results))
        ]
        mask = None if present is None else present[:, None, None, :]
        mixed, weights = layers.dot_product_attention(*heads, mask=mask, return_weights=True)
        self.sow("intermediates", "weights", weights)
        mixed = Linear(width, bias_init=nn.initializers.zeros, name="out")(mixed.reshape(ego.shape))
        return nn.LayerNorm(epsilon=c.layer_norm_epsilon, name="norm")(ego + mixed)[:, 0]


class PairwiseBranch(nn.Module):
    """Puts one token of the ego before frame `place` of every agent, scans each agent's frames with it, and lets the
    ego query what stands at the end. The result replaces the ego's last token; all others stay as they are."""

    config: Config
    block: Any
    num_layers: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N T D"],
        token: Float[Array, "B D"],
        place: int,
        present: Bool[Array, "B N"] | None,
        *,
        train: bool,
    ) -> Float[Array, "B N T D"]:
        batch, agents, frames, width = x.shape
        token = jnp.broadcast_to(token[:, None, None], (batch, agents, 1, width))
        pairs = jnp.concatenate([x[:, :, :place], token, x[:, :, place:]], axis=2)
        pairs = pairs.reshape(batch * agents, frames + 1, width)
        pairs = stack(self, partial(self.block, self.config), self.num_layers, pairs, train=train)
        results = pairs[:, -1].reshape(batch, agents, width)
        return x.at[:, 0, -1].set(EgoQuery(self.config, name="attention")(results, present))


class SocialGate(nn.Module):
    """LN(g_1 t + g_2 goal + g_3 ego), g = softmax(W_2 GELU(W_1 [t, goal, ego])) for every token."""

    config: Config

    @nn.compact
    def __call__(self, views: tuple[Float[Array, "B N T D"], ...]) -> Float[Array, "B N T D"]:
        hidden = layers.gelu(Linear(views[0].shape[-1], name="hidden")(jnp.concatenate(views, axis=-1)))
        gate = jax.nn.softmax(Linear(len(views), name="scores")(hidden).astype(jnp.float32), axis=-1)
        self.sow("intermediates", "gate", gate)
        mixed = sum(gate[..., i : i + 1].astype(view.dtype) * view for i, view in enumerate(views))
        return nn.LayerNorm(epsilon=self.config.layer_norm_epsilon, name="norm")(mixed)


class PoseHead(nn.Module):
    """The weights of a layer that the official code holds and never runs."""

    @nn.compact
    def __call__(self, width: int) -> None:
        self.variable("unused", "kernel", jnp.zeros, (width, 3))
        self.variable("unused", "bias", jnp.zeros, (3,))


def agent_order(
    x: Float[Array, "B T N 2"], present: Bool[Array, "B N"], order: Order, key: Key[Array, ""] | None = None
) -> Int[Array, "B N"]:
    """Which agent comes at which place: the ego first, the absent last, and between them by `order`.

    distance: near first; kinematic: fast relative to the ego first; intent: heading for the ego first; random: by
    `key`, none without one. risk: (r.r + 1e-6) / (r.v) small first, where r is the ego's position and v its velocity
    seen from the neighbour: against its name, it ranks the pairs that separate and puts those that approach after them.
    """
    offset = x[:, -1, :1] - x[:, -1]
    if order in ("kinematic", "risk", "intent"):
        if x.shape[1] < 2:
            raise ValueError(f"social_mamba: agent_order {order!r} needs two frames to tell velocities")
        velocity = x[:, -1] - x[:, -2]
        relative = velocity[:, :1] - velocity
    if order == "none" or (order == "random" and key is None):
        score = jnp.zeros(present.shape)
    elif order == "random":
        score = jax.random.uniform(key, present.shape)
    elif order == "distance":
        score = jnp.sum(jnp.square(offset), axis=-1)
    elif order == "kinematic":
        score = -jnp.sum(jnp.square(relative), axis=-1)
    elif order == "risk":
        parting = jnp.sum(offset * relative, axis=-1)
        squared = jnp.sum(jnp.square(offset), axis=-1) + 1e-6
        score = jnp.where(parting > 0, squared / jnp.where(parting > 0, parting, 1.0), jnp.inf)
    else:
        unit = [v / (jnp.linalg.norm(v, axis=-1, keepdims=True) + 1e-6) for v in (velocity, offset)]
        score = -jnp.sum(unit[0] * unit[1], axis=-1)  # intent
    score = jnp.where(present, score, jnp.inf).at[:, 0].set(-jnp.inf)
    # By absence first, so that an agent of infinite score still comes before those that are not there.
    return jnp.lexsort((jax.lax.stop_gradient(score), ~present.at[:, 0].set(True)), axis=-1)


class Model(nn.Module):
    """Encode agents and frames, view them in three ways, mix, scan all at once, decode K paths of the ego."""

    config: Config

    def __call__(self, batch: Batch, *, train: bool = False) -> Float[Array, "B K P 2"]:
        c, x, present = self.config, batch["x"], batch["agent_mask"]
        if c.agent_order != "none":
            key = self.make_rng("dropout") if train and c.agent_order == "random" else None
            order = agent_order(x, present, c.agent_order, key)
            x = jnp.take_along_axis(x, order[:, None, :, None], axis=2)
            present = jnp.take_along_axis(present, order, axis=1)
        origin = x[:, -1:, :1]
        paths = self.paths(x - origin, present if c.mask_absent else None, train=train)
        return paths[:, :, x.shape[1] :] + origin

    @nn.compact
    def paths(
        self, x: Float[Array, "B P N 2"], present: Bool[Array, "B N"] | None, *, train: bool = False
    ) -> Float[Array, "B K T 2"]:
        """K paths of the ego in all frames, seen and to come, from positions around the ego's last one.

        The past may be of any length; with the future it makes the lookback + horizon frames of the config.
        """
        c = self.config
        batch, past, agents, _ = x.shape
        frames = c.lookback + c.horizon
        if past >= frames:
            raise ValueError(f"social_mamba: {past} frames are no past where {frames} are past and future together")
        # The future begins as a standstill.
        x = jnp.concatenate([x, jnp.broadcast_to(x[:, -1:], (batch, frames - past, agents, 2))], axis=1)
        x = Linear(c.d_model, name="embedding_in")(jnp.swapaxes(x, 1, 2))
        x = x + Encoding(name="encoding")(agents, past, frames - past, c.d_model).astype(x.dtype)
        x = Dropout(c.dropout_rate)(x, train=train)  # (B, N, T, D)

        norm = partial(nn.LayerNorm, epsilon=c.layer_norm_epsilon)
        cycle, both_ways = partial(CycleMambaBlock, c), partial(BiMambaBlock, c)
        rows = x.reshape(batch * agents, frames, c.d_model)
        temporal = stack(self, cycle, c.temporal_layers, rows, name="temporal", train=train)
        temporal = norm(name="temporal_norm")(temporal).reshape(x.shape)
        goal = PairwiseBranch(c, BiMambaBlock, c.goal_layers, name="goal")
        ego = PairwiseBranch(c, CycleMambaBlock, c.ego_layers, name="ego")
        views = temporal, goal(x, x[:, 0, -1], frames, present, train=train)
        views += (ego(x, x[:, 0, past - 1], past, present, train=train),)
        x = x + c.output_scale * SocialGate(c, name="gate")(views)

        everyone = x.reshape(batch, agents * frames, c.d_model)  # agent after agent, so that the absent come last
        lengths = None if present is None else frames * jnp.sum(present, axis=1)
        seen = stack(self, cycle, c.global_layers, everyone, name="global", lengths=lengths, train=train)
        x = (everyone + c.output_scale * norm(name="global_norm")(seen))[:, :frames]

        x = norm(name="decoder_norm")(both_ways(name="decoder")(x, train=train))
        PoseHead(name="pose_head")(c.d_model)
        steps = Linear(2 * c.num_modes, name="head")(x).reshape(batch, frames, c.num_modes, 2)
        return jnp.swapaxes(steps, 1, 2)


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    sizes = {name: getattr(config, name) for name in ("lookback", "horizon", "num_agents")}
    return trajectory_forecasting.example(**sizes, batch_size=batch_size, key=key)


# --- the official code ---------------------------------------------------------------------------------------------

_HPARAMS = {
    "nhid": "d_model",
    "nlayers_local": "temporal_layers",
    "nlayers_goal": "goal_layers",
    "nlayers_ego": "ego_layers",
    "nlayers_global": "global_layers",
    "dropout": "dropout_rate",
    "output_scale": "output_scale",
}
# Arguments here, constants there: written only where ours is another.
_CONSTANTS = {"num_modes": 20, "num_heads": 4, "state_size": 16, "conv_width": 4, "expand": 2}
_OFFICIAL_DEFAULTS = {"nhid": 256, "nlayers_local": 2, "obs_and_pred": 21}  # where they are not ours
_LOOKBACKS = {30: 10, 21: 9, 20: 8}  # by past and future together, of the paper's data sets
_PART_HPARAMS = {
    "d_model": "d_model",
    "d_state": "state_size",
    "d_conv": "conv_width",
    "expand": "expand",
    "dropout": "dropout_rate",
}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    hparams = _OFFICIAL_DEFAULTS | dict(hparams)
    frames = hparams["obs_and_pred"]  # where the past ends, the official model sees from its input
    lookback = _LOOKBACKS.get(frames, max(frames // 2, 1))
    ours = {ours: hparams[theirs] for theirs, ours in _HPARAMS.items() if theirs in hparams}
    ours |= {name: hparams[name] for name in _CONSTANTS if name in hparams}
    ours |= {name: float(ours[name]) for name in ("dropout_rate", "output_scale") if name in ours}
    return Config(lookback=lookback, horizon=frames - lookback, mask_absent=False, **ours)


def config_to_official(config: Config) -> dict[str, Any]:
    named = {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()}
    named |= {name: getattr(config, name) for name, value in _CONSTANTS.items() if getattr(config, name) != value}
    return {**named, "obs_and_pred": config.lookback + config.horizon, "num_tokens": 81, "device": "cpu"}


def part_from_official(hparams: Mapping[str, Any]) -> Config:
    ours = {ours: hparams[theirs] for theirs, ours in _PART_HPARAMS.items() if theirs in hparams}
    return Config(**ours | {"dropout_rate": float(ours.get("dropout_rate", 0.2))})


def part_to_official(config: Config) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for theirs, ours in _PART_HPARAMS.items()}


def part_example(config: Config, *, batch_size: int, key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (batch_size, config.lookback, config.d_model))


def _feed_forward(theirs: str, ours: str) -> Table:
    yield from linear(f"{theirs}.mlp.0", f"{ours}ffn_in")
    yield from linear(f"{theirs}.mlp.2", f"{ours}ffn_out")


def _cycle(theirs: str, ours: str) -> Table:
    yield from layer_norm(f"{theirs}norm", f"{ours}norm")
    yield from mamba(f"{theirs}mamba", f"{ours}mamba")
    yield from _feed_forward(f"{theirs}ffn", f"{ours}ffn/")


def _bidirectional(theirs: str, ours: str) -> Table:
    for name in ("mamba_norm", "ffn_norm"):
        yield from layer_norm(f"{theirs}{name}", f"{ours}{name}")
    for name in ("forward_mamba", "backward_mamba"):
        yield from mamba(f"{theirs}{name}", f"{ours}{name}")
    yield from _feed_forward(f"{theirs}ffn", f"{ours}ffn/")


def official_table(config: Config) -> Table:
    yield from linear("fc_in_traj", "embedding_in")
    for theirs, ours in (("obs", "past"), ("pred", "future")):
        yield from parameter(f"double_id_encoder.learned_encoding_{theirs}.weight", f"encoding/{ours}_table")
    yield from parameter("double_id_encoder.person_encoding.weight", "encoding/agent_table")
    for theirs, ours, count in (
        ("local_former", "temporal", config.temporal_layers),
        ("global_former", "global", config.global_layers),
    ):
        for i in range(count):
            yield from _cycle(f"{theirs}.layers.{i}.", f"{ours}_{i}/")
        yield from layer_norm(f"{theirs}.norm", f"{ours}_norm")
    for i in range(config.goal_layers):
        yield from _bidirectional(f"goal_centric_interaction.pairwise_mamba_encoder.{i}.", f"goal/layers_{i}/")
    for i in range(config.ego_layers):
        yield from _cycle(f"ego_centric_interaction.pairwise_mamba_encoder.{i}.", f"ego/layers_{i}/")
    for name in ("goal", "ego"):
        yield from multihead_attention(
            f"{name}_centric_interaction.fusion_attention", f"{name}/attention", config.d_model
        )
        yield from layer_norm(f"{name}_centric_interaction.fusion_norm", f"{name}/attention/norm")
    yield from linear("gate_fusion.gate_generator.0", "gate/hidden")
    yield from linear("gate_fusion.gate_generator.2", "gate/scores")
    yield from layer_norm("gate_fusion.output_norm", "gate/norm")
    yield from _bidirectional("predict_head_traj.decoder.layers.0.", "decoder/")
    yield from layer_norm("predict_head_traj.decoder.norm", "decoder_norm")
    yield from linear("predict_head_traj.output_head", "head")
    yield from parameter("fc_out_pose_3d.weight", "pose_head/kernel", TRANSPOSE, collection="unused")
    yield from parameter("fc_out_pose_3d.bias", "pose_head/bias", collection="unused")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    positions = jnp.asarray(inputs["tgt"])[..., :2]  # already around the ego; the padding mask has no effect there
    paths = model.apply(variables, positions, None, method="paths")
    outputs = {"out_traj": jnp.moveaxis(paths, 1, 0)}
    if "out_joints" in inputs:
        truth = {"y": jnp.asarray(inputs["out_joints"])[:, :, 0, :2]}
        outputs["loss"] = 100 * trajectory_forecasting.loss(paths[:, :, positions.shape[1] :], truth)[0]
    return outputs


def cycle_call(model: CycleMambaBlock, variables, inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    return {"output": model.apply(variables, jnp.asarray(inputs["x"]))}


def bidirectional_call(model: BiMambaBlock, variables, inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    output = model.apply(variables, jnp.asarray(inputs["x"]))
    padding = inputs.get("src_key_padding_mask")  # zeroes the output alone, and is never given by the official model
    return {"output": output if padding is None else jnp.where(padding[..., None], 0.0, output)}


class AgentOrder(nn.Module):
    """`agent_order` as a module, for the official function that sorts."""

    config: Config

    def __call__(self, batch: Batch) -> Int[Array, "B N"]:
        return agent_order(batch["x"], batch["agent_mask"], self.config.agent_order)


def order_call(model: AgentOrder, variables, inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    inputs = {name: jnp.asarray(value) for name, value in inputs.items()}
    if model.config.agent_order == "none":
        order = jnp.broadcast_to(jnp.arange(inputs["padding_mask"].shape[1]), inputs["padding_mask"].shape)
    else:
        batch = {"x": inputs["in_joints"][..., :2], "agent_mask": ~inputs["padding_mask"].astype(bool)}
        order = model.apply(variables, batch)
    outputs = {"padding_mask": jnp.take_along_axis(inputs["padding_mask"], order, axis=1)}
    for name in ("in_joints", "in_masks", "out_joints", "out_masks"):
        index = order[:, None, :, None] if name.endswith("joints") else order[:, None, :]
        outputs[name] = jnp.take_along_axis(inputs[name], index, axis=2)
    return outputs


# --- named configurations: the paper's own, from the shipped files ---------------------------------------------------

_SHORT = {"lookback": 8, "horizon": 12}
_SCENES = ("eth", "hotel", "univ", "zara01", "zara02")
_ONE_EACH = {"temporal_layers": 1, "goal_layers": 1, "ego_layers": 1, "global_layers": 1}
_SMALL = {"num_agents": 4, "d_model": 16, "state_size": 4, **_ONE_EACH}

PAPER = Paper(
    slug="social_mamba",
    task=trajectory_forecasting.TASK,
    model=Model,
    example=example,
    configs={
        "tiny": Config(lookback=4, horizon=6, num_modes=4, **_SMALL),
        "nba": Config(),
        "nba_score": Config(**_SHORT),
        "nba_rebound": Config(**_SHORT),
        "sdd": Config(**_SHORT),
        "jrdb": Config(lookback=9, horizon=12),
        # Not in the paper: the pedestrians that the literature tests on, at the paper's size and at one for CPUs.
        **{scene: Config(**_SHORT) for scene in _SCENES},
        **{f"{scene}_small": Config(**_SHORT, **_SMALL) for scene in _SCENES},
    },
    officials=(
        Official(
            module="social_mamba/model.py:TransMotion_UMamba",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
        ),
        Official(
            module="social_mamba/model_mamba.py:ContinuousBackAndForthMambaBlock",
            config=part_from_official,
            hparams=part_to_official,
            table=lambda config: _cycle("", ""),
            call=cycle_call,
            model=CycleMambaBlock,
            example=part_example,
        ),
        Official(
            module="social_mamba/model_mamba.py:BidirectionalMambaLayer",
            config=part_from_official,
            hparams=part_to_official,
            table=lambda config: _bidirectional("", ""),
            call=bidirectional_call,
            model=BiMambaBlock,
            example=part_example,
        ),
        Official(
            module="social_mamba/sort_grid.py:sort_social_grid",
            config=lambda hparams: Config(agent_order=hparams.get("strategy", "distance")),
            hparams=lambda config: {"strategy": config.agent_order},
            table=lambda config: (),
            call=order_call,
            model=AgentOrder,
        ),
    ),
    # The official count is 4,339,374: 387 more, in the head for poses that is never run.
    parameter_counts={"nba": 4_338_987},
    quirks=(
        "padding masks are taken and ignored: absent agents are scanned as if they stood still; ours are left out, "
        "mask_absent=False reproduces the official code",
        "the goal and ego views change one token each, so that the gate sees the same token twice everywhere else",
        "only the best future is taught and only on the frames to come: outputs on the frames seen mean nothing",
        "the class named ego-centric is the goal view; the order named risk ranks the pairs that separate",
        "the official loss is 100 times ours, which is in metres: its gradient norm of 1 is 0.01 here",
        "rows of the embedding tables are cut to norm 1 in place at every look-up; here in value only",
        "of the goal view's last layer only the last token is read, where the backward scan has just begun: the rates "
        "of its state have no effect",
    ),
    inert=("goal/layers_0/backward_mamba/A_log",),
)
