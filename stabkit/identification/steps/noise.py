"""Steps of stochastic equations: normal numbers that this pass drew are added to the state, or multiply a branch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.autograd.graph import Node

from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.operations import ADDS, PRODUCTS
from stabkit.identification.form.pieces import Piece
from stabkit.identification.record import Identification
from stabkit.tracing.graph.values import operation

_TAKEN = "the field takes normal numbers that this pass drew: it is another one in every pass"
_EULER = ("forward Euler", "forward Euler, parallel branches")


def with_noise(record: Identification, forms: Sequence[NormalForm]) -> Identification:
    """A record that says the noise; its tableau and its step size are those of the drift."""
    drawn = [(form.piece, node) for form in forms for node in _noisy(form.piece)]
    if not drawn:
        taken = any(form.piece.is_noisy(node) for form in forms for stage in form.stages for node in stage.nodes)
        return replace(record, notes=(_TAKEN, *record.notes)) if taken else record
    products = [node for _, node in drawn if operation(node) in PRODUCTS]
    inside = [c for form in forms for stage in form.stages for terms in stage.inputs for c in terms.values()]
    whose = "g(x)" if products else "g"
    notes = [f"normal numbers that this pass drew {'multiply a branch' if products else 'are added'}: noise; "
             "the step size is that of the drift"]  # fmt: skip
    one = len(drawn) == 1 and not any(c.kind == "noise" for c in inside)
    if record.name in _EULER and one:
        name, system = f"{record.name} with noise (Euler-Maruyama)", f"dx = f(x) dt + {whose} dW"
    elif products:
        name, system = f"{record.name} with noise", f"{record.system}, and noise {whose} dW"
    else:  # a constant that is added changes neither tableau nor derivative
        name, system = record.name, record.system
    evidence = "measured" if products else record.evidence
    return replace(record, name=name, system=system, evidence=evidence, notes=(*notes, *record.notes))


def _noisy(piece: Piece) -> list[Node]:
    """Where drawn numbers enter on the linear paths to the new states."""
    path = {node for target in piece.targets for node in piece.expand(target)[1]}
    return [n for n in piece.nodes if n in path and piece.is_noisy(n) and operation(n) in ADDS | PRODUCTS]
