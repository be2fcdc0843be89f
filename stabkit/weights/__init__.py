"""What weights say without their architecture: the weaker statement, matrix by matrix."""

from __future__ import annotations

from stabkit.weights.matrices import MatrixReport
from stabkit.weights.report import WeightsReport, analyze_weights

__all__ = ["MatrixReport", "WeightsReport", "analyze_weights"]
