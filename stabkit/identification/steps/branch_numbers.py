"""The numbers that multiply a branch one after the other on its way to the sum: a gain of its own, and a step size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from stabkit.identification.form.coefficients import LinearCombination
from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.operations import ADDS, PRODUCTS
from stabkit.identification.names.step_size import NUMBER
from stabkit.identification.record import Identification
from stabkit.tracing.graph.values import Value, operation

_CLOSE = 1e-5  # relative, of products of numbers in single precision


def with_numbers_told(record: Identification, sums: Sequence[NormalForm]) -> Identification:
    """A record whose step size is a product of numbers of the code that says which: at the sum, and before it.

    Only the product can be seen in the step. Which of the numbers is the step is in the code: the one at the sum, as a
    rule, while a gain before it belongs to the branch.
    """
    branches = [(form, atom) for form in sums for atom in form.forms[0] if atom not in form.piece.ends]
    if record.convention != NUMBER or len(branches) != 1 or record.step_size is None:
        return record
    numbers = _numbers(*branches[0])
    whole = math.isclose(abs(math.prod(numbers)), record.step_size, rel_tol=_CLOSE)
    if len(numbers) < 2 or not whole:
        return record
    last, before = numbers[0], math.prod(numbers[1:])
    told = f"h: the product of the numbers that multiply the branch, {last:.4g} at the sum and {before:.4g} before it"
    return replace(record, convention=told)


def _numbers(form: NormalForm, atom: Value) -> list[float]:
    """The numbers other than one that multiply a branch, that at the sum first; none where there is not one way."""
    piece, value, found = form.piece, form.targets[0], list[float]()
    path = LinearCombination(piece, value).path
    while value != atom:
        node = value.node
        given = [v for v in piece.linear.get(node, ()) if v not in piece.carrying]
        if node not in path or len(set(given)) != 1:
            return []
        name = operation(node)
        if name in PRODUCTS:
            number = _constant(node)
            if number is None:
                return []
            found.append(1 / number if name == "Div" else number)
        elif name in ADDS:
            found.append(float(getattr(node, "_saved_alpha", 1) or 1))
        value = given[0]
    return [number for number in found if abs(abs(number) - 1) > _CLOSE]


def _constant(node: object) -> float | None:
    """The one number by which an operation multiplies or divides; None where it is not one."""
    kept = [getattr(node, name, None) for name in ("_saved_other", "_saved_self")]
    numbers = [float(t.detach()) for t in kept if isinstance(t, Tensor) and t.grad_fn is None and t.numel() == 1]
    return numbers[0] if len(numbers) == 1 and numbers[0] else None
