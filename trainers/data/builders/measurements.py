"""Measured series with labels: anomalies, illness, falls, motion, tracks, EEG, and the UCR and UEA archives."""

import ast
import re
from collections.abc import Iterable

import numpy as np

from trainers.data.builders.base import Example, Reader, array, scalar, text
from trainers.data.files import Files
from zoo.errors import UserError

__all__ = ["PARAMETERS"]


class SmapMsl(Reader, skip_registration=True):
    """A channel an example: training rows, test rows and which of these are anomalous. Column 0 is the telemetry."""

    def features(self):
        return {
            "channel": text(),
            "spacecraft": text(),
            "train": array(np.float64, None, None),
            "test": array(np.float64, None, None),
            "anomaly": array(np.bool_, None),
        }

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {"channels": self._channels(files)}

    def _channels(self, files: Files) -> Iterable[Example]:
        table = "labeled_anomalies*.csv"
        segments: dict[tuple[str, str], list] = {}  # a channel may have more than one row
        for row in files.table(table, ("chan_id", "spacecraft", "anomaly_sequences")):
            try:
                found = [(int(first), int(last)) for first, last in ast.literal_eval(row["anomaly_sequences"])]
            except (ValueError, SyntaxError, TypeError) as error:
                raise UserError(f"{files.path(table)}, {row['chan_id']}: no list of segments ({error})") from error
            segments.setdefault((row["chan_id"], row["spacecraft"]), []).extend(found)
        for (channel, spacecraft), found in segments.items():
            train, test = (files.array(f"{part}/{channel}.npy") for part in ("train", "test"))
            if train.ndim != 2 or train.shape[1:] != test.shape[1:]:
                raise UserError(f"{files.path(f'train/{channel}.npy')} has the shape {train.shape}, test {test.shape}")
            anomaly = np.zeros(len(test), bool)
            for first, last in found:  # both inclusive
                anomaly[first : last + 1] = True
            yield dict(channel=channel, spacecraft=spacecraft, train=train, test=test, anomaly=anomaly)


class Smd(Reader, skip_registration=True):
    """A machine an example. `explained` marks the metrics that the annotators held responsible, row by row."""

    columns = 38

    def features(self):
        return {
            "machine": text(),
            "train": array(np.float32, None, self.columns),
            "test": array(np.float32, None, self.columns),
            "anomaly": array(np.bool_, None),
            "explained": array(np.bool_, None, self.columns),
        }

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {"machines": self._machines(files)}

    def _machines(self, files: Files) -> Iterable[Example]:
        packed = files.has("machine-*.npz")
        for name in files.all("machine-*.npz" if packed else "train/machine-*.txt"):
            machine = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
            if packed:
                found = files.arrays(name, ("train", "test", "test_label"))
                train, test, label = found["train"], found["test"], found["test_label"]
                why = f"{machine}_interpretation.txt"
            else:
                train, test = (
                    files.numbers(f"{part}/{machine}.txt", np.float32, delimiter=",", columns=self.columns)
                    for part in ("train", "test")
                )
                label = files.numbers(f"test_label/{machine}.txt", columns=1)[:, 0]
                why = f"interpretation_label/{machine}.txt"
            if len(label) != len(test):
                raise UserError(f"{files.path(name)}: {machine} has {len(label)} labels for {len(test)} test rows")
            explained = np.zeros((len(test), self.columns), bool)
            for line in files.lines(why):
                if not (match := re.fullmatch(r"(\d+)-(\d+):([\d,]+)", line.strip())):
                    raise UserError(f"{files.path(why)}: {line!r} is not start-end:metric,metric,...")
                metrics = [int(metric) - 1 for metric in match[3].split(",") if metric]
                explained[int(match[1]) : int(match[2]), metrics] = True
            yield dict(machine=machine, train=train, test=test, anomaly=label.astype(bool), explained=explained)


PARAMETERS = (
    "RecordID", "Age", "Gender", "Height", "ICUType", "Weight", "Albumin", "ALP", "ALT", "AST", "Bilirubin", "BUN",
    "Cholesterol", "Creatinine", "DiasABP", "FiO2", "GCS", "Glucose", "HCO3", "HCT", "HR", "K", "Lactate", "Mg", "MAP",
    "MechVent", "Na", "NIDiasABP", "NIMAP", "NISysABP", "PaCO2", "PaO2", "pH", "Platelets", "RespRate", "SaO2",
    "SysABP", "Temp", "TroponinI", "TroponinT", "Urine", "WBC",
)  # fmt: skip


class Physionet2012(Reader, skip_registration=True):
    """A stay an example: minute, parameter (its number in PARAMETERS) and value of each line, -1 where unknown."""

    outcomes = ("SAPS-I", "SOFA", "Length_of_stay", "Survival", "In-hospital_death")

    def features(self):
        return {
            "record": scalar(np.int64),
            "minute": array(np.int32, None),
            "parameter": array(np.int32, None),
            "value": array(np.float32, None),
            **{_key(name): scalar(np.int64) for name in self.outcomes},
        }

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {"set_a": self._stays(files)}

    def _stays(self, files: Files) -> Iterable[Example]:
        table = "outcomes.csv" if files.has("outcomes.csv") else "Outcomes-a.txt"
        number = {name: i for i, name in enumerate(PARAMETERS)}
        for row in files.table(table, ("RecordID", *self.outcomes)):
            name = f"set-a/{row['RecordID']}.txt"
            lines = files.table(name, ("Time", "Parameter", "Value"))
            try:
                # A few lines of the original have no name.
                lines = [line for line in lines if line["Parameter"]]
                hours, minutes = np.array([line["Time"].split(":") for line in lines], np.int32).T
                yield {
                    "record": int(row["RecordID"]),
                    "minute": hours * 60 + minutes,
                    "parameter": np.array([number[line["Parameter"]] for line in lines], np.int32),
                    "value": np.array([line["Value"] for line in lines], np.float32),
                    **{_key(outcome): int(row[outcome]) for outcome in self.outcomes},
                }
            except (ValueError, KeyError) as error:
                raise UserError(f"{files.path(name)} is malformed: {error}") from error


def _key(name: str) -> str:
    return name.lower().replace("-", "_")


class WedaFall(Reader, skip_registration=True):
    """A trial an example: (n, 4) time in s and x, y, z, as recorded: time stamps are irregular, some go back."""

    def features(self):
        return {
            "activity": text(),  # D01-D11 daily life, F01-F08 falls
            "user": scalar(np.int32),
            "trial": scalar(np.int32),
            "accel": array(np.float32, None, 4),
            "gyro": array(np.float32, None, 4),
            "fall": array(np.float32, 2),  # start and end in s, NaN if there is none
        }

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        falls, table = {}, "fall_timestamps*.csv"
        for row in files.table(table, ("filename", "start_time", "end_time")):
            try:
                falls[row["filename"]] = [float(row["start_time"]), float(row["end_time"])]
            except ValueError as error:
                raise UserError(f"{files.path(table)}, {row['filename']}: {error}") from error
        trials = self._packed(files) if files.has("weda_fall_50hz.npz") else self._original(files)
        return {"trials": (self._with_fall(trial, falls) for trial in trials)}

    @staticmethod
    def _with_fall(trial: Example, falls: dict[str, list[float]]) -> Example:
        name = f"{trial['activity']}/U{trial['user']:02}_R{trial['trial']:02}"
        return trial | {"fall": np.array(falls.get(name, [np.nan, np.nan]), np.float32)}

    @staticmethod
    def _packed(files: Files) -> Iterable[Example]:
        name = "weda_fall_50hz.npz"
        keys = ("activity", "user", "trial", "accel", "gyro", "accel_offset", "gyro_offset")
        found = files.arrays(name, keys)
        for i, activity in enumerate(found["activity"]):
            signals = {s: found[s][slice(*found[f"{s}_offset"][i : i + 2])] for s in ("accel", "gyro")}
            yield {"activity": str(activity), "user": found["user"][i], "trial": found["trial"][i], **signals}

    @staticmethod
    def _original(files: Files) -> Iterable[Example]:
        for name in files.all("50Hz/*/U*_R*_accel.csv"):
            if not (match := re.search(r"([DF]\d\d)/U(\d+)_R(\d+)_accel\.csv$", name)):
                continue  # vertical_accel is derived
            signals = {}
            for signal in ("accel", "gyro"):
                columns = tuple(f"{signal}_{axis}_list" for axis in ("time", "x", "y", "z"))
                file = name.removesuffix("accel.csv") + f"{signal}.csv"
                try:
                    signals[signal] = np.array(
                        [[r[c] for c in columns] for r in files.table(file, columns)], np.float32
                    )
                except ValueError as error:
                    raise UserError(f"{files.path(file)} is malformed: {error}") from error
            yield {"activity": match[1], "user": int(match[2]), "trial": int(match[3]), **signals}


class CmuMocap(Reader, skip_registration=True):
    """Frames of root translation (3) and 38 joints x 3 angles."""

    columns = 117

    def features(self):
        return {"name": text(), "frames": array(np.float32, None, self.columns)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        action, packed = self.config, f"{self.config}.npz"
        if not files.has(packed):
            return {
                part: [
                    {
                        "name": name.rsplit("/", 1)[-1].removesuffix(".txt"),
                        "frames": files.numbers(name, np.float32, delimiter=",", columns=self.columns),
                    }
                    for name in files.all(f"{part}/{action}/{action}_*.txt")
                ]
                for part in ("train", "test")
            }
        found = files.arrays(packed)
        splits = {
            part: [
                {"name": key.partition("/")[2], "frames": frames}
                for key, frames in sorted(found.items())
                if key.startswith(f"{part}/")
            ]
            for part in ("train", "test")
        }
        if not all(splits.values()):
            raise UserError(
                f"{files.path(packed)} lacks train/{action}_k or test/{action}_k; it has {', '.join(found)}"
            )
        return splits


class EthUcy(Reader, skip_registration=True):
    """A recording an example, a row an observation: a frame is 0.04 s, ten lie between observations."""

    def features(self):
        return {
            "recording": text(),
            "frame": array(np.int32, None),
            "agent": array(np.int32, None),
            "position": array(np.float32, None, 2),
        }

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {"recordings": self._recordings(files)}

    @staticmethod
    def _recordings(files: Files) -> Iterable[Example]:
        for name in files.all("*.txt"):
            rows = files.numbers(name, columns=4)
            yield {
                "recording": name.rsplit("/", 1)[-1].removesuffix(".txt"),
                "frame": rows[:, 0].astype(np.int32),
                "agent": rows[:, 1].astype(np.int32),
                "position": rows[:, 2:].astype(np.float32),
            }


class Apava(Reader, skip_registration=True):
    """A subject an example: its windows (n, samples, electrodes), its class (1: Alzheimer's) and its number from 1."""

    def features(self):
        return {
            "windows": array(np.float32, None, None, None),
            "label": scalar(np.int32),
            "subject": scalar(np.int32),
        }

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {"subjects": self._subjects(files)}

    @staticmethod
    def _subjects(files: Files) -> Iterable[Example]:
        table = files.array("label.npy")
        names = files.all("feature_*.npy")
        if table.shape != (len(names), 2):
            raise UserError(f"{files.path('label.npy')} has the shape {table.shape} for {len(names)} subjects")
        for name, (label, subject) in zip(names, table, strict=True):
            windows = files.array(name)
            if windows.ndim != 3:
                raise UserError(f"{files.path(name)} has the shape {windows.shape}, not windows x samples x electrodes")
            yield {"windows": windows.astype(np.float32), "label": int(label), "subject": int(subject)}


class _Ts(Reader, skip_registration=True):
    """Cases of a .ts file: (length, dimensions) and the name of the class, as the file spells it."""

    def features(self):
        return {"series": array(np.float32, None, None), "label": text()}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {part: self._cases(files, f"{self.config}_{part.upper()}.ts") for part in ("train", "test")}

    @staticmethod
    def _cases(files: Files, name: str) -> Iterable[Example]:
        lines = [line for line in files.lines(name) if not line.startswith("#")]
        classes, dimensions, start = None, None, len(lines)
        for i, line in enumerate(lines):
            key, *values = line.lower().split()
            if key == "@classlabel":
                classes = line.split()[2:]
            elif key == "@dimensions":
                dimensions = int(values[0])
            elif key == "@data":
                start = i + 1
                break
        if not classes or start == len(lines):
            raise UserError(f"{files.path(name)} has no @classLabel line or nothing after @data: it is not a .ts file")
        for i, line in enumerate(lines[start:], 1):
            *channels, label = line.split(":")
            where = f"{files.path(name)}, case {i}"
            if label.strip() not in classes:
                raise UserError(f"{where}: the class {label.strip()!r} is not one of {', '.join(classes)}")
            try:
                series = np.array([[np.nan if x == "?" else float(x) for x in c.split(",")] for c in channels])
            except ValueError as error:
                raise UserError(f"{where}: {str(error).splitlines()[0]}") from error
            if dimensions not in (None, len(series)) or series.ndim != 2:
                raise UserError(f"{where}: {len(series)} dimensions instead of {dimensions or 1}")
            yield {"series": series.T.astype(np.float32), "label": label.strip()}


class Ucr(_Ts, skip_registration=True): ...


class Uea(_Ts, skip_registration=True): ...
