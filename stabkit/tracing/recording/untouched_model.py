"""Whatever is run here, the user's things come back bit for bit as they were: the one mechanism that sees to it.

Three means, by what they cost. What is Python (attributes, containers, closures, counters) and the states of random
generators are noted by reference before, and compared after: some milliseconds for a large model. Tensors that are no
parameters (buffers, caches, statistics) are small: while a model runs, copies stand in their places, and the originals
are not touched. Parameters and gradients are as large as the model: they are copied at the moment when an operation is
about to write to their memory, or when that memory is handed out of torch, which is seen while a model runs.
"""

from __future__ import annotations

import contextlib
import types
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from stabkit.errors import TraceError
from stabkit.tracing.recording.places import Place
from stabkit.tracing.recording.randomness import RandomStates
from stabkit.tracing.recording.reachable import Reached
from stabkit.tracing.recording.stand_ins import put_stand_ins
from stabkit.tracing.recording.written import parts_of, version_of, watched
from stabkit.turns import turn, undone

_LARGE = 2**26  # bytes of a tensor that is no buffer, from which a copy of it is made only if it is written to
_BACK = ("_backward_hooks", "_backward_pre_hooks")


class Safe:
    """What may be changed about a model and what it is called with, and how to put it back.

    Args:
        roots: the model, and functions that run with it.
        given: what it is called with.

    Raises:
        TraceError: parameters have no shape yet.
    """

    def __init__(self, roots: tuple[Any, ...], given: Any = ()) -> None:
        self.reached = _reached(roots, given)
        self.random = RandomStates(self.reached.generators.values())
        self._by_storage: dict[int, list[Tensor]] = {}
        self._written: dict[int, tuple[Tensor, Tensor]] = {}
        self._guarded: list[_Guarded] = []
        refuse_lazy(self.reached.modules)
        tensors = dict(self.reached.tensors)
        for module in self.reached.modules:  # the parameters of TorchScript are in no dictionary
            if isinstance(module, torch.jit.ScriptModule):
                tensors.update((id(t), t) for t in (*module.parameters(False), *module.buffers(False)))
        for tensor in list(tensors.values()):
            guarded = _Guarded(tensor)
            self._guarded.append(guarded)
            if guarded.grad is not None and id(guarded.grad) not in tensors:
                tensors[id(guarded.grad)] = guarded.grad
                self._guarded.append(_Guarded(guarded.grad))
        for tensor in tensors.values():
            if tensor.layout == torch.strided:
                self._by_storage.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
            elif not tensor.is_meta:
                self._written[id(tensor)] = (tensor, tensor.detach().clone())
        self._copies: _Copies | None = None
        self._accumulates = self._elsewhere = False
        self._undo_hooks: list[tuple[dict[Any, Any], dict[Any, Any]]] = []

    @property
    def written(self) -> frozenset[int]:
        """The ids of the parameters whose memory was written, or handed out."""
        return frozenset(i for i, (t, _) in self._written.items() if isinstance(t, nn.Parameter))

    @property
    def wrote(self) -> bool:
        """Whether memory for which no copy stands was written, or handed out."""
        return bool(self._written)

    def set_aside(self, parameters: frozenset[int] = frozenset()) -> None:
        """Prepare for a model to run: copies stand for what it may write to, and no hook of the way back runs.

        Args:
            parameters: ids of parameters for which copies are to stand as well.
        """
        copies = self._copies = _Copies(self.reached, parameters)
        for place in self.reached.with_tensors:
            for key, value in list(place.items(place.contents)):
                if isinstance(value, Tensor) and (copy := copies.of(value, place)) is not value:
                    place.put(place.holder, key, copy)
        for scripted, held in self.reached.scripted:
            for name, value in held.items():
                if isinstance(value, Tensor) and not value.requires_grad:
                    scripted.setattr(name, value.detach().clone())
        put_stand_ins(self.reached)
        for module in self.reached.modules:
            for name in _BACK:
                if vars(module).get(name):
                    vars(module)[name] = OrderedDict()
        for guarded in self._guarded:
            guarded.without_hooks()
        for hooks in (global_hooks._global_backward_hooks, global_hooks._global_backward_pre_hooks):
            if hooks:
                self._undo_hooks.append((hooks, dict(hooks)))
                hooks.clear()

    def freeze(self, but: Collection[int] = ()) -> None:
        """Let no parameter require grad, but some by identity: the graph holds only what depends on the input."""
        stand_ins = {} if self._copies is None else self._copies.made
        for key, tensor in (*((id(guarded.tensor), guarded.tensor) for guarded in self._guarded), *stand_ins.items()):
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad and key not in but:
                tensor.requires_grad_(False)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, what operations write to is copied before."""
        if not self._by_storage:
            yield
            return
        with watched(self.before_write, self.before_gradients):
            yield

    def before_write(self, tensor: Tensor) -> None:
        """Copy what lies on the memory of a tensor that is about to be written."""
        if tensor.layout == torch.strided and self._by_storage:
            for other in self._by_storage.pop(tensor.untyped_storage()._cdata, ()):
                if not other.is_meta:
                    self._written[id(other)] = (other, other.detach().clone())

    def before_gradients(self) -> None:
        """The model itself puts gradients into ``.grad``."""
        self._accumulates = True

    def refuse_other_threads(self) -> None:
        """A model that was trained meanwhile gives numbers of no model at all.

        Raises:
            TraceError: parameters were written by operations that were not run here.
        """
        self._elsewhere = any(
            (guarded.moved and id(guarded.tensor) not in self._written)
            or (not self._accumulates and guarded.has_other_gradient)
            for guarded in self._guarded
            if isinstance(guarded.tensor, nn.Parameter)
        )
        if self._elsewhere:
            raise TraceError(
                "the model was trained by another thread while it ran here: its numbers would be those of no model "
                "at all. Stop the training meanwhile, or give a copy: copy.deepcopy(model)"
            )

    def restore(self) -> None:
        """Put everything back; may be called twice, and after an exception."""
        self.reached.restore()
        for hooks, before in self._undo_hooks:
            hooks.clear()
            hooks.update(before)
        for guarded in self._guarded:
            guarded.restore(gradient=not self._elsewhere)
        for tensor, saved in self._written.values():
            if not _same_bits(tensor, saved):
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(saved)
        for guarded in self._guarded:
            if id(guarded.tensor) in self._written:
                guarded.restore_version()
        self.random.restore()


@dataclass
class _Walks:
    """What was reached from a model and what it was called with, first and last.

    Only of the model that came first: copies of it, which remedies are tried on, are not to outlive their trial. What
    it was called with is held, so that nothing else takes its ids.
    """

    found: dict[Any, tuple[Any, list[Reached]]] = field(default_factory=dict)
    first: Any = None
    over: bool = False


_walks: ContextVar[_Walks | None] = ContextVar("walks", default=None)
_FEW = 4  # sets of arguments


@contextlib.contextmanager
def walked_once() -> Iterator[None]:
    """Inside, what can be reached from the same roots is walked once, and compared with what it was after that.

    Example:
        >>> with walked_once(), unchanged(nn.Linear(2, 2)) as safe:
        ...     len(safe.reached.modules)
        1
    """
    if _known() is not None:
        yield
        return
    walks = _Walks()
    _walks.set(walks)
    try:
        yield
    finally:  # a generator may be thrown away in another thread, where nothing was set
        walks.over, walks.first = True, None
        walks.found.clear()


def _known() -> _Walks | None:
    walks = _walks.get()
    return None if walks is None or walks.over else walks


def _reached(roots: tuple[Any, ...], given: Any) -> Reached:
    """Everything that hangs on some roots."""
    walks = _known()
    if walks is not None and walks.first is None and isinstance(roots[0], nn.Module):
        walks.first = roots[0]
    if walks is None or walks.first is not roots[0]:
        return Reached(roots, given)
    _, known = walks.found.setdefault(_ids(given), (given, []))
    found = next((same for each in known if (same := each.again()) is not None), None)
    if found is None:
        found = Reached(roots[:1], given)
        known[1:] = [found]  # the first is that of the model as it is outside of all trials, to which it comes back
    while len(walks.found) > _FEW:
        del walks.found[next(iter(walks.found))]
    return found.further(roots[1:])  # losses are often made anew


def _ids(item: Any) -> Any:
    """What tells things apart that hang on others: tuples and methods are made anew for every call."""
    if type(item) is tuple:
        return tuple(map(_ids, item))
    if isinstance(item, types.MethodType):
        return id(item.__self__), id(item.__func__)
    return id(item)


class _Guarded:
    """A tensor, and all about it but the numbers that it holds."""

    __slots__ = ("_alias", "_hooks", "_later", "_leaf", "_needs", "_version", "grad", "tensor")

    def __init__(self, tensor: Any) -> None:
        self.tensor: Any = tensor
        self._leaf = tensor.is_leaf
        self._needs = tensor.requires_grad
        self.grad = tensor.grad if self._leaf else None
        self._hooks = tensor._backward_hooks if self._leaf else None
        self._later = getattr(tensor, "_post_accumulate_grad_hooks", None) if self._leaf else None
        self._version = version_of(tensor)
        # shares its memory, and keeps it where the tensor is given another
        plain = (
            type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
            and tensor.layout == torch.strided
            and not (tensor.is_meta or tensor.is_nested)
        )
        self._alias = tensor.detach() if plain else None

    @property
    def moved(self) -> bool:
        """Whether something was written to it."""
        return self._version is not None and self.tensor._version != self._version

    def without_hooks(self) -> None:
        """Let no hook of the user run."""
        if self._hooks:
            self.tensor._backward_hooks = None
        if self._later:
            self.tensor._post_accumulate_grad_hooks = None

    @property
    def has_other_gradient(self) -> bool:
        """Whether another gradient was put into it."""
        return self._leaf and self.tensor.grad is not self.grad

    def restore(self, *, gradient: bool) -> None:
        """Make it what it was; with ``gradient`` that as well."""
        tensor = self.tensor
        if self._alias is not None and not tensor.is_set_to(self._alias):
            tensor.data = self._alias
        if not self._leaf:
            return
        if tensor.grad_fn is not None:
            _off_the_graph(tensor)
        if tensor.requires_grad != self._needs:
            with torch.inference_mode(tensor.is_inference()):
                tensor.requires_grad_(self._needs)
        if gradient and tensor.grad is not self.grad:
            tensor.grad = self.grad
        if tensor._backward_hooks is not self._hooks:
            tensor._backward_hooks = self._hooks
        if self._later is not None and tensor._post_accumulate_grad_hooks is not self._later:
            tensor._post_accumulate_grad_hooks = self._later

    def restore_version(self) -> None:
        """A graph of the user's that saved it is as good as before."""
        if self.moved and self._version is not None:
            torch._C._autograd._unsafe_set_version_counter((self.tensor,), (self._version,))


def _off_the_graph(tensor: Tensor) -> None:
    """A leaf that something on a graph was written into is a leaf again."""
    if tensor._is_view():
        raise TraceError(
            f"the model writes into a view of shape {tuple(tensor.shape)} that it holds in a tuple, which cannot be "
            "taken off the graph again: let it hold a tensor of its own (.clone()), in a list or an attribute"
        )
    tensor.detach_()


class _Copies:
    """Copies of the tensors that a model may write to; those that share memory share that of their copies."""

    def __init__(self, reached: Reached, parameters: frozenset[int]) -> None:
        self.made: dict[int, Tensor] = {}
        self._spared = reached.spared
        self._parameters = parameters
        self._buffers = {id(vars(m).get("_buffers")) for m in reached.modules}
        self._memory: dict[int, Any] = {}
        self._owners: dict[int, int] = {}
        self._fixed: set[int] = set()
        for tensor in reached.tensors.values():
            if tensor.layout == torch.strided:
                storage = tensor.untyped_storage()._cdata
                self._owners[storage] = self._owners.get(storage, 0) + 1
                if isinstance(tensor, nn.Parameter) and id(tensor) not in parameters and not tensor.is_inference():
                    self._fixed.add(storage)

    def of(self, tensor: Tensor, place: Place) -> Tensor:
        """What stands for a tensor that a place holds: a copy, or itself."""
        if id(tensor) in self.made:
            return self.made[id(tensor)]
        if id(tensor) in self._spared:
            return tensor
        if isinstance(tensor, nn.Parameter):
            if not (tensor.is_inference() or id(tensor) in self._parameters):
                return tensor
            with torch.inference_mode(False):
                made: Tensor = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
        elif id(place.holder) not in self._buffers and (
            tensor.requires_grad or isinstance(place.holder, types.CellType) or tensor.nbytes > _LARGE
        ):
            return tensor
        else:
            found = self._copied(tensor)
            if found is None:
                return tensor
            made = found
        self.made[id(tensor)] = made
        return made

    def _copied(self, tensor: Tensor) -> Tensor | None:
        if tensor.layout != torch.strided:
            return tensor.detach().clone()
        storage = tensor.untyped_storage()._cdata
        if storage in self._fixed:
            return None  # a view of a parameter
        if self._owners[storage] == 1 or type(tensor) is not Tensor or tensor.is_quantized:
            return tensor.detach().clone()
        if storage not in self._memory:
            memory: Any = tensor.untyped_storage()
            self._memory[storage] = memory.clone()
        made: Any = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        copied: Tensor = made.set_(self._memory[storage], tensor.storage_offset(), tensor.size(), tensor.stride())
        return copied


#: under which a node of the model's own code knows what keeps the model as it is while it runs
WAY_BACK = "stabkit: way back"


class WhenCalled:
    """`aside` as often as wanted, entered once while it is nested in itself.

    Args:
        *roots: the model, and functions that run with it.
    """

    def __init__(self, *roots: Any) -> None:
        self._roots = roots
        self._depth = 0
        self._inside = contextlib.ExitStack()

    def __enter__(self) -> None:
        if self._depth == 0:
            self._inside.enter_context(aside(*self._roots))
        self._depth += 1

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._inside.close()


def refuse_lazy(modules: Iterable[nn.Module]) -> None:
    """A model whose parameters have no shape yet cannot be run without giving them one.

    Raises:
        TraceError: some have none.
    """
    for top in modules:
        held = (*vars(top).get("_parameters", {}).items(), *vars(top).get("_buffers", {}).items())
        names = [name for name, tensor in held if tensor is not None and nn.parameter.is_lazy(tensor)]
        if names:
            raise TraceError(
                f"the model has lazy modules ({type(top).__name__}) whose {', '.join(names)} have no shape yet; call "
                "it once on a batch, model(x), which gives them one"
            )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal without a write: a NaN equals itself here, or buffers that hold one would always count as changed."""
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    pairs = zip(parts_of(a), parts_of(b), strict=True)
    return all(x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all()) for x, y in pairs)


@contextlib.contextmanager
def unchanged(*roots: Any, given: Any = ()) -> Iterator[Safe]:
    """Run a block after which everything is as it was, also when the block raises; one thread at a time.

    A model that runs inside writes to its own things unless they are set aside: see `aside`.

    Args:
        *roots: the model, and functions that run with it.
        given: what it is called with.
    """
    with turn(), walked_once():
        safe = Safe(roots, given)
        with undone(safe.restore):
            yield safe


@contextlib.contextmanager
def aside(*roots: Any, given: Any = (), watch: bool = True, parameters: frozenset[int] = frozenset()) -> Iterator[Safe]:
    """Run a model in a block after which everything is as it was.

    Args:
        *roots: the model, and functions that run with it.
        given: what it is called with.
        watch: whether writes to parameters are seen; not needed where copies of all of them stand in their places.
        parameters: ids of parameters for which copies are to stand.

    Raises:
        TraceError: another thread trained the model meanwhile.
    """
    with unchanged(*roots, given=given) as safe:
        safe.set_aside(parameters)
        with safe.watching() if watch else contextlib.nullcontext():
            yield safe
        if watch:
            safe.refuse_other_threads()
