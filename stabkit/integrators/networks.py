"""Network architectures read as one step of a method; z is the eigenvalue of the Jacobian of the branch."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from stabkit.errors import ArgumentError
from stabkit.integrators.catalogue_entry import Entry
from stabkit.integrators.construction import from_butcher, from_stability_function
from stabkit.integrators.general_linear import GeneralLinearMethod
from stabkit.integrators.stability_function import MeanSquareMethod, StabilityFunction
from stabkit.integrators.tableau_checks import to_fraction

_YANG = "Y. Yang, J. Liu, L. Bao, Z. Shi, Interpolation between Residual and Non-Residual Networks, ICML 2020"
_FAMILY = "networks"
Form = Literal["in_resnet", "lambda_in_resnet", "exponential"]


def _number(x: Any) -> Any:
    """A parameter as given when it is a float, else as a fraction, so that exact input stays exact."""
    return x if isinstance(x, float) else to_fraction(x)


def damped_euler(lam: Any = Fraction(1, 5), form: Form = "in_resnet") -> GeneralLinearMethod:
    """The damped step that joins a residual network (lam = 0) to a plain one (lam = 1).

    Args:
        lam: the damping; 0 to 1 joins the two networks, and trained blocks may lie outside.
        form: ``"in_resnet"``: x' = (1-lam) x + f(x), R = 1 - lam + z.
            ``"lambda_in_resnet"``: x' = (1-lam) x + (1+lam) f(x), R = 1 - lam + (1+lam) z.
            ``"exponential"``: the exponential Euler step of x' = -lam x + f, R = e^-lam + z (1 - e^-lam) / lam.

    Returns:
        A one-state method; its region is the disc of centre -(1-lam)/c and radius 1/c, c the factor of z.

    Raises:
        ArgumentError: ``lam`` is not finite, or ``form`` is unknown.

    Example:
        >>> damped = damped_euler(Fraction(1, 5))
        >>> float(damped.real_interval()), damped.order
        (1.8, 0)
        >>> damped_euler(0).order
        1
    """
    if not math.isfinite(lam):
        raise ArgumentError(f"lam={lam}; give a finite number, 0 for a residual network, 1 for a plain one")
    x = _number(lam)
    factors = {"in_resnet": (1 - x, 1), "lambda_in_resnet": (1 - x, 1 + x)}
    if form == "exponential":
        decay = float(x)
        keep, gain = (math.exp(-decay), -math.expm1(-decay) / decay) if decay else (1.0, 1.0)
    elif form in factors:
        keep, gain = factors[form]
    else:
        raise ArgumentError(f"form={form!r}; choose 'in_resnet', 'lambda_in_resnet' or 'exponential'")
    return GeneralLinearMethod([[0]], [[1]], [[gain]], [[keep]], name=f"{form}(lam={lam})", source=_YANG)


def plain() -> GeneralLinearMethod:
    """X' = f(x), no skip: R(z) = z.

    Example:
        >>> complex(plain().stability_matrix(0.5j)[0, 0])
        0.5j
    """
    return GeneralLinearMethod([[0]], [[1]], [[1]], [[0]], name="plain", source="the map itself; R(z) = z")


def scaled_residual(alpha: Any = Fraction(1, 10)) -> GeneralLinearMethod:
    """X' = x + alpha f(x): forward Euler with step alpha (ReZero, SkipInit, LayerScale entry by entry)."""
    return GeneralLinearMethod(
        [[0]], [[1]], [[_number(alpha)]], [[1]], name=f"scaled_residual(alpha={alpha})",
        source="T. Bachlechner et al., ReZero, UAI 2021; S. De, S. L. Smith, NeurIPS 2020",
    )  # fmt: skip


def gated(gate: Any = Fraction(1, 2)) -> GeneralLinearMethod:
    """X' = (1-gate) x + gate f(x), a leaky or gated unit with its gate held fixed: R = 1 - gate + gate z.

    Args:
        gate: the update gate (GRU), transform gate (highway) or leak rate, in [0, 1].

    Raises:
        ArgumentError: ``gate`` lies outside [0, 1].
    """
    if not 0 <= gate <= 1:
        raise ArgumentError(f"gate={gate}; a gate lies between 0 and 1")
    g = _number(gate)
    return GeneralLinearMethod(
        [[0]], [[1]], [[g]], [[1 - g]], name=f"gated(gate={gate})",
        source="K. Cho et al., EMNLP 2014 (GRU); H. Jaeger et al., Neural Networks 20 (2007) (leaky units)",
    )  # fmt: skip


def lm_resnet(k: Any = Fraction(-1, 10)) -> GeneralLinearMethod:
    """x_{n+1} = (1-k) x_n + k x_{n-1} + f(x_n); states (x_n, x_{n-1}), zero-stable for -1 < k <= 1.

    Example:
        >>> lm_resnet(Fraction(-1, 2)).real_interval() == 3
        True
    """
    c = _number(k)
    return GeneralLinearMethod(
        [[0]], [[1, 0]], [[1], [0]], [[1 - c, c], [1, 0]], name=f"lm_resnet(k={k})",
        source="Y. Lu, A. Zhong, Q. Li, B. Dong, Beyond Finite Layer Neural Networks, ICML 2018",
    )  # fmt: skip


def momentum_resnet(gamma: Any = Fraction(9, 10)) -> GeneralLinearMethod:
    """V' = gamma v + (1-gamma) f(x), x' = x + v'; states (x, v).

    Example:
        >>> momentum_resnet(Fraction(9, 10)).real_interval() == 38
        True
    """
    g = _number(gamma)
    return GeneralLinearMethod(
        [[0]], [[1, 0]], [[1 - g], [1 - g]], [[1, g], [0, g]], name=f"momentum_resnet(gamma={gamma})",
        source="M. E. Sander, P. Ablin, M. Blondel, G. Peyre, Momentum Residual Neural Networks, ICML 2021",
    )  # fmt: skip


def polynet() -> GeneralLinearMethod:
    """X' = x + f(x) + f(f(x)), the poly-2 block: R = 1 + z + z^2."""
    return GeneralLinearMethod(
        [[0, 0], [1, 0]], [[1], [0]], [[1, 1]], [[1]], name="polynet",
        source="X. Zhang, Z. Li, C. C. Loy, D. Lin, PolyNet, CVPR 2017",
    )  # fmt: skip


def fractalnet() -> GeneralLinearMethod:
    """X' = (f_1(x) + f_3(f_2(x))) / 2, two columns and no identity: R = (z + z^2) / 2 with one z for all."""
    return from_stability_function(
        [0, "1/2", "1/2"], name="fractalnet", source="G. Larsson, M. Maire, G. Shakhnarovich, FractalNet, ICLR 2017"
    )


def revnet() -> GeneralLinearMethod:
    """y_1 = x_1 + f(x_2), y_2 = x_2 + g(y_1); two states and two fields, det M = 1."""
    return GeneralLinearMethod(
        [[0, 0], [1, 0]], [[0, 1], [1, 0]], [[1, 0], [0, 1]], [[1, 0], [0, 1]], fields=[0, 1],
        name="revnet", declared_order=1,
        source="A. N. Gomez, M. Ren, R. Urtasun, R. B. Grosse, The Reversible Residual Network, NeurIPS 2017",
    )  # fmt: skip


def cornn(dt: Any = Fraction(1, 10), gamma: Any = 1, epsilon: Any = 1) -> GeneralLinearMethod:
    """Z' = z + dt (phi - gamma y - epsilon z), y' = y + dt z'; states (y, z).

    Field 0 is the response of phi to y, field 1 its response to z.
    """
    h, g, e = (_number(x) for x in (dt, gamma, epsilon))
    return GeneralLinearMethod(
        [[0, 0], [0, 0]], [[1, 0], [0, 1]], [[h * h, h * h], [h, h]],
        [[1 - h * h * g, h * (1 - h * e)], [-h * g, 1 - h * e]], fields=[0, 1],
        name=f"cornn(dt={dt}, gamma={gamma}, epsilon={epsilon})", declared_order=0,
        source="T. K. Rusch, S. Mishra, Coupled Oscillatory Recurrent Neural Network, ICLR 2021",
    )  # fmt: skip


def unicornn(dt: Any = Fraction(1, 10), alpha: Any = 1) -> GeneralLinearMethod:
    """Z' = z - dt (phi(y) + alpha y), y' = y + dt z'; states (y, z), the field is the response of phi to y."""
    h, a = _number(dt), _number(alpha)
    return GeneralLinearMethod(
        [[0]], [[1, 0]], [[-h * h], [-h]], [[1 - h * h * a, h], [-h * a, 1]],
        name=f"unicornn(dt={dt}, alpha={alpha})", declared_order=0,
        source="T. K. Rusch, S. Mishra, UnICORNN, ICML 2021",
    )  # fmt: skip


def lem(dt_1: Any = Fraction(1, 2), dt_2: Any = Fraction(1, 2)) -> GeneralLinearMethod:
    """Z' = (1-dt_1) z + dt_1 f(y), y' = (1-dt_2) y + dt_2 g(z'); states (y, z), gates held fixed."""
    p, q = _number(dt_1), _number(dt_2)
    return GeneralLinearMethod(
        [[0, 0], [p, 0]], [[1, 0], [0, 1 - p]], [[0, q], [p, 0]], [[1 - q, 0], [0, 1 - p]], fields=[0, 1],
        name=f"lem(dt_1={dt_1}, dt_2={dt_2})", declared_order=0,
        source="T. K. Rusch, S. Mishra, N. B. Erichson, M. W. Mahoney, Long Expressive Memory, ICLR 2022",
    )  # fmt: skip


def bilinear() -> GeneralLinearMethod:
    """The bilinear (Tustin) state-space step: R = (1 + z/2) / (1 - z/2)."""
    return from_butcher([[], ["1/2", "1/2"]], ["1/2", "1/2"], name="bilinear",
                        source="A. Gu, K. Goel, C. Re, S4, ICLR 2022; Tustin 1947")  # fmt: skip


def zero_order_hold() -> StabilityFunction:
    """The state-space step that is exact for a constant input, of order 1 for a changing one: R = exp(z)."""
    return StabilityFunction(np.exp, name="zero_order_hold", order=1, at_infinity=0.0,
                             source="A. Gu, T. Dao, Mamba, 2023; K. J. Astrom, B. Wittenmark 1997")  # fmt: skip


def stochastic_depth(survival: Any = Fraction(4, 5), rescaled: bool = False) -> MeanSquareMethod:
    """X' = x + b f(x) with b drawn 1 with probability ``survival``, else 0; judged in mean square.

    Args:
        survival: the probability p that the branch is kept, in (0, 1].
        rescaled: whether a kept branch is divided by p, as common implementations do; the region is then the disc of
            centre -p and radius p instead of Euler's.

    Raises:
        ArgumentError: ``survival`` lies outside (0, 1].

    Example:
        >>> stochastic_depth(Fraction(4, 5), rescaled=True).real_interval()
        1.6
    """
    if not 0 < survival <= 1:
        raise ArgumentError(f"survival={survival}; a probability in (0, 1] is needed")
    p = _number(survival)
    outcomes = [scaled_residual(1 / p if rescaled else 1), scaled_residual(0)]
    return MeanSquareMethod(
        outcomes, [p, 1 - p], name=f"stochastic_depth(survival={survival}, rescaled={rescaled})",
        source="G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger, Deep Networks with Stochastic Depth, ECCV 2016",
    )  # fmt: skip


def _entry(name: str, build: Any, source: str, *aliases: str, **defaults: Any) -> Entry:
    return Entry(name, build, source, aliases, defaults, _FAMILY)


def _yang(form: Form) -> Any:
    def build(lam: Any = Fraction(1, 5)) -> GeneralLinearMethod:
        return damped_euler(lam, form)

    return build


ENTRIES: tuple[Entry, ...] = (
    _entry("plain", plain, "R(z) = z", "mlp", "plain_network", "feedforward", "map"),
    _entry("damped_euler", damped_euler, _YANG, lam=Fraction(1, 5), form="in_resnet"),
    _entry("in_resnet", _yang("in_resnet"), _YANG, "interpolating_resnet", lam=Fraction(1, 5)),
    _entry("lambda_in_resnet", _yang("lambda_in_resnet"), _YANG, lam=Fraction(1, 5)),
    _entry("exponential_damped_euler", _yang("exponential"), _YANG, "exponential_in_resnet", lam=Fraction(1, 5)),
    _entry("scaled_residual", scaled_residual, "Bachlechner et al. 2021", "rezero", "skipinit", "layer_scale",
           alpha=Fraction(1, 10)),
    _entry("gated", gated, "Cho et al. 2014", "gru", "leaky", "leaky_rnn", "highway", gate=Fraction(1, 2)),
    _entry("lm_resnet", lm_resnet, "Lu et al. 2018", k=Fraction(-1, 10)),
    _entry("momentum_resnet", momentum_resnet, "Sander et al. 2021", "momentum", gamma=Fraction(9, 10)),
    _entry("polynet", polynet, "Zhang et al. 2017", "poly2"),
    _entry("fractalnet", fractalnet, "Larsson et al. 2017"),
    _entry("revnet", revnet, "Gomez et al. 2017", "reversible", "i_revnet"),
    _entry("cornn", cornn, "Rusch and Mishra 2021", dt=Fraction(1, 10), gamma=1, epsilon=1),
    _entry("unicornn", unicornn, "Rusch and Mishra 2021", dt=Fraction(1, 10), alpha=1),
    _entry("lem", lem, "Rusch et al. 2022", dt_1=Fraction(1, 2), dt_2=Fraction(1, 2)),
    _entry("bilinear", bilinear, "Gu et al. 2022", "tustin", "s4"),
    _entry("zero_order_hold", zero_order_hold, "Gu and Dao 2023", "zoh", "mamba", "exact_exponential"),
    _entry("stochastic_depth", stochastic_depth, "Huang et al. 2016", "drop_path", survival=Fraction(4, 5),
           rescaled=False),
)  # fmt: skip
