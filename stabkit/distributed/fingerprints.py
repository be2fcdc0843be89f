"""Whether two ranks were called with the same model and the same input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stabkit.hashing import content_key, has_entries
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.wrappers import modules_behind

_ENTRIES = 64  # of every parameter, evenly spread, that are compared


def fingerprint(model: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """A hash of a call: the input, names and shapes of the parameters, and some entries of each that is whole here.

    Example:
        >>> import torch
        >>> one, two = (torch.nn.Linear(2, 2) for _ in range(2))
        >>> fingerprint(one, (torch.ones(1, 2),), {}) == fingerprint(one, (torch.ones(1, 2),), {})
        True
        >>> fingerprint(one, (torch.ones(1, 2),), {}) == fingerprint(two, (torch.ones(1, 2),), {})
        False
    """
    parameters = {
        name: (tuple(parameter.shape), _some_entries(parameter))
        for name, parameter in modules_behind(model).named_parameters()
    }
    return content_key(dict(named_tensors([inputs, dict(kwargs)])), parameters)


def _some_entries(parameter: Tensor) -> Tensor:
    """Evenly spread ones; the parameter itself where they do not all lie here."""
    if not has_entries(parameter):
        return parameter
    return parameter.detach().reshape(-1)[:: max(1, parameter.numel() // _ENTRIES)]
