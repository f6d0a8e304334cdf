"""Weekly numbers of patients with influenza-like illness in the United States."""

from trainers.data.builders.series import SeriesBuilder


class Builder(SeriesBuilder):
    """TFDS builder `illness`."""
