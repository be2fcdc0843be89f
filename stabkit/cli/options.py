"""Options that several commands take: each is declared once, in the group that it belongs to.

A command names the groups that it takes as parameters; `command` gives it one option for every field of them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json as json_module
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from stabkit.cli.console import guarded, say, screen
from stabkit.cli.imports import import_torchvision, quick_imports
from stabkit.errors import ReportError, StabkitError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from stabkit.checkpoints import Loaded

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Keep finished checkpoints here, so that an interrupted run goes on where it stopped; .stabkit in --out "
        "by default.",
        metavar="DIR",
    ),
]
Device = Annotated[
    str,
    typer.Option(help="Where the model runs: cpu, cuda (under torchrun, each rank its own), cuda:1.", metavar="NAME"),
]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A function as a command for typer, with ``--debug``; what goes wrong in it is told in one line.

    A parameter whose type is one of the dataclasses below becomes one option for each of its fields.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {}
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            groups[name] = hints[name]
            parameters += _options(hints[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
    parameters.append(inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug))

    @functools.wraps(function)
    def run(**values: Any) -> None:
        with guarded(values.pop("debug")):
            for name, group in groups.items():
                values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            function(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(group)
    ]


def given(group: Any, *, but: tuple[str, ...] = ()) -> list[str]:
    """The options of a group that have another value than by default, as they are written: ``["--trust-pickle"]``."""
    names = [f.name for f in dataclasses.fields(group) if f.name not in but and getattr(group, f.name) != f.default]
    return [f"--{name.replace('_', '-')}" for name in names]


@dataclass(frozen=True)
class Loading:
    """What model and input a source stands for."""

    model: Annotated[
        str | None,
        typer.Option(
            help="The architecture of a state dict: torchvision:NAME, timm:NAME, pkg.mod:factory, file.py:factory.",
            metavar="NAME",
        ),
    ] = None
    input: Annotated[
        str | None,
        typer.Option(
            help="A shape (1x3x64x64), tokens:1x8, text:..., or a .npy, .npz, .pt, .safetensors or image file.",
            metavar="SHAPE|FILE",
        ),
    ] = None
    seed: Seed = 0
    key: Annotated[str | None, typer.Option(help="Where the weights are in the file.")] = None
    weights: Annotated[
        str, typer.Option(help="raw or ema, when the file has both; step for those of a capsule's own step.")
    ] = "raw"
    base: Annotated[
        str | None, typer.Option(help="The model that a LoRA adapter changes: a file or a directory.", metavar="PATH")
    ] = None
    factory_args: Annotated[
        str | None, typer.Option(help="Keyword arguments of the factory, a JSON object.", metavar="JSON")
    ] = None
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Unpickle whatever the file asks for, which runs its code.")
    ] = False
    allow_export: Annotated[
        bool, typer.Option("--allow-export", help="Load a torch.export program (.pt2), whose loader runs what it says.")
    ] = False
    allow_torchscript: Annotated[bool, typer.Option("--allow-torchscript", help="Load TorchScript, which is code.")] = (
        False
    )

    def loading(self) -> dict[str, Any]:
        """The arguments of ``checkpoints.load`` beside the source."""
        same = {field.name: getattr(self, field.name) for field in dataclasses.fields(Loading)}
        return {**same, "factory_args": _json_object("--factory-args", self.factory_args)}

    def load(self, source: str) -> Loaded:
        """The model and the input.

        Raises:
            CheckpointError: there is no such source, or it cannot be read.
        """
        with quick_imports():
            from stabkit import checkpoints

            if any(str(name).startswith(("torchvision:", "timm:")) for name in (source, self.model)):
                import_torchvision()
        return checkpoints.load(source, **self.loading())


@dataclass(frozen=True)
class Recipe(Loading):
    """How every checkpoint is loaded and analysed."""

    depth: Annotated[
        str, typer.Option(help="Where steps end: auto, cuts, modules, or module paths and globs, comma-separated.")
    ] = "auto"
    spectrum: Annotated[
        str,
        typer.Option(
            help="Which eigenvalues: auto (what 25 training steps pay for), full, dense (all), krylov (the largest), "
            "none.",
            metavar="HOW",
        ),
    ] = "auto"

    def analysing(self) -> dict[str, Any]:
        """The arguments of ``analyze`` beside the model and its input."""
        where: str | list[str] = self.depth
        if self.depth not in ("auto", "cuts", "modules"):
            where = [part.strip() for part in self.depth.split(",")]
        return {"depth": where, "spectrum": self.spectrum, "seed": self.seed}


@dataclass(frozen=True)
class Effort:
    """How much is measured, and what it may cost."""

    probes: Annotated[int, typer.Option(min=1, help="Random cotangents per sample.")] = 4
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time that the analysis may take (90s, 10m, 2h); samples, probes and spectra are left out to keep it.",
            metavar="TIME",
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(help="Memory that the process may use (8G, 512M); the same is left out.", metavar="BYTES"),
    ] = None

    def settings(self) -> dict[str, Any]:
        """The arguments of ``analyze`` and of ``plan``."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class JsonOutput:
    """The result as data."""

    json: Annotated[
        str | None,
        typer.Option(help="Write the result as JSON to a file; - is standard output.", metavar="FILE|-"),
    ] = None

    def check(self) -> None:
        """Say before a long analysis that its result would have nowhere to go.

        Raises:
            ReportError: it would.
        """
        if self.json not in (None, "-") and not Path(str(self.json)).absolute().parent.is_dir():
            raise ReportError(f"--json {self.json}: the directory does not exist; create it first")

    def screen(self) -> Console:
        """Where people read: standard error when the JSON goes to standard output."""
        return screen(stderr=self.json == "-")

    def write_json(self, data: Mapping[str, Any]) -> None:
        """Write the result where ``--json`` says; nothing without it."""
        from stabkit.report import encoding, files

        if self.json is None:
            return
        text = encoding.lines(data)
        if self.json == "-":
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            say(self.screen(), f"wrote {files.write(Path(self.json), text.encode())}")


@dataclass(frozen=True)
class Output(JsonOutput):
    """Where the result goes, and what makes the command fail."""

    out: Annotated[Path | None, typer.Option(help="Write the report here: HTML, JSON and pictures.", metavar="DIR")] = (
        None
    )
    fail_on: Annotated[
        str | None,
        typer.Option(
            help="Exit with 1 on a finding of this kind (exploding, vanishing, dead, chaotic, ...) or of at least this "
            "severity (info, warning, critical). Without it, findings do not change the exit code.",
            metavar="KIND|SEVERITY",
        ),
    ] = None

    def check(self) -> None:
        """Say before a long analysis that its result would have nowhere to go, or could never fail.

        Raises:
            StabkitError: it would not.
        """
        self._check_fail_on()
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise ReportError(f"--out {self.out} is a file; name a directory")
        super().check()

    def _check_fail_on(self) -> None:
        """A misspelt word would never be found, and so never fail."""
        from stabkit.diagnosis.kinds import FINDINGS, SEVERITIES

        accepted = (*SEVERITIES, *FINDINGS)
        if self.fail_on is None or self.fail_on.replace("-", "_") in accepted:
            return
        guess = did_you_mean(self.fail_on, accepted)
        raise StabkitError(f"--fail-on {self.fail_on!r}; accepted: {', '.join(accepted)}{guess}")

    def accuses(self, kind: str, severity: str) -> bool:
        """Whether ``--fail-on`` names a finding of this kind and severity."""
        from stabkit.diagnosis.kinds import accused

        return accused(self.fail_on, kind, severity)


def _json_object(option: str, text: str | None) -> dict[str, Any]:
    """The JSON object that an option's text holds; empty without the option."""
    if text is None:
        return {}
    accepted = "expected an object such as '{\"depth\": 8}'"
    try:
        value = json_module.loads(text)
    except ValueError as error:
        raise StabkitError(f"{option} {text!r} is not JSON ({error}); {accepted}") from None
    if not isinstance(value, dict):
        raise StabkitError(f"{option} {text!r} is a {type(value).__name__}; {accepted}")
    return value
