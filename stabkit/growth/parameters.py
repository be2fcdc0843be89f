"""Gradients of the parameters, shared out among the steps that use them."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stabkit.errors import TraceError
from stabkit.results import Result
from stabkit.tracing import Flow, FlowLike
from stabkit.tracing.cutting.endpoints import scalar_loss
from stabkit.tracing.cutting.samples import scale
from stabkit.tracing.flow_checks import traced
from stabkit.tracing.recording.containers import map_tensors, named_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.recorder import clock
from stabkit.tracing.recording.transparency import transparent
from stabkit.walk import wide

_AGREEMENT = 1e-4  # how far the shares may be from the whole by rounding, relative to its norm


@dataclass(frozen=True)
class ParameterGradients(Result):
    """Gradients of a loss with respect to parameters, for every step.

    Attributes:
        norms: ``(steps,)``, Euclidean norm of the gradient over all parameters that a step uses, counting its own use
            of those that several steps share; 0 for a step without parameters.
        parameter_norms: ``(steps,)``, norm of the parameters themselves.
        names: for every step, the parameters that it uses.
        by_name: norm of the whole gradient of every parameter, as ``loss.backward()`` makes it.
        elsewhere: parameters used outside all steps of the flow, or not at all.
        sample_norms: ``(steps, batch)``, the same as ``norms`` for what every sample alone contributes to the gradient;
            None unless asked for.
    """

    norms: Tensor
    parameter_norms: Tensor
    names: tuple[tuple[str, ...], ...]
    by_name: dict[str, float]
    elsewhere: tuple[str, ...]
    sample_norms: Tensor | None = None


# attributes that are made of the numbers of a tensor; all others (shape, dtype, ...) are no use of them
_TRANSPOSES = tuple(getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH"))


#: what is asked of a parameter or set in it, beside its values
_ASIDE = frozenset({"__get__", "__set__", "requires_grad_", "register_hook", "retain_grad"})


class _Uses(TorchFunctionMode):
    """Sees every call that takes a parameter, notes when it was, and passes an alias on, on the graph if wanted."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], aliased: bool, uses: list[tuple[str, int, Tensor]]
    ) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.aliased = aliased
        self.uses = uses

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        aside = getattr(func, "__name__", "") in _ASIDE and func not in _TRANSPOSES
        # what is done to a parameter off the graph is no use of it: a write must not meet an alias
        given = [] if aside or not torch.is_grad_enabled() else named_tensors([args, kwargs])
        if any(id(tensor) in self.names for _, tensor in given):
            args, kwargs = map_tensors([list(args), kwargs], self._note)
        return func(*args, **kwargs)

    def _note(self, tensor: Tensor) -> Tensor:
        name = self.names.get(id(tensor))
        if name is None or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        now = clock()
        # another tensor in either case: functions that call functions must not be counted twice
        alias = tensor.view_as(tensor) if self.aliased else tensor.detach()
        self.uses.append((name, now, alias))
        return alias


def parameter_gradients(
    flow: FlowLike,
    loss: Any,
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    per_sample: bool = False,
) -> ParameterGradients:
    """Gradients of a loss with respect to the parameters of every step of a flow.

    The model runs twice more on the same inputs: as it was recorded, to see at which step each use of a parameter
    falls, and with gradients. A parameter that several steps use has a gradient at each of them; they sum to the one
    that ``loss.backward()`` makes.

    Args:
        flow: the traced forward pass.
        loss: a callable on the model's output that returns a scalar.
        inputs: other inputs than those that were traced, a tensor or a tuple, of the same shapes.
        kwargs: their keyword arguments.
        per_sample: also the norms of what every sample contributes, through its part of the output that the flow leads
            to; one more backward pass for each.

    Raises:
        TraceError: the model does not do the same again, or uses parameters out of sight (in compiled code); or single
            samples are asked for and the output that the flow leads to was chosen by a function.

    Example:
        >>> import stabkit
        >>> model, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), torch.ones(4, 2)
        >>> found = parameter_gradients(stabkit.trace(model, x), torch.sum)
        >>> found.names
        (('0.weight', '0.bias'), (), ('2.weight', '2.bias'))
    """
    flow = traced(flow, "parameter_gradients")
    call = flow.forward_pass
    args = call.inputs if inputs is None else inputs if isinstance(inputs, tuple) else (inputs,)
    named = call.kwargs if inputs is None else dict(kwargs or {})
    known = dict(flow.model.named_parameters())
    uses: list[tuple[str, int, Tensor]] = []

    def watched(*given: Any, **named: Any) -> Any:
        uses.clear()
        with _Uses(dict(flow.model.named_parameters()), aliased=False, uses=uses):
            return call.model(*given, **named)

    call = replace(call, inputs=args, kwargs=named, promote_casts=False, ending=None)
    start = replace(call, model=watched).run(wanted=frozenset()).start
    places = [_step_at(flow, time - start) for _, time, _ in uses]
    used = [name for name, _, _ in uses]
    found = _gradients(call, loss, used, flow if per_sample else None)
    _refuse_hidden_uses(found.shares, found.whole)
    return _shared_out(flow, known, places, found)


def _step_at(flow: Flow, time: int) -> int | None:
    """The step that was running so long after the start; None before the first and after the last."""
    clock_now = time + flow.recorded.recording.start
    if clock_now <= flow.states[0].values[0].node._sequence_nr():
        return None
    position = flow.recorded.graph.position(clock_now)
    if position >= flow.states[-1].position:
        return None
    return bisect.bisect_right([state.position for state in flow.states], position) - 1


Shares = Sequence[tuple[str, Tensor | None]]


@dataclass(frozen=True)
class _Gradients:
    """The gradient at every use of a parameter, of every parameter as a whole, and the first for single samples."""

    shares: Shares
    whole: dict[str, Tensor | None]
    of_samples: list[Shares]


def _gradients(forward: ForwardPass, loss: Any, expected: list[str], by_sample: Flow | None) -> _Gradients:
    with torch.inference_mode(False), forward.kept(loss), transparent():
        known = dict(forward.module.named_parameters())
        differentiable = {name: p for name, p in known.items() if p.is_floating_point() or p.is_complex()}
        for parameter in differentiable.values():
            parameter.requires_grad_()
        args, kwargs = map_tensors([list(forward.inputs), forward.kwargs], lambda tensor: tensor.detach().clone())
        with _Uses(known, aliased=True, uses=[]) as seen:
            output = forward.model(*args, **kwargs)
        if [name for name, _, _ in seen.uses] != expected:
            raise TraceError("the model took another course when it was run again: its parameters cannot be placed")
        scalar = scalar_loss(loss, output)
        aliases = [alias for _, _, alias in seen.uses]
        wanted = [*aliases, *differentiable.values()]
        grads = _gradient(scalar, wanted, keep=by_sample is not None)
        of_samples: list[Shares] = []
        if by_sample is not None:
            target, cotangents = _cotangents_of_samples(by_sample, output, scalar)
            for one in cotangents:
                pulled = _gradient(target, aliases, one, keep=True)
                of_samples.append(list(zip(expected, pulled, strict=True)))
    shares = list(zip(expected, grads, strict=False))
    return _Gradients(shares, dict(zip(differentiable, grads[len(aliases) :], strict=True)), of_samples)


def _gradient(
    of: Tensor, wanted: Sequence[Tensor], cotangent: Tensor | None = None, *, keep: bool
) -> list[Tensor | None]:
    """The gradient in some tensors; None in those that the model itself has switched off."""
    on = [tensor for tensor in wanted if tensor.requires_grad]
    try:
        found = iter(torch.autograd.grad(of, on, cotangent, allow_unused=True, retain_graph=keep))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        hint = "; look it up with sparse=False" if "sparse" in str(error) else ""
        raise TraceError(
            f"the loss cannot be differentiated in the parameters: {' '.join(str(error).split())[:300]}{hint}"
        ) from error
    grads = (next(found) if tensor.requires_grad else None for tensor in wanted)
    return [grad.to_dense() if grad is not None and grad.is_sparse else grad for grad in grads]


def _cotangents_of_samples(flow: Flow, output: Any, scalar: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output that the flow leads to, and for every sample the gradient of the loss there, zero for all others."""
    found = [tensor for path, tensor in named_tensors(output) if (path or "output") == flow.target_name]
    if not found:
        raise TraceError(
            f"per_sample=True, but the output {flow.target_name!r} that the flow leads to is not found again; trace "
            "with target= the path of an output, not a function"
        )
    (whole,) = torch.autograd.grad(scalar, found[0], retain_graph=True)
    layout = flow.states[-1].layouts[0]
    return found[0], [scale(whole, layout, unit) for unit in torch.eye(flow.batch, dtype=torch.float64)]


def _refuse_hidden_uses(shares: Shares, whole: dict[str, Tensor | None]) -> None:
    for name, gradient in whole.items():
        if gradient is None:
            continue
        rest = gradient.detach().clone()
        for other, share in shares:
            if other == name and share is not None:
                rest -= share
        if bool(rest.norm() > _AGREEMENT * gradient.norm()):
            raise TraceError(
                f"parameter {name!r} is used where Python does not see it (TorchScript, a custom Function that holds "
                "it), so its gradient cannot be shared out among the steps"
            )


def _shared_out(
    flow: Flow,
    known: dict[str, nn.Parameter],
    places: list[int | None],
    found: _Gradients,
) -> ParameterGradients:
    sums = _by_step(len(flow.steps), places, found.shares)
    alone = [_step_norms(_by_step(len(flow.steps), places, shares)) for shares in found.of_samples]
    used = {name for names in sums for name in names}
    return ParameterGradients(
        norms=_step_norms(sums),
        parameter_norms=torch.tensor([_norm([known[name] for name in step]) for step in sums], dtype=torch.float64),
        names=tuple(tuple(step) for step in sums),
        by_name={name: _norm([gradient]) for name, gradient in found.whole.items()},
        elsewhere=tuple(name for name in known if name not in used),
        sample_norms=torch.stack(alone, dim=1) if alone else None,
    )


def _by_step(steps: int, places: list[int | None], shares: Shares) -> list[dict[str, Tensor | None]]:
    """For every step the gradients of the parameters that it uses, summed over its uses of them."""
    sums: list[dict[str, Tensor | None]] = [{} for _ in range(steps)]
    for place, (name, share) in zip(places, shares, strict=True):
        if place is not None:
            earlier = sums[place].get(name)
            sums[place][name] = share if earlier is None else earlier if share is None else earlier + share
    return sums


def _step_norms(sums: list[dict[str, Tensor | None]]) -> Tensor:
    return torch.tensor([_norm(list(step.values())) for step in sums], dtype=torch.float64)


def _norm(tensors: Sequence[Tensor | None]) -> float:
    """Euclidean norm over several tensors, in float64."""
    wide_norms = [float(torch.linalg.vector_norm(wide(t.detach().abs()))) for t in tensors if t is not None]
    return math.hypot(*wide_norms)
