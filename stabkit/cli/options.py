"""Options that several commands take, and the checks of their values."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabkit.cli.console import say

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The architecture of a state dict: torchvision:NAME, timm:NAME, pkg.mod:factory, file.py:factory.",
        metavar="NAME",
    ),
]
Base = Annotated[
    str | None, typer.Option(help="The model that a LoRA adapter changes: a file or a directory.", metavar="PATH")
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        help="A shape (1x3x64x64), tokens:1x8, text:..., or a .npy, .npz, .pt, .safetensors or image file.",
        metavar="SHAPE|FILE",
    ),
]
Depth = Annotated[
    str, typer.Option(help="Where steps end: auto, cuts, modules, or module paths and globs, comma-separated.")
]
Spectrum = Annotated[
    str, typer.Option(help="Which eigenvalues: auto, dense (all), krylov (the largest), none.", metavar="HOW")
]
Json = Annotated[
    str | None,
    typer.Option("--json", help="Write the report as JSON to a file; - is standard output.", metavar="FILE|-"),
]
FailOn = Annotated[
    str | None,
    typer.Option(
        help="Exit with 1 on a finding of this kind (exploding, vanishing, dead, chaotic, ...) or of at least this "
        "severity (info, warning, critical). Without it, findings do not change the exit code.",
        metavar="KIND|SEVERITY",
    ),
]
Key = Annotated[str | None, typer.Option(help="Where the weights are in the file.")]
Weights = Annotated[str, typer.Option(help="raw or ema, when the file has both.")]
FactoryArgs = Annotated[
    str | None, typer.Option(help="Keyword arguments of the factory, a JSON object.", metavar="JSON")
]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Unpickle whatever the file asks for, which runs its code.")
]
AllowExport = Annotated[
    bool, typer.Option("--allow-export", help="Load a torch.export program (.pt2), whose loader runs what it says.")
]
AllowTorchScript = Annotated[bool, typer.Option("--allow-torchscript", help="Load TorchScript, which is code.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Keep finished checkpoints here, so that an interrupted run goes on where it stopped; .stabkit in --out "
        "by default.",
        metavar="DIR",
    ),
]


@dataclass(frozen=True)
class Recipe:
    """How every checkpoint is loaded and analysed."""

    model: str | None
    input: str | None
    base: str | None
    key: str | None
    weights: str
    factory_args: str | None
    trust_pickle: bool
    allow_export: bool
    allow_torchscript: bool
    depth: str
    spectrum: str
    seed: int

    def loading(self) -> dict[str, Any]:
        """The arguments of ``checkpoints.load`` beside the source."""
        same = ("model", "input", "base", "key", "weights", "trust_pickle", "allow_export", "allow_torchscript", "seed")
        return {
            **{name: getattr(self, name) for name in same},
            "factory_args": json_object("--factory-args", self.factory_args),
        }

    def analysing(self) -> dict[str, Any]:
        """The arguments of ``analyze`` beside the model and its input."""
        where: str | list[str] = self.depth
        if self.depth not in ("auto", "cuts", "modules"):
            where = [part.strip() for part in self.depth.split(",")]
        return {"depth": where, "spectrum": self.spectrum, "seed": self.seed}


def write_json(data: Mapping[str, Any], target: str | None, console: Console) -> None:
    """Write a report where ``--json`` says; nothing without it."""
    from stabkit.report import encoding, files

    if target is None:
        return
    text = encoding.lines(data)
    if target == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        say(console, f"wrote {files.write(Path(target), text.encode())}")


def is_accused(fail_on: str | None, kind: str, severity: str) -> bool:
    """Whether ``--fail-on`` names a finding of this kind and severity."""
    from stabkit.report.schema import SEVERITIES

    wanted = None if fail_on is None else fail_on.replace("-", "_")
    if wanted in SEVERITIES:
        return SEVERITIES.index(severity) >= SEVERITIES.index(wanted)
    return wanted == kind


def json_object(option: str, text: str | None) -> dict[str, Any]:
    """The JSON object that an option's text holds; empty without the option."""
    import json

    from stabkit.errors import StabkitError

    if text is None:
        return {}
    accepted = "expected an object such as '{\"depth\": 8}'"
    try:
        value = json.loads(text)
    except ValueError as error:
        raise StabkitError(f"{option} {text!r} is not JSON ({error}); {accepted}") from None
    if not isinstance(value, dict):
        raise StabkitError(f"{option} {text!r} is a {type(value).__name__}; {accepted}")
    return value


def check_fail_on(wanted: str | None) -> None:
    """A misspelt word would never be found, and so never fail."""
    import difflib

    from stabkit.errors import StabkitError
    from stabkit.report.schema import FINDINGS, SEVERITIES

    accepted = (*SEVERITIES, *FINDINGS)
    if wanted is None or wanted.replace("-", "_") in accepted:
        return
    near = difflib.get_close_matches(wanted, accepted, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    raise StabkitError(f"--fail-on {wanted!r}; accepted: {', '.join(accepted)}{guess}")


def check_targets(out: Path | None, json_: str | None) -> None:
    """Say before a long analysis that its result would have nowhere to go."""
    from stabkit.errors import ReportError

    if out is not None and out.exists() and not out.is_dir():
        raise ReportError(f"--out {out} is a file; name a directory")
    if json_ not in (None, "-") and not Path(str(json_)).absolute().parent.is_dir():
        raise ReportError(f"--json {json_}: the directory does not exist; create it first")
