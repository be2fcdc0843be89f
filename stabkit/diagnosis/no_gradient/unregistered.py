"""Tensors that a model holds, uses and differentiates, and that are no parameters of it: no optimizer will move them.

A module in a plain list or dictionary is not registered, and neither is a tensor that requires grad but is no
`torch.nn.Parameter`, or a parameter after ``.to(device)`` or a product, which are new tensors. Only what is found among
the attributes of the model counts: a loss may use other models, which are trained or left alone on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis.finding import Finding, of_last_step
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.recording.training_pass import nodes_above

_DEPTH = 4  # containers within containers
_MOST = 20_000  # things that are looked at
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_REFERENCE = "PyTorch documentation, torch.nn.ModuleList and torch.nn.ParameterList"


@dataclass(frozen=True)
class _Held:
    """A tensor among the attributes of a model: where, and how to register it."""

    path: str
    attribute: str
    leaf: Tensor
    remedy: str


def unregistered_findings(run: TrainingRun) -> list[Finding]:
    """One finding for all that gets a gradient and is no parameter of the model."""
    assert run.done.loss is not None
    nodes = nodes_above(run.done.loss)
    registered = {id(p) for p in run.call.module.parameters()}
    leaves = {id(n.variable): n.variable for n in nodes if hasattr(n, "variable") and id(n.variable) not in registered}
    if not leaves:
        return []
    began = run.done.calls[0].start if run.done.calls else 0
    # what was made before this pass began: a model may keep what it computes
    older = {n for n in nodes if not hasattr(n, "variable") and n._sequence_nr() < began}
    held: dict[int, _Held] = {}
    for found in _held(run.call.module):
        tensor = found.leaf
        for leaf in [tensor] if tensor.is_leaf else _parameters_of(tensor) if tensor.grad_fn in older else []:
            if id(leaf) in leaves:
                held.setdefault(id(leaf), _Held(found.path, found.attribute, leaf, found.remedy))
    if not held:
        return []
    mine = [each.leaf for each in held.values()]
    others = [parameter for path, parameter in run.done.parameters.items() if run.done.gradients.get(path) is not None]
    squares = _squares(run.done.loss, [*mine, *others])
    hidden, total = sum(squares[: len(mine)]), sum(squares)
    if not hidden > 0:
        return []
    paths = tuple(each.path for each in held.values())
    attributes = tuple(dict.fromkeys(each.attribute for each in held.values()))
    entries = sum(leaf.numel() for leaf in mine)
    share = entries / (entries + sum(p.numel() for p in run.done.parameters.values()))
    evidence = (
        f"{listed(paths)} get a gradient and are no parameters of the model, so that no optimizer made of "
        f"model.parameters() moves them, and no state_dict, .to or .cuda knows them: {share:.0%} of the numbers that "
        f"require grad, with {hidden / total:.0%} of the squared norm of the gradient"
    )
    return [
        of_last_step(
            run.flow,
            "unregistered",
            "warning",
            attributes[0],
            evidence=evidence,
            remedy="; ".join(dict.fromkeys(each.remedy for each in held.values())),
            reference=_REFERENCE,
            numbers={"tensors": float(len(mine)), "share": share, "gradient": hidden / total},
        )
    ]


def _squares(loss: Tensor, tensors: list[Tensor]) -> list[float]:
    found = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    return [0.0 if g is None else float(g.detach().to_dense().abs().double().square().sum()) for g in found]


def _parameters_of(tensor: Tensor) -> list[Tensor]:
    """Parameters that a tensor was made of."""
    leaves = [node.variable for node in nodes_above(tensor) if hasattr(node, "variable")]
    return [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]


def _held(model: nn.Module) -> Iterator[_Held]:
    """Tensors that require grad among the attributes of the modules, in whatever holds them."""
    seen = {id(module) for module in model.modules()}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE:
                path = f"{prefix}.{name}".lstrip(".")
                yield from _within(path, path, value, None, seen, _DEPTH)


def _within(path: str, attribute: str, value: Any, holder: Any, seen: set[int], depth: int) -> Iterator[_Held]:
    if id(value) in seen or len(seen) > _MOST or depth < 0 or isinstance(value, type):
        return
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield _Held(path, attribute, value, _remedy(attribute, holder, value))
        return
    if isinstance(value, nn.Module):
        seen.update(id(module) for module in value.modules())
        for name, parameter in value.named_parameters():
            yield _Held(f"{path}.{name}", attribute, parameter, _remedy(attribute, holder, value))
        return
    for name, inner in _parts(value):
        seen.add(id(value))
        of_attribute = holder if holder is not None else value
        yield from _within(f"{path}.{name}", attribute, inner, of_attribute, seen, depth - 1)


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), inner) for key, inner in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [(str(index), inner) for index, inner in enumerate(value)]
    return list(vars(value).items()) if hasattr(value, "__dict__") and not callable(value) else []


def _remedy(attribute: str, holder: Any, value: Any) -> str:
    """What registers it."""
    modules = isinstance(value, nn.Module)
    if isinstance(holder, Mapping):
        return f"make {attribute} an nn.{'Module' if modules else 'Parameter'}Dict"
    if isinstance(holder, list | tuple):
        return f"make {attribute} an nn.{'Module' if modules else 'Parameter'}List"
    if holder is not None:
        return f"make {attribute} an nn.Module that registers what it holds"
    if modules:
        return f"assign {attribute} as an attribute of an nn.Module, which registers it"
    made = "the finished tensor, after .to and products: " if not value.is_leaf else ""
    return (
        f"make {attribute} an nn.Parameter of {made or 'it: '}self.{attribute.rpartition('.')[2]} = nn.Parameter(...)"
    )
