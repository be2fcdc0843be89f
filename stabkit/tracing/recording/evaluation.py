"""A call as prediction makes it: in eval mode, without gradients, of the inputs as they are or of others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stabkit.tracing.recording.containers import map_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.randomness import seeded
from stabkit.tracing.recording.recorder import Recording, recording_calls
from stabkit.tracing.recording.sharding import take_whole


@dataclass
class Evaluation:
    """What one such call left.

    Attributes:
        output: what the model returned; None where it refused these inputs.
        recording: the calls of its modules.
        given: ids of the tensors that the model is given in place of others.
    """

    output: Any = None
    recording: Recording = field(default_factory=Recording)
    given: frozenset[int] = frozenset()


def evaluated(
    call: ForwardPass,
    change: Callable[[Tensor], Tensor] | None = None,
    mode: Callable[[Evaluation], AbstractContextManager[Any]] | None = None,
    *,
    training: bool = False,
) -> Evaluation:
    """Run a model without gradients, with every tensor that it is given changed; it comes back as it was.

    Args:
        call: the model and what it is called with.
        change: makes other inputs of those of the call.
        mode: makes what the pass runs in, such as a mode that sees the functions of torch.
        training: whether modules stay in the modes that they are in; False puts all of them in eval mode.
    """
    found = Evaluation()
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.inference_mode(False), call.kept(), torch.no_grad():
        take_whole(call.module)
        if not training:
            with contextlib.suppress(NotImplementedError):  # an exported program has but the mode it was exported in
                call.module.eval()
        given: list[int] = []

        def prepared(tensor: Tensor) -> Tensor:
            other = tensor if change is None else change(tensor)
            copy = other.detach().clone()
            given.extend([id(copy)] if other is not tensor else [])
            return copy

        inputs, kwargs = map_tensors([list(call.inputs), dict(call.kwargs)], prepared)
        found.given = frozenset(given)
        seeded(call.seed)
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # it cuts padding off, and runs no functions of torch
            with recording_calls(call.module, found.recording), contextlib.ExitStack() as stack:
                if mode is not None:
                    stack.enter_context(mode(found))
                found.output = call.model(*inputs, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever the model does not take
            found.output = None
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    return found
