"""`stabkit plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabkit.cli.console import FOUND, guarded, screen, stdout_to_stderr
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

if TYPE_CHECKING:
    from stabkit.checkpoints import Loaded
    from stabkit.planning import Plan

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


def plan(
    source: Annotated[str, typer.Argument(help="A checkpoint file or directory, or a model name, as for analyze.")],
    model: ModelName = None,
    input_: Input = None,
    depth: Depth = "auto",
    spectrum: Spectrum = "auto",
    probes: Annotated[int, typer.Option(min=1, help="Random cotangents per sample.")] = 4,
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
        with stdout_to_stderr():
            found = planned(checkpoints.load(source, **recipe.loading()), recipe, budget, memory, probes=probes)
        human.print(str(found), highlight=False, markup=False, soft_wrap=True)
        write_json(found.to_dict(), json_, human)
        if not found.fits:
            raise typer.Exit(FOUND)


def planned(loaded: Loaded, recipe: Recipe, budget: str | None, memory: str | None, **options: Any) -> Plan:
    """The plan for what was loaded, with the options of the command line."""
    from stabkit.planning import plan as price

    return price(
        loaded.model,
        *loaded.inputs,
        kwargs=loaded.kwargs,
        budget=budget,
        memory=memory,
        **recipe.analysing(),
        **options,
    )


def within_budget(
    loaded: Loaded, recipe: Recipe, budget: str | None, memory: str | None
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """What `stabkit analyze --budget --memory` runs: inputs, keyword arguments, options, and what was given up.

    Raises:
        StabkitError: not even the least fits.
    """
    from stabkit.errors import StabkitError

    found = planned(loaded, recipe, budget, memory)
    if not found.fits:
        raise StabkitError(
            f"no analysis of this model keeps --budget {budget} --memory {memory}; the least that one takes:\n{found}"
        )
    inputs, kwargs = found.call(*loaded.inputs, kwargs=loaded.kwargs)
    options = {**recipe.analysing(), **found.arguments()}
    return inputs, kwargs, options, tuple(f"left out to keep the budget: {words}" for words in found.given_up)
