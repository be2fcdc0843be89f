"""The result of an analysis as pure data: schema, JSON, tables and files; knows no torch."""

from __future__ import annotations

from stabkit.report.schema import Exponents, Report, StepReport

__all__ = ["Exponents", "Report", "StepReport"]
