"""Every method that nodepy also has, where nodepy is right; see test_reference_values for where it is not."""

import warnings

import numpy as np
import pytest

from stabkit import integrators

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    rk = pytest.importorskip("nodepy.runge_kutta_method", reason="nodepy is not installed")
    lm = pytest.importorskip("nodepy.linear_multistep_method", reason="nodepy is not installed")

RUNGE_KUTTA = {
    "forward_euler": "FE", "midpoint": "Mid22", "heun2": "Heun22", "ralston2": "MTE22", "ssp22": "SSP22",
    "heun3": "Heun33", "ssp33": "SSP33", "rk4": "RK44", "bogacki_shampine": "BS3", "cash_karp": "CK5",
    "fehlberg5": "Fehlberg45", "dopri5": "DP5", "tsit5": "Tsit5", "ssp53": "SSP53", "ssp104": "SSP104",
    "backward_euler": "BE", "gauss2": "GL2", "gauss3": "GL3", "radau_iia2": "RadauIIA2", "radau_iia3": "RadauIIA3",
    "lobatto_iiia2": "LobattoIIIA2", "lobatto_iiia3": "LobattoIIIA3", "lobatto_iiic2": "LobattoIIIC2",
    "lobatto_iiic3": "LobattoIIIC3", "lobatto_iiic4": "LobattoIIIC4", "sdirk23": "SDIRK23", "sdirk34": "SDIRK34",
    "sdirk4": "SDIRK54", "tr_bdf2_half": "TR-BDF2",
}  # fmt: skip
EXPLICIT = list(RUNGE_KUTTA)[:15]


@pytest.fixture(scope="module")
def theirs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rk.loadRKM()


@pytest.mark.parametrize("name", RUNGE_KUTTA)
def test_stability_function(name, theirs):
    other = theirs[RUNGE_KUTTA[name]]
    A, b = np.array(other.A, dtype=float), np.array(other.b, dtype=float)
    rng = np.random.default_rng(0)
    z = rng.uniform(-3, 1, 40) + 1j * rng.uniform(-3, 3, 40)
    R = np.array([1 + a * b @ np.linalg.solve(np.eye(len(b)) - a * A, np.ones(len(b))) for a in z])
    assert np.abs(integrators.named(name).stability_matrix(z)[:, 0, 0] - R).max() < 1e-12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNGE_KUTTA)
def test_order_and_monotonicity(name, theirs):
    other, method = theirs[RUNGE_KUTTA[name]], integrators.named(name)
    assert method.order == other.order(tol=1e-8)
    assert method.ssp_coefficient() == pytest.approx(other.absolute_monotonicity_radius(), abs=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPLICIT)
def test_intervals(name, theirs):
    other, method = theirs[RUNGE_KUTTA[name]], integrators.named(name)
    assert method.real_interval() == pytest.approx(float(other.real_stability_interval()), rel=1e-10)
    if name not in ("ssp53", "tsit5"):  # rounded coefficients: nodepy has 1.4e-4 and 0
        imaginary = float(other.imaginary_stability_interval())
        assert method.imaginary_interval() == pytest.approx(imaginary, rel=1e-10, abs=1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["midpoint", "heun2", "ssp33", "rk4"])
def test_internal_amplification(name, theirs):
    sampled = theirs[RUNGE_KUTTA[name]].maximum_internal_amplification(use_butcher=True)[0]
    found = integrators.maximum_internal_amplification(integrators.named(name))
    assert sampled <= found < 1.005 * sampled  # nodepy takes the largest value on a grid


MULTISTEP = {
    **{f"ab{k}": ("Adams_Bashforth", k) for k in range(2, 7)},
    **{f"am{k}": ("Adams_Moulton", k) for k in range(2, 6)},
    **{f"bdf{k}": ("backward_difference_formula", k) for k in range(1, 7)},
    "leapfrog": ("Nystrom", 2),
    "nystrom3": ("Nystrom", 3),
    "milne_simpson": ("Milne_Simpson", 2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_coefficients_and_order(name):
    family, k = MULTISTEP[name]
    other, method = getattr(lm, family)(k), integrators.named(name)
    alpha, beta = (np.array(c, dtype=float) for c in (other.alpha, other.beta))
    z = np.array([-0.3 + 0.4j, -1.0, 2j])
    for point in z:
        roots = np.roots((alpha - point * beta)[::-1])
        assert method.amplification(point) == pytest.approx(np.abs(roots).max(), rel=1e-10)
    assert method.order == other.order()
