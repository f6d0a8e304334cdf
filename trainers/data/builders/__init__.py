"""TFDS builders of the sets that TFDS lacks: one folder each, as TFDS wants it. No TensorFlow is needed."""
