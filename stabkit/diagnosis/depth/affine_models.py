"""Models that are one affine map of their input, however many matrices they multiply: no activation stands between.

f(a x + (1 - a) y) = a f(x) + (1 - a) f(y) for all inputs and any a, also beyond 0 to 1, holds for affine maps alone. It
is tried on the last product of the model, behind which activations may stand, in eval mode. Such a model can do
what one layer can; it may be studied for that very reason, and is a fault only where activations train better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.conv import _ConvNd

from stabkit.diagnosis.finding import Action, Finding, of_module
from stabkit.diagnosis.losses.ranges import behind_moves
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.applying import carried_out, is_small
from stabkit.diagnosis.remedies.usual_training import RATES, adam, learns_only_treated, left_after, sgd
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.derivatives.lost_gradient import listed
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.evaluation import evaluated
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.function_calls import FunctionCalls, name_of
from stabkit.tracing.recording.training_pass import TrainingPass, nodes_from, path_of, training_pass
from stabkit.vocabulary import activation_of

_PRODUCTS = frozenset({"Addmm", "Mm", "Bmm", "Baddbmm", "Convolution"})
_CALLS = frozenset(
    {"linear", "matmul", "mm", "addmm", "bmm", "einsum", "conv1d", "conv2d", "conv3d"}
    | {f"conv_transpose{n}d" for n in (1, 2, 3)}
)
_SOFTMAXES = frozenset({"Softmax", "LogSoftmax", "LogSigmoid"})
_SHARES = (0.5, -3.0, 4.0)  # of one input in a combination: within and far beyond the two
_ROUNDING = 1e-4  # of the size of what is combined
_STEPS = 100  # of a trial, and a fifth of that for large models: activations have to find what no affine map has

_REFERENCE = "Goodfellow, Bengio and Courville, Deep learning, 2016, section 6.1, learning XOR"


def affine_findings(run: TrainingRun) -> list[Finding]:
    """A finding where the whole model is affine in its input and has several trained matrices in a row."""
    outputs = [t for _, t in named_tensors(run.done.output) if t.is_floating_point() and t.requires_grad]
    if len(outputs) != 1 or outputs[0].grad_fn is None:
        return []
    last, bare = _last_product(outputs[0].grad_fn)
    chain = _chain(last, run.done) if last is not None else ()
    end = "" if bare else path_of(run.done, last)
    if len(chain) < 2 or not (bare or end) or not _is_affine(run.call, end):
        return []
    evidence = (
        f"the model is one affine map of its input{f' up to {end}' if end else ''}: {len(chain)} trained matrices "
        f"follow each other without an activation between ({listed(chain)}), which together can do no more than one; "
        "f(a x + (1 - a) y) = a f(x) + (1 - a) f(y) to rounding, wherever that was tried"
    )
    actions = _actions(run.call, chain)
    severity, tried = _trial(run, chain, actions)
    first = chain[0].rpartition(".")[0]
    return [
        of_module(
            run.flow,
            "affine",
            severity,
            first,
            evidence=evidence + tried,
            remedy=f"an activation, such as the ReLU that was tried, behind each of {listed(chain[:-1])}"
            if severity == "warning"
            else "none is needed where a linear model is meant; otherwise an activation behind each hidden layer",
            reference=_REFERENCE,
            numbers={"matrices": float(len(chain))},
            actions=actions if severity == "warning" else (),
        )
    ]


def _actions(call: ForwardPass, chain: Sequence[str]) -> tuple[Action, ...]:
    """A ReLU behind each hidden matrix, where all of them are the weights of layers that are not the last one too."""
    modules = dict(call.module.named_modules())
    paths = [name.rpartition(".")[0] for name in chain]
    layers = all(isinstance(modules.get(path), nn.Linear | _ConvNd) for path in paths[:-1])
    if not layers or paths[-1] in paths[:-1]:
        return ()
    return tuple(remedies.activate_after(path, "ReLU") for path in dict.fromkeys(paths[:-1]))


def _last_product(node: Node | None) -> tuple[Node | None, bool]:
    """The product that an output comes from by views and activations alone, and whether by views alone."""
    made, bare = behind_moves(node), True
    while made is not None and (activation_of(made) is not None or operation(made) in _SOFTMAXES):
        made, bare = behind_moves(made.next_functions[0][0]), False
    return made, bare


def _chain(last: Node, done: TrainingPass) -> tuple[str, ...]:
    """The longest row of trained matrices that follow each other, by name, from the first; empty beside activations."""
    names = {id(p): path for path, p in done.parameters.items()}
    longest: dict[Node, tuple[str, ...]] = {}
    nodes = nodes_from(last)
    if any(activation_of(node) is not None for node in nodes):
        return ()
    stack = [last]
    while stack:
        node = stack[-1]
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        waiting = [parent for parent in parents if parent not in longest]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        best = max((longest[parent] for parent in parents), key=len, default=())
        matrix = _matrix(parents, names) if operation(node) in _PRODUCTS else ""
        longest[node] = (*best, matrix) if matrix else best
    return longest[last]


def _matrix(parents: list[Node], names: dict[int, str]) -> str:
    """The trained parameter that a product is taken with."""
    for parent in parents:
        leaf: Any = behind_moves(parent)
        while leaf is not None and operation(leaf) == "T":
            leaf = behind_moves(leaf.next_functions[0][0])
        if leaf is not None and hasattr(leaf, "variable") and leaf.variable.dim() > 1 and id(leaf.variable) in names:
            return names[id(leaf.variable)]
    return ""


def _is_affine(call: ForwardPass, end: str) -> bool:
    """Whether what a module returns, or the model, is affine in the inputs of floats; not where it is constant."""
    given = [t for _, t in call.given if t.is_floating_point()]
    if not given or any(t.layout != torch.strided for t in given):
        return False

    def other(t: Tensor) -> Tensor:
        noise = torch.randn(t.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(t)
        return noise * (t.std() if t.numel() > 1 and float(t.std()) > 0 else 1.0)

    one, two = _at(call, end, 1.0, other), _at(call, end, 0.0, other)
    if one is None or two is None or one.shape != two.shape:
        return False
    size = float(torch.maximum(one.abs(), two.abs()).max())
    if not float((one - two).abs().max()) > _ROUNDING * size:
        return False
    for share in _SHARES:
        between = _at(call, end, share, other)
        if between is None or between.shape != one.shape:
            return False
        off = (between - share * one - (1 - share) * two).abs().max()
        if not float(off) <= _ROUNDING * (abs(share) + abs(1 - share)) * size:
            return False
    return True


def _at(call: ForwardPass, end: str, share: float, other: Any) -> Tensor | None:
    """What comes out where a share of the input is the batch, and the rest another."""
    seen: list[Tensor] = []
    modules = dict(call.module.named_modules())
    hook = modules[end].register_forward_hook(lambda _m, _i, out: seen.append(out)) if end else None

    def mixed(t: Tensor) -> Tensor:
        return share * t + (1 - share) * other(t) if t.is_floating_point() else t

    try:
        output = evaluated(call, mixed).output
    finally:
        if hook is not None:
            hook.remove()
    found = seen if end else [t for _, t in named_tensors(output) if t.is_floating_point()]
    return found[0].detach().double() if len(found) == 1 and isinstance(found[0], Tensor) else None


class _Activated(FunctionCalls):
    """Puts a ReLU behind every product with some parameters of a model, where no layers hold them.

    Attributes:
        met: the parameters that a product was taken with.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self._held = {model.get_parameter(name).untyped_storage()._cdata: name for name in names}
        self.met: set[str] = set()

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if name_of(func) not in _CALLS:
            return result
        given = [t for _, t in named_tensors([list(args), kwargs]) if t.layout == torch.strided]
        names = {self._held[at] for t in given if (at := t.untyped_storage()._cdata) in self._held}
        self.met |= names
        return torch.relu(result) if names else result


def _trial(run: TrainingRun, chain: Sequence[str], actions: Sequence[Action]) -> tuple[str, str]:
    """How bad it is, and what a short training says, as it is and with a ReLU behind each hidden matrix."""
    assert run.done.loss is not None
    first = float(run.done.loss.detach())
    treated = run.call if actions else _activated(run.call, chain)
    if treated is None or not first > 0:
        return "info", ""
    steps = _STEPS if is_small(run.call.module) else _STEPS // 5
    updates = [by(rate) for rate in RATES for by in (adam, sgd)]
    with carried_out(run.call.module, actions):
        begun = training_pass(treated, run.loss, differentiate=False).loss
    plain, left = (
        left_after(run.call, run.loss, updates, steps=steps),
        left_after(treated, run.loss, updates, actions, steps=steps),
    )
    if plain is None or left is None or begun is None:
        return "info", ""
    ends = plain * first, left * float(begun.detach())
    words = (
        f"; {steps} steps of SGD or Adam take the loss from {first:.3g} to {ends[0]:.3g} as it is, to {ends[1]:.3g} "
        "with ReLUs between"
    )
    return ("warning" if learns_only_treated(first, *ends) else "info"), words


def _activated(call: ForwardPass, chain: Sequence[str]) -> ForwardPass | None:
    """The same call with a ReLU behind the products with each hidden matrix; None where not all of them are found."""
    if chain[-1] in chain[:-1]:
        return None
    met: set[str] = set()

    def model(*inputs: Any, **kwargs: Any) -> Any:
        with _Activated(call.module, chain[:-1]) as activated:  # the parameters may be stand-ins by then
            output = call.model(*inputs, **kwargs)
        met.update(activated.met)
        return output

    treated = replace(call, model=model)
    evaluated(treated)
    return treated if met == set(chain[:-1]) else None
