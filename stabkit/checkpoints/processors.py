"""What a Hugging Face directory says about a model's input: image size, mean, deviation, token length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stabkit.checkpoints.hugging_face import read_json
from stabkit.errors import CheckpointError

_IMAGES = ("preprocessor_config.json", "processor_config.json")
_LONGEST = 10**6  # beyond it, a tokenizer's length means "not set"


@dataclass(frozen=True)
class Processor:
    """The preparation of inputs that is saved beside a model.

    Attributes:
        source: the files it was read from.
        size: height and width of an image, None when they are not fixed.
        mean: per channel, None when images are not normalised.
        std: per channel.
        longest: tokens that a text may have.
        tokenizer: ``tokenizer.json``.
    """

    source: str
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    longest: int | None = None
    tokenizer: Path | None = None


def read_processor(folder: Path) -> Processor | None:
    """The processor of a directory, or None when it has none.

    Raises:
        CheckpointError: a file is there but cannot be understood.
    """
    images = next((folder / name for name in _IMAGES if (folder / name).exists()), None)
    texts = folder / "tokenizer_config.json"
    tokenizer = folder / "tokenizer.json"
    if images is None and not texts.exists() and not tokenizer.exists():
        return None
    config = read_json(images) if images is not None else {}
    inner = config.get("image_processor")
    config = inner if isinstance(inner, dict) else config
    longest = read_json(texts).get("model_max_length") if texts.exists() else None
    normalised = config.get("do_normalize", True)
    files = [images, texts if texts.exists() else None, tokenizer if tokenizer.exists() else None]
    return Processor(
        source=", ".join(file.name for file in files if file is not None),
        size=_size(images, config),
        mean=_channels(images, config, "image_mean") if normalised else (0.0,),
        std=_channels(images, config, "image_std") if normalised else (1.0,),
        longest=int(longest) if isinstance(longest, int | float) and 0 < longest < _LONGEST else None,
        tokenizer=tokenizer if tokenizer.exists() else None,
    )


def _size(file: Path | None, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size that images have in the end: the crop, when there is one, else the resize."""
    cropped = config.get("crop_size") if config.get("do_center_crop", "crop_size" in config) else None
    size = cropped if cropped is not None else config.get("size")
    if size is None:
        return None
    if isinstance(size, Mapping):
        if "height" in size and "width" in size:
            size = (size["height"], size["width"])
        elif "shortest_edge" in size and "longest_edge" not in size:
            size = size["shortest_edge"]
        else:
            return None  # each image keeps its own proportions
    pair = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(pair) != 2 or not all(isinstance(n, int) and 0 < n < 2**16 for n in pair):
        raise CheckpointError(f"{file} has the size {size!r}; expected whole numbers of pixels, or give --input")
    return int(pair[0]), int(pair[1])


def _channels(file: Path | None, config: Mapping[str, Any], name: str) -> tuple[float, ...] | None:
    values = config.get(name)
    if values is None:
        return None
    values = values if isinstance(values, list) else [values]
    if not values or not all(isinstance(v, int | float) for v in values) or (name == "image_std" and 0 in values):
        raise CheckpointError(f"{file} has {name}={values!r}; expected one number for each channel")
    return tuple(float(v) for v in values)
