"""Time inside depth: recurrent modules of a model, judged by the gradient that reaches each of their time steps.

A flow over depth takes an ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU`` for one step, and a loop of cells for steps whose
states hold all inputs that are still unread. What counts over time is how much of the gradient of the loss arrives at
the input of every time step, or at every hidden state of a cell: the inputs of other times are held fixed and not
counted. A model that reads every output is reached everywhere however short its memory is, and rightly raises nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stabkit.diagnosis.blocks.weights import step_of
from stabkit.diagnosis.finding import Action, Finding, as_fact, serious
from stabkit.diagnosis.over_time.profile import (
    FEWEST,
    TimeProfile,
    along_states,
    is_whole_state,
    logs_at,
    logs_of,
    of_loop,
    unit_of,
)
from stabkit.diagnosis.over_time.scans import WrittenOut
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.applying import carried_out
from stabkit.diagnosis.remedies.computed import Remedy
from stabkit.diagnosis.remedies.learning import left_beside_a_constant
from stabkit.diagnosis.remedies.short_training import STEPS, compared, short_training
from stabkit.diagnosis.remedies.usual_training import ADAM
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.diagnosis.verdict import factor
from stabkit.errors import StabkitError
from stabkit.tracing import Flow
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.hooks import hooked
from stabkit.tracing.recording.training_pass import training_pass

#: operations that take a piece of a value
_PIECES = frozenset({"Select", "Slice", "Narrow", "Index", "IndexSelect"})
_ALL_PIECES = frozenset({"Split", "SplitWithSizes", "Unbind", "Chunk"})
#: sizes of entries, in 1/sqrt(hidden), that a recurrence can start in
_SIZES = (
    (3.0**-0.5, "1/sqrt(3 hidden), as torch draws them (reset_parameters)"),
    (1.0, "1/sqrt(hidden), of gain 1"),
    (2.0, "2/sqrt(hidden), of gain 2"),
)
_HALF = 0.5  # of the growth at what a module puts out, under which that at what it is given is told
NOTHING = -1e3  #: growth over time, in nats, where nothing at all comes back
_LEARNS = 0.5  # of the loss of the best constant, below which the input was learnt from
_BETTER = 0.8  # of the loss after a short training, from which what holds a state is worth a warning
_FAR = math.log(1.5)  # nats between the size of a matrix and the standard one that are worth a change
_REFERENCES = {
    "vanishing": "Pascanu et al., On the difficulty of training recurrent neural networks, 2013; Gers et al., 2000",
    "exploding": "Pascanu et al., On the difficulty of training recurrent neural networks, 2013",
}


@dataclass
class _Kept:
    """Tensors whose gradients are wanted: the input over time of one call, or the states of one cell over its calls."""

    sequences: list[tuple[str, nn.Module, Tensor, int]] = field(default_factory=list)
    cells: dict[str, tuple[nn.Module, list[list[Tensor]]]] = field(default_factory=dict)
    entered: dict[str, list[list[Tensor]]] = field(default_factory=dict)  # what each call of a loop's module was given


def time_findings(flow: Flow, loss: Any, thresholds: Thresholds) -> list[Finding]:
    """Recurrent modules whose gradient vanishes or explodes over time; empty for a model without any."""
    called = time_profiles(flow.forward_pass, loss, loops_over_time(flow))
    written = WrittenOut(flow, {profile.path for profile in called})

    def is_far(profile: TimeProfile) -> bool:
        return not math.isnan(profile.growth) and abs(profile.growth) > thresholds.explosion

    far = [profile for profile in called if is_far(profile)]
    every = written.profiles(loss)
    inside = [written.with_method(profile) for profile in every if is_far(profile)]
    # what later blocks do to the gradient on its way is not the fault of the recurrence
    far += [p for p in inside if p.own * math.copysign(1.0, p.growth) > 0.5 * thresholds.explosion]
    told = [_finding(flow, profile, profile.growth, loss, thresholds, written) for profile in far]
    # a state that grows less than that is as bad where the loss sees it
    grows = [p for p in every if thresholds.stable < p.growth <= thresholds.explosion]
    near = [p for p in map(written.with_method, grows) if p.own > thresholds.stable and written.constraints(p)]
    drifting = [_finding(flow, profile, profile.growth, loss, thresholds, written) for profile in near]
    told = [_of_no_harm(flow, _by_training(flow, each, loss), loss) for each in told]
    return [*told, *_worth_telling(flow, drifting, loss)]


def _of_no_harm(flow: Flow, finding: Finding, loss: Any) -> Finding:
    """A short memory is a fact where the usual optimizers learn from the input all the same, without a longer one."""
    if finding.kind != "vanishing" or not serious(finding) or not callable(loss):
        return finding
    left = left_beside_a_constant(flow.forward_pass, loss)
    if left is None or not left < _LEARNS:
        return finding
    words = (
        f"{STEPS} steps of {ADAM} as it is leave {left:.1%} of what the best constant output leaves of the loss: what "
        "these samples ask for does not lie that far back"
    )
    return as_fact(finding, words, f"none is needed for these samples; for a longer memory, {finding.remedy}")


def _worth_telling(flow: Flow, drifting: Sequence[Finding], loss: Any) -> list[Finding]:
    """What grows within the limits, where a bound on its factor trains clearly better."""
    judged = [_by_training(flow, replace(finding, severity="info"), loss) for finding in drifting]
    return [finding for finding in judged if finding.severity != "info"]


def _by_training(flow: Flow, finding: Finding, loss: Any) -> Finding:
    """A state that grows and was no warning, which is one where training is clearly better with what holds it."""
    if finding.kind != "exploding" or finding.severity != "info" or not finding.actions:
        return finding
    plain, treated = short_training(flow, loss), short_training(flow, loss, finding.actions)
    if plain is None or treated is None or not treated.last < _BETTER * plain.last:
        return finding
    return replace(finding, severity="warning", evidence=finding.evidence + compared(plain, treated, "treated"))


def loops_over_time(flow: Flow) -> tuple[str, ...]:
    """Modules that the model calls in a loop over time: eight times or more, with another piece of the input each time.

    A layer that is used again over depth reads its state alone, or the same input each time. One activation for all
    layers of a block, each with a strip of the channels, is called often as well; there the weights differ.
    """
    modules = dict(flow.model.named_modules())
    places: dict[str, list[int]] = {}
    for call in flow.recorded.recording.calls:
        module = modules.get(call.path)
        if module is not None and not isinstance(module, nn.RNNBase | nn.RNNCellBase):
            places.setdefault(call.path, []).append(flow.recorded.graph.position(call.start))
    often = {path: starts for path, starts in places.items() if len(starts) >= FEWEST}
    picks = _picks(flow) if often else []
    found: list[str] = []
    for path, starts in often.items():  # in the order of their beginnings: what holds others goes before them
        inside = any(path.startswith(f"{outer}.") for outer in found if outer)
        if not inside and _reads_on(picks, starts) and _same_weights(flow, path, modules[path]):
            found.append(path)
    return tuple(found)


def _picks(flow: Flow) -> list[tuple[int, tuple[object, ...]]]:
    """Where a piece of a value is taken, as a place of the graph and what tells the piece from others."""
    found: list[tuple[int, tuple[object, ...]]] = []
    for step in flow.steps:
        for node in step.segment.nodes:
            place = flow.recorded.graph.position(node._sequence_nr())
            given = step.segment.graph.inputs[node]
            # of an operation that gives all pieces at once, the time at which one is read counts
            found += [(place, (value,)) for value in given if operation(value.node) in _ALL_PIECES]
            if operation(node) in _PIECES and given:
                which = tuple(repr(getattr(node, name, "")) for name in ("_saved_index", "_saved_start", "_saved_dim"))
                found.append((place, (given[0], *which)))
    return found


def _reads_on(picks: Sequence[tuple[int, tuple[object, ...]]], starts: Sequence[int]) -> bool:
    """Whether most calls read a piece that no other does: one taken since the call before, or before the first."""
    bounds = [2 * starts[0] - starts[1], *starts]
    taken = [{piece for place, piece in picks if low < place <= high} for low, high in itertools.pairwise(bounds)]
    counts = Counter(piece for pieces in taken for piece in pieces)
    own = sum(any(counts[piece] == 1 for piece in pieces) for pieces in taken)
    return 2 * own > len(starts)


def _same_weights(flow: Flow, path: str, module: nn.Module) -> bool:
    """Whether what runs from one call of a module to the next has the weights of that before, as a recurrence has.

    True where it has none: a model may multiply with its parameters itself.
    """
    if next(module.parameters(), None) is not None:
        return True
    calls = flow.recorded.recording.calls
    own = [call.index for call in calls if call.path == path]
    between = [c.path for c in calls[own[0] : own[-1]] if next(c.module.parameters(recurse=False), None) is not None]
    again = Counter(between)
    return 2 * sum(again[each] > 1 for each in between) >= len(between)


def time_profiles(call: ForwardPass, loss: Any = None, loops: Sequence[str] = ()) -> list[TimeProfile]:
    """The gradient over time of every recurrent module, and of every loop, that runs over eight steps or more."""
    if not loops and not any(isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in call.module.modules()):
        return []
    kept = _Kept()
    with _keeping(call.module, kept, loops):
        done = training_pass(call, loss, differentiate=False)
    if done.loss is None:
        return []
    found = []
    for path, module, tensor, axis in kept.sequences:
        (gradient,) = torch.autograd.grad(done.loss, [tensor], retain_graph=True, allow_unused=True)
        if gradient is not None:
            rows = gradient.detach().double().movedim(axis, 0).flatten(1)
            found.append(TimeProfile(path, module, logs_of(rows.norm(dim=1))))
    for path, (module, states) in kept.cells.items():
        if len(states) < FEWEST:
            continue
        profile = TimeProfile(path, module, logs_at(done.loss, states), path in loops, states[0][0].shape[-1])
        profile.unit, whole = unit_of(kept.entered[path]), states
        if path in loops:
            recurs, carried = of_loop(states, kept.entered[path])
            if not recurs:
                continue
            around = replace(profile, log_gradient=logs_at(done.loss, carried)) if len(carried) >= FEWEST else profile
            profile = around if abs(around.growth) < _HALF * abs(profile.growth) else profile
            whole = states if not carried or is_whole_state(states) else carried
        if is_whole_state(whole):
            profile.own = along_states(whole)
        elif path in loops:
            continue
        found.append(profile)
    return found


@contextlib.contextmanager
def _keeping(model: nn.Module, kept: _Kept, loops: Sequence[str] = ()) -> Iterator[None]:
    """Note the inputs of recurrent modules, and the states that cells, and modules in loops, return."""
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            handles.append(module.register_forward_pre_hook(_sequence_hook(path, kept)))
        elif isinstance(module, nn.RNNCellBase) or path in loops:
            handles.append(module.register_forward_hook(_cell_hook(path, kept)))
    with hooked(handles):
        yield


def _sequence_hook(path: str, kept: _Kept) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        assert isinstance(module, nn.RNNBase)
        given = args[0] if args else None
        if not isinstance(given, Tensor) or not given.requires_grad:
            return  # a packed sequence holds its steps in an order of its own
        axis = 1 if module.batch_first and given.dim() == 3 else 0
        if given.shape[axis] >= FEWEST:
            kept.sequences.append((path, module, given, axis))

    return hook


def _cell_hook(path: str, kept: _Kept) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        states = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if states:
            kept.cells.setdefault(path, (module, []))[1].append(states)
            kept.entered.setdefault(path, []).append([leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)])

    return hook


def _finding(
    flow: Flow, profile: TimeProfile, growth: float, loss: Any, thresholds: Thresholds, written: WrittenOut
) -> Finding:
    kind = "vanishing" if growth < 0 else "exploding"
    count = len(profile.log_gradient)
    name = type(profile.module).__name__
    how = f"the gradient changes by a factor of {factor(growth)} on its way from the last to the first"
    if growth == -math.inf:
        how = "nothing at all of the gradient gets from the last to the first"
    evidence = (
        f"over {count} {profile.unit} of {profile.path or 'the model'} ({name}) {how}; the inputs of other times are "
        "held fixed"
    )
    evidence += f"; its method over time: {profile.method}" if profile.method else ""
    remedy, tried = _tried(flow, profile, growth, loss, thresholds, written)
    return Finding(
        kind=kind,
        severity=_severity(profile, growth, thresholds),
        steps=(step_of(flow, profile.path) if profile.step < 0 else profile.step,),
        module_path=profile.path,
        confidence=1.0,
        evidence=evidence + tried,
        remedy=remedy.text,
        reference=_REFERENCES[kind],
        numbers={"growth_over_time": growth if math.isfinite(growth) else NOTHING, "time_steps": float(count)}
        | _own(profile),
        actions=remedy.actions,
    )


def _own(profile: TimeProfile) -> dict[str, float]:
    """What the time steps of a recurrence alone do to a gradient, nats a step."""
    finite = math.isfinite(profile.own)
    return {"growth_per_time_step": profile.own / (len(profile.log_gradient) - 1)} if finite else {}


def _severity(profile: TimeProfile, growth: float, thresholds: Thresholds) -> str:
    """Gates open while a network trains, so a gated one is given twice the range, and the end is never certain."""
    far = abs(growth) > 2 * thresholds.explosion
    if not (profile.fed or isinstance(profile.module, nn.LSTM | nn.LSTMCell | nn.GRU | nn.GRUCell)):
        return "critical" if far else "warning"
    return "warning" if far else "info"


def _tried(
    flow: Flow, profile: TimeProfile, growth: float, loss: Any, thresholds: Thresholds, written: WrittenOut
) -> tuple[Remedy, str]:
    """The first remedy that brings growth over time within range on a copy of the model, and what it changed."""
    call = flow.forward_pass
    other = "factors of the state nearer to 1" if profile.place >= 0 else "an LSTM with open forget gates"
    without = Remedy(
        f"nothing that was tried on its weights helps: use {other}, read or pool all outputs in place of the last, or "
        "shorten the sequence"
    )
    if not isinstance(call.model, nn.Module) or call.model is not call.module:
        return without, ""
    inside = profile.place >= 0
    before = "nothing" if math.isinf(growth) else f"{growth:+.1f}"
    bounds = written.constraints(profile) if inside and growth > 0 else []
    for remedy in [*bounds, *(written.remedies(profile, growth) if inside else ()), *_changes(profile, growth)]:
        own, cause = math.nan, f"; {remedy.cause}" if remedy.cause else ""
        try:
            with carried_out(call.module, remedy.actions):
                if inside:
                    found, own = written.again().measured(profile, loss)
                else:
                    after = time_profiles(call, loss, (profile.path,) if profile.loop else ())
                    found = next((p.growth for p in after if p.path == profile.path), math.nan)
        except StabkitError:
            continue
        if abs(found) <= thresholds.explosion or (remedy.cause and -2 * thresholds.explosion <= found <= 0):
            return remedy, f"{cause}; tried on a copy: {before} -> {found:+.1f} nats over time"
        # where another recurrence behind it is at fault as well, what its own steps do is what a remedy can change
        if abs(own) <= thresholds.stable and abs(found) < abs(growth):
            told = f"{cause}; tried on a copy: of its own steps {profile.own:+.1f} -> {own:+.1f} nats over time"
            return remedy, f"{told}, with what comes after it {before} -> {found:+.1f}"
    return without, ""


def _changes(profile: TimeProfile, growth: float) -> list[Remedy]:
    """What may help a recurrent module, the mildest first."""
    module, steps = profile.module, len(profile.log_gradient)
    growth = growth if math.isfinite(growth) else -20.0 * steps
    name = type(module).__name__.removesuffix("Cell")
    gated = isinstance(module, nn.LSTM | nn.LSTMCell | nn.GRU | nn.GRUCell)
    if gated and growth < 0:
        bias = math.log(max(steps - 1, 2))
        gate = "forget gates" if name == "LSTM" else "update gates"
        text = f"start the {gate} open: set their part of bias_hh to {{}}, so that the memory lasts {{}}"
        tries = [
            (text.format("1", "a few steps"), _opened(profile, 1.0)),
            (text.format(f"log({steps} - 1) = {bias:.3g}", "the sequence"), _opened(profile, bias)),
            (text.format(f"{bias + 2:.3g}", "longer than the sequence"), _opened(profile, bias + 2)),
        ]
        return [Remedy(words, actions) for words, actions in tries if actions]
    by_size = [*_of_standard_size(profile), *_gates_opened(profile, growth)]
    matrices = _recurrent_matrices(profile)
    if not matrices:
        return by_size
    what = " and ".join(dict.fromkeys(_short(path) for path, _ in matrices))
    by = math.exp(-growth / steps)

    def orthogonal(gain: float) -> tuple[Action, ...]:
        return tuple(remedies.orthogonalise(path, gain, blocks) for path, blocks in matrices)

    found = [Remedy(f"make {what} orthogonal", orthogonal(1.0))]
    if getattr(module, "nonlinearity", "tanh") == "relu" or profile.loop:
        words = f"make {what} orthogonal, times 1.41, for the half that ReLU passes"
        found.append(Remedy(words, orthogonal(math.sqrt(2.0))))
    if 0.1 < by < 10.0:
        found.append(Remedy(f"multiply {what} by {by:.3g}", tuple(remedies.scale(path, by) for path, _ in matrices)))
        found.append(Remedy(f"make {what} orthogonal, times {by:.3g}", orthogonal(by)))
    return [*found, *by_size]


def _of_standard_size(profile: TimeProfile) -> list[Remedy]:
    """The matrices of a cell in sizes that recurrent modules start in, whatever they are called; the smallest first.

    A cell written by hand stacks its gates as it likes, in rows or in columns: a matrix of it has a side that is a
    multiple of the state's.
    """
    if not profile.loop:
        return []
    sizes = {}
    for path, p in _named(profile):
        if p.dim() == 2 and any(side % profile.width == 0 for side in p.shape):
            sizes[path] = float(p.detach().double().square().mean().sqrt())
    found = []
    for gain, words in _SIZES:
        wanted = gain * profile.width**-0.5
        factors = {path: wanted / size for path, size in sizes.items() if 0.0 < size < math.inf}
        far = {path: by for path, by in factors.items() if abs(math.log(by)) > _FAR}
        if far:
            texts = " and ".join(f"{path} by {by:.2g}" for path, by in far.items())
            text = f"multiply {texts}: entries of size {wanted:.2g} = {words}, with {profile.width} hidden units"
            found.append(Remedy(text, tuple(remedies.scale(path, by) for path, by in far.items())))
    return found


def _gates_opened(profile: TimeProfile, growth: float) -> list[Remedy]:
    """One gate after another of a cell written by hand held open by its bias: which of them keeps the state, shows."""
    if growth > 0 or not profile.loop:
        return []
    value = math.log(max(len(profile.log_gradient) - 1, 2))
    found = []
    for path, p in _named(profile):
        if p.dim() == 1 and len(p) in (3 * profile.width, 4 * profile.width):
            for start in range(0, len(p), profile.width):
                part = (start, start + profile.width)
                text = (
                    f"start the gate that keeps the state open: set {path}[{part[0]}:{part[1]}] to {value:.3g}, the "
                    "log of the number of time steps"
                )
                found.append(Remedy(text, (remedies.fill(path, value, part),)))
    return found


def _short(path: str) -> str:
    """``weight_hh`` for those of torch's modules, the whole path for others."""
    return "weight_hh" if "weight_hh" in path else path


def _named(profile: TimeProfile) -> list[tuple[str, nn.Parameter]]:
    dot = "." if profile.path else ""
    return [(f"{profile.path}{dot}{name}", p) for name, p in profile.module.named_parameters()]


def _recurrent_matrices(profile: TimeProfile) -> list[tuple[str, int]]:
    """The matrices that act on the state, each with the number of square blocks that it stacks.

    Those are the ``weight_hh`` of torch's modules, or else the square ones of the size of the state.
    """
    named = [(path, p) for path, p in _named(profile) if p.dim() == 2]
    hidden = [(path, p.shape[0] // p.shape[1]) for path, p in named if "weight_hh" in path]
    return hidden or [(path, 1) for path, p in named if p.shape[0] == p.shape[1] == profile.width]


def _opened(profile: TimeProfile, value: float) -> tuple[Action, ...]:
    """The biases of the forget gates of an LSTM, or of the update gates of a GRU, set in one of the two biases."""
    parts = 4 if isinstance(profile.module, nn.LSTM | nn.LSTMCell) else 3
    biases = [(path, len(p) // parts) for path, p in _named(profile) if "bias_hh" in path]
    return tuple(remedies.fill(path, value, (size, 2 * size)) for path, size in biases)
