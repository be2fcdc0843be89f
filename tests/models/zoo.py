"""The zoo: unmodified models, traced, and compared with an ordinary forward and backward of their own.

A `Subject` says how to build a model and what a person would count in it; `examine` traces it and measures; `table`
prints how many of how many pass each column, with the cause of every failure. What `examine` compares with is made
by plain calls of the model and by ``loss.backward()``, never by the code under test.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stabkit.errors import StabkitError
from stabkit.tracing import Flow, trace

from .fingerprint import differences, fingerprint
from .ordinary import frozen, ordinary_gradient, pick, plain_call, relative, restored
from .preparation import SEED, Built, cast, fill_zero_weights, kept_random_state, mark_gradients


@dataclass(frozen=True)
class Subject:
    """One model of the zoo and what a person would say about it.

    Attributes:
        name: unique in its family, e.g. ``"resnet18"``.
        build: returns the model, its positional arguments and its keyword arguments; called with a fixed seed.
        steps: number of repeated blocks that a person would name; None when there is no opinion.
        blocks: regular expression that a block's module path or class name matches in full.
        dtype: what model and float inputs are cast to; None leaves them as built.
        tolerance: accepted relative error of the chain and of the replay; larger only where a library computes in
            float32 whatever the dtype of the model (then `note` says where).
        target: passed on to `trace`; None is the first output that is not a loss.
        options: further keyword arguments of `trace`, such as ``batch_dim``.
        family: heading in the table.
        fast: whether it belongs to the subset that runs without the ``zoo`` marker.
        independent: whether an ordinary backward pass of the whole model exists to compare with.
        note: what a reader of the table should know.
    """

    name: str
    build: Callable[[], Built]
    steps: int | None = None
    blocks: str = ""
    dtype: torch.dtype | None = torch.float64
    tolerance: float = 1e-10
    target: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""
    fast: bool = False
    independent: bool = True
    note: str = ""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Result:
    """What `examine` found; errors are NaN where they could not be measured.

    Attributes:
        chain_error: relative difference that `trace` itself reports between the chain and the engine.
        independent_error: relative difference between the product of the step VJPs and the gradient of an ordinary
            forward and backward pass of the model.
        replay_error: relative difference between the last state and the output of an ordinary call.
        unchanged: whether parameters, buffers, gradients, flags, hooks, random state and inputs are bit for bit what
            they were.
        blocks: how many steps are blocks of the pattern that the subject gave.
        seconds: processor time for building, calling, tracing and comparing.
        failure: the cause, empty when everything passes.
    """

    subject: Subject
    traced: bool = False
    chain_error: float = math.nan
    independent_error: float = math.nan
    replay_error: float = math.nan
    unchanged: bool = False
    n_steps: int = 0
    blocks: int = 0
    expected: int | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether every column passes."""
        return not self.failure

    def columns(self) -> dict[str, bool | None]:
        """Pass, fail or (None) not applicable, per column of the table."""
        tolerance = self.subject.tolerance
        return {
            "traced": self.traced,
            "chain": self.chain_error <= tolerance,
            "own backward": self.independent_error <= tolerance if self.subject.independent else None,
            "replay": self.replay_error <= tolerance,
            "unchanged": self.unchanged,
            "steps": None if self.expected is None else self.blocks == self.expected,
        }


# ---------------------------------------------------------------- examining one subject


def examine(subject: Subject) -> Result:
    """Build, call, trace and compare one subject; anything that goes wrong ends up in ``failure``."""
    start = time.process_time()
    found: dict[str, Any] = {"expected": subject.steps}
    with warnings.catch_warnings(), kept_random_state():
        warnings.simplefilter("ignore")  # the libraries' own: deprecations, missing kernels, slow paths
        try:
            _examine(subject, found)
        except Exception as error:  # the table shows it; one bad subject must not hide the others
            found["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    gc.collect()
    result = Result(subject, seconds=time.process_time() - start, **found)
    inexact = _inexact(result) if result.traced else ""
    return dataclasses.replace(result, failure="; ".join(filter(None, [result.failure, inexact])))


def _examine(subject: Subject, found: dict[str, Any]) -> None:
    torch.manual_seed(SEED)
    model, args, kwargs = subject.build()
    if subject.dtype is not None:
        model, args, kwargs = cast(model, args, kwargs, subject.dtype)
    fill_zero_weights(model)
    mark_gradients(model)
    with restored(model):
        plain = plain_call(model, args, kwargs)
    before = fingerprint(model, args, kwargs)
    try:
        flow = trace(model, *args, kwargs=kwargs, target=subject.target, seed=SEED, **subject.options)
    finally:
        changes = differences(before, fingerprint(model, args, kwargs))
        found["unchanged"] = not changes
    found.update(traced=True, chain_error=flow.chain_error, n_steps=len(flow.steps), notes=flow.notes)
    found["replay_error"] = relative(flow.states[-1].tensors[0], pick(plain, subject.target, flow.target_name))
    found["blocks"], inside = count_blocks(flow, subject.blocks)
    problems = [f"changed by the trace: {', '.join(changes[:4])}"] if changes else []
    problems += _miscounted(flow, subject, found["blocks"], inside)
    found["failure"] = "; ".join(problems)
    if subject.independent:
        cotangents = random_cotangents(flow)
        pulled = pulled_back(flow, cotangents)
        later = differences(before, fingerprint(model, args, kwargs))
        if later and not changes:
            raise StabkitError(f"changed by the VJPs: {', '.join(later[:4])}")
        with restored(model), frozen(model):
            truth = ordinary_gradient(flow, subject.target, model, args, kwargs, cotangents[0])
        if not bool((truth != 0).any()):
            raise StabkitError("the model's own gradient is zero: any chain would pass")
        found["independent_error"] = relative(pulled[0], truth)


def _miscounted(flow: Flow, subject: Subject, blocks: int, inside: list[str]) -> list[str]:
    if subject.steps is None:
        return []
    problems = [f"boundaries inside a block: {', '.join(inside[:4])}"] if inside else []
    if blocks != subject.steps:
        names = ", ".join(f"{step.name} ({step.module_class})" for step in flow.steps)
        problems.append(f"{blocks} blocks instead of {subject.steps}; the steps are: {names[:300]}")
    return problems


def _inexact(result: Result) -> str:
    errors = {"chain": result.chain_error, "own backward": result.independent_error, "replay": result.replay_error}
    columns = result.columns()
    return ", ".join(f"{name} off by {error:.1e}" for name, error in errors.items() if columns[name] is False)


def count_blocks(flow: Flow, pattern: str) -> tuple[int, list[str]]:
    """How many steps are whole blocks, and the steps that are only a part of one."""
    if not pattern:
        return 0, []
    blocks = {
        path
        for path, module in flow.model.named_modules()
        if path and (re.fullmatch(pattern, path) or re.fullmatch(pattern, type(module).__name__))
    }
    whole = [step for step in flow.steps if step.module_path in blocks]
    inside = [
        step.name
        for step in flow.steps
        if step.module_path not in blocks and any(step.module_path.startswith(f"{path}.") for path in blocks)
    ]
    return len(whole), inside


def random_cotangents(flow: Flow) -> list[Tensor]:
    """Normal noise in the shape of the last state."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in flow.states[-1].tensors]


def pulled_back(flow: Flow, cotangents: list[Tensor]) -> list[Tensor]:
    """The product of all step VJPs."""
    for step in reversed(flow.steps):
        cotangents = step.vjp(cotangents)
    return cotangents


# ---------------------------------------------------------------- the table


def table(results: Sequence[Result]) -> str:
    """Passes of every column per family, and each failure with its cause."""
    families = list(dict.fromkeys(result.subject.family for result in results))
    names = list(results[0].columns()) if results else []
    rows = [["family", "models", *names, "seconds"]]
    for family in [*families, None] if len(families) > 1 else families:
        group = [r for r in results if family is None or r.subject.family == family]
        cells = [_tally([r.columns()[name] for r in group]) for name in names]
        total = f"{sum(r.seconds for r in group):.0f}"
        rows.append(["all" if family is None else family, str(len(group)), *cells, total])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    failures = [result for result in results if not result.passed]
    lines.append("")
    lines.append(f"{len(results) - len(failures)} of {len(results)} pass every column")
    lines.extend(f"FAILED {r.subject.family} {r.subject.name}: {r.failure}" for r in failures)
    looser = [r for r in results if r.subject.tolerance > 1e-10]
    lines.extend(f"note: {r.subject.name} to {r.subject.tolerance:.0e}: {r.subject.note}" for r in looser)
    return "\n".join(lines)


def _tally(passes: Sequence[bool | None]) -> str:
    asked = [p for p in passes if p is not None]
    return f"{sum(asked)}/{len(asked)}" if asked else "-"
