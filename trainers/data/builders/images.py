"""Pictures, and point clouds."""

import io
import re
from collections.abc import Iterable

import numpy as np
import scipy.io
import tensorflow_datasets as tfds

from trainers.data.builders.base import Example, Reader, array, text
from trainers.data.files import Files
from zoo.errors import UserError

__all__ = []


def _classes(count: int) -> tfds.features.ClassLabel:
    return tfds.features.ClassLabel(num_classes=count)


class Mnist(Reader, skip_registration=True):
    def features(self):
        return {"image": array(np.uint8, 28, 28, 1), "label": _classes(10)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {split: self._cases(files, part) for split, part in (("train", "train"), ("test", "t10k"))}

    @staticmethod
    def _cases(files: Files, part: str) -> Iterable[Example]:
        images = _idx(files, f"{part}-images*-idx3-ubyte", 3)
        labels = _idx(files, f"{part}-labels*-idx1-ubyte", 1)
        if len(images) != len(labels) or images.shape[1:] != (28, 28) or labels.max() > 9:
            raise UserError(
                f"{files.path(f'{part}-images*-idx3-ubyte')}: images {images.shape} do not fit labels {labels.shape}"
            )
        return ({"image": image[..., None], "label": label} for image, label in zip(images, labels, strict=True))


def _idx(files: Files, name: str, axes: int) -> np.ndarray:
    """IDX: two zeros, the type (8: uint8), the number of axes, their big-endian sizes, then the data."""
    raw = files.read(name)
    shape = tuple(np.frombuffer(raw[4 : 4 + 4 * axes], ">u4").tolist())
    if raw[:4] != bytes([0, 0, 8, axes]) or len(raw) != 4 + 4 * axes + int(np.prod(shape)):
        raise UserError(f"{files.path(name)} is not an idx file of {axes} axes, or is cut off: fetch it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


class Digits8x8(Reader, skip_registration=True):
    def features(self):
        return {"image": array(np.uint8, 8, 8, 1), "label": _classes(10)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        name = "digits.csv" if files.has("digits.csv") else "optdigits.tes"
        rows = files.numbers(name, delimiter=",", columns=65)
        if rows.min() < 0 or rows[:, :64].max() > 16 or rows[:, 64].max() > 9:
            raise UserError(f"{files.path(name)}: pixels must be 0 to 16 and labels 0 to 9")
        images = rows[:, :64].astype(np.uint8).reshape(-1, 8, 8, 1)
        return {"digits": ({"image": x, "label": int(y)} for x, y in zip(images, rows[:, 64], strict=True))}


class SignMnistFragment(Reader, skip_registration=True):
    def features(self):
        return {"image": array(np.uint8, 28, 28, 1), "label": _classes(25)}  # 9 never occurs

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {part: self._rows(files, f"sign_mnist_{part}.csv") for part in ("train", "test")}

    @staticmethod
    def _rows(files: Files, name: str) -> Iterable[Example]:
        for i, line in enumerate(files.lines(name), 1):
            if i == 1 and line.startswith("label"):
                continue
            try:
                label, *pixels = map(int, line.split(","))
                image = np.array(pixels, np.uint8).reshape(28, 28, 1)
            except (ValueError, OverflowError) as error:
                raise UserError(f"{files.path(name)}, line {i}: not a label and 784 grey values ({error})") from error
            if not 0 <= label <= 24:
                raise UserError(f"{files.path(name)}, line {i}: the label {label} is not 0 to 24")
            yield {"image": image, "label": label}


class Cifar10Sample(Reader, skip_registration=True):
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def features(self):
        return {"image": array(np.uint8, 32, 32, 3), "label": tfds.features.ClassLabel(names=self.names)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        if files.has("test_batch.bin"):
            return {"train": self._binary(files, "data_batch_*.bin"), "test": self._binary(files, "test_batch.bin")}
        return {part: self._jpeg(files, part) for part in ("train", "test")}

    @staticmethod
    def _binary(files: Files, pattern: str) -> Iterable[Example]:
        for name in files.all(pattern):
            raw = np.frombuffer(files.read(name), np.uint8)
            if raw.size % 3073 or raw.reshape(-1, 3073)[:, 0].max() > 9:
                raise UserError(f"{files.path(name)} does not consist of labels 0 to 9 and 3,072 pixel values each")
            for case in raw.reshape(-1, 3073):
                yield {"image": case[1:].reshape(3, 32, 32).transpose(1, 2, 0), "label": case[0]}

    def _jpeg(self, files: Files, part: str) -> Iterable[Example]:
        for label, name in enumerate(self.names):
            for file in files.all(f"{part}/{name}/*.jpg"):
                yield {"image": files.image(file, "RGB"), "label": label}


class ChaseDb1(Reader, skip_registration=True):
    def features(self):
        vessels = {observer: array(np.bool_, None, None) for observer in ("vessels", "second_observer")}
        return {"name": text(), "image": array(np.uint8, None, None, 3), **vessels}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        names = files.all("Image_*.jpg")
        if len(names) != 28:
            raise UserError(f"{files.path(names[0])} is one of {len(names)} photographs; the split needs all 28")
        return {"train": self._cases(files, names[:20]), "test": self._cases(files, names[20:])}

    @staticmethod
    def _cases(files: Files, names: list[str]) -> Iterable[Example]:
        for name in names:
            stem = name.removesuffix(".jpg")
            image = files.image(name, "RGB")
            first, second = (files.image(f"{stem}_{observer}HO.png", "L") > 127 for observer in ("1st", "2nd"))
            if not first.shape == second.shape == image.shape[:2]:
                raise UserError(f"{files.path(name)} is {image.shape[:2]}, its drawings {first.shape}, {second.shape}")
            yield {"name": stem.rsplit("/", 1)[-1], "image": image, "vessels": first, "second_observer": second}


class ShanghaiTech(Reader, skip_registration=True):
    def features(self):
        return {"name": text(), "image": array(np.uint8, None, None, 3), "points": array(np.float32, None, 2)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {part: self._cases(files, f"{self.config}*/{part}_data") for part in ("train", "test")}

    @staticmethod
    def _cases(files: Files, folder: str) -> Iterable[Example]:
        for name in files.all(f"{folder}/images/IMG_*.jpg"):
            stem = name.rsplit("/", 1)[-1].removesuffix(".jpg")
            truth = f"{folder}/ground*truth/GT_{stem}.mat"
            raw = io.BytesIO(files.read(truth))
            try:
                # A structure in a cell: where the heads are, and their number.
                points = np.asarray(scipy.io.loadmat(raw)["image_info"][0, 0][0, 0][0], np.float32).reshape(-1, 2)
            except (LookupError, TypeError, ValueError, NotImplementedError, scipy.io.matlab.MatReadError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{files.path(truth)} holds no points of heads ({reason}): fetch it again") from error
            yield {"name": stem, "image": files.image(name, "RGB"), "points": points}


class Set11(Reader, skip_registration=True):
    def features(self):
        return {"name": text(), "image": array(np.uint8, None, None)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {
            "test": (
                {"name": name.rsplit("/", 1)[-1].removesuffix(".tif"), "image": files.image(name, "L")}
                for name in files.all("*.tif")
            )
        }


class DepthSr(Reader, skip_registration=True):
    """A pair an example; depth is as in the file: 8 bit, or millimetres (RGBDD)."""

    def features(self):
        return {"name": text(), "color": array(np.uint8, None, None, 3), "depth": array(np.uint16, None, None)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {"pairs": self._pairs(files)}

    def _pairs(self, files: Files) -> Iterable[Example]:
        colors = {_stamp(name): name for name in files.all(f"{self.config}/RGB/*")}
        for name in files.all(f"{self.config}/Depth/*.png"):
            if _stamp(name) not in colors:
                raise UserError(f"{files.path(name)} has no colour image of the same number beside it, in RGB")
            color, depth = files.image(colors[_stamp(name)], "RGB"), files.image(name)
            if depth.ndim != 2 or depth.shape != color.shape[:2]:
                raise UserError(f"{files.path(name)} is {depth.shape}, its colour image {color.shape}")
            yield {"name": _stamp(name), "color": color, "depth": depth.astype(np.uint16)}


def _stamp(name: str) -> str:
    """Number or time in a file's name, by which the files of a pair belong together."""
    found = re.search(r"\d+", name.rsplit("/", 1)[-1])
    return found[0] if found else name


class PcnDemoClouds(Reader, skip_registration=True):
    def features(self):
        return {"name": text(), "points": array(np.float32, None, 3)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {"clouds": self._clouds(files)}

    @staticmethod
    def _clouds(files: Files) -> Iterable[Example]:
        for name in files.all("*.pcd"):
            lines = files.lines(name)
            header = dict(line.split(" ", 1) for line in lines[:11] if " " in line)
            if header.get("FIELDS") != "x y z" or header.get("DATA") != "ascii":
                raise UserError(f"{files.path(name)} is not an ascii point cloud with the fields x y z")
            first = next(i for i, line in enumerate(lines) if line.startswith("DATA")) + 1
            try:
                points = np.array([line.split() for line in lines[first:]], np.float32)
            except ValueError as error:
                raise UserError(f"{files.path(name)} is malformed: {error}") from error
            if points.shape != (int(header["POINTS"]), 3):
                raise UserError(
                    f"{files.path(name)} holds points {points.shape} instead of {header['POINTS']}: cut off?"
                )
            yield {"name": name.rsplit("/", 1)[-1].removesuffix(".pcd"), "points": points}
