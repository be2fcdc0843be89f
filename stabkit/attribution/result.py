"""The result of an attribution: terms per step and sample, their sums over depth, and how well they predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stabkit.attribution.explained_share import Prediction
from stabkit.attribution.mechanism import Mechanism
from stabkit.attribution.persistence import Persistence
from stabkit.results import Result

if TYPE_CHECKING:
    import pandas

#: columns that are measured or computed per step and sample, in the order of tables
COLUMNS = (
    "growth",
    "spectral",
    "non_normal",
    "alignment",
    "transition",
    "isotropic",
    "mask",
    "norm",
    "skip",
    "dissipation",
    "branch",
    "frozen",
    "volume",
    "closing_error",
)


@dataclass(frozen=True, eq=False)
class Attribution(Result):
    """Measured log growth of the gradient as a sum of named terms, per step and sample, in nats.

    Every tensor is ``(steps, samples)``, float64 on the CPU. ``growth = spectral + non_normal + alignment`` for a step
    that keeps its space, ``growth = transition + alignment`` for one that changes it (spectral and non_normal are NaN:
    a rectangular matrix has no eigenvalues), and the sum of all four for one that appends to its source (DenseNet).
    A second split cuts the same pie another way: ``spectral + non_normal = isotropic = mask + norm + skip +
    dissipation + branch`` where the skip was read.

    Attributes:
        growth: as measured, ``gradient_profile(flow, loss, seed=seed).log_growth``, with four probes where there is no
            loss; behind a step that passes nothing back, that of cotangents drawn anew.
        spectral: 1/2 log mean |eig(J)|^2, the stability function over the spectrum, weighted by energy.
        non_normal: 1/2 log(|J|_F^2 / sum |eig(J)|^2), never negative.
        alignment: what the actual cotangent's direction adds to the isotropic rate; near 0 for a random one.
        transition: where a step changes the space, its isotropic rate 1/2 log(|J|_F^2 / m), or for a concatenation the
            log of the share of the gradient that stays with the source; 0 for other steps.
        isotropic: 1/2 log(|J|_F^2 / m), m the size of the target.
        mask: what activations behind the addition, or at the end of a plain layer, take of the isotropic rate: 1/2 log
            of the active fraction for a ReLU.
        norm: what norms there do to it.
        skip: log |a|.
        dissipation: first order of the branch, 2 a <T, T B> against |J|_F^2, shared out in nats.
        branch: its second order, |T B|_F^2.
        frozen: log max |eig(J)|.
        volume: mean log |eig(J)| = log |det J| / d; NaN without a full spectrum.
        closing_error: |J^T g| from the matrix against the growth that was measured, in nats; NaN without a matrix.
        spectral_interval: ``(steps, samples, 2)``; both ends equal where the spectrum is complete.
        isotropic_interval: ``(steps, samples, 2)``; non_normal and alignment follow from the two.
        methods: per step ``"dense"``, ``"estimated"`` or ``"none"`` (values that are not finite).
        names: the names of the steps.
        module_paths: the module paths of the steps.
        kinds: ``"step"`` or ``"transition"``.
        mechanisms: one per step.
        persistence: how alike successive steps are.
        predictions: ``"spectral"``, ``"isotropic"``, ``"frozen"``, ``"persistent"`` and ``"eigenvalues"`` against the
            measurement, over steps that keep their space.
        restarts: as in the gradient profile.
        loss: what was differentiated, in words.
        seed: the seed of every random choice.
        confidence: the confidence level of the intervals.
        notes: per step, what the reader should know.
    """

    growth: Tensor
    spectral: Tensor
    non_normal: Tensor
    alignment: Tensor
    transition: Tensor
    isotropic: Tensor
    mask: Tensor
    norm: Tensor
    skip: Tensor
    dissipation: Tensor
    branch: Tensor
    frozen: Tensor
    volume: Tensor
    closing_error: Tensor
    spectral_interval: Tensor
    isotropic_interval: Tensor
    methods: tuple[str, ...]
    names: tuple[str, ...]
    module_paths: tuple[str, ...]
    kinds: tuple[str, ...]
    mechanisms: tuple[Mechanism, ...]
    persistence: Persistence
    predictions: dict[str, Prediction]
    restarts: tuple[int, ...]
    loss: str
    seed: int
    confidence: float
    notes: tuple[tuple[str, ...], ...]

    @property
    def explained(self) -> float | None:
        """Share of the total growth that the stability function over the spectrum predicts; see the package's text."""
        return self.predictions["spectral"].share

    @property
    def applies(self) -> str:
        """How alike successive steps are; see `Persistence.applies`."""
        return self.persistence.applies

    @property
    def applicable(self) -> Prediction:
        """The predictor that holds whatever the persistence is, ``"persistent"``; the isotropic one without blocks."""
        found = self.predictions["persistent"]
        return found if found.steps else self.predictions["isotropic"]

    @property
    def totals(self) -> dict[str, float]:
        """Sum over depth of the mean over samples, for every column; NaN entries and infinite steps are left out."""
        usable = self.growth.isfinite()
        found = {}
        for column in COLUMNS[:-1]:
            values = getattr(self, column)
            rows = torch.where(usable & values.isfinite(), values, torch.zeros_like(values))
            found[column] = float(rows.mean(1).sum())
        return found

    def to_dataframe(self, *, per_sample: bool = False) -> pandas.DataFrame:
        """One row per step (means over samples), or per step and sample, as a ``pandas.DataFrame``.

        Args:
            per_sample: a row for every sample, with a column ``sample``.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        labels = {
            "step": range(len(self.names)), "name": self.names, "kind": self.kinds, "method": self.methods,
        }  # fmt: skip
        if not per_sample:
            return pandas.DataFrame({**labels, **{c: getattr(self, c).mean(1).tolist() for c in COLUMNS}})
        samples = self.growth.shape[1]
        repeated = {key: [value for value in values for _ in range(samples)] for key, values in labels.items()}
        index = {"sample": list(range(samples)) * len(self.names)}
        return pandas.DataFrame(
            {**repeated, **index, **{c: getattr(self, c).flatten().tolist() for c in COLUMNS}},
        )

    def _contents(self) -> dict[str, Any]:
        computed = {"totals": self.totals, "explained": self.explained, "applies": self.applies}
        return {**super()._contents(), **computed, "applicable": self.applicable.name}
