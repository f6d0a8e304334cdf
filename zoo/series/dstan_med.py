"""DSTAN-Med: attention over sensors and over time of one small matrix, and rules of physiology (arXiv:2605.14165).

Official code: mehedi93hasan/DSTAN-MED@5a0d685 (no licence). Fidelity: exact.
New: two attentions look at a window of vital signs along its two axes and are added (DAM), a residual convolution adds
what is local, a class row is read off. An alarm is cancelled where every sensor's last value and last change are what a
living body shows: rules without parameters that can only silence.
Differs: the rules see what was received; officially they see the values before the attack, and would cancel most true
alarms. Allowed changes are for one sampling step and can be scaled to another (`change_scale`). The text counts 2.1
million parameters, this architecture, the released one, has 63,185.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

import layers
from zoo.blocks import Dropout, Linear, stack
from zoo.blocks.basic import product_of_patches
from zoo.errors import UserError
from zoo.paper import Official, Paper
from zoo.tasks import anomaly_detection
from zoo.tasks.task import Batch
from zoo.weights.table import Table, conv, layer_norm, linear, parameter, squeezed

Bounds = Literal["physionet", "mimic3", "wesad", "none"]

# Lowest and highest value and largest change from one sample to the next, in each channel's unit.
BOUNDS = {
    "physionet": {  # beats a minute, percent, mmHg, mmHg, breaths a minute, degrees Celsius
        "HR": (20, 300, 5),
        "SpO2": (50, 100, 1),
        "SysBP": (50, 260, 7.5),
        "DiaBP": (20, 180, 5),
        "RR": (4, 70, 2.5),
        "Temp": (32, 42.5, 0.1),
    },
    "mimic3": {
        "ECG": (-5, 5, 0.5),
        "ABP": (20, 280, 8),
        "PPG": (0, 1, 0.05),
        "HR": (20, 300, 5),
        "RR": (4, 70, 2.5),
        "Temp": (32, 42.5, 0.1),
    },
    "wesad": {
        "ECG": (-2, 2, 0.2),
        "EDA": (0.01, 100, 1.5),
        "BVP": (-1, 1, 0.05),
        "RESP": (-1, 1, 0.04),
        "ST": (26, 40, 0.05),
        "ACC": (0, 8, 0.5),
    },
}


@dataclass(frozen=True)
class Config:
    """Sizes and constants; lengths are in samples."""

    channels: int = 6  # C, sensors; weights depend on it, so it must be the data's
    lookback: int = 15  # L, samples of a window
    num_blocks: int = 7  # N, of attentions and convolutions
    attention_width: int = 64  # d, of queries, keys and values of both attentions
    hidden_channels: int = 60  # between the two convolutions
    kernel_size: int = 3  # of the convolutions, odd
    use_sensors: bool = True  # the attention over sensors
    use_time: bool = True  # the attention over time
    use_convolution: bool = True  # the convolutions
    use_skip: bool = True  # the block's input is added to its attentions
    dropout_rate: float = 0.2  # of the convolutions' output
    bounds: Bounds = "physionet"  # whose rules cancel alarms; none: nothing does
    change_scale: float = 1.0  # factor of the largest allowed change, for other sampling periods
    layer_norm_epsilon: float = 1e-5  # added to the variance under the root

    def __post_init__(self):
        if self.bounds not in Bounds.__args__:
            raise ValueError(f"bounds {self.bounds!r} is not one of {', '.join(Bounds.__args__)}")
        if self.bounds != "none" and len(BOUNDS[self.bounds]) != self.channels:
            raise ValueError(
                f"bounds {self.bounds!r} are for {len(BOUNDS[self.bounds])} channels, not {self.channels}: set bounds "
                "to none"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} is not odd")


def plausible(
    received: Float[Array, "B C"],
    change: Float[Array, "B C"],
    low: Float[Array, " C"],
    high: Float[Array, " C"],
    largest_change: Float[Array, " C"],
) -> Bool[Array, " B"]:
    """Whether every channel's last value lies in [low, high] and differs by at most `largest_change` from the one
    before; all in physical units. Source: card dstan_med, "PPF"."""
    within = (low <= received) & (received <= high) & (jnp.abs(change) <= largest_change)
    return jnp.all(within, axis=-1)


class AxisAttention(nn.Module):
    """softmax(Q K^T / sqrt F) V W_o over rows of F features: one head, scaled by what a row holds, not by its width."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B R F"]) -> Float[Array, "B R F"]:
        features = x.shape[-1]
        line = partial(Linear, use_bias=False, kernel_init=nn.initializers.orthogonal())
        heads = [line(self.width, name=name)(x)[:, :, None] for name in ("query", "key", "value")]
        mixed, weights = layers.dot_product_attention(*heads, scale=features**-0.5, return_weights=True)
        self.sow("intermediates", "weights", weights)
        return line(features, name="out")(mixed[:, :, 0])


class Convolutions(nn.Module):
    """LN(drop(conv(ReLU(conv(x)))) + x) along time; rows are the channels."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B R L"], *, train: bool) -> Float[Array, "B R L"]:
        c, half = self.config, self.config.kernel_size // 2
        convolve = partial(
            nn.Conv,
            kernel_size=(c.kernel_size,),
            padding=[(half, half)],
            use_bias=False,
            kernel_init=nn.initializers.orthogonal(),
            conv_general_dilated=product_of_patches,
        )
        hidden = jax.nn.relu(convolve(c.hidden_channels, name="conv1")(jnp.swapaxes(x, 1, 2)))
        hidden = jnp.swapaxes(convolve(x.shape[1], name="conv2")(hidden), 1, 2)
        return _matrix_norm(c, "norm")(x + Dropout(c.dropout_rate)(hidden, train=train))


def _matrix_norm(c: Config, name: str) -> nn.LayerNorm:
    """Over rows and time together, with a scale and a bias for every entry."""
    return nn.LayerNorm(c.layer_norm_epsilon, reduction_axes=(-2, -1), feature_axes=(-2, -1), name=name)


class Block(nn.Module):
    """LN(A_sensors M + A_time M' + x), then the convolutions; what is switched off is left out."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B R L"], *, train: bool) -> Float[Array, "B R L"]:
        c, parts = self.config, []
        line = partial(Linear, x.shape[-1], use_bias=False, kernel_init=nn.initializers.orthogonal())
        if c.use_sensors:
            parts.append(line(name="sensors_out")(AxisAttention(c.attention_width, name="sensors")(x)))
        if c.use_time:
            mixed = AxisAttention(c.attention_width, name="time")(jnp.swapaxes(x, 1, 2))
            parts.append(line(name="time_out")(jnp.swapaxes(mixed, 1, 2)))
        if parts:
            x = _matrix_norm(c, "norm")(sum(parts) + x if c.use_skip else sum(parts))
        return Convolutions(c, name="convolutions")(x, train=train) if c.use_convolution else x


class Model(nn.Module):
    """Sensors by time, and a class row below them; blocks; the class row's logit, and the verdict of the rules."""

    config: Config

    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, Array]:
        return {"logits": self.logits(batch["x"], train=train), "plausible": rules(self.config, batch)}

    @nn.compact
    def logits(self, x: Float[Array, "B L C"], *, train: bool = False) -> Float[Array, " B"]:
        c = self.config
        if x.shape[1:] != (c.lookback, c.channels):
            raise UserError(
                f"dstan_med is built for {c.channels} channels of {c.lookback} samples, the data has {x.shape[2]} of "
                f"{x.shape[1]}: set --model.channels {x.shape[2]} and --model.lookback {x.shape[1]}"
            )
        row = self.param("class_token", nn.initializers.normal(0.02), (1, c.lookback))
        row = jnp.broadcast_to(row, (len(x), *row.shape)).astype(x.dtype)
        rows = jnp.concatenate([jnp.swapaxes(x, 1, 2), row], axis=1)
        rows = stack(self, partial(Block, c), c.num_blocks, rows, train=train)
        return Linear(1, kernel_init=nn.initializers.orthogonal(), name="head")(rows[:, -1])[:, 0]


def rules(c: Config, batch: Batch) -> Bool[Array, " B"]:
    """Where the rules of the configuration forbid an alarm."""
    if c.bounds == "none":
        return jnp.zeros(len(batch["received"]), bool)
    low, high, change = jnp.array([*BOUNDS[c.bounds].values()], jnp.float32).T
    return plausible(batch["received"], batch["change"], low, high, c.change_scale * change)


def example(config: Config, *, batch_size: int, key: jax.Array) -> Batch:
    return anomaly_detection.example(lookback=config.lookback, channels=config.channels, batch_size=batch_size, key=key)


# --- the official code ---------------------------------------------------------------------------------------------

_HPARAMS = {
    "C_in": "channels",
    "L_in": "lookback",
    "N": "num_blocks",
    "d": "attention_width",
    "d_mid": "hidden_channels",
    "k": "kernel_size",
    "p_d": "dropout_rate",
}
_SWITCHES = {"use_swa": "use_sensors", "use_twa": "use_time", "use_cnn": "use_convolution", "use_skip": "use_skip"}


def config_from_official(hparams: Mapping[str, Any]) -> Config:
    named = {ours: hparams[theirs] for theirs, ours in (_HPARAMS | _SWITCHES).items() if theirs in hparams}
    six = named.get("channels", 6) == 6
    return Config(**named, bounds=hparams.get("ppf_dataset", "physionet" if six else "none"))


def config_to_official(config: Config) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for theirs, ours in _HPARAMS.items()}


def ablation_to_official(config: Config) -> dict[str, Any]:
    names = {"C_in": "channels", "L_in": "lookback", "N": "num_blocks", **_SWITCHES}
    return {theirs: getattr(config, ours) for theirs, ours in names.items()}


def official_table(config: Config, *, ablation: bool = False) -> Table:
    yield from parameter("cls", "class_token", squeezed(1))
    for i in range(config.num_blocks):
        theirs, ours = (f"layers.{i}", f"layers_{i}") if ablation else (f"blocks.{i}", f"layers_{i}")
        attention = theirs if ablation else f"{theirs}.dam"
        for name, own in (("swa", "sensors"), ("twa", "time")):
            if config.use_sensors if own == "sensors" else config.use_time:
                for part, role in (("Q", "query"), ("K", "key"), ("V", "value"), ("out", "out")):
                    yield from linear(f"{attention}.{name}.{part}", f"{ours}/{own}/{role}", bias=False)
                yield from linear(f"{attention}.lp_{name}", f"{ours}/{own}_out", bias=False)
        if config.use_sensors or config.use_time:
            yield from layer_norm(f"{attention}.{'norm_dam' if ablation else 'norm'}", f"{ours}/norm")
        if config.use_convolution:
            for name in ("conv1", "conv2"):
                yield from conv(f"{theirs}.cnn.{name}", f"{ours}/convolutions/{name}", axes=1, bias=False)
            yield from layer_norm(f"{theirs}.cnn.norm", f"{ours}/convolutions/norm")
    yield from linear("head", "head")


def official_call(model: Model, variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    logits = model.apply(variables, jnp.swapaxes(inputs["W"], 1, 2), method="logits")
    outputs = {"logits": logits}
    if "y" in inputs:
        batch = {"y": inputs["y"], "positive_weight": jnp.broadcast_to(inputs["pos_weight"], logits.shape)}
        outputs["loss"] = anomaly_detection.loss(outputs, batch)[0]
    if "y_hat" in inputs:
        raw = inputs["windows_raw"]
        calm = rules(model.config, {"received": raw[..., -1], "change": raw[..., -1] - raw[..., -2]})
        outputs["y_filtered"] = jnp.where(calm, 0, inputs["y_hat"])
    return outputs


_ABLATIONS = {
    "dam_only": {"use_convolution": False},
    "time_only": {"use_sensors": False, "use_convolution": False},
    "sensors_only": {"use_time": False, "use_convolution": False},
    "no_skip": {"use_skip": False},
    "convolution_only": {"use_sensors": False, "use_time": False},
}
_TINY = {"num_blocks": 2, "attention_width": 16, "hidden_channels": 16}

PAPER = Paper(
    slug="dstan_med",
    task=anomaly_detection.TASK,
    model=Model,
    example=example,
    configs={
        "tiny": Config(**_TINY),
        **{f"tiny_{name}": Config(**_TINY, **switches) for name, switches in _ABLATIONS.items()},
        "physionet": Config(),
        "mimic3": Config(bounds="mimic3"),
        "wesad": Config(bounds="wesad"),
        **{f"physionet_{name}": Config(**switches) for name, switches in _ABLATIONS.items()},
        "physionet_no_rules": Config(bounds="none"),
        "tranad_proxy": Config(num_blocks=3, attention_width=32, hidden_channels=32),  # the paper's stand-in for TranAD
    },
    officials=(
        Official(
            module="DSTAN-MED.py:DSTANMed",
            config=config_from_official,
            hparams=config_to_official,
            table=official_table,
            call=official_call,
        ),
        Official(
            module="DSTAN-MED.py:AblationModel",
            config=config_from_official,
            hparams=ablation_to_official,
            table=partial(official_table, ablation=True),
            call=official_call,
        ),
    ),
    parameter_counts={"physionet": 63_185},
    reported={
        "physionet2012/L1": {"sensitivity": 0.733, "f1": 0.800, "precision": 0.876, "auroc": 0.924},
        "physionet2012": {"sensitivity": 0.886, "f1": 0.901},
    },
    quirks=(
        "scores are divided by the root of what a row holds, not of the attention's width",
        "officially the rules see windows of the clean records, ours see what was received",
        "the official PhysioNet loader asks for parameters that do not exist and rejects every record",
    ),
)
