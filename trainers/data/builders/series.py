"""Series: the multivariate csv files of long-term forecasting, and series with gaps, prices or texts beside them."""

from collections.abc import Iterable

import numpy as np

from trainers.data.builders.base import Example, Reader, array, text, texts
from trainers.data.catalogue import DATASETS
from trainers.data.csv_series import parse_csv_series
from trainers.data.files import Files
from zoo.errors import UserError

__all__ = ["SPLIT"]

SPLIT = "series"  # the protocol's train/valid/test parts overlap by one look-back, so they are cut after loading


class _CsvSeries(Reader, skip_registration=True):
    """One example: the whole series of one csv file. Splits and scaling are not its business."""

    def features(self):
        columns = len(DATASETS[self.dataset].columns)
        # Times in seconds since 1970, no entries where the set has no dates.
        return {"values": array(np.float64, None, columns), "times": array(np.int64, None)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        facts = DATASETS[self.dataset]
        raw = parse_csv_series(files.text(facts.files[0]), facts, files.path(facts.files[0]))
        return {SPLIT: [{"values": raw.values, "times": raw.times.astype(np.int64)}]}


class EttH1(_CsvSeries, skip_registration=True): ...


class EttH2(_CsvSeries, skip_registration=True): ...


class EttM1(_CsvSeries, skip_registration=True): ...


class EttM2(_CsvSeries, skip_registration=True): ...


class ExchangeRate(_CsvSeries, skip_registration=True): ...


class Illness(_CsvSeries, skip_registration=True): ...


class M4Hourly(Reader, skip_registration=True):
    def features(self):
        return {"id": text(), "history": array(np.float64, None), "future": array(np.float64, 48)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        history, future = (_rows_by_id(files, f"Hourly-{part}.csv") for part in ("train", "test"))
        if set(history) != set(future):
            odd = sorted(set(history) ^ set(future))[0]
            raise UserError(f"series {odd} is in only one of {files.path('Hourly-train.csv')} and the test file")
        return {SPLIT: ({"id": key, "history": history[key], "future": future[key]} for key in history)}


def _rows_by_id(files: Files, name: str) -> dict[str, np.ndarray]:
    """Rows of an id and numbers, short ones filled with empty cells."""
    series = {}
    for key, *cells in (row.values() for row in files.table(name, ("V1",))):
        try:
            series[key] = np.array([float(cell) for cell in cells if cell])
        except ValueError as error:
            raise UserError(f"{files.path(name)}, series {key}: {error}") from error
    return series


class Airquality(Reader, skip_registration=True):
    columns = (
        "CO(GT)", "PT08.S1(CO)", "NMHC(GT)", "C6H6(GT)", "PT08.S2(NMHC)", "NOx(GT)", "PT08.S3(NOx)", "NO2(GT)",
        "PT08.S4(NO2)", "PT08.S5(O3)", "T", "RH", "AH",
    )  # fmt: skip

    def features(self):
        return {"values": array(np.float64, None, len(self.columns)), "times": array(np.int64, None)}

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        name = "AirQualityUCI.csv"
        # Some copies add commas at the end of each line, and all have lines without content at the end of the file.
        lines = [line.rstrip(",").rstrip(";").split(";") for line in files.lines(name)]
        rows = [line for line in lines if any(line)]
        if not rows or rows[0] != ["Date", "Time", *self.columns]:
            raise UserError(f"{files.path(name)} does not have the columns Date;Time;{';'.join(self.columns)}")
        values, times = [], []
        for i, (date, time, *cells) in enumerate(rows[1:], 2):
            try:
                values.append([float(cell.replace(",", ".")) for cell in cells])
                day, month, year = date.split("/")
                times.append(np.datetime64(f"{year}-{month}-{day}T{time.replace('.', ':')}", "s").astype(np.int64))
            except ValueError as error:
                raise UserError(f"{files.path(name)}, line {i}: {error}") from error
            if len(cells) != len(self.columns):
                raise UserError(f"{files.path(name)}, line {i}: {len(cells) + 2} cells instead of 15")
        values = np.array(values)
        return {SPLIT: [{"values": np.where(values == -200, np.nan, values), "times": np.array(times)}]}


class StockPrices(Reader, skip_registration=True):
    fields = ("Open", "High", "Low", "Close", "Adj Close")

    def features(self):
        return {
            "ticker": text(),
            "days": array(np.int64, None),  # since 1970-01-01
            "values": array(np.float32, None, len(self.fields)),
            "volume": array(np.int64, None),
        }

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        return {"companies": self._packed(files) if files.has("daily_prices.npz") else self._original(files)}

    def _packed(self, files: Files) -> Iterable[Example]:
        packed = files.arrays("daily_prices.npz", ("values", "volume", "dates", "tickers", "fields"))
        if tuple(packed["fields"]) != self.fields:
            raise UserError(f"{files.path('daily_prices.npz')} holds other fields than {', '.join(self.fields)}")
        for i, ticker in enumerate(packed["tickers"]):
            yield {
                "ticker": str(ticker),
                "days": packed["dates"].astype("datetime64[D]").astype(np.int64),
                "values": packed["values"][:, i].T,
                "volume": packed["volume"][i],
            }

    def _original(self, files: Files) -> Iterable[Example]:
        for name in files.all("raw/*.csv"):
            rows = files.table(name, ("Date", *self.fields, "Volume"))
            try:
                yield {
                    "ticker": name.rsplit("/", 1)[-1].removesuffix(".csv"),
                    "days": np.array([row["Date"] for row in rows], "datetime64[D]").astype(np.int64),
                    "values": np.array([[row[field] for field in self.fields] for row in rows], np.float32),
                    "volume": np.array([row["Volume"] for row in rows], np.int64),
                }
            except ValueError as error:
                raise UserError(f"{files.path(name)} is malformed: {error}") from error


class TimeMmd(Reader, skip_registration=True):
    """One example, in the order of time. A text may be used when it ends before the forecast starts."""

    def features(self):
        days = {f"{part}_{end}": array(np.int64, None) for part in self.parts for end in ("start", "end")}
        text_of = {f"{part}_{kind}": texts() for part in ("report", "search") for kind in ("fact", "preds")}
        return {"target": array(np.float64, None), **days, **text_of}

    parts = ("series", "report", "search")

    def read(self, files: Files) -> dict[str, Iterable[Example]]:
        example = {}
        for part in self.parts:
            name = f"{self.config}.csv" if part == "series" else f"{self.config}_{part}.csv"
            rows = files.table(name, ("start_date", "end_date", *(("OT",) if part == "series" else ("fact", "preds"))))
            try:
                start, end = (
                    np.array([row[f"{which}_date"][:10] for row in rows], "datetime64[D]").astype(np.int64)
                    for which in ("start", "end")
                )
                order = np.argsort(start, kind="stable")
                example |= {f"{part}_start": start[order], f"{part}_end": end[order]}
                if part == "series":
                    example["target"] = np.array([rows[i]["OT"] for i in order], np.float64)
                else:
                    example |= {
                        f"{part}_{kind}": np.array([rows[i][kind] for i in order], object) for kind in ("fact", "preds")
                    }
            except ValueError as error:
                raise UserError(f"{files.path(name)} is malformed: {error}") from error
        return {SPLIT: [example]}
