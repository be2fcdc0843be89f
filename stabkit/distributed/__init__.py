"""The same analyses, shared out over the processes of a distributed program."""

from __future__ import annotations

from stabkit.distributed.profile import fingerprint, gradient_profile
from stabkit.distributed.ranks import RankError, Ranks, current, session
from stabkit.tracing.recording.sharding import is_spread, is_tensor_parallel, whole_parameters

__all__ = [
    "RankError",
    "Ranks",
    "current",
    "fingerprint",
    "gradient_profile",
    "is_spread",
    "is_tensor_parallel",
    "session",
    "whole_parameters",
]
