"""Papers on agents: where they go and what they decide."""
