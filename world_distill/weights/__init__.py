"""Weights in and out: published models, LoRA files, conversion, export and verification."""
