"""What is written to disk: checkpoints, weights, videos, logs."""
