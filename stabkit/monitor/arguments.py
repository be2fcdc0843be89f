"""What a monitor is given, checked before it starts: a mistake is told at once and not in the middle of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn

from stabkit.diagnosis import Finding
from stabkit.errors import ArgumentError, did_you_mean
from stabkit.monitor.rules import AlertRules

PRESETS = ("economy", "standard", "full")

Callback = Callable[[Finding], object]


def check_model(model: Any, preset: Any) -> None:
    """Whether there is a module to watch, and a preset to do it by.

    Raises:
        ArgumentError: one of them is something else.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    if preset not in PRESETS:
        guess = did_you_mean(str(preset), PRESETS)
        raise ArgumentError(f"preset={preset!r}; expected one of {', '.join(PRESETS)}{guess}")


def check_counts(**counts: tuple[Any, int]) -> None:
    """Whether every count is a whole number that is large enough.

    Args:
        **counts: by the name of the argument, the value and the least that it may be.

    Raises:
        ArgumentError: one is not.
    """
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ArgumentError(
                f"{name}={value!r} is {type(value).__name__}; expected a whole number, at least {least}"
            )
        if value < least:
            raise ArgumentError(f"{name}={value}; expected at least {least}")


def check_kinds(directory: Any, scaler: Any, rules: Any, model_factory: Any) -> None:
    """Whether the other arguments are of the kinds that they should be, or None.

    Raises:
        ArgumentError: one is not.
    """
    for name, value, kinds, expected in (
        ("directory", directory, (str, os.PathLike), "a path or None"),
        ("rules", rules, (AlertRules,), "stabkit.monitor.AlertRules(...) or None"),
        ("model_factory", model_factory, (str,), "'pkg.mod:factory' or 'file.py:factory'"),
    ):
        if value is not None and not isinstance(value, kinds):
            raise ArgumentError(f"{name} is {type(value).__name__}; expected {expected}")
    if scaler is not None and not hasattr(scaler, "unscale_"):
        raise ArgumentError(f"scaler is {type(scaler).__name__}; expected the torch.amp.GradScaler of the run")


def optimizers(given: Any) -> list[torch.optim.Optimizer]:
    """One or several optimizers as a list, without the wrappers of accelerate and Lightning.

    Raises:
        ArgumentError: something that is no optimizer.
    """
    wrapped = [] if given is None else list(given) if isinstance(given, Iterable) else [given]
    listed = [getattr(one, "optimizer", one) for one in wrapped]
    for one in listed:
        if not isinstance(one, torch.optim.Optimizer):
            raise ArgumentError(f"optimizer holds {type(one).__name__}; expected a torch.optim.Optimizer, or several")
    return listed


def callbacks(given: Any) -> list[Callback]:
    """One or several callables as a list.

    Raises:
        ArgumentError: something that cannot be called.
    """
    listed = [] if given is None else [given] if callable(given) or not isinstance(given, Iterable) else list(given)
    for one in listed:
        if not callable(one):
            raise ArgumentError(
                f"on_alert holds {type(one).__name__}; expected a callable that takes a Finding, or several"
            )
    return listed


def named_modules(model: nn.Module, paths: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of a model by the paths that a user names.

    Raises:
        ArgumentError: the model has no such module, or none is named.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    known = dict(model.named_modules())
    missing = [path for path in paths if path not in known]
    if missing:
        guess = did_you_mean(str(missing[0]), known)
        raise ArgumentError(f"blocks: the model has no module {missing[0]!r}{guess}")
    if not paths:
        raise ArgumentError("blocks is empty; expected paths of modules, or None to watch those found")
    return {path: known[path] for path in paths}
