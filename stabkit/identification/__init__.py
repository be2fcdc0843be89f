"""From a step's graph to the numerical method that it implements, with evidence."""

from stabkit.identification.method import Identification, identify

__all__ = ["Identification", "identify"]
