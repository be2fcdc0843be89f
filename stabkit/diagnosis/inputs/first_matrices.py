"""What the first matrices of a model are given: inputs, whatever they were cast to, divided by and joined with.

A step number that is cast and joined with features of size 1 is no float input, and its size is seen only there. No
parameter that trains comes before, so that what a matrix is given stays what it is, and can be standardised for good.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis.inputs.derivatives import differentiates
from stabkit.diagnosis.inputs.features import Features, changed, features_along
from stabkit.tracing.recording.containers import map_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MATRICES = (nn.Linear, *_CONVOLUTIONS, nn.RNNBase, nn.RNNCellBase)
_MOST_INPUTS = 8  # that are exchanged among the samples, each in a pass of its own


@dataclass(frozen=True)
class Given:
    """What one of the first matrices is given.

    Attributes:
        path: of its module.
        rows: ``(rows, features)``, of all its calls.
        features: mean and spread of them.
    """

    path: str
    rows: Tensor
    features: Features


def given_to_matrices(call: ForwardPass) -> list[Given]:
    """What every matrix is given that no trained parameter comes before, and that is none of the inputs as they are."""
    plain = [t for _, t in call.given if t.is_floating_point()]
    found = []
    for path, rows in rows_given(call).items():
        features = features_along(path, rows, 1)
        same = any(t.numel() == rows.numel() and bool((_sorted(t) == _sorted(rows)).all()) for t in plain)
        if features is not None and not same:
            found.append(Given(path, rows, features))
    return found


def standardised(call: ForwardPass, places: list[Given]) -> ForwardPass:
    """The same call with what these matrices are given standardised, feature by feature."""
    modules = dict(call.module.named_modules())

    def prepared(features: Features) -> Callable[[nn.Module, Any], Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            return (replace(features, axis=_axis(module, args[0])).standardised(args[0]), *args[1:])

        return hook

    def model(*inputs: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for place in places:
                handle = modules[place.path].register_forward_pre_hook(prepared(place.features))
                stack.callback(handle.remove)
            return call.model(*inputs, **kwargs)

    return replace(call, model=model)


def inputs_behind(call: ForwardPass, place: Given, feature: int) -> list[tuple[str, Tensor]]:
    """The inputs that a feature comes from: exchanged among the samples, they change it."""
    varying = [(name, t) for name, t in call.given if t.dim() > 0 and len(t) > 1 and bool((t != t[:1]).any())]
    found = []
    for name, tensor in varying[:_MOST_INPUTS]:
        rows = rows_given(changed(call, lambda t, one=tensor: t.roll(1, 0) if t is one else t)).get(place.path)  # type: ignore[misc]
        if rows is not None and rows.shape == place.rows.shape and bool((rows != place.rows)[:, feature].any()):
            found.append((name, tensor))
    return found


def rows_given(call: ForwardPass) -> dict[str, Tensor]:
    """By path what matrices are given that carries no gradient where the parameters do."""
    kept: dict[str, list[Tensor]] = {}
    trained: set[str] = set()
    with call.kept(), torch.enable_grad(), _noting(call.module, kept, trained):
        inputs, kwargs = map_tensors(
            [list(call.inputs), dict(call.kwargs)], lambda t: t.detach().clone().requires_grad_(t.requires_grad)
        )
        try:
            call.model(*inputs, **kwargs)
        except RuntimeError:
            if not differentiates(call):
                raise
            return {}  # with respect to its inputs, which the recorded pass lets carry gradient: so do all matrices
    return {path: torch.cat(rows) for path, rows in kept.items() if path not in trained}


@contextlib.contextmanager
def _noting(model: nn.Module, kept: dict[str, list[Tensor]], trained: set[str]) -> Iterator[None]:
    def noting(path: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            given = args[0] if args else None
            if not isinstance(given, Tensor) or given.requires_grad or given.dim() < 2 or not given.is_floating_point():
                trained.add(path)  # or a packed sequence, or none at all
            else:
                kept.setdefault(path, []).append(given.detach().movedim(_axis(module, given), -1).flatten(0, -2))

        return hook

    with contextlib.ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, _MATRICES) and any(p.requires_grad for p in module.parameters()):
                stack.callback(module.register_forward_pre_hook(noting(path)).remove)
        yield


def _axis(module: nn.Module, given: Tensor) -> int:
    return given.dim() - 1 - (len(module.kernel_size) if isinstance(module, _CONVOLUTIONS) else 0)


def _sorted(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().sort().values
