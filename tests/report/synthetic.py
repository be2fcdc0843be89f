"""Reports made by hand, for tests of what shows them."""

from __future__ import annotations

from typing import Any

import numpy as np

from stabkit.diagnosis import Finding
from stabkit.report import Report, StepReport, TrainingReport
from stabkit.report.training import BlockShare, Updates

FINDING = Finding(
    "exploding", "critical", (0, 1), "net.0", 0.97, "growth +9 nats", "scale the branches", "Yang et al., 2020"
)


def make_step(index: int = 0, **changes: Any) -> StepReport:
    values: dict[str, Any] = {
        "index": index,
        "name": f"blocks.{index}",
        "module_path": f"net.blocks.{index}",
        "kind": "step",
        "source_shapes": ((3, 4),),
        "target_shapes": ((3, 4),),
        "source_size": 12,
        "target_size": 12,
        "method": "forward Euler",
        "skip": 1.0,
        "evidence": "proven",
        "residual": 1e-16,
        "z": (-0.5 + 0.5j, -0.5 - 0.5j),
        "spectral_radius": 1.25,
        "largest_singular_value": 1.5,
        "outside_share": 0.25,
        "spectrum_method": "dense",
        "spectrum_converged": True,
        "growth": 0.5,
        "growth_interval": (0.4, 0.6),
        "gradient_norm": 2.0,
        "state_norm": 3.0,
    }
    return StepReport(**{**values, **changes})


def make_training(**changes: Any) -> TrainingReport:
    """Gradient descent at 1.5 times its largest stable rate."""
    values: dict[str, Any] = {
        "optimizer": "SGD",
        "method": "gradient_descent",
        "tableau": {"A": ((0.0,),), "U": ((1.0,),), "B": ((1.0,),), "V": ((1.0,),)},
        "learning_rate": 0.1,
        "loss": 2.5,
        "curvature": 30.0,
        "curvature_residual": 0.01,
        "converged": True,
        "preconditioned": 30.0,
        "preconditioned_residual": 0.01,
        "threshold": 20.0,
        "ratio": 1.5,
        "largest_stable_rate": 1 / 15,
        "critical_rate": 0.08,
        "loss_after": 2.75,
        "blocks": (
            BlockShare(name="net.blocks.0", share=0.75, curvature=25.0),
            BlockShare(name="net.blocks.1", share=0.25, curvature=5.0),
        ),
        "growth_behind": -0.2,
        "depth": "net.blocks.0 holds 75% of the largest curvature.",
        "updates": (Updates(rate=0.1, losses=(2.5, 2.75, float("inf"))), Updates(rate=1 / 30, losses=(2.5, 2.0))),
        "n_products": 12,
        "notes": ("a note on updates",),
    }
    return TrainingReport(**{**values, **changes})


def make_report(*steps: StepReport, **changes: Any) -> Report:
    values: dict[str, Any] = {
        "model": "Net",
        "verdict": "stable",
        "summary": "Stable: nothing grows.",
        "findings": (),
        "steps": steps,
        "total_growth": float(sum(step.growth for step in steps)),
        "total_growth_interval": (-0.5, 0.5),
        "chain_error": 1e-15,
        "n_parameters": 1234,
        "dtype": "float64",
        "device": "cpu",
        "mode": "eval",
        "loss": "a random cotangent",
        "seed": 7,
        "seconds": 0.5,
        "thresholds": {"stable": 2.3},
        "notes": ("a note",),
        "versions": {"stabkit": "0.1.0"},
    }
    return Report(**{**values, **changes})


def make_chain(growths: list[float], **changes: Any) -> Report:
    """A report whose gradient norms belong to its growths, with norm 1 at the output."""
    norms = np.exp(np.cumsum(growths[::-1])[::-1])
    steps = (make_step(i, growth=g, gradient_norm=float(norms[i]), **changes) for i, g in enumerate(growths))
    return make_report(*steps)
