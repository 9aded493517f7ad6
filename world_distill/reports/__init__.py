"""HTML pages of runs, ablations, records and the paper's table."""
