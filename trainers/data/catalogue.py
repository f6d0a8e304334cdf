"""The data sets by name, with what a user should know before downloading one."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["DATASETS", "DatasetFacts"]

_ETT_COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
_ETT_HOME = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/1d16c8f4f943005d613b5bc962e9eeb06058cf07/ETT-small"
_DAYS_PER_MONTH = 30  # the protocol's months


@dataclass(frozen=True)
class DatasetFacts:
    """A data set. `files` are the names it is looked for under in `--data-dir`, each also with `.gz` added."""

    task: str
    description: str
    licence: str
    url: str = ""
    files: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()  # without the date column; in the order of the original
    dated: bool = True
    header: bool = True
    frequency: Literal["hour", "quarter_hour", "day", "week"] = "hour"
    builder: str = ""  # the TFDS builder, as "name" or "name/config"
    split_rows: tuple[int, int, int] | None = None  # train, valid, test; None: 70/10/20 %


def _ett(name: str, station: int, *, minutes: int) -> DatasetFacts:
    per_month = _DAYS_PER_MONTH * 24 * (60 // minutes)
    return DatasetFacts(
        task="forecasting",
        description=f"electricity transformer {station}, load and oil temperature, a row each {minutes} minutes",
        licence="CC BY-ND 4.0",
        url=f"{_ETT_HOME}/{name}.csv",
        files=(f"{name}.csv",),
        columns=_ETT_COLUMNS,
        frequency="hour" if minutes == 60 else "quarter_hour",
        builder=f"ett/{name[3:]}",
        split_rows=(12 * per_month, 4 * per_month, 4 * per_month),
    )


DATASETS: dict[str, DatasetFacts] = {
    "standin": DatasetFacts(
        task="forecasting",
        description="generated: daily cycles, slow trends, noise, and lagged copies; 2,000 hours x 7",
        licence="none needed",
    ),
    "ett_h1": _ett("ETTh1", 1, minutes=60),
    "ett_h2": _ett("ETTh2", 2, minutes=60),
    "ett_m1": _ett("ETTm1", 1, minutes=15),
    "ett_m2": _ett("ETTm2", 2, minutes=15),
    "exchange_rate": DatasetFacts(
        task="forecasting",
        description="daily exchange rates of eight currencies to the US dollar, 1990-2016; no dates",
        licence="none stated",
        url="https://raw.githubusercontent.com/laiguokun/multivariate-time-series-data/"
        "7f402f185cc2435b5e66aed13a3b560ed142e023/exchange_rate/exchange_rate.txt.gz",
        files=("exchange_rate.txt",),
        columns=("Australia", "Britain", "Canada", "Switzerland", "China", "Japan", "New Zealand", "Singapore"),
        dated=False,
        header=False,
        frequency="day",
        builder="exchange_rate",
    ),
    "illness": DatasetFacts(
        task="forecasting",
        description="weekly share of patients with influenza-like illness in the United States, 2002-2020",
        licence="public domain (US CDC)",
        url="https://raw.githubusercontent.com/junwoopark92/Self-Supervised-Contrastive-Forecsating/"
        "f394705adbf5217811276f5e59576c6e7ea7586c/dataset/illness/national_illness.csv",
        files=("national_illness.csv",),
        columns=("% WEIGHTED ILI", "%UNWEIGHTED ILI", "AGE 0-4", "AGE 5-24", "ILITOTAL", "NUM. OF PROVIDERS", "OT"),
        frequency="week",
        builder="illness",
    ),
}
