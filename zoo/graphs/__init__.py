"""Papers on graphs: patients, relational tables, knowledge graphs, molecules."""
