"""Every family of networks that is read as an integrator, written as a user would, with what should be read.

``python -m tests.identification.families`` prints one row a family: the method found beside the one written, and the
largest difference of the characteristic polynomials of the two stability matrices at 100 random z.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stabkit.identification import Identification, identify
from stabkit.tracing import Flow, trace

from . import recurrent_models, residual_models, solver_models, stream_models, transformer_models
from .family import Family

POINTS = 100
FAMILIES: tuple[Family, ...] = (
    *residual_models.FAMILIES,
    *solver_models.FAMILIES,
    *stream_models.FAMILIES,
    *recurrent_models.FAMILIES,
    *transformer_models.FAMILIES,
)


@dataclass(frozen=True)
class Outcome:
    """What was found for a family.

    Attributes:
        family: the family.
        flow: the traced model.
        records: everything that was read.
        record: the step that the family is about.
        difference: of the characteristic polynomials at random z; None where no method was expected.
    """

    family: Family
    flow: Flow
    records: tuple[Identification, ...]
    record: Identification
    difference: float | None

    @property
    def right(self) -> bool:
        """Whether name and stability matrix are as written."""
        named = self.record.name == self.family.expected
        return named and (self.difference is None or self.difference < 1e-8)


def run(family: Family) -> Outcome:
    """Trace and read one family."""
    torch.manual_seed(0)
    model, inputs, kwargs = family.build()
    flow = trace(model, *inputs, **kwargs)
    records = identify(flow)
    record = records[family.which]
    difference = None if family.truth is None else compare(record, family.truth(flow, record))
    return Outcome(family, flow, records, record, difference)


def compare(record: Identification, truth: Callable[..., Any]) -> float:
    """The largest relative difference of characteristic polynomials, every field at a z of its own.

    Args:
        record: what was read; its z are h times those of the fields as the code writes them.
        truth: M as a function of one z for each field, in the order in which the code evaluates them.
    """
    if record.method is None or record.method.n_fields != len(inspect.signature(truth).parameters):
        return math.inf
    fields = record.method.n_fields
    rng = np.random.default_rng(0)
    z = rng.normal(size=(POINTS, fields)) + 1j * rng.normal(size=(POINTS, fields))
    worst = 0.0
    for row in z:
        ours = np.atleast_2d(record.method.stability_matrix(*(record.step_size * row)))
        theirs = np.atleast_2d(np.asarray(truth(*row), dtype=complex))
        p, q = np.poly(ours.reshape(ours.shape[-2:])), np.poly(theirs)
        worst = max(worst, float(np.abs(p - q).max() / np.abs(q).max()))
    return worst


def main() -> int:
    """Print the table; 1 when a row is wrong."""
    wrong = 0
    print(f"{'family':28s} {'found':50s} {'h':>6s} {'evidence':9s} {'|dR|':>8s}  steps")
    for family in FAMILIES:
        outcome = run(family)
        found, difference = outcome.record, outcome.difference
        wrong += not outcome.right
        mark = "" if outcome.right else f"   WRONG, written: {family.expected}"
        size = "-" if difference is None else f"{difference:.0e}"
        h = "-" if found.step_size is None else f"{found.step_size:.3g}"
        print(f"{family.name:28s} {found.name:50s} {h:>6s} {found.evidence:9s} {size:>8s}  {len(found.steps)}{mark}")
    print(f"{len(FAMILIES) - wrong} of {len(FAMILIES)} as written")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
