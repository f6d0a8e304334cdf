"""Papers on signals: of bodies, machines, radio, sound and detectors."""
