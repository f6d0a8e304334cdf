"""Tables: molecules, patients, ratings, a relational database."""

import json
from collections.abc import Iterable

import numpy as np

from trainers.data.builders.base import Example, Reader, array, scalar, text, texts
from trainers.data.files import Files
from zoo.errors import UserError

__all__ = []


class Moleculenet(Reader, skip_registration=True):
    """`targets` are, in this order: p_np; expt; exp; FDA_APPROVED and CT_TOX."""

    targets = {  # noqa: RUF012
        "BBBP": ("p_np",),
        "FreeSolv_SAMPL": ("expt",),
        "Lipophilicity": ("exp",),
        "clintox": ("FDA_APPROVED", "CT_TOX"),
    }

    def features(self):
        return {"smiles": text(), "targets": array(np.float32, len(self.targets[self.config])), "part": text()}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {"molecules": self._molecules(files)}

    def _molecules(self, files: Files) -> Iterable[Example]:
        name, split = f"{self.config}.csv", f"{self.config}_scaffold_split.npz"
        rows = files.table(name, ("smiles", *self.targets[self.config]))
        parts = np.full(len(rows), "", object)
        if files.has(split):
            for part, indices in files.arrays(split, ("train", "valid", "test")).items():
                if indices.size and indices.max() >= len(rows):
                    raise UserError(f"{files.path(split)} names row {indices.max()}, {name} has {len(rows)}")
                parts[indices] = part
        for i, (row, part) in enumerate(zip(rows, parts, strict=True), 1):
            try:
                targets = np.array([row[t] or "nan" for t in self.targets[self.config]], np.float32)
            except ValueError as error:
                raise UserError(f"{files.path(name)}, row {i}: {error}") from error
            yield {"smiles": row["smiles"], "targets": targets, "part": part}


class SmilesLogp(Reader, skip_registration=True):
    def features(self):
        return {"smiles": text(), "logp": scalar(np.float32)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {"molecules": self._molecules(files)}

    @staticmethod
    def _molecules(files: Files) -> Iterable[Example]:
        for i, row in enumerate(files.table("logP_labels.csv", ("SMILES", "Kow")), 1):
            try:
                yield {"smiles": row["SMILES"], "logp": float(row["Kow"])}
            except ValueError as error:
                raise UserError(f"{files.path('logP_labels.csv')}, row {i}: {error}") from error


class OvOmics(Reader, skip_registration=True):
    """A patient an example; `label` 1: died after three years or more. NaN throughout: not measured."""

    def features(self):
        return {
            "patient": text(),
            "mrna": array(np.float32, None),
            "mirna": array(np.float32, None),
            "label": scalar(np.int32),
        }

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        tables = {"mrna": _by_sample(files, f"{self.config}/mRNA.csv"), "mirna": _by_sample(files, "miRNA.csv")}
        parts = {"train": "train", "valid": "val", "test": "test"}
        return {split: self._patients(files, part, tables) for split, part in parts.items()}

    def _patients(self, files: Files, part: str, tables: dict[str, dict[str, np.ndarray]]) -> Iterable[Example]:
        absent = {key: np.full_like(next(iter(table.values())), np.nan) for key, table in tables.items()}
        for kind in ("paired", "unpaired"):
            name = f"{self.config}/label_{part}_{kind}.csv"
            for row in files.table(name, ("Class",)):
                patient, label = row.values()
                if label not in ("0", "1"):
                    raise UserError(f"{files.path(name)}, {patient}: the class {label!r} is not 0 or 1")
                if any(patient in table for table in tables.values()):
                    measured = {key: table.get(patient, absent[key]) for key, table in tables.items()}
                    yield {"patient": patient, "label": int(label), **measured}


def _by_sample(files: Files, name: str) -> dict[str, np.ndarray]:
    found = {}
    for sample, *cells in (row.values() for row in files.table(name, ("sample",))):
        try:
            found[sample] = np.array(cells, np.float32)
        except ValueError as error:
            raise UserError(f"{files.path(name)}, {sample}: {error}") from error
    if not found:
        raise UserError(f"{files.path(name)} holds no rows")
    return found


class Movielens100k(Reader, skip_registration=True):
    """users: what each rated, in the order of time (equal times: of film number). films: title and genres."""

    def features(self):
        if self.config == "films":
            return {"film": scalar(np.int32), "title": text(), "date": text(), "genres": array(np.bool_, 19)}
        ratings = {key: array(np.int64, None) for key in ("films", "ratings", "times")}
        return {"user": scalar(np.int32), "age": scalar(np.int32), "gender": text(), "occupation": text(), **ratings}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {self.config: self._films(files) if self.config == "films" else self._users(files)}

    @staticmethod
    def _films(files: Files) -> Iterable[Example]:
        for line in files.lines("u.item", "latin-1"):
            film, title, date, *rest = line.split("|")
            genres = rest[2:]
            if len(genres) != 19 or not set(genres) <= {"0", "1"}:
                raise UserError(f"{files.path('u.item')}: film {film} does not have 19 genres 0 or 1")
            yield {"film": int(film), "title": title, "date": date, "genres": np.array(genres) == "1"}

    @staticmethod
    def _users(files: Files) -> Iterable[Example]:
        ratings = files.numbers("u.data", np.int64, columns=4)
        ratings = ratings[np.lexsort((ratings[:, 1], ratings[:, 3], ratings[:, 0]))]
        for line in files.lines("u.user", "latin-1"):
            if line.count("|") != 4:
                raise UserError(f"{files.path('u.user')}: {line!r} is not id|age|gender|occupation|zip")
            user, age, gender, occupation, _ = line.split("|")
            own = ratings[ratings[:, 0] == int(user)]
            yield {
                "user": int(user),
                "age": int(age),
                "gender": gender,
                "occupation": occupation,
                "films": own[:, 1],
                "ratings": own[:, 2],
                "times": own[:, 3],
            }


class SequentialRec(Reader, skip_registration=True):
    """A user with items in the order of time, or (<set>_attributes) an item with its attributes; numbers from 1."""

    def features(self):
        one, many = ("item", "attributes") if self.config.endswith("_attributes") else ("user", "items")
        return {one: scalar(np.int32), many: array(np.int32, None)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        if self.config.endswith("_attributes"):
            return {"items": self._attributes(files, f"{self.config.removesuffix('_attributes')}_item2attributes.json")}
        return {"users": self._users(files, f"{self.config}.txt")}

    @staticmethod
    def _users(files: Files, name: str) -> Iterable[Example]:
        for i, line in enumerate(files.lines(name), 1):
            try:
                user, *items = map(int, line.split())
            except ValueError as error:
                raise UserError(f"{files.path(name)}, line {i}: {error}") from error
            yield {"user": user, "items": np.array(items, np.int32)}

    @staticmethod
    def _attributes(files: Files, name: str) -> Iterable[Example]:
        raw = files.text(name)
        try:
            for item, attributes in json.loads(raw).items():
                yield {"item": int(item), "attributes": np.array(attributes, np.int32)}
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{files.path(name)} is not a json object of item: [attributes] ({error})") from error


class F1Relational(Reader, skip_registration=True):
    """driver_position: the task's rows, days since 1970. tables: a table an example, cells row by row as text."""

    tables = (
        "circuits", "constructor_results", "constructor_standings", "constructors", "driver_standings", "drivers",
        "qualifying", "races", "results",
    )  # fmt: skip

    def features(self):
        if self.config == "tables":
            return {"name": text(), "columns": texts(), "cells": texts()}
        return {"day": scalar(np.int64), "driver": scalar(np.int32), "position": scalar(np.float32)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        if self.config == "tables":
            return {"tables": map(lambda name: self._table(files, name), self.tables)}
        parts = {"train": "train", "valid": "val", "test": "test"}
        return {split: self._task(files, f"driver_position_{part}.csv") for split, part in parts.items()}

    @staticmethod
    def _table(files: Files, name: str) -> Example:
        rows = files.table(f"{name}.csv")
        if not rows:
            raise UserError(f"{files.path(f'{name}.csv')} holds no rows")
        cells = np.array([cell for row in rows for cell in row.values()], object)
        return {"name": name, "columns": np.array([*rows[0]], object), "cells": cells}

    @staticmethod
    def _task(files: Files, name: str) -> Iterable[Example]:
        for i, row in enumerate(files.table(name, ("date", "driverId", "position")), 1):
            try:
                day = np.datetime64(row["date"][:10], "D").astype(np.int64)
                yield {"day": day, "driver": int(row["driverId"]), "position": float(row["position"])}
            except ValueError as error:
                raise UserError(f"{files.path(name)}, row {i}: {error}") from error
