"""Norms of one training step, collected on the device by hooks that keep no tensor alive."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from stabkit.monitor.watching import watch
from stabkit.tracing.recording.containers import named_tensors

_HALF = (torch.float16, torch.bfloat16)

Failed = Callable[[Exception], None]


def norm(tensor: Tensor, wide: bool = False) -> Tensor:
    """Euclidean norm as a 0-dimensional tensor on the device; half precision is summed in float32.

    Squares of numbers beyond 1e19 are infinite in float32. On a CPU a norm that is infinite is taken again in double
    precision, and so it is at once where it is ``wide``.
    """
    if tensor.requires_grad:
        tensor = tensor.detach()
    if wide:
        doubled: Tensor = vector_norm(
            torch.view_as_real(tensor) if tensor.is_complex() else tensor, dtype=torch.float64
        )
        return doubled
    found: Tensor = vector_norm(tensor, dtype=torch.float32) if tensor.dtype in _HALF else vector_norm(tensor)
    if tensor.device.type == "cpu" and found.dtype == torch.float32 and found.item() == math.inf:
        return norm(tensor, wide=True)
    return found


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor of real or complex numbers in a module's output."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() or output.is_complex() else None
    found = (tensor for _, tensor in named_tensors(output, 3))
    return next((tensor for tensor in found if tensor.is_floating_point() or tensor.is_complex()), None)


def in_backward() -> bool:
    """Whether the engine is running: a forward call now is the recomputation of a checkpointed one."""
    return bool(torch._C._current_graph_task_id() != -1)


def active_autocast(*devices: str) -> dict[str, str]:
    """Dtype by device type, for those of ``devices`` and the CPU where autocast is on.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     active_autocast("cpu")
        {'cpu': 'bfloat16'}
    """
    on = [device for device in dict.fromkeys(("cpu", *devices)) if torch.is_autocast_enabled(device)]
    return {device: str(torch.get_autocast_dtype(device)).removeprefix("torch.") for device in on}


class StepNorms:
    """Output and output-gradient norms of the blocks, from the first forward call to the end of the backward pass.

    Norms of several calls of one block (micro-batches, shared weights) are kept apart until they are read.

    Attributes:
        order: indices of blocks as they were called.
        called: index of the block of each output.
        outputs: norms of the outputs.
        entries: how many numbers each output has.
        reached: index of the block of each output gradient.
        gradients: their norms.
        autocast: dtype by device type where autocast was on at the first call.
        handed: the first block whose output is not finite, where what it was given is not either; -2 where it is, and
            -1 where that is not known: on a device it would have to be waited for.
    """

    def __init__(self, failed: Failed, wide: bool = False) -> None:
        self.order: list[int] = []
        self.called: list[int] = []
        self.outputs: list[Tensor] = []
        self.entries: list[int] = []
        self.reached: list[int] = []
        self.gradients: list[Tensor] = []
        self.autocast: dict[str, str] | None = None
        self.handed = -1
        self._failed, self._wide = failed, wide
        self._hooked: set[int] = set()

    def see(self, index: int, given: Any, output: Any, training: bool) -> None:
        """Take note of a block's output and ask for its gradient."""
        recomputed = in_backward()
        recording = torch.is_grad_enabled()
        if not recomputed and (recording or training):
            self.order.append(index)
        # without a graph it is an evaluation, or the first run of a reentrant checkpoint: that one comes again, with
        # a graph, during the backward pass. Other checkpoints come again as well but have been seen by then.
        if not recording or (recomputed and index in self._hooked):
            return
        tensor = output if type(output) is Tensor else first_tensor(output)
        if tensor is None or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return
        if self.autocast is None:
            self.autocast = active_autocast(tensor.device.type)
        self.called.append(index)
        size = norm(tensor, self._wide)
        self.outputs.append(size)
        if self.handed == -1 and size.device.type == "cpu" and not math.isfinite(size.item()):
            entered = first_tensor(given)
            self.handed = -2 if entered is None or math.isfinite(norm(entered).item()) else index
        self.entries.append(tensor.numel())
        if tensor.requires_grad:
            if not recomputed:
                self._hooked.add(index)
            node = tensor.grad_fn
            if node is None:  # a leaf handed through
                tensor.register_hook(self._taker(index, None))  # type: ignore[no-untyped-call]
            else:
                # half the price of Tensor.register_hook, and bound to the tensor as it is now: an operation in place
                # that comes later has a node of its own
                node.register_prehook(self._taker(index, tensor.output_nr))

    def _taker(self, index: int, number: int | None) -> Callable[[Any], None]:
        reached, gradients, wide = self.reached, self.gradients, self._wide

        def take(arrived: Any) -> None:
            try:
                gradient = arrived if number is None else arrived[number]
                if gradient is not None:
                    gradients.append(norm(gradient, wide))
                    reached.append(index)
            except Exception as error:  # an error here would end the backward pass
                self._failed(error)

        return take


class Hooks:
    """Forward hooks on the blocks, on only during steps that are recorded.

    Full backward hooks are not used: they fail on outputs that a later operation changes in place.

    Args:
        blocks: modules by the index of their block.
        failed: told of an error inside a hook.
    """

    def __init__(self, blocks: Mapping[int, nn.Module], failed: Failed) -> None:
        self._modules = [(module, self._hook(index)) for index, module in blocks.items()]
        self._failed = failed
        self._undo: list[Callable[[], None]] = []
        self.measurement: StepNorms | None = None

    def on(self, wide: bool = False) -> StepNorms:
        """Start a new measurement; ``wide`` takes norms in double precision, for numbers beyond 1e19."""
        self.measurement = measurement = StepNorms(self._failed, wide)
        if not self._undo:
            for module, see in self._modules:
                self._undo.append(watch(module, see))
        return measurement

    def drop(self) -> None:
        """Place no hooks any more: they are compiled away, or the modules are not called."""
        self.off()
        self._modules.clear()

    def off(self) -> None:
        """Remove every hook."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self.measurement = None

    def _hook(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def see(module: nn.Module, given: Any, output: Any) -> None:
            measurement = self.measurement
            if measurement is not None:
                try:
                    measurement.see(index, given, output, module.training)
                except Exception as error:
                    self._failed(error)

        return see
