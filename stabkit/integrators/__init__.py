"""Integrators: general linear methods, their stability regions, and a catalogue of methods and networks.

This part of the package needs only numpy and scipy.

Example:
    >>> from stabkit import integrators
    >>> rk4 = integrators.named("rk4")
    >>> round(rk4.real_interval(), 12), round(rk4.imaginary_interval(), 12)
    (2.785293563405, 2.828427124746)
"""

from stabkit.integrators.by_name import UnknownMethodError, entries, entry, named, names, near_names
from stabkit.integrators.catalogue_entry import Entry
from stabkit.integrators.chebyshev import rkc1, rkc2
from stabkit.integrators.construction import (
    from_additive_butcher,
    from_butcher,
    from_multistep,
    from_partitioned_butcher,
    from_shu_osher,
    from_stability_function,
)
from stabkit.integrators.general_linear import GeneralLinearMethod
from stabkit.integrators.implicit_runge_kutta import collocation_family, theta
from stabkit.integrators.linear_stability import LinearStability
from stabkit.integrators.multistep import adams_bashforth, adams_moulton, bdf, milne_simpson, nystrom
from stabkit.integrators.networks import (
    cornn,
    damped_euler,
    gated,
    lem,
    lm_resnet,
    momentum_resnet,
    plain,
    scaled_residual,
    stochastic_depth,
    unicornn,
)
from stabkit.integrators.optimizers import adam, heavy_ball, nadam, nesterov
from stabkit.integrators.probing import from_step_function
from stabkit.integrators.regions import Curve, Region, order_star
from stabkit.integrators.splitting import lie, strang
from stabkit.integrators.stability_function import MeanSquareMethod, StabilityFunction
from stabkit.integrators.stability_intervals import AxisInterval
from stabkit.integrators.stage_errors import maximum_internal_amplification

__all__ = [
    "AxisInterval",
    "Curve",
    "Entry",
    "GeneralLinearMethod",
    "LinearStability",
    "MeanSquareMethod",
    "Region",
    "StabilityFunction",
    "UnknownMethodError",
    "adam",
    "adams_bashforth",
    "adams_moulton",
    "bdf",
    "collocation_family",
    "cornn",
    "damped_euler",
    "entries",
    "entry",
    "from_additive_butcher",
    "from_butcher",
    "from_multistep",
    "from_partitioned_butcher",
    "from_shu_osher",
    "from_stability_function",
    "from_step_function",
    "gated",
    "heavy_ball",
    "lem",
    "lie",
    "lm_resnet",
    "maximum_internal_amplification",
    "milne_simpson",
    "momentum_resnet",
    "nadam",
    "named",
    "names",
    "near_names",
    "nesterov",
    "nystrom",
    "order_star",
    "plain",
    "rkc1",
    "rkc2",
    "scaled_residual",
    "stochastic_depth",
    "strang",
    "theta",
    "unicornn",
]
