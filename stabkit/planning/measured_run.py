"""An analysis of one sample with one probe, timed part by part: what everything larger is priced from."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stabkit.attribution.measure import EXPLAINED, EXPLAINED_PROBES, attribute
from stabkit.diagnosis import examine
from stabkit.errors import StabkitError, TraceError
from stabkit.identification import Identification, identify
from stabkit.planning.machine_speed import PeakMemory, timed
from stabkit.tracing import Flow, Step, same_space, trace
from stabkit.tracing.recording.batch_parts import Call
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.recorder import Recording
from stabkit.tracing.recording.untouched_model import unchanged
from stabkit.tracing.recording.wrappers import modules_behind, unwrap

_BLOCK = 2  # vectors that the iterations multiply at once
_SLOW = 1.0  # seconds of a forward pass from which nothing is analysed for the price
# an analysis as multiples of a plain forward pass: ResNet-50, GPT-2 small and MiniLM take 3.5 to 4.7 to trace, 3 to 9
# to read, 13 to 14 to examine; attribution multiplies by 16 probes
_ANALYSING, _EXPLAINING = 21.5, 24.0


@dataclass(frozen=True)
class StepCost:
    """What products with one step's Jacobian cost, for one sample.

    Attributes:
        source: numbers in the state before it.
        target: numbers in the state after it.
        square: whether it keeps the space, so that it has eigenvalues.
        backward: seconds of a product with the transpose.
        forward: seconds of a product.
        flops: floating-point operations of a product with the transpose.
    """

    source: int
    target: int
    square: bool
    backward: float
    forward: float
    flops: float


@dataclass(frozen=True)
class Trial:
    """Seconds, operations and bytes of an analysis of ``samples`` samples with one probe and no spectra.

    Attributes:
        samples: how many.
        seconds: to record the forward pass, check the chain, identify the integrators, measure and diagnose.
        explaining: seconds to attribute the growth, which goes with spectra; 0 when there are none.
        forward_flops: operations of one forward pass.
        graph_bytes: the bytes of the tensors that the recorded graph keeps, weights aside.
        peak: bytes in use at most, with the model and everything else in the process; None where nobody says.
        steps: what products with every step cost.
    """

    samples: int
    seconds: float
    explaining: float
    forward_flops: float
    graph_bytes: int
    peak: int | None
    steps: tuple[StepCost, ...] = field(repr=False)

    @property
    def probe(self) -> float:
        """Seconds of one more probe: a walk back through all steps."""
        return sum(step.backward for step in self.steps)


def device_of(model: Any) -> torch.device:
    """Where a model's parameters are."""
    module = modules_behind(unwrap(model))
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers."""
    module = modules_behind(unwrap(model))
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def run_trial(model: Any, call: Call, options: Mapping[str, Any], loss: Any, seed: int, spectra: bool) -> Trial:
    """Analyse a few samples with one probe and no spectra, and time it.

    Where a forward pass alone takes more than a second, the model is only recorded: the rest is a typical multiple of
    that pass.

    Args:
        model: a module, or a function of tensors.
        call: the samples.
        options: where to trace: ``depth``, ``source``, ``target``.
        loss: a callable on the model's output, or None.
        seed: the seed of every random choice.
        spectra: also time the attribution of the growth, and products in both directions.
    """
    device, module = device_of(model), modules_behind(model)
    forward, forward_flops = _forward(model, call, device)
    slow = forward > _SLOW
    saved = _Saved(module)

    def analysed() -> tuple[Flow, tuple[Identification, ...]]:
        with saved:
            check = call.samples > 1 or not slow
            flow = trace(
                model, *call.inputs, kwargs=call.kwargs, batch_dim=call.batch_dim, seed=seed, check=check, **options
            )
        if slow:
            return flow, ()
        found = identify(flow, checks=False)
        examine(flow, loss, probes=1, seed=seed, methods=lambda: found)
        return flow, found

    with unchanged(module, model, loss, given=(call.inputs, call.kwargs)), PeakMemory(device) as peak:
        (flow, found), seconds = timed(analysed, device)
        explaining = 0.0
        if spectra and not slow:
            effort: dict[str, Any] = {"samples": min(flow.batch, EXPLAINED), "probes": EXPLAINED_PROBES, "krylov": 0}
            _, explaining = timed(lambda: attribute(flow, identifications=found, seed=seed, **effort), device)
        steps = _step_costs(flow, device, spectra)
    return Trial(
        samples=call.samples,
        seconds=_ANALYSING * forward if slow else seconds,
        explaining=_EXPLAINING * forward if slow and spectra else explaining,
        forward_flops=forward_flops,
        graph_bytes=saved.total,
        peak=peak.most,
        steps=steps,
    )


def _forward(model: Any, call: Call, device: torch.device) -> tuple[float, float]:
    """Seconds and operations of one plain forward pass, without gradients."""
    forward = ForwardPass(model, modules_behind(model), call.inputs, dict(call.kwargs), seed=0)
    try:
        with torch.inference_mode(False), forward.kept(), torch.no_grad(), _counting() as counter:
            forward.called()
        with torch.inference_mode(False), forward.kept(), torch.no_grad():
            _, seconds = timed(forward.called, device)
    except (StabkitError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model is the user's code
        raise forward.failed(error, Recording()) from error
    return seconds, float(counter.get_total_flops())


def _counting() -> Any:
    """A context that counts floating-point operations."""
    from torch.utils.flop_counter import FlopCounterMode  # brings triton in, where that is installed

    return FlopCounterMode(display=False)


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that a graph keeps for its backward pass, each storage once, weights aside."""

    def __init__(self, module: nn.Module) -> None:
        seen = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers()) if _plain(t)}
        self.total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            if _plain(tensor) and tensor.untyped_storage()._cdata not in seen:
                seen.add(tensor.untyped_storage()._cdata)
                self.total += tensor.untyped_storage().nbytes()
            return tensor

        super().__init__(count, lambda tensor: tensor)


def _plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided


def _step_costs(flow: Flow, device: torch.device, spectra: bool) -> tuple[StepCost, ...]:
    """Like steps are measured once."""
    known: dict[tuple[Any, ...], tuple[float, float, float]] = {}
    costs = []
    kinds = [_likeness(step) for step in flow.steps]
    for step, kind in zip(flow.steps, kinds, strict=True):
        if kind not in known:
            known[kind] = _product_costs(step, device, spectra)
        backward, forward, flops = known[kind]
        square = same_space(step.source, step.target)
        costs.append(StepCost(step.source.size, step.target.size, square, backward, forward, flops))
    return tuple(costs)


def _likeness(step: Step) -> tuple[Any, ...]:
    operations = tuple(sorted(Counter(step.operations).items()))
    return step.module_class, step.source.sample_shapes, step.target.sample_shapes, operations


def _product_costs(step: Step, device: torch.device, spectra: bool) -> tuple[float, float, float]:
    """Seconds of J^T u and of J v a vector, operations of J^T u."""
    J = step.jacobian()
    batch, m, n = J.shape
    width = _BLOCK if spectra else 1
    U = torch.randn(batch, m, width, generator=torch.Generator().manual_seed(0)).to(device, J.dtype)
    with _counting() as counter:
        J.rmatmat(U[..., :1])  # the first block of several is also multiplied another way, to check it
    J.rmatmat(U)
    backward = _second(lambda: J.rmatmat(U), device) / width
    forward = 0.0
    if spectra:
        V = torch.randn(batch, n, width, generator=torch.Generator().manual_seed(0)).to(device, J.dtype)
        with contextlib.suppress(TraceError):  # a step without a certified product has no iterated spectrum either
            J.matmat(V)
            forward = _second(lambda: J.matmat(V), device) / width
    step.segment.release()
    return backward, forward, float(counter.get_total_flops())


def _second(work: Callable[[], Any], device: torch.device) -> float:
    """The first call compiled kernels and touched fresh memory."""
    return min(timed(work, device)[1] for _ in range(2))
