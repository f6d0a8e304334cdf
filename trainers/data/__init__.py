"""Data sets: where they come from, how they are split and scaled, and how they reach the device.

A forecasting series lies on the device as a whole (`load_forecasting`), as do all users' histories
(`load_recommendation`). Other sets, of any size, are read as a stream:

    split = load_dataset("mnist", data_dir="downloads/mnist")["train"]
    stream = Stream(batches(split, batch_size=256, seed=0), sharding=batch_sharding(mesh))
    for batch in stream: ...  # {"image": (256, 28, 28, 1), "label": (256,)} on the device
    position = stream.state()  # json, for the checkpoint; stream.restore(position) goes on exactly there

`packed_batches` makes rows of tokens from documents; `augment` holds jitted augmentations.
"""

from trainers.data.catalogue import DATASETS, DatasetFacts
from trainers.data.forecasting import ForecastingData, WindowedSplit, load_forecasting
from trainers.data.prepare import load_dataset
from trainers.data.recommendation import RecommendationData, load_recommendation
from trainers.data.stream import Stream, batches, packed_batches

__all__ = [
    "DATASETS",
    "DatasetFacts",
    "ForecastingData",
    "RecommendationData",
    "Stream",
    "WindowedSplit",
    "batches",
    "load_dataset",
    "load_forecasting",
    "load_recommendation",
    "packed_batches",
]
