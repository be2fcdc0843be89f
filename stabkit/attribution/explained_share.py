"""How much of the measured growth a prediction explains: the share, and of what there is none."""

from __future__ import annotations

from dataclasses import dataclass

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
            are the same and many. ``"persistent"``: the energies of modes carried from step to step, as far as
            neighbouring steps share them (`shared_modes.along_depth`); it holds for all three and in between.
            ``"eigenvalues"``: the same of normal Jacobians with these eigenvalues, without what is not normal.
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
        >>> import torch
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
