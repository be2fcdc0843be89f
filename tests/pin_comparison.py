"""Two records of pinned numbers beside each other: what differs, and by how much."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

SETS = {"z", "eigenvalues", "values"}  # (..., n, 2): complex numbers in no order


ROUNDING = {"residual", "residuals", "closing_error", "chain_error", "error_bounds", "error_bound", "volume_errors"}


TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


NOISE = {"float64": 1e-9, "float32": 1e-4}


@dataclasses.dataclass(frozen=True)
class Difference:
    """A field that is not what it was; ``relative`` is infinite where there is no number to tell by how much."""

    model: str
    place: str
    relative: float
    old: Any
    new: Any

    @property
    def field(self) -> str:
        """The place without its indices: what all models and steps have in common."""
        return re.sub(r"\[\d+\]|\.step \d+", "", self.place)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How the fields of one model are compared."""

    model: str
    dtype: str

    def differences(self, old: Any, new: Any, place: str) -> Iterator[Difference]:
        """All that differs at a place and below it."""
        if isinstance(old, dict) and isinstance(new, dict):
            yield from self._of_mappings(old, new, place)
        elif isinstance(old, str) and isinstance(new, str):
            if not self._same_text(old, new):
                yield Difference(self.model, place, math.inf, old, new)
        elif (arrays := (_array(old), _array(new)))[0] is not None and arrays[1] is not None:
            yield from self._of_arrays(*arrays, place)
        elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            for index, (a, b) in enumerate(zip(old, new, strict=True)):
                yield from self.differences(a, b, f"{place}[{index}]")
        elif old != new:
            yield Difference(self.model, place, math.inf, _short(old), _short(new))

    def _of_mappings(self, old: dict[str, Any], new: dict[str, Any], place: str) -> Iterator[Difference]:
        for key in old.keys() - new.keys():
            yield Difference(self.model, f"{place}.{key}", math.inf, _short(old[key]), "missing")
        for key in new.keys() - old.keys():
            yield Difference(self.model, f"{place}.{key}", math.inf, "missing", _short(new[key]))
        moved = _matched(old, new)
        for key in old:
            if key in new:
                yield from self.differences(old[key], moved.get(key, new[key]), f"{place}.{key}")

    def _of_arrays(self, old: np.ndarray, new: np.ndarray, place: str) -> Iterator[Difference]:
        if old.shape != new.shape:
            yield Difference(self.model, place, math.inf, f"shape {old.shape}", f"shape {new.shape}")
            return
        relative = self._relative(old, new, place)
        if relative.size and (worst := float(relative.max())) > TOLERANCE[self.dtype]:
            at = np.unravel_index(int(relative.argmax()), relative.shape)
            yield Difference(self.model, place, worst, float(old[at]), float(new[at]))

    def _relative(self, old: np.ndarray, new: np.ndarray, place: str) -> np.ndarray:
        with np.errstate(all="ignore"):
            same = (old == new) | (np.isnan(old) & np.isnan(new))
            finite = np.isfinite(old) & np.isfinite(new)
            size = np.abs(old)[np.isfinite(old)]
            scale = max(float(size.max()) if size.size else 0.0, TOLERANCE[self.dtype] * 1e-2)
            found = np.abs(old - new) / np.maximum(scale, np.maximum(np.abs(old), np.abs(new)))
        if place.rpartition(".")[2] in ROUNDING:
            same |= (np.abs(old) < NOISE[self.dtype]) & (np.abs(new) < NOISE[self.dtype])
        return np.where(same, 0.0, np.where(finite, found, math.inf))

    def _same_text(self, old: str, new: str) -> bool:
        if old == new:
            return True
        if _NUMBER.sub("#", old) != _NUMBER.sub("#", new):
            return False
        pairs = zip(_NUMBER.findall(old), _NUMBER.findall(new), strict=True)
        return all(a == b or max(abs(float(a)), abs(float(b))) < NOISE[self.dtype] for a, b in pairs)


_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?")


def _array(value: Any) -> np.ndarray | None:
    """Numbers in nested lists as an array; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        found = np.array(value)
    except ValueError:  # lists of several lengths
        return None
    return found.astype(float) if found.dtype.kind in "fiub" else None


def _matched(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new eigenvalues, and what is given of each of them, in the order of the old."""
    moved: dict[str, Any] = {}
    if old.get("kind") == "singular values":
        return moved  # which are in order
    for key in SETS & old.keys() & new.keys():
        a, b = _array(old[key]), _array(new[key])
        if a is None or b is None or a.shape != b.shape or a.ndim < 2 or a.shape[-1] != 2 or not a.size:
            continue
        rows, count = a.shape[:-2], a.shape[-2]
        flat = np.nan_to_num(a.reshape(-1, count, 2)), np.nan_to_num(b.reshape(-1, count, 2))
        orders = [
            linear_sum_assignment(np.linalg.norm(p[:, None] - q[None], axis=-1))[1] for p, q in zip(*flat, strict=True)
        ]
        for name in new:
            other = _array(new[name])
            if name != key and (other is None or other.ndim < 1 or other.shape != (*rows, count)):
                continue
            parts = other.reshape(-1, count, *other.shape[len(rows) + 1 :])
            moved[name] = (
                np.stack([part[order] for part, order in zip(parts, orders, strict=True)]).reshape(other.shape).tolist()
            )
    return moved


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def compare(old: dict[str, Any], new: dict[str, Any], everything: bool) -> list[Difference]:
    """What differs between two measurements; models of only one of them too, where all were measured."""
    found: list[Difference] = []
    for model in old.keys() | new.keys():
        if model in old and model in new:
            how = Comparison(model, old[model]["dtype"])
            for analyzer in old[model].keys() | new[model].keys():
                if analyzer in old[model] and analyzer in new[model]:
                    found += how.differences(old[model][analyzer], new[model][analyzer], analyzer)
                elif everything:
                    states = ["there" if analyzer in side[model] else "missing" for side in (old, new)]
                    found.append(Difference(model, analyzer, math.inf, *states))
        elif everything:
            states = ["there" if model in side else "missing" for side in (old, new)]
            found.append(Difference(model, "model", math.inf, *states))
    return found


def table(differences: list[Difference]) -> str:
    """A line per field, with how many places differ in it and the worst of them."""
    fields: dict[str, list[Difference]] = {}
    for difference in differences:
        fields.setdefault(difference.field, []).append(difference)
    lines = []
    for name in sorted(fields):
        worst = max(fields[name], key=lambda d: d.relative)
        models = sorted({d.model for d in fields[name]})
        lines.append(f"{name}: {len(fields[name])} places in {len(models)} models ({', '.join(models[:6])})")
        size = "" if math.isinf(worst.relative) else f", relative {worst.relative:.1e}"
        lines.append(f"    worst {worst.model} {worst.place}{size}")
        lines.append(f"    old {_short(worst.old)}")
        lines.append(f"    new {_short(worst.new)}")
    return "\n".join(lines)
