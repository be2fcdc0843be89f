"""What may count as a gate: a factor that a bend made of the state, and not one that grows with it or solves for it.

A gate is held fixed in R(z), which says something as long as it stays the number that it is: a sigmoid, a softmax, an
exponential of a rate. x0 (W x + b) is quadratic in the state, so that product is the value of a field; and quotients of
inner products, by which conjugate gradients and line searches multiply directions, belong to a solver.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch.autograd.graph import Node

from stabkit.identification.form.operations import ADDS, MOVES, PRODUCTS, SCALES, has_matrix
from stabkit.tracing.graph.values import Value, meta_of, operation
from stabkit.vocabulary import activation_of, is_activation

#: Operations that make one number of many entries.
_REDUCTIONS = frozenset({"Dot", "LinalgVectorNorm", "Mean", "Mm", "Bmm", "Mv", "Norm", "Sum", "Vdot"})
_BETWEEN = MOVES | SCALES | ADDS | PRODUCTS
#: Operations that may follow an inner product.
_OF_ONE = frozenset({"Conj", "Pow", "Real", "ViewAsReal"})

_WEIGHTS = frozenset({"SafeSoftmax", "Sigmoid", "Softmax"})

Inputs = Callable[[Node], Sequence[Value]]


def is_gate(value: Value, inputs: Inputs, of_state: Collection[Value], ends: Collection[Value]) -> bool:
    """Whether what multiplies a state can be a gate.

    Args:
        value: the factor.
        inputs: the inputs of an operation that depend on states or on what is held fixed.
        of_state: what depends on the states.
        ends: the states, and what is held fixed.
    """
    stack, seen = [value], set[Value]()
    while stack:
        v = stack.pop()
        if v in seen or v not in of_state:
            continue
        seen.add(v)
        if (
            v in ends
            or has_matrix(v.node)
            or _grows(v.node)
            or is_quotient_of_inner_products(v, inputs, of_state, ends)
        ):
            return False
        name, given = operation(v.node), inputs(v.node)
        if name in MOVES | ADDS | PRODUCTS or name == "Pow" or (name in SCALES and len(given) == 1):
            stack.extend(given)
    return True


def _grows(node: Node) -> bool:
    """Whether an operation is an activation that grows without bound to one side: a ReLU, a softplus."""
    facts = activation_of(node)
    return facts is not None and facts.flat_side == "below" and not facts.is_bounded


def adds_constant(value: Value, inputs: Inputs, ends: Collection[Value]) -> bool:
    """Whether a constant is added on the way to a factor, as in x (1 + a(x)), which passes x on besides x a(x)."""
    stack, seen = [value], set[Value]()
    while stack:
        v = stack.pop()
        if v in seen or v in ends:
            continue
        seen.add(v)
        name, given = operation(v.node), inputs(v.node)
        if name in ADDS and len(given) == 1:
            return True
        if name in MOVES | ADDS | SCALES:
            stack.extend(given)
    return False


def is_quotient_of_inner_products(
    value: Value, inputs: Inputs, of_state: Collection[Value], ends: Collection[Value]
) -> bool:
    """Whether a value is r.r / p.Ap or the like: one sum of products over another, each fewer numbers than entries."""
    if operation(value.node) != "Div":
        return False
    given = [v for v in inputs(value.node) if v in of_state]
    return len(given) == 2 and all(_is_inner_product(v, inputs, of_state, ends) for v in given)


def _is_inner_product(value: Value, inputs: Inputs, of_state: Collection[Value], ends: Collection[Value]) -> bool:
    stack, seen, found = [value], set[Value](), False
    while stack:
        v = stack.pop()
        if v in seen or v not in of_state:
            continue
        seen.add(v)
        if v in ends:
            return False
        name, given = operation(v.node), inputs(v.node)
        if name in _REDUCTIONS and any(meta_of(v).numel < meta_of(entry).numel for entry in given):
            found = True
        elif given and (name in _BETWEEN | _OF_ONE or is_activation(v.node)):  # clamped from below
            stack.extend(given)
        else:
            return False
    return found


def weights_of_stages(
    products: Sequence[Value], inputs: Inputs, ends: Collection[Value]
) -> dict[Node, tuple[Value, Value]]:
    """Products g k_1 and (1 - g) k_2 of stages of one step with gates that one sigmoid or softmax gave out.

    One of the stages is evaluated at what the other gave: they are stages of a method, and no experts at one point.

    Args:
        products: with both factors made of states, that are added to one.
        inputs: the inputs of an operation that depend on states or on what is held fixed.
        ends: the states, and what is held fixed.

    Returns:
        By operation, the gate and what it weighs.
    """
    groups: dict[Value, dict[Node, tuple[Value, Value]]] = {}
    for product in products:
        given = list(dict.fromkeys(inputs(product.node)))
        for gate, weighed in (given, given[::-1]) if len(given) == 2 else ():
            root = _root_of_weight(gate, inputs, ends)
            if root is not None and _root_of_weight(weighed, inputs, ends) is None:
                groups.setdefault(root, {})[product.node] = gate, weighed
    found: dict[Node, tuple[Value, Value]] = {}
    for group in groups.values():
        gates, stages = zip(*group.values(), strict=True)
        if len(set(gates)) > 1 and any(a != b and _is_made_of(a, b, inputs, ends) for a in stages for b in stages):
            found.update(group)
    return found


def _root_of_weight(value: Value, inputs: Inputs, ends: Collection[Value]) -> Value | None:
    """The sigmoid or softmax of which a value is a part or what it leaves of one; None where it is no such."""
    while value not in ends:
        if operation(value.node) in _WEIGHTS:
            return value
        given = inputs(value.node)
        if len(given) != 1 or operation(value.node) not in MOVES | ADDS | SCALES:
            return None
        value = given[0]
    return None


def _is_made_of(value: Value, wanted: Value, inputs: Inputs, ends: Collection[Value]) -> bool:
    stack, seen = [value], set[Value]()
    while stack:
        v = stack.pop()
        if v == wanted:
            return True
        if v not in seen and v not in ends:
            seen.add(v)
            stack.extend(inputs(v.node))
    return False
