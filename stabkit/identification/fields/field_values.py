"""Where the value of a field ends: beyond its last nonlinear operation, when what is linear in its argument follows.

The normal form takes f(x, t) = g(x, t) - c(t) x apart and moves the linear part into the tableau, which then is that of
no method, since c is another number at every stage: d = (x - D(x, t)) / t in samplers of diffusion models. What tells
the value of the field is that the same operations follow g at every stage, and read nothing but g and its argument.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.autograd.graph import Node

from stabkit.identification.form.chain import Link
from stabkit.identification.form.composed_fields import fields_called
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.normal_form import NormalForm, Stage
from stabkit.identification.form.operations import ADDS, JOINS, MOVES, SCALES
from stabkit.identification.form.pieces import ADDED, Piece
from stabkit.identification.form.slots import Slots
from stabkit.tracing.graph.values import Value, operation, outputs_of

CONTINUED = "the value of the field ends after its linear part, which is another one at every stage"


@dataclass(frozen=True)
class _Continued:
    """One operation that continues the value of a field.

    Attributes:
        name: the name of the operation.
        nodes: it, and what multiplies the argument before it.
        weighs: whether it is a number that multiplies the value for one addition alone: a weight of the method.
    """

    name: str
    nodes: frozenset[Node]
    weighs: bool


def continued_fields(form: NormalForm) -> Iterator[frozenset[Node]]:
    """Operations that may belong to the fields of a form besides those that do; the most first.

    Only a field that is all there is in a step is continued, and at all its stages in the same way. What multiplies
    every value just before it is added is no part of it: every chain of stages x + h f(x + h/2 f(...)) would otherwise
    be a fixed-point iteration of x + f(x + f(...)).
    """
    stages = [stage for stage in form.stages if any(terms.keys() - form.piece.ends for terms in stage.inputs)
              or any(a in form.sources for terms in stage.inputs for a in terms)]  # fmt: skip
    if not stages or len({stage.key for stage in stages}) > 1:
        return
    chains = [_continuation(form.piece, stage) for stage in stages]
    count = 0
    for parts in zip(*chains, strict=False):
        if len({part.name for part in parts}) > 1:
            break
        count += 1
    for length in range(count, 0, -1):
        if chains[0][length - 1].name not in MOVES and not all(chain[length - 1].weighs for chain in chains):
            yield frozenset(node for chain in chains for part in chain[:length] for node in part.nodes)


def _continuation(piece: Piece, stage: Stage) -> list[_Continued]:
    """What follows a stage and reads nothing but its result and its argument, one operation after the other."""
    roots = [_root(piece, entry) for entry in stage.entries]
    arguments = {root for root, _ in roots}
    if len(arguments) != 1 or stage.output.output == ADDED:
        return []
    argument = arguments.pop()
    # a time is put beside the argument before the field: where that is read besides, the field begins at it
    beside = {node for _, between in roots for node in between if operation(node) in JOINS}
    readers: defaultdict[Value, list[Node]] = defaultdict(list)
    for node in piece.nodes:
        for value in dict.fromkeys(piece.inputs(node)):
            readers[value].append(node)
    found: list[_Continued] = []
    value = stage.output
    while value not in piece.targets and len(readers[value]) == 1:
        node = readers[value][0]
        taken = piece.linear.get(node, ())
        if value not in taken or len(outputs_of(node)) > 1 or node in piece.added:
            break
        nodes = {node}
        for other in taken:
            root, between = _root(piece, other)
            nodes |= between if other != value else set()
            if other != value and root != argument:
                return found
        if set(piece.inputs(node)) - set(taken):
            break
        value = Value(node, 0)
        added = len(readers[value]) == 1 and operation(readers[value][0]) in ADDS
        found.append(_Continued(operation(node), frozenset(nodes | beside), operation(node) in SCALES and added))
    return found


def _root(piece: Piece, value: Value) -> tuple[Value, set[Node]]:
    """What a value is a multiple of, and the operations that multiply it."""
    between: set[Node] = set()
    while value not in piece.ends and value.output != ADDED and len(set(piece.linear.get(value.node, ()))) == 1:
        if set(piece.inputs(value.node)) != set(piece.linear[value.node]):
            break
        between.add(value.node)
        value = piece.linear[value.node][0]
    return value, between


def chains_of_other_fields(
    around: Surroundings, found: Slots, links: Sequence[Link], steps: tuple[int, ...]
) -> Iterator[tuple[tuple[Link, ...], tuple[str, ...]]]:
    """The links of one sum with fields that are calls of modules as a whole, or end later, and what there is to say."""
    start, stop = steps[0], steps[-1] + 1
    sums = [link.form for link in links if link.kind == "sum"]
    if len(sums) > 1 or len(sums[0].stages) < 2:
        return
    called = fields_called(sums[0].piece, around.calls)
    whole = around.chain(start, stop, found, called) if called else ()
    forms = [*sums, *(link.form for link in whole if link.kind == "sum")]
    for form in forms:
        for more in (frozenset[Node](), *continued_fields(form)):
            other = around.chain(start, stop, found, more | form.piece.owned)
            if (more or form is not sums[0]) and [link.kind for link in other] == [link.kind for link in links]:
                yield other, ((CONTINUED,) if more else ())


def chains_of_one_field(
    around: Surroundings, found: Slots, links: Sequence[Link], steps: tuple[int, ...]
) -> Iterator[tuple[Link, ...]]:
    """The links of additions to one state with their one field, used once, ending as late as it may.

    One use alone does not tell where its field ends: (1 - c h) x + h g(x) is a damped step of g as well.
    """
    forms = [link.form for link in links if link.kind == "sum" and link.form.stages]
    if len(forms) != 1 or len(forms[0].stages) != 1:
        return
    for more in continued_fields(forms[0]):
        other = around.chain(steps[0], steps[-1] + 1, found, more | forms[0].piece.owned)
        if any(link.kind == "sum" for link in other) and all(link.kind in ("sum", "scaling") for link in other):
            yield other
