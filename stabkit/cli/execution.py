"""What `stabkit analyze` does under ``torchrun``, within ``--budget`` and ``--memory``, and with ``--stream``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabkit.cli.imports import quick_imports
from stabkit.errors import StabkitError

if TYPE_CHECKING:
    from stabkit.checkpoints import Loaded
    from stabkit.cli.options import Effort, Recipe
    from stabkit.cli.training import Training
    from stabkit.planning import Plan
    from stabkit.report import Report
    from stabkit.streaming import StreamedProfile
if TYPE_CHECKING:
    import torch


def analyzed(
    loaded: Loaded,
    recipe: Recipe,
    effort: Effort,
    progress: Any = None,
    *,
    training: Training | None = None,
    device: str = "cpu",
    keep: Path | None = None,
) -> Report | None:
    """The report, on the first of the ranks that ``torchrun`` started and None on the others; alone without it.

    Args:
        loaded: the model and its input.
        recipe: how it is analysed.
        effort: how much is measured, and what it may cost in each process.
        progress: called as steps are finished.
        training: says which optimizer the updates are made with, on what schedule; None for none.
        device: where the model runs.
        keep: where a rank writes what it had finished when another one failed.

    Raises:
        StabkitError: not even the least fits the budget, a rank failed, or the model cannot be analysed.
    """
    with quick_imports():
        from stabkit.analysis import analyze
        from stabkit.distributed import session
        from stabkit.tracing.recording.containers import map_tensors

    place = chosen_device(device)
    if place.type != "cpu":
        loaded.model.to(place)
    inputs, kwargs = map_tensors([loaded.inputs, loaded.kwargs], lambda tensor: tensor.to(place))
    with session(keep=keep) as ranks:
        report = analyze(
            loaded.model,
            *inputs,
            kwargs=kwargs,
            loss=loaded.loss,
            name=loaded.name,
            progress=progress if ranks.first else None,
            ranks=ranks,
            trained=loaded.trained,
            **({} if training is None else training.updates_of(loaded.model)),
            **effort.settings(),
            **recipe.analysing(),
        )
        return report if ranks.first else None


def planned(loaded: Loaded, recipe: Recipe, effort: Effort) -> Plan:
    """What `analyzed` will cost in one process."""
    from stabkit.planning import plan

    return plan(
        loaded.model,
        *loaded.inputs,
        kwargs=loaded.kwargs,
        loss=loaded.loss,
        **effort.settings(),
        **recipe.analysing(),
    )


def first_rank() -> bool:
    """Whether this process is the one that speaks: alone, or the first that ``torchrun`` started."""
    import os

    return os.environ.get("RANK", "0") == "0"


def streamed(
    folder: Path,
    recipe: Recipe,
    effort: Effort,
    progress: Any = None,
    *,
    device: str = "cpu",
    out: Path | None = None,
) -> StreamedProfile | None:
    """What `stabkit analyze DIR --stream` measures: a Hugging Face directory, one block of weights at a time.

    None on all ranks but the first that ``torchrun`` started.

    Args:
        folder: the directory.
        recipe: the input, 16 random tokens by default; the seed; whether singular values are wanted.
        effort: how many random cotangents each sample gets.
        progress: called as blocks are finished.
        device: where blocks run.
        out: where states and finished blocks are kept, so that an interrupted run goes on.

    Raises:
        StabkitError: the directory cannot be read, or its blocks form no chain.
    """
    from stabkit.checkpoints.inputs import make_inputs
    from stabkit.distributed import session
    from stabkit.streaming import analyze_files
    from stabkit.streaming.meta_model import skeleton
    from stabkit.streaming.weights import WeightFiles

    place = chosen_device(device)
    bare = skeleton(folder, WeightFiles(folder).shapes)
    made = make_inputs(bare, recipe.input or "tokens:1x16", seed=recipe.seed)
    with session(keep=out) as ranks:
        found = analyze_files(
            folder,
            *made.args,
            kwargs=made.kwargs,
            seed=recipe.seed,
            probes=effort.probes,
            k=0 if recipe.spectrum == "none" else 1,
            device=place,
            out=None if out is None else out / "blocks",
            progress=progress if ranks.first else None,
            ranks=ranks,
        )
    return found if ranks.first else None


def chosen_device(name: str) -> torch.device:
    """The device that ``--device`` names; of several ranks on one host, each has its own.

    Raises:
        StabkitError: there is no such device.
    """
    import torch

    try:
        device = torch.device(name)
        if device.type == "cuda" and ":" not in name and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise StabkitError(
            f"--device {name!r} cannot be used: {why}; expected cpu, or a device that torch sees"
        ) from None
    if device.type == "meta":
        raise StabkitError("--device 'meta' holds no numbers; expected cpu or cuda")
    return device
