"""A model's name -> the module, with seeded random weights; nothing is ever downloaded."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import random
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from stabkit.errors import CheckpointError, did_you_mean

Model = str | nn.Module | Callable[..., nn.Module]

_FACTORY = re.compile(r"(?P<module>.+):(?P<attribute>[^\W\d][\w.]*)")
_DOWNLOADS = {
    "torchvision": ("weights", "weights_backbone", "pretrained", "pretrained_backbone"),
    "timm": ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
}


def is_model_name(text: str) -> bool:
    """Whether ``text`` reads as ``torchvision:NAME``, ``timm:NAME``, ``pkg.mod:factory`` or ``file.py:factory``.

    Example:
        >>> [is_model_name(t) for t in ("timm:resnet18", "nets.py:build", "run/last.ckpt")]
        [True, True, False]
    """
    return _FACTORY.fullmatch(text) is not None


def build_model(model: Model, *, factory_args: Mapping[str, Any] | None = None, seed: int = 0) -> tuple[nn.Module, str]:
    """The module that ``model`` names, and the name; random weights follow ``seed``.

    Args:
        model: ``torchvision:NAME``, ``timm:NAME``, ``pkg.mod:factory``, ``file.py:factory``, a module, or a
            callable that returns one. A factory is the user's own code and is run.
        factory_args: keyword arguments for the factory.
        seed: seed of torch's, numpy's and Python's generators while the factory runs; they are put back after.

    Raises:
        CheckpointError: the name is unknown, a package is missing, or the factory raises or returns no module.

    Example:
        >>> from torch import nn
        >>> build_model(lambda width: nn.Linear(width, 2), factory_args={"width": 3})[0]
        Linear(in_features=3, out_features=2, bias=True)
    """
    arguments = dict(factory_args or {})
    if isinstance(model, nn.Module):
        if arguments:
            raise CheckpointError("factory_args was given with a module that is already built; give its factory")
        return model, type(model).__name__
    if callable(model):
        name = getattr(model, "__name__", type(model).__name__)
        with seeded(seed):
            return _call(model, arguments, name), name
    if not isinstance(model, str):
        raise CheckpointError(
            f"model is a {type(model).__name__}; expected a name such as 'torchvision:resnet18', "
            "'timm:NAME', 'pkg.mod:factory' or 'file.py:factory', a torch.nn.Module, or a callable"
        )
    kind, _, name = model.partition(":")
    if kind in _DOWNLOADS and name:
        refused = sorted(set(arguments) & set(_DOWNLOADS[kind]))
        if refused:
            raise CheckpointError(
                f"factory_args has {', '.join(refused)}, but {model} is built without downloads; "
                "save the weights to a file and give that file as the source"
            )
        with seeded(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation notes of the library, about its own code
            return (_torchvision if kind == "torchvision" else _timm)(name, arguments), model
    return _from_factory(model, arguments, seed), model


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generators of torch, numpy and Python inside the block, and put them back after it."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - a factory may draw from the global generator
        random.seed(seed)
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


def optional(package: str, needed_for: str) -> ModuleType:
    """Import one of the packages of the ``models`` extra.

    Raises:
        CheckpointError: it is missing or does not import.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise CheckpointError(
            f'{needed_for} needs {package}, which could not be imported ({error}): pip install "stabkit[models]"'
        ) from error


def _torchvision(name: str, arguments: dict[str, Any]) -> nn.Module:
    models = optional("torchvision", f"torchvision:{name}").models
    if name not in models.list_models():
        raise CheckpointError(f"torchvision has no model {name!r}{did_you_mean(name, models.list_models())}")
    builder = models.get_model_builder(name)
    # without this the detection and segmentation models fetch weights for their backbone
    if "weights_backbone" in inspect.signature(builder).parameters:
        arguments = {**arguments, "weights_backbone": None}
    return _call(builder, {**arguments, "weights": None}, f"torchvision:{name}", shown=arguments)


def _timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    timm = optional("timm", f"timm:{name}")
    # is_model knows the registered names only: hf-hub: and local-dir: names would be fetched or read
    if not timm.is_model(name):
        raise CheckpointError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")

    def create(**keywords: Any) -> nn.Module:
        module: nn.Module = timm.create_model(name, pretrained=False, **keywords)
        return module

    return _call(create, arguments, f"timm:{name}")


def _from_factory(text: str, arguments: dict[str, Any], seed: int) -> nn.Module:
    match = _FACTORY.fullmatch(text)
    if match is None:
        raise CheckpointError(
            f"model {text!r} is not a model name; expected torchvision:NAME, timm:NAME, pkg.mod:factory "
            "or file.py:factory"
        )
    where, attribute = match["module"], match["attribute"]
    file = Path(where).expanduser()
    from_file = where.endswith(".py")
    with seeded(seed), _importable(file.parent.resolve() if from_file else Path.cwd()):
        module = _import_file(file, text) if from_file else _import_module(where, text)
        factory: Any = module
        for part in attribute.split("."):
            if not hasattr(factory, part):
                names = [n for n, value in vars(factory).items() if callable(value) and not n.startswith("_")]
                guess = did_you_mean(part, names)
                raise CheckpointError(
                    f"{where} has no {attribute!r}{guess} It defines: {', '.join(names[:8]) or 'nothing'}"
                )
            factory = getattr(factory, part)
        if isinstance(factory, nn.Module):
            return build_model(factory, factory_args=arguments)[0]
        if not callable(factory):
            raise CheckpointError(
                f"{text} is a {type(factory).__name__}; expected a function or a class that returns a torch.nn.Module"
            )
        return _call(factory, arguments, text)


def _import_file(file: Path, text: str) -> ModuleType:
    if not file.is_file():
        folder = file.parent
        names = [p.name for p in folder.glob("*.py")] if folder.is_dir() else []
        raise CheckpointError(f"{text}: no file {file}{did_you_mean(file.name, names)}")
    resolved = file.resolve()
    name = f"stabkit_factory_{resolved.stem}_{zlib.crc32(str(resolved).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise CheckpointError(f"{text}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class up in its module
    try:
        _guarded(lambda: spec.loader.exec_module(module), f"importing {file}")  # type: ignore[union-attr]
    except CheckpointError:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str, text: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise CheckpointError(
            f"{text}: {name!r} is neither a module path (pkg.mod) nor a Python file (it must end in .py)"
        )
    module: ModuleType = _guarded(lambda: importlib.import_module(name), f"importing {name}")
    return module


def _call(
    factory: Callable[..., Any], arguments: Mapping[str, Any], name: str, shown: Mapping[str, Any] | None = None
) -> nn.Module:
    given = ", ".join(f"{k}={v!r}" for k, v in (arguments if shown is None else shown).items())
    module = _guarded(lambda: factory(**arguments), f"{name}({given})", signature=factory)
    if not isinstance(module, nn.Module):
        raise CheckpointError(f"{name}({given}) returned {type(module).__name__}; expected a torch.nn.Module")
    return module


def _guarded(run: Callable[[], Any], what: str, signature: Callable[..., Any] | None = None) -> Any:
    """Run the user's code; whatever it raises becomes one message that says where it was raised."""
    try:
        return run()
    except (Exception, SystemExit) as error:  # a script without a __main__ guard ends with SystemExit
        message = f"{what} raised {type(error).__name__}: {error}{_raised_at(error)}"
        if signature is not None and isinstance(error, TypeError):
            with contextlib.suppress(TypeError, ValueError):
                message += f"; its signature is {inspect.signature(signature)}, set by factory_args (--factory-args)"
        raise CheckpointError(message) from error


def _raised_at(error: BaseException) -> str:
    frame = error.__traceback__
    if isinstance(error, SyntaxError) or frame is None:
        return ""
    while frame.tb_next is not None:
        frame = frame.tb_next
    code = frame.tb_frame.f_code
    return "" if code.co_filename == __file__ else f" ({os.path.relpath(code.co_filename)}:{frame.tb_lineno})"


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the user's code import its neighbours, as it can when it is run from its own folder."""
    before, bytecode = list(sys.path), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path[:] = before
        sys.dont_write_bytecode = bytecode
