"""The reference values on exponents, reproduced at full length.

Run with ``python -m tests.growth.reference_values`` (about five minutes on one core). Every row shows what is known,
what was found, and its error bar: the standard error of a mean over initial states or seeds where there are several.
"""

from __future__ import annotations

import math

import torch

from stabkit.growth import finite_time_exponents, lyapunov_spectrum
from stabkit.tracing import Iteration
from tests.growth import systems


def row(system: str, quantity: str, known: float, found: float, error: float) -> None:
    distance = f"{abs(found - known) / error:.1f} sigma" if error > 1e-9 else f"{found - known:+.1e}"
    print(f"{system:34s} {quantity:16s} {known:+14.10f} {found:+14.10f} +- {error:.1e}  {distance}")


def spectra(system: str, flows: list[Iteration], known: list[float], k: int | None = None) -> None:
    """Means over samples and flows, per unit of time, with the error bar from their spread or from autocorrelation."""
    found = [lyapunov_spectrum(flow, k) for flow in flows]
    values = torch.cat([spectrum.exponents_per_time for spectrum in found])
    own = torch.cat([spectrum.standard_errors_per_time for spectrum in found]).square().mean(0).sqrt()
    spread = values.std(0) if len(values) > 3 else own
    errors = spread / math.sqrt(len(values))
    for i, exact in enumerate(known):
        row(system, f"exponent {i + 1}", exact, float(values[:, i].mean()), float(errors[i]))
    volumes = [spectrum.volume_errors for spectrum in found]
    if volumes[0] is not None:
        row(system, "sum - log|det|", 0.0, max(float(v.abs().max()) for v in volumes if v is not None), 0.0)


def maps() -> None:
    A = systems.normal(4, 4)
    spectra(
        "linear map", [systems.linear(A, 2000)], torch.linalg.eigvals(A).abs().log().sort(descending=True)[0].tolist()
    )
    spectra("Jordan block", [systems.jordan(200)], [math.log(0.9)] * 2)
    for t, known in ((1, 0.42498208), (10, 0.13623438), (200, -0.07834202)):
        row(
            "Jordan block",
            f"FTLE, t = {t}",
            known,
            float(finite_time_exponents(systems.jordan(t)).exponents[0, 0]),
            0.0,
        )
    golden = math.log((3 + math.sqrt(5)) / 2)
    spectra("cat map", [systems.cat_map(2000)], [golden, -golden])
    spectra("logistic r = 4", [systems.logistic(100_000, 64)], [math.log(2)])
    growth = lyapunov_spectrum(systems.logistic(10, 200_000), discard=0).local_growth[..., 0].cumsum(0)
    for t in (1, 3, 10):
        known = math.pi**2 / 6 * (1 - 2.0**-t)
        squares = (growth[t - 1] - t * math.log(2)).square()
        error = float(squares.std() / math.sqrt(len(squares)))
        row("logistic r = 4", f"Var, t = {t}", known, float(squares.mean()), error)
    spectra("Henon", [systems.henon(100_000, 64)], [0.4191, -1.6231])
    spectra("Lorenz, RK4, h = .005", [systems.lorenz(200_000, 32, 0.005)], [0.9056, 0.0, -14.5723])


def networks() -> None:
    known = systems.gaussian_exponents().tolist()
    spectra("Gaussian layers, N = 8", [systems.gaussian_layers(20_000, batch=8, seed=s) for s in range(4)], known)
    flow = systems.orthogonal_layers(500, 8, 1.5)
    spectra("orthogonal layers times 1.5", [flow], [math.log(1.5)] * 8)
    for i, value in enumerate(finite_time_exponents(flow).exponents[0].tolist()):
        row("orthogonal layers times 1.5", f"FTLE {i + 1}", math.log(1.5), value, 0.0)
    flows = [systems.relu_layers(2_000, batch=8, seed=s) for s in range(8)]
    spectra("ReLU layers, He, N = 32", flows, [systems.relu_exponent()], 1)
    flows = [systems.untied_residual(2_000, batch=8, seed=s) for s in range(8)]
    spectra("x + h W x, untied, N = 32", flows, [0.1058913889], 1)
    flow, exact = systems.tied_residual(4_000)
    spectra("x + h W x, tied", [flow], exact.tolist())
    flows = [systems.random_network(3_000, 4, seed=s) for s in range(4)]
    spectra("x <- J tanh x, N = 400, g = 2", flows, [0.1547242298], 1)
    print("  (that is the limit of N -> inf; at N = 400 .148 to .152 are expected)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    maps()
    networks()
