"""Papers on recommendation."""
