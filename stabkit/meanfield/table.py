"""An `Initialisation` as a table of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stabkit.tables import aligned

if TYPE_CHECKING:
    from stabkit.meanfield.initialisation import Initialisation, StepExpectation

_HEAD = ("step", "name", "activation", "sw^2", "sb^2", "q", "expected", "c", "expected", "log chi", "expected", "")
_NAME = 28


def text(found: Initialisation) -> str:
    """The table, what its columns mean, and the sums below it."""
    rows = [_HEAD, *(_row(step) for step in found.steps)]
    words = {_HEAD.index("name"), _HEAD.index("activation"), len(_HEAD) - 1}
    return "\n".join([*aligned(rows, words, gap=2), "", *_sums(found), *found.notes])


def _row(step: StepExpectation) -> tuple[str, ...]:
    name = step.name if len(step.name) <= _NAME else f"…{step.name[1 - _NAME :]}"
    return (
        str(step.index),
        name,
        _several(list(step.activations)),
        _several([f"{layer.sigma_w_squared:.3g}" for layer in step.layers]),
        _several([f"{layer.sigma_b_squared:.2g}" for layer in step.layers]),
        _number(step.q),
        _number(step.q_expected),
        _number(step.c),
        _number(step.c_expected),
        _signed(step.log_chi),
        _signed(step.log_chi_expected),
        f"no expectation: {step.reason}"
        if step.reason
        else "from the measured state"
        if step.restarted and step.index
        else "",
    )


def _several(parts: list[str]) -> str:
    return parts[0] + ("" if len(parts) == 1 else f" (+{len(parts) - 1})") if parts else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _sums(found: Initialisation) -> list[str]:
    draws = (
        f"{found.networks} network{'s' if found.networks > 1 else ''}, {found.samples} samples, {found.probes} probes"
    )
    lines = [
        "q: mean square of the units after the step; c: correlation of two samples there; log chi: log of the squared "
        "gradient before the step over that after it, in nats. "
        f"{draws}, seed {found.seed}."
    ]
    expected = (
        "no expectation for all steps"
        if found.log_growth_expected is None
        else f"expected {found.log_growth_expected:+.3f}"
    )
    if found.deviation is not None:
        expected += f", one network of this width within about {found.deviation:.2g} of it"
    lines.append(f"Squared gradient, input over output: log {found.log_growth:+.3f} ({expected}).")
    gap = "" if found.gap_expected is None else f", over networks of this width expected {found.gap_expected:.3g}"
    lines.append(f"Mean square against typical gradient: log {found.gap:.3g} apart{gap}.")
    if found.rate is not None:
        rate = found.rate
        low, high = rate.interval
        lines.append(
            f"States {rate.start} to {rate.stop}: chi {rate.chi:.4f} "
            f"(95 % {low:.4f} to {high:.4f}, over {rate.covers}), "
            f"depth scale {rate.depth_scale:.3g} steps; as a power of depth (L/l)^{rate.exponent:.2f}; law: {rate.law}."
        )
    return lines
