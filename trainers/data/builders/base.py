"""What all builders share: facts from the catalogue, files from a folder or the original home, examples in order."""

import abc
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from trainers.data.catalogue import DATASETS
from trainers.data.files import Files
from zoo.errors import UserError

__all__ = ["Example", "Reader", "array", "scalar", "text", "texts"]

Example = dict[str, Any]


class Reader(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # TFDS has other sets of the same names
    """A builder says which `features` its examples have and how to `read` them from the original files, by split."""

    VERSION = tfds.core.Version("1.1.0")
    SKIP_TF1_GRAPH = True

    def __init__(self, *, dataset: str, source: Files | None = None, **kwargs: Any):
        self.dataset, self._source = dataset, source
        super().__init__(**kwargs)

    @abc.abstractmethod
    def features(self) -> dict[str, Any]: ...

    @abc.abstractmethod
    def read(self, files: Files) -> dict[str, Iterable[Example]]: ...

    @property
    def config(self) -> str:
        """The member of a collection, e.g. GunPoint."""
        return self.builder_config.name if self.builder_config else ""

    def _info(self) -> tfds.core.DatasetInfo:
        facts = DATASETS[self.dataset]
        return tfds.core.DatasetInfo(
            builder=self,
            description=facts.description,
            homepage=facts.home,
            license=facts.licence,
            citation=facts.citation,
            features=tfds.features.FeaturesDict(self.features()),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        files = self._source or self._downloaded(dl_manager)
        return {split: self._numbered(split, examples) for split, examples in self.read(files).items()}

    def _numbered(self, split: str, examples: Iterable[Example]) -> Iterable[tuple[int, Example]]:
        number = -1
        for number, example in enumerate(examples):
            yield number, example
        if number < 0:
            raise UserError(f"the files of {self.dataset} hold no {split}: are they empty?")

    def _downloaded(self, dl_manager: tfds.download.DownloadManager) -> Files:
        urls = DATASETS[self.dataset].urls_of(self.config)
        return Files.of_downloads({url: epath.Path(dl_manager.download(url)) for url in urls})

    def _generate_examples(self) -> None:
        """Unused: `read` gives the examples."""


def array(dtype: Any, *shape: int | None) -> tfds.features.Tensor:
    """Kept as bytes: TFDS stores other float64 as float32."""
    return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")


def scalar(dtype: Any) -> tfds.features.Scalar:
    return tfds.features.Scalar(dtype)


def text() -> tfds.features.Text:
    return tfds.features.Text()


def texts() -> tfds.features.Tensor:
    return tfds.features.Tensor(shape=(None,), dtype=np.str_)
