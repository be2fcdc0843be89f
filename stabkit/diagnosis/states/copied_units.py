"""Units that are copies of each other: they compute the same, get the same gradient, and stay the same."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.measurement import Measurement, StepMeasurement
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.tracing import Flow
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.graph.values import entries_are_finite
from stabkit.tracing.recording.sharding import whole

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_FEWEST = 4  # units from which copies are no accident
_MOST = 0.1  # distinct units, as a share of all, up to which a layer counts as copied


def copied_units_findings(flow: Flow, measurement: Measurement) -> list[Finding]:
    """Layers that train and whose units are nearly all the same, where nothing else tells the units apart.

    Weights of zero are how branches and heads are started on purpose, and are left to others. Units with biases of
    their own differ, and so do their gradients.
    """
    parameters = dict(flow.model.named_parameters(remove_duplicate=False))
    modules = dict(flow.model.named_modules())
    found = []
    for step in measurement.steps:
        for weight in step.weights:
            parameter = parameters.get(weight.path)
            module = modules.get(weight.module_path)
            if parameter is None or not parameter.requires_grad or parameter.dim() < 2 or parameter.is_meta:
                continue
            if not isinstance(module, _LAYERS) or getattr(module, "groups", 1) > 1:
                continue
            if parameter.numel() == len(parameter) and parameter.shape != module.weight.shape:
                continue  # a gain per unit, beside weights that differ
            units = parameter.transpose(0, 1) if isinstance(module, _TRANSPOSED) else parameter
            count = distinct_units(units, module.bias)
            if count is not None and count <= max(1, _MOST * len(units)):
                found.append((step, weight.path, weight.unit, len(units), count))
    if not found:
        return []
    others = {path: unit for _, path, unit, *_ in found[1:]} | dict.fromkeys(_constant_tables(flow), 1.0)
    return [_finding(*found[0], others=others, steps=[step.index for step, *_ in found])]


def _constant_tables(flow: Flow) -> list[str]:
    """Tables of tokens that were filled with one number, as the layers were: they are drawn anew with these."""
    found = []
    for path, module in flow.model.named_modules():
        if not isinstance(module, nn.Embedding) or module.weight.is_meta or not module.weight.requires_grad:
            continue
        table = whole(module.weight).detach()
        rows = table if module.padding_idx is None else table[torch.arange(len(table)) != module.padding_idx]
        if rows.numel() > 1 and bool((rows == rows[0, 0]).all()):
            found.append(f"{path}.weight" if path else "weight")
    return found


def distinct_units(weight: Tensor, bias: Tensor | None) -> int | None:
    """How many units of a layer differ from each other; None for few units, for zeros and for no numbers.

    Beyond a share of ``_MOST`` of all units it is a lower bound.

    Example:
        >>> [distinct_units(weight, None) for weight in (torch.ones(8, 3), torch.eye(8), torch.zeros(8, 3))]
        [1, 8, None]
    """
    if len(weight) < _FEWEST:
        return None
    rows, bias = whole(weight).detach().flatten(1), None if bias is None else whole(bias).detach()
    sums = rows.sum(dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
    if not (entries_are_finite(sums) or entries_are_finite(rows)) or not (bool(sums.any()) or bool(rows.any())):
        return None
    # copies have one sum; rows are compared entry by entry only where few sums differ, since that sorts the matrix
    distinct = _distinct(sums if bias is None else sums + bias.to(sums))
    if distinct > max(1, _MOST * len(rows)):
        return distinct
    rows = rows if bias is None else torch.cat([rows, bias[:, None].to(rows)], dim=1)
    return _distinct(rows)


def _distinct(rows: Tensor) -> int:
    real = torch.view_as_real(rows) if rows.is_complex() else rows
    return len(torch.unique(real, dim=0) if real.dim() > 1 else torch.unique(real))


def _finding(
    step: StepMeasurement, path: str, unit: float, units: int, count: int, others: dict[str, float], steps: list[int]
) -> Finding:
    also = f"; so are those of {listed(tuple(others))}" if others else ""
    rms = 1.0 / unit
    what = "all are copies of one" if count == 1 else f"only {count} differ"
    return Finding(
        kind="copied_units",
        severity="warning",
        steps=tuple(dict.fromkeys(steps)),
        module_path=path.rpartition(".")[0] or step.module_path,
        confidence=1.0,
        evidence=f"of the {units} units of {path} {what}, bias included: they get the same gradient and stay the same "
        f"however long they are trained{also}",
        remedy=f"draw {path} anew, normal with standard deviation {rms:.3g} (1 / sqrt(fan-in))"
        + (f", and likewise {listed(tuple(others))}, each by its own fan-in" if others else ""),
        reference="Goodfellow, Bengio and Courville, Deep learning, 2016, section 8.4",
        numbers={"units": float(units), "distinct": float(count), "log_share": math.log(count / units)},
        actions=tuple(remedies.redraw(each, 1.0 / own) for each, own in {path: unit, **others}.items()),
    )
