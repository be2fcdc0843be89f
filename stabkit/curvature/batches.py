"""What a loss is taken over: one call of a model, or batches whose mean it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabkit.errors import ArgumentError, ArgumentTypeError, StabkitError, TraceError
from stabkit.tracing.recording.containers import map_tensors, named_tensors


@dataclass(frozen=True)
class Batch:
    """One call of the model and the loss of what it returns.

    Attributes:
        inputs: positional arguments.
        kwargs: keyword arguments.
        loss: a callable on the output that returns a scalar.
        weight: the part of this batch in the whole.
        call: what runs the model by itself, in place of a call with the inputs.
    """

    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss: Callable[[Any], Tensor]
    weight: float = 1.0
    call: Callable[[], Any] | None = None

    def output(self, module: nn.Module) -> Any:
        """What the model returns; the batch is not written to."""
        if self.call is not None:
            with _told(
                "the closure failed", "it returns the loss of a fixed batch, on the graph and without backward()"
            ):
                return self.call()
        args, kwargs = map_tensors([list(self.inputs), dict(self.kwargs)], lambda t: t.detach().clone())
        with _told("the model failed on what it was called with", "see that the inputs are those of a batch"):
            return module(*args, **kwargs)

    def value(self, output: Any) -> Any:
        """What the loss returns, whatever it is."""
        with _told("the loss failed on the model's output", "it is called with the output, and returns a scalar"):
            found: Any = self.loss(output)
            if isinstance(found, Tensor) and found.is_complex():
                raise TraceError("the loss is complex; return a real scalar, such as its real part or its size")
            if not isinstance(found, Tensor | np.generic | Real):
                among = " (it holds one under 'loss')" if "loss" in dir(found) or _has(found, "loss") else ""
                raise TraceError(
                    f"loss returned {type(found).__name__}{among}; expected a scalar, e.g. loss=lambda out: "
                    "out.square().mean()"
                )
            return found


@contextlib.contextmanager
def _told(what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except (StabkitError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        raise TraceError(f"{what}: {type(error).__name__}: {message}; {advice}") from error


class Batches:
    """The batches of a loss, which may be gone through any number of times.

    Args:
        inputs: what the model is called with.
        kwargs: its keyword arguments.
        loss: a callable on the output; with ``batches``, on the output and what the batch gives beside its inputs.
        batches: pairs of inputs and targets, in place of ``inputs``: a list, a loader that gives the same batches in
            the same order each time. Inputs are a tensor, a tuple of arguments or a mapping of keyword arguments. An
            iterator that gives out once is kept as a list; a batch without samples is left out.

    Raises:
        ArgumentError: there are inputs and batches, or neither.
        ArgumentTypeError: the loss is no function, the batches are none, or ``kwargs`` is no mapping.
    """

    def __init__(
        self,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        loss: Any,
        batches: Iterable[Any] | None,
    ) -> None:
        if not callable(loss):
            raise ArgumentTypeError(
                f"loss is a {type(loss).__name__}; curvature is that of a loss: give a callable on the model's output "
                "that returns a scalar, e.g. loss=lambda out: torch.nn.functional.cross_entropy(out, targets)"
            )
        if batches is not None and (inputs or kwargs):
            raise ArgumentError("inputs and batches= are both given; the inputs of each batch stand in batches")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise ArgumentTypeError(f"kwargs is a {type(kwargs).__name__}; expected a mapping of names to arguments")
        if isinstance(batches, Tensor | str | Mapping) or not isinstance(batches, Iterable | None):
            raise ArgumentTypeError(
                f"batches is a {type(batches).__name__}; expected pairs of inputs and targets: batches=[(x, y), ...]"
            )
        if batches is None and not (inputs or kwargs):
            raise ArgumentError("there are no inputs; give those of one batch after the model, or batches=")
        self._one = None if batches is not None else Batch(inputs, dict(kwargs or {}), loss)
        self._many = list(batches) if isinstance(batches, Iterator) else batches
        self._loss = loss
        self._sizes: list[float] = []

    def __len__(self) -> int:
        return 1 if self._one is not None else sum(size > 0 for size in self._measured())

    def __iter__(self) -> Iterator[Batch]:
        if self._one is not None:
            yield self._one
            return
        sizes = self._measured()
        total, count = sum(sizes), 0
        for size, given in zip(sizes, self._many or (), strict=False):
            inputs, targets = _pair(given)
            count += 1
            if size:
                yield self._batch(inputs, targets, size / total)
        if count != len(sizes):
            raise ArgumentError(f"batches gave {len(sizes)} batches at first and {count} later; give a list")

    def _measured(self) -> list[float]:
        if not self._sizes:
            self._sizes = [_size(_pair(given)[0]) for given in self._many or ()]
            if not any(self._sizes):
                raise ArgumentError("batches holds no samples; give at least one pair of inputs and targets")
        return self._sizes

    def _batch(self, inputs: Any, targets: Any, weight: float) -> Batch:
        args = () if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        kwargs = inputs if isinstance(inputs, Mapping) else {}
        return Batch(args, kwargs, lambda output: self._loss(output, targets), weight)


def _has(found: Any, key: str) -> bool:
    return isinstance(found, Mapping) and key in found


def _pair(given: Any) -> tuple[Any, Any]:
    if isinstance(given, tuple | list) and len(given) == 2:
        return given[0], given[1]
    found = f"{len(given)} entries" if isinstance(given, tuple | list) else type(given).__name__
    raise ArgumentTypeError(f"a batch is {found}; expected a pair of inputs and targets: batches=[(x, y), ...]")


def _size(inputs: Any) -> float:
    """The number of samples: the length of the first tensor."""
    for _, tensor in named_tensors(dict(inputs) if isinstance(inputs, Mapping) else inputs):
        if tensor.dim():
            return float(len(tensor))
    raise ArgumentError("a batch has no tensor with a dimension of samples among its inputs")
