"""Task families: the batch schema, loss and metrics that papers of one task share, so that they compare fairly."""
