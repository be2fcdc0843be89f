"""Which numerical method each step is, with the evidence for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stabkit import integrators
from stabkit.identification.skip import Skip, read_skip
from stabkit.integrators import GeneralLinearMethod
from stabkit.tracing import Flow, Step


@dataclass(frozen=True)
class Identification:
    """The method that a step implements: x' = a x + f(x), with z = eig(J) - a set against |a + z| <= 1.

    Attributes:
        name: ``"forward Euler"``, ``"damped Euler (a = 0.78)"``, ``"plain"``, ``"transition"``, ``"unknown"``, ...
        method: the general linear method, or None where none was read.
        skip: the coefficient ``a``; None where none was read.
        step_size: the step size h; 1 by convention, since only the product h f can be seen.
        convention: how h was fixed.
        evidence: ``"proven"`` (read off the graph and confirmed), ``"measured"``, ``"convention"`` or ``"unknown"``.
        residual: relative deviation of the skip from ``a`` times the identity, measured on random cotangents.
        steps: indices of the steps that make up the method.
        after: operations that follow the addition, such as a ReLU or a norm.
        notes: what else was seen.
    """

    name: str
    method: GeneralLinearMethod | None
    skip: float | None
    step_size: float | None
    convention: str
    evidence: str
    residual: float | None
    steps: tuple[int, ...]
    after: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; the method by name."""
        return {
            "name": self.name,
            "skip": self.skip,
            "step_size": self.step_size,
            "convention": self.convention,
            "evidence": self.evidence,
            "residual": self.residual,
            "steps": list(self.steps),
            "after": list(self.after),
            "notes": list(self.notes),
        }


def identify(flow: Flow) -> tuple[Identification, ...]:
    """The method of every step of a flow, read off the graph.

    A step whose source and target are one tensor of one shape is read as x' = a x + f(x): the sum of all paths that
    only move, scale and add is the skip, and a is what it does to random cotangents. a = 1 is forward Euler,
    0 < a < 1 damped Euler, a = 0 a plain layer (Yang et al., ICML 2020).

    Example:
        >>> import torch, stabkit
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.f = torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + torch.tanh(self.f(x))
        >>> flow = stabkit.trace(torch.nn.Sequential(Block(), Block()), torch.ones(2, 4))
        >>> [found.name for found in identify(flow)]
        ['forward Euler', 'forward Euler']
    """
    return tuple(_identify(step) for step in flow.steps)


def _identify(step: Step) -> Identification:
    if step.source.sample_shapes != step.target.sample_shapes:
        return _not_a_step(step, "transition", "the space changes, so this is no step of a method", "proven")
    if len(step.source.values) != 1:
        return _not_a_step(step, "unknown", "the state is a tuple of tensors; its method is not read", "unknown")
    skip = read_skip(step.segment)
    if skip.opaque and skip.kind in ("none", "other"):
        return _not_a_step(step, "unknown", f"a skip may hide inside {', '.join(skip.opaque)}", "unknown")
    if skip.kind == "normed":
        why = f"the skip passes {len(skip.after)} norm(s) after {skip.merges} addition(s), so no single a describes it"
        return _not_a_step(step, "projected Euler (post-norm)", why, "proven", skip)
    if skip.kind == "other":
        return _not_a_step(step, "not a step", "the skip moves or mixes coordinates", "measured", skip)
    return _single_stage(step, skip)


def _single_stage(step: Step, skip: Skip) -> Identification:
    a = skip.coefficient
    notes = []
    if skip.merges > 1:
        notes.append(f"{skip.merges} additions: a splitting, each branch a step of its own")
    if skip.kind == "diagonal":
        notes.append("every coordinate has its own damping; a is their mean")
    if skip.after:
        notes.append(f"after the addition: {', '.join(skip.after)}")
    method: GeneralLinearMethod | None = None
    if skip.merges == 0 and skip.kind != "none":
        name = "no branch"  # the state is moved, shifted or scaled, and nothing is added that depends on it
    elif skip.kind == "none":
        name, method = "plain", integrators.named("plain")
    elif a == 1.0 and skip.kind == "identity":
        name, method = "forward Euler", integrators.named("forward_euler")
    elif 0.0 <= a < 1.0:
        name, method = f"damped Euler (a = {a:.3g})", integrators.damped_euler(1.0 - a)
    else:
        name = f"scaled skip (a = {a:.3g})"
    return Identification(
        name=name,
        method=method,
        skip=a,
        step_size=1.0,
        convention="h = 1: only the product h f can be seen",
        evidence="proven" if skip.kind in ("none", "identity", "scaled") else "measured",
        residual=skip.residual,
        steps=(step.index,),
        after=skip.after,
        notes=tuple(notes),
    )


def _not_a_step(step: Step, name: str, why: str, evidence: str, skip: Skip | None = None) -> Identification:
    return Identification(
        name=name,
        method=None,
        skip=None,
        step_size=None,
        convention="none",
        evidence=evidence,
        residual=skip.residual if skip and skip.kind == "other" else None,
        steps=(step.index,),
        after=skip.after if skip else (),
        notes=(why,),
    )
