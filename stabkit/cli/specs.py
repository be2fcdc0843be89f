"""Classes of torch by their names and settings, as they are written on a command line: ``sgd:lr=0.1,momentum=0.9``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stabkit.errors import StabkitError, did_you_mean

if TYPE_CHECKING:
    import torch

#: Schedules that take functions or other schedules, which have no short spelling.
_IN_PYTHON = ("lambda", "multiplicative", "sequential", "chainedscheduler")


def optimizer_of(spec: str) -> tuple[type[torch.optim.Optimizer], Mapping[str, Any]]:
    """The class and the settings of an optimizer of torch.

    Args:
        spec: ``NAME:key=value,...``, numbers with colons between them for a tuple: ``adam:lr=1e-3,betas=0.9:0.99``.

    Raises:
        StabkitError: there is no such optimizer, no such setting, or no rate.
    """
    import torch

    base = torch.optim.Optimizer
    kinds = {name.lower(): kind for name, kind in vars(torch.optim).items() if _derives(kind, base)}
    name, given = _split("--optimizer", "optimizer", spec, kinds)
    accepted = _accepted_by(kinds[name], "params")
    settings: dict[str, Any] = {}
    for key, text in _pairs("--optimizer", spec, name, given, accepted):
        value = _value(text)
        if isinstance(value, str):
            raise StabkitError(
                f"--optimizer {spec!r}: {f'{key}={text}'!r} has no number; write for example lr=1e-3, nesterov=true, "
                "betas=0.9:0.99"
            )
        settings[key] = value
    if "lr" not in settings:
        raise StabkitError(f"--optimizer {spec!r} has no learning rate; write {name}:lr=0.1")
    return kinds[name], settings


def schedule_of(spec: str) -> tuple[type[Any], Mapping[str, Any]]:
    """The class and the settings of a schedule of ``torch.optim.lr_scheduler``, with or without LR in its name.

    Args:
        spec: ``NAME:key=value,...``: ``onecycle:max_lr=0.1,total_steps=1000``, ``multistep:milestones=30:80``.

    Raises:
        StabkitError: there is no such schedule, no such setting, a value is none of its kind, or one is missing.
    """
    from torch.optim import lr_scheduler

    bases = lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau  # the second is no first in some versions
    kinds = {
        name.lower().removesuffix("lr"): kind
        for name, kind in vars(lr_scheduler).items()
        if _derives(kind, bases) and not name.startswith("_")
    }
    bare, _, rest = spec.partition(":")
    bare = bare.lower().removesuffix("lr")
    if bare in _IN_PYTHON:
        raise StabkitError(
            f"--schedule {spec!r}: {kinds[bare].__name__} takes functions or other schedules, which cannot be written "
            "here; give it in Python: stabkit.analyze(..., optimizer=optimizer, scheduler=scheduler)"
        )
    kinds = {name: kind for name, kind in kinds.items() if name not in _IN_PYTHON}
    name, given = _split("--schedule", "schedule", f"{bare}:{rest}" if rest else bare, kinds, spec)
    accepted = _accepted_by(kinds[name], "optimizer", "last_epoch", "verbose", "scale_fn")
    settings = {
        key: _as_taken(spec, key, text, accepted[key])
        for key, text in _pairs("--schedule", spec, name, given, list(accepted))
    }
    missing = [key for key, p in accepted.items() if p.default is inspect.Parameter.empty and key not in settings]
    if missing:
        wanted = ",".join(f"{key}=..." for key in missing)
        raise StabkitError(f"--schedule {spec!r} has no {' and no '.join(missing)}; write {name}:{wanted}")
    return kinds[name], settings


def _derives(kind: Any, base: Any) -> bool:
    bases = base if isinstance(base, tuple) else (base,)
    return inspect.isclass(kind) and issubclass(kind, bases) and kind is not bases[0]


def _accepted_by(kind: type[Any], *but: str) -> dict[str, inspect.Parameter]:
    return {key: p for key, p in inspect.signature(kind).parameters.items() if key not in but}


def _split(
    option: str, what: str, spec: str, kinds: Mapping[str, Any], written: str | None = None
) -> tuple[str, Sequence[str]]:
    """The name, and what is set, each ``key=value``."""
    name, _, rest = spec.partition(":")
    if name.lower() not in kinds:
        raise StabkitError(
            f"{option} {written or spec!r}: no {what} of torch is called {name!r}; there are "
            f"{', '.join(sorted(kinds))}{did_you_mean(name.lower(), kinds)}"
        )
    return name.lower(), [part for part in (part.strip() for part in rest.split(",")) if part]


def _pairs(
    option: str, spec: str, name: str, given: Sequence[str], accepted: Sequence[str] | Mapping[str, Any]
) -> list[tuple[str, str]]:
    found = []
    for part in given:
        key, equals, text = part.partition("=")
        if not equals or key not in accepted:
            raise StabkitError(
                f"{option} {spec!r}: {part!r} is no setting of {name}; expected key=value with one of "
                f"{', '.join(accepted)}{did_you_mean(key, accepted)}"
            )
        found.append((key, text))
    return found


def _value(text: str) -> Any:
    """A number, true or false, several numbers with colons between them, or the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        numbers = [float(number) for number in text.split(":")]
    except ValueError:
        return text
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def _as_taken(spec: str, key: str, text: str, parameter: inspect.Parameter) -> Any:
    """A value as the parameter takes it: torch's schedules count in whole numbers and refuse 1000.0 for 1000."""
    value, default = _value(text), parameter.default
    several = "Iterable" in str(parameter.annotation)
    wrong = ""
    if isinstance(value, str) != isinstance(default, str):
        wrong = "is no word" if isinstance(default, str) else "is no number"
    elif isinstance(value, bool) != isinstance(default, bool):
        wrong = "is neither true nor false" if isinstance(default, bool) else "is no number"
    if wrong:
        raise StabkitError(f"--schedule {spec!r}: {f'{key}={text}'!r} {wrong}; write for example {_example(default)}")
    if isinstance(value, str | bool) or isinstance(default, float):
        return list(value) if isinstance(value, tuple) else value
    numbers = [int(n) if n.is_integer() else n for n in (value if isinstance(value, tuple) else (value,))]
    return numbers if several or len(numbers) > 1 else numbers[0]


def _example(default: Any) -> str:
    if isinstance(default, bool | str):
        return str(default).lower()
    return "1e-3, 1000, 30:80" if default in (None, inspect.Parameter.empty) else str(default)
