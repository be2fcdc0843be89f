"""What public functions accept, by the annotation and the name of an argument: checked before work begins.

A number given as text, a seed that is None or a plot of something else would fail deep inside, in the words of torch or
numpy. The kinds are read off the annotations; bounds and words stand here once for all functions, since an argument of
one name means the same everywhere.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Complex, Integral, Real
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

from stabkit.errors import ArgumentError, ArgumentTypeError, did_you_mean

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Bounds:
    """Between what a number may lie; None where there is no bound.

    Attributes:
        least: the smallest accepted.
        most: the largest accepted.
        above: accepted is only what is larger.
        below: accepted is only what is smaller.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __str__(self) -> str:
        """The bounds in words, with a leading comma, or nothing."""
        words = [
            f"{word} {value:g}"
            for word, value in (
                ("at least", self.least),
                ("more than", self.above),
                ("at most", self.most),
                ("less than", self.below),
            )
            if value is not None and abs(value) < _FAR
        ]
        return ", " + " and ".join(words) if words else ""

    def hold(self, value: float) -> bool:
        """Whether a number lies within."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


_FAR = 2**63  # a bound that needs no words: nobody means to go there
_ANY = Bounds()
_COUNT = Bounds(least=1)
_SHARE = Bounds(above=0, below=1)
BOUNDS: Mapping[str, Bounds] = {
    "seed": Bounds(least=-_FAR, below=_FAR),  # what torch's generators take
    "probes": _COUNT,
    "samples": _COUNT,
    "spectrum_samples": _COUNT,
    "own": Bounds(least=0),
    "krylov": Bounds(least=0),
    "dense_limit": Bounds(least=0),
    "max_products": _COUNT,
    "max_passes": _COUNT,
    "max_power": _COUNT,
    "angles": _COUNT,
    "size": _COUNT,
    "n_steps": _COUNT,
    "rounds": _COUNT,
    "trials": Bounds(least=0),
    "discard": Bounds(least=0),
    "confidence": _SHARE,
    "tol": Bounds(above=0, below=1),
    "tolerance": Bounds(least=0),
    "width": _COUNT,
    "depth": _COUNT,
    "pairs": _COUNT,
    "steps": _COUNT,
    "along": Bounds(least=2),
    "panels": _COUNT,
    "resolution": Bounds(least=2),
}
WORDS: Mapping[str, str] = {  # what is expected, where the kind alone does not say what to give
    "loss": "a function of the model's output that returns a scalar, e.g. loss=lambda out: out.square().mean()",
    "start": "a tensor, such as vector of an earlier result, or None",
    "blocks": "a list of paths of modules, e.g. ['blocks.0', 'blocks.1'], or None",
    "batches": "pairs of inputs and targets, such as a DataLoader, or None",
    "module": (
        "nn.RNN, nn.LSTM, nn.GRU, a cell, or a module that calls cells in a loop. For a function of a state and an "
        "input use stabkit.iterate(f, x0, n_steps, inputs=...)"
    ),
    "sources": "a list of paths, e.g. ['run/1.pt', 'run/2.pt']",
}
_MADE_BY = {  # where results come from; those that only type checkers import are known by these names
    "AlignmentIndex": "stabkit.growth.alignment_index",
    "Attribution": "stabkit.attribute",
    "Comparison": "stabkit.compare",
    "CovariantVectors": "stabkit.growth.covariant_vectors",
    "ExponentField": "stabkit.growth.exponent_field",
    "FiniteTimeExponents": "stabkit.finite_time_exponents",
    "GradientProfile": "stabkit.gradient_profile",
    "Jacobian": "step.jacobian()",
    "LinearStability": "stabkit.integrators.named",
    "NonNormality": "stabkit.non_normality",
    "Report": "stabkit.analyze",
    "SingularValueDensity": "stabkit.jacobians.singular_value_density",
    "Thresholds": "stabkit.diagnosis.Thresholds(...)",
}
_REFUSED = object()


@dataclass(frozen=True)
class _Kind:
    """One kind of value: how one is taken, which gives `_REFUSED` where it is none, and what it is called."""

    take: Callable[[Any], Any]
    words: str


def accepts(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose arguments are checked by their annotations before it runs.

    Numbers, text, mappings, sequences, functions and objects of classes are checked, numbers against the bounds that
    `BOUNDS` has for the name; what is annotated as anything, or by an alias, is left to the function. numpy's numbers
    count as Python's, and are handed on as those. Classes that only type checkers import are compared by name, so that
    what draws a result need not import what makes it.

    Raises:
        ArgumentTypeError: at the call, an argument is missing, unknown or of another kind.
        ArgumentError: at the call, a number is out of its bounds.

    Example:
        >>> import numpy as np
        >>> @accepts
        ... def take(probes: int = 4) -> int:
        ...     return probes
        >>> take(np.int64(2))
        2
        >>> take("3")
        Traceback (most recent call last):
        stabkit.errors.ArgumentTypeError: probes='3' is a str; expected a whole number, at least 1
    """
    signature = inspect.signature(function)

    @functools.cache
    def kinds() -> dict[str, list[_Kind]]:  # at the first call, when all names of the module are known
        every = signature.parameters.values()
        single = [one for one in every if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        found = {one.name: list(_kinds_of(str(one.annotation), inspect.unwrap(function).__globals__)) for one in single}
        return {
            name: [kind for kind in kinds if kind is not None] for name, kinds in found.items() if None not in kinds
        }

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = _bound(function, signature, args, kwargs)
        for name, accepted in kinds().items():
            if name in bound.arguments and bound.arguments[name] is not signature.parameters[name].default:
                bound.arguments[name] = _taken(name, bound.arguments[name], accepted)
        return function(*bound.args, **bound.kwargs)

    return checked


def a(noun: str) -> str:
    """A noun with its article.

    Example:
        >>> a("int"), a("Report")
        ('an int', 'a Report')
    """
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _bound(
    function: Callable[..., Any], signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        guess = did_you_mean(unknown[1], signature.parameters) if unknown else ""
        raise ArgumentTypeError(f"{function.__qualname__.removesuffix('.__init__')}: {error}{guess}") from None


def _taken(name: str, value: Any, kinds: list[_Kind]) -> Any:
    """A value as one of several kinds.

    Raises:
        ArgumentTypeError: it is none of them.
        ArgumentError: it is a number out of bounds.
    """
    bounds = BOUNDS.get(name, _ANY)
    for kind in kinds:
        taken = kind.take(value)
        if taken is _REFUSED:
            continue
        plain = isinstance(taken, int | float) and not isinstance(taken, bool)
        if plain and (math.isnan(taken) or not bounds.hold(taken)):
            raise ArgumentError(f"{name}={value!r}; expected {kind.words}{bounds}")
        return taken
    shown = f"={value!r}" if isinstance(value, str | bytes | float | int | None) else ""
    each = [f"{kind.words}{bounds if kind in (_WHOLE, _NUMBER) else ''}" for kind in kinds]
    words = WORDS.get(name, " or ".join(each))
    raise ArgumentTypeError(f"{name}{shown} is {a(type(value).__name__)}; expected {words}")


def _kinds_of(annotation: str, names: Mapping[str, Any]) -> Iterator[_Kind | None]:
    """The kinds that an annotation names; None where it says nothing that could be checked."""
    for part in re.sub(r"\[.*\]", "", annotation).split("|"):
        word = part.strip()
        if word in _KINDS:
            yield _KINDS[word]
        else:
            yield from _by_name(word, names)


def _by_name(word: str, names: Mapping[str, Any]) -> Iterator[_Kind | None]:
    """The kinds of what a name of a module stands for."""
    first, *rest = word.split(".")
    found = names.get(first)
    for attribute in rest:
        found = getattr(found, attribute, None)
    if found is None:
        yield _named(word) if word in _MADE_BY else None
    else:
        yield from _of_type(found)


def _of_type(found: Any) -> Iterator[_Kind | None]:
    """The kinds of a class, of a protocol, by the names of its members, and of an alias, by what it stands for."""
    origin = get_origin(found) or found
    if origin in (Union, UnionType):
        for part in get_args(found):
            yield from _of_type(part)
    elif origin is NoneType or getattr(origin, "__name__", "") in _KINDS:
        yield _KINDS["None" if origin is NoneType else origin.__name__]
    elif getattr(origin, "_is_protocol", False):
        members = sorted(name for name in {*vars(origin), *getattr(origin, "__annotations__", ())} if name[0] != "_")
        words = f"an object with {' and '.join(members)}"
        yield _Kind(lambda value: value if all(hasattr(value, name) for name in members) else _REFUSED, words)
    elif isinstance(origin, type):
        yield _Kind(lambda value: value if isinstance(value, origin) else _REFUSED, a(_public_name(origin)))
    else:
        yield None


def _named(*names: str, words: str = "") -> _Kind:
    """Objects of classes of these names, or of classes that are made of them."""

    def take(value: Any) -> Any:
        return value if any(base.__name__ in names for base in type(value).__mro__) else _REFUSED

    return _Kind(take, words or " or ".join(a(_with_maker(name)) for name in names))


def _public_name(kind: type) -> str:
    """How a class is written by those who import its package: ``torch.nn.Module``."""
    parts = kind.__module__.split(".")
    if parts[0] in ("builtins", "stabkit"):
        return _with_maker(kind.__name__)
    for end in range(1, len(parts)):  # the shortest that has it
        path = ".".join(parts[:end])
        if getattr(sys.modules.get(path), kind.__name__, None) is kind:
            return f"{path}.{kind.__name__}"
    return kind.__name__


def _with_maker(name: str) -> str:
    return name + (f" ({_MADE_BY[name]})" if name in _MADE_BY else "")


def _single(value: Any) -> Any:
    """What a tensor or an array of no dimension holds; anything else as it is."""
    holds = getattr(value, "ndim", None) == 0 and hasattr(value, "item") and not getattr(value, "is_meta", False)
    return value.item() if holds else value


def _whole(value: Any) -> Any:
    value = _single(value)
    return _REFUSED if isinstance(value, bool) or not isinstance(value, Integral) else int(value)


def _number(value: Any) -> Any:
    value = _single(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return _REFUSED
    return int(value) if isinstance(value, Integral) else float(value)


def _truth(value: Any) -> Any:
    value = _single(value)
    return bool(value) if isinstance(value, Integral) and value in (0, 1) else _REFUSED


def _text(value: Any) -> Any:
    return value if isinstance(value, str) else _REFUSED


def _mapping(value: Any) -> Any:
    return value if isinstance(value, Mapping) and all(isinstance(key, str) for key in value) else _REFUSED


def _sequence(value: Any) -> Any:
    listed = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    return value if listed and not isinstance(value, str | bytes | Mapping) else _REFUSED


_FLOW = _named(
    *("Flow", "Iteration"),
    words="what stabkit.trace, stabkit.recurrent_flow or stabkit.iterate returns, such as stabkit.trace(model, x)",
)
_WHOLE = _Kind(_whole, "a whole number")
_NUMBER = _Kind(_number, "a number")
_KINDS: Mapping[str, _Kind | None] = {
    "Any": None,
    "object": None,
    "tuple": None,
    "Flow": _FLOW,
    "FlowLike": _FLOW,
    "int": _WHOLE,
    "complex": _Kind(lambda value: value if isinstance(value, Complex) else _REFUSED, "a complex number"),
    "float": _NUMBER,
    "bool": _Kind(_truth, "True or False"),
    "str": _Kind(_text, "text"),
    "None": _Kind(lambda value: value if value is None else _REFUSED, "None"),
    "Mapping": _Kind(_mapping, "a mapping of names, such as a dict"),
    "Sequence": _Kind(_sequence, "a list"),
    "Callable": _Kind(lambda value: value if callable(value) else _REFUSED, "a function"),
}
