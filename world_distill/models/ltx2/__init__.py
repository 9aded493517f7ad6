"""LTX-2 (2.0): video and audio from one transformer of two streams, or the video alone (arXiv 2601.03233)."""
