"""LTX-2: video and audio from one transformer of two streams."""
