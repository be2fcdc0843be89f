"""Parameters that get no gradient, and where it stops."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from stabkit.diagnosis.finding import Finding
from stabkit.tracing.derivatives.flat_derivatives import FlatDerivative
from stabkit.tracing.derivatives.lost_gradient import (
    DRAW,
    FIRST_ORDER,
    INDICES,
    MADE,
    Cut,
    LostGradient,
    listed,
    lost_gradient,
    lost_without_checkpoints,
)
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import REENTRANT, TrainingPass

_LARGE = 0.2  # share of the trainable parameters from which an unused branch is more than a head that is not asked for

_REMEDIES = {
    "detach": "take the detach away, or give what is before it a loss of its own; if it is meant, set requires_grad_"
    "(False) on these parameters",
    "no_grad": "take torch.no_grad away; if it is meant, set requires_grad_(False) on these parameters",
    "argmax": "choose softly: a softmax, gumbel_softmax(hard=True), or a straight-through estimator",
    "exit": "stay within torch: a tensor that is made of numbers has no history",
    REENTRANT: "give checkpoint use_reentrant=False, or let what goes into it require grad: "
    "model.enable_input_require_grads(), or requires_grad_() on the output of the embedding",
    FIRST_ORDER: "take the derivative with create_graph=True, so that it is trained like any other output",
    MADE: "a new nn.Parameter, like .data and torch.tensor(...), is a leaf without history: use the tensor itself, as "
    "functional.linear(x, weight, bias) does, or torch.func.functional_call(module, {name: tensor}, x) for a module",
    "tensor": "torch.tensor(...) makes a copy without history: use the tensor itself, or its clone()",
    "other": "its derivative is zero or there is none: use a smooth one in its place, or a straight-through estimator",
}
_CHOICES = frozenset({"argmax", "argmin", "topk", "argsort", "sort", "multinomial", "one_hot"})
_REFERENCE = "Bengio et al., Estimating or propagating gradients through stochastic neurons, 2013"


def lost_parameter_findings(
    call: ForwardPass, steps: tuple[int, ...], loss: Any = None, done: TrainingPass | None = None
) -> list[Finding]:
    """One finding for every place where gradients stop, and one for what is never used.

    Args:
        call: the pass as training makes it.
        steps: the last step of its flow; empty where there is no flow, as nothing leads from the input to the output.
        loss: a callable on the output that returns a scalar; None counts every float output.
        done: a training pass of this call and loss that was made before; None makes one.
    """
    found, asked = lost_gradient(call, loss, done), loss is not None
    reentrant = any(cut.operation == REENTRANT for cut in found.cuts)
    left = set(lost_without_checkpoints(call, loss)) if reentrant else set()
    cuts = [_cut(found, cut, steps, asked, left) for cut in found.cuts if cut.parameters]
    flat = [_flat(each, steps, asked) for each in found.flat]
    return [*flat, *cuts, *_unused(found, call, steps, asked)]


def _flat(found: FlatDerivative, steps: tuple[int, ...], asked: bool) -> Finding:
    """A second derivative by the input that is zero whatever the parameters are."""
    names, line = " and ".join(found.activations), f" at {found.line}" if found.line else ""
    where = f" ({listed(found.paths)})" if found.paths else ""
    still, all_of_them = found.parameters, len(found.parameters) == found.trainable
    consequence = "every parameter learns from the rest of the loss alone"
    if still:
        many = "no parameter gets" if all_of_them else f"{len(still)} of {found.trainable} parameters do not get"
        consequence = f"{many} a gradient from the loss ({listed(still)})"
    return Finding(
        kind="no_gradient",
        severity=("critical" if all_of_them else "warning") if asked else "info",
        steps=steps,
        module_path=found.paths[0] if found.paths else "",
        confidence=1.0,
        evidence=f"the derivative that the {found.part} takes{line} is zero everywhere: it is a second derivative of "
        f"{names}{where}, which is linear between its kinks, and no parameter changes that; {consequence}",
        remedy="use a smooth activation in its place (Tanh, SiLU, Softplus, a sine)",
        reference="Raissi, Perdikaris and Karniadakis, Physics-informed neural networks, 2019",
        numbers={"parameters": float(len(still)), f"closed:the second derivative of {names}": 1.0},
    )


def _cut(found: LostGradient, cut: Cut, steps: tuple[int, ...], asked: bool, left: set[str]) -> Finding:
    """Without a loss nobody knows what is to be trained by what, and a cut is said in passing.

    ``left`` are those that get no gradient however checkpoints are made.
    """
    share, why = _share(found, cut.parameters), ""
    if cut.operation == REENTRANT:
        got = len([path for path in cut.parameters if path not in left])
        why = (
            ", which passes none on where nothing that goes in requires grad; tried on a copy, "
            f"use_reentrant=False: {got} of them get one"
        )
    return Finding(
        kind="no_gradient",
        severity=("critical" if share > 1 - 1e-9 else "warning") if asked else "info",
        steps=steps,
        module_path=cut.behind or cut.path or _home(cut.parameters),
        confidence=1.0,
        evidence=f"the gradient stops at {cut.place}: {len(cut.parameters)} of {len(found.trainable)} parameters that "
        f"are to be trained get none ({listed(cut.parameters)}; {share:.0%} of their numbers){why}",
        remedy=remedy_for(cut.operation),
        reference=_REFERENCE,
        numbers={"parameters": float(len(cut.parameters)), "share": share},
    )


def _unused(found: LostGradient, call: ForwardPass, steps: tuple[int, ...], asked: bool) -> list[Finding]:
    """Parameters of modules that never run, or whose results are not used.

    A head that the loss does not ask for, an expert that no token is sent to, and what never runs do no harm to the
    rest; a large part of a model that is in training mode, runs, and takes no part in its loss is a fault. Without a
    loss nobody knows whether it would: a way through the model that this call did not ask for is no fault.
    """
    if not found.unused:
        return []
    share = _share(found, found.unused)
    used = {role_of(path) for path in set(found.trainable) - set(found.lost)}
    chosen_among = {role_of(path) for path in found.unused} <= used
    ran = [path for path in found.unused if path.rpartition(".")[0] not in found.idle]
    serious = asked and _share(found, ran) >= _LARGE and call.module.training and not chosen_among
    kept = set(found.trainable) - set(found.lost)
    idle = [m for m in found.idle if m and not any(path.startswith(f"{m}.") for path in kept)]  # a list does not run
    why = f"{listed(tuple(idle))} never runs" if idle else "nothing that counts is made of what they give"
    return [
        Finding(
            kind="no_gradient",
            severity="warning" if serious else "info",
            steps=steps,
            module_path=_home(found.unused),
            confidence=1.0,
            evidence=f"{len(found.unused)} of {len(found.trainable)} parameters that are to be trained are not used "
            f"({listed(found.unused)}; {share:.0%} of their numbers): {why}",
            remedy="use them in the forward pass, take them out, or set requires_grad_(False) on them",
            reference="",
            numbers={"parameters": float(len(found.unused)), "share": share},
        )
    ]


def remedy_for(operation: str) -> str:
    """What to do about an operation that takes tensors off the graph."""
    if operation in _CHOICES or operation.startswith(INDICES) or (DRAW in operation and not operation.endswith(DRAW)):
        return _REMEDIES["argmax"]
    if operation.endswith(DRAW):
        return "draw with rsample(), which passes the gradient on to what it is drawn with"
    if operation in _REMEDIES:
        return _REMEDIES[operation]
    return _REMEDIES["exit" if operation.endswith("()") else "other"]


def _share(found: LostGradient, paths: Sequence[str]) -> float:
    return sum(found.trainable[path] for path in paths) / max(1, sum(found.trainable.values()))


def role_of(path: str) -> str:
    """A path without the numbers that tell like blocks apart."""
    return re.sub(r"\d+", "*", path)


def _home(paths: Sequence[str]) -> str:
    """The module that holds all of some parameters."""
    split = [path.split(".")[:-1] for path in paths]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
