"""Poses and what a camera sees of them: recorded motions, clips of one's own, and a stand-in.

Recorded motions (CMU, walking, running and soccer) are angles of one skeleton; a virtual camera five metres away looks
at it from all around, at every second frame (25 a second). The test part is the test sequence of each action from four
sides, the validation part the last training sequence, and training has the others from eight sides chosen by chance.
Keypoints carry noise as a detector's do, and the detector is less sure of the worse ones.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import layers
from trainers.data.files import Files
from trainers.data.prepare import load_dataset
from zoo.catalogue import closest
from zoo.errors import UserError
from zoo.tasks.pose_lifting import PARENTS

__all__ = ["ACTIONS", "PoseData", "PoseSplit", "load_poses", "pose_standin", "recorded_poses", "seen"]

ACTIONS = ("walking", "running", "soccer")
_FOCAL = 2.3  # in half widths of the picture
_DISTANCE = 5.0  # metres, of the camera from a recorded skeleton
_CLIPS = {"train": 2_400, "valid": 300, "test": 300}  # of the stand-in

# The recorded skeleton: joints by their number, their parents and bones, in units of 7 cm, y upwards.
_BONES = {
    0: (-1, (0, 0, 0)), 1: (0, (0, 0, 0)), 2: (1, (1.65674, -1.80282, 0.62477)), 3: (2, (2.5972, -7.13576, 0)),
    4: (3, (2.49236, -6.8477, 0)), 7: (0, (0, 0, 0)), 8: (7, (-1.6107, -1.80282, 0.62476)),
    9: (8, (-2.59502, -7.12977, 0)), 10: (9, (-2.4678, -6.78024, 0)), 13: (0, (0, 0, 0)),
    14: (13, (0.01961, 2.0545, -0.14112)), 15: (14, (0.01021, 2.06436, -0.05921)), 16: (15, (0, 0, 0)),
    17: (16, (0.00713, 1.56711, 0.14968)), 18: (17, (0.03429, 1.56041, -0.10006)),
    19: (18, (0.01305, 1.6256, -0.05265)), 20: (15, (0, 0, 0)), 21: (20, (3.54205, 0.90436, -0.17364)),
    22: (21, (4.86513, 0, 0)), 23: (22, (3.35554, 0, 0)), 29: (15, (0, 0, 0)),
    30: (29, (-3.49802, 0.75994, -0.32616)), 31: (30, (-5.02649, 0, 0)), 32: (31, (-3.36431, 0, 0)),
}  # fmt: skip
# Of them, those that stand for the joints of Human3.6M.
_CHOSEN = (0, 8, 9, 10, 2, 3, 4, 14, 15, 17, 19, 21, 22, 23, 30, 31, 32)

# The stand-in's bones in metres, as a camera sees somebody who faces it: y downwards, the left to the right.
_REST = np.array([
    (0, 0, 0), (-0.12, 0, 0), (0, 0.45, 0), (0, 0.45, 0), (0.12, 0, 0), (0, 0.45, 0), (0, 0.45, 0), (0, -0.23, 0),
    (0, -0.25, 0), (0, -0.12, 0), (0, -0.13, 0), (0.16, 0.02, 0), (0, 0.29, 0), (0, 0.26, 0), (-0.16, 0.02, 0),
    (0, 0.29, 0), (0, 0.26, 0),
])  # fmt: skip
# Middle and swing, in radians, of the rotations about x (forward is negative), y and z; the others do not turn.
_SWINGS = {
    1: ((-0.3, 0, 0.05), (0.5, 0.1, 0.1)), 4: ((-0.3, 0, -0.05), (0.5, 0.1, 0.1)), 2: ((0.6, 0, 0), (0.5, 0, 0)),
    5: ((0.6, 0, 0), (0.5, 0, 0)), 7: ((-0.1, 0, 0), (0.15, 0.2, 0.1)), 8: ((0, 0, 0), (0.1, 0.15, 0.1)),
    11: ((-0.3, 0, -0.3), (0.6, 0.3, 0.3)), 14: ((-0.3, 0, 0.3), (0.6, 0.3, 0.3)),
    12: ((-0.8, 0, 0), (0.6, 0, 0)), 15: ((-0.8, 0, 0), (0.6, 0, 0)),
}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PoseSplit:
    """Clips of one part."""

    keypoints: Float[Array, "S T 17 3"]
    pose: Float[Array, "S T 17 3"]

    def __len__(self) -> int:
        return self.pose.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The clips of these numbers as a batch of pose lifting; traceable."""
        return {"x": self.keypoints[indices], "y": self.pose[indices]}


@dataclass(frozen=True)
class PoseData:
    """The three parts of a set."""

    train: PoseSplit
    valid: PoseSplit
    test: PoseSplit


def seen(
    rng: np.random.Generator, places: Float[np.ndarray, "S T 17 3"], distance: Float[np.ndarray, " S"]
) -> PoseSplit:
    """What a detector makes of skeletons `distance` metres in front of a camera, and their poses in its unit.

    `places` are metres about the root. Noise is 1 to 3 % of the mean joint's distance from the root, ten times as much
    for a joint or two of every other clip; confidence falls with it.
    """
    clips, _, joints, _ = places.shape
    middle = np.stack([*rng.uniform(-0.25, 0.25, (2, clips)) * distance, distance], axis=-1)
    points = places + middle[:, None, None]
    scale = (_FOCAL / distance)[:, None, None, None]
    share = np.broadcast_to(rng.uniform(0.01, 0.03, (clips, 1)), (clips, joints)).copy()
    hidden = (rng.random((clips, joints)).argsort(axis=1) < rng.integers(1, 3, (clips, 1))) & (
        rng.random((clips, 1)) < 0.5
    )
    share[hidden] *= 10
    radius = np.linalg.norm(places, axis=-1).mean(axis=(1, 2))
    noise = rng.normal(size=(*places.shape[:-1], 2)) * share[:, None, :, None] * radius[:, None, None, None] * scale
    confidence = np.broadcast_to(np.exp(-5 * share)[:, None, :, None], (*places.shape[:-1], 1))
    keypoints = np.concatenate([_FOCAL * points[..., :2] / points[..., 2:] + noise, confidence], axis=-1)
    return PoseSplit(jnp.asarray(keypoints, jnp.float32), jnp.asarray(places * scale, jnp.float32))


def _turned(
    rotations: Float[Array, "S T J 3 3"], offsets: Array, parents: tuple[int, ...]
) -> Float[np.ndarray, "S T J 3"]:
    return np.asarray(layers.forward_kinematics(rotations, offsets, parents=parents)[0], np.float64)


def pose_standin(seed: int, clips: int, *, frames: int) -> Float[np.ndarray, "S T 17 3"]:
    """Places in metres about the root of somebody who moves: joints swing in two sinusoids each, within what knees and
    elbows allow, under a body that turns slowly and faces any way; everyone has bones of their own lengths."""
    rng = np.random.Generator(np.random.PCG64(seed))
    centre, swing = np.zeros((17, 3)), np.zeros((17, 3))
    for joint, pair in _SWINGS.items():
        centre[joint], swing[joint] = pair
    speed = rng.uniform(0.01, 0.06, (clips, 1, 17, 3, 2))  # cycles a frame
    phase = rng.uniform(0, 2 * np.pi, (clips, 1, 17, 3, 2))
    time = np.arange(frames)[:, None, None, None]
    waves = np.sin(2 * np.pi * speed * time + phase).mean(axis=-1)
    angles = centre * rng.uniform(0.6, 1.4, (clips, 1, 17, 3)) + swing * waves
    root = np.stack(
        [
            np.broadcast_to(rng.uniform(-0.1, 0.3, (clips, 1)), (clips, frames)),
            rng.uniform(-np.pi, np.pi, (clips, 1)) + 0.3 * waves[:, :, 0, 1],
        ],
        axis=-1,
    )
    pitch, yaw = (layers.so3_exp(jnp.asarray(np.eye(3)[k] * root[..., k : k + 1], jnp.float32)) for k in (0, 1))
    rotations = layers.so3_exp(jnp.asarray(angles, jnp.float32)).at[:, :, 0].set(pitch @ yaw)
    length = rng.uniform(0.85, 1.15, (clips, 1, 11, 1))
    same = np.array([0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 8, 9, 10])  # on both sides of the body
    return _turned(rotations, jnp.asarray(_REST * length[:, :, same], jnp.float32), PARENTS)


def recorded_poses(angles: Float[np.ndarray, "F 117"], yaw: Float[np.ndarray, " V"]) -> Float[np.ndarray, "V F 17 3"]:
    """Places in metres about the root, seen by a camera that has gone round by each of these angles (radians).

    `angles` are a translation, left out, and exponential coordinates of 38 joints. Source: arXiv:1805.00655 (the data).
    """
    numbers = list(_BONES)
    offsets = 0.07 * np.array([bone for _, bone in _BONES.values()])
    parents = tuple(numbers.index(parent) if parent >= 0 else -1 for parent, _ in _BONES.values())
    turns = angles[:, 3:].reshape(-1, 38, 3)[:, numbers]
    # Recorded rotations act on rows: their inverses act on columns.
    rotations = layers.so3_exp(jnp.asarray(-turns, jnp.float32))[None]
    places = _turned(rotations, jnp.asarray(offsets, jnp.float32), parents)[0][:, [numbers.index(j) for j in _CHOSEN]]
    places = (places - places[:, :1]) * np.array([1.0, -1.0, -1.0])  # y downwards, a face turned to the camera
    view = np.asarray(layers.so3_exp(jnp.asarray(np.eye(3)[1] * yaw[:, None], jnp.float32)), np.float64)
    tilt = np.asarray(layers.so3_exp(jnp.array([0.15, 0.0, 0.0])), np.float64)
    return np.einsum("vij,fnj->vfni", tilt @ view, places)


def _recorded(actions: tuple[str, ...], data_dir: str | None, frames: int, seed: int) -> PoseData:
    rng = np.random.Generator(np.random.PCG64(seed))
    parts: dict[str, list[np.ndarray]] = {"train": [], "valid": [], "test": []}
    for action in actions:
        found = load_dataset(f"cmu_mocap/{action}", data_dir)
        train = [row["frames"] for row in found["train"]]
        test = [row["frames"] for row in found["test"]]
        for part, sequences in (("train", train[:-1]), ("valid", train[-1:]), ("test", test)):
            stride, views = (frames // 4 or 1, 8) if part == "train" else (frames, 4)
            for angles in sequences:
                for phase in (0, 1) if part == "train" else (0,):
                    track = angles[phase::2]
                    yaw = 2 * np.pi * np.arange(views) / views
                    yaw = rng.uniform(-np.pi, np.pi, views) if part == "train" else yaw + np.pi / 8
                    places = recorded_poses(track, yaw)
                    starts = range(0, len(track) - frames + 1, stride)
                    parts[part] += [places[:, start : start + frames] for start in starts]
    for part, clips in parts.items():
        if not clips:
            raise UserError(
                f"no {part} sequence of {', '.join(actions)} has {frames} frames: use shorter clips, --model.frames"
            )
    whole = {part: np.concatenate(clips) for part, clips in parts.items()}
    return PoseData(**{part: seen(rng, places, np.full(len(places), _DISTANCE)) for part, places in whole.items()})


def _own(data_dir: str | None, frames: int) -> PoseData:
    if data_dir is None:
        raise UserError("clips are your own: give the folder of train.npz and test.npz with --data-dir")
    files, parts = Files.of_folder("clips", data_dir, ("train.npz", "test.npz")), {}
    for part in ("train", "test"):
        arrays = files.arrays(f"{part}.npz")
        shapes = {name: arrays[name].shape for name in ("x", "y") if name in arrays}
        if len(shapes) < 2 or {shape[1:] for shape in shapes.values()} != {(frames, 17, 3)}:
            raise UserError(
                f"{files.path(f'{part}.npz')} has {shapes or 'neither x nor y'} instead of keypoints x and poses y of "
                f"(clips, {frames}, 17, 3)"
            )
        pose = arrays["y"] - arrays["y"][:, :, :1]
        parts[part] = [np.asarray(a, np.float32) for a in (arrays["x"], pose)]
    border = len(parts["train"][0]) * 9 // 10
    cuts = {"train": slice(border), "valid": slice(border, None), "test": slice(None)}
    return PoseData(
        **{
            n: PoseSplit(*(jnp.asarray(a[cut]) for a in parts[n if n == "test" else "train"]))
            for n, cut in cuts.items()
        }
    )


def load_poses(name: str, *, data_dir: str | None, frames: int, seed: int = 0) -> PoseData:
    """The set of that name: "standin"; "cmu_mocap" or an action of it; "clips", a folder of train.npz and test.npz.

    Clips have keypoints `x` and poses `y`, (S, frames, 17, 3), in the unit of the task; the last tenth of the training
    clips is for validation. This is how sets that need a licence (Human3.6M, MPI-INF-3DHP) are read.
    """
    if name == "standin":
        if data_dir is not None:
            raise UserError("the stand-in is generated and takes no --data-dir; leave it out or name a set with --data")
        rng = np.random.Generator(np.random.PCG64([seed, 1]))
        places = pose_standin(seed, sum(_CLIPS.values()), frames=frames)
        whole = seen(rng, places, rng.uniform(4, 6, len(places)))
        borders = np.cumsum([0, *_CLIPS.values()])
        return PoseData(
            *(jax.tree.map(lambda a, i=i: a[borders[i] : borders[i + 1]], whole) for i in range(len(_CLIPS)))
        )
    if name == "clips":
        return _own(data_dir, frames)
    known = {"cmu_mocap": ACTIONS, **{f"cmu_mocap/{action}": (action,) for action in ACTIONS}}
    if name not in known:
        raise UserError(f"no set of poses is called {name!r}{closest(name, ['standin', 'clips', *known])}")
    return _recorded(known[name], data_dir, frames, seed)
