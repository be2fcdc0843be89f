"""The analysis of a model: every step measured once, and what it means."""

from stabkit.analysis.analysis import Progress, analyze

__all__ = ["Progress", "analyze"]
