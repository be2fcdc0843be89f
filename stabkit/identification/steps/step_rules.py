"""By which rule the factor of a linear recurrence was made of its parameters: a = R(z) of an exponential or a rational.

A number a in (0, 1) alone is the exact step of x' = log(a) x + u, a backward Euler step of another rate, and many more.
Which of them the code means is in how a depends on what it is made of. For a = R(z) the derivative is a function of a
itself: R' = R for the exponential, ((1 + R) / 2)^2 for the trapezoidal rule, R^2 for backward Euler. So a is of a rule
if some value v that it was made of has da/dv = R'(a) / c with one constant c for all entries, which then is z = c v up
to a shift. For matrices the same holds of derivatives in the direction of the identity, with which everything commutes.
The model is run once more for this, with its parameters on the graph.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from stabkit.identification.form.operations import ADDS, MOVES
from stabkit.identification.steps.input_weights import SAVED, explicit_step, stripped, weighs, weight_of_input
from stabkit.identification.steps.matrix_logarithm import logarithm
from stabkit.tracing import Flow
from stabkit.tracing.graph.graph import Graph
from stabkit.tracing.graph.scans import Scan, scans_between
from stabkit.tracing.graph.values import Value, meta_of, operation, value_of
from stabkit.tracing.recording.inputs import Source
from stabkit.tracing.recording.training_pass import Observer, TrainingPass, path_of, training_pass

_ROUNDINGS = 100.0  # multiple of the rounding unit by which c may vary: a and its derivative are a few operations each
_FEWEST = 3  # different entries from which one constant for all of them says something
_ABOVE = 64  # values that a factor is made of, the nearest first
_TIMES = 4  # at which a factor is looked at, which may be one number each time
_ONE_WAY = 0.9  # share of a parameter's entries that move a factor, and of their derivatives that does not cancel
_SUMS = MOVES | ADDS


@dataclass(frozen=True)
class Rule:
    """A one-step method for x' = lambda x, told by the derivative of its stability function as a function of itself."""

    name: str
    of_scalars: Callable[[Tensor], Tensor]
    of_matrices: Callable[[Tensor], Tensor]


RULES = (
    Rule("exponential", lambda a: a, lambda a: a),
    Rule("trapezoid", lambda a: (1 + a) ** 2 / 4, lambda a: (a + _eye(a)) @ (a + _eye(a)) / 4),
    Rule("backward Euler", lambda a: a**2, lambda a: a @ a),
)


@dataclass(frozen=True)
class Made:
    """How the factor of a linear recurrence was made.

    Attributes:
        rule: the name of the rule; empty where none fits.
        residual: relative spread of the constant in its derivative.
        convex: whether the input enters with the weight 1 - a.
        input_follows: whether the weight of the input is made of the same z; None without a rule.
        weight: what the weight of the input is besides, see `weight_of_input`; of an exponential alone.
        certain: whether the factor is what the operation of the rule gives out, at all inputs.
        explicit: whether it is a step of explicit Euler, see `explicit_step`.
        fed: whether the input makes the size of that step.
    """

    rule: str = ""
    residual: float = 0.0
    convex: bool = False
    input_follows: bool | None = None
    weight: str = ""
    certain: bool = False
    explicit: str = ""
    fed: bool = False


class Histories:
    """The recurrences of a model with all that their factors were made of.

    Args:
        flow: the flow in which they were found, with parameters held fixed.
    """

    def __init__(self, flow: Flow) -> None:
        watching = _Sources()
        with _copied_parameters(flow.model):
            self._pass: TrainingPass = training_pass(flow.forward_pass, None, watching, differentiate=False)
        self._scans: dict[str, list[Scan]] = {}
        self._inputs = [source.value for source in watching.sources]
        if self._pass.loss is None:
            return
        sources = [value_of(p) for p in self._pass.parameters.values()] + self._inputs
        self._graph = Graph(sources, [value_of(self._pass.loss)], prune=False)
        for scan in scans_between(self._graph, 0, len(self._graph.nodes), self._pass.parameters.values()):
            self._scans.setdefault(path_of(self._pass, scan.cycle[-1]), []).append(scan)

    def of(self, path: str, place: int, count: int) -> Made:
        """How the factor of a recurrence was made; nothing where it is not one product with one factor.

        Args:
            path: the path of the module in which it runs.
            place: which of the recurrences in that module it is.
            count: how many there are.
        """
        located = self._located(path, place, count)
        if located is None:
            return self._explicit(path, place, count)
        scan, product, factors = located
        if operation(product) == "Lerp":
            return Made(convex=True)
        own = {v for values in scan.states for v in values}
        factor = factors[0]
        added = [
            v
            for node in scan.cycle
            if node is not product
            for v in self._graph.inputs[node]
            if v not in own and v.node not in scan.cycle
        ]
        convex = not factor.is_matrix and any(weighs(v, 1 - factor.number) for v in added)
        found = _rule(factors)
        if found is None:
            return Made(convex=True) if convex else self._explicit(path, place, count)
        rule, residual, z = found
        follows = any(self._is_made_of(v, z) for v in added) if added else None
        weight = weight_of_input(added, factor.number) if rule.name == "exponential" and not factor.is_matrix else ""
        written = all(f.value is not None and operation(stripped(f.value).node) == "Exp" for f in factors)
        certain = written and rule.name == "exponential" and not factor.is_matrix
        return Made(rule.name, residual, convex, follows, weight, certain=certain)

    def nodes_of(self, path: str) -> list[Node]:
        """The operations of the pass that run in a module."""
        nodes = self._graph.nodes if self._pass.loss is not None else ()
        return [node for node in nodes if path_of(self._pass, node) == path]

    @property
    def graph(self) -> Graph:
        """The graph of the pass, with parameters on it."""
        return self._graph

    def _explicit(self, path: str, place: int, count: int) -> Made:
        scans = self._scans.get(path, [])
        scan = scans[place] if len(scans) == count else None
        if scan is None or len(scan.states[0]) != 1 or len(scan) < 1:
            return Made()
        before, after = (scan.states[time] for time in (scan.middle, scan.middle + 1))
        how, size = explicit_step(before, after[0], scan.cycle)
        return Made(explicit=how, fed=size is not None and size.node not in scan.cycle and self.is_fed(size))

    def is_fed(self, value: Value) -> bool:
        """Whether a value is made of an input of the model: of floats, or of tokens that were looked up."""
        stack, seen = [value], set[Value]()
        while stack:
            v = stack.pop()
            if v in self._inputs or operation(v.node).startswith("Embedding"):
                return True
            if v not in seen:
                seen.add(v)
                stack.extend(self._graph.inputs.get(v.node, ()))
        return False

    def levers(self, path: str, place: int, count: int) -> list[tuple[str, float]]:
        """Parameters of the module whose entries all move the factor of a recurrence the same way.

        Args:
            path: the path of the module in which it runs.
            place: which of the recurrences in that module it is.
            count: how many there are.

        Returns:
            Names, with the derivative of the mean of log|a| when all entries of the parameter are moved alike; the
            strongest first.
        """
        found = []
        for name, grad in self._pulled_by(path, place, count):
            if float((grad != 0).double().mean()) < _ONE_WAY:
                continue  # a part of it does something else
            total = float(grad.double().sum())
            if abs(total) > _ONE_WAY * float(grad.double().abs().sum()):
                found.append((name, total))
        return sorted(found, key=lambda lever: -abs(lever[1]))

    def makers(self, path: str, place: int, count: int) -> list[str]:
        """Parameters of the module that the factor of a recurrence is made of; arguments as for `levers`."""
        return [name for name, grad in self._pulled_by(path, place, count) if bool((grad != 0).any())]

    def range_of_factor(self, path: str, place: int, count: int) -> tuple[float, float]:
        """The least and the largest real part of the entries of a factor; NaN where it is a matrix or not known."""
        located = self._located(path, place, count)
        if located is None or located[2][0].is_matrix:
            return math.nan, math.nan
        parts = torch.cat([factor.number.real.flatten() for factor in located[2]])
        return float(parts.min()), float(parts.max())

    def _pulled_by(self, path: str, place: int, count: int) -> list[tuple[str, Tensor]]:
        """The derivative of the mean of log|a| by the parameters of the module that the factor a is made of."""
        located = self._located(path, place, count)
        if located is None or located[2][0].is_matrix:
            return []
        factors = [factor for factor in located[2] if factor.value is not None]
        inside = {n: p for n, p in self._pass.parameters.items() if n.startswith(f"{path}." if path else "")}
        if not factors or not inside:
            return []
        given = []
        for factor in factors:
            a = torch.where(factor.number == 0, torch.ones_like(factor.number), factor.number)
            given.append(torch.where(factor.number == 0, torch.zeros_like(a), 1 / a.conj()) / a.numel())
        pulled = _pulled(factors, [value_of(p) for p in inside.values()], given)
        return [(name, g / len(factors)) for name, g in zip(inside, pulled, strict=True) if g is not None]

    def _located(self, path: str, place: int, count: int) -> tuple[Scan, Node, list[_Factor]] | None:
        """A recurrence, the one product in it that is no sum, and its factors."""
        scans = self._scans.get(path, [])
        if len(scans) != count:
            return None
        scan = scans[place]
        products = [node for node in scan.cycle if operation(node) not in _SUMS]
        own = {v for values in scan.states for v in values}
        met = [sum(v in own or v.node in scan.cycle for v in self._graph.inputs[node]) for node in scan.cycle]
        if len(products) != 1 or max(met) > 1:  # h + z (u - h): z is no factor of the state
            return None
        factors = self._factors(scan, products[0], lambda v: v in own or v.node in scan.cycle)
        return (scan, products[0], factors) if factors else None

    def _factors(self, scan: Scan, product: Node, is_state: Callable[[Value], bool]) -> list[_Factor]:
        """The factor in the middle of the sequence, and at some later times."""
        place, found = _place(product, is_state), list[_Factor]()
        if place is None:
            return found
        rank = self._graph.rank[product]
        for later in range(min(_TIMES, len(scan) - scan.middle)):
            one = _factor(self._graph.nodes[rank + later * scan.period], place)
            if one is not None and one.value not in [known.value for known in found]:
                found.append(one)
        return found

    def _is_made_of(self, value: Value, wanted: Value) -> bool:
        rank = self._graph.rank
        stack, seen = [value], set[Value]()
        while stack:
            v = stack.pop()
            if v == wanted:
                return True
            if v not in seen and rank.get(v.node, -1) >= rank.get(wanted.node, -1):
                seen.add(v)
                stack.extend(self._graph.inputs.get(v.node, ()))
        return False


@contextlib.contextmanager
def _copied_parameters(model: nn.Module) -> Iterator[None]:
    """Copies of all parameters in their places for a while, each of which requires grad.

    The graph of the flow holds the parameters themselves, and a model that writes to them would spoil it.
    """
    copies: dict[int, nn.Parameter] = {}
    with contextlib.ExitStack() as undoing:
        for module in model.modules():
            for name, held in list(module._parameters.items()):
                if held is None or not (held.is_floating_point() or held.is_complex()):
                    continue
                copies.setdefault(id(held), nn.Parameter(held.detach().clone()))
                module._parameters[name] = copies[id(held)]
                undoing.callback(module._parameters.__setitem__, name, held)
        yield


class _Sources(Observer):  # type: ignore[no-untyped-call]
    """Keeps the inputs of a pass as they are on its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[Source] = []

    def begin(self, module: nn.Module, sources: list[Source]) -> None:
        self.sources = sources


@dataclass(frozen=True, eq=False)
class _Factor:
    """What multiplies the state.

    Attributes:
        number: its value.
        value: where it is on the graph; None for a constant.
        passed: what a cotangent of the factor is multiplied by to become one of ``value``; 1 but for a division.
        is_matrix: whether it is a matrix.
    """

    number: Tensor
    value: Value | None
    passed: Tensor | float = 1.0
    is_matrix: bool = False


def _place(product: Node, is_state: Callable[[Value], bool]) -> int | None:
    """Which argument of a product multiplies the state; None where there is more than one state in it."""
    known = SAVED.get(operation(product), {})
    given = [None if parent is None else Value(parent, output) for parent, output in product.next_functions]
    states = [i for i in known if (v := given[i]) is not None and is_state(v)]
    if len(states) != 1 or (operation(product) in ("Div", "Lerp") and states != [0]):
        return None
    return next(i for i in known if i not in states)


def _factor(product: Node, place: int) -> _Factor | None:
    name = operation(product)
    number = getattr(product, SAVED[name][place], None)
    if not isinstance(number, Tensor):
        return None
    number = number.detach()
    parent, output = product.next_functions[place]
    value = None if parent is None else Value(parent, output)
    if name == "Lerp":
        return _Factor(1 - number, value, -1.0)
    if name == "Div":
        return _Factor(1 / number, value, -1 / number**2)
    is_matrix = name in ("Mm", "Addmm")
    return None if is_matrix and number.shape[0] != number.shape[1] else _Factor(number, value, 1.0, is_matrix)


def _rule(factors: Sequence[_Factor]) -> tuple[Rule, float, Value] | None:
    """The rule that fits some factors, how well, and the value that they are made of; None unless one fits alone."""
    factors = [f for f in factors if f.value is not None and f.number.shape == factors[0].number.shape]
    if not factors:
        return None
    above = _above([f.value for f in factors if f.value is not None])
    if not above:
        return None  # a parameter itself, made of nothing
    fits = []
    for rule in RULES:
        spreads = (_of_matrix if factors[0].is_matrix else _of_entries)(rule, factors, above)
        fits.append((*min(spreads, key=lambda pair: pair[0], default=(math.inf, above[0])), rule))
    (best, value, rule), (second, *_) = sorted(fits, key=lambda fit: fit[0])[:2]
    return (rule, best, value) if best <= _tolerance(factors[0].number) and second > 10 * best else None


def _tolerance(number: Tensor) -> float:
    return _ROUNDINGS * torch.finfo(number.dtype).eps


def _above(values: Sequence[Value]) -> list[Value]:
    """The values that some were made of, the nearest first, and parameters among them."""
    found: dict[Value, None] = {}
    row = list(values)
    while row and len(found) < _ABOVE:
        row = [Value(parent, output) for v in row for parent, output in v.node.next_functions if parent is not None]
        row = [v for v in dict.fromkeys(row) if v not in found]
        found.update(dict.fromkeys(row))
    return list(found)


def _pulled(factors: Sequence[_Factor], above: Sequence[Value], cotangents: Sequence[Tensor]) -> list[Tensor | None]:
    values, given = list[Value](), list[Tensor]()
    for factor, cotangent in zip(factors, cotangents, strict=True):
        if factor.value is not None:
            meta = meta_of(factor.value)
            values.append(factor.value)
            given.append((cotangent * factor.passed).to(meta.dtype).expand(meta.shape))
    edges = [value.edge for value in values]
    return list(torch.autograd.grad(edges, [v.edge for v in above], given, retain_graph=True, allow_unused=True))


def _of_entries(rule: Rule, factors: Sequence[_Factor], above: Sequence[Value]) -> list[tuple[float, Value]]:
    """By how much da/dv over R'(a) varies over the entries, for every value."""
    a = torch.stack([factor.number for factor in factors])
    derivative = rule.of_scalars(a)
    usable = derivative.abs() > torch.finfo(a.dtype).tiny ** 0.5
    if len(torch.unique(a[usable].abs())) < _FEWEST:
        return []
    # signs at random: where entries of a value enter several of the factor they do not add up to one number
    signs = torch.randint(0, 2, a.shape, generator=torch.Generator().manual_seed(0)).to(a.real.dtype) * 2 - 1
    w = torch.where(usable, signs.to(a.device) / derivative.conj(), torch.zeros_like(a))
    found = []
    for value, grad in zip(above, _pulled(factors, above, w.unbind(0)), strict=True):
        sizes = torch.empty(0) if grad is None else grad[grad != 0].abs().double()
        if len(sizes) >= _FEWEST:
            found.append((float((sizes.max() - sizes.min()) / sizes.mean()), value))
    return found


def _of_matrix(rule: Rule, factors: Sequence[_Factor], above: Sequence[Value]) -> list[tuple[float, Value]]:
    """The same for the matrix of the first time, in the direction of the identity and with random weights.

    A parameter of one number, such as a step size, is in z = c v as a whole: da/dv = R'(a) z / v. What is made of it
    may be used twice, once for each side of a system, and by one of them alone the trapezoidal rule looks like
    backward Euler.
    """
    a = factors[0].number
    of_number = rule.of_matrices(a) @ z if (z := _argument(rule, a)) is not None else None
    generator = torch.Generator().manual_seed(0)
    rows: dict[Value, list[tuple[float, float]]] = {}
    for _ in range(_FEWEST):
        w = torch.randn(a.shape, generator=generator, dtype=torch.float64).to(a)
        of_identity = float((w * rule.of_matrices(a)).sum())
        for value, grad in zip(above, _pulled(factors[:1], above, [w]), strict=True):
            if grad is not None and grad.shape == a.shape:
                rows.setdefault(value, []).append((float(grad.diagonal().sum()), of_identity))
            elif grad is not None and grad.numel() == 1 and of_number is not None and not value.node.next_functions:
                rows.setdefault(value, []).append((float(grad), float((w * of_number).sum())))
    found = []
    for value, pairs in rows.items():
        got, expected = np.array(pairs).T
        c, size = got @ expected / (expected @ expected), float(np.linalg.norm(got))
        if size and c:
            found.append((float(np.linalg.norm(got - c * expected)) / size, value))
    return found


def _argument(rule: Rule, a: Tensor) -> Tensor | None:
    """The z of a = R(z); None where there is none, or not one alone."""
    matrix = a.double().cpu().numpy()
    ends = np.linalg.eigvals(matrix)
    if rule.name == "exponential":
        z = logarithm(matrix) if (ends.real > 0).all() else None
    elif rule.name == "trapezoid":
        z = 2 * np.linalg.solve(matrix + np.eye(len(a)), matrix - np.eye(len(a))) if (ends != -1).all() else None
    else:
        z = np.eye(len(a)) - np.linalg.inv(matrix) if ends.all() else None
    return None if z is None or not np.isfinite(z).all() else torch.from_numpy(z).to(a)


def _eye(a: Tensor) -> Tensor:
    return torch.eye(len(a), dtype=a.dtype, device=a.device)
