"""Papers on language."""
