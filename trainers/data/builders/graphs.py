"""Graphs: systems whose causal graph is known, graphs to be classified, knowledge graphs, circuits on devices."""

import re
from collections.abc import Iterable

import numpy as np

from trainers.data.builders.base import Example, Reader, array, scalar, text, texts
from trainers.data.files import Files
from zoo.errors import UserError

__all__ = []


class _Systems(Reader, skip_registration=True):
    """A system an example: (T, N) series and its graph, row = target, column = source."""

    def features(self):
        return {"name": text(), "series": array(np.float64, None, None), "graph": array(np.float64, None, None)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {"systems": self._systems(files)}

    def _systems(self, files: Files) -> Iterable[Example]:
        for name in files.all("*.npz"):
            found = files.arrays(name, ("X_np", "Gref"))
            yield _system(files, name, found["X_np"].T, found["Gref"])


def _system(files: Files, name: str, series: np.ndarray, graph: np.ndarray) -> Example:
    if series.ndim != 2 or graph.shape != (series.shape[1],) * 2:
        raise UserError(f"{files.path(name)}: a graph of shape {graph.shape} does not fit series of {series.shape}")
    key = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return {"name": key, "series": series.astype(np.float64), "graph": graph.astype(np.float64)}


class Lorenz96(_Systems, skip_registration=True): ...


class Var(_Systems, skip_registration=True): ...


class Netsim(_Systems, skip_registration=True): ...


class CausalAirQuality(_Systems, skip_registration=True):
    def _systems(self, files: Files) -> Iterable[Example]:
        yield _system(files, "data.npy", files.array("data.npy"), files.array("graph.npy")) | {"name": "air_quality"}


class Dream3(_Systems, skip_registration=True):
    def _systems(self, files: Files) -> Iterable[Example]:
        genes, net = re.fullmatch(r"Size(\d+)(\w+)", self.config).groups()
        network, packed = f"InSilicoSize{genes}-{net}.tsv", f"{self.config}.npz"
        graph = np.zeros((int(genes),) * 2)
        for line in files.lines(network):
            if not (match := re.fullmatch(r"G(\d+)\tG(\d+)\t\S+", line.strip())) or max(
                int(match[1]), int(match[2])
            ) > len(graph):
                raise UserError(f"{files.path(network)}: {line!r} is not an edge, G<source> G<target> <sign>")
            graph[int(match[2]) - 1, int(match[1]) - 1] = 1
        if files.has(packed):
            series = files.arrays(packed, ("TsData",))["TsData"]
        else:
            packed = f"InSilicoSize{genes}-{net}-trajectories.tsv"
            rows = files.lines(packed)[1:]
            try:
                series = np.array([row.split()[1:] for row in rows], np.float64)  # without the time
            except ValueError as error:
                raise UserError(f"{files.path(packed)} is malformed: {error}") from error
        yield _system(files, packed, series, graph) | {"name": self.config}


class TuGraphs(Reader, skip_registration=True):
    """A graph an example. Every undirected edge appears in both directions.

    `test_fold` is 0 to 9, or -1 for the few graphs that the original folds always train on (8 of MUTAG, 4 of PTC).
    """

    def features(self):
        return {
            "label": scalar(np.int64),
            "tags": array(np.int32, None),
            "senders": array(np.int32, None),
            "receivers": array(np.int32, None),
            "test_fold": scalar(np.int32),
        }

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {"graphs": self._graphs(files)}

    def _graphs(self, files: Files) -> Iterable[Example]:
        name, folder = f"{self.config}.txt", f"{self.config}/10fold_idx"
        tested = [files.numbers(f"{folder}/test_idx-{k}.txt", np.int64, columns=1)[:, 0] for k in range(1, 11)]
        lines = files.lines(name)
        try:
            (count,), *rows_of_all = ([int(cell) for cell in line.split()] for line in lines)
            fold = np.full(count, -1)
            for k, graphs in enumerate(tested):
                fold[graphs] = k
        except (ValueError, IndexError) as error:
            raise UserError(f"{files.path(name)} or a file of its folds is malformed: {error}") from error
        position = 0
        for i in range(count):
            head = rows_of_all[position] if position < len(rows_of_all) else []
            rows = rows_of_all[position + 1 : position + 1 + head[0]] if len(head) == 2 else None
            if rows is None or len(rows) != head[0] or any(len(row) < 2 or len(row) != 2 + row[1] for row in rows):
                raise UserError(f"{files.path(name)}: graph {i} does not have the nodes or neighbours it states")
            position += 1 + len(rows)
            yield {
                "label": head[1],
                "tags": np.array([row[0] for row in rows], np.int32),
                "senders": np.array([j for j, row in enumerate(rows) for _ in row[2:]], np.int32),
                "receivers": np.array([k for row in rows for k in row[2:]], np.int32),
                "test_fold": fold[i],
            }


class BetaKg(Reader, skip_registration=True):
    """One example: triples are head, relation, tail, first and last year (0: no time, negative: before our era)."""

    def features(self):
        return {
            "triples_1": array(np.int32, None, 5),
            "triples_2": array(np.int32, None, 5),
            "seed_pairs": array(np.int32, None, 2),
            "test_pairs": array(np.int32, None, 2),
            "relations_1": texts(),
            "relations_2": texts(),  # the first has the number after the last of graph 1
        }

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        example = {f"triples_{k}": files.numbers(f"triples_{k}c", np.int32, columns=5) for k in (1, 2)}
        for key, name in (("seed_pairs", "sup_pairs"), ("test_pairs", "ref_pairs")):
            example[key] = files.numbers(name, np.int32, columns=2)
        for k in (1, 2):
            names = [line.split("\t", 1) for line in files.lines(f"rel_ids_{k}")]
            if any(len(pair) != 2 for pair in names):
                raise UserError(f"{files.path(f'rel_ids_{k}')}: a line is not number<TAB>relation")
            example[f"relations_{k}"] = np.array([relation for _, relation in names], object)
        return {"graphs": [example]}


class Queko(Reader, skip_registration=True):
    """A circuit an example: gates in order, (qubit, -1) or (control, target); placement[i]: physical qubit of i."""

    def features(self):
        return {
            "name": text(),
            "qubits": scalar(np.int32),
            "depth": scalar(np.int32),  # optimal
            "gates": array(np.int32, None, 2),
            "placement": array(np.int32, None),
        }

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {"circuits": self._circuits(files)}

    @staticmethod
    def _circuits(files: Files) -> Iterable[Example]:
        for name in files.all("*.qasm"):
            key = name.rsplit("/", 1)[-1].removesuffix(".qasm")
            qubits, gates = None, []
            for line in files.lines(name):
                if match := re.fullmatch(r"\s*qreg q\[(\d+)\];\s*", line):
                    qubits = int(match[1])
                elif match := re.fullmatch(r"\s*x q\[(\d+)\];\s*", line):
                    gates.append((int(match[1]), -1))
                elif match := re.fullmatch(r"\s*cx q\[(\d+)\],\s*q\[(\d+)\];\s*", line):
                    gates.append((int(match[1]), int(match[2])))
                elif not re.match(r"\s*(OPENQASM|include|//)", line):
                    raise UserError(f"{files.path(name)}: {line!r} is neither an x nor a cx gate")
            if qubits is None or not gates or (depth := re.search(r"_(\d+)CYC_", key)) is None:
                raise UserError(f"{files.path(name)} has no qreg, no gates, or no depth (05CYC) in its name")
            placement = files.numbers(f"meta/{key}_solution.csv", np.int32, columns=1)[:, 0]
            yield dict(
                name=key, qubits=qubits, depth=int(depth[1]), gates=np.array(gates, np.int32), placement=placement
            )
