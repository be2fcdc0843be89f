"""How much an error in one stage can grow within the stability region."""

from __future__ import annotations

import math

import numpy as np

from stabkit.integrators.general_linear import GeneralLinearMethod


def maximum_internal_amplification(method: GeneralLinearMethod) -> float | None:
    """The largest max_j |Q_j(z)| over the stability region, found on its boundary; None when that is unbounded.

    Source: D. I. Ketcheson, L. Loczi, M. Parsani, SIAM J. Numer. Anal. 52 (2014) 2226-2249.

    Args:
        method: a method with a bounded region; Q is then analytic inside and largest on the boundary.

    Example:
        >>> from stabkit import integrators
        >>> round(maximum_internal_amplification(integrators.named("midpoint")), 3)  # max |z| over the region
        2.197
    """
    region = method.region()
    if not region.is_bounded or not method.is_explicit or not method.stages:
        return None
    values = [method.internal_amplification(curve.points).max() for curve in region.curves if len(curve.points)]
    real = method.real_interval()  # often the extreme point, and between samples of the boundary
    if math.isfinite(real):
        values.append(method.internal_amplification(np.array([-real + 0j])).max())
    return float(max(values))
