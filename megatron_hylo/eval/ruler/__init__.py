"""RULER, offline: see `run.plan_ruler`."""
