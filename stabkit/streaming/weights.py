"""The weights of a model, a few at a time, from safetensors files."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from stabkit.checkpoints.files import reading
from stabkit.checkpoints.hugging_face import weight_files
from stabkit.checkpoints.mapped import CAN_MAP, read_mapped, written
from stabkit.errors import CheckpointError, did_you_mean
from stabkit.hashing import raw


class WeightFiles:
    """The tensors of a directory of safetensors files, read by name; nothing stays mapped between two calls.

    Args:
        folder: holds ``model.safetensors``, or shards and their index.

    Attributes:
        shapes: tensors without entries, by name.

    Raises:
        CheckpointError: there are none, or they are no safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, Tensor] = {}
        for path in weight_files(folder):
            if path.suffix != ".safetensors":
                raise CheckpointError(
                    f"{path} cannot be read a block at a time; save the model with save_pretrained(..., "
                    "safe_serialization=True), or load it whole"
                )
            with reading(path), safetensors.safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                    self._files[name] = path
                    self.shapes[name] = torch.empty(opened.get_slice(name).get_shape(), device="meta")

    @property
    def n_bytes(self) -> int:
        """Of all files together."""
        return sum(path.stat().st_size for path in set(self._files.values()))

    def named(self, aliases: Iterable[str], prefix: str) -> str:
        """What the files call a parameter that the model knows by some names.

        Raises:
            CheckpointError: they do not have it.
        """
        names = list(aliases)
        for name in names:
            for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
                if candidate in self._files:
                    return candidate
        raise CheckpointError(f"{self.folder} has no tensor {names[0]!r}{did_you_mean(names[0], list(self._files))}")

    def read(self, names: Iterable[str], dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], str]:
        """Tensors in ``dtype``, in memory of their own, and a hash of their bytes as they are in the files."""
        digest = hashlib.blake2b(digest_size=16)
        found: dict[str, Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for name in sorted(set(names)):
            by_file.setdefault(self._files[name], []).append(name)
        for path, inside in sorted(by_file.items()):
            before = written(path)
            with reading(path), safetensors.safe_open(path, framework="pt") as opened:
                for name in inside:
                    tensor = opened.get_tensor(name)
                    read_mapped(path, [tensor], before=before)
                    digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
                    digest.update(raw(tensor))
                    kind = dtype if tensor.is_floating_point() else tensor.dtype
                    found[name] = tensor.to(device, kind, copy=not CAN_MAP)
        return found, digest.hexdigest()


class StreamedWeights:
    """The parameters of a model without weights, filled in for as long as they are needed.

    Args:
        model: without weights.
        files: where they are.
        dtype: the dtype of the parameters while they are there.
        device: where they are then.
    """

    def __init__(self, model: nn.Module, files: WeightFiles, dtype: torch.dtype, device: torch.device) -> None:
        self.files = files
        self.dtype = dtype
        self.device = device
        self._prefix = str(getattr(model, "base_model_prefix", "") or "")
        self._aliases: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._aliases.setdefault(id(parameter), []).append(name)
        for module in model.modules():
            module._buffers.update({n: _cast(b, dtype).to(device) for n, b in module._buffers.items() if b is not None})

    @contextlib.contextmanager
    def present(self, modules: Iterable[nn.Module]) -> Iterator[str]:
        """The direct parameters of some modules are there inside the block; yields a hash of their bytes."""
        places = [(m, n, p) for m in modules for n, p in m._parameters.items() if p is not None]
        names = {id(p): self.files.named(self._aliases[id(p)], self._prefix) for _, _, p in places}
        tensors, digest = self.files.read(names.values(), self.dtype, self.device)
        for module, name, parameter in places:
            tensor = tensors[names[id(parameter)]]
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{names[id(parameter)]} has shape {tuple(tensor.shape)} in the files, {tuple(parameter.shape)} in "
                    "the model"
                )
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        del tensors
        try:
            yield digest
        finally:
            for module, name, parameter in places:
                module._parameters[name] = parameter


def _cast(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    return buffer.to(dtype) if buffer.is_floating_point() else buffer
