"""Chaos in a recurrent network: the largest Lyapunov exponent crosses zero as the weights grow.

x' = J tanh(x) with Gaussian weights of size g comes to rest for g < 1 and is chaotic for g > 1 (Sompolinsky, Crisanti
and Sommers, 1988; Engelken et al., 2023). What to see in the picture: on the left, trajectories that die out for
g = 0.9 and never settle for g = 2; on the right, the measured exponents with their error bars, beside what mean field
theory expects of an infinitely wide network.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure

import stabkit
from stabkit import meanfield, plotting

N = 150
GAINS = (0.7, 0.9, 1.2, 1.6, 2.0, 2.5)


def step(gain: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """One step of the network."""
    generator = torch.Generator().manual_seed(3)
    J = gain * torch.randn(N, N, generator=generator, dtype=torch.float64) / math.sqrt(N)
    return lambda x: torch.tanh(x) @ J.T


def main(out: Path) -> None:
    """Iterate, measure and draw."""
    figure = Figure(figsize=(12, 3.6), dpi=130, layout="constrained")
    quiet, wild, right = figure.subplots(1, 3)
    start = torch.randn(4, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for ax, gain in ((quiet, 0.9), (wild, 2.0)):
        plotting.phase_portrait(stabkit.iterate(step(gain), start[:2], 60), ax)
        ax.set_title(f"g = {gain:g}, 60 steps")
    for gain in GAINS:
        settled = stabkit.iterate(step(gain), start, 200).output
        spectrum = stabkit.lyapunov_spectrum(stabkit.iterate(step(gain), settled, 1500), 1)
        values, errors = spectrum.exponents[:, 0], spectrum.standard_errors[:, 0]
        value, error = float(values.mean()), float(errors.square().sum().sqrt() / len(errors))
        expected = meanfield.recurrent_exponents("tanh", gain).largest
        right.errorbar([gain], [value], [2 * error], fmt="o", color="#D55E00" if value > 0 else "#0072B2", markersize=4)
        print(f"g = {gain:3.1f}: largest exponent {value:+.4f} ± {error:.4f} nats a step; mean field {expected:+.4f}")
    line = [0.65 + 0.05 * i for i in range(40)]
    theory = [meanfield.recurrent_exponents("tanh", gain).largest for gain in line]
    right.plot(line, theory, color="#7F7F7F", linewidth=1, zorder=0, label="mean field, infinitely wide")
    right.legend(fontsize=8)
    right.axhline(0, color="black", linewidth=0.6)
    right.set(xlabel="g", ylabel="largest Lyapunov exponent (nats per step)", title="Rest and chaos")
    figure.savefig(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("chaos_in_a_recurrent_network.png"))
