"""One forward pass, run under recording; the same again when a step has to be computed anew."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from stabkit.errors import TraceError
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.inputs import prepare
from stabkit.tracing.recording.recomputation import SavedTensors
from stabkit.tracing.recording.recorder import Ending, Recording, ValueRecorder, clock, record
from stabkit.tracing.recording.sharding import take_whole
from stabkit.tracing.recording.transparency import transparent
from stabkit.tracing.recording.untouched_model import seeded, unchanged


@dataclass(frozen=True)
class ForwardPass:
    """A model and what it is called with.

    Attributes:
        model: what is called.
        module: the module whose state is kept safe.
        inputs: positional arguments.
        kwargs: keyword arguments.
        seed: the seed of the random numbers that the model draws.
        promote_casts: take floats that are cast from integers as sources too.
        through_no_grad: ignore ``torch.no_grad`` inside the model.
        through_detach: pass on what the model detaches.
        ending: makes what a flow ends at of the output, recorded with the pass; None where an output itself is meant.
        differentiated: the parameters that stay on the graph since the model takes derivatives by them, as inner steps
            of meta-learning do.
    """

    model: Any
    module: nn.Module
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    seed: int
    promote_casts: bool = False
    through_no_grad: bool = False
    through_detach: bool = False
    ending: Ending | None = None
    differentiated: frozenset[int] = frozenset()

    @property
    def given(self) -> list[tuple[str, Tensor]]:
        """The tensors that it is called with, by their paths."""
        return [*named_tensors(list(self.inputs)), *named_tensors(self.kwargs)]

    def run(self, saved: SavedTensors | None = None, wanted: frozenset[tuple[int, int]] | None = None) -> Recording:
        """Run it once and return the recording; the model is afterwards as it was.

        Args:
            saved: where saved tensors go instead of staying with their nodes.
            wanted: which values to keep, by time since the start and output; all of them by default.

        Raises:
            TraceError: the model raised, with the name of the module in which it did.
        """
        recording = Recording()
        try:
            return self._run(recording, saved, wanted)
        except TraceError:
            asked = self._asked(recording)
            if not asked - self.differentiated:
                raise
        return replace(self, differentiated=asked).run(saved, wanted)

    def _asked(self, recording: Recording) -> frozenset[int]:
        """The parameters that the model takes derivatives by, or all where it does so by copies of some."""
        asked = frozenset(id(tensor) for tensor in recording.undifferentiated)
        own = frozenset(id(p) for m in self.module.modules() for p in m._parameters.values() if p is not None)
        return own if asked - own else asked

    def _run(
        self, recording: Recording, saved: SavedTensors | None, wanted: frozenset[tuple[int, int]] | None
    ) -> Recording:
        with unchanged(self.module) as safe:
            safe.freeze(but=self.differentiated)
            safe.copy_buffers()
            take_whole(self.module)
            seeded(self.seed)
            recording.start = clock()
            prepared = prepare(self.inputs, self.kwargs)
            recording.sources.extend(prepared.sources)
            for source in prepared.sources:
                recording.values[source.value] = source.tensor.detach().clone()
            values = ValueRecorder(recording, safe, prepared.integers, self.promote_casts, wanted)
            hooks = saved.hooks() if saved is not None else contextlib.nullcontext()
            try:
                with transparent(self.through_no_grad, through_detach=self.through_detach), hooks:
                    record(self.model, self.module, prepared.args, prepared.kwargs, recording, values, self.ending)
            except TraceError:
                raise
            except Exception as error:
                raise self._failed(error, recording) from error
        return recording

    def initialise_lazy(self) -> bool:
        """Let lazy modules take their shapes, by a first forward pass; whether there were any."""
        lazy = (UninitializedParameter, UninitializedBuffer)
        if not any(isinstance(t, lazy) for t in itertools.chain(self.module.parameters(), self.module.buffers())):
            return False
        with torch.no_grad():
            self.model(*self.inputs, **self.kwargs)
        return True

    def _failed(self, error: Exception, recording: Recording) -> TraceError:
        running = [call for call in recording.calls if not call.finished]
        where = "the model"
        if running and running[-1].path:
            where = f"module {running[-1].path!r} ({running[-1].module_class})"
        shapes = ", ".join(str(tuple(tensor.shape)) for _, tensor in named_tensors([self.inputs, self.kwargs]))
        message = " ".join(str(error).split())[:400]
        modules = dict(self.module.named_modules())
        takes = what_it_takes(modules[running[-1].path]) if running and running[-1].path in modules else ""
        return TraceError(
            f"the forward pass failed in {where}: {type(error).__name__}: {message} "
            f"(inputs of shape {shapes or 'none'}{'; ' * bool(takes)}{takes})"
        )


def what_it_takes(module: nn.Module) -> str:
    """What a layer of torch accepts, in words; empty where it does not say.

    Example:
        >>> what_it_takes(nn.Linear(4, 2))
        'it takes (..., 4) of float32'
    """
    if isinstance(module, nn.Embedding):
        return f"it takes integers from 0 to {module.num_embeddings - 1}"
    if isinstance(module, nn.Linear):
        shape = f"(..., {module.in_features})"
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        shape = ", ".join(["(batch", str(module.in_channels), *["size"] * len(module.kernel_size)]) + ")"
    elif isinstance(module, nn.RNNBase):
        shape = f"({'batch, time' if module.batch_first else 'time, batch'}, {module.input_size})"
    elif isinstance(module, nn.LayerNorm):
        shape = ", ".join(["(...", *map(str, module.normalized_shape)]) + ")"
    else:
        return ""
    weight = next(module.parameters(), None)
    return f"it takes {shape}" + ("" if weight is None else f" of {str(weight.dtype).removeprefix('torch.')}")
