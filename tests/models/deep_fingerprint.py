"""All that hangs on a model, and the settings of the process, in a form that can be compared; no code under test."""

from __future__ import annotations

import functools
import gc
import itertools
import random
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from .fingerprint import bits

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, range)
_LINKS = ("grad", "_backward_hooks", "_post_accumulate_grad_hooks")


def everything(**held: Any) -> dict[str, Any]:
    """Path by path what is reachable: which object, what it holds, bit for bit."""
    found: dict[str, Any] = {}
    seen: dict[int, Any] = {}  # kept, so that ids stay theirs
    waiting: list[tuple[str, Any]] = list(held.items())
    while waiting:
        path, item = waiting.pop()
        if isinstance(item, _PLAIN):
            found[path] = repr(item)
            continue
        if id(item) in seen:
            found[path] = id(item)
            continue
        seen[id(item)] = item
        found[path] = (id(item), _contents(item))
        waiting += [(f"{path}{name}", child) for name, child in _children(item)]
    return found


def _contents(item: Any) -> Any:
    if isinstance(item, Tensor):
        lazy = isinstance(item, nn.parameter.UninitializedTensorMixin)
        graph = None if lazy else (item.requires_grad, id(item.grad_fn) if item.grad_fn else None)
        return bits(item), graph, None if lazy else (item.data_ptr(), item.stride())
    if isinstance(item, np.ndarray):
        return item.dtype.str, item.shape, item.tobytes() if item.dtype != object else len(item)
    if isinstance(item, torch.Generator):
        return bits(item.get_state())
    if isinstance(item, random.Random):
        return hash(item.getstate())
    if isinstance(item, np.random.Generator):
        return repr(item.bit_generator.state)
    if isinstance(item, np.random.RandomState):
        return repr(item.get_state())
    if isinstance(item, dict):
        return [repr(key) for key in dict.keys(item)]
    if isinstance(item, set | frozenset | bytearray):
        return repr(item)
    if isinstance(item, itertools.count | itertools.cycle):
        return repr(item) if isinstance(item, itertools.count) else repr(item.__reduce__())
    if isinstance(item, type(iter(range(0)))):
        return repr(item.__reduce__())
    if isinstance(item, types.GeneratorType):
        return repr(item.gi_frame and item.gi_frame.f_locals)
    if isinstance(item, torch.jit.ScriptModule):
        return repr(getattr(item, "calls", None))
    return None


def _children(item: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(item, Tensor):
        if not isinstance(item, nn.parameter.UninitializedTensorMixin) and item.is_leaf:
            yield from ((f".{name}", getattr(item, name)) for name in _LINKS)
        return
    if isinstance(item, types.MethodType):
        yield from ((".self", item.__self__), (".func", item.__func__))
    elif isinstance(item, types.BuiltinMethodType):
        yield ".self", item.__self__
    elif isinstance(item, functools.partial):
        yield from ((".func", item.func), (".args", item.args), (".keywords", item.keywords))
    elif isinstance(item, types.FunctionType):
        for name, cell in zip(item.__code__.co_freevars, item.__closure__ or (), strict=True):
            yield f"<{name}>", cell.cell_contents
        return
    elif isinstance(item, types.ModuleType | torch.Generator | type | types.GeneratorType):
        return
    if isinstance(item, dict):
        yield from ((f"[{key!r}]", child) for key, child in dict.items(item))
    elif isinstance(item, list | tuple) or type(item).__name__ == "deque":
        yield from ((f"[{i}]", child) for i, child in enumerate(item))
    elif isinstance(item, np.ndarray) and item.dtype == object:
        yield from ((f"[{i}]", child) for i, child in enumerate(item.ravel()))
    if isinstance(item, torch.jit.ScriptModule):
        yield from ((f".{name}", t) for name, t in (*item.named_parameters(), *item.named_buffers()))
        return
    yield from ((f".{name}", child) for name, child in getattr(item, "__dict__", {}).items())
    for owner in type(item).__mro__:
        slots = vars(owner).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not isinstance(item, torch.Size) and hasattr(item, name) and name not in ("__dict__", "__weakref__"):
                yield f".{name}", getattr(item, name)
    if isinstance(item, nn.Module) and not type(item).__module__.startswith("torch."):
        yield from (
            (f" class.{n}", v) for n, v in vars(type(item)).items() if not n.startswith("_") and not callable(v)
        )


def process() -> dict[str, Any]:
    """Settings and patches of the process, and its random states."""
    modules = nn.modules.module
    return {
        "torch random": bits(torch.get_rng_state()),
        "python random": hash(random.getstate()),
        "numpy random": repr(np.random.get_state()),  # noqa: NPY002
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
        ),
        "kernels": (torch._C._get_mkldnn_enabled(), torch.backends.cudnn.enabled),
        "jit": torch._C._get_graph_executor_optimize(),
        "patches": [
            id(thing)
            for thing in (
                torch.cond,
                torch.compile,
                nn.Module.register_parameter,
                nn.Module.__call__,
                nn.Parameter.__new__,
                *(v for k, v in sorted(vars(torch.utils.checkpoint).items()) if "heckpoint" in k),
            )
        ],
        "hooks": {name: len(t) for name, t in vars(modules).items() if isinstance(t, dict) and name.endswith("_hooks")},
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "garbage": (gc.get_threshold(), gc.isenabled()),
        "compiled": torch._dynamo.eval_frame._stance.stance if "torch._dynamo" in sys.modules else "default",
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Paths at which something is not as it was, or was not there, or is gone."""
    return [path for path in {**before, **after} if before.get(path, ...) != after.get(path, ...)]
