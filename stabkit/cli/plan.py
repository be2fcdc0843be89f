"""`stabkit plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from stabkit.cli.console import FOUND, guarded, screen, stdout_to_stderr
from stabkit.cli.execution import Budget, Memory, Probes, first_rank, planned
from stabkit.cli.options import (
    Base,
    Debug,
    Depth,
    FactoryArgs,
    Input,
    Json,
    Key,
    ModelName,
    Recipe,
    Seed,
    Spectrum,
    TrustPickle,
    Weights,
    check_targets,
    write_json,
)


def plan(
    source: Annotated[str, typer.Argument(help="A checkpoint file or directory, or a model name, as for analyze.")],
    model: ModelName = None,
    input_: Input = None,
    depth: Depth = "auto",
    spectrum: Spectrum = "auto",
    probes: Probes = 4,
    budget: Budget = None,
    memory: Memory = None,
    json_: Json = None,
    key: Key = None,
    weights: Weights = "raw",
    base: Base = None,
    factory_args: FactoryArgs = None,
    trust_pickle: TrustPickle = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Say what an analysis will cost, before it is run; leave with 1 when none keeps the budget."""
    with guarded(debug):
        from stabkit import checkpoints

        check_targets(None, json_)
        recipe = Recipe(
            model=model,
            input=input_,
            base=base,
            key=key,
            weights=weights,
            factory_args=factory_args,
            trust_pickle=trust_pickle,
            allow_export=False,
            allow_torchscript=False,
            depth=depth,
            spectrum=spectrum,
            seed=seed,
        )
        human = screen(stderr=json_ == "-")
        if not first_rank():
            return
        with stdout_to_stderr():
            loaded = checkpoints.load(source, **recipe.loading())
            found = planned(loaded, recipe, probes=probes, budget=budget, memory=memory)
        human.print(str(found), highlight=False, markup=False, soft_wrap=True)
        write_json(found.to_dict(), json_, human)
        if not found.fits:
            raise typer.Exit(FOUND)
