"""TFDS builders of the sets in the catalogue, a module a family. No TensorFlow is needed."""
