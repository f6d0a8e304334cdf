"""Papers on time series."""
