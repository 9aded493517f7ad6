"""Records of tasks on disk: writing, encoding and reading them."""
