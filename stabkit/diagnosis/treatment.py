"""A remedy carried out on a model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis.finding import Action, Finding
from stabkit.errors import ArgumentError


class Skip(nn.Module):
    """x + f(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The input plus what the branch makes of it."""
        return x + self.branch(x, *args, **kwargs)


def apply(model: nn.Module, finding: Finding, *, seed: int = 0) -> int:
    """How many actions of a finding's remedy were carried out on the model, which is changed in place.

    Args:
        model: the model that was diagnosed.
        finding: what was found in it.
        seed: of weights that are drawn anew.

    Raises:
        ArgumentError: an action names something that the model does not have, or is of an unknown form.

    Example:
        >>> import torch, stabkit
        >>> from stabkit.diagnosis import apply
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(32, 32, bias=False) for _ in range(8)])
        >>> for layer in model: _ = torch.nn.init.orthogonal_(layer.weight)
        >>> model[3].weight.data.mul_(20.0).norm() > 100
        tensor(True)
        >>> found = stabkit.diagnose(stabkit.trace(model, torch.randn(4, 32)))
        >>> [(f.kind, f.module_path) for f in found]
        [('exploding', '3')]
        >>> apply(model, found[0])
        1
        >>> stabkit.diagnose(stabkit.trace(model, torch.randn(4, 32)))
        []
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for action in finding.actions:
            _apply(model, action, generator)
    return len(finding.actions)


def _apply(model: nn.Module, action: Action, generator: torch.Generator) -> None:
    form = action.get("action")
    if form == "scale":
        parameter(model, action["parameter"]).mul_(float(action["factor"]))
    elif form == "redraw":
        tensor = parameter(model, action["parameter"])
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_((float(action["rms"]) * drawn).to(tensor))
    elif form == "fill":
        parameter(model, action["parameter"]).fill_(float(action["value"]))
    elif form == "orthogonalise":
        tensor = parameter(model, action["parameter"])
        U, _, Vh = torch.linalg.svd(tensor.flatten(1).double(), full_matrices=False)
        tensor.copy_((float(action["gain"]) * U @ Vh).reshape(tensor.shape))
    elif form == "add_skip":
        _replace(model, action["module"], Skip(_module(model, action["module"])))
    elif form == "insert_norm":
        norm = copy.deepcopy(_module(model, action["like"]))
        reset = getattr(norm, "reset_parameters", None)
        if callable(reset):
            reset()
        _replace(model, action["module"], norm)
    elif form == "convert":
        model.to(getattr(torch, action["dtype"]))
    else:
        raise ArgumentError(
            f"action {form!r} is unknown; known are scale, redraw, fill, orthogonalise, add_skip, insert_norm, convert"
        )


def parameter(model: nn.Module, path: str) -> nn.Parameter:
    """A parameter by its path."""
    found = dict(model.named_parameters(remove_duplicate=False)).get(path)
    if found is None:
        raise ArgumentError(f"the model has no parameter {path!r}; is it the one that was diagnosed?")
    return found


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ArgumentError(f"the model has no module {path!r}; is it the one that was diagnosed?") from None


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(_module(model, parent), name, module)
