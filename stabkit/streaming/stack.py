"""The stack of blocks of a transformer-like model, run forward with the weights of one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.errors import TraceError
from stabkit.streaming.result_cache import Store, key_of
from stabkit.streaming.weights import StreamedWeights
from stabkit.tracing.recording.randomness import seeded

Progress = Callable[[int, int, str], None]


class _Enough(BaseException):
    """The last block is done; not an ``Exception``, so that a model's own handlers let it pass."""


@dataclass
class Block:
    """One block of the stack, with what it is called with beside the state.

    Attributes:
        index: place in the stack.
        name: path of the module.
        module: itself.
        args: positional arguments after the state; held fixed.
        kwargs: keyword arguments; held fixed.
        key: the key of the state before it.
        following: the key of the state after it.
    """

    index: int
    name: str
    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    key: str = ""
    following: str = ""

    def step(self) -> Callable[[Tensor], Tensor]:
        """The map from the state before the block to the state after it."""
        module, args, kwargs = self.module, self.args, dict(self.kwargs or {})

        def run(state: Tensor) -> Tensor:
            return _state_of(module(state, *args, **kwargs), self.name)

        return run


def stack_of(model: nn.Module) -> list[Block]:
    """The longest list of modules of one class, which is where the depth of a transformer is.

    Raises:
        TraceError: there is none of at least two.
    """
    lists = [
        (path, list(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 1
        and len({type(child) for child in module}) == 1
    ]
    if not lists:
        raise TraceError(
            f"{type(model).__name__} has no list of like blocks to walk along: load it whole and call stabkit.analyze"
        )
    path, blocks = max(lists, key=lambda found: (len(found[1]), -len(found[0])))
    return [Block(i, f"{path}.{i}" if path else str(i), module) for i, module in enumerate(blocks)]


def run_forward(
    model: nn.Module,
    blocks: Sequence[Block],
    weights: StreamedWeights,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    store: Store,
    made: str,
    progress: Progress | None = None,
) -> None:
    """Run the model's own forward pass up to the last block, and keep the state before and after every block.

    Modules outside the stack have their weights while they run. A block whose result is in the store is not run.
    ``made`` is a key of the model without its weights.

    Raises:
        TraceError: the blocks do not follow one another: something other than the state leads from one to the next.
    """
    inside = {id(part) for block in blocks for part in block.module.modules()}
    outside = [m for m in model.modules() if id(m) not in inside and any(p is not None for p in m._parameters.values())]
    last: dict[str, Any] = {"state": None, "done": 0}

    def run(block: Block, original: Callable[..., Any], state: Tensor, *args: Any, **named: Any) -> Any:
        _check_order(block, state, last, len(blocks))
        if block.index == 0:
            block.key = key_of("state", 0, state, made)
            store.put(block.key, {"state": state})
        else:
            block.key = last["key"]
        block.args, block.kwargs = args, named
        with weights.present(block.module.modules()) as digest:
            ran = block.key, digest, args, named, weights.dtype, weights.device
            block.following = key_of("state", block.index + 1, *ran)
            known = store.get(block.following)
            if known is None:
                seeded(block.index)  # what it draws is the same whether or not those before it run
                result = _state_of(original(state, *args, **named), block.name)
                store.put(block.following, {"state": result})
            else:
                store.found += 1
                result = known["state"].to(weights.device)
        last.update(state=result, done=block.index + 1, key=block.following)
        if progress is not None:
            progress(block.index + 1, 2 * len(blocks), block.name)
        if block.index == len(blocks) - 1:
            raise _Enough
        return result

    undo = [_with_weights(module, weights) for module in outside]
    undo.extend(_replaced(block.module, _bound(run, block)) for block in blocks)
    try:
        with torch.no_grad():
            model(*inputs, **kwargs)
    except _Enough:
        return
    finally:
        for restore in reversed(undo):
            restore()
    raise TraceError(f"the forward pass ran {last['done']} of {len(blocks)} blocks; expected all of them, once each")


def _bound(run: Callable[..., Any], block: Block) -> Callable[..., Any]:
    original = block.module.forward
    return lambda *args, **kwargs: run(block, original, *args, **kwargs)


def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    module.forward = forward
    return lambda: vars(module).pop("forward", None)


def _with_weights(module: nn.Module, weights: StreamedWeights) -> Callable[[], None]:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with weights.present([module]):
            return original(*args, **kwargs)

    return _replaced(module, forward)


def _check_order(block: Block, state: Any, last: Mapping[str, Any], count: int) -> None:
    if not isinstance(state, Tensor):
        raise TraceError(f"block {block.name} takes a {type(state).__name__} first; expected the state, one tensor")
    if block.index != last["done"]:
        raise TraceError(f"block {block.name} runs as number {last['done']} of {count}; blocks must run in order, once")
    before = last["state"]
    if before is not None and not (before is state or torch.equal(before, state)):
        raise TraceError(
            f"block {block.name} does not begin with what the block before it returned: something between them changes "
            "the state, so they are no chain. Load the model whole and call stabkit.analyze"
        )


def _state_of(result: Any, name: str) -> Tensor:
    if isinstance(result, tuple) and len(result) == 1:
        result = result[0]
    if isinstance(result, Tensor):
        return result
    raise TraceError(f"block {name} returned a {type(result).__name__}; expected one tensor, the next state")
