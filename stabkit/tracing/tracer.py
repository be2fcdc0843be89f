"""`trace`: any torch model, run once, as an exact chain of steps."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.arguments import accepts
from stabkit.errors import TraceError
from stabkit.garbage import young_only
from stabkit.tracing.cutting import chain_check as chains
from stabkit.tracing.cutting.boundaries import Depth, Span, choose
from stabkit.tracing.cutting.endpoints import Target, UnreachedError, ending, find_targets
from stabkit.tracing.cutting.naming import kinds, names, stacks
from stabkit.tracing.cutting.samples import Layout, candidates
from stabkit.tracing.cutting.sources import find_source, graph_between
from stabkit.tracing.derivatives.audit import audit
from stabkit.tracing.derivatives.lost_gradient import copied_inputs, place_of_cut
from stabkit.tracing.flow import Flow, State, Step
from stabkit.tracing.graph.frontiers import Frontiers
from stabkit.tracing.graph.graph import Graph, mend_batch_norm
from stabkit.tracing.graph.intervals import Intervals
from stabkit.tracing.graph.values import Value, meta_of, operation, value_of
from stabkit.tracing.products.segments import BackwardError, Segment
from stabkit.tracing.products.step_products import Products, Space
from stabkit.tracing.recording.containers import map_tensors, named_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.inputs import Source, differentiable
from stabkit.tracing.recording.recomputation import SavedTensors
from stabkit.tracing.recording.recorded_pass import RecordedPass
from stabkit.tracing.recording.recorder import Recording, clock
from stabkit.tracing.recording.untouched_model import refuse_lazy
from stabkit.tracing.recording.wrappers import modules_behind, unwrap

# how the chain may differ from the engine by the order of additions, as a multiple of the dtype's rounding unit
_CHAIN_SLACK = 500
_PARTS = 8  # of a pass that is computed anew, before steps are known: an eighth of its memory, eight passes at most


@accepts
def trace(
    model: Any,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    depth: Depth = "auto",
    batch_dim: int | None = 0,
    source: str | None = None,
    target: Target = None,
    seed: int = 0,
    check: bool = True,
    memory: str = "keep",
) -> Flow:
    """Run a model once and return its forward pass as a chain of states and differentiable steps.

    The autograd graph of the one real forward pass is the record: nothing is re-executed, rewritten or approximated.
    Parameters, buffers, gradients, flags and the random state are afterwards what they were, also after an error.

    Args:
        model: a ``torch.nn.Module``, or any function of tensors.
        *inputs: what it is called with. Float tensors are differentiated; for integer tensors, the embeddings made
            from them.
        kwargs: keyword arguments of the call.
        depth: where steps end: ``"auto"`` (the blocks that a person would name), ``"cuts"``, ``"modules"``, a list of
            module paths or globs, or a function of path and module that picks the modules to be steps.
        batch_dim: which dimension of the input counts samples; None makes the whole batch one state. Samples that
            turn out to influence each other do the same, with a note.
        source: name of the input or embedding to start from, when there are several.
        target: the output to end at: a function of the model's output that returns a tensor, or its path
            (``"logits"``), or the paths of several, which end the flow as one state. By default the first that is
            not a loss; of a list of tensors of one shape, as a network gives out that refines its output, the one that
            was made last.
        seed: the seed of the random numbers that the model draws (dropout) and of the cotangent that checks the chain.
        check: compare the product of the steps' VJPs with the model's own VJP.
        memory: ``"keep"`` what one training forward pass keeps, or ``"recompute"`` the saved tensors of a step when it
            is differentiated: memory is then that of the largest step and the states, and every step costs a forward
            pass up to its end.

    Returns:
        A `Flow`. It holds the graph of the forward pass; its derivatives are those at these weights and inputs.

    Raises:
        TraceError: the call fails, nothing differentiable leads from the input to the output, or the chain is not
            exact.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> flow = trace(model, torch.ones(5, 3))
        >>> [step.name for step in flow.steps]
        ['0', '1', '2']
        >>> flow.steps[0].jacobian().shape
        (5, 4, 3)
    """
    if not callable(model):
        raise TraceError(f"model is a {type(model).__name__}; expected a torch.nn.Module or a function of tensors")
    if memory not in ("keep", "recompute"):
        raise TraceError(f"memory={memory!r}; expected 'keep' or 'recompute'")
    given = named_tensors([inputs, dict(kwargs or {})])
    if not given:
        raise TraceError("no tensor among the inputs; call stabkit.trace(model, tensor) with what the model takes")
    for _, tensor in given:
        _refuse_unreadable(tensor)
    floats = [tensor for _, tensor in given if differentiable(tensor)]
    if floats and len(floats) == len(given) and all(tensor.layout != torch.strided for tensor in floats):
        raise TraceError(f"the input has the sparse layout {floats[0].layout}; pass a dense tensor: x.to_dense()")
    model = unwrap(model)
    if batch_dim is None:
        batch = None
    else:
        shaped = [tensor for _, tensor in given if tensor.dim() > 0]
        if shaped and not -shaped[0].dim() <= batch_dim < shaped[0].dim():
            raise TraceError(f"batch_dim={batch_dim}, but the first input has shape {tuple(shaped[0].shape)}")
        batch = shaped[0].shape[batch_dim] if shaped else 1
        if batch == 0:
            raise TraceError(f"the input of shape {tuple(shaped[0].shape)} holds no samples; give at least one")
    module = modules_behind(model)
    refuse_lazy(module.modules())
    with young_only(), torch.inference_mode(False):
        forward = ForwardPass(model, module, inputs, dict(kwargs or {}), seed, ending=ending(target))
        if memory == "recompute":  # the inputs are needed again, so they must stay what they are
            own = map_tensors([inputs, forward.kwargs], lambda tensor: tensor.detach().clone())
            forward = replace(forward, inputs=own[0], kwargs=own[1])
        recorded = _record(forward, source, target, memory == "recompute")
    settings = _Settings(module, depth, batch, batch_dim or 0, seed, check, target)
    with young_only(), recorded.recording.way_back:
        flow = _build(recorded, settings)

    def again(checked: bool, end: Target = target, given: tuple[Any, Any] | None = None) -> Flow:
        args, named = (inputs, kwargs) if given is None else given
        return trace(
            model,
            *args,
            kwargs=named,
            depth=depth,
            batch_dim=batch_dim,
            source=source,
            target=end,
            seed=seed,
            check=checked,
            memory=memory,
        )

    def by_values() -> Flow:
        with young_only(), torch.inference_mode(False):
            passed_on = _record(replace(forward, through_detach=True), source, target, recompute=False)
        with young_only(), passed_on.recording.way_back:
            return _build(passed_on, replace(settings, check=False))

    return replace(flow, _retrace=again, _by_values=by_values)


@dataclass(frozen=True)
class _Settings:
    """What a flow is built with, beside the recording."""

    module: nn.Module
    depth: Depth
    batch: int | None
    batch_dim: int
    seed: int
    check: bool
    target: Target


@dataclass
class _Recorded:
    recording: Recording
    source: Source
    side: list[Source]
    targets: dict[Value, str]
    graph: Graph
    notes: list[str]
    again: ForwardPass
    saved: SavedTensors | None

    @property
    def target_name(self) -> str:
        """Names of the outputs that the flow leads to."""
        return ", ".join(self.targets[value] for value in self.graph.targets)


def _record(forward: ForwardPass, source: str | None, target: Target, recompute: bool) -> _Recorded:
    """Record the forward pass; when nothing leads from input to output, look further before giving up."""
    notes = _notes_on_hooks(forward.module)
    failure: TraceError | None = None
    for promote_casts, through_no_grad in ((False, False), (True, False), (False, True), (True, True)):
        attempt = replace(forward, promote_casts=promote_casts, through_no_grad=through_no_grad)
        again = functools.partial(attempt.run, wanted=frozenset())
        saved = SavedTensors(forward.module, again, clock) if recompute else None
        recording = attempt.run(saved, frozenset() if recompute else None)
        if saved is not None:
            saved.divide_evenly(_PARTS)
        try:
            targets = find_targets(recording.output, recording.ends, target)
            with recording.way_back:
                graph, start = find_source(recording.sources, list(targets), source)
            graph.way_back = recording.way_back
        except UnreachedError as error:
            failure = failure or error
            continue
        if promote_casts:
            notes.append(f"the input is not looked up in a table: depth starts where {start.how!r} makes floats of it")
        if through_no_grad:
            notes.append("the model runs under no_grad, which was looked through")
        side = [s for s in recording.sources if s is not start]
        return _Recorded(recording, start, side, targets, graph, notes, attempt, saved)
    if failure is None:
        raise TraceError("the forward pass was not recorded")
    if copies := copied_inputs(forward):
        raise UnreachedError(
            f"the output depends on {', '.join(map(repr, copies))} by copies that the model takes off the graph itself "
            "(detach and requires_grad_): no derivative leads back to what was given, where depth would begin"
        ) from None
    place = place_of_cut(forward)
    raise UnreachedError(f"{failure}; {place}" if place else str(failure)) from None


def _notes_on_hooks(module: nn.Module) -> list[str]:
    hooked = [path or "the model" for path, m in module.named_modules() if m._backward_hooks or m._backward_pre_hooks]
    return [f"backward hooks do not run here: those of {', '.join(hooked)}"] if hooked else []


def _build(recorded: _Recorded, settings: _Settings) -> Flow:
    graph, recording = recorded.graph, recorded.recording
    mend_batch_norm(graph)
    graph.calls, graph.noisy, graph.dropped = recording.calls, recording.noisy, recording.dropped
    frontiers = Frontiers(graph)
    pieces = choose(
        Intervals(graph, frontiers, recording.calls, dict(settings.module.named_modules())), frontiers, settings.depth
    )
    positions = [0, *(piece.stop for piece in pieces)]
    values = [frontiers.at(position) for position in positions]
    parameters = list(settings.module.parameters())
    if recorded.saved is not None:
        recorded.saved.divide([_clock_at(recorded, position) for position in positions])
    segments = [
        Segment(graph, before, after, start, stop, parameters, recording.hooks, _prefetch(recorded, start, stop))
        for (before, after), (start, stop) in zip(
            itertools.pairwise(values), itertools.pairwise(positions), strict=True
        )
    ]
    if not values[0]:
        raise UnreachedError("the output does not depend differentiably on the input: what is returned is a constant")
    try:
        chain, whole_batch_note = _chain(segments, values, settings, recorded.source)
    except BackwardError as error:
        path = recording.path_at(error.node._sequence_nr())
        raise TraceError(f"no gradient passes back through {path or 'the model'!r}: {error}") from error
    chain_error = _checked(chain, graph, recorded, settings.module) if settings.check else None
    data = _state_values(recorded, {value for state in values for value in state})
    states = tuple(
        State(index, position, state, layouts, data)
        for index, (position, state, layouts) in enumerate(zip(positions, values, chain.layouts, strict=True))
    )
    return Flow(
        states=states,
        steps=_steps(pieces, segments, states, recording, graph),
        output=recording.output,
        target_name=recorded.target_name,
        target=settings.target,
        source_name=recorded.source.name,
        side_inputs=tuple(s.name for s in recorded.side),
        batch=states[0].space.batch,
        chain_error=chain_error,
        notes=(*recorded.notes, *whole_batch_note, *_silence_notes(chain, pieces)),
        model=settings.module,
        forward_pass=recorded.again,
        recorded=RecordedPass(graph, recording, functools.partial(_prefetch, recorded)),
        _chains=lambda: _sibling_flows(recorded, settings),
        _finite=chain.finite,
    )


def _sibling_flows(recorded: _Recorded, settings: _Settings) -> dict[str, Flow]:
    """The flows from every source that reaches the target; values of all of them were kept for this."""
    flows: dict[str, Flow] = {}
    for start in (recorded.source, *recorded.side):
        graph = graph_between(start, list(recorded.targets))
        graph.way_back = recorded.recording.way_back
        if not graph.reached or not graph.nodes:
            continue
        side = [s for s in (recorded.source, *recorded.side) if s is not start]
        flow = _build(replace(recorded, source=start, side=side, graph=graph), settings)
        stack = next(iter(flow.stacks), start.name)
        flows[stack if stack not in flows else start.name] = flow
    return flows


def _clock_at(recorded: _Recorded, position: int) -> int:
    clocks = recorded.graph.clock
    return clocks[position] if position < len(clocks) else recorded.recording.stop


def _prefetch(recorded: _Recorded, start: int, stop: int) -> Callable[[], None] | None:
    """What a segment calls before it is walked, when saved tensors are computed anew."""
    saved = recorded.saved
    if saved is None:
        return None
    return functools.partial(saved.prefetch, _clock_at(recorded, start), _clock_at(recorded, stop))


def _state_values(recorded: _Recorded, wanted: set[Value]) -> dict[Value, Tensor]:
    """The data of the states; all else is forgotten, unless flows from other sources may still be asked for."""
    recording, values = recorded.recording, recorded.recording.values
    if recorded.saved is not None:
        places = {recording.place(value): value for value in wanted}
        again = recorded.again.run(recorded.saved, frozenset(places))
        values = {places[place]: t for v, t in again.values.items() if (place := again.place(v)) in places}
    data = {value: tensor for value, tensor in values.items() if value in wanted}
    # what no operation consumed
    for _, tensor in (*named_tensors(recording.output), *(recording.ends or [])):
        if tensor.requires_grad and value_of(tensor) in wanted:
            data.setdefault(value_of(tensor), tensor.detach())
    if not recorded.side:
        recording.values = {}
    return data


def _silence_notes(chain: chains.Chain, pieces: Sequence[Span]) -> list[str]:
    if not chain.silent:
        return []
    step_names = names(pieces)
    quiet = ", ".join(step_names[i] for i in reversed(chain.silent))
    zeros = {
        f"{call.path}.{path}"
        for i in chain.silent
        for call in pieces[i].calls
        for path, matrix in call.module.named_parameters()
        if matrix.dim() > 1 and not bool(matrix.detach().any())
    }
    why = f", where {', '.join(sorted(zeros))} {'is' if len(zeros) == 1 else 'are'} all zeros" if zeros else ""
    return [f"no gradient passes back through {quiet}: its Jacobian is zero at this input{why}"]


def _chain(
    segments: Sequence[Segment], values: Sequence[tuple[Value, ...]], settings: _Settings, source: Source
) -> tuple[chains.Chain, list[str]]:
    notes: list[str] = []
    shape = meta_of(values[0][0]).shape
    batch, axis = settings.batch, settings.batch_dim % len(shape) if shape else 0
    if batch is not None and source.how == "input":
        batch = shape[axis] if shape else 1
    if batch is not None and batch > 1:
        if shape and shape[axis] % batch == 0 and len(values[0]) == 1:
            chain = chains.walk(segments, values, (Layout(batch, axis),), settings.seed)
            if chain is not None:
                return chain, notes
        notes.append(_whole_batch_note(segments, values, batch, axis, settings.seed))
    whole = tuple(tuple(Layout(1, None) for _ in state) for state in values)
    if not settings.check:
        return chains.Chain(whole, math.nan, ()), notes
    found = chains.walk(segments, values, whole[0], settings.seed)
    if found is None:  # with one sample there is nothing to mix: the two passes differ
        found = chains.Chain(whole, math.inf, ())
    return found, notes


def _whole_batch_note(
    segments: Sequence[Segment], values: Sequence[tuple[Value, ...]], batch: int, axis: int, seed: int
) -> str:
    """Why the whole batch is one state: another axis counts samples, none is known to, or they meet, as was measured.

    Of vectors the last axis counts features, and entry by entry these are apart in many models; behind times, (time,
    batch, features), samples are counted by the second.
    """
    shape = meta_of(values[0][0]).shape
    is_wide = axis == 0 and len(shape) > 2 and shape[1] > 1 and len(values[0]) == 1
    if is_wide and chains.walk(segments, values, (Layout(shape[1], 1),), seed) is not None:
        return (
            "along axis 1 of the input nothing influences another entry: where it counts samples (time first), pass "
            "batch_dim=1; as it is, axis 0 counts them, and the whole batch is one state"
        )
    metas = [meta_of(value) for state in values for value in state]
    if shape and shape[axis] % batch == 0 and all(candidates(meta, batch, axis) for meta in metas):
        return "the samples of the batch influence each other, so the whole batch is one state"
    return f"not every state has an axis that counts {batch} samples, so the whole batch is one state"


def _refuse_unreadable(tensor: Tensor) -> None:
    """Refuse tensors that hold no numbers, or rows of several lengths."""
    if tensor.is_nested:
        raise TraceError("the input is a nested tensor; pad it: torch.nested.to_padded_tensor(x, 0.0), with a mask")
    if tensor.is_meta:
        raise TraceError("the input is on the meta device, which holds no numbers; move model and input to the CPU")


def _checked(chain: chains.Chain, graph: Graph, recorded: _Recorded, module: nn.Module) -> float:
    found = chain.error
    dtypes = {meta_of(value).dtype for node in graph.nodes for value in graph.inputs[node]}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    allowed = max(1e-10, _CHAIN_SLACK * eps)
    if math.isnan(found) and not chain.finite:
        return found  # not a single number was finite on both sides: there is nothing to refuse, and nothing is proven
    if not found <= allowed:
        between = f"{recorded.source.name!r} and {recorded.target_name!r}"
        raise TraceError(
            f"the product of the steps' VJPs differs from the model's own by {found:.1e} (allowed: {allowed:.1e}) "
            f"between {between}: the chain is not exact. Please report this model; check=False skips the test"
        )
    return found


def _steps(
    pieces: Sequence[Span],
    segments: Sequence[Segment],
    states: Sequence[State],
    recording: Recording,
    graph: Graph,
) -> tuple[Step, ...]:
    spaces: list[Space] = [state.space for state in states]
    same = [before.axes == after.axes for before, after in itertools.pairwise(spaces)]
    clocks = [*graph.clock, recording.stop]
    steps = []
    labels = zip(pieces, names(pieces), stacks(pieces), kinds(pieces, same), strict=True)
    for index, (piece, name, stack, kind) in enumerate(labels):
        main, segment = piece.main, segments[index]
        steps.append(
            Step(
                index=index,
                name=name,
                module_path=main.path if main else "",
                module_class=type(main.module).__name__ if main else "",
                stack=stack,
                kind=kind,
                source=states[index],
                target=states[index + 1],
                operations=tuple(operation(node) for node in segment.nodes),
                notes=audit(segment.nodes, recording, clocks[piece.start], clocks[piece.stop]),
                segment=segment,
                products=Products(segment, spaces[index], spaces[index + 1]),
            )
        )
    return tuple(steps)
