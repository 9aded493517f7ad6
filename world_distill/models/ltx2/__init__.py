"""LTX-2 (HaCohen et al., arXiv 2601.03233)."""
