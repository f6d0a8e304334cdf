"""Segmentation: which class does each pixel of an image, or each voxel of a volume, belong to.

Batch: `x` (B, *size, C); `label` (B, *size) the number of the class, 0 for the background, and -1 where nothing is
counted (outside of a field of view, or unknown); `prior` (B, K), the same in every row: the logarithm of each class's
share of the training pixels (its log odds where K = 1). Output: logits (B, *size, K), K = 1 where there is one class
beside the background, or a mapping with such `logits` and, for the picture, maps `attention` (B, M, *map size).
"""

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import layers
from zoo.tasks.task import Batch, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "TASK",
    "dice_errors",
    "example",
    "flip_average",
    "logits_of",
    "loss",
    "metrics",
    "otsu",
    "picture",
    "pixel_errors",
    "pixel_prior",
    "probabilities",
    "sliding_window",
    "summarise",
]

_SMALLEST_LOG = -100.0  # torch's BCELoss cuts logarithms there


def logits_of(outputs: Any) -> Float[Array, "B *size K"]:
    """The logits in a model's outputs, float32."""
    return (outputs["logits"] if isinstance(outputs, Mapping) else outputs).astype(jnp.float32)


def probabilities(logits: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """A softmax over classes, or of a single one its sigmoid."""
    return jax.nn.sigmoid(logits) if logits.shape[-1] == 1 else jax.nn.softmax(logits, axis=-1)


def _targets(label: Int[Array, "*B"], classes: int) -> Float[Array, "*B K"]:
    """1 for the class of each pixel (of one class: where it is), nothing where nothing is counted."""
    number = jnp.arange(classes) + (classes == 1)
    return (label[..., None] == number).astype(jnp.float32)


# --- losses -----------------------------------------------------------------------------------------------------------


def pixel_errors(logits: Float[Array, "*B K"], label: Int[Array, "*B"]) -> Float[Array, ""]:
    """Mean over counted pixels of -log p of their class; of a single class of both its answers', each at most 100."""
    if logits.shape[-1] == 1:
        yes, no = (jnp.maximum(jax.nn.log_sigmoid(z), _SMALLEST_LOG) for z in (logits[..., 0], -logits[..., 0]))
        errors = -jnp.where(label > 0, yes, no)
    else:
        picked = jnp.take_along_axis(logits, jnp.maximum(label, 0)[..., None], axis=-1)[..., 0]
        errors = jax.nn.logsumexp(logits, axis=-1) - picked
    counted = label >= 0
    return jnp.sum(jnp.where(counted, errors, 0.0)) / jnp.maximum(jnp.sum(counted), 1)


def dice_errors(
    logits: Float[Array, "B *size K"],
    label: Int[Array, "B *size"],
    *,
    smooth: float,
    whole_batch: bool = False,
    squares: bool = False,
) -> Float[Array, ""]:
    """Mean over images and classes of 1 - (2 sum p g + smooth) / (sum p + sum g + smooth).

    `squares` takes p^2 below the line, `whole_batch` sums over all images at once.
    """
    target = _targets(label, logits.shape[-1])
    share = jnp.where(label[..., None] >= 0, probabilities(logits), 0.0)
    axes = tuple(range(0 if whole_batch else 1, logits.ndim - 1))
    both, there = (jnp.sum(v, axis=axes) for v in (share * target, target))
    claimed = jnp.sum(jnp.square(share) if squares else share, axis=axes)
    return 1 - jnp.mean((2 * both + smooth) / (claimed + there + smooth))


def loss(outputs: Any, batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy of the pixels plus the Dice error of each image (smooth 1)."""
    logits = logits_of(outputs)
    parts = {"pixel_loss": pixel_errors(logits, batch["label"])}
    parts["dice_loss"] = dice_errors(logits, batch["label"], smooth=1.0)
    return parts["pixel_loss"] + parts["dice_loss"], parts


# --- scores -----------------------------------------------------------------------------------------------------------


def metrics(outputs: Any, batch: Batch) -> dict[str, Float[Array, "B *_"]]:
    """Of each image: how many counted pixels are rightly taken for each class, are taken for it, and are of it (the
    background first); and the mean Dice of the other classes that are there or guessed, 1 if there is none."""
    logits, label = logits_of(outputs), batch["label"]
    guess = (logits[..., 0] > 0) if logits.shape[-1] == 1 else jnp.argmax(logits, axis=-1)
    # Whatever is not a number is never right.
    guess = jnp.where(jnp.all(jnp.isfinite(logits), axis=-1), guess, -1)
    axes, found = tuple(range(1, label.ndim)), []
    for k in range(max(logits.shape[-1], 2)):  # class by class: no array of pixels times classes
        claimed, there = (guess == k) & (label >= 0), label == k
        found.append([jnp.sum(v, axis=axes, dtype=jnp.float32) for v in (claimed & there, claimed, there)])
    hits, guessed, there = (jnp.stack(v, axis=-1) for v in zip(*found, strict=True))
    total = (guessed + there)[:, 1:]
    known = jnp.sum(total > 0, axis=-1)
    dice = jnp.sum(2 * hits[:, 1:] / jnp.maximum(total, 1), axis=-1) / jnp.maximum(known, 1)
    return {"hits": hits, "guessed": guessed, "there": there, "dice_per_image": jnp.where(known > 0, dice, 1.0)}


def summarise(totals: dict[str, Any], tuning: dict[str, Any] | None) -> dict[str, float]:
    """Over all pixels of a split, means over the classes beside the background: Dice (the F1 of one class), IoU,
    sensitivity (recall) and precision; the accuracy; and the mean of the images' own Dice.

    Classes that are neither there nor guessed are left out of the mean over classes.
    """
    hits, guessed, there = (np.asarray(totals[k], np.float64) for k in ("hits", "guessed", "there"))
    known = (guessed + there)[1:] > 0
    shares = {
        "dice": 2 * hits / np.maximum(guessed + there, 1),
        "iou": hits / np.maximum(guessed + there - hits, 1),
        "sensitivity": hits / np.maximum(there, 1),
        "precision": hits / np.maximum(guessed, 1),
    }
    found = {name: float(np.mean(v[1:][known])) if known.any() else 1.0 for name, v in shares.items()}
    found["accuracy"] = float(hits.sum() / np.maximum(there.sum(), 1))
    return found | {"dice_per_image": float(totals["dice_per_image"]) / totals["examples"]}


def pixel_prior(counts: Float[np.ndarray, " C"], num_classes: int) -> Float[np.ndarray, " K"]:
    """`prior` of the training pixels of each class, the background first: half a pixel more, so that none is 0."""
    share = (counts + 0.5) / (counts + 0.5).sum()
    if num_classes == 1:
        return np.log(share[1:] / share[0]).astype(np.float32)
    return np.log(share).astype(np.float32)


def otsu(batch: Batch) -> Float[Array, "B *size K"]:
    """What is brighter than the image's own best threshold, all taken for the most frequent class."""
    brightness = jnp.mean(batch["x"].astype(jnp.float32), axis=-1)
    flat = brightness.reshape(len(brightness), -1)
    low, high = (f(flat, axis=1, keepdims=True) for f in (jnp.min, jnp.max))
    flat = (flat - low) / jnp.maximum(high - low, 1e-12)
    bright = (flat > layers.otsu_threshold(flat)[:, None]).reshape(brightness.shape)
    prior = batch["prior"]
    if prior.shape[-1] == 1:
        return jnp.where(bright, 1.0, -1.0)[..., None]
    often = 1 + jnp.argmax(prior[:, 1:], axis=-1).reshape(-1, *(1,) * (bright.ndim - 1))
    return jax.nn.one_hot(jnp.where(bright, often, 0), prior.shape[-1])


# --- images that are larger than what a model is given at once --------------------------------------------------------


def sliding_window(
    apply: Callable[[Float[Array, "B *tile C"]], Float[Array, "B *tile D"]],
    x: Float[Array, "B *size C"],
    *,
    tile: tuple[int, ...],
    overlap: float,
    weights: Float[Array, "*tile"] | None = None,
    overhang: bool = False,
) -> Float[Array, "B *size D"]:
    """y_p = sum_n w(p) apply(tile_n)(p) / sum_n w(p) over tiles that overlap by that share of their length; 0 where all
    weights are 0.

    Where tiles do not fit, the last one of an axis ends with the image; with `overhang` there is one more, at the next
    stride, which goes beyond it. What is outside is 0 and its results are dropped, also of images smaller than a tile.
    `weights` are 1 without them. Tiles run one after the other: memory is that of one. Source: card
    spine_context_resunet, Inference.
    """
    size = x.shape[1:-1]
    starts = []
    for length, extent in zip(size, tile, strict=True):
        stride = int(extent * (1 - overlap))
        if stride < 1:
            raise ValueError(f"sliding_window: overlap {overlap} of tiles of {extent} leaves no step to go on")
        regular = range(0, length - extent + (stride if overhang else 1), stride)
        starts.append(sorted({*regular, max(0, length - extent)}))
    ends = [max(last[-1] + extent, n) for last, extent, n in zip(starts, tile, size, strict=True)]
    room = ((0, 0), *((0, end - n) for end, n in zip(ends, size, strict=True)), (0, 0))
    padded = jnp.pad(x, room)
    weights = (jnp.ones(tile, jnp.float32) if weights is None else weights)[..., None]
    channels = jax.eval_shape(apply, jax.ShapeDtypeStruct((len(x), *tile, x.shape[-1]), x.dtype)).shape[-1]

    def add(carry, start):
        total, share = carry
        first = (0, *start, 0)
        found = apply(jax.lax.dynamic_slice(padded, first, (len(x), *tile, x.shape[-1])))
        kept = jax.lax.dynamic_slice(total, first, found.shape)
        total = jax.lax.dynamic_update_slice(total, kept + found.astype(jnp.float32) * weights, first)
        kept = jax.lax.dynamic_slice(share, first[1:], weights.shape)
        return (total, jax.lax.dynamic_update_slice(share, kept + weights, first[1:])), None

    empty = jnp.zeros((len(x), *ends, channels)), jnp.zeros((*ends, 1))
    corners = jnp.asarray(list(itertools.product(*starts)), jnp.int32)
    total, share = jax.lax.scan(add, empty, tuple(corners.T))[0]
    inside = tuple(slice(0, n) for n in size)
    there = share > 0
    return jnp.where(there, total / jnp.where(there, share, 1.0), 0.0)[(slice(None), *inside)]


def flip_average(
    apply: Callable[[Float[Array, "B *size C"]], Float[Array, "B *size D"]], x: Float[Array, "B *size C"]
) -> Float[Array, "B *size D"]:
    """Mean of what is found in the image and in each of its 2^d - 1 reflections, reflected back."""
    axes = range(1, x.ndim - 1)
    flips = [chosen for count in range(len(axes) + 1) for chosen in itertools.combinations(axes, count)]
    found = jax.lax.map(apply, jnp.stack([jnp.flip(x, chosen) for chosen in flips]))  # compiled once
    return sum(jnp.flip(y, chosen) for y, chosen in zip(found, flips, strict=True)) / len(flips)


# --- examples ---------------------------------------------------------------------------------------------------------


def example(
    *, size: tuple[int, ...], channels: int, num_classes: int, batch_size: int, key: jax.Array
) -> dict[str, Array]:
    """Unit noise, and in each image one box of each class that is brighter by as much as its number."""
    classes = max(num_classes, 2)
    x = jax.random.normal(key, (batch_size, *size, channels))
    grid = jnp.stack(jnp.meshgrid(*(jnp.arange(n) / n for n in size), indexing="ij"), axis=-1)
    corners = 0.6 * jax.random.uniform(jax.random.fold_in(key, 1), (batch_size, classes - 1, len(size)))
    away = grid[None, None] - corners.reshape(batch_size, -1, *(1,) * len(size), len(size))
    inside = jnp.all((away >= 0) & (away < 0.4), axis=-1)
    number = jnp.arange(1, classes).reshape(-1, *(1,) * len(size))
    label = jnp.max(jnp.where(inside, number, 0), axis=1).astype(jnp.int32)
    prior = jax.nn.log_softmax(jax.random.normal(jax.random.fold_in(key, 2), (num_classes,)))
    return {"x": x + label[..., None], "label": label, "prior": jnp.broadcast_to(prior, (batch_size, num_classes))}


def picture(batch: Batch, outputs: Any) -> "Figure":
    """The first image (of a volume the slice with most to see), its true and its predicted masks, and the attention
    maps of the model, if it gives any."""
    from matplotlib.figure import Figure

    x, label, logits = (jax.device_get(a)[0] for a in (batch["x"], batch["label"], logits_of(outputs)))
    maps = outputs.get("attention") if isinstance(outputs, Mapping) else None
    maps = [] if maps is None else list(np.asarray(jax.device_get(maps)[0], np.float32))
    classes = max(logits.shape[-1], 2)
    guess = (logits[..., 0] > 0).astype(int) if logits.shape[-1] == 1 else logits.argmax(axis=-1)
    x = np.asarray(x if x.shape[-1] == 3 else x[..., :1], np.float32)
    if label.ndim == 3:
        seen = [(label > 0).sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
        axis = int(np.argmax([count.max() for count in seen]))
        at, length = int(seen[axis].argmax()), label.shape[axis]
        maps = [np.take(m, at * m.shape[axis] // length, axis) for m in maps]
        x, label, guess = (np.take(v, at, axis) for v in (x, label, guess))
    image = ((x - x.min()) / max(float(np.ptp(x)), 1e-12)).squeeze()
    figure = Figure(figsize=(2.6 * (3 + len(maps)), 3.0), layout="constrained")
    panels = figure.subplots(1, 3 + len(maps))
    for axes, name, mask in zip(panels, ("image", "truth", "prediction"), (None, label, guess), strict=False):
        axes.imshow(image, cmap="gray")
        if mask is not None:
            shown = np.ma.masked_where((mask <= 0) | (label < 0), mask)
            axes.imshow(shown, cmap="turbo", vmin=0, vmax=classes, alpha=0.55, interpolation="nearest")
        axes.set_title(name)
    for number, (axes, attention) in enumerate(zip(panels[3:], maps, strict=True)):
        axes.imshow(image, cmap="gray")
        edges = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
        shown = axes.imshow(attention, cmap="inferno", alpha=0.7, extent=edges)
        figure.colorbar(shown, ax=axes, shrink=0.7)
        axes.set_title(f"attention {number + 1}" if len(maps) > 1 else "attention")
    for axes in panels:
        axes.set_axis_off()
    return figure


TASK = Task(
    name="segmentation",
    loss=loss,
    metrics=metrics,
    metric="dice",
    lower_is_better=False,
    baselines={"otsu": otsu},
    summarise=summarise,
    picture=picture,
    picture_name="masks.png",
)
