"""From a step's graph to the numerical method that it implements, with evidence."""

from stabkit.identification.evidence.continuous_limit import ContinuousLimit, continuous_limit
from stabkit.identification.method import by_step, identify, unidentified
from stabkit.identification.record import Identification

__all__ = ["ContinuousLimit", "Identification", "by_step", "continuous_limit", "identify", "unidentified"]
