"""Daily exchange rates of eight currencies to the US dollar."""

from trainers.data.builders.series import SeriesBuilder


class Builder(SeriesBuilder):
    """TFDS builder `exchange_rate`."""
