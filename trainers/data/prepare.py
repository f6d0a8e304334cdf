"""A data set by name: prepared once by its TFDS builder, then read at random, example by example."""

import contextlib
import importlib
import io
import logging
import os
import sys
import urllib.request
from typing import Any

from etils import epath

from trainers.data.catalogue import DATASETS, find_dataset
from trainers.data.files import Files
from zoo.errors import UserError

__all__ = ["load_dataset"]


def load_dataset(name: str, data_dir: str | None = None) -> dict[str, Any]:
    """The splits of a set (`mnist`) or of a collection's member (`ucr/GunPoint`), each a TFDS data source.

    A data source has a length and gives examples by number, texts as bytes: what `stream.batches` takes. With
    `data_dir` the original files are read from there and their prepared copy is kept in a cache under their own
    fingerprint, so that an edited file is never mistaken for the old one and the folder itself may be read-only.
    """
    dataset, member = find_dataset(name)
    facts = DATASETS[dataset]
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"{name} needs tensorflow-datasets: pip install tensorflow-datasets ({error})") from error

    module, _, builder_name = facts.builder.partition(".")
    builder_class = getattr(importlib.import_module(f"trainers.data.builders.{module}"), builder_name)
    options: dict[str, Any] = {"config": tfds.core.BuilderConfig(name=member)} if member else {}
    if data_dir is not None:
        source = Files.of_folder(name, data_dir, facts.files_of(member))
        options |= {"source": source, "data_dir": os.fspath(_cache() / "tfds" / source.fingerprint())}
    elif not facts.urls:
        raise UserError(f"{name} is not downloaded: fetch it from {facts.home} and give its folder with --data-dir")
    # TFDS talks on stdout, which belongs to results, and through absl of folders that are about to be filled.
    logging.getLogger("absl").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        builder = builder_class(dataset=dataset, file_format="array_record", **options)
        if not builder.is_prepared():
            if data_dir is None:
                _check_reachable(name, facts.urls_of(member)[0], facts.licence)
            tfds.disable_progress_bar()
            try:
                builder.download_and_prepare()
            except UserError:
                raise
            except Exception as error:  # TFDS and its downloader raise many kinds
                # Another process may have prepared the same set meanwhile: TFDS renames a finished folder into place.
                if not builder.is_prepared():
                    reason = " ".join(str(error).split())
                    if data_dir is not None:
                        raise UserError(f"{name} could not be prepared from {data_dir}: {reason}") from error
                    raise UserError(
                        f"{name} could not be downloaded from {facts.urls_of(member)[0]} ({reason}): fetch the files "
                        "by hand and give their folder with --data-dir"
                    ) from error
        # Read from the folder, not through the builder: its original files need not go along to Grain's workers.
        prepared = tfds.builder_from_directory(builder.data_dir)
        return {split: prepared.as_data_source(split=split) for split in prepared.info.splits}


def _check_reachable(name: str, url: str, licence: str) -> None:
    """Fails at once where TFDS's downloader would try for minutes."""
    print(f"downloading {name} from {url} (licence: {licence})", file=sys.stderr)
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20).close()
    except OSError as error:
        raise UserError(
            f"{name} cannot be downloaded from {url} ({getattr(error, 'reason', error)}): fetch the files by hand "
            "and give their folder with --data-dir"
        ) from error


def _cache() -> epath.Path:
    home = os.environ.get("ATTENTION_ZOO_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "attention_zoo"
    )
    return epath.Path(home)
