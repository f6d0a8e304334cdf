"""Parsing a multivariate series from a csv, with errors that name the row and column at fault."""

import csv
from dataclasses import dataclass

import numpy as np

from trainers.data.catalogue import DatasetFacts
from zoo.errors import UserError

__all__ = ["RawSeries", "parse_csv_series"]


@dataclass(frozen=True)
class RawSeries:
    """`values` (T, N) as in the file, `times` (T,) as datetime64[s], empty where the set has no dates."""

    values: np.ndarray
    times: np.ndarray


def parse_csv_series(text: str, facts: DatasetFacts, path: str) -> RawSeries:
    """Checks everything a training run relies on: columns, numbers, gaps, and that time goes forward."""
    rows = [row for row in csv.reader(text.splitlines()) if row]
    expected = (["date"] if facts.dated else []) + list(facts.columns)
    first = 1
    if facts.header:
        header = [cell.strip() for cell in rows[0]] if rows else []
        _check_header(path, header, expected)
        order = [header.index(column) for column in expected]
        rows, first = rows[1:], 2
    else:
        order = list(range(len(expected)))
    if not rows:
        raise UserError(f"{path} holds no rows")

    values = np.empty((len(rows), len(facts.columns)), np.float64)
    times = []
    for i, row in enumerate(rows):
        line = i + first
        if len(row) != len(expected):
            raise UserError(f"{path}, line {line}: {len(row)} cells instead of {len(expected)}")
        cells = [row[j] for j in order]
        if facts.dated:
            times.append(_time(cells.pop(0), path, line))
        for j, cell in enumerate(cells):
            values[i, j] = _number(cell, path, line, facts.columns[j])
    stamps = np.asarray(times, "datetime64[s]")
    if (backward := np.flatnonzero(np.diff(stamps) <= np.timedelta64(0, "s"))).size:
        line = int(backward[0]) + first + 1
        raise UserError(f"{path}, line {line}: the date {stamps[backward[0] + 1]} does not come after the one before")
    return RawSeries(values, stamps)


def _check_header(path: str, header: list[str], expected: list[str]) -> None:
    if missing := [column for column in expected if column not in header]:
        raise UserError(f"{path} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(header)}")
    if extra := [column for column in header if column not in expected]:
        raise UserError(f"{path} has columns that the set does not have: {', '.join(map(repr, extra))}")
    if len(set(header)) != len(header):
        raise UserError(f"{path} has a column twice: {', '.join(header)}")


def _time(cell: str, path: str, line: int) -> np.datetime64:
    try:
        return np.datetime64(cell.strip().replace("/", "-").replace(" ", "T"), "s")
    except ValueError as error:
        raise UserError(f"{path}, line {line}: {cell!r} is not a date like 2016-07-01 00:00:00") from error


def _number(cell: str, path: str, line: int, column: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise UserError(f"{path}, line {line}, column {column!r}: {cell!r} is not a number; fill or remove such rows")
    return value
