"""The analysis of a model: every step measured once, and what it means."""

from stabkit.analysis.analysis import analyze
from stabkit.analysis.progress import Listener, Progress

__all__ = ["Listener", "Progress", "analyze"]
