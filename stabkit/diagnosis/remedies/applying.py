"""Remedies as data, carried out on a model: for good, or until what they change has been measured."""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stabkit.diagnosis.finding import Action
from stabkit.errors import ArgumentError
from stabkit.tracing.recording.containers import named_tensors

FORMS = (
    *("scale", "redraw", "fill", "orthogonalise", "add_skip", "insert_norm", "activate", "scale_input", "convert"),
    *("reset_statistics", "set_option", "shift", "activate_after", "clip", "fourier_features"),
)


class Skip(nn.Module):
    """x + a f(x)."""

    def __init__(self, branch: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.branch, self.factor = branch, factor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The input plus what the branch makes of it, times the factor."""
        made = self.branch(x, *args, **kwargs)
        return x + made if self.factor == 1.0 else x + self.factor * made


class ScaledInput(nn.Module):
    """f(s x)."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the module makes of its input times the factor."""
        return self.inner(self.factor * x, *args, **kwargs)


class WithFourierFeatures(nn.Module):
    """What a linear layer makes of its input, and another of sines and cosines of that."""

    frequencies: Tensor

    def __init__(self, layer: nn.Linear, frequency: float, generator: torch.Generator) -> None:
        super().__init__()
        count = layer.out_features
        drawn = frequency * torch.randn(layer.in_features, count, generator=generator, dtype=torch.float64)
        self.register_buffer("frequencies", drawn.to(layer.weight))
        self.layer, self.of_features = layer, nn.Linear(2 * count, count, bias=False).to(layer.weight)
        bound = (2 * count) ** -0.5
        weights = bound * (2 * torch.rand(count, 2 * count, generator=generator, dtype=torch.float64) - 1)
        self.of_features.weight.data.copy_(weights.to(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        angles = x @ self.frequencies
        made: Tensor = self.layer(x) + self.of_features(torch.cat([angles.sin(), angles.cos()], -1))
        return made


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model; what a pass left in attributes, on its graph, is copied without its history.

    Raises:
        ArgumentError: no copy can be made of it.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = [tensor for _, tensor in named_tensors(dict(vars(module)))]
        memo |= {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in held if not t.is_leaf}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever a user's own __deepcopy__ or pickle protocol raises
        raise ArgumentError(
            f"model cannot be copied: copy.deepcopy(model) ends in {type(error).__name__}: "
            f"{error}; stabkit.diagnose needs no copy"
        ) from error


def carry_out(model: nn.Module, actions: Sequence[Action], seed: int = 0) -> None:
    """Change a model in place.

    Raises:
        ArgumentError: an action names something that the model does not have, or is of an unknown form.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for action in actions:
            _act(model, action, generator)


@contextlib.contextmanager
def carried_out(model: nn.Module, actions: Sequence[Action], seed: int = 0) -> Iterator[None]:
    """A model changed for a while: other parameters and modules stand in its own, which are not touched.

    Graphs that were recorded before stay valid, and memory grows by what is changed alone.

    Raises:
        ArgumentError: an action cannot be carried out, or not for a while only (a change of dtype).
    """
    generator = torch.Generator().manual_seed(seed)
    places: defaultdict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():  # a tied parameter has several places
        for name, held in module._parameters.items():
            places[id(held)].append((module, name))
    with contextlib.ExitStack() as undoing:
        with torch.no_grad():
            for action in actions:
                _stand_in(model, action, undoing, places)
                _act(model, action, generator)
        yield


LARGEST = 1_000_000  # parameters beyond which a few dozen steps of training are no small part of a diagnosis


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by path."""
    return {path: p for path, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}


def may_train(model: nn.Module) -> bool:
    """Whether a model has something to train, and is small enough to be trained within a diagnosis."""
    return bool(trainable(model)) and is_small(model, LARGEST)


def is_small(model: nn.Module, most: int = 100_000) -> bool:
    """Whether a model has at most so many parameters, those up to which trials of many steps are made."""
    return sum(p.numel() for p in model.parameters()) <= most


@contextlib.contextmanager
def stood_in(
    model: nn.Module,
    actions: Sequence[Action] = (),
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Iterator[None]:
    """A model to be trained for a while, with a remedy carried out: stand-ins are written, and never its own."""
    held = [{"action": "scale", "parameter": path, "factor": 1.0} for path in trainable(model)]
    with carried_out(model, held), carried_out(model, actions), within():
        yield


def _stand_in(
    model: nn.Module,
    action: Action,
    undoing: contextlib.ExitStack,
    places: dict[int, list[tuple[nn.Module, str]]],
) -> None:
    """Put a copy in the place of what an action changes, and see to it that the original comes back.

    ``places`` are those of the parameters by identity; what is put there is added.
    """
    if action.get("action") == "convert":
        raise ArgumentError("a model is not run in another dtype for a while, which its inputs are not in")
    if "parameter" in action:
        held = parameter(model, action["parameter"])
        if held.is_meta:
            raise ArgumentError(f"the values of {action['parameter']!r} are not in memory")
        fresh = nn.Parameter(held.detach().clone(), requires_grad=held.requires_grad)
        fresh.grad = None if held.grad is None else held.grad.clone()  # a model may read it as it runs
        path, _, own = action["parameter"].rpartition(".")
        where = places[id(held)] or [(_module(model, path), own)]  # in a module that was put in just now
        for module, name in where:
            setattr(module, name, fresh)
            undoing.callback(setattr, module, name, held)
        places[id(fresh)] = where
    if action.get("action") == "reset_statistics":
        norm = _module(model, action["module"])
        for name, buffer in list(norm._buffers.items()):
            undoing.callback(norm._buffers.__setitem__, name, buffer)
            norm._buffers[name] = None if buffer is None else buffer.clone()
        undoing.callback(setattr, norm, "momentum", norm.momentum)
    elif action.get("action") == "set_option":
        held_by, option = _module(model, action["module"]), action["option"]
        undoing.callback(setattr, held_by, option, getattr(held_by, option, None))
    elif "module" in action:
        for path in _span(model, action["module"], action.get("through")):
            parent, _, name = path.rpartition(".")
            owner = _module(model, parent)
            undoing.callback(owner._modules.__setitem__, name, _module(model, path))


def _act(model: nn.Module, action: Action, generator: torch.Generator) -> None:
    form = action.get("action")
    doing: dict[str, Callable[[], None]] = {
        "scale": lambda: _scale(parameter(model, action["parameter"]), float(action["factor"])),
        "shift": lambda: _shift(parameter(model, action["parameter"]), float(action["amount"])),
        "clip": lambda: _clip(parameter(model, action["parameter"]), float(action["low"]), float(action["high"])),
        "redraw": lambda: _redraw(parameter(model, action["parameter"]), float(action["rms"]), generator),
        "fill": lambda: _fill(_part(parameter(model, action["parameter"]), action), float(action["value"])),
        "orthogonalise": lambda: _orthogonalise(
            parameter(model, action["parameter"]), float(action["gain"]), int(action.get("blocks", 1))
        ),
        "add_skip": lambda: _add_skip(model, action["module"], action.get("through"), float(action.get("factor", 1.0))),
        "insert_norm": lambda: _insert_norm(model, action["module"], action["like"]),
        "activate": lambda: _activate(model, action["module"], action["by"]),
        "activate_after": lambda: _activate_after(model, action["module"], action["by"]),
        "scale_input": lambda: _scale_input(model, action["module"], float(action["factor"])),
        "fourier_features": lambda: _fourier_features(model, action["module"], float(action["frequency"]), generator),
        "convert": lambda: _convert(model, action["dtype"]),
        "reset_statistics": lambda: _reset_statistics(_module(model, action["module"])),
        "set_option": lambda: _set_option(_module(model, action["module"]), action["option"], action["value"]),
    }
    if form not in doing:
        raise ArgumentError(f"action {form!r} is unknown; known are {', '.join(FORMS)}")
    doing[form]()


def _scale(tensor: Tensor, by: float) -> None:
    tensor.mul_(by)


def _shift(tensor: Tensor, by: float) -> None:
    tensor.add_(by)


def _clip(tensor: Tensor, low: float, high: float) -> None:
    tensor.clamp_(low, high)


def _redraw(tensor: Tensor, rms: float, generator: torch.Generator) -> None:
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    tensor.copy_((rms * drawn).to(tensor))


def _fill(tensor: Tensor, value: float) -> None:
    tensor.fill_(value)


def _part(tensor: Tensor, action: Action) -> Tensor:
    return tensor[action["start"] : action["stop"]] if "start" in action else tensor


def _orthogonalise(tensor: Tensor, gain: float, blocks: int = 1) -> None:
    for block in tensor.chunk(blocks):
        U, _, Vh = torch.linalg.svd(block.flatten(1).double(), full_matrices=False)
        block.copy_((gain * U @ Vh).reshape(block.shape))


def _add_skip(model: nn.Module, first: str, last: str | None, factor: float) -> None:
    """A skip round one module, or round several that a Sequential runs one after another."""
    paths = _span(model, first, last)
    modules = [_module(model, path) for path in paths]
    _replace(model, first, Skip(modules[0] if len(modules) == 1 else nn.Sequential(*modules), factor))
    for path in paths[1:]:
        _replace(model, path, nn.Identity())


def _span(model: nn.Module, first: str, last: str | None) -> list[str]:
    """Paths of the children of a Sequential from one to another; the one alone without another."""
    if last is None or last == first:
        return [first]
    parent, _, start = first.rpartition(".")
    owner = _module(model, parent)
    names = list(owner._modules)
    stop = last.rpartition(".")[2]
    if not isinstance(owner, nn.Sequential) or start not in names or stop not in names:
        raise ArgumentError(f"{first!r} to {last!r} are not children of one nn.Sequential")
    return [f"{parent}.{name}".lstrip(".") for name in names[names.index(start) : names.index(stop) + 1]]


def _insert_norm(model: nn.Module, place: str, like: str) -> None:
    norm = copy.deepcopy(_module(model, like))
    reset = getattr(norm, "reset_parameters", None)
    if callable(reset):
        reset()
    _replace(model, place, norm)


def _activate(model: nn.Module, place: str, by: str) -> None:
    _replace(model, place, getattr(nn, by)())


def _activate_after(model: nn.Module, place: str, by: str) -> None:
    _replace(model, place, nn.Sequential(_module(model, place), getattr(nn, by)()))


def _scale_input(model: nn.Module, place: str, by: float) -> None:
    _replace(model, place, ScaledInput(_module(model, place), by))


def _fourier_features(model: nn.Module, place: str, frequency: float, generator: torch.Generator) -> None:
    layer = _module(model, place)
    if not isinstance(layer, nn.Linear):
        raise ArgumentError(f"{place!r} is a {type(layer).__name__}; Fourier features are given to an nn.Linear")
    _replace(model, place, WithFourierFeatures(layer, frequency, generator))


def _convert(model: nn.Module, dtype: str) -> None:
    model.to(getattr(torch, dtype))


def _reset_statistics(norm: nn.Module) -> None:
    if not isinstance(norm, _BatchNorm):
        raise ArgumentError(f"a {type(norm).__name__} has no running statistics; is it the model that was diagnosed?")
    norm.reset_running_stats()
    norm.momentum = None  # the mean of all batches that follow


def _set_option(module: nn.Module, option: str, value: bool | float) -> None:
    if type(getattr(module, option, None)) is not type(value):
        raise ArgumentError(f"a {type(module).__name__} has no option {option!r} that could be {value!r}")
    setattr(module, option, value)


def once(model: nn.Module, actions: Sequence[Action]) -> tuple[Action, ...] | None:
    """Actions that change every parameter once: None where two would change one in two ways.

    A weight that several steps or modules share has several names, and must not be scaled once for each.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    kept: dict[object, Action] = {}
    for action in actions:
        path = action.get("parameter")
        key = (action.get("action"), action.get("module")) if path is None else id(names.get(path, path))
        first = kept.setdefault(key, action)
        if {**first, "parameter": None} != {**action, "parameter": None}:
            return None
    return tuple(kept.values())


def parameter(model: nn.Module, path: str) -> nn.Parameter:
    """A parameter by its path."""
    try:
        return model.get_parameter(path)
    except RuntimeError:  # TorchScript finds its parameters by no path
        return dict(model.named_parameters(remove_duplicate=False))[path]
    except AttributeError:
        raise ArgumentError(f"the model has no parameter {path!r}; is it the one that was diagnosed?") from None


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ArgumentError(f"the model has no module {path!r}; is it the one that was diagnosed?") from None


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(_module(model, parent), name, module)
