"""Architectures that papers build on and that people hold weights for: see `zoo.backbones()`."""
