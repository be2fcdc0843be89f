"""The input of a model: a shape, token ids, a file, tensors, or what the model itself says it takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.checkpoints.input_files import read_input_file
from stabkit.checkpoints.model_names import optional, seeded
from stabkit.checkpoints.processors import Processor
from stabkit.errors import CheckpointError

_SHAPE = re.compile(r"\d+(x\d+)*")
_TOKENS = 16
_ACCEPTED = "a shape such as 1x3x224x224, tokens:1x128, or a .npy, .npz, .pt, .safetensors or image file (--input)"


@dataclass(frozen=True)
class Inputs:
    """What a model is called with.

    Attributes:
        args: positional tensors.
        kwargs: tensors by name.
        how: where they come from, in words.
    """

    args: tuple[Any, ...]
    how: str
    kwargs: dict[str, Any] = field(default_factory=dict)


Input = str | Path | Tensor | tuple[Any, ...] | list[Any] | Inputs


def make_inputs(
    model: nn.Module,
    given: Input | None = None,
    *,
    name: str = "",
    seed: int = 0,
    processor: Processor | None = None,
) -> Inputs:
    """The input that ``given`` describes, or the one that the model itself names.

    Args:
        model: decides dtype, device, vocabulary and, when ``given`` is None, the shape.
        given: a shape (``"1x3x64x64"``: standard normal), ``"tokens:1x8"`` (ids below the vocabulary size),
            a path to a ``.npy``, ``.npz``, ``.pt``, ``.safetensors`` or image file, a tensor, a tuple of tensors,
            or what an earlier call returned. Several shapes, for several positional inputs, are separated by
            commas. ``"text:..."`` is encoded by the tokenizer that the model was saved with.
        name: the model's name, when it came from torchvision or timm.
        seed: seed of the random values.
        processor: the preparation of inputs that was saved beside the model.

    Raises:
        CheckpointError: ``given`` cannot be read, or nothing was given and the model does not say.

    Example:
        >>> made = make_inputs(nn.Linear(6, 2), "4x6")
        >>> made.args[0].shape, made.how
        (torch.Size([4, 6]), 'standard normal 4x6, seed 0')
    """
    if given is None:
        return _inferred(model, name, seed, processor)
    if isinstance(given, Inputs):
        return given
    if isinstance(given, Tensor):
        return Inputs((given,), f"the given tensor {_shape(given.shape)}")
    if isinstance(given, (tuple, list)):
        if not given or not all(isinstance(item, Tensor) for item in given):
            raise CheckpointError(f"input is a {type(given).__name__} that holds other things than tensors")
        return Inputs(tuple(given), "the given tensors " + ", ".join(_shape(t.shape) for t in given))
    if isinstance(given, Path):
        return _from_file(model, given, name, processor)
    if not isinstance(given, str):
        raise CheckpointError(f"input is a {type(given).__name__}; expected {_ACCEPTED}, a tensor or a tuple of them")
    if given.startswith("text:"):
        return _encoded(model, given.removeprefix("text:"), processor)
    parts = [part.strip() for part in given.split(",")]
    if all(_SHAPE.fullmatch(part.removeprefix("tokens:")) for part in parts):
        generator = torch.Generator().manual_seed(seed)
        made = [_random(model, part, generator) for part in parts]
        return Inputs(tuple(t for t, _ in made), ", ".join(how for _, how in made) + f", seed {seed}")
    if given.startswith("tokens:"):
        raise CheckpointError(f"input {given!r} is not tokens:BATCHxLENGTH, for example tokens:1x128")
    return _from_file(model, Path(given).expanduser(), name, processor)


def input_size(model: nn.Module, name: str, processor: Processor | None = None) -> tuple[int, ...] | None:
    """The shape of one sample that a vision model says it takes, batch left out; None when it does not say."""
    if processor is not None and processor.size is not None:
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        channels = first.in_channels if first is not None else 3
        return int(getattr(getattr(model, "config", None), "num_channels", channels)), *processor.size
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, Mapping) and config.get("input_size"):
        return tuple(int(n) for n in config["input_size"])
    if name.startswith("torchvision:"):
        return _torchvision_size(name.removeprefix("torchvision:"))
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if size is not None:
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return int(getattr(config, "num_channels", 3)), int(height), int(width)
    return None


def _device(reference: Tensor | None) -> torch.device:
    """Where the input goes: beside the parameters; to the CPU when there are none, or none with storage yet."""
    return torch.device("cpu") if reference is None or reference.device.type == "meta" else reference.device


def _random(model: nn.Module, part: str, generator: torch.Generator) -> tuple[Tensor, str]:
    text = part.removeprefix("tokens:")
    shape = [int(n) for n in text.split("x")]
    if 0 in shape:
        raise CheckpointError(f"input {part!r} has a dimension of size 0; expected {_ACCEPTED}")
    reference = next(_floating(model), None)
    device = _device(reference)
    try:
        if part.startswith("tokens:"):
            vocabulary, source = _vocabulary(model)
            tokens = torch.randint(vocabulary, shape, generator=generator)
            return tokens.to(device), f"random token ids {text} below {vocabulary} ({source})"
        dtype = reference.dtype if reference is not None else torch.get_default_dtype()
        return torch.randn(shape, generator=generator).to(device, dtype), f"standard normal {text}"
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"input {part!r} does not fit in memory") from error


def _floating(model: nn.Module) -> Iterator[Tensor]:
    tensors = (t for group in (model.parameters(), model.buffers()) for t in group)
    return (t for t in tensors if t.is_floating_point())


def _vocabulary(model: nn.Module) -> tuple[int, str]:
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        size = getattr(part, "vocab_size", None)
        if isinstance(size, int) and size > 0:
            return size, "the config's vocab_size"
    found = _token_embedding(model)
    if found is None:
        raise CheckpointError(
            "input asks for tokens, but the model has no nn.Embedding; give a shape, for example --input 1x16"
        )
    path, layer = found
    return layer.num_embeddings, f"{path or 'the model'}'s num_embeddings"


def _token_embedding(model: nn.Module) -> tuple[str, nn.Embedding] | None:
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Embedding)]
    words = [pair for pair in layers if not re.search(r"pos|type|segment|time", pair[0].lower())]
    return next(iter(words or layers), None)


def _inferred(model: nn.Module, name: str, seed: int, processor: Processor | None) -> Inputs:
    main = getattr(model, "main_input_name", None)
    told = processor is not None and (processor.size is not None or processor.longest is not None)
    said = f"inferred from {processor.source if processor is not None and told else name or type(model).__name__}: "
    if isinstance(main, str) and hasattr(model, "config"):
        made = _for_hugging_face(model, main, seed, processor)
    elif (size := input_size(model, name, processor)) is not None:
        made = make_inputs(model, _shape((1, *size)), seed=seed)
    else:
        made = _for_first_layer(model, seed)
    return Inputs(made.args, said + made.how, made.kwargs)


def _for_hugging_face(model: nn.Module, main: str, seed: int, processor: Processor | None) -> Inputs:
    config: Any = model.config
    if main == "pixel_values" and (size := input_size(model, "", processor)) is not None:
        return make_inputs(model, _shape((1, *size)), seed=seed)
    if main == "input_ids":
        limits = (getattr(config, "max_position_embeddings", None), processor.longest if processor else None)
        length = min([_TOKENS, *(n for n in limits if isinstance(n, int) and n > 0)])
        made = make_inputs(model, f"tokens:1x{length}", seed=seed)
        if getattr(config, "is_encoder_decoder", False):
            decoder = make_inputs(model, f"tokens:1x{length}", seed=seed + 1)
            return Inputs(made.args, made.how, {"decoder_input_ids": decoder.args[0]})
        return made
    if main == "input_values":
        return make_inputs(model, "1x16000", seed=seed)
    raise _unknown(model, f"its main input is {main!r}")


def _for_first_layer(model: nn.Module, seed: int) -> Inputs:
    """Try shapes that suit the first layer until the model runs on one."""
    first = next(((p, m) for p, m in model.named_modules() if isinstance(m, _LAYERS)), None)
    if first is None:
        raise _unknown(model, "it has no linear, convolutional, recurrent or embedding layer to go by")
    path, layer = first
    described = f"{path or 'the model'} ({type(layer).__name__})"
    last = ""
    for text in _shapes_for(layer):
        made = make_inputs(model, text, seed=seed)
        error = _forward_error(model, made, seed)
        if error is None:
            return Inputs(made.args, f"{made.how}, the first shape that suits the first layer {described}")
        last = f"{type(error).__name__}: {error}".splitlines()[0]
    raise _unknown(
        model, f"shapes {', '.join(_shapes_for(layer))}, tried for its first layer {described}, fail with {last}"
    )


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)


def _shapes_for(layer: nn.Module) -> list[str]:
    if isinstance(layer, nn.Linear):
        return [f"1x{layer.in_features}", f"1x{_TOKENS}x{layer.in_features}"]
    if isinstance(layer, nn.Embedding):
        return [f"tokens:1x{_TOKENS}", "tokens:1x8"]
    if isinstance(layer, nn.RNNBase):
        order = f"1x{_TOKENS}" if layer.batch_first else f"{_TOKENS}x1"
        return [f"{order}x{layer.input_size}"]
    if isinstance(layer, nn.RNNCellBase):
        return [f"1x{layer.input_size}", f"1x{_TOKENS}x{layer.input_size}"]
    if isinstance(layer, nn.Conv1d):
        return [f"1x{layer.in_channels}x{n}" for n in (64, 1024, 128, 16)]
    if isinstance(layer, nn.Conv2d):
        sizes = (28, 32, 64) if layer.in_channels == 1 else (64, 32, 224, 28)
        return [f"1x{layer.in_channels}x{n}x{n}" for n in (*sizes, 8)]
    if isinstance(layer, nn.Conv3d):
        return [f"1x{layer.in_channels}x{n}x{n}x{n}" for n in (16, 32)]
    return []


def _forward_error(model: nn.Module, made: Inputs, seed: int) -> Exception | None:
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), seeded(seed):
            model(*made.args, **made.kwargs)
    except Exception as error:  # the model is the user's code: anything it raises means "not this shape"
        return error
    finally:
        for buffer, before in buffers:
            buffer.data.copy_(before)
    return None


def _torchvision_size(name: str) -> tuple[int, ...] | None:
    from torchvision import models

    weights = getattr(models.get_model_weights(name), "DEFAULT", None)
    if weights is None:
        return None
    crop = getattr(weights.transforms(), "crop_size", None)
    if not crop:
        return None
    height, width = (crop[0], crop[-1])
    frames = weights.meta.get("min_temporal_size")
    kind = type(weights).__module__
    return (3, max(frames or 1, 16), height, width) if ".video" in kind else (3, height, width)


def _encoded(model: nn.Module, text: str, processor: Processor | None) -> Inputs:
    """A text as the token ids of the tokenizer beside the model."""
    if processor is None or processor.tokenizer is None:
        raise CheckpointError(
            "input text:... needs the tokenizer.json that a Hugging Face directory has, and there is none; give "
            "tokens:1x128 or a file of token ids"
        )
    tokenizers = optional("tokenizers", f"{processor.tokenizer}")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(processor.tokenizer))
        tokenizer.no_padding()  # a pad token without a mask is a word like any other
        ids = tokenizer.encode(text).ids
    except Exception as error:  # the library raises a plain Exception for a damaged file
        raise CheckpointError(f"{processor.tokenizer} cannot be read: {error}") from error
    ids = ids[: processor.longest]
    vocabulary, source = _vocabulary(model)
    if not ids or max(ids) >= vocabulary:
        raise CheckpointError(
            f"{processor.tokenizer} makes {len(ids)} tokens of the text, up to {max(ids, default=0)}, but the model "
            f"has {vocabulary} ({source})"
        )
    reference = next(_floating(model), None)
    return Inputs(
        (torch.tensor([ids], device=_device(reference)),), f"{len(ids)} tokens of the text, by {processor.tokenizer}"
    )


def _from_file(model: nn.Module, path: Path, name: str, processor: Processor | None) -> Inputs:
    size = input_size(model, name, processor)
    content = read_input_file(path, size=size, config=_image_config(model, processor))
    reference = next(_floating(model), None)

    def fitted(tensor: Tensor) -> Tensor:
        if reference is None:
            return tensor
        return tensor.to(_device(reference), reference.dtype if tensor.is_floating_point() else tensor.dtype)

    how = f"{path}: {content.how}"
    tensors = {key: fitted(value) for key, value in content.tensors.items()}
    accepted = inspect.signature(model.forward).parameters
    if len(tensors) > 1 and all(key in accepted for key in tensors):
        return Inputs((), how + ", by name", tensors)
    if len(tensors) == 1 or content.ordered:
        return Inputs(tuple(tensors.values()), how)
    raise CheckpointError(
        f"input {path} holds {', '.join(tensors)}, but the model takes {', '.join(accepted)}; save one tensor, "
        "a tuple in the model's order, or a dictionary with the model's own names"
    )


def _image_config(model: nn.Module, processor: Processor | None) -> Mapping[str, Any]:
    if processor is not None and processor.mean is not None and processor.std is not None:
        return {"mean": processor.mean, "std": processor.std}
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return config if isinstance(config, Mapping) else {}


def _unknown(model: nn.Module, why: str) -> CheckpointError:
    return CheckpointError(f"the input of {type(model).__name__} cannot be inferred: {why}. Give {_ACCEPTED}")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
