"""Directories that hold a checkpoint in a form that another tool has to convert first."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from stabkit.errors import CheckpointError

SINGLE = ("model.safetensors", "pytorch_model.bin")
_WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


def holds_whole_weights(folder: Path) -> bool:
    """Whether a directory has the weights of a whole model, maybe beside a sharded state that a trainer left there.

    Raises:
        CheckpointError: the directory cannot be listed.
    """
    names = (name for name in _names(folder) if name != "model_index.json")
    return any(name in SINGLE or name.endswith(".index.json") for name in names)


def refuse_other_directories(folder: Path) -> NoReturn:
    """Say what a directory without readable weights is, and what turns it into one model.

    Only file names are looked at.

    Raises:
        CheckpointError: always.
    """
    names = _names(folder)
    if any(any(p.glob("zero_pp_rank_*")) for p in _with_children(folder)):
        raise CheckpointError(
            f"{folder} is a DeepSpeed ZeRO checkpoint, split over its ranks; convert it with the script that DeepSpeed "
            f"puts beside it: python zero_to_fp32.py {folder} model.pt"
        )
    if "model_index.json" in names:
        parts = [n for n in names if (folder / n / "config.json").exists()]
        raise CheckpointError(f"{folder} is a diffusers pipeline of several models; give one: {', '.join(parts)}")
    files = [n for n in names if n.endswith(_WEIGHTS)]
    folders = [n for n in names if not files and (folder / n).is_dir() and holds_whole_weights(folder / n)]
    raise CheckpointError(
        f"{folder} has no weights by their usual name ({', '.join(SINGLE)}); "
        + ("give one of its files: " if files else "give one of its folders: " if folders else "it holds ")
        + (", ".join((files or folders or names)[:8]) or "nothing")
    )


def _with_children(folder: Path) -> list[Path]:
    return [folder, *(child for child in sorted(folder.iterdir()) if child.is_dir())]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}") from error
