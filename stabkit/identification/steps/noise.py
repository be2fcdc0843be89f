"""Steps of stochastic equations: normal numbers that this pass drew are added to the state, or multiply a branch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.operations import ADDS, PRODUCTS
from stabkit.identification.form.pieces import Piece
from stabkit.identification.record import Identification
from stabkit.tracing.graph.values import operation

_TAKEN = "the field takes normal numbers that this pass drew: it is another one in every pass"
_FEWEST = 4  # numbers that two coefficients fit by chance are two
_CLOSE = 1e-4  # squares of single precision numbers less another
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
    if record.name in _EULER and len(products) == len(drawn) == 2 and _squares_less(products, record.step_size):
        name, system = "forward Euler with noise (Milstein)", f"dx = f(x) dt + {whose} dW"
        notes.append("two branches are multiplied by drawn numbers w and w^2 - h: the scheme of Milstein")
    elif record.name in _EULER and one:
        name, system = f"{record.name} with noise (Euler-Maruyama)", f"dx = f(x) dt + {whose} dW"
    elif products:
        name, system = f"{record.name} with noise", f"{record.system}, and noise {whose} dW"
    else:  # a constant that is added changes neither tableau nor derivative
        name, system = _without_cells(record.name), record.system
    evidence = "measured" if products else record.evidence
    return replace(record, name=name, system=system, evidence=evidence, notes=(*notes, *record.notes))


def _squares_less(products: Sequence[Node], h: float | None) -> bool:
    """Whether one of two products has the numbers c (w^2 - h), where the other has the numbers w, times one."""
    drawn = [[t.double().flatten() for t in _factors(node)] for node in products]
    if h is None or any(len(found) != 1 or found[0].numel() < _FEWEST for found in drawn):
        return False
    for (w,), (other,) in itertools.permutations(drawn):
        if w.numel() != other.numel():
            continue
        terms = torch.stack([w.square(), torch.ones_like(w)], 1)
        numbers = torch.linalg.lstsq(terms, other[:, None]).solution[:, 0]
        away = float((terms @ numbers - other).norm())
        square, rest = map(float, numbers)
        if away <= _CLOSE * float(other.norm()) and square and abs(-rest / square - h) <= _CLOSE * h:
            return True
    return False


def _factors(node: Node) -> list[Tensor]:
    """The constants of more than one entry that an operation multiplies by."""
    saved = [getattr(node, name, None) for name in ("_saved_other", "_saved_self")]
    return [t.detach() for t in saved if isinstance(t, Tensor) and t.grad_fn is None and t.numel() > 1]


def _without_cells(name: str) -> str:
    """A name without the recurrent cell that has the same step: a stochastic equation is no such cell."""
    alone = name.removesuffix(" (coRNN)").removesuffix(" (UnICORNN)")
    return name if alone == name else f"{alone}, with noise"


def _noisy(piece: Piece) -> list[Node]:
    """Where drawn numbers enter on the linear paths to the new states."""
    path = {node for target in piece.targets for node in piece.expand(target)[1]}
    return [n for n in piece.nodes if n in path and piece.is_noisy(n) and operation(n) in ADDS | PRODUCTS]
