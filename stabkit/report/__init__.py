"""The result of an analysis as pure data: schema, JSON, tables and files; knows no torch."""

from __future__ import annotations

from stabkit.report.report import Report
from stabkit.report.schema import Exponents, StepReport
from stabkit.report.training import TrainingReport

__all__ = ["Exponents", "Report", "StepReport", "TrainingReport"]
