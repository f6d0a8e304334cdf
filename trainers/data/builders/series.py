"""What the builders of multivariate series share: one example, the whole series of one file."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from trainers.data.catalogue import DATASETS
from trainers.data.csv_series import read_csv_series

__all__ = ["SPLIT", "SeriesBuilder"]

SPLIT = "series"  # the protocol's train/valid/test parts overlap by one look-back, so they are cut after loading


class SeriesBuilder(tfds.core.GeneratorBasedBuilder):
    """Reads the csv at `source`, or downloads the original. Splits and scaling are not its business."""

    VERSION = tfds.core.Version("1.0.0")
    SKIP_TF1_GRAPH = True

    def __init__(self, *, source: os.PathLike[str] | None = None, **kwargs: Any):
        self._source = source
        super().__init__(**kwargs)

    @property
    def dataset(self) -> str:
        """The zoo's name of the set."""
        config = f"/{self.builder_config.name}" if self.builder_config else ""
        return next(name for name, facts in DATASETS.items() if facts.builder == f"{self.name}{config}")

    def _info(self) -> tfds.core.DatasetInfo:
        facts = DATASETS[self.dataset]
        return tfds.core.DatasetInfo(
            builder=self,
            description=facts.description,
            homepage=facts.url,
            license=facts.licence,
            features=tfds.features.FeaturesDict(
                {
                    "values": tfds.features.Tensor(shape=(None, len(facts.columns)), dtype=np.float64),
                    # Seconds since 1970, no entries where the set has no dates.
                    "times": tfds.features.Tensor(shape=(None,), dtype=np.int64),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        source = self._source or dl_manager.download(DATASETS[self.dataset].url)
        return {SPLIT: self._generate_examples(source)}

    def _generate_examples(self, source: os.PathLike[str]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        raw = read_csv_series(source, DATASETS[self.dataset])
        yield 0, {"values": raw.values, "times": raw.times.astype(np.int64)}
