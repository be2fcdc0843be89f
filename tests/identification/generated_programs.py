"""Programs drawn from a seed: the product of independent choices of method, field, axis and idiom."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.identification.generated_fields import ACTS, FIELDS, SEPARABLE
from tests.identification.generated_methods import METHODS, Method

STEPS = 6
LAYOUTS = {
    "own": ("sequential", "nested", "modulelist", "inline", "helper"),
    "shared": ("sequential", "modulelist", "inline", "helper", "solver", "prealloc"),
    "seq": ("modulelist", "inline", "helper", "solver", "prealloc"),
    "grid": ("inline", "helper", "solver", "odeint", "prealloc"),
}
PACKED = ("tuple", "dict", "cat", "slices", "stack")
LEARNED = ("learned", "vector", "softplus")


@dataclass(frozen=True)
class Program:
    """The choices that make a program.

    Attributes:
        seed: what it was drawn from.
        method: the method of one step.
        spelling: how the step is written.
        axis: ``own`` or ``shared`` weights over depth, ``seq`` a sequence of inputs, ``grid`` a grid of times.
        layout: what holds the steps: modules in a row, a loop in ``forward``, a helper function, a solver, ...
        state: how a state of several parts goes from step to step.
        size: how the step size is written.
        h: the step size.
        kinds: the kind of every field by its name.
        shape: the shape of the state.
        act: the activation of the fields.
        returns: what a field gives back.
        drive: how an input enters the fields.
        start: what the first state over a sequence is.
        call: whether a field is called as a module or by a method of its own.
        ends: whether a stem and a head stand around the steps.
        output: the last state, or all of them.
        order: whether the batch or the time comes first.
        entry: what a user calls, ``stabkit.trace`` or ``stabkit.recurrent_flow``.
    """

    seed: int
    method: Method
    spelling: str
    axis: str
    layout: str
    state: str
    size: str
    h: float
    kinds: dict[str, str]
    shape: str
    act: str
    returns: str
    drive: str
    start: str
    call: str
    ends: str
    output: str
    order: str
    entry: str

    @property
    def body(self) -> str:
        """The lines of one step."""
        return self.method.bodies[self.spelling]

    @property
    def tag(self) -> str:
        """Whether its steps run over time or over depth."""
        return "depth" if self.axis in ("own", "shared") else "time"

    @property
    def takes(self) -> str:
        """What the fields take beside the state: an input ``u``, the time ``t``, or nothing."""
        return "u" if self.axis == "seq" else "t" if self.shape == "time" or self.layout == "odeint" else ""

    @property
    def separable(self) -> bool:
        """Whether a field has a term that a reader may tell apart from the rest of it."""
        return any(kind.startswith(SEPARABLE) for kind in self.kinds.values())

    @property
    def choices(self) -> dict[str, str]:
        """What was chosen, by the name of the choice."""
        names = ("spelling", "axis", "layout", "state", "size", "returns", "drive", "start", "call", "ends", "output")
        field = next(iter(self.kinds.values()), "none")
        return {
            "method": self.method.name,
            "field": field,
            **{name: getattr(self, name) for name in (*names, "order", "entry")},
        }


def _layouts(method: Method, axis: str, size: str) -> list[str]:
    """Where a method can stand: its own parameters need a module for the step, its lists a place before the loop."""
    private = bool(method.setup) or size in LEARNED
    return [
        layout
        for layout in LAYOUTS[axis]
        if not (private and (layout in ("helper", "odeint") or (layout == "inline" and axis == "own")))
        and not (method.layouts and layout not in method.layouts)
        and not (layout == "prealloc" and not set(method.init or ()) <= set(method.states))
    ]


def draw(seed: int) -> Program:
    """The program of a seed."""
    rng = random.Random(seed)
    axis = rng.choice(("own", "shared", "seq", "grid"))
    method = rng.choice([m for m in METHODS if axis in m.axes])
    spelling = rng.choice(list(method.bodies))
    body = method.bodies[spelling]
    used = [f for f in method.fields if f"@{f}" in body]
    learnable = spelling == "lines" and len(method.sizes) == 4 and "math" not in body
    size = rng.choice((*method.sizes, *(LEARNED if learnable else ())))
    layout = rng.choice(_layouts(method, axis, size))
    size = "const" if layout == "odeint" and method.sizes != ("one",) else size

    vector = axis == "seq" or method.name.startswith("linear rec")
    shape = "vector" if vector else rng.choice(("vector", "vector", "map", "tokens"))
    shape = "time" if axis == "grid" and rng.random() < 0.5 else shape
    size = "learned" if shape == "time" and size == "vector" else size  # a time for each entry is no time
    fitting = [k for k, (s, *_) in FIELDS.items() if s == shape and not (axis == "seq" and k == "energy gradient")]
    if method.name == "plain layer":
        fitting = [k for k in fitting if not k.startswith("linear term")]
    field = rng.choice(fitting)
    kinds = dict(zip(used, [field, *(rng.choice(fitting) for _ in used[1:])], strict=False))

    act = rng.choice(list(ACTS))
    returns = rng.choice(("tensor",) * 6 + ("tuple", "dict"))
    drive = rng.choice(("added", "concatenated", "gated", "projected before")) if axis == "seq" else "none"
    drive = "added" if drive == "projected before" and not used else drive
    call = rng.choice(("module", "module", "method"))
    start = rng.choice(("zeros", "zeros", "learned", "encoded")) if axis == "seq" else "input"
    if drive == "gated" and any(kind.startswith("linear term") for kind in (field, *kinds.values())):
        drive = "added"  # an input that scales a linear term makes a gate of it
    ends = rng.choice(("stem and head", "stem and head", "bare"))
    in_a_row = layout in ("sequential", "nested")
    output = "last" if in_a_row else rng.choice(("last", "stack"))
    order = rng.choice(("batch first", "time first")) if axis == "seq" else "batch first"
    entry = rng.choice(("trace", "trace", "recurrent_flow")) if axis == "seq" else "trace"
    state = "vars"
    if len(method.states) > 1 and layout != "prealloc":
        plain = "None" in (method.init or {}).values() or method.name == "complex recurrence"
        state = rng.choice(PACKED if in_a_row else ("vars", "vars", "vars", *(() if plain else PACKED)))
        state = "cat" if state == "slices" and shape == "map" else state
    h = {"one": 1.0, "depth": 1 / STEPS}.get(size, rng.choice((0.1, 0.2, 0.25, 0.3)))
    return Program(
        seed, method, spelling, axis, layout, state, size, h, kinds, shape, act, returns, drive, start, call, ends,
        output, order, entry,
    )  # fmt: skip
