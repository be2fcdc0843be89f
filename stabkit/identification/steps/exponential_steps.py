"""Exponential methods whose linear part has another rate in every coordinate: e^(h lambda_i) x_i + w_i f_i(x).

Of one coordinate alone any two numbers a and w are an exponential Euler step of some rate, with the step size
w log(a) / (a - 1). That it is one step size for all of them, while a differs, is what no other step has.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from stabkit.identification.form.coefficients import LinearCombination
from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.tableau import Blocks, blocks
from stabkit.identification.names.single import Name, name_one_state
from stabkit.tracing.graph.values import Value

_FEWEST = 3  # rates: two pairs of numbers may agree by the choice of a network
_AGREES = 64.0  # rounding units; of products with numbers that the code makes of the same rate
_NOTE = "every coordinate has coefficients of its own: those of the first are shown"


def by_coordinates(
    form: NormalForm, contexts: Collection[Value], named: Name
) -> tuple[Blocks, Name, tuple[str, ...]] | None:
    """Tableau and name of an exponential step with a rate for every coordinate; None where that says no more.

    Args:
        form: of a step of one state.
        contexts: values held fixed.
        named: what the step is called with the means of all coordinates.
    """
    skip = form.forms[0].get(form.sources[0])
    if skip is None or skip.kind != "diagonal" or skip.low <= 0:
        return None
    table = blocks(form, contexts, one_coordinate=True)
    if table is None or not table.rows:
        return None
    if len(table.rows) == 1:
        h = _one_step_size(form)
        if h is None or not named.name.startswith(("damped Euler", "scaled skip")):
            return None
        name = f"exponential Euler (a = {skip.low:.3g} to {skip.high:.3g})"
        system = "x' = f(x) - lambda x, a rate lambda for every coordinate"
        return table, Name(name, system, h, "h: that of all coordinates, whose weights are h (a - 1) / log a"), (_NOTE,)
    first = name_one_state(table)
    # phi_k of a mean is not the mean of phi_k, though near it
    return (table, first, (_NOTE,)) if first.is_known and table.shared and table.n_fields == 1 else None


def _one_step_size(form: NormalForm) -> float | None:
    """The step size h with w = h (a - 1) / log a in every coordinate; None where there is no such."""
    (source,), (stage,) = form.sources, form.stages
    factors = LinearCombination(form.piece, form.targets[0]).factors
    if source not in factors or stage.output not in factors or factors[source].numel() != factors[stage.output].numel():
        return None
    a, w = (factors[v].detach().reshape(-1).cpu() for v in (source, stage.output))
    eps = torch.finfo(a.dtype).eps
    a, w = a.double(), w.double()
    if not bool((a > 0).all()) or bool((a == 1).any()) or len(torch.unique(a)) < _FEWEST:
        return None
    sizes = w * a.log() / (a - 1)
    h = float(sizes.mean())
    # a is known to a rounding of 1, and log(a) / (a - 1) to that over 1 - a
    allowed = _AGREES * eps * abs(h) * (1 + 1 / (1 - a).abs())
    differs = float(a.max() - a.min()) * abs(h) > 10 * float(allowed.max())
    return abs(h) if differs and bool(((sizes - h).abs() <= allowed).all()) else None
