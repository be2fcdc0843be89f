"""Reading the blocks of a tableau: what an entry may be, and how the shapes must fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Rational
from typing import Any

import numpy as np

from stabkit.arguments import a
from stabkit.errors import ArgumentError, ArgumentTypeError
from stabkit.integrators.rational_matrices import Matrix
from stabkit.integrators.spectral_radius import FloatArray


def read_block(block: Any, name: str) -> list[list[Any]]:
    """A block as nested lists; an empty A, U or B (no stages) may be given as []."""
    try:
        rows = [list(row) for row in block]
    except TypeError as error:
        raise ArgumentError(f"{name} must be a matrix (nested lists or a 2-D array), found {block!r}") from error
    for row in rows:
        for x in row:
            if isinstance(x, complex) or (isinstance(x, float | np.floating) and not math.isfinite(x)):
                raise ArgumentError(f"{name} holds {x!r}; entries must be finite real numbers or rationals")
    return rows


def block_shapes(s: int, r: int) -> list[tuple[int, int]]:
    """The shapes of A, U, B, V with s stages and r states."""
    return [(s, s), (s, r), (r, s), (r, r)]


def check_shapes(blocks: dict[str, list[list[Any]]]) -> None:
    """Raise ValueError when the blocks A, U, B, V do not fit together."""
    s, r = len(blocks["A"]), len(blocks["V"])
    if r == 0:
        raise ArgumentError("V is empty; a method has at least one state")
    for (name, rows), (m, n) in zip(blocks.items(), block_shapes(s, r), strict=True):
        if name == "B" and s == 0 and not rows:
            rows.extend([] for _ in range(r))
        found = (len(rows), sorted({len(row) for row in rows}))
        if found[0] != m or any(width != n for width in found[1]):
            raise ArgumentError(
                f"{name} has {found[0]} rows of length {found[1]}; with A ({s}, {s}) and V ({r}, {r}) "
                f"it must be ({m}, {n})"
            )


def check_fields(fields: Sequence[int] | None, stages: int) -> tuple[int, ...]:
    """The field of each stage; raises ValueError when the numbers have a gap or the wrong length."""
    out = (0,) * stages if fields is None else tuple(int(f) for f in fields)
    if len(out) != stages or any(f < 0 for f in out):
        raise ArgumentError(f"fields={fields!r} for {stages} stages; give one number for each stage, counted from 0")
    return out


def to_fraction(x: Any) -> Fraction:
    """The exact value of an entry: int, Fraction, string or float."""
    if isinstance(x, str | Rational | float):
        try:
            return Fraction(x)
        except (ValueError, OverflowError) as error:
            raise ArgumentError(f"an entry is {x!r}; expected a finite number, or text such as '1/2'") from error
    try:
        return Fraction(int(x)) if isinstance(x, np.integer) else Fraction(float(x))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"an entry is {a(type(x).__name__)}; expected a number, such as Fraction(1, 2)"
        ) from error


def entry_is_exact(x: Any) -> bool:
    """Whether an entry is meant exactly, and is not a rounded float."""
    # Dyadic numbers such as 0.5 are exact in binary; no rounded irrational has so small a denominator.
    return isinstance(x, str | Rational | np.integer) or to_fraction(x).denominator <= 1024


def entries_are_exact(block: Sequence[Sequence[Any]]) -> bool:
    """Whether every entry of a block is meant exactly."""
    return all(entry_is_exact(x) for row in block for x in row)


def as_floats(block: Matrix, shape: tuple[int, int]) -> FloatArray:
    """The block as a read-only float array."""
    out = np.array([[float(x) for x in row] for row in block], dtype=float).reshape(shape)
    out.setflags(write=False)
    return out
