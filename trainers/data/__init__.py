"""Data sets: where they come from, how they are split and scaled, and their place on the device."""

from trainers.data.catalogue import DATASETS, DatasetFacts
from trainers.data.forecasting import ForecastingData, WindowedSplit, load_forecasting

__all__ = ["DATASETS", "DatasetFacts", "ForecastingData", "WindowedSplit", "load_forecasting"]
