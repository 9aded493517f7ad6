"""The mathematics of self-distillation and RL: pure functions, no models, no sharding, no I/O."""
