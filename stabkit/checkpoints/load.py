"""Any saved file or model name -> the model and an input for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stabkit.arguments import accepts
from stabkit.checkpoints.dispatch import Options, open_model
from stabkit.checkpoints.inputs import Input, Inputs, make_inputs
from stabkit.checkpoints.matching import non_finite
from stabkit.checkpoints.model_names import Model
from stabkit.checkpoints.opened import Opened
from stabkit.checkpoints.processors import read_processor
from stabkit.errors import CheckpointError
from stabkit.results import Result


@dataclass(frozen=True)
class Loaded(Result):
    """A model with an input; unpacks as ``model, inputs = load(...)``.

    Attributes:
        model: in evaluation mode; that of a capsule in the mode of its step.
        inputs: positional arguments of the model.
        kwargs: keyword arguments of the model.
        name: what the model is called.
        description: what was loaded: the tensors used, renamed and ignored, which key, what was stripped,
            averaged weights or raw ones, and where the input comes from; one sentence a line.
        non_finite: names of tensors that hold NaN or infinity.
        step: what counts the steps of training in the file, or in its name, and the count; None when nothing does.
        trained: whether its weights are known to have been trained: they are of a capsule after the first step.
        loss: where the source is a capsule, a callable on the output with the gradient that the loss of the run had
            there.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    description: str = ""
    non_finite: tuple[str, ...] = ()
    step: tuple[str, float] | None = None
    loss: Callable[[Any], Tensor] | None = None
    trained: bool = False

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.inputs

    def _contents(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": type(self.model).__name__,
            "inputs": [getattr(t, "shape", ()) for t in self.inputs],
            "kwargs": {name: getattr(t, "shape", ()) for name, t in self.kwargs.items()},
            "description": self.description,
            "non_finite": self.non_finite,
            "step": self.step,
        }


@accepts
def load(
    source: str | os.PathLike[str],
    *,
    model: Model | None = None,
    base: Model | Path | None = None,
    input: Input | None = None,
    key: str | None = None,
    weights: str = "raw",
    factory_args: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    allow_export: bool = False,
    allow_torchscript: bool = False,
    seed: int = 0,
) -> Loaded:
    """The model in a checkpoint, or behind a name, and an input for it.

    Nothing in a file is executed unless ``trust_pickle``, ``allow_export`` or ``allow_torchscript`` says so, and
    nothing is downloaded. A factory is the caller's own code and is run.

    Args:
        source: a file (state dict, training dict, Lightning checkpoint; ``torch.save`` or safetensors), a
            Hugging Face directory, a distributed checkpoint (DCP, FSDP), a LoRA adapter, a capsule of a monitor (with
            the batch, the loss and the mode of its step), or a name for the
            architecture with random weights: ``torchvision:NAME``, ``timm:NAME``, ``pkg.mod:factory``,
            ``file.py:factory``.
        model: the architecture of a state dict: a name as above, a module, or a callable. A module is changed.
        base: the model that a LoRA adapter changes: a source as above, a module, or a callable.
        input: a shape (``"1x3x64x64"``), ``"tokens:1x8"``, ``"text:..."``, a file, a tensor or a tuple of them;
            None asks the model itself and the processor that was saved beside it.
        key: where the weights are in the file, for example ``"state_dict"`` or ``"ema.shadow"``.
        weights: ``"raw"`` or ``"ema"``, when the file has both; ``"step"`` for those of a capsule's own step, where it
            has the last good ones from before as well.
        factory_args: keyword arguments of the factory.
        trust_pickle: unpickle whatever the file asks for, which runs its code.
        allow_export: load a ``torch.export`` program (.pt2), whose loader runs what the file says.
        allow_torchscript: load TorchScript, which is code.
        seed: seed of random weights and inputs; the global generators are left as they were.

    Returns:
        The model, the input, and what was done to get them.

    Raises:
        ArchitectureMissingError: there are weights, but nothing says which model they belong to; ``weights`` of the
            error has them.
        CheckpointError: anything else that the caller can mend, in one message.

    Example:
        >>> from torch import nn
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": nn.Linear(3, 2).state_dict()}, f"{folder}/last.pt")
        ...     network, inputs = load(f"{folder}/last.pt", model=lambda: nn.Linear(3, 2), input="4x3")
        >>> network(*inputs).shape
        torch.Size([4, 2])
    """
    if weights not in ("raw", "ema", "step"):
        raise CheckpointError(f"weights={weights!r}; expected 'raw' or 'ema', or 'step' of a capsule")
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(f"source is a {type(source).__name__}; expected a path or a model name")
    if not str(source):
        raise CheckpointError("source is empty; expected a path or a model name")
    options = Options(
        model, base, key, weights, dict(factory_args or {}), trust_pickle, allow_export, allow_torchscript, seed
    )
    opened = open_model(str(source), options)
    if opened.as_saved and input is not None:
        raise CheckpointError(f"{source} is a capsule, which holds the batch of its step; leave the input out")
    return _with_input(str(source), opened, input, seed)


def _with_input(source: str, opened: Opened, given: Input | None, seed: int) -> Loaded:
    said = [f"source: {source}", *opened.notes]
    if opened.as_saved:
        made = Inputs(opened.inputs, "", opened.kwargs)
    else:
        _set_evaluation(opened.module)
        made = _made(opened, given, seed)
        said.append(f"input: {made.how}")
    bad = non_finite(opened.module) if opened.non_finite is None else opened.non_finite
    trained = opened.as_saved and opened.step is not None and opened.step[1] > 0
    return Loaded(
        opened.module, made.args, made.kwargs, opened.name, "\n".join(said), bad, opened.step, opened.loss, trained
    )


def _made(opened: Opened, given: Input | None, seed: int) -> Inputs:
    if given is None and opened.inputs:
        return Inputs(opened.inputs, "the example that was saved with the program")
    processor = read_processor(opened.folder) if opened.folder is not None else None
    return make_inputs(opened.module, given, name=opened.name, seed=seed, processor=processor)


def _set_evaluation(module: nn.Module) -> None:
    """Switch to evaluation mode; an exported program has none: it is what it was when it was exported."""
    try:
        module.eval()
    except NotImplementedError:
        return
