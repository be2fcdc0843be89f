"""An input saved in a file -> tensors; nothing in the file is executed."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabkit.checkpoints.files import read_file, regular_file
from stabkit.checkpoints.state_dict import check_claims
from stabkit.errors import CheckpointError

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LARGEST = 2**31  # bytes of an unpacked .npz: beyond it, the archive is taken for a bomb


@dataclass(frozen=True)
class FileInput:
    """The tensors in an input file.

    Attributes:
        tensors: by name, in the order of the file.
        how: what they are, in words.
        ordered: whether their order is the order of the model's arguments.
    """

    tensors: dict[str, Tensor]
    how: str
    ordered: bool = True


def read_input_file(
    path: Path, *, size: tuple[int, ...] | None = None, config: Mapping[str, Any] | None = None, what: str = "input"
) -> FileInput:
    """Read a ``.npy``, ``.npz``, ``.csv``, ``.pt``, ``.pth``, ``.safetensors`` or image file.

    Args:
        path: the file.
        size: ``(channels, height, width)`` that the model takes; images are resized to it.
        config: ``mean`` and ``std`` per channel, as timm's ``default_cfg`` has them; ImageNet's otherwise.
        what: what the file holds, for the messages.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind.
    """
    suffix = path.suffix.lower()
    if suffix not in {".npy", ".npz", ".csv", ".pt", ".pth", ".bin", ".safetensors", *_IMAGES}:
        shape = "neither a shape (1x3x224x224, tokens:1x128) nor" if what == "input" else "not"
        raise CheckpointError(
            f"{what} {str(path)!r} is {shape} a file of a known kind: .npy, .npz, .csv, .pt, .pth, .safetensors, "
            f"{', '.join(_IMAGES)}"
        )
    regular_file(path)
    if suffix in _IMAGES:
        return _image(path, size, config or {})
    if suffix in {".npy", ".npz"}:
        return _arrays(path)
    if suffix == ".csv":
        return _rows(path)
    return _saved(path, read_file(path).content)


def _saved(path: Path, saved: Any) -> FileInput:
    if isinstance(saved, Tensor):
        saved = (saved,)
    if isinstance(saved, (tuple, list)) and saved and all(isinstance(t, Tensor) for t in saved):
        tensors = {str(i): t.detach() for i, t in enumerate(saved)}
        check_claims(tensors)
        return FileInput(tensors, _described(tensors))
    if isinstance(saved, Mapping) and saved and all(isinstance(t, Tensor) for t in saved.values()):
        tensors = {str(k): t.detach() for k, t in saved.items()}
        check_claims(tensors)
        return FileInput(tensors, _described(tensors), ordered=False)
    raise CheckpointError(
        f"input {path} holds a {type(saved).__name__}; expected a tensor, a tuple of tensors or a dictionary of them"
    )


def _arrays(path: Path) -> FileInput:
    try:
        if path.suffix.lower() == ".npy":
            # a memory map is refused when the header claims more than the file has; its pages are not touched
            np.lib.format.open_memmap(path, mode="r")
            arrays = {"0": np.load(path, allow_pickle=False)}
            ordered = True
        else:
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > _LARGEST:
                    raise CheckpointError(f"input {path} would unpack to more than {_LARGEST >> 30} GiB")
            with np.load(path, allow_pickle=False) as loaded:
                arrays = {name: loaded[name] for name in loaded.files}
            ordered = all(name.startswith("arr_") for name in arrays)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file makes numpy, tokenize and zipfile raise anything
        raise CheckpointError(f"input {path} cannot be read as numbers: {error}") from error
    return FileInput(tensors, _described(tensors), ordered)


def _rows(path: Path) -> FileInput:
    """Numbers with commas between them, a sample a line; a single column is one number a sample.

    A first line of names is passed over.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [line.split(",") for line in lines if line.strip()]
        try:
            _ = [float(cell) for cell in rows[0]]
        except ValueError:
            rows = rows[1:]
        array = np.array([[float(cell) for cell in row] for row in rows])
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path} cannot be read as lines of numbers with commas between them: {error}") from error
    if array.ndim != 2:
        raise CheckpointError(f"{path} has no line of numbers")
    whole = bool((array == array.round()).all()) and not any("." in cell for row in rows for cell in row)
    array = array[:, 0] if array.shape[1] == 1 else array
    tensors = {"0": torch.from_numpy(array.astype(np.int64) if whole else array)}
    return FileInput(tensors, _described(tensors))


def _image(path: Path, size: tuple[int, ...] | None, config: Mapping[str, Any]) -> FileInput:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                picture = opened.convert("L" if size and size[0] == 1 else "RGB")
    except Exception as error:  # a damaged file makes the decoders raise anything
        raise CheckpointError(f"input {path} cannot be read as an image: {error}") from error
    if size is not None:
        picture = picture.resize((size[2], size[1]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
    pixels = pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    how = f"image, {picture.width}x{picture.height} pixels"
    if pixels.shape[0] == 3 or len(config.get("mean", ())) == 1:
        mean, std = config.get("mean", _IMAGENET_MEAN), config.get("std", _IMAGENET_STD)
        pixels = (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        how += f", normalised with mean {tuple(mean)} and standard deviation {tuple(std)}"
    return FileInput({"0": pixels.unsqueeze(0).contiguous()}, how)


def _described(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(
        f"{'x'.join(map(str, t.shape)) or 'scalar'} {str(t.dtype).removeprefix('torch.')}" for t in tensors.values()
    )
