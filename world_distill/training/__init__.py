"""A training step and its parts: objective, rollouts, optimizer, and the folder of a run."""
