"""The plane that the eigenvalues of one step are read in: which region they belong to, and where they lie in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stabkit.integrators import GeneralLinearMethod

if TYPE_CHECKING:
    from stabkit.report.schema import StepReport


@dataclass(frozen=True)
class Plane:
    r"""Eigenvalues of a step against a stability region.

    Attributes:
        z: ``(k,)``, complex; not finite where an eigenvalue is not.
        a: the region is the disc \|a + z\| <= 1, unless there is a method.
        method: a one-step method of several stages, with the region \|R(z)\| <= 1; None for the disc.
        margin: distance of the spectrum from the boundary, negative outside; None where it is not known.
        outermost: the eigenvalue that the margin belongs to; None beside a method.
    """

    z: npt.NDArray[np.complex128]
    a: float
    method: GeneralLinearMethod | None = None
    margin: float | None = None
    outermost: complex | None = None


def plane_of(step: StepReport) -> Plane | None:
    """The plane of a step; None when it has no eigenvalues.

    A method with several stages and one field has a stability function R of higher degree. It is drawn with z = h times
    the eigenvalues of the Jacobian of its field, where that was measured. Everything else is drawn in the plane of
    z = eigenvalue of J - a, where the disc says whether a step amplifies a mode, whatever its fields are.

    Example:
        >>> import torch, stabkit
        >>> identity = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(identity.weight)
        >>> plane_of(stabkit.analyze(identity, torch.ones(1, 2)).steps[0]).margin
        0.0
    """
    if step.z is None:
        return None
    z = np.asarray(step.z, dtype=complex)
    a = round(float(step.skip or 0.0), 6)
    method = _method(step)
    if method is not None and step.field_z is not None:
        return Plane(np.asarray(step.field_z[0], dtype=complex), a, method, step.margin)
    known = z[np.isfinite(z)]
    if not len(known):
        return Plane(z, a)
    outermost = complex(known[np.abs(known + a).argmax()])
    return Plane(z, a, None, 1.0 - abs(outermost + a), outermost)


def _method(step: StepReport) -> GeneralLinearMethod | None:
    if step.tableau is None or set(step.stage_fields) != {0} or len(step.stage_fields) < 2:
        return None
    method = _built(*(tuple(map(tuple, step.tableau[name])) for name in ("A", "U", "B", "V")), step.method)
    one_plane = method.states == 1 and method.characteristic.degree > 1
    return method if one_plane else None


@lru_cache(maxsize=64)
def _built(
    A: tuple[tuple[float, ...], ...],
    U: tuple[tuple[float, ...], ...],
    B: tuple[tuple[float, ...], ...],
    V: tuple[tuple[float, ...], ...],
    name: str,
) -> GeneralLinearMethod:
    return GeneralLinearMethod(A, U, B, V, name=name)


def worst(planes: Sequence[Plane]) -> int | None:
    """The place of the plane with the smallest margin; None when no margin is known."""
    margins = [math.inf if p.margin is None or math.isnan(p.margin) else p.margin for p in planes]
    return int(np.argmin(margins)) if min(margins, default=math.inf) < math.inf else None
