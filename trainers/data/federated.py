"""Images that lie with clients, whose classes differ: a Dirichlet partition, and batches of a few clients each.

A training batch is one round's: four clients drawn anew, each with every fourth row, its examples drawn at random from
its own. For each class, clients get shares of it from a Dirichlet distribution of concentration alpha, and again until
everyone has ten examples. Of each set the customary test part is kept; every tenth training image is for validation.
Names: "standin", "digits8x8" and "cifar10_sample", with @alpha, such as digits8x8@0.5; without it alpha is 0.1.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from trainers.data.images import ImageSplit, check_sizes, read_images
from zoo.catalogue import closest
from zoo.errors import UserError
from zoo.tasks.classification import class_prior

__all__ = ["ClientSplit", "FederatedData", "dirichlet_partition", "load_federated", "patterned_images"]

CLIENTS, SAMPLED = 10, 4
_SETS = ("standin", "digits8x8", "cifar10_sample")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClientSplit:
    """The training part: `members` are the numbers of each client's images, of which it has `count`."""

    images: ImageSplit
    members: Int[Array, "N M"]
    count: Int[Array, " N"]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Int[Array | np.ndarray, " B"]) -> dict[str, Array]:
        """A round's batch. The numbers serve as random ones: which clients (row i is of the one at place i mod 4), and
        which of their images."""
        indices = jnp.asarray(indices)
        clients = len(self.count)
        # The first row decides on the clients, neighbours in a cycle whose step has no factor in common with it.
        steps = jnp.asarray([s for s in range(1, clients) if np.gcd(s, clients) == 1])
        first, step = indices[0] % clients, steps[(indices[0] // clients) % len(steps)]
        row = jnp.arange(len(indices))
        client = (first + step * (row % SAMPLED)) % clients
        mine = self.members[client, indices % self.count[client]]
        share = self.count[client] / jnp.sum(self.count)
        return self.images.batch(mine) | {"client_share": share.astype(jnp.float32)}


@dataclass(frozen=True)
class FederatedData:
    """The three parts of a set."""

    train: ClientSplit
    valid: ImageSplit
    test: ImageSplit


def dirichlet_partition(
    label: np.ndarray, *, clients: int, alpha: float, seed: int, least: int = 10
) -> list[np.ndarray]:
    """The numbers of each client's examples: shares of every class from Dir(alpha), drawn until all have `least`."""
    if len(label) < clients * least:
        raise UserError(f"{len(label)} examples are too few for {clients} clients with {least} each")
    rng = np.random.Generator(np.random.PCG64([seed, clients]))
    for _ in range(1000):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for kind in np.unique(label):
            those = rng.permutation(np.flatnonzero(label == kind))
            # Of tiny concentrations NumPy makes 0 / 0: then all is one client's, as it nearly is anyway.
            share = np.nan_to_num(rng.dirichlet(np.full(clients, alpha)))
            ends = np.cumsum(share)[:-1] * len(those)
            for part, mine in zip(parts, np.split(those, ends.astype(int)), strict=True):
                part.append(mine)
        found = [np.sort(np.concatenate(part)) for part in parts]
        if min(map(len, found)) >= least:
            return found
    raise UserError(f"alpha {alpha} leaves some of {clients} clients with fewer than {least} examples: enlarge it")


def patterned_images(seed: int, count: int, *, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """(images (S, H, W, 1), classes (S,)): in noise of unit variance, 3 of 4x4 cells show the class's pattern, 0.7 to
    1.3 in strength. Patterns are rows of Hadamard's matrix: orthogonal, and of one colour nowhere."""
    if size % 4 or size < 16:
        raise UserError(f"the stand-in's images have a side that is a multiple of 4 from 16 on, not {size}")
    rng = np.random.Generator(np.random.PCG64(seed))
    cell = size // 4
    pixel, kind = np.arange(cell * cell), np.arange(1, 11)
    pattern = 1.0 - 2.0 * (np.bitwise_count(kind[:, None] & pixel) % 2)
    label = rng.integers(0, 10, count)
    place = rng.permuted(np.tile(np.arange(16), (count, 1)), axis=1)[:, :3]
    strength = np.zeros((count, 16))
    np.put_along_axis(strength, place, rng.uniform(0.7, 1.3, (count, 3)), axis=1)
    cells = strength[..., None] * pattern[label][:, None] + rng.normal(size=(count, 16, cell * cell))
    image = cells.reshape(count, 4, 4, cell, cell).swapaxes(2, 3).reshape(count, size, size, 1)
    return image.astype(np.float32), label.astype(np.int32)


def _read(name: str, data_dir: str | None, seed: int, image_size: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(images with mean 0 and deviation 1, classes) of training and test."""
    if name == "standin":
        if data_dir is not None:
            raise UserError("the stand-in is generated and takes no --data-dir; name a set with --data digits8x8")
        image, label = patterned_images(seed, 2400, size=image_size)
        return {"train": (image[:2000], label[:2000]), "test": (image[2000:], label[2000:])}
    return read_images(name, data_dir)


def load_federated(
    name: str, *, data_dir: str | None, image_size: int, channels: int, num_classes: int, seed: int = 0
) -> FederatedData:
    """The set of that name, its training part with ten clients."""
    known, _, alpha = name.partition("@")
    if known not in _SETS:
        raise UserError(f"no federated set is called {known!r}{closest(known, _SETS)}")
    try:
        concentration = float(alpha or 0.1)
    except ValueError:
        concentration = 0.0
    if not concentration > 0:
        raise UserError(f"{name}: what follows @ is the Dirichlet distribution's alpha, a positive number")
    parts = _read(known, data_dir, seed, image_size)
    image, label = parts["train"]
    check_sizes(known, image, label, image_size=image_size, channels=channels, num_classes=num_classes)
    held = np.arange(len(label)) % 10 == 9
    prior = jnp.asarray(class_prior(label[~held], num_classes))

    def split(image: np.ndarray, label: np.ndarray) -> ImageSplit:
        return ImageSplit(jnp.asarray(image), jnp.asarray(label), prior)

    mine = dirichlet_partition(label[~held], clients=CLIENTS, alpha=concentration, seed=seed)
    count = np.array([len(numbers) for numbers in mine], np.int32)
    members = np.stack([np.resize(numbers, count.max()) for numbers in mine]).astype(np.int32)
    train = ClientSplit(split(image[~held], label[~held]), jnp.asarray(members), jnp.asarray(count))
    return FederatedData(train, split(image[held], label[held]), split(*parts["test"]))
