"""Recurrent networks as flows over time: the state is all that the future depends on, given the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from stabkit.arguments import a, accepts
from stabkit.errors import TraceError
from stabkit.tracing.flow import Flow, State, Step
from stabkit.tracing.graph.values import Value
from stabkit.tracing.maps.iteration import Iteration, iteration
from stabkit.tracing.maps.linearization import StepFunction, Tensors
from stabkit.tracing.products.step_products import Products
from stabkit.tracing.protocols import same_space
from stabkit.tracing.recording.hooks import hooked
from stabkit.tracing.recording.untouched_model import aside
from stabkit.tracing.tracer import trace


@accepts
def recurrent_flow(
    module: nn.Module,
    inputs: Any,
    state: Any = None,
    *,
    step_size: float | None = None,
) -> Flow | Iteration:
    """A recurrent network as a flow over time, with its input held fixed: one step per time step.

    The state is complete: hidden and cell state of all layers. What is measured on it is conditional on the input, so
    exponents say whether two runs on the same input come together. Give several inputs as a batch.

    Args:
        module: ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU`` (all layers, projections, ``batch_first``), one of their cells, or
            any module that calls its own cells in a loop, which is then traced. Of a module that holds one of the
            first kind among others the flow is that of the inner one, on the input that it is given there.
        inputs: what the module takes: for the first kind its input or a ``PackedSequence``; for a cell
            ``(time, batch, features)``; for a loop its input, or a tuple of its inputs. Without a batch dimension it
            counts as a batch of one.
        state: the initial state as the module takes it; zeros by default. Not for loops, which make their own.
        step_size: how much time a step takes.

    Returns:
        An `Iteration` for the modules and cells of torch, of any length; a `Flow` for a loop.

    Raises:
        TraceError: a bidirectional network, dropout between layers in training mode, arguments that do not fit, or a
            loop in which no repeated cell was found.

    Example:
        >>> import torch
        >>> flow = recurrent_flow(torch.nn.LSTM(3, 4, num_layers=2), torch.randn(7, 5, 3))
        >>> len(flow), flow.batch, flow.states[0].size  # h and c of two layers
        (7, 5, 16)
    """
    if isinstance(module, nn.RNNBase):
        return _layers(module, inputs, state, step_size)
    if isinstance(module, nn.RNNCellBase):
        return _cell(module, inputs, state, step_size)
    if state is not None:
        raise TraceError("state= is for the modules of torch; a module with a loop takes its state with its inputs")
    given = inputs if isinstance(inputs, tuple) and not isinstance(inputs, PackedSequence) else (inputs,)
    called = _inner_calls(module, given)
    if len(called) > 1:
        found = ", ".join(repr(path) for path, *_ in called)
        raise TraceError(
            f"the module runs several recurrent modules over time, {found}: call recurrent_flow on one of them, with "
            "the input that it is given"
        )
    if called:
        _, inner, own, start = called[0]
        return _layers(inner, own, start, step_size)
    return _without_drive(trace(module, *given))


def _inner_calls(module: nn.Module, given: tuple[Any, ...]) -> list[tuple[str, nn.RNNBase, Any, Any]]:
    """The recurrent modules of torch that a module runs, each with its path, its input and its initial state."""
    called: list[tuple[str, nn.RNNBase, Any, Any]] = []

    def note(path: str, args: Any, kwargs: Any) -> None:
        state = args[1] if len(args) > 1 else kwargs.get("hx")
        called.append((path, modules[path], args[0] if args else kwargs["input"], state))

    modules = {path: m for path, m in module.named_modules() if isinstance(m, nn.RNNBase)}
    if not modules:
        return called
    with aside(module, given=given), torch.no_grad():
        handles = [
            m.register_forward_pre_hook(lambda _, args, kwargs, path=path: note(path, args, kwargs), with_kwargs=True)
            for path, m in modules.items()
        ]
        with hooked(handles):
            module(*given)
    return called


def _layers(module: nn.RNNBase, inputs: Any, state: Any, step_size: float | None) -> Iteration:
    """The module itself, called on one time step at a time."""
    if module.bidirectional:
        raise TraceError(
            f"the {module.mode} is bidirectional: its second direction runs backwards, so there is no state that time "
            "carries forward. Analyse one direction as a module of its own, or depth with stabkit.trace(module, input)"
        )
    if module.training and module.dropout > 0 and module.num_layers > 1:
        raise TraceError(
            f"dropout={module.dropout} between the layers draws random numbers in training mode; call module.eval()"
        )
    drive, lengths, order = _sequence(module, inputs)
    initial = _initial(module, drive, state, order)
    keep = None if lengths is None else torch.arange(len(drive))[:, None] < lengths
    pair = module.mode == "LSTM"

    def call(before: Tensors, given: Tensors) -> Tensors:
        one = given[0].unsqueeze(1 if module.batch_first else 0)
        _, after = module(one, before if pair else before[0])
        after = after if pair else (after,)
        if keep is None:
            return after
        active = given[1].reshape(1, -1, 1)
        return tuple(torch.where(active, new, old) for new, old in zip(after, before, strict=True))

    driving = (drive,) if keep is None else (drive, keep.to(drive.device))
    notes = () if lengths is None else ("a sample is held where it is once its sequence has ended",)
    return iteration(
        StepFunction(call, tuple(1 for _ in initial)),
        initial,
        len(drive),
        driving,
        module,
        name=type(module).__name__,
        step_size=step_size,
        lengths=lengths,
        notes=notes,
    )


def _sequence(module: nn.RNNBase, inputs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The input as ``(time, batch, features)``, lengths of the sequences, and how a packed batch was sorted."""
    if isinstance(inputs, PackedSequence):
        padded, lengths = pad_packed_sequence(inputs)  # in the order in which it was given
        return padded.detach(), lengths, inputs.sorted_indices
    if not isinstance(inputs, Tensor) or inputs.dim() not in (2, 3) or inputs.shape[-1] != module.input_size:
        found = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        layout = "(batch, time, features)" if module.batch_first else "(time, batch, features)"
        raise TraceError(f"inputs is {found}; expected {layout} with {module.input_size} features, or a PackedSequence")
    drive = inputs.detach()
    if drive.dim() == 2:
        drive = drive.unsqueeze(1)
    elif module.batch_first:
        drive = drive.transpose(0, 1)
    if 0 in drive.shape:
        raise TraceError(f"inputs has shape {tuple(inputs.shape)}; expected at least one time step and one sample")
    return drive, None, None


def _initial(module: nn.RNNBase, drive: Tensor, state: Any, order: Tensor | None) -> Tensors:
    """The initial state, one tensor ``(layers, batch, size)`` or two."""
    count, batch = (2 if module.mode == "LSTM" else 1), drive.shape[1]
    widths = [module.proj_size or module.hidden_size, module.hidden_size][:count]
    if state is None:
        return tuple(drive.new_zeros(module.num_layers, batch, width) for width in widths)
    given = _tensors(state)
    given = tuple(part.unsqueeze(1) if part.dim() == 2 else part for part in given)
    wanted = [(module.num_layers, batch, width) for width in widths]
    if [tuple(part.shape) for part in given] != wanted:
        raise TraceError(f"state has shapes {[tuple(part.shape) for part in given]}; expected {wanted}")
    return given


def _tensors(state: Any) -> Tensors:
    given = (state,) if isinstance(state, Tensor) else tuple(state) if isinstance(state, Sequence) else ()
    if not given or not all(isinstance(part, Tensor) for part in given):
        raise TraceError(f"state is {a(type(state).__name__)}; expected a tensor, the pair (h, c) of an LSTM, or None")
    return given


def _cell(cell: nn.RNNCellBase, inputs: Any, state: Any, step_size: float | None) -> Iteration:
    if not isinstance(inputs, Tensor) or inputs.dim() not in (2, 3) or inputs.shape[-1] != cell.input_size:
        found = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TraceError(f"inputs is {found}; expected (time, batch, {cell.input_size}) for a cell")
    drive = inputs.detach()
    drive = drive.unsqueeze(1) if drive.dim() == 2 else drive
    if 0 in drive.shape:
        raise TraceError(f"inputs has shape {tuple(inputs.shape)}; expected at least one time step and one sample")
    pair = isinstance(cell, nn.LSTMCell)
    wanted = [(drive.shape[1], cell.hidden_size)] * (2 if pair else 1)
    if state is None:
        initial = tuple(drive.new_zeros(shape) for shape in wanted)
    else:
        given = _tensors(state)
        initial = tuple(part.unsqueeze(0) if part.dim() == 1 else part for part in given)
        if [tuple(part.shape) for part in initial] != wanted:
            raise TraceError(f"state has shapes {[tuple(part.shape) for part in initial]}; expected {wanted}")

    def call(before: Tensors, given: Tensors) -> Tensors:
        after = cell(given[0], before if pair else before[0])
        return tuple(after) if pair else (after,)

    function = StepFunction(call, tuple(0 for _ in initial))
    return iteration(function, initial, len(drive), (drive,), cell, name=type(cell).__name__, step_size=step_size)


def _without_drive(flow: Flow) -> Flow:
    """The steps of the longest run of one module, on what they themselves make: all older values drive them.

    In a traced loop the input is part of every state, since later steps still read it. Held fixed, it leaves hidden
    and cell states.
    """
    start, stop = _loop(flow)
    first = next(call for call in flow.recorded.recording.calls if call.path == flow.steps[start].module_path)
    inside = flow.states[start + 1 : stop + 1]
    older = {value for state in inside for value in state.values if value.node._sequence_nr() < first.start}
    held = older | set(flow.states[start].values)
    # the last step often ends in less than the whole state (h, but not c): then it is a readout, not a time step
    states = [_reduced(index, state, held) for index, state in enumerate(inside)]
    if len(states) > 2 and states[-1].sample_shapes != states[-2].sample_shapes:
        states.pop()
    if len(states) < 2 or any(not state.values for state in states):
        raise TraceError("the loop has fewer than two time steps between which a state is carried")
    steps = tuple(_between(flow, flow.steps[start + 1 + i], states[i], states[i + 1]) for i in range(len(states) - 1))
    note = f"over time, from after the first call of {flow.steps[start].module_path}; the input is held fixed"
    return replace(
        flow,
        states=tuple(states),
        steps=steps,
        source_name=f"state after {flow.steps[start].name}",
        target_name=f"state after {steps[-1].name}",
        chain_error=None,
        notes=(*flow.notes, note),
        _retrace=lambda check, given=None: _without_drive(flow.again(check=check, given=given)),
        _by_values=None,
    )


def _loop(flow: Flow) -> tuple[int, int]:
    """The first and one past the last step of the longest run of steps made by one module."""
    best, start = (0, 0), 0
    for index in range(1, len(flow.steps) + 1):
        same = index < len(flow.steps) and flow.steps[index].module_path == flow.steps[start].module_path
        if same:
            continue
        if index - start > best[1] - best[0] and flow.steps[start].module_path:
            best = start, index
        start = index
    if best[1] - best[0] < 3:
        found = ", ".join(step.name for step in flow.steps)
        raise TraceError(f"no cell is called again and again: the steps found are {found}")
    return best


def _reduced(index: int, state: State, held: set[Value]) -> State:
    kept = [i for i, value in enumerate(state.values) if value not in held]
    return replace(
        state,
        index=index,
        values=tuple(state.values[i] for i in kept),
        layouts=tuple(state.layouts[i] for i in kept),
    )


def _between(flow: Flow, step: Step, source: State, target: State) -> Step:
    parameters: Sequence[nn.Parameter] = list(flow.model.parameters())
    segment = flow.recorded.segment(source.values, target.values, source.position, target.position, parameters)
    same = same_space(source, target)
    return replace(
        step,
        index=source.index,
        kind="step" if same else "transition",
        source=source,
        target=target,
        segment=segment,
        products=Products(segment, source.space, target.space),
    )
