"""HTML pages of runs, ablations and records."""
