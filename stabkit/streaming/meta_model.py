"""A model without its weights: modules whose parameters have shapes and no storage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from stabkit.checkpoints.hugging_face import architecture, building


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Modules that are built inside the block have parameters without storage; buffers are what they are.

    A parameter is allocated by its module, but not yet written to, when it loses its storage: that costs no memory.
    """
    module_class: Any = nn.Module
    register = module_class.register_parameter

    def bare(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(self, name, param)

    module_class.register_parameter = bare
    try:
        yield
    finally:
        module_class.register_parameter = register


def skeleton(folder: Path) -> nn.Module:
    """The model that ``config.json`` of a Hugging Face directory describes, in evaluation mode, without weights.

    Raises:
        CheckpointError: the config is missing or damaged, or asks for code of its own.
    """
    model_class, settings = architecture(folder)
    settings._attn_implementation = "eager"  # has a derivative everywhere
    with building(folder, model_class, seed=0), without_weights():
        model: nn.Module = model_class(settings)
    return model.eval()
