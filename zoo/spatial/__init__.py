"""Papers on space: points, poses, meshes and what moves them."""
