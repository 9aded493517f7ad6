"""Scores of clips: the benchmark, a held-out judge, agreement between judges."""
