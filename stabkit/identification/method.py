"""Which numerical method each step is, with the evidence for it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError, ArgumentTypeError
from stabkit.identification.evidence.told_numbers import consistent
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.grouping import groups, is_divided, is_round, with_norms
from stabkit.identification.names.systems import LINEAR_MAP
from stabkit.identification.reading import read, read_states, read_sums
from stabkit.identification.record import Identification
from stabkit.identification.steps.composed_steps import (
    with_compositions,
    with_first_rounds,
    with_half_kicks,
    with_halved_starts,
)
from stabkit.identification.steps.detached import with_values
from stabkit.identification.steps.ends import with_ends
from stabkit.identification.steps.fields_in_time import read_as_euler, with_fields_in_time
from stabkit.identification.steps.forks_and_joins import changes_count, without_doubtful
from stabkit.identification.steps.linear_steps import with_first_restarts
from stabkit.identification.steps.nested import has_residual_inside
from stabkit.identification.steps.pending import with_pending_starts
from stabkit.identification.steps.same_weights import with_same_weights
from stabkit.identification.time.at_once import closed_form_note, recurrences_at_once
from stabkit.identification.time.iterated import read_iteration
from stabkit.identification.time.linear_states import with_matrices
from stabkit.identification.time.over_time import Recurrences
from stabkit.integrators import GeneralLinearMethod
from stabkit.parallel import SERIAL, Parallel
from stabkit.tracing import Flow, FlowLike, Iteration
from stabkit.tracing.flow_checks import traced
from stabkit.tracing.graph.values import entries_are_finite

_NOTHING_READ = frozenset(
    {"unknown", "not a step", "part of a step", "plain", "transition", "transformed skip", "unnamed"}
)
_OVER_TIME = ("linear recurrence", "diagonal skip")  # what a step over time is called that is seen by itself
_BLOCKS = 2  # residual blocks within a long skip that are steps by themselves
_COARSE = ("unnamed", "gated skip", "damped Euler, parallel")  # readings that single steps may better


@accepts
def identify(flow: FlowLike, *, checks: bool = True, parallel: Parallel = SERIAL) -> tuple[Identification, ...]:
    """The method of every step of a flow, or of several steps together where one method spans them.

    Every step is brought into affine normal form: new states and stage inputs as linear combinations of old states and
    stages, a stage being a maximal nonlinear region. Its coefficients are the tableau of a general linear method
    (Butcher 2016, chapter 5), whose stability matrix is exact whether it has a name or not. Names follow from the
    tableau and from which stages share weights, never from the names of modules.

    A step without a skip is ``"plain"``; one that changes the space is a ``"transition"``; what hides inside opaque
    operations stays ``"unknown"``. A recurrence over time inside a step, such as the scan of a state-space layer that
    is written as a loop, is read as well (``over_time``).

    Lessons with pictures: ``examples/tableau_of_a_neural_ode.py``, ``examples/transformer_as_splitting.py``.

    Args:
        flow: from `stabkit.trace`, `stabkit.recurrent_flow` or `stabkit.iterate`.
        checks: whether numbers beside the reading are taken: commutators, determinants, defects. They cost several
            products a step, and no name or evidence depends on them.
        parallel: who reads which steps.

    Raises:
        ArgumentTypeError: ``flow`` is something else.

    Example:
        >>> import torch, stabkit
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.f = torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + torch.tanh(self.f(x))
        >>> flow = stabkit.trace(torch.nn.Sequential(Block(), Block()), torch.ones(2, 4))
        >>> [found.name for found in identify(flow)]
        ['forward Euler', 'forward Euler']
    """
    if isinstance(flow, Iteration):
        return read_iteration(flow, checks)
    flow = traced(flow, "identify")
    if not all(entries_are_finite(tensor) for state in flow.states for tensor in state.tensors):
        return unidentified(flow)
    around = Surroundings(flow, checks)
    places = groups(flow, around.loops)
    recurrences = Recurrences(flow)

    def with_time(record: Identification) -> Identification:
        start, stop = record.steps[0], record.steps[-1] + 1
        found = recurrences.inside(start, stop) or recurrences_at_once(flow, start, stop)
        found = found or recurrences.convolved(start, stop)
        told = tuple(map(str, found)) or tuple(filter(None, (closed_form_note(flow, start, stop),)))
        return replace(record, over_time=found, notes=(*record.notes, *told)) if told else record

    def read_group(index: int) -> list[Identification]:
        return [with_time(record) for record in read_steps(*places[index])]

    def read_steps(start: int, stop: int) -> list[Identification]:
        record = read(around, start, stop)
        if stop == start + 1:
            return [record]
        # where a round may be cut, what is said of its parts is true as well; Strang's order of them says more
        divided = is_divided(flow, start, stop, around.loops)
        known = not _is_unread(record)
        kept = record.name.startswith("Strang") if divided else known
        # a long skip leads around blocks, which are the steps; around a single one it makes a step of its own, as do
        # the stages of one field
        stages = record.method.stages if isinstance(record.method, GeneralLinearMethod) else 0
        around_blocks = kept and stages < 2 and stop - start > _BLOCKS
        around_blocks = around_blocks and not is_round(flow, start, stop, around.loops)
        if kept and not around_blocks:
            return [record]
        single = [read(around, *part) for part in with_norms(flow, start, stop)]
        if kept:
            return single if sum(map(_is_block, single)) >= _BLOCKS else [record]
        if all(r.name == "part of a step" for r in single):
            return [record]
        unread = sum(changes_count(r) or (_is_unread(r) and not has_residual_inside(r)) for r in single)
        return single if divided or record.name in _NOTHING_READ or unread <= len(single) / 2 else [record]

    costs = [float(sum(len(flow.steps[i].segment.nodes) for i in range(start, stop))) for start, stop in places]
    found = [record for records in parallel.share(read_group, costs, name="reading") for record in records]
    found = [with_matrices(record, around) for record in _over_steps(found, recurrences)]
    found = with_fields_in_time(found, lambda start, stop: read_as_euler(around, start, stop, read_sums))
    found = with_first_rounds(found)
    found = with_first_restarts(with_pending_starts(found, around), around)
    found = with_ends(found, around, lambda slots, steps: read_states(around, slots, steps))
    found = with_halved_starts(without_doubtful(found))
    found = with_compositions(found, lambda start, stop: with_time(read(around, start, stop)))
    found = with_same_weights(list(map(consistent, with_half_kicks(found, around))), around)
    return tuple(with_values(found, flow, lambda other: identify(other, checks=False, parallel=parallel)))


def unidentified(flow: Flow) -> tuple[Identification, ...]:
    """No method of any step of a flow whose numbers are not finite, and why: nothing of it can be tested.

    Args:
        flow: from `stabkit.trace`.
    """
    why = ("no spectrum and no method: states or gradients of this pass are not finite",)
    return tuple(
        Identification("unknown", None, None, None, "", "unknown", None, (i,), notes=why)
        for i in range(len(flow.steps))
    )


def _over_steps(records: Sequence[Identification], recurrences: Recurrences) -> list[Identification]:
    """Records, those of steps over time with the name that how their numbers were made gives to all of them.

    Of one step alone every number that multiplies the state is a damping: that it is exp(h A) shows in its derivative.
    """
    found: list[Identification] = []
    for is_linear, run in itertools.groupby(records, _may_be_linear):
        steps = list(run)
        over = recurrences.inside(steps[0].steps[0], steps[-1].steps[-1] + 1) if is_linear and len(steps) > 2 else ()
        if len(over) != 1 or over[0].name.startswith(_OVER_TIME):
            found += steps
            continue
        told = over[0]
        found += [
            replace(record, name=told.name, system=told.system, evidence=told.evidence, residual=told.residual,
                    notes=(*told.notes, *record.notes))
            for record in steps
        ]  # fmt: skip
    return found


def _is_unread(record: Identification) -> bool:
    return record.name in _NOTHING_READ or record.name.startswith(_COARSE)


def _is_block(record: Identification) -> bool:
    """Whether a step is one of a state of its own, with a skip around it."""
    return not _is_unread(record) and record.skip == 1.0 and record.method is not None and not changes_count(record)


def _may_be_linear(record: Identification) -> bool:
    """Whether a step is linear in its state, as far as was read."""
    return record.name.startswith(_OVER_TIME) or record.system == LINEAR_MAP


def by_step(identifications: Sequence[Identification], n_steps: int) -> tuple[Identification, ...]:
    """One record per step.

    A step that is a part of a method gets a record that says so, without method, skip or step size of its own, since
    the Jacobian of a part is not that of the method.

    Args:
        identifications: from `identify`.
        n_steps: how many steps the flow has.

    Raises:
        ArgumentError: the records do not cover the steps exactly once.
    """
    found: dict[int, Identification] = {}
    for record in identifications:
        if not isinstance(record, Identification):
            raise ArgumentTypeError(
                f"identifications holds {type(record).__name__}; give what stabkit.identify returns"
            )
        count = len(record.steps)
        for place, index in enumerate(record.steps, 1):
            part = record if count == 1 else replace(
                record, name=f"{record.name}, part {place} of {count}", method=None, skip=None, step_size=None,
                residual=None, steps=(index,), recorded=(),
            )  # fmt: skip
            if index in found:
                raise ArgumentError(f"step {index} belongs to two records; give those of one call of identify")
            found[index] = part
    if sorted(found) != list(range(n_steps)):
        raise ArgumentError(f"the records cover steps {sorted(found)}; expected each of 0 to {n_steps - 1} once")
    return tuple(found[index] for index in range(n_steps))
