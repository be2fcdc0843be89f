"""Dropout that goes on in evaluation: what a model answers is then another thing at every call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stabkit.diagnosis.finding import Finding, of_module
from stabkit.diagnosis.remedies.held_out import Dropping
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import evaluated
from stabkit.tracing.recording.training_pass import calling_line

_LEAST = 0.01  # of the size of the output, by which two passes must differ
_REFERENCE = "https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.dropout.html"


class _Watch(Dropping):
    """Notes the lines that drop something."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.lines: list[str] = []

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = len(self.dropped)
        out = super()._called(func, args, kwargs)
        if any(self.dropped[before:]):
            self.lines.append(calling_line())
        return out


def dropping_in_evaluation(run: TrainingRun) -> list[Finding]:
    """A finding where functions drop entries although every module is in evaluation."""
    watch = _Watch()
    one = evaluated(run.call, mode=lambda _: watch)
    if not watch.lines:
        return []
    other = evaluated(replace(run.call, seed=run.call.seed + 1))
    pairs = zip(named_tensors(one.output), named_tensors(other.output), strict=False)
    apart = [float((a - b).norm() / a.norm()) for (_, a), (_, b) in pairs if a.is_floating_point() and bool(a.any())]
    if not apart or not max(apart) > _LEAST:
        return []
    lines = ", ".join(dict.fromkeys(line for line in watch.lines if line))
    evidence = (
        f"dropout of {max(watch.dropped):.0%} goes on in evaluation ({lines}): functional.dropout drops unless it is "
        f"given training=False; two passes of the same input in eval mode differ by {max(apart):.0%} of the output"
    )
    remedy = "functional.dropout(x, p, training=self.training), or an nn.Dropout, which follows model.eval()"
    return [of_module(run.flow, "dropout", "warning", "", evidence, remedy, _REFERENCE, {"apart": max(apart)})]
