"""World Model Self-Distillation (WMSD, arXiv 2606.12072) in JAX/Flax for TPU pods and GPUs."""

__version__ = "0.1.0"
