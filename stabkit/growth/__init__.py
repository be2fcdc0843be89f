"""Growth over depth or time, in nats: gradients, Lyapunov exponents, finite-time exponents, and their statistics."""

from stabkit.growth.alignment import AlignmentIndex, alignment_index
from stabkit.growth.covariant import CovariantVectors, covariant_vectors
from stabkit.growth.fields import ExponentField, exponent_field
from stabkit.growth.finite_time import FiniteTimeExponents, finite_time_exponents
from stabkit.growth.gradients import GradientProfile, gradient_profile, gradient_profiles
from stabkit.growth.lyapunov import LyapunovSpectrum, lyapunov_spectrum
from stabkit.growth.parameters import ParameterGradients, parameter_gradients
from stabkit.growth.rate_laws import RateLaw, rate_law
from stabkit.statistics import Interval, over_samples, over_seeds

__all__ = [
    "AlignmentIndex",
    "CovariantVectors",
    "ExponentField",
    "FiniteTimeExponents",
    "GradientProfile",
    "Interval",
    "LyapunovSpectrum",
    "ParameterGradients",
    "RateLaw",
    "alignment_index",
    "covariant_vectors",
    "exponent_field",
    "finite_time_exponents",
    "gradient_profile",
    "gradient_profiles",
    "lyapunov_spectrum",
    "over_samples",
    "over_seeds",
    "parameter_gradients",
    "rate_law",
]
