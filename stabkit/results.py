"""What every result has in common: plain data, JSON, and a picture.

A result is a frozen dataclass that derives from `Result`. Its fields are what was measured; ``to_dict`` gives them as
data that ``json.dumps(..., allow_nan=False)`` takes, in one encoding for the whole package: a float that is not finite
becomes the string ``"NaN"``, ``"Infinity"`` or ``"-Infinity"`` (RFC 8259 has no such numbers, and ``float`` reads all
three back), a complex number becomes ``[re, im]``, an array or a tensor nested lists, an absent value ``null``.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from stabkit.errors import ArgumentTypeError, StabkitError
from stabkit.pictures import PICTURES, default_picture, drawing
from stabkit.text import shows_printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Result:
    """Base of all results.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Fit(Result):
        ...     slope: float
        ...     errors: np.ndarray
        >>> Fit(float("nan"), np.array([1.0, 2.0])).to_dict()
        {'slope': 'NaN', 'errors': [1.0, 2.0]}
    """

    def __init_subclass__(cls) -> None:
        """Names that come from a model or a file reach a terminal through the text of a result."""
        if "__str__" in vars(cls):
            cls.__str__ = shows_printable(vars(cls)["__str__"])  # type: ignore[method-assign]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for strict JSON; see `stabkit.results` for how numbers are written."""
        return {name: encode(value) for name, value in self._contents().items()}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the result on ``ax``, or on a new figure.

        Raises:
            StabkitError: there is no picture of results of this kind.
        """
        name = default_picture(type(self))
        if name is None:
            drawn = dict.fromkeys(shown for draws in PICTURES.values() for shown in draws)
            raise StabkitError(f"there is no picture of a {type(self).__name__}; there is one of: {', '.join(drawn)}")
        axes: Axes = drawing(name)(self, ax)
        return axes

    def _contents(self) -> dict[str, Any]:
        """What ``to_dict`` holds by name: the fields, where a subclass does not add to them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def _repr_html_(self) -> str:
        """The text, for a notebook."""
        return f"<pre>{html.escape(str(self))}</pre>"


def encode(value: Any, default: Callable[[Any], Any] | None = None) -> Any:
    """A value as plain JSON data.

    Args:
        value: None, bool, int, float, complex, str, a numpy scalar or array, a torch tensor, a result or another
            dataclass, or a mapping, list or tuple of these.
        default: what stands for a part of any other type, such as ``repr``; such a part is refused where it is None.

    Raises:
        ArgumentTypeError: some part of ``value`` is of another type, and there is no ``default``.

    Example:
        >>> encode({"z": (1 + 2j, float("nan")), "sizes": np.array([3, 4])})
        {'z': [[1.0, 2.0], 'NaN'], 'sizes': [3, 4]}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _name(value)
    if isinstance(value, complex):
        return [encode(value.real), encode(value.imag)]
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): encode(item, default) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item, default) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name), default) for field in dataclasses.fields(value)}
    if isinstance(value, np.generic | np.ndarray) or hasattr(value, "detach"):  # a tensor: this module knows no torch
        return encode(value.tolist())
    if default is not None:
        return default(value)
    raise ArgumentTypeError(
        f"a result cannot hold a {type(value).__name__}; accepted: numbers, strings, None, numpy arrays, tensors, "
        "dataclasses, and mappings or sequences of these"
    )


def _name(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
