"""Expected behaviour of networks with random weights: signals, gradients, depth scales and the edge of chaos.

Maps and phases are those of infinitely wide networks; `relu_log_gain`, `gaussian_exponents` and `residual_exponent` are
exact at finite width. `at_initialisation` puts a model beside what is expected of its weights.
"""

from stabkit.meanfield.activations import Activation, activation, elu, hardtanh, leaky_relu
from stabkit.meanfield.expectations import Initialisation, StepExpectation
from stabkit.meanfield.finite_width import (
    LogGain,
    gaussian_exponents,
    log_gain_variance,
    relu_log_gain,
    residual_exponent,
)
from stabkit.meanfield.gaussian import Expectation
from stabkit.meanfield.initialisation import at_initialisation
from stabkit.meanfield.isometry import JacobianSpectrum, jacobian_spectrum
from stabkit.meanfield.maps import chi_1, chi_c, chi_parallel, correlation_map, variance_map
from stabkit.meanfield.normalised import (
    batch_norm_rate,
    batch_norm_residual_profile,
    norm_gain,
    postnorm_chi,
    prenorm_profile,
)
from stabkit.meanfield.phase import (
    CriticalPoint,
    FixedPoint,
    critical_points,
    critical_sigma_w,
    depth_scale,
    fixed_point,
)
from stabkit.meanfield.rates import Rate
from stabkit.meanfield.recurrent import RecurrentExponents, recurrent_exponents
from stabkit.meanfield.residual import DepthProfile, residual_profile
from stabkit.meanfield.weights import LayerStatistics
from stabkit.vocabulary import activation_names

__all__ = [
    "Activation",
    "CriticalPoint",
    "DepthProfile",
    "Expectation",
    "FixedPoint",
    "Initialisation",
    "JacobianSpectrum",
    "LayerStatistics",
    "LogGain",
    "Rate",
    "RecurrentExponents",
    "StepExpectation",
    "activation",
    "activation_names",
    "at_initialisation",
    "batch_norm_rate",
    "batch_norm_residual_profile",
    "chi_1",
    "chi_c",
    "chi_parallel",
    "correlation_map",
    "critical_points",
    "critical_sigma_w",
    "depth_scale",
    "elu",
    "fixed_point",
    "gaussian_exponents",
    "hardtanh",
    "jacobian_spectrum",
    "leaky_relu",
    "log_gain_variance",
    "norm_gain",
    "postnorm_chi",
    "prenorm_profile",
    "recurrent_exponents",
    "relu_log_gain",
    "residual_exponent",
    "residual_profile",
    "variance_map",
]
