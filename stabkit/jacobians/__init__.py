"""Spectra, non-normality and traces of Jacobians, each number with its error."""

from __future__ import annotations

from stabkit.jacobians.nonnormality import NonNormality, non_normality
from stabkit.jacobians.spectra import eigenvalues, singular_values
from stabkit.jacobians.spectrum import Spectrum
from stabkit.jacobians.traces import (
    Estimate,
    SingularValueDensity,
    log_abs_det,
    singular_value_density,
    squared_frobenius_norm,
    trace,
    trace_of_square,
)
from stabkit.operators import Jacobian, compose, from_dense
from stabkit.tracing.products.coordinates import coordinates

__all__ = [
    "Estimate",
    "Jacobian",
    "NonNormality",
    "SingularValueDensity",
    "Spectrum",
    "compose",
    "coordinates",
    "eigenvalues",
    "from_dense",
    "log_abs_det",
    "non_normality",
    "singular_value_density",
    "singular_values",
    "squared_frobenius_norm",
    "trace",
    "trace_of_square",
]
