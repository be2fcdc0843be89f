"""One recipe of analysis run over many checkpoints, one at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stabkit.analysis import analyze
from stabkit.arguments import accepts
from stabkit.checkpoints import load
from stabkit.checkpoints.inputs import Input, Inputs
from stabkit.checkpoints.load import Loaded
from stabkit.checkpoints.matching import release_parameters
from stabkit.checkpoints.model_names import Model, build_model
from stabkit.checkpoints.training_progress import natural_order, step_in_name
from stabkit.comparison import cache as cached
from stabkit.comparison.cache import content_hash, recipe_hash
from stabkit.comparison.result import Comparison, Snapshot
from stabkit.diagnosis import Thresholds
from stabkit.distributed import current
from stabkit.errors import ArgumentTypeError, CheckpointError, StabkitError, did_you_mean
from stabkit.hashing import content_key
from stabkit.tracing.cutting.boundaries import Depth

Progress = Callable[[int, int, str], None]


@accepts
def compare(
    sources: Sequence[str | os.PathLike[str]],
    *,
    model: Model | None = None,
    input: Input | None = None,
    over_time: bool = False,
    cache: str | os.PathLike[str] | None = None,
    loss: Callable[[Any], torch.Tensor] | None = None,
    depth: Depth = "auto",
    batch_dim: int | None = 0,
    spectrum: str = "auto",
    thresholds: Thresholds | None = None,
    seed: int = 0,
    factory_args: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Comparison:
    """The same analysis of one model at several checkpoints, with what changed between them.

    All checkpoints get the same input. One is in memory at a time. A checkpoint that cannot be read, or whose weights
    are not finite, is a snapshot that says so; the others are analysed all the same.

    A lesson with a picture: ``examples/checkpoint_sweep.py``.

    Args:
        sources: checkpoints, as `stabkit.load` takes them.
        model: their architecture, as `stabkit.load` takes it. A module comes back as it was.
        input: as `stabkit.load` takes it; without it, the model is asked once.
        over_time: order the snapshots by training step, read from the files or from their names.
        cache: a directory for finished checkpoints, by the hash of their content and of everything that decides the
            result: a second run takes them from there.
        loss: as `stabkit.analyze` takes it, like ``depth``, ``batch_dim``, ``spectrum``, ``thresholds`` and ``seed``.
        depth: where steps end.
        batch_dim: which dimension counts samples.
        spectrum: which eigenvalues.
        thresholds: the limits behind the verdict.
        seed: the seed of every random choice.
        factory_args: keyword arguments of the factory.
        progress: called with (done, total, source) before each checkpoint and at the end.
        **options: further arguments of `stabkit.load`: ``key``, ``weights``, ``base``, ``trust_pickle``, ...

    Raises:
        CheckpointError: there are no sources, or none could be analysed.

    Example:
        >>> import tempfile, torch
        >>> layer = lambda gain: {"weight": gain * torch.eye(3)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for epoch, gain in enumerate([1.0, 0.5]):
        ...         torch.save({"model": layer(gain), "epoch": epoch}, f"{folder}/{epoch}.pt")
        ...     found = compare([f"{folder}/{e}.pt" for e in (1, 0)], over_time=True, input="2x3",
        ...                     model=lambda: nn.Linear(3, 3, bias=False))
        >>> [snapshot.step for snapshot in found.snapshots], found.growth.round(3).tolist()
        ([0.0, 1.0], [[0.0], [-0.693]])
    """
    taken = inspect.signature(load).parameters
    for name in options:
        if name not in taken:
            raise ArgumentTypeError(f"compare: got an unexpected keyword argument {name!r}{did_you_mean(name, taken)}")
    named = [str(source) for source in sources]
    if not named:
        raise CheckpointError("there are no checkpoints to compare; give at least one")
    if isinstance(options.get("base"), nn.Module):
        raise CheckpointError(
            "base is a module, into which one adapter after another would be merged; give its file or directory"
        )
    if over_time:
        named = sorted(named, key=natural_order)
    with contextlib.ExitStack() as stack:
        built = None
        if model is not None:
            built, _ = build_model(model, factory_args=factory_args, seed=seed)
            if built is model:  # one that was built here has no weights worth keeping
                stack.enter_context(_put_back(built))
        runner = _Runner(
            module=built,
            input=input,
            factory_args={} if built is not None else dict(factory_args or {}),
            loading={"seed": seed, **options},
            analysis={
                "depth": depth,
                "batch_dim": batch_dim,
                "spectrum": spectrum,
                "thresholds": thresholds,
                "seed": seed,
            },
            loss=loss,
            folder=None if cache is None else Path(cache),
        )
        snapshots = []
        for index, source in enumerate(named):
            if progress is not None:
                progress(index, len(named), source)
            snapshots.append(runner.run(source))
    if progress is not None:
        progress(len(named), len(named), "")
    if all(snapshot.state == "failed" for snapshot in snapshots):
        raise CheckpointError(f"none of {len(named)} checkpoints could be analysed. {snapshots[0].message}")
    return _ordered(snapshots, over_time)


@dataclass
class _Runner:
    """Analyses one source after another with the same module, where there is one, and the same input."""

    module: nn.Module | None
    input: Input | None
    factory_args: dict[str, Any]
    loading: dict[str, Any]
    analysis: dict[str, Any]
    loss: Callable[[Any], torch.Tensor] | None
    folder: Path | None
    inputs: Inputs | None = None
    first: str = ""  # the checkpoint whose input all get, once there is one
    first_content: str = ""

    def run(self, source: str) -> Snapshot:
        content, path = "", Path(source).expanduser()
        if self.folder is not None:
            # a model name has no content; of a file that is not there, loading says what is wrong
            with contextlib.suppress(OSError, ValueError):
                before = cached.state_of_files(path)
                content = content_hash(path)
        key = self._key(path, content)
        if key and self.folder is not None:
            found = cached.fetch(self.folder, key, source)
            # where ranks share the work, all of them have to do it, or none
            if all(current().gather(found is not None)) and found is not None:
                self._is_first(source, content)
                return found
        try:
            snapshot = self._analysed(source, content)
        except StabkitError as error:
            return Snapshot(source, "failed", content=content, message=str(error))
        finally:
            if self.module is not None:
                release_parameters(self.module)
        self._is_first(source, content)
        if key and self.folder is not None and _is_still(path, before):
            cached.store(self.folder, key, snapshot)
        return snapshot

    def _is_first(self, source: str, content: str) -> None:
        if not self.first:
            self.first, self.first_content = source, content

    def _key(self, path: Path, content: str) -> str:
        """Of a result; empty where something that decides it cannot be known."""
        given = self.input is not None and not isinstance(self.input, str | Path)
        if not (content and self._recipe and (given or not self.first or self.first_content)):
            return ""
        decides = self._recipe, content, step_in_name(path), "" if given else self.first_content
        return content_key(*decides)

    def _analysed(self, source: str, content: str) -> Snapshot:
        if self.inputs is None and self.first:  # what was found of it says nothing of its input
            self._loaded(self.first)
        loaded = self._loaded(source)
        name, step = loaded.step if loaded.step is not None else ("", None)
        snapshot = Snapshot(source, "analysed", step, name, content)
        if loaded.non_finite:
            shown = ", ".join(loaded.non_finite[:5]) + " ..." * (len(loaded.non_finite) > 5)
            return dataclasses.replace(
                snapshot, state="non-finite", message=f"NaN or infinity in {len(loaded.non_finite)} tensors: {shown}"
            )
        report = analyze(
            loaded.model,
            *loaded.inputs,
            kwargs=loaded.kwargs,
            loss=self.loss,
            name=source,
            **self.analysis,
        )
        return dataclasses.replace(snapshot, report=report)

    def _loaded(self, source: str) -> Loaded:
        """A checkpoint; every later one gets the input of the first."""
        given = self.inputs if self.inputs is not None else self.input
        loaded = load(source, model=self.module, input=given, factory_args=self.factory_args, **self.loading)
        if self.inputs is None:
            self.inputs = Inputs(loaded.inputs, "that of the first checkpoint", loaded.kwargs)
        return loaded

    @cached_property
    def _recipe(self) -> str:
        """A hash of everything but the checkpoint; empty when part of it cannot be known."""
        loading = dict(self.loading)
        if self.module is None and loading.get("trust_pickle"):
            return ""  # the file names classes whose code is not read yet
        base = loading.pop("base", None)
        if isinstance(base, str | Path) and Path(base).expanduser().exists():
            loading["base"] = content_hash(Path(base).expanduser())
        elif base is not None:
            return ""
        thresholds = self.analysis["thresholds"] or Thresholds()
        recipe = {
            "arguments": self.factory_args,
            "input": _content_of(self.input),
            "loss": self.loss,
            "loading": loading,
            "analysis": {**self.analysis, "thresholds": thresholds.to_dict()},
        }
        return recipe_hash(recipe, *([] if self.module is None else [self.module]))


def _content_of(given: Input | None) -> Any:
    """An input; in the place of a file what is in it."""
    if isinstance(given, str | Path) and len(str(given)) < 1024 and Path(given).expanduser().is_file():
        return "file", Path(given).suffix, content_hash(Path(given).expanduser())
    return given


def _is_still(path: Path, before: object) -> bool:
    """Whether the files are those that were read."""
    try:
        return cached.state_of_files(path) == before
    except OSError:
        return False


@contextlib.contextmanager
def _put_back(module: nn.Module) -> Iterator[None]:
    """Weights, buffers and training flags as they were before; no copy is made, only references are kept."""
    tensors = [*module.parameters(), *module.buffers()]
    before = [(tensor, tensor.data) for tensor in tensors]
    flags = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for tensor, data in before:
            tensor.data = data
        for part, flag in flags:
            part.training = flag


def _ordered(snapshots: list[Snapshot], over_time: bool) -> Comparison:
    notes = []
    if over_time:
        counted = {snapshot.step_name for snapshot in snapshots if snapshot.state != "failed"}
        if len(counted) == 1 and counted != {""}:
            last = float("inf")
            snapshots = sorted(snapshots, key=lambda s: last if s.step is None else s.step)
            notes.append(f"ordered by {next(iter(counted))}")
        else:
            notes.append("ordered by file name: the checkpoints do not all count their steps in the same way")
    result = Comparison(tuple(snapshots), over_time, tuple(notes))
    if not result.step_names and len(result.analysed) > 1:
        said = "the checkpoints do not have the same steps: growths are compared as totals only"
        result = dataclasses.replace(result, notes=(*notes, said))
    return result
