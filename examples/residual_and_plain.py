"""A residual network is forward Euler; a plain one is the fully damped end of the same family.

Two classifiers of 20 blocks are trained alike on handwritten digits. What to see in the picture: the eigenvalues of the
residual blocks sit around z = 0, at the edge of the disc |1 + z| <= 1, so a gradient passes twenty of them and keeps
its size. Those of the plain layers sit deep inside |z| <= 1: each of them damps the gradient, and twenty of them leave
nothing of it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.figure import Figure
from rich.console import Console

from stabkit import Report, demo, plotting


def main(out: Path) -> None:
    """Train, analyse and draw; the picture goes to ``out``."""
    silent = Console(quiet=True)
    with TemporaryDirectory() as folder:
        demo.run(Path(folder), seed=0, console=silent, progress=silent)
        reports = {name: Report.load(Path(folder) / name / "report.json") for name in ("residual", "plain")}
    figure = Figure(figsize=(11, 3.2), dpi=150, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for ax, (name, report) in zip((left, middle), reports.items(), strict=True):
        plotting.region(report, ax)
        ax.set_title(f"{name}: {report.verdict}")
    plotting.compare(reports, right)
    figure.savefig(out)
    for name, report in reports.items():
        print(f"{name}: {report.summary}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("residual_and_plain.png"))
