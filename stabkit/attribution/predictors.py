"""What growth a spectrum predicts, beside the growth that was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.results import Result

_CANCELLED = 0.05  # a total this far below the sum of its absolute parts has no meaningful share


@dataclass(frozen=True)
class Prediction(Result):
    """A predictor of growth against the measurement, over the steps where both are finite; means over samples.

    Attributes:
        name: ``"spectral"``: 1/2 log mean |R(z)|^2, what the stability function says of a cotangent spread evenly
            over the modes of a normal branch. ``"isotropic"``: 1/2 log(|J|_F^2 / d), the same with the non-normal
            term; right where successive Jacobians are unrelated. ``"frozen"``: log max |R(z)|, right where they
            are the same. ``"persistent"``: log max |a + sqrt(c) (eig(J) - a)| with c the cosine of neighbouring
            Jacobians, or the isotropic rate where that is larger; right in between.
        per_step: ``(steps,)``, nats; NaN where there is none.
        predicted: sum over those steps, nats.
        measured: sum of the measured growth over the same steps, nats.
        share: predicted / measured; None where the growth of the steps cancels to less than 5 % of its absolute sum.
        explained_variation: 1 - sum (measured - predicted)^2 / sum measured^2 over steps: 1 where every step's growth
            is predicted, 0 where predicting no growth is as good, negative where it is better.
        steps: how many steps were compared.
    """

    name: str
    per_step: Tensor
    predicted: float
    measured: float
    share: float | None
    explained_variation: float | None
    steps: int


def compare(name: str, predicted: Tensor, measured: Tensor) -> Prediction:
    """Hold a predictor against the measurement.

    Args:
        name: the name of the predictor.
        predicted: ``(steps, samples)``, nats.
        measured: ``(steps, samples)``, nats.

    Example:
        >>> same = compare("isotropic", torch.tensor([[0.1], [0.3]]), torch.tensor([[0.2], [0.3]]))
        >>> round(same.share, 3), round(same.explained_variation, 3)
        (0.8, 0.923)
    """
    p, m = predicted.mean(1), measured.mean(1)
    both = p.isfinite() & m.isfinite()
    total, absolute = float(m[both].sum()), float(m[both].abs().sum())
    sizes = float(m[both].square().sum())
    forecast = float(p[both].sum())
    return Prediction(
        name=name,
        per_step=p,
        predicted=forecast,
        measured=total,
        share=forecast / total if absolute > 0 and abs(total) >= _CANCELLED * absolute else None,
        explained_variation=1 - float((m - p)[both].square().sum()) / sizes if sizes > 0 else None,
        steps=int(both.sum()),
    )


def persistent_rate(values: Tensor, a: float, cosine: float, isotropic: Tensor) -> Tensor:
    """The larger of the isotropic rate and that of the part of the Jacobian that neighbouring steps share.

    With B_l = sqrt(c) B + sqrt(1 - c) B'_l, B the same in every step and B'_l independent, a cotangent settles on the
    leading mode of a I + sqrt(c) B unless the independent part spreads it faster than that mode grows. Derived and
    measured here for Gaussian, antisymmetric and symmetric branches; no literature value is quoted.

    Args:
        values: ``(samples, k)``, eigenvalues of J; exact zeros (masked coordinates) and NaN do not count. Where they
            are the outer ones only, the rate is a lower bound.
        a: the skip.
        cosine: c of the step with its neighbours.
        isotropic: ``(samples,)``.
    """
    if math.isnan(cosine):
        return torch.full_like(isotropic, math.nan)
    shared = (a + math.sqrt(max(cosine, 0.0)) * (values - a)).abs()
    shared = torch.where((values == 0) | ~values.isfinite(), torch.zeros_like(shared), shared)
    return torch.maximum(isotropic, shared.amax(1).log())
