"""Unmodified models, traced: the zoo."""
