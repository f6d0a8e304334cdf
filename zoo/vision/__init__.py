"""Papers on images and video."""
