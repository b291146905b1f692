"""RULER, offline: see `run.run_ruler`."""
