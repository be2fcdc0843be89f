"""Which modules of a model are worth watching, and whose parameters are whose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_STORES = (nn.ParameterList, nn.ParameterDict)  # are never called
_FEW = 3  # so many like leaves in one container make it a stack of layers rather than one block


def choose_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model by their path: repeated modules in a container, or layers with parameters.

    A module is opened when it is a container, or the only one of its class and full of repeated blocks; otherwise it is
    a block. What was wrapped (``DistributedDataParallel``, ``torch.compile``) is looked through by the caller.

    Example:
        >>> layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
        >>> list(choose_blocks(layers))
        ['0', '2']
    """
    classes = Counter(type(module) for module in model.modules())
    found = dict(_blocks(model, "", classes, root=True))
    return found or {"": model}


def _blocks(
    module: nn.Module, path: str, classes: Counter[type], *, root: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    children = list(module.named_children())
    if is_compiled(module) and not root:
        yield path, module
        return
    if isinstance(module, _STORES):
        return
    if not children:
        if any(True for _ in module.parameters(recurse=False)):
            yield path, module
        return
    if not (root or isinstance(module, _CONTAINERS) or _is_shell(module, classes)):
        if any(True for _ in module.parameters()):
            yield path, module
        return
    for name, child in children:
        yield from _blocks(child, f"{path}.{name}" if path else name, classes)


def _is_shell(module: nn.Module, classes: Counter[type]) -> bool:
    """Whether a module only holds a stack of blocks: the one of its class, with repeated modules inside."""
    if classes[type(module)] > 1:
        return False
    inside = [m for m in module.modules() if m is not module]
    repeated = Counter(type(m) for m in inside if any(True for _ in m.children()) and not isinstance(m, _CONTAINERS))
    if any(count > 1 for count in repeated.values()):
        return True
    stacks = [m for m in inside if isinstance(m, _CONTAINERS)]
    return any(max(Counter(type(c) for c in s.children()).values(), default=0) >= _FEW for s in stacks)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module runs as one compiled region, by ``torch.compile(module)`` or ``module.compile()``."""
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or isinstance(getattr(module, "_orig_mod", None), nn.Module)


def visible(model: nn.Module, blocks: Iterable[nn.Module]) -> dict[int, nn.Module]:
    """Those blocks by their index whose hooks will run: the ones not inside of a larger compiled region.

    Args:
        model: the model as it is called, with its wrappers.
        blocks: the blocks.
    """
    seen: set[int] = set()
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) not in seen:
            seen.add(id(module))
            stack += [] if is_compiled(module) else module.children()
    return {index: block for index, block in enumerate(blocks) if id(block) in seen}


def owner(parameter_name: str, blocks: Sequence[str]) -> int:
    """Index of the block that a parameter belongs to, by the longest path that it starts with; -1 when none.

    Example:
        >>> owner("layer1.0.conv.weight", ["layer1.0", "layer1.1", ""])
        0
    """
    best, length = -1, -1
    for index, path in enumerate(blocks):
        inside = path == "" or parameter_name == path or parameter_name.startswith(path + ".")
        if inside and len(path) > length:
            best, length = index, len(path)
    return best
