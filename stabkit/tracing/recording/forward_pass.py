"""One forward pass, run under recording; the same again when a step has to be computed anew."""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from stabkit.errors import TraceError
from stabkit.tracing.recording.containers import map_tensors, named_tensors
from stabkit.tracing.recording.inputs import prepare
from stabkit.tracing.recording.randomness import seeded, set_state
from stabkit.tracing.recording.recomputation import SavedTensors
from stabkit.tracing.recording.recorder import Ending, Recording, ValueRecorder, clock, record
from stabkit.tracing.recording.sharding import take_whole
from stabkit.tracing.recording.transparency import transparent
from stabkit.tracing.recording.untouched_model import WAY_BACK, Safe, WhenCalled, aside
from stabkit.tracing.recording.written import backward_told
from stabkit.vocabulary import is_python_node


@dataclass
class _Kept:
    """What the first run of a pass shows, and later ones need.

    Attributes:
        generators: the model's own random generators by their ids, and how they stood.
        written: ids of parameters that the model writes to.
    """

    generators: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)


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
    _kept: _Kept = field(default_factory=_Kept, repr=False, compare=False)

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
            self._record(recording, saved, wanted)
        except TraceError:
            asked = self._asked(recording)
            if not asked - self.differentiated:
                raise
            return replace(self, differentiated=asked)._run_again(saved, wanted)
        if not self._kept.written.issuperset(recording.written):
            # it changes weights before it uses them: the graph must hold them as they were used
            self._kept.written |= recording.written
            return self._run_again(saved, wanted)
        return recording

    def _run_again(self, saved: SavedTensors | None, wanted: frozenset[tuple[int, int]] | None) -> Recording:
        if saved is not None:
            saved.begin_anew()
        return self.run(saved, wanted)

    def _asked(self, recording: Recording) -> frozenset[int]:
        """The parameters that the model takes derivatives by, or all where it does so by copies of some."""
        asked = frozenset(id(tensor) for tensor in recording.undifferentiated)
        own = frozenset(id(p) for m in self.module.modules() for p in m._parameters.values() if p is not None)
        return own if asked - own else asked

    def _record(
        self, recording: Recording, saved: SavedTensors | None, wanted: frozenset[tuple[int, int]] | None
    ) -> None:
        with self.kept(watch=False) as safe:
            safe.freeze(but=self.differentiated)
            take_whole(self.module)
            recording.start = clock()
            prepared = prepare(self.inputs, self.kwargs)
            recording.sources.extend(prepared.sources)
            for source in prepared.sources:
                recording.values[source.value] = source.tensor.detach().clone()
            values = ValueRecorder(recording, safe, prepared.integers, self.promote_casts, wanted)
            hooks = saved.hooks() if saved is not None else contextlib.nullcontext()
            try:
                looking = transparent(self.through_no_grad, through_detach=self.through_detach)
                with looking, hooks, backward_told(safe.before_gradients):
                    record(self.model, self.module, prepared.args, prepared.kwargs, recording, values, self.ending)
            except TraceError:
                raise
            except Exception as error:
                raise self.failed(error, recording) from error
            safe.refuse_other_threads()
            recording.written = safe.written
        own = [value.node for value in recording.values if is_python_node(value.node)]
        if own or recording.hooks or wanted is not None:
            recording.way_back = WhenCalled(self.module, self.model, recording.hooks, *own)
            for node in own:  # held weakly, as a graph holds what it is told without the garbage collector's knowing
                told: Any = node.metadata
                told[WAY_BACK] = weakref.ref(recording.way_back)

    @contextlib.contextmanager
    def kept(self, *others: Any, watch: bool = True) -> Iterator[Safe]:
        """Run the model inside as it was run first, with the same random numbers; all comes back as it was.

        Args:
            *others: functions that run with it, such as a loss.
            watch: whether writes to parameters are seen; not needed where copies of all of them stand in their places.
        """
        known, given = frozenset(self._kept.written), (self.inputs, self.kwargs)
        with aside(self.module, self.model, *others, given=given, watch=watch, parameters=known) as safe:
            for generator, state in safe.random.own:
                set_state(generator, self._kept.generators.setdefault(id(generator), (generator, state))[1])
            seeded(self.seed)
            yield safe
            if watch:
                self._kept.written |= safe.written

    def called(self) -> Any:
        """The output, of copies of what it is called with."""
        args, kwargs = map_tensors(
            [list(self.inputs), dict(self.kwargs)], lambda t: t.detach().clone().requires_grad_(t.requires_grad)
        )
        return self.model(*args, **kwargs)

    def failed(self, error: Exception, recording: Recording) -> TraceError:
        """The error that says where the model raised, and what it was given."""
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
            f"(inputs of shape {shapes or 'none'}{'; ' * bool(takes)}{takes}){self._advice(error)}"
        )

    def _advice(self, error: Exception) -> str:
        """What to do about arguments that are missing, where that is what failed."""
        missing = re.search(r"missing \d+ required .*argument", str(error))
        if not (isinstance(error, TypeError) and missing):
            return ""
        if len(self.inputs) == 1 and isinstance(self.inputs[0], Mapping):
            return "; a batch that is a dict goes by name: kwargs=batch, which calls model(**batch)"
        names = re.findall(r"'(\w+)'", str(error)[missing.end() :])
        given = ", ".join(f"{name!r}: ..." for name in names)
        return f"; give all that the model is called with, one after the other or as kwargs={{{given}}}"


def what_it_takes(module: nn.Module) -> str:
    """What a layer of torch accepts, in words; empty where it does not say.

    Example:
        >>> what_it_takes(nn.Linear(4, 2))
        'it takes (..., 4) of float32'
    """
    if isinstance(module, nn.Embedding):
        return f"it takes integers from 0 to {module.num_embeddings - 1}, such as token ids"
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
