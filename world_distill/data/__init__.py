"""Tasks on disk: annotating scene images, encoding them for a model family, and reading them in training."""
