"""What `stabkit analyze` does under ``torchrun``, within ``--budget`` and ``--memory``, and with ``--stream``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from stabkit.checkpoints import Loaded
    from stabkit.cli.options import Recipe
    from stabkit.planning import Plan
    from stabkit.report import Report
    from stabkit.streaming import StreamedProfile

Budget = Annotated[
    str | None,
    typer.Option(
        help="Time that the analysis may take (90s, 10m, 2h); samples, probes and spectra are left out to keep it.",
        metavar="TIME",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(help="Memory that the process may use (8G, 512M); the same is left out.", metavar="BYTES"),
]
Device = Annotated[
    str,
    typer.Option(help="Where the model runs: cpu, cuda (under torchrun, each rank its own), cuda:1.", metavar="NAME"),
]
Probes = Annotated[int, typer.Option(min=1, help="Random cotangents per sample.")]


def analyzed(
    loaded: Loaded,
    recipe: Recipe,
    progress: Any = None,
    *,
    device: str = "cpu",
    probes: int = 4,
    budget: str | None = None,
    memory: str | None = None,
    keep: Path | None = None,
) -> Report | None:
    """The report, on the first of the ranks that ``torchrun`` started and None on the others; alone without it.

    Args:
        loaded: the model and its input.
        recipe: how it is analysed.
        progress: called as steps are finished.
        device: where the model runs.
        probes: random cotangents per sample.
        budget: time that the analysis may take.
        memory: that each process may use.
        keep: where a rank writes what it had finished when another one failed.

    Raises:
        StabkitError: not even the least fits the budget, a rank failed, or the model cannot be analysed.
    """
    from stabkit.analysis import analyze
    from stabkit.distributed import session
    from stabkit.tracing.containers import map_tensors

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
            probes=probes,
            budget=budget,
            memory=memory,
            **recipe.analysing(),
        )
        return report if ranks.first else None


def planned(
    loaded: Loaded, recipe: Recipe, *, probes: int = 4, budget: str | None = None, memory: str | None = None
) -> Plan:
    """What `analyzed` will cost in one process."""
    from stabkit.planning import plan

    return plan(
        loaded.model,
        *loaded.inputs,
        kwargs=loaded.kwargs,
        loss=loaded.loss,
        probes=probes,
        budget=budget,
        memory=memory,
        **recipe.analysing(),
    )


def chosen_device(name: str) -> torch.device:
    """The device that ``--device`` names; of several ranks on one host, each has its own.

    Raises:
        StabkitError: there is no such device.
    """
    import os

    import torch

    from stabkit.errors import StabkitError

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


def first_rank() -> bool:
    """Whether this process is the one that speaks: alone, or the first that ``torchrun`` started."""
    import os

    return os.environ.get("RANK", "0") == "0"


def streamed(
    folder: Path,
    input_: str | None,
    seed: int,
    progress: Any = None,
    *,
    device: str = "cpu",
    probes: int = 4,
    values: int = 1,
    out: Path | None = None,
) -> StreamedProfile | None:
    """What `stabkit analyze DIR --stream` measures: a Hugging Face directory, one block of weights at a time.

    None on all ranks but the first that ``torchrun`` started.

    Args:
        folder: the directory.
        input_: as ``--input`` describes it; 16 random tokens by default.
        seed: of the input and the probes.
        progress: called as blocks are finished.
        device: where blocks run.
        probes: random cotangents per sample.
        values: singular values of every block.
        out: where states and finished blocks are kept, so that an interrupted run goes on.

    Raises:
        StabkitError: the directory cannot be read, or its blocks form no chain.
    """
    from stabkit.checkpoints.inputs import make_inputs
    from stabkit.distributed import session
    from stabkit.streaming import analyze_files
    from stabkit.streaming.meta_model import skeleton

    place = chosen_device(device)
    made = make_inputs(skeleton(folder), input_ or "tokens:1x16", seed=seed)
    with session(keep=out) as ranks:
        found = analyze_files(
            folder,
            *made.args,
            kwargs=made.kwargs,
            seed=seed,
            probes=probes,
            k=values,
            device=place,
            out=None if out is None else out / "blocks",
            progress=progress if ranks.first else None,
            ranks=ranks,
        )
    return found if ranks.first else None
