"""Numbers and names as people read them, in few characters."""

from __future__ import annotations

import math


def figures(value: float | None, digits: int = 3) -> str:
    """A number in few characters: ``-`` when it was not computed.

    Example:
        >>> figures(1.23456), figures(0.00001234), figures(None), figures(float("nan"))
        ('1.23', '1.2e-05', '-', 'nan')
    """
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:#.{digits}g}".rstrip(".")
    return f"{value:.1e}"


def signed(value: float, digits: int = 2) -> str:
    """A growth in nats with its sign, to so many places.

    Example:
        >>> signed(0.5), signed(-39.02), signed(float("inf"))
        ('+0.50', '-39.02', '+inf')
    """
    if math.isnan(value):
        return "nan"
    return f"{value:+.{digits}f}" if abs(value) < 1e4 or not math.isfinite(value) else f"{value:+.1e}"


def percent(value: float | None) -> str:
    """A share from 0 to 1 in percent; a small share that is not zero does not read as zero.

    Example:
        >>> percent(0.25), percent(0.0001), percent(0.9999), percent(None)
        ('25%', '<1%', '>99%', '-')
    """
    if value is None or not math.isfinite(value):
        return figures(value)
    if 0 < value < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= value < 1 else f"{100 * value:.0f}%"


def middle(text: str, width: int) -> str:
    """A long name cut in its middle, where dotted paths differ least.

    Example:
        >>> middle("encoder.layers.encoder_layer_11", 16)
        'encoder…layer_11'
    """
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def steps_named(steps: tuple[int, ...]) -> str:
    """Step indices in few words.

    Example:
        >>> steps_named((3,)), steps_named((0, 1, 2, 3, 7))
        ('step 3', 'steps 0-3, 7')
    """
    if not steps:
        return ""
    ordered = sorted(set(steps))
    runs: list[list[int]] = []
    for index in ordered:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    named = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"step{'s' if len(ordered) > 1 else ''} {named}"


def room(factor: float) -> str:
    """How far the branch of a step may grow before its spectrum leaves the region.

    Example:
        >>> room(1.7), room(0.25), room(0.0)
        ('the branch may grow by ×1.70', 'the branch would have to shrink to ×0.250', 'undamped modes always leave it')
    """
    if factor == 0:
        return "undamped modes always leave it"
    if math.isinf(factor):
        return "the branch may grow without bound"
    return f"the branch {'may grow by' if factor >= 1 else 'would have to shrink to'} ×{figures(factor)}"


def shapes(given: tuple[tuple[int, ...], ...]) -> str:
    """Shapes of tensors.

    Example:
        >>> shapes(((3, 4), ()))
        '3×4, scalar'
    """
    return ", ".join("×".join(map(str, shape)) or "scalar" for shape in given)
