"""Faults of a whole stretch of blocks: growth and decay over depth, chaos, norms behind additions, fixed points."""
