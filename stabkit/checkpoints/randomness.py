"""The state of the random generators that a model may draw from, and how to put it back."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabkit.errors import CheckpointError

RandomState = tuple[Tensor, list[Tensor], Any, Any]


def random_state() -> RandomState:
    """The state of torch's CPU generator, of those of CUDA devices in use, of Python's and of numpy's."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = torch.cuda.get_rng_state_all() if used else []
    return torch.get_rng_state(), devices, random.getstate(), np.random.get_state()  # noqa: NPY002


def as_tensors(state: RandomState) -> dict[str, Tensor]:
    """A random state as named tensors, which a file without code can hold."""
    cpu, devices, (version, words, following), numpy_state = state
    found = {"cpu": cpu, **{f"cuda.{i}": one for i, one in enumerate(devices)}}
    found["python"] = torch.tensor([version, *words], dtype=torch.int64)
    found["python.normal"] = torch.tensor(math.nan if following is None else following, dtype=torch.float64)
    _, keys, position, has_normal, normal = numpy_state
    found["numpy"] = torch.tensor([*keys.tolist(), position, has_normal], dtype=torch.int64)
    found["numpy.normal"] = torch.tensor(normal, dtype=torch.float64)
    return found


def restore_random(tensors: Mapping[str, Tensor]) -> None:
    """Put a state back that `as_tensors` wrote; devices that this machine has not are passed over.

    Raises:
        CheckpointError: it is no random state.

    Example:
        >>> kept = as_tensors(random_state())
        >>> first = torch.rand(2), random.random()
        >>> restore_random(kept)
        >>> bool((torch.rand(2) == first[0]).all()), random.random() == first[1]
        (True, True)
    """
    try:
        _restore(tensors)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"the random state is damaged: {type(error).__name__}: {error}") from error


def _restore(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["cpu"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    version, *words = tensors["python"].tolist()
    following = float(tensors["python.normal"])
    random.setstate((version, tuple(words), None if math.isnan(following) else following))
    *keys, position, has_normal = tensors["numpy"].tolist()
    state = ("MT19937", np.array(keys, dtype=np.uint32), position, has_normal, float(tensors["numpy.normal"]))
    np.random.set_state(state)  # noqa: NPY002 - a model may draw from the global generator
