"""What a pickle asks for, listed without running it, and inert stand-ins for the harmless part of it."""

from __future__ import annotations

import encodings
import encodings.aliases
import pickletools
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from stabkit.errors import CheckpointError

# the globals that torch's weights-only unpickler builds tensors from (torch/_weights_only_unpickler.py)
_TORCH = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|complex)"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.serialization\._get_layout"
    r"|torch\.nn\.parameter\.Parameter|torch\.(Size|Tensor|device)"
    r"|torch(\.cuda)?(\.sparse|\.storage)?\.\w*(Storage|Tensor)|torch\.q?u?(int|float|bfloat|complex|bcomplex|bits)\w*"
    r"|torch\.(bool|per_tensor_\w+|per_channel_\w+)"
)
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# codecs that make longer bytes of bytes: applied to its own result, each doubles what the pickle holds
_GROWING = {"hex_codec", "base64_codec", "quopri_codec", "uu_codec"}
_STRING_OPS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING", "STRING"}


class Inert:
    """Stands where a pickle names a class that holds data only, such as ``argparse.Namespace``.

    It takes whatever the pickle hands over and keeps none of it but the attributes of a namespace.
    """

    def __new__(cls, *_: Any) -> Inert:  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class Namespace(Inert):
    """Stands for ``argparse.Namespace``; its entries are in ``entries``."""

    entries: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, state: Any) -> None:
        self.entries = dict(state) if isinstance(state, dict) else {}


class Dtype(Inert):
    """Stands for ``numpy.dtype``, of which only the kinds that torch has too are used."""

    name = ""
    order = "<"

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = name if isinstance(name, str) else ""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]

    def plain(self) -> np.dtype[Any] | None:
        """The real dtype when it is a plain number, else None: an object dtype could run code."""
        if not re.fullmatch(r"[fiu][1248]|c8|c16|b1|bool", self.name):
            return None
        return np.dtype(self.name).newbyteorder(self.order)  # type: ignore[arg-type]


class Array(Inert):
    """Stands for ``numpy.ndarray``; :meth:`tensor` is its content when it is plain numbers."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def tensor(self) -> Tensor | None:
        """The numbers as a tensor, or None when they are not plain numbers."""
        if not (isinstance(self.state, tuple) and len(self.state) == 5):
            return None
        _, shape, dtype, fortran, data = self.state
        plain = dtype.plain() if isinstance(dtype, Dtype) else None
        if plain is None or not isinstance(data, bytes) or not isinstance(shape, tuple):
            return None
        try:
            array = np.frombuffer(data, plain).reshape(shape, order="F" if fortran else "C")
            return torch.from_numpy(array.astype(plain.newbyteorder("="), order="C", copy=True))
        except (ValueError, TypeError):
            return None


class Scalar(Inert):
    """Stands for a numpy scalar; :meth:`number` is its value when it is a plain number."""

    dtype: Any = None
    data: Any = None

    def __init__(self, dtype: Any = None, data: Any = None, *_: Any) -> None:
        self.dtype, self.data = dtype, data

    def number(self) -> int | float | bool | complex | None:
        """The number, or None when it is none."""
        plain = self.dtype.plain() if isinstance(self.dtype, Dtype) else None
        if plain is None or not isinstance(self.data, bytes) or len(self.data) != plain.itemsize:
            return None
        value: int | float | bool | complex = np.frombuffer(self.data, plain)[0].item()
        return value


def stand_ins() -> dict[str, type[Inert]]:
    """The name of each class that is allowed for its data -> the inert class that is built in its place.

    None of numpy's own reconstruction code runs.
    """
    names: dict[str, type[Inert]] = {
        "argparse.Namespace": Namespace,
        "numpy.dtype": Dtype,
        "numpy.ndarray": Array,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names[f"{module}._reconstruct"] = Array
        names[f"{module}.scalar"] = Scalar
    return names


def globals_asked(stream: IO[bytes], pickles: int = 1) -> set[str]:
    """Names that the pickles at the head of a stream would import, read from their opcodes alone.

    Args:
        stream: read from where it stands.
        pickles: how many pickles follow one another; the legacy format of torch has five before its data.

    Raises:
        ValueError: the opcodes are damaged.

    Example:
        >>> import io, pickle
        >>> sorted(globals_asked(io.BytesIO(pickle.dumps(print))))
        ['builtins.print']
    """
    found: set[str] = set()
    growing: set[str] = set()
    for _ in range(pickles):
        strings: list[str] = []
        memo: dict[int, str] = {}
        top = ""
        try:
            for op, argument, _position in pickletools.genops(stream):
                if op.name == "GLOBAL":
                    module, _, name = str(argument).partition(" ")
                    found.add(f"{_PYTHON_2.get(module, module)}.{name}")
                elif op.name == "STACK_GLOBAL":
                    module, name = (["?", "?", *strings])[-2:]
                    found.add(f"{_PYTHON_2.get(module, module)}.{name}")
                elif op.name in _STRING_OPS:
                    top = str(argument)
                    strings.append(top)
                    if len(top) < 64 and _codec(top) in _GROWING:
                        growing.add(top)
                elif op.name == "MEMOIZE":
                    memo[len(memo)] = top
                elif op.name in ("BINPUT", "LONG_BINPUT", "PUT"):
                    memo[int(str(argument))] = top
                elif op.name in ("BINGET", "LONG_BINGET", "GET"):
                    strings.append(memo.get(int(str(argument)), "?"))
        except (ValueError, IndexError, struct.error, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(str(error)) from error
    if "_codecs.encode" in found:
        found |= {f"_codecs.encode({codec!r})" for codec in growing}
    return found


def _codec(name: str) -> str:
    plain = encodings.normalize_encoding(name).lower()
    return encodings.aliases.aliases.get(plain, plain)


def not_inert(names: set[str]) -> list[str]:
    """The names that are neither torch's tensor builders nor covered by :func:`stand_ins`."""
    covered = stand_ins()
    return sorted(n for n in names if n not in covered and _TORCH.fullmatch(n) is None)


def refuse_code(path: Path, asked: set[str], trusted: str = "give --trust-pickle (trust_pickle=True)") -> None:
    """Raise CheckpointError when a pickle asks for anything that is neither a tensor nor inert.

    Args:
        path: the file, for the message.
        asked: names that the pickle would import.
        trusted: what remains to someone who trusts the author.
    """
    allowed = {f"{g.__module__}.{g.__qualname__}" for g in torch.serialization.get_safe_globals() if callable(g)}
    refused = not_inert(asked - allowed)  # what the caller allowed in torch is no concern of ours
    if refused:
        shown = ", ".join(refused[:12]) + (f" and {len(refused) - 12} more" if len(refused) > 12 else "")
        raise CheckpointError(
            f"{path} asks for code to be run while it is read: {shown}. Nothing was run. Save the state dict alone "
            f"(torch.save(model.state_dict(), ...)), or, only if you trust its author, {trusted}"
        )
