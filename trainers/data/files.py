"""The original files of a data set, found by name wherever they lie in a folder: plain, gzipped, in a zip or a tar."""

import csv
import gzip
import hashlib
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError

from zoo.errors import UserError

__all__ = ["Files", "unpack"]

_ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar")
_DAMAGED = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, UnicodeDecodeError)
csv.field_size_limit(1 << 28)  # source code and reports are longer than the 128 KiB a cell may have by default


@dataclass(frozen=True)
class _Entry:
    path: str  # as errors name it
    read: Callable[[], bytes]


class Files:
    """The files of a set. A name may have folders in front and wildcards, `train/*.npy`; `.gz` need not be given."""

    def __init__(self, entries: Mapping[str, _Entry], where: str):
        self._entries, self._where = dict(entries), where

    @classmethod
    def of_folder(cls, dataset: str, data_dir: str, wanted: tuple[str, ...]) -> "Files":
        """Those of the folder and below that match one of the names, and what archives of these names hold."""
        folder = epath.Path(data_dir).expanduser()
        if not folder.is_dir():
            raise UserError(f"--data-dir {data_dir} is not a folder: give the one that holds {wanted[0]}")
        found, parent = {}, folder.resolve().parent
        for path in sorted(_below(folder.resolve()), key=lambda p: p.name.endswith(".gz"), reverse=True):  # plain wins
            name = _plain(str(path.relative_to(parent)))
            if any(_matches(name, pattern) for pattern in wanted):
                found[name] = path
        if not found:
            names = ", ".join(n for w in wanted for n in ((w,) if w.endswith(_ARCHIVES) else (w, f"{w}.gz")))
            there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise UserError(f"--data-dir {data_dir} holds none of {names} (the files of {dataset}); it holds {there}")
        return cls(_index(found), f"--data-dir {data_dir}")

    @classmethod
    def of_downloads(cls, paths: Mapping[str, epath.Path]) -> "Files":
        """Downloaded files by their URL."""
        return cls(_index({_plain(url): path for url, path in paths.items()}), "the download")

    def fingerprint(self) -> str:
        """Changes with the name or content of any file."""
        digest = hashlib.sha256()
        for name in sorted(self._entries):
            digest.update(f"{name}\0".encode() + hashlib.sha256(self.read(name)).digest())
        return digest.hexdigest()[:16]

    def has(self, pattern: str) -> bool:
        return any(_matches(name, pattern) for name in self._entries)

    def all(self, pattern: str) -> list[str]:
        """Every file of that name, in natural order (2 before 10)."""
        names = [name for name in self._entries if _matches(name, pattern)]
        if not names:
            there = ", ".join(sorted(name.rsplit("/", 1)[-1] for name in self._entries)[:8])
            raise UserError(f"{self._where} holds no {pattern}; it holds {there}")
        return sorted(names, key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)])

    def path(self, name: str) -> str:
        return self._one(name).path

    def read(self, name: str) -> bytes:
        """Its bytes, unpacked."""
        entry = self._one(name)
        try:
            return unpack(entry.read())
        except _DAMAGED as error:
            raise UserError(f"{entry.path} is damaged, it cannot be unpacked ({error}): fetch it again") from error

    def text(self, name: str, encoding: str = "utf-8-sig") -> str:
        try:
            return self.read(name).decode(encoding)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path(name)} is not text in {encoding} ({error}): fetch it again") from error

    def lines(self, name: str, encoding: str = "utf-8-sig") -> list[str]:
        """The lines that are not blank; only a line feed ends one."""
        return [line.rstrip("\r") for line in self.text(name, encoding).split("\n") if line.strip()]

    def table(self, name: str, columns: tuple[str, ...] = (), *, delimiter: str = ",") -> list[dict[str, str]]:
        """The rows of a csv with a header that has these columns, among others."""
        rows = [row for row in csv.reader(io.StringIO(self.text(name), newline=""), delimiter=delimiter) if row]
        header = [cell.strip() for cell in rows[0]] if rows else []
        if missing := [column for column in columns if column not in header]:
            raise UserError(
                f"{self.path(name)} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(header)}"
            )
        for i, row in enumerate(rows[1:], 1):
            if len(row) != len(header):
                raise UserError(f"{self.path(name)}, row {i}: {len(row)} cells instead of {len(header)}")
        return [dict(zip(header, row, strict=True)) for row in rows[1:]]

    def numbers(
        self, name: str, dtype: type = np.float64, *, columns: int | None = None, delimiter: str | None = None
    ) -> np.ndarray:
        """(rows, columns) of a file that holds nothing but numbers."""
        try:
            found = np.loadtxt(self.lines(name), dtype, delimiter=delimiter, ndmin=2)
        except ValueError as error:
            raise UserError(f"{self.path(name)} is malformed: {' '.join(str(error).split())}") from error
        if columns not in (None, found.shape[1]):
            raise UserError(f"{self.path(name)} has {found.shape[1]} columns instead of {columns}")
        return found

    def array(self, name: str) -> np.ndarray:
        """An .npy file."""
        return self._load(name, lambda raw: np.load(raw, allow_pickle=False))

    def arrays(self, name: str, keys: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
        """An .npz file that has these arrays, among others."""
        found = self._load(name, lambda raw: dict(np.load(raw, allow_pickle=False)))
        if missing := [key for key in keys if key not in found]:
            raise UserError(f"{self.path(name)} has no array {', '.join(missing)}; it has {', '.join(found)}")
        return found

    def image(self, name: str, mode: str | None = None) -> np.ndarray:
        """The pixels, (H, W) or (H, W, 3), converted to a mode of Pillow such as RGB or L."""
        raw = self.read(name)
        try:
            picture = Image.open(io.BytesIO(raw))
            return np.asarray(picture.convert(mode) if mode else picture)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:  # what Pillow raises
            raise UserError(f"{self.path(name)} is not a readable picture ({error}): fetch it again") from error

    def _load(self, name: str, load: Callable[[io.BytesIO], object]):
        raw = self.read(name)
        try:
            return load(io.BytesIO(raw))
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path(name)} is not a readable numpy file ({error}): fetch it again") from error

    def _one(self, name: str) -> _Entry:
        names = [name] if name in self._entries else self.all(name)
        if len(names) > 1:
            raise UserError(f"{self._where} holds {name} more than once: {', '.join(names[:3])}")
        return self._entries[names[0]]


def unpack(raw: bytes) -> bytes:
    """What a gzip file holds, any other as it is."""
    return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw


def _below(folder: epath.Path, depth: int = 6) -> Iterator[epath.Path]:
    """The files of a folder and its folders; epath refuses a recursive glob, for the sake of buckets."""
    for path in folder.iterdir():
        if not path.is_dir():
            yield path
        elif depth:
            yield from _below(path, depth - 1)


def _plain(name: str) -> str:
    return name if name.endswith(_ARCHIVES) else name.removesuffix(".gz")


def _matches(name: str, pattern: str) -> bool:
    wanted = pattern.split("/")
    parts = name.split("/")[-len(wanted) :]
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _index(paths: Mapping[str, epath.Path]) -> dict[str, _Entry]:
    entries = {}
    for name, path in paths.items():
        if name.endswith(_ARCHIVES):
            entries |= {f"{name}/{member}": entry for member, entry in _members(path)}
        else:
            entries[name] = _Entry(str(path), path.read_bytes)
    return entries


def _members(path: epath.Path) -> Iterator[tuple[str, _Entry]]:
    raw = path.read_bytes()
    try:
        if zipfile.is_zipfile(io.BytesIO(raw)):
            archive = zipfile.ZipFile(io.BytesIO(raw))
            for member in archive.namelist():
                if not member.endswith("/"):
                    yield _plain(member), _Entry(f"{path}: {member}", lambda member=member: archive.read(member))
        else:
            # Read at once: reaching into the middle of a compressed tar means unpacking all before it.
            with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
                for member in archive:
                    if member.isfile():
                        content = archive.extractfile(member).read()
                        yield _plain(member.name), _Entry(f"{path}: {member.name}", lambda content=content: content)
    except _DAMAGED as error:
        raise UserError(f"{path} is damaged, it cannot be unpacked ({error}): fetch it again") from error
