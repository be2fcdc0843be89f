"""A model without its weights: modules whose parameters have shapes and no storage."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from stabkit.checkpoints.bounds import bounded_by
from stabkit.checkpoints.hugging_face import architecture, building
from stabkit.tracing.recording.hooks import hooked


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Modules that are built inside the block have parameters without storage; buffers are what they are.

    A parameter is allocated by its module, but not yet written to, when it loses its storage: that costs no memory.
    """
    thread = threading.get_ident()  # what other threads build meanwhile keeps its weights

    def bare(_module: nn.Module, _name: str, param: nn.Parameter) -> Any:
        if threading.get_ident() != thread or param.device.type == "meta":
            return None
        return nn.Parameter(param.detach().to("meta"), requires_grad=False)

    with hooked([register_module_parameter_registration_hook(bare)]):
        yield


def skeleton(folder: Path, stored: Mapping[str, Tensor]) -> nn.Module:
    """The model that ``config.json`` of a Hugging Face directory describes, in evaluation mode, without weights.

    Args:
        folder: the directory.
        stored: the tensors beside the config, by name; only their shapes count.

    Raises:
        CheckpointError: the config is missing or damaged, asks for code of its own, or describes a model out of all
            proportion to what is stored.
    """
    model_class, settings = architecture(folder)
    settings._attn_implementation = "eager"  # has a derivative everywhere
    with building(folder, model_class, seed=0), bounded_by(stored, str(folder / "config.json")), without_weights():
        model: nn.Module = model_class(settings)
    return model.eval()
