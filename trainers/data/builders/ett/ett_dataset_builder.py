"""ETT: load and oil temperature of two electricity transformers, hourly (h1, h2) and by quarter hour (m1, m2)."""

import tensorflow_datasets as tfds

from trainers.data.builders.series import SeriesBuilder


class Builder(SeriesBuilder):
    """TFDS builder `ett` with the configs h1, h2, m1, m2."""

    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("h1", "h2", "m1", "m2")]  # noqa: RUF012
