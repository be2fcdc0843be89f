"""Remedies carried out: of one finding, or in rounds until nothing is left to treat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from stabkit.arguments import accepts
from stabkit.diagnosis.examination import examine
from stabkit.diagnosis.finding import Finding, serious
from stabkit.diagnosis.no_gradient.unreached import diagnosis_without_flow
from stabkit.diagnosis.remedies.applying import carry_out, copied
from stabkit.diagnosis.states.running_statistics import refill
from stabkit.diagnosis.suspects import Diagnosis
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.errors import ArgumentError
from stabkit.tracing import trace
from stabkit.tracing.cutting.endpoints import UnreachedError
from stabkit.tracing.recording.forward_pass import ForwardPass


@accepts
def apply(model: nn.Module, finding: Finding, *, seed: int = 0) -> int:
    """How many actions of a finding's remedy were carried out on the model, which is changed in place.

    Args:
        model: the model that was diagnosed.
        finding: what was found in it.
        seed: the seed of weights that are drawn anew.

    Raises:
        ArgumentError: an action names something that the model does not have, or is of an unknown form.

    Example:
        >>> import torch, stabkit
        >>> from stabkit.diagnosis import apply
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(32, 32, bias=False) for _ in range(8)])
        >>> for layer in model: _ = torch.nn.init.orthogonal_(layer.weight)
        >>> model[3].weight.data.mul_(20.0).norm() > 100
        tensor(True)
        >>> found = stabkit.diagnose(stabkit.trace(model, torch.randn(4, 32)))
        >>> [(f.kind, f.module_path) for f in found]
        [('exploding', '3')]
        >>> apply(model, found[0])
        1
        >>> stabkit.diagnose(stabkit.trace(model, torch.randn(4, 32)))
        []
    """
    carry_out(model, finding.actions, seed)
    return len(finding.actions)


@dataclass(frozen=True)
class Treatment:
    """A treated copy of a model, and what was done to it.

    Attributes:
        model: the copy.
        applied: the findings whose remedies were carried out, in this order.
        before: the diagnosis of the model as it was given.
        after: the diagnosis of the copy.
    """

    model: nn.Module
    applied: tuple[Finding, ...]
    before: Diagnosis
    after: Diagnosis

    @property
    def silent(self) -> bool:
        """Whether nothing at warning or above is left."""
        return not any(serious(finding) for finding in self.after.findings)

    def __str__(self) -> str:
        lines = [
            f"{finding.kind} at {finding.module_path or 'the model'}: {finding.remedy}" for finding in self.applied
        ]
        left = [
            f"left, to be done by hand: {f.kind} at {f.module_path or 'the model'}: {f.evidence}; {f.remedy}"
            for f in self.after.findings
            if serious(f)
        ]
        return "\n".join([*(lines or ["nothing was done"]), *left])


@accepts
def treat(
    model: nn.Module,
    *inputs: Any,
    loss: object = None,
    kwargs: Mapping[str, Any] | None = None,
    rounds: int = 8,
    thresholds: Thresholds | None = None,
    seed: int = 0,
    **tracing: Any,
) -> Treatment:
    """A copy of a model, treated in rounds, with what was done to it.

    Each round diagnoses the copy and carries out the first remedy of a finding at warning or above that helped when it
    was tried. Rounds end when no such finding is left, when none that is left has a remedy that can be carried out, or
    when ``rounds`` are used up; ``silent`` says whether nothing is left. The model that is given stays as it is.
    Whether the copy then trains is for a training run to say.

    Args:
        model: what to treat.
        *inputs: what it is called with.
        loss: a callable on the model's output that returns a scalar; None pulls back random cotangents.
        kwargs: keyword arguments of the call.
        rounds: remedies that are carried out at most.
        thresholds: the limits behind the findings.
        seed: the seed of every random choice.
        **tracing: further options of `stabkit.trace`, such as ``batch_dim``.

    Raises:
        ArgumentError: the model is no ``torch.nn.Module``, or no copy can be made of it.
        TraceError: the model could not be traced. Where nothing leads from the input to the output, and a loss trains
            parameters still, the copy is left as it is, with what was found.

    Example:
        >>> import torch
        >>> layers = [torch.nn.Linear(16, 16, bias=False) for _ in range(12)]
        >>> for layer in layers: _ = torch.nn.init.orthogonal_(layer.weight)
        >>> for layer, by in ((layers[2], 0.05), (layers[7], 30.0)): _ = layer.weight.data.mul_(by)
        >>> done = treat(torch.nn.Sequential(*layers), torch.randn(4, 16))
        >>> sorted((f.kind, f.module_path) for f in done.applied), done.silent
        ([('exploding', '7'), ('vanishing', '2')], True)
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model is a {type(model).__name__}; treat copies and changes modules: give a torch.nn.Module"
        )
    treated = copied(model)
    applied: list[Finding] = []

    def diagnosed() -> Diagnosis:
        try:
            flow = trace(treated, *inputs, kwargs=kwargs, seed=seed, **tracing)
            flow = flow if loss is None else flow.following(loss)
        except UnreachedError as error:
            if loss is None or not any(p.requires_grad for p in treated.parameters()):
                raise
            call = ForwardPass(treated, treated, inputs, dict(kwargs or {}), seed)
            return diagnosis_without_flow(call, loss, str(error))
        return examine(flow, loss, thresholds=thresholds, seed=seed)

    before = after = diagnosed()
    for _ in range(rounds):
        found = next((f for f in after.findings if serious(f) and f.actions), None)
        if found is None:
            break
        carry_out(treated, found.actions, seed)
        emptied = [action["module"] for action in found.actions if action["action"] == "reset_statistics"]
        if emptied:
            refill(treated, emptied, *inputs, **(kwargs or {}))
        applied.append(found)
        after = diagnosed()
    return Treatment(treated, tuple(applied), before, after)
