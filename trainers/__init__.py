"""One trainer for all papers: recipes, data, mesh, checkpoints and the command line."""
