"""Models whose parameters are spread over ranks by ``fully_shard``, put together for an analysis.

``DistributedDataParallel`` and tensor-parallel ``DTensor`` parameters need nothing of this: the first holds a whole
model, and the operations of the second are recorded like all others, with their collectives. ``fully_shard`` gathers
parameters in hooks that only run inside autograd's engine, one backward pass at a time; the steps of a flow are
differentiated one by one outside of it. So the parameters are gathered before, and the hooks kept out: for the forward
pass of one trace, in copies that its graph keeps, or for a whole analysis, in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stabkit.tracing.recording.containers import map_tensors


@contextlib.contextmanager
def whole_parameters(model: Any) -> Iterator[None]:
    """Inside the block, every rank has all parameters of the modules that ``fully_shard`` wrapped; a collective call.

    Inputs and outputs are cast as the mixed-precision policy says. Afterwards the parameters are sharded again and the
    hooks are where they were. It takes memory for a whole model; nothing is done to other models.

    Args:
        model: the same one on all ranks.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with whole_parameters(model): model.weight.shape
        torch.Size([2, 2])
    """
    modules = _sharded_modules(model)
    if not modules:
        yield
        return
    for module in modules:
        module.unshard()
    undo: list[Callable[[], None]] = []
    try:
        for module in modules:
            undo.extend(_without_hooks(module))
        yield
    finally:
        for restore in reversed(undo):
            restore()
        for module in modules:
            module.reshard()


def take_whole(model: nn.Module) -> None:
    """Put whole copies in the place of parameters that ``fully_shard`` spread over the ranks; a collective call.

    To be undone by what keeps the model unchanged. The copies are what a recorded graph needs, and live as long as it.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> take_whole(model)  # nothing is spread
        >>> model.weight.shape
        torch.Size([2, 2])
    """
    modules = _sharded_modules(model)
    if not modules:
        return
    from torch.distributed.tensor import DTensor

    dtypes: dict[int, torch.dtype | None] = {}
    for module in modules:  # from the outside in: the innermost wrapper decides
        dtypes.update(dict.fromkeys(map(id, module.parameters()), module._get_fsdp_state()._mp_policy.param_dtype))
    copies: dict[int, nn.Parameter] = {}
    for part in model.modules():
        held: dict[str, Any] = part._parameters
        for name, parameter in held.items():
            if id(parameter) in dtypes and isinstance(parameter, DTensor):
                if id(parameter) not in copies:
                    whole = parameter.full_tensor().detach().to(dtypes[id(parameter)] or parameter.dtype)
                    copies[id(parameter)] = nn.Parameter(whole, requires_grad=False)
                held[name] = copies[id(parameter)]
    for module in modules:
        _without_hooks(module)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with its parts from all ranks, which must all ask for it; a plain tensor as it is.

    Example:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor, slot: Tensor | None) -> Tensor:
    """What of a whole tensor belongs to this rank, in the form of a parameter that is spread over ranks.

    Args:
        tensor: whole, and the same on all ranks.
        slot: the parameter; a plain one, or None, takes the tensor as it is.

    Example:
        >>> own_part(torch.ones(2), nn.Parameter(torch.zeros(2)))
        tensor([1., 1.])
    """
    if slot is None or type(slot) in (Tensor, nn.Parameter) or tensor.shape != slot.shape or tensor.is_meta:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(slot, DTensor):
        return tensor
    whole = tensor.to(slot.device_mesh.device_type)
    part: Any = distribute_tensor(whole, slot.device_mesh, slot.placements, src_data_rank=None)  # nothing is sent
    return DTensor.from_local(
        part.to_local().clone(), slot.device_mesh, slot.placements, shape=slot.shape, stride=slot.stride()
    )


def copy_own_part(new: Tensor, old: Tensor) -> bool:
    """Write the part of this rank into a parameter that is spread over ranks; False for a plain one, left alone.

    Example:
        >>> copy_own_part(torch.ones(2), torch.zeros(2))
        False
    """
    if type(old) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    if not (isinstance(old, DTensor) and isinstance(new, DTensor)):
        return False
    with torch.no_grad():
        old.to_local().copy_(new.to_local())
    return True


def is_tensor_parallel(model: Any) -> bool:
    """Whether some parameters are spread over ranks otherwise than by ``fully_shard``, so that products are collective.

    Example:
        >>> is_tensor_parallel(nn.Linear(2, 2))
        False
    """
    if not (isinstance(model, nn.Module) and dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    gathered = {id(p) for module in _sharded_modules(model) for p in module.parameters()}
    return any(isinstance(p, DTensor) and id(p) not in gathered for p in model.parameters())


def is_spread(model: Any) -> bool:
    """Whether some parameters are spread over ranks in any way, so that no rank can run the model alone.

    Example:
        >>> is_spread(nn.Linear(2, 2))
        False
    """
    return bool(_sharded_modules(model)) or is_tensor_parallel(model)


def _sharded_modules(model: Any) -> list[Any]:
    if not (isinstance(model, nn.Module) and dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _without_hooks(module: Any) -> list[Callable[[], None]]:
    """Take out the hooks of ``fully_shard``, put in those that cast; returns what undoes it."""
    state = module._get_fsdp_state()
    handles = [*_single(state._pre_forward_hook_handle), *_single(state._post_forward_hook_handle)]
    if not any(_in_place(handle) for handle in handles):
        return []  # they were taken out before
    undo = [_taken_out(handle) for handle in handles]
    policy = state._mp_policy
    if policy.param_dtype is not None and policy.cast_forward_inputs:

        def cast_inputs(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return _cast(args, policy.param_dtype), _cast(kwargs, policy.param_dtype)

        undo.append(module.register_forward_pre_hook(cast_inputs, prepend=True, with_kwargs=True).remove)
    if policy.output_dtype is not None:

        def cast_output(_: nn.Module, args: Any, output: Any) -> Any:
            return _cast(output, policy.output_dtype)

        undo.append(module.register_forward_hook(cast_output).remove)
    return undo


def _single(handle: Any) -> list[RemovableHandle]:
    """The handles inside one that may stand for several."""
    return list(getattr(handle, "handles", (handle,)))


def _in_place(handle: RemovableHandle) -> bool:
    hooks: Any = handle.hooks_dict_ref()
    return hooks is not None and handle.id in hooks


def _taken_out(handle: RemovableHandle) -> Callable[[], None]:
    hooks: Any = handle.hooks_dict_ref()
    if not _in_place(handle):
        return lambda: None
    before = list(hooks.items())
    del hooks[handle.id]

    def restore() -> None:
        hooks.clear()
        hooks.update(before)

    return restore


def _cast(container: Any, dtype: torch.dtype) -> Any:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return map_tensors(container, cast)
