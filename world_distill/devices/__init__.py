"""Meshes, processes, compilation, and the time that devices take."""
