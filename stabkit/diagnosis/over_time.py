"""Time inside depth: recurrent modules of a model, judged by the gradient that reaches each of their time steps.

A flow over depth takes an ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU`` for one step, and a loop of cells for steps whose
states hold all inputs that are still unread. What counts over time is how much of the gradient of the loss arrives at
the input of every time step, or at every hidden state of a cell: the inputs of other times are held fixed and not
counted. A model that reads every output is reached everywhere however short its memory is, and rightly raises nothing.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stabkit.diagnosis.finding import Finding
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.diagnosis.verdict import factor
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.forward_pass import ForwardPass
from stabkit.tracing.training_pass import training_pass

Array = npt.NDArray[np.float64]
_FEWEST = 8  # time steps from which one speaks of time
_REFERENCES = {
    "vanishing": "Pascanu et al., On the difficulty of training recurrent neural networks, 2013; Gers et al., 2000",
    "exploding": "Pascanu et al., On the difficulty of training recurrent neural networks, 2013",
}


@dataclass
class TimeProfile:
    """The gradient at every time step of one recurrent module.

    Attributes:
        path: of the module.
        module: itself.
        log_gradient: ``(time,)``, log of the gradient norm there; -inf where nothing arrives.
    """

    path: str
    module: nn.Module
    log_gradient: Array

    @property
    def growth(self) -> float:
        """What the gradient gains on its way back over time, nats: from the newest step that it reaches to the oldest.

        Means of the first and last eighths, so that one step counts little.
        """
        width = max(1, len(self.log_gradient) // 8)
        with np.errstate(invalid="ignore"):
            return float(_log_mean(self.log_gradient[:width]) - _log_mean(self.log_gradient[-width:]))


def _log_mean(logs: Array) -> float:
    top = logs.max()
    return float(top + 0.5 * np.log(np.exp(2 * (logs - top)).mean())) if np.isfinite(top) else float(top)


@dataclass
class _Kept:
    """Tensors whose gradients are wanted: the input over time of one call, or the states of one cell over its calls."""

    sequences: list[tuple[str, nn.Module, Tensor, int]] = field(default_factory=list)
    cells: dict[str, tuple[nn.Module, list[list[Tensor]]]] = field(default_factory=dict)


def time_findings(flow: Flow, loss: Any, thresholds: Thresholds) -> list[Finding]:
    """Recurrent modules whose gradient vanishes or explodes over time; empty for a model without any."""
    findings = []
    for profile in time_profiles(flow.forward_pass, loss):
        growth = profile.growth
        if math.isnan(growth) or abs(growth) <= thresholds.explosion:
            continue
        findings.append(_finding(flow, profile, growth, loss, thresholds))
    return findings


def time_profiles(call: ForwardPass, loss: Any = None) -> list[TimeProfile]:
    """The gradient over time of every recurrent module that runs over eight steps or more."""
    if not any(isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in call.module.modules()):
        return []
    kept = _Kept()
    with _keeping(call.module, kept):
        done = training_pass(call, loss, differentiate=False)
    if done.loss is None:
        return []
    found = []
    for path, module, tensor, axis in kept.sequences:
        (gradient,) = torch.autograd.grad(done.loss, [tensor], retain_graph=True, allow_unused=True)
        if gradient is not None:
            rows = gradient.detach().double().movedim(axis, 0).flatten(1)
            found.append(TimeProfile(path, module, _logs(rows.norm(dim=1))))
    for path, (module, states) in kept.cells.items():
        if len(states) >= _FEWEST:
            flat = [tensor for state in states for tensor in state]
            gradients = torch.autograd.grad(done.loss, flat, retain_graph=True, allow_unused=True)
            squares = iter([0.0 if g is None else float(g.detach().double().square().sum()) for g in gradients])
            sizes = torch.tensor([math.sqrt(sum(next(squares) for _ in state)) for state in states])
            found.append(TimeProfile(path, module, _logs(sizes)))
    return found


def _logs(sizes: Tensor) -> Array:
    with np.errstate(divide="ignore"):
        logs: Array = np.log(sizes.double().numpy())
    return logs


@contextlib.contextmanager
def _keeping(model: nn.Module, kept: _Kept) -> Iterator[None]:
    """Note the inputs of recurrent modules, and the states that cells return."""
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            handles.append(module.register_forward_pre_hook(_sequence_hook(path, kept)))
        elif isinstance(module, nn.RNNCellBase):
            handles.append(module.register_forward_hook(_cell_hook(path, kept)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sequence_hook(path: str, kept: _Kept) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        assert isinstance(module, nn.RNNBase)
        given = args[0] if args else None
        if not isinstance(given, Tensor) or not given.requires_grad:
            return  # a packed sequence holds its steps in an order of its own
        axis = 1 if module.batch_first and given.dim() == 3 else 0
        if given.shape[axis] >= _FEWEST:
            kept.sequences.append((path, module, given, axis))

    return hook


def _cell_hook(path: str, kept: _Kept) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, _args: Any, output: Any) -> None:
        states = [output] if isinstance(output, Tensor) else list(output)
        if all(state.requires_grad for state in states):
            kept.cells.setdefault(path, (module, []))[1].append(states)

    return hook


def _finding(flow: Flow, profile: TimeProfile, growth: float, loss: Any, thresholds: Thresholds) -> Finding:
    kind = "vanishing" if growth < 0 else "exploding"
    count = len(profile.log_gradient)
    name = type(profile.module).__name__
    how = "by nothing at all: it is exactly zero there" if growth == -math.inf else f"by a factor of {factor(growth)}"
    evidence = (
        f"over {count} time steps of {profile.path or 'the model'} ({name}) the gradient changes {how} on its way from "
        "the last to the first; the inputs of other times are held fixed"
    )
    remedy, tried = _tried(flow, profile, growth, loss, thresholds)
    return Finding(
        kind=kind,
        severity=_severity(profile.module, growth, thresholds),
        steps=(_step_of(flow, profile.path),),
        module_path=profile.path,
        confidence=1.0,
        evidence=evidence + tried,
        remedy=remedy,
        reference=_REFERENCES[kind],
        numbers={"growth_over_time": growth if math.isfinite(growth) else -1e3, "time_steps": float(count)},
    )


def _severity(module: nn.Module, growth: float, thresholds: Thresholds) -> str:
    """Gates open while a network trains, so a gated one is given twice the range, and the end is never certain."""
    far = abs(growth) > 2 * thresholds.explosion
    if "RNN" in type(module).__name__:
        return "critical" if far else "warning"
    return "warning" if far else "info"


def _step_of(flow: Flow, path: str) -> int:
    """The step in which a module runs first."""
    for step in flow.steps:
        if step.module_path and (path == step.module_path or path.startswith(f"{step.module_path}.")):
            return step.index
    for call in flow.recorded.recording.calls:
        if call.path == path:
            position = flow.recorded.graph.position(call.start)
            return next((s.index for s in flow.steps if position < s.target.position), len(flow.steps) - 1)
    return 0


def _tried(flow: Flow, profile: TimeProfile, growth: float, loss: Any, thresholds: Thresholds) -> tuple[str, str]:
    """The first remedy that brings growth over time within range on a copy of the model, and what it changed."""
    call = flow.forward_pass
    without = "nothing that was tried on its weights helps: use an LSTM with open forget gates, read or pool all "
    without += "outputs in place of the last, or shorten the sequence"
    if not isinstance(call.model, nn.Module) or call.model is not call.module:
        return without, ""
    for text, change in _changes(profile.module, len(profile.log_gradient), growth):
        treated = copy.deepcopy(call.module)
        with torch.no_grad():
            change(treated.get_submodule(profile.path))
        try:
            after = time_profiles(replace(call, model=treated, module=treated), loss)
        except StabkitError:
            continue
        found = next((p.growth for p in after if p.path == profile.path), math.nan)
        if abs(found) <= thresholds.explosion:
            before = "nothing" if math.isinf(growth) else f"{growth:+.1f}"
            return text, f"; tried on a copy: {before} -> {found:+.1f} nats over time"
    return without, ""


def _changes(module: nn.Module, steps: int, growth: float) -> Sequence[tuple[str, Callable[[Any], None]]]:
    """What may help a recurrent module, the mildest first."""
    growth = growth if math.isfinite(growth) else -20.0 * steps
    name = type(module).__name__.removesuffix("Cell")
    if name in ("LSTM", "GRU") and growth < 0:
        bias = math.log(max(steps - 1, 2))
        gate = "forget gates" if name == "LSTM" else "update gates"
        text = f"start the {gate} open: set their part of bias_hh to {{}}, so that the memory lasts {{}}"
        return [
            (text.format("1", "a few steps"), lambda m: _open(m, 1.0)),
            (text.format(f"log({steps} - 1) = {bias:.3g}", "the sequence"), lambda m: _open(m, bias)),
            (text.format(f"{bias + 2:.3g}", "longer than the sequence"), lambda m: _open(m, bias + 2)),
        ]
    by = math.exp(-growth / steps)
    found: list[tuple[str, Callable[[Any], None]]] = [("make weight_hh orthogonal", lambda m: _orthogonal(m, 1.0))]
    if getattr(module, "nonlinearity", "tanh") == "relu":
        words = "make weight_hh orthogonal, times 1.41, for the half that ReLU passes"
        found.append((words, lambda m: _orthogonal(m, math.sqrt(2.0))))
    if 0.1 < by < 10.0:
        found.append((f"multiply weight_hh by {by:.3g}", lambda m: _scaled(m, by)))
        found.append((f"make weight_hh orthogonal, times {by:.3g}", lambda m: _orthogonal(m, by)))
    return found


def _scaled(module: nn.Module, by: float) -> None:
    for name, parameter in module.named_parameters():
        if name.startswith("weight_hh"):
            parameter.mul_(by)


def _open(module: nn.Module, value: float) -> None:
    """Set the biases of the forget gates of an LSTM, or of the update gates of a GRU, in one of the two biases."""
    for name, parameter in module.named_parameters():
        if name.startswith("bias_hh"):
            size = len(parameter) // (4 if "LSTM" in type(module).__name__ else 3)
            parameter[size : 2 * size] = value


def _orthogonal(module: nn.Module, gain: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if name.startswith("weight_hh"):
            size = parameter.shape[1]
            for block in parameter.split(size):  # type: ignore[no-untyped-call]
                drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
                block.copy_(gain * torch.linalg.qr(drawn)[0])
