"""What goes into the softmaxes of a training step: attention logits of every block, and the logits of the loss."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.overrides
from torch import Tensor, nn
from torch.autograd.graph import Node

from stabkit.diagnosis.losses.ranges import through_moves
from stabkit.monitor.blocks import is_compiled
from stabkit.monitor.logit_weights import makers
from stabkit.monitor.measurement import Failed, in_backward
from stabkit.monitor.record import Array
from stabkit.monitor.watching import Hook, watch
from stabkit.tracing.graph.values import operation
from stabkit.tracing.products.node_derivatives import signed
from stabkit.tracing.recording.attentions import ATTENTIONS, of_attention, of_scores
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.function_calls import FunctionCalls, name_of
from stabkit.tracing.recording.training_pass import nodes_from

_MOST = 8  # attentions of one block that are looked at: one may be written as a loop over its heads
_ROWS = 64  # of the logits of a loss
_MAKERS = 2  # parameters: a weight and a bias
_OWN = slice(5, 7)  # of the arguments of nn.MultiheadAttention: what it projects queries and keys by
_EMPTY, _AGAIN = 3, 10  # looks in a row without a softmax in the model, after which only one of so many asks every call
_DEEP, _OUTPUTS = 3, 4  # levels of containers in which outputs are looked for, and how many are kept
_TAG = "stabkit.logits"


class Measured:
    """Numbers of one step, still on their device.

    Attributes:
        blocks: the block of each attention.
        attentions: its largest logit, its entropy and its share of flat rows; ``(3,)`` each.
        logits: those of the loss: the largest modulus, and the mean of the log of the normaliser; ``(2,)``.
        weights: the parameters that each of these was made of last.
    """

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.attentions: list[Tensor] = []
        self.weights: list[list[Tensor]] = []
        self.logits: Tensor | None = None
        self.resolution = math.nan  # of numbers of their dtype

    @property
    def on_host(self) -> bool:
        """Whether reading waits for no device."""
        some = self.attentions[0] if self.attentions else self.logits
        return some is None or some.device.type == "cpu"

    def read(self, count: int) -> tuple[Array, Array]:
        """The numbers on the host: of blocks ``(3, count)``, and of the loss ``(2,)``; NaN where nothing was seen."""
        of_blocks, of_loss = np.full((3, count), math.nan), np.full(2, math.nan)
        if self.attentions:
            values = torch.stack(self.attentions).double().cpu().numpy()
            with np.errstate(invalid="ignore"):
                for block in set(self.blocks):
                    mine = values[[each == block for each in self.blocks]]
                    known = mine[~np.isnan(mine).all(1)]
                    if len(known):
                        of_blocks[:, block] = known[:, 0].max(), known[:, 1].min(), known[:, 2].max()
        if self.logits is not None:
            of_loss[:] = self.logits.double().cpu().numpy()
        return of_blocks, of_loss


class SoftmaxWatch:
    """Looks at the first call of the model in a training step, and changes nothing.

    Attention is seen where it is ``scaled_dot_product_attention``, ``nn.MultiheadAttention``, or a softmax whose result
    is multiplied with values as a matrix; not in regions that are compiled, nor in kernels of other libraries. Logits
    are those of ``cross_entropy`` or ``log_softmax`` in the model, or an output of the model that comes to one of these
    in the loss.

    Args:
        model: as it is called.
        blocks: the modules of the blocks by their index.
        failed: told of an error.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[int, nn.Module], failed: Failed) -> None:
        self._model, self._failed = model, failed
        self._blocks = blocks
        self._plain = not any(map(is_compiled, model.modules()))
        self._empty = 0  # looks in a row in which no softmax was called in the model
        self._undo: list[Callable[[], None]] = []
        self._mode: _Softmaxes | None = None
        self._found: Measured | None = None
        self._outputs: list[_Output] = []

    def on(self) -> None:
        """Look at the coming call."""
        self._found, self._outputs = None, []
        if self._undo or isinstance(self._model, torch.jit.ScriptModule):  # one that was scripted takes no hooks
            return
        if self._asks:
            self._undo += [watch(block, None, self._entered(index)) for index, block in self._blocks.items()]
        self._undo.append(self._model.register_forward_pre_hook(Hook(self._before), with_kwargs=True).remove)
        self._undo.append(self._model.register_forward_hook(Hook(self._after), always_call=True).remove)

    @property
    def _asks(self) -> bool:
        """Whether every call of the coming look is asked whether it is a softmax, which makes a step a third longer."""
        return self._plain and (self._empty < _EMPTY or self._empty % _AGAIN == 0)

    def off(self) -> None:
        """No hook stays behind."""
        self._leave()
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._found, self._outputs = None, []

    def take(self, loss: Any) -> Measured | None:
        """What was seen since `on`; None where the model was not called.

        Args:
            loss: as it was differentiated.
        """
        found, outputs = self._found, self._outputs
        self._found, self._outputs = None, []
        if found is not None and found.logits is None and isinstance(loss, Tensor) and loss.grad_fn is not None:
            self._of_loss(found, outputs, loss.grad_fn)
        return found

    def _entered(self, index: int) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            if self._mode is not None:
                self._mode.block = index

        return enter

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._found is not None or self._mode is not None or not torch.is_grad_enabled() or in_backward():
            return
        self._found = Measured()
        if self._asks:
            self._mode = _Softmaxes(self._found, self._failed)
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        whole = self._mode is not None or not self._asks
        self._leave()
        if not whole or self._found is None or self._outputs:
            return
        self._empty = 0 if self._found.attentions or self._found.logits is not None else self._empty + 1
        if self._found.logits is not None:
            return
        try:
            floats = [t for _, t in named_tensors({"": output}, _DEEP) if t.is_floating_point()]
            self._outputs = [_Output(t) for t in floats if t.grad_fn is not None and t.dim() > 1][:_OUTPUTS]
        except Exception as error:
            self._failed(error)

    def _leave(self) -> None:
        """Take the mode off, which hooks of others may have put some on top of."""
        mode, self._mode = self._mode, None
        if mode is None:
            return
        modes: Any = torch.overrides
        above = []
        while (top := modes._get_current_function_mode()) is not None and top is not mode:
            above.append(modes._pop_mode())
        if top is mode:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for each in reversed(above):
            modes._push_mode(each)

    def _of_loss(self, found: Measured, outputs: list[_Output], made: Node) -> None:
        known = {output.tag: output for output in outputs}
        node: Any
        behind: Any
        for node in nodes_from(made) if known else ():
            if operation(node) != "LogSoftmax":
                continue
            for moves, behind in enumerate(through_moves(node.next_functions[0][0])):
                output = known.get(behind.metadata.get(_TAG))
                if output is not None:
                    found.logits = output.statistics(None if moves else signed([node._saved_dim])[0])
                    found.resolution = output.resolution
                    found.weights.append(output.weights)
                    return


class _Output:
    """Some rows of an output of the model, which may be logits.

    The node that made it carries a tag, and is not held on to: what a graph keeps would be kept with it.
    """

    def __init__(self, output: Tensor) -> None:
        self.tag = object()
        made: Any = output.grad_fn
        made.metadata[_TAG] = self.tag
        self.weights = makers(output, _MAKERS)
        self.resolution = torch.finfo(output.dtype).eps
        self._dims = output.dim()
        self._rows = {dim: _some_rows(output.detach(), dim) for dim in {1, self._dims - 1}}
        self._usual = 1 if self._dims > 3 else self._dims - 1

    def statistics(self, dim: int | None) -> Tensor:
        """Of rows along an axis, or along the one that is usual."""
        usual = self._rows[self._usual]
        return _of_rows(usual if dim is None else self._rows.get(dim % self._dims, usual))


def _some_rows(logits: Tensor, dim: int) -> Tensor:
    rows = logits.movedim(dim, -1)
    rows = rows.reshape(-1, rows.shape[-1]) if rows.dim() != 2 else rows
    return rows[:: max(1, -(-len(rows) // _ROWS))].clone()


def _of_rows(rows: Tensor) -> Tensor:
    rows = rows.float()
    return torch.stack([rows.abs().amax(), rows.logsumexp(-1).mean()])


class _Softmaxes(FunctionCalls):
    """Sees every attention within it; see `SoftmaxWatch`."""

    def __init__(self, found: Measured, failed: Failed) -> None:
        super().__init__()
        self.block = 0
        self._found, self._failed = found, failed
        self._weights: dict[int, tuple[Any, Tensor]] = {}  # of softmaxes that were not multiplied with values yet
        self._of_loss = False

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if torch.compiler.is_compiling():
            return result
        see = _seer(func)
        if see is not None or self._weights:
            try:
                with torch.no_grad(), _in_full(args):
                    if see is not None:
                        see(self, func, args, kwargs, result)
                    else:
                        self._hand_on(args, result)
            except Exception as error:  # an error here would end the training
                self._failed(error)
        return result

    def attention(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """An attention of torch."""
        if self._has_room() and _is_plain(args[0]):
            self._keep(of_attention(func, args, kwargs))
            given = (kwargs.get("q_proj_weight"), kwargs.get("k_proj_weight"), *args[_OWN])
            own: list[Tensor] = [each for each in given if isinstance(each, nn.Parameter)]
            self._found.weights += [own[:_MAKERS]] if own else [makers(each, _MAKERS) for each in args[:2]]

    def softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """A softmax, which may be one over keys."""
        scores: Any = args[0] if args else kwargs.get("input")
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not (_is_plain(scores) and scores.dim() > 1 and isinstance(dim, int) and self._has_room()):
            return
        statistics = of_scores(scores.detach().movedim(dim, -1))
        self._weights[id(result)] = (weakref.ref(result), statistics)
        self._found.weights.append(makers(scores, 2 * _MAKERS))

    def product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """A product of matrices, of which one may be weights of values."""
        for each in args:
            for tensor in each if isinstance(each, list | tuple) else (each,):
                self._keep(self._weight_of(tensor, pop=True))

    def cross_entropy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """A loss, of which the first counts."""
        logits: Any = args[0] if args else kwargs.get("input")
        if not self._of_loss and _is_plain(logits) and logits.dim() > 0:
            self._of_loss = True
            self._logits(logits, 1 if logits.dim() > 1 else 0)

    def log_softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """The logarithm of a softmax, of which the last counts where there is no loss."""
        logits: Any = args[0] if args else kwargs.get("input")
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not self._of_loss and _is_plain(logits) and isinstance(dim, int):
            self._logits(logits, dim)

    def _logits(self, logits: Tensor, dim: int) -> None:
        self._found.logits = _of_rows(_some_rows(logits.detach(), dim))
        self._found.weights.append(makers(logits, _MAKERS))
        self._found.resolution = torch.finfo(logits.dtype).eps

    def _hand_on(self, args: tuple[Any, ...], result: Any) -> None:
        """What drops, casts or reshapes weights leaves them weights."""
        if not args or not isinstance(result, Tensor):
            return
        weights = self._weight_of(args[0], pop=False)
        if weights is not None and result.numel() == args[0].numel():
            self._weights[id(result)] = (weakref.ref(result), weights)

    def _weight_of(self, tensor: Any, *, pop: bool) -> Tensor | None:
        entry = self._weights.get(id(tensor))
        if entry is None or entry[0]() is not tensor:
            return None
        if pop:  # under all names that it has had
            self._weights = {key: other for key, other in self._weights.items() if other[1] is not entry[1]}
        return entry[1]

    def _has_room(self) -> bool:
        return self._found.blocks.count(self.block) < _MOST

    def _keep(self, statistics: Tensor | None) -> None:
        if statistics is not None:
            self._found.blocks.append(self.block)
            self._found.attentions.append(statistics)


_SEERS: dict[str, Any] = {
    "softmax": _Softmaxes.softmax,
    "cross_entropy": _Softmaxes.cross_entropy,
    "log_softmax": _Softmaxes.log_softmax,
    **dict.fromkeys(("matmul", "bmm", "baddbmm", "einsum"), _Softmaxes.product),
    **{name_of(func): _Softmaxes.attention for func in ATTENTIONS},
}


@lru_cache(maxsize=4096)
def _seer(func: Any) -> Any:
    return _SEERS.get(name_of(func))


def _is_plain(tensor: Any) -> bool:
    """Whether something is a tensor of floats whose numbers can be looked at."""
    return (
        isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and not (tensor.is_nested or tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor))
        and not hasattr(tensor, "to_local")
        and tensor.numel() > 0
    )


def _in_full(args: tuple[Any, ...]) -> Any:
    """Without the half precision of autocast."""
    device = next((arg.device.type for arg in args if isinstance(arg, Tensor)), "cpu")
    return torch.autocast(device, enabled=False)
