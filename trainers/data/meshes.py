"""Meshes that move, and features of a video of them: a stand-in of jointed bodies, and sequences of one's own.

Of a sequence of T + 1 frames the first is the mesh as it is given, in a pose of its own; the video shows the others.
The mesh is centred on its mean, the others on that of the first of them, and both are divided by the mesh's largest
coordinate, or by 0.1 if that is less. Source: card r_dmesh, Data.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from trainers.data.files import Files
from zoo.catalogue import closest
from zoo.errors import UserError

__all__ = ["MeshData", "MeshSplit", "draw_sequence", "edges_of_faces", "load_meshes", "normalised"]

_COUNTS = {"train": 2_400, "valid": 200, "test": 200}
_LEAST_SIZE = 0.1  # by which a mesh is divided
_SIDES = 8  # vertices around a limb
_JOINTS = 2  # of a body, the second of which not all have
_ARRAYS = ("vertices", "faces", "video")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MeshSplit:
    """Sequences of one part."""

    base: Float[Array, "S N 3"]
    frames: Float[Array, "S T N 3"]
    present: Bool[Array, "S N"]
    edges: Int[Array, "S E 2"]
    video: Float[Array, "S L C"]

    def __len__(self) -> int:
        return self.base.shape[0]

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """The sequences of these numbers as a batch of mesh animation; traceable."""
        return {
            "base": self.base[indices],
            "frames": self.frames[indices],
            "vertex_mask": self.present[indices],
            "edges": self.edges[indices],
            "video": self.video[indices],
        }


@dataclass(frozen=True)
class MeshData:
    """The three parts of a set."""

    train: MeshSplit
    valid: MeshSplit
    test: MeshSplit


def edges_of_faces(faces: Int[np.ndarray, "F 3"]) -> Int[np.ndarray, "E 2"]:
    """Pairs of joined vertices, each once, the smaller number first."""
    pairs = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    pairs = np.unique(np.sort(pairs, axis=1), axis=0)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def normalised(vertices: Float[np.ndarray, "T1 N 3"]) -> tuple[np.ndarray, np.ndarray]:
    """(mesh as given (N, 3), frames (T, N, 3)), centred and in the mesh's own unit."""
    base, frames = vertices[0] - vertices[0].mean(axis=0), vertices[1:] - vertices[1].mean(axis=0)
    size = max(_LEAST_SIZE, np.abs(base).max())
    return base / size, frames / size


def _row(
    vertices: np.ndarray, faces: np.ndarray, video: np.ndarray, num_vertices: int, num_edges: int, name: str
) -> tuple:
    """One sequence, filled up to as many places as the model has."""
    edges, number = edges_of_faces(faces), vertices.shape[1]
    for what, count, places, option in (
        ("vertices", number, num_vertices, "vertices"),
        ("edges", len(edges), num_edges, "edges"),
    ):
        if count > places:
            raise UserError(f"{name} has {count} {what}, the model places for {places}: --model.num-{option} {count}")
    if len(edges) and not 0 <= edges.min() <= edges.max() < number:
        raise UserError(f"{name} has faces of vertices from {edges.min()} to {edges.max()}, of {number} there are")
    base, frames = normalised(np.asarray(vertices, np.float64))
    room = (0, num_vertices - number)
    return (
        np.pad(base, (room, (0, 0))).astype(np.float32),
        np.pad(frames, ((0, 0), room, (0, 0))).astype(np.float32),
        np.arange(num_vertices) < number,
        np.pad(edges, ((0, num_edges - len(edges)), (0, 0)), constant_values=-1).astype(np.int32),
        np.asarray(video, np.float32),
    )


def _split(rows: list[tuple]) -> MeshSplit:
    return MeshSplit(*(jnp.asarray(np.stack(column)) for column in zip(*rows, strict=True)))


# --- the stand-in -----------------------------------------------------------------------------------------------------


def _angles(rng: np.random.Generator, frames: int, joints: int) -> Float[np.ndarray, "T1 J"]:
    """One pose by itself, then each joint along a sinusoid; joints that are not there keep the angle 0."""
    time = np.arange(frames)[:, None] / frames
    middle, swing = rng.uniform(-0.6, 0.6, _JOINTS), rng.uniform(0.3, 0.9, _JOINTS)
    cycles, phase = rng.uniform(0.5, 1.5, _JOINTS), rng.uniform(0, 2 * np.pi, _JOINTS)
    moving = middle + swing * np.sin(2 * np.pi * cycles * time + phase)
    angles = np.concatenate([rng.uniform(-1, 1, (1, _JOINTS)), moving])
    return angles * (np.arange(_JOINTS) < joints)


def draw_sequence(
    rng: np.random.Generator, frames: int, most_vertices: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(vertices (T+1, N, 3), faces (F, 3), angles of the joints (T+1, 2)) of a box or a cylinder of two or three limbs.

    It is a tube of 8 to 16 rings of vertices along z that bends about x; next to a joint the turn is blended.
    """
    limbs, most = int(rng.integers(2, _JOINTS + 2)), most_vertices // _SIDES
    if most < 4:
        raise UserError(f"the stand-in's bodies have at least {4 * _SIDES} vertices: num_vertices {most_vertices}")
    rings = int(rng.integers(max(most // 2, 4), most + 1))
    lengths, radius = rng.uniform(0.5, 1.0, limbs), rng.uniform(0.1, 0.25)
    angles = _angles(rng, frames, limbs - 1)

    turn = 2 * np.pi * np.arange(_SIDES) / _SIDES
    around = radius * np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    if rng.random() < 0.5:  # a box: the same directions, as far as its sides
        around *= radius / np.abs(around).max(axis=1, keepdims=True)
    height = np.linspace(0, lengths.sum(), rings)
    tube = np.broadcast_to(around, (rings, _SIDES, 2)), np.broadcast_to(height[:, None, None], (rings, _SIDES, 1))
    rest = np.concatenate(tube, axis=2).reshape(-1, 3)

    moved, bend, joint = np.broadcast_to(rest, (frames + 1, *rest.shape)), 0.0, np.zeros((frames + 1, 3))
    for limb in range(1, limbs):
        pivot = np.array([0, 0, lengths[:limb].sum()])
        along = np.array([0, 0, lengths[limb - 1]])
        joint = joint + _about_x(bend, along)
        bend = bend + angles[:, limb - 1]
        turned = _about_x(bend, rest - pivot) + joint[:, None]
        share = np.clip((rest[:, 2:] - pivot[2]) / (2 * radius) + 0.5, 0, 1)
        moved = (1 - share) * moved + share * turned

    ring, side = np.meshgrid(np.arange(rings - 1), np.arange(_SIDES), indexing="ij")
    here, beside = ring * _SIDES + side, ring * _SIDES + (side + 1) % _SIDES
    lower = np.stack([here, beside, here + _SIDES], axis=-1)
    upper = np.stack([beside, beside + _SIDES, here + _SIDES], axis=-1)
    return moved, np.concatenate([lower, upper]).reshape(-1, 3), angles


def _about_x(angle: np.ndarray | float, points: np.ndarray) -> np.ndarray:
    """(T+1, ..., 3): the points (..., 3) turned about x by each angle; by 0 if there is one for all."""
    angle = np.asarray(angle).reshape(-1, *(1,) * (points.ndim - 1))
    x, y, z = (points[None, ..., k] for k in range(3))
    turned = np.cos(angle) * y - np.sin(angle) * z, np.sin(angle) * y + np.cos(angle) * z
    return np.stack([np.broadcast_to(x, turned[0].shape), *turned], axis=-1)


def _film(angles: Float[np.ndarray, "T J"], projection: Float[np.ndarray, "F C"], tokens: int) -> np.ndarray:
    """Features (L, C): of each token's frame, a projection of the joints' angles and of which frame it is."""
    frames = len(angles)
    seen = np.concatenate([angles, np.eye(frames)], axis=1) @ projection
    return seen[np.arange(tokens) * frames // tokens]


def _standin(seed: int, frames: int, num_vertices: int, num_edges: int, video: tuple[int, int]) -> MeshData:
    tokens, channels = video
    projection = np.random.default_rng([seed, len(_COUNTS)]).normal(size=(_JOINTS + frames, channels))
    parts = {}
    for number, (part, count) in enumerate(_COUNTS.items()):
        rng, rows = np.random.default_rng([seed, number]), []
        for i in range(count):
            vertices, faces, angles = draw_sequence(rng, frames, num_vertices)
            film = _film(angles[1:], projection, tokens)
            rows.append(_row(vertices, faces, film, num_vertices, num_edges, f"body {i} of the stand-in"))
        parts[part] = _split(rows)
    return MeshData(**parts)


# --- sequences of one's own -------------------------------------------------------------------------------------------


def _own(data_dir: str | None, frames: int, num_vertices: int, num_edges: int, video: tuple[int, int]) -> MeshData:
    if data_dir is None:
        raise UserError("sequences are your own: give the folder of train/*.npz and test/*.npz with --data-dir")
    files, rows = Files.of_folder("sequences", data_dir, ("train/*.npz", "test/*.npz")), {"train": [], "test": []}
    for part, found in rows.items():
        for name in files.all(f"{part}/*.npz"):
            arrays = files.arrays(name, _ARRAYS)
            vertices, faces, film = (arrays[key] for key in _ARRAYS)
            if vertices.ndim != 3 or (vertices.shape[0], vertices.shape[2]) != (frames + 1, 3):
                raise UserError(
                    f"{files.path(name)} has vertices of shape {vertices.shape} instead of ({frames + 1}, N, 3)"
                )
            if faces.ndim != 2 or faces.shape[1] != 3:
                raise UserError(f"{files.path(name)} has faces of shape {faces.shape} instead of (F, 3)")
            if film.shape != video:
                raise UserError(f"{files.path(name)} has a video of shape {film.shape} instead of {video}")
            found.append(_row(vertices, faces, film, num_vertices, num_edges, files.path(name)))
    border = max(len(rows["train"]) * 9 // 10, 1)
    if border == len(rows["train"]):
        raise UserError(f"--data-dir {data_dir} holds one training sequence: the last tenth is for validation")
    return MeshData(_split(rows["train"][:border]), _split(rows["train"][border:]), _split(rows["test"]))


def load_meshes(
    name: str,
    *,
    data_dir: str | None,
    frames: int,
    num_vertices: int,
    num_edges: int,
    video_tokens: int,
    video_channels: int,
    seed: int = 0,
) -> MeshData:
    """The set of that name: "standin", or "sequences", a folder of train/*.npz and test/*.npz.

    Such a file holds `vertices` (frames + 1, N, 3), the mesh as given before those that the video shows, `faces` (F, 3)
    and `video` (video_tokens, video_channels). The last tenth of the training ones is for validation.
    """
    known, sizes = ("standin", "sequences"), (frames, num_vertices, num_edges, (video_tokens, video_channels))
    if name not in known:
        raise UserError(f"no set of meshes is called {name!r}{closest(name, known)}")
    if name == "sequences":
        return _own(data_dir, *sizes)
    if data_dir is not None:
        raise UserError("the stand-in is generated and takes no --data-dir; name your own with --data sequences")
    return _standin(seed, *sizes)
