"""Whether what was told of a generated program is true: names, M(z) at random z, and how many of its steps."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.identification.generated_fields import OVER_TIME
from tests.identification.generated_methods import Method, stability_matrix
from tests.identification.generated_programs import STEPS, Program

TOLD = ("proven", "measured")
NO_METHOD = r"^(transition|unknown|identity|constant|join|fork|part of a step|no branch|unnamed)"
COMPOSED = r"Lie splitting \((\d+) (?:times (.*)\)$|Euler steps\))"
LAST = r"symplectic|reversible"  # what is left of a Verlet step whose last kick is used by nothing
ONE_STAGE = (
    "forward Euler", "scaled Euler", "damped", "parallel branches", "semi-implicit decay", "exponential Euler, scalar",
)  # fmt: skip
Matrix = Callable[[Sequence[complex]], Any]


@dataclass(frozen=True)
class Outcome:
    """What was told of one program, and whether it is true.

    Attributes:
        program: the program.
        verdict: ``right``; ``part``, some of its steps, or something false at an end; ``unread``; ``wrong``, another
            method told as proven or measured.
        why: what is wrong or missing.
        told: a line for every reading.
    """

    program: Program
    verdict: str
    why: str
    told: tuple[str, ...]


def judge(program: Program, readings: Sequence[Any]) -> Outcome:
    """The verdict on what was told."""
    truth, inside = program.method, [OVER_TIME[kind] for kind in program.kinds.values() if kind in OVER_TIME]
    good, bad, partly, beside = 0.0, Counter[str](), False, ""
    for place, reading in enumerate(readings):
        if reading.over_time and re.search(truth.names, " | ".join(x.name for x in reading.over_time)):
            good += max(x.n_steps for x in reading.over_time)
            continue
        bad.update(
            f"over time: {x.name}"
            for x in reading.over_time
            if x.evidence in TOLD and not re.search("|".join((NO_METHOD, *inside)), x.name)
        )
        if re.search(NO_METHOD, reading.name) or reading.evidence not in TOLD:
            continue
        if truth.weak and re.search(truth.weak, reading.name):
            partly = True
            continue
        steps, false = _steps(program, reading)
        good += steps
        beside = beside or (_false_size(program, reading) if steps else "")
        if false and not _at_an_end(program, reading.name, place, len(readings), good):
            bad[false] += 1
    verdict, why = _verdict(program, readings, good, bad, partly)
    if verdict == "right" and beside:
        verdict, why = "part", beside
    return Outcome(program, verdict, why, tuple(_line(r) for r in readings))


def _verdict(
    program: Program, readings: Sequence[Any], good: float, bad: Counter[str], partly: bool
) -> tuple[str, str]:
    states = len(program.method.states)
    need = STEPS - 1 - max(program.method.fills, states if states > 1 else program.axis == "seq")
    if bad:
        why = "; ".join(f"{n} x {name}" for name, n in bad.items())
        return ("part" if good >= need - 1 and bad.total() <= 2 else "wrong"), why
    layers = program.method.name == "plain layer" and all(r.name == "transition" for r in readings)
    if good >= need - 0.01 or layers:  # layers of a plain field are plain layers
        return "right", ""
    return ("part" if good or partly else "unread"), f"{good:.0f} of {STEPS} steps"


def _steps(program: Program, reading: Any) -> tuple[float, str]:
    """How many steps of the program a reading tells of, and what is false in it."""
    truth, name = program.method, reading.name
    composed = re.match(COMPOSED, name)
    if composed and program.layout == "nested" and re.search(truth.names, composed[2] or "forward Euler"):
        return int(composed[1]), ""  # a stage of several blocks was taken for the step
    part = next((k for pattern, k in truth.steps if re.search(pattern, name)), 0.0)
    if (
        program.separable
        and truth.steps
        and re.search(r"^forward Euler, parallel|^damped[_ ]Euler|^diagonal skip", name)
    ):
        part = truth.steps[0][1]
    times = int(found[1]) if (found := re.match(r"(\d+) steps of", name)) else 1
    if part:
        return times / part, ""
    apart = program.separable and truth.name in ONE_STAGE and re.search(r"damped[_ ]Euler|parallel|diagonal skip", name)
    if not (re.search(truth.names, name) or apart):
        return 0, name
    if same_method(reading.method, program) is False and not _is_limit(reading.method, truth):
        return 0, f"{name}: other M(z)"
    return times, ""


def _false_size(program: Program, reading: Any) -> str:
    """What is false in the step size told of a step of one field; 1 is a convention, and h^2 multiplies a force."""
    told, method = reading.step_size, reading.method
    simple = len(program.kinds) == 1 and not program.separable and getattr(method, "n_fields", 1) == 1
    if told is None or not simple or not same_method(method, program) or method.V.shape[0] > len(program.method.states):
        return ""
    size = float(_sizes(*_matrices(method, program), 1, program.h)[0])
    true = (size, 1.0, abs(size) ** 0.5)
    return "" if any(abs(told - h) <= 1e-4 * abs(h) for h in true) else f"h = {told:.4g} told of h = {size:.4g}"


def _at_an_end(program: Program, name: str, place: int, count: int, good: float) -> bool:
    """Whether a name may stand at an end: the history fills, a first step starts from constants, a last is not used."""
    truth = program.method
    if place >= count - 2 and "Verlet" in truth.name and re.search(LAST, name):
        return True
    early = max(truth.fills, len(truth.states) if len(truth.states) > 1 else STEPS)
    return bool(truth.starters) and good == 0 and place <= early and re.search(truth.starters, name) is not None


def _line(reading: Any) -> str:
    over = "".join(f" [over time {x.n_steps}: {x.name}, {x.evidence}]" for x in reading.over_time)
    first, last = reading.steps[0], reading.steps[-1]
    return f"{first}-{last} {reading.name} | h={reading.step_size} | {reading.evidence}{over}"


# ---------------------------------------------------------------- M(z)


def same_method(method: Any, program: Program) -> bool | None:
    """Whether a method has the M(z) of the program, each z up to the size of its step; None where none can be told."""
    truth, fields = program.method, list(program.kinds)
    if not truth.linear or program.size == "vector" or not hasattr(method, "stability_matrix"):
        return None
    count, otherwise = getattr(method, "n_fields", 1), None if program.separable else False
    exact, read = _matrices(method, program)
    if count == 1 and len(fields) > 1:  # the fields as one: all at the same z
        return _agree(lambda v: exact(list(v) * len(fields)), read, 1, program.h) or otherwise
    if count != len(fields):
        return otherwise
    orders = itertools.permutations(range(count))
    found = any(_agree(exact, lambda v, o=order: read([v[i] for i in o]), count, program.h) for order in orders)
    return found or otherwise  # a linear term may have been told apart from its field


def _matrices(method: Any, program: Program) -> tuple[Matrix, Matrix]:
    """M of the values of the fields: of the lines of the program, and of the method that was told."""

    def exact(values: Sequence[complex]) -> Any:
        of = dict(zip(program.kinds, values, strict=True))
        return stability_matrix(program.method, program.body, program.h, of).numpy()

    return exact, lambda values: method.stability_matrix(*values)


def _agree(exact: Matrix, read: Matrix, count: int, h: float) -> bool:
    """Whether two M(z) have the same eigenvalues other than 0 at random z, for some constant size of every z."""
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(4, count)) + 1j * rng.normal(size=(4, count))
    signs = itertools.product((1.0, -1.0), repeat=count)
    sizes = [_sizes(exact, read, count, h), *(np.array(sign) * c for sign in signs for c in (h, 1.0))]
    return any(all(_near(_roots(exact(z)), _roots(read(z * size))) for z in samples) for size in sizes)


def _sizes(exact: Matrix, read: Matrix, count: int, h: float) -> Any:
    """The size of each z at which both have the same slope at 0; h where the slope is 0."""
    sizes = []
    for step in 1e-4 * np.eye(count):
        a, b = (_determinant(f(step)) - _determinant(f(-step)) for f in (exact, read))
        sizes.append((a / b).real if abs(b) > 1e-9 else h)
    return np.array(sizes)


def _determinant(matrix: Any) -> complex:
    matrix = np.asarray(matrix, dtype=complex)
    return complex(np.linalg.det(np.eye(len(matrix)) - 0.37 * matrix))


def _roots(matrix: Any) -> Any:
    values = np.linalg.eigvals(np.asarray(matrix, dtype=complex))
    values = values[np.abs(values) > 1e-7]
    return values[np.lexsort((values.imag.round(7), values.real.round(7)))]


def _near(a: Any, b: Any) -> bool:
    if len(b) > len(a):  # a state that is only kept, such as a store of outputs
        b = b[np.abs(b - 1) > 1e-9]
    return len(a) == len(b) and bool(np.abs(a - b).max(initial=0) < 1e-5 * (1 + np.abs(a).max(initial=0)))


def _is_limit(method: Any, truth: Method) -> bool:
    """Whether a method is the implicit one that the iterations of the program come near to."""
    z = (0.3 + 0.4j, -0.7 + 0.2j)
    exact = truth.exact
    return exact is not None and all(abs(complex(method.stability_matrix(x)[0, 0]) - exact(x)) < 1e-6 for x in z)
