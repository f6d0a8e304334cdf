"""Papers on how models are trained and run, rather than on what they compute."""
