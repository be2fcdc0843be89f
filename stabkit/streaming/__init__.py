"""Models larger than memory: the weights of one block at a time."""

from __future__ import annotations

from stabkit.streaming.profile import Method, StreamedProfile
from stabkit.streaming.walk import analyze_files

__all__ = ["Method", "StreamedProfile", "analyze_files"]
