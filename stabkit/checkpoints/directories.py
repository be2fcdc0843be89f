"""Directories that hold a checkpoint in a form that another tool has to convert first."""

from __future__ import annotations

from pathlib import Path

from stabkit.errors import CheckpointError

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


def refuse_other_directories(folder: Path) -> None:
    """Recognise distributed checkpoints, adapters and pipelines, and name what turns them into one model.

    Only file names are looked at.

    Raises:
        CheckpointError: the directory is one of these, or cannot be listed.
    """
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}") from error
    if any(name in _SINGLE or name.endswith(".index.json") for name in names if name != "model_index.json"):
        return  # a trainer leaves whole weights beside its sharded state
    if (sharded := next((p for p in _with_children(folder) if _is_distributed(p)), None)) is not None:
        raise CheckpointError(
            f"{sharded} is a distributed checkpoint (DCP, FSDP), whose metadata is a pickle and is not read; convert "
            f"it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {sharded} model.pt"
        )
    if any(any(p.glob("zero_pp_rank_*")) for p in _with_children(folder)):
        raise CheckpointError(
            f"{folder} is a DeepSpeed ZeRO checkpoint, split over its ranks; convert it with the script that DeepSpeed "
            f"puts beside it: python zero_to_fp32.py {folder} model.pt"
        )
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{folder} is a LoRA adapter: it changes a base model, which adapter_config.json names, and is none by "
            "itself. Merge it (peft: model.merge_and_unload()), save that, and give that directory"
        )
    if "model_index.json" in names:
        parts = [n for n in names if (folder / n / "config.json").exists()]
        raise CheckpointError(f"{folder} is a diffusers pipeline of several models; give one: {', '.join(parts)}")
    files = [n for n in names if n.endswith(_WEIGHTS)]
    raise CheckpointError(
        f"{folder} has no weights by their usual name ({', '.join(_SINGLE)}); "
        + ("give one of its files: " if files else "it holds ")
        + (", ".join((files or names)[:8]) or "nothing")
    )


def _with_children(folder: Path) -> list[Path]:
    return [folder, *(child for child in sorted(folder.iterdir()) if child.is_dir())]


def _is_distributed(folder: Path) -> bool:
    return (folder / ".metadata").exists() or any(folder.glob("*.distcp"))
