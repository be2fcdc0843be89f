"""Steps between states that a norm puts on a sphere, x' = P(a P(x) + f(x)): a norm before the sum as after it."""

from __future__ import annotations

from collections.abc import Sequence

from stabkit.identification.fields.shared import constants
from stabkit.identification.form.chain import Link
from stabkit.identification.form.normal_form import Stage
from stabkit.identification.form.operations import ADDS, MOVES, SCALES
from stabkit.identification.record import Identification
from stabkit.identification.steps.around_addition import normalises
from stabkit.integrators import GeneralLinearMethod
from stabkit.tracing.graph.values import operation


def bent_skip(link: Link) -> Stage | None:
    """What a state passes without weights on its way to a sum, beside a branch with weights: a norm, an activation."""
    form = link.form
    stages = [s for s in form.stages if s.output in form.forms[0]]
    weightless = [s for s in stages if s.is_weightless and not s.is_affine and s.entries == form.sources]
    if link.kind != "map" or not weightless or len(weightless) == len(stages):
        return None
    return weightless[0]


def retraction(links: Sequence[Link], steps: tuple[int, ...]) -> Identification | None:
    """The record of sums in which the state is normalised as every sum is afterwards; None where it is not so.

    A norm P does not change what it was applied to before, P P = P, so the one before a sum changes nothing between
    two such steps: each is x' = P(a x + f(x)) on the sphere.
    """
    pairs = list(zip(links[::2], links[1::2], strict=False))
    if not pairs or len(links) % 2:
        return None
    skips, steps_taken, kinds = [], [], set()
    for added, after in pairs:
        skip = bent_skip(added)
        if skip is None or after.kind != "weightless" or not normalises(after):
            return None
        before = [operation(n) for n in skip.nodes if operation(n) not in MOVES | ADDS | SCALES]
        if before != [operation(n) for n in after.nodes] or any(constants(n) for n in skip.nodes):
            return None  # another norm, or one with a gain, which is no projection
        terms = added.form.forms[0]
        others = [c for atom, c in terms.items() if atom != skip.output]
        if len(others) != 1 or added.form.sources[0] in terms:
            return None
        skips.append(terms[skip.output])
        steps_taken.append(others[0])
        kinds |= {terms[skip.output].kind, others[0].kind}
    if not kinds <= {"scalar", "diagonal"}:
        return None
    a, h = skips[-1].value, steps_taken[-1].value
    notes = [
        f"the state is normalised before each of {len(pairs)} addition(s) and after it ({links[-1].operations[0]})"
    ]
    convention = "h: the number that multiplies the branch"
    if "diagonal" in kinds:
        convention = "h: the mean of the numbers that multiply the entries of the last branch"
        notes += [
            f"addition {i}: every coordinate has its own damping and step, a from {skip.low:.3g} to {skip.high:.3g}, "
            f"h from {step.low:.3g} to {step.high:.3g}"
            for i, (skip, step) in enumerate(zip(skips, steps_taken, strict=True), 1)
        ]
    return Identification(
        name="projected Euler (post-norm)",
        method=GeneralLinearMethod([[0]], [[1]], [[1]], [[a]], name="projected Euler (post-norm)"),
        skip=None,
        step_size=abs(h),
        convention=convention,
        evidence="proven" if kinds == {"scalar"} else "measured",
        residual=max(c.residual for c in (*skips, *steps_taken)),
        steps=steps,
        after=links[-1].operations,
        notes=tuple(notes),
        system="x' = f(x) - lambda x, retracted to the sphere after each step",
    )
