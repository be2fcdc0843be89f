"""``python -m tests.models.comes_back [--only PATTERN]``: awkward models, every analyzer, what is not put back.

A cell is a model and an analyzer. It fails where anything of the model, of what it is called with, of what hangs on it
or of the process is not bit for bit what it was; where two calls give different numbers; or where the analyzer raises
anything but a `StabkitError`.
"""

from __future__ import annotations

import argparse
import random
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import stabkit
from stabkit import meanfield, planning
from stabkit.distributed import gradient_profile as shared_profile

from .awkward import CASES, Awkward
from .deep_fingerprint import differences, everything, process


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def loss(output: Any) -> Tensor:
    """A mean of squares of the first tensor."""
    return _first(output).square().mean()


def _trace(given: Awkward, **options: Any) -> stabkit.Flow:
    return stabkit.trace(given.model, *given.args, kwargs=given.kwargs, **options)


def _products(given: Awkward) -> Any:
    J = _trace(given).jacobian()
    return stabkit.singular_values(J, 1).values, (J @ torch.ones(*J.shape[::2], 1, dtype=J.dtype))


def _parameters(given: Awkward) -> Any:
    flow = _trace(given)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002 - time goes on between two calls
    try:
        found = stabkit.gradient_profile(flow, loss, parameters=True)
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])  # noqa: NPY002
    return found.log_growth, found.parameters.norms


def _iterate(given: Awkward) -> Any:
    if given.step is None:
        return None
    flow = stabkit.iterate(given.step, given.args[0].detach(), 4)
    exponents = stabkit.lyapunov_spectrum(flow).exponents
    return exponents, flow.states[3].tensors[0], flow.output, flow.trajectory(), flow.jacobian(1, 3).dense()


def _sharpness(given: Awkward) -> Any:
    return stabkit.sharpness(given.model, *given.args, loss=loss, kwargs=given.kwargs).values


def _analyze(given: Awkward, **options: Any) -> Any:
    found = stabkit.analyze(given.model, *given.args, kwargs=given.kwargs, **options)
    return {key: value for key, value in found.to_dict().items() if key != "seconds"}


def _with_optimizer(given: Awkward) -> Any:
    if not isinstance(given.model, torch.nn.Module):
        return None  # a function has no parameters
    return _analyze(given, loss=loss, optimizer=torch.optim.Adam(given.model.parameters(), 1e-3))


def _plan(given: Awkward) -> Any:
    return planning.plan(given.model, *given.args, kwargs=given.kwargs, loss=loss).steps


ANALYZERS: dict[str, Callable[[Awkward], Any]] = {
    "trace": lambda given: [state.tensors[0] for state in _trace(given).states],
    "recompute": lambda given: _trace(given, memory="recompute").jacobian().dense(),
    "products": _products,
    "growth": lambda given: stabkit.gradient_profile(_trace(given)).log_growth,
    "parameters": _parameters,
    "exponents": lambda given: stabkit.finite_time_exponents(_trace(given)).exponents,
    "identify": lambda given: [(r.name, r.residual) for r in stabkit.identify(_trace(given))],
    "attribute": lambda given: stabkit.attribute(_trace(given), loss).to_dict(),
    "diagnose": lambda given: [str(f) for f in stabkit.diagnose(_trace(given), loss)],
    "iterate": _iterate,
    "meanfield": lambda given: meanfield.at_initialisation(given.model, *given.args, kwargs=given.kwargs).to_dict(),
    "sharpness": _sharpness,
    "analyze": lambda given: _analyze(given),
    "analyze, loss": lambda given: _analyze(given, loss=loss),
    "analyze, optimizer": _with_optimizer,
    "plan": _plan,
    "budget": lambda given: _analyze(given, budget=30.0) and None,  # what it leaves out depends on the clock
    "ranks": lambda given: shared_profile(given.model, *given.args, kwargs=given.kwargs, loss=loss).log_growth,
}


@dataclass
class Cell:
    """What came of one analyzer on one model."""

    changed: list[str]
    differs: bool
    refused: str
    error: str
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether something is not as it was, or cannot be relied on."""
        return bool(self.changed or self.differs or self.error)

    def __str__(self) -> str:
        parts = [", ".join(self.changed[:6]), "two calls differ" * self.differs, self.error, self.refused[:200]]
        return "; ".join(part for part in parts if part)


def cell(name: str, analyzer: str) -> Cell:
    """One analyzer, called twice on one model."""
    torch.manual_seed(0)
    given = CASES[name]()
    run = ANALYZERS[analyzer]
    refused = error = ""
    results: list[Any] = []
    began = time.perf_counter()

    def state() -> dict[str, Any]:
        others = {k: v() if callable(v) else v for k, v in given.others.items()}
        return {**everything(model=given.model, args=given.args, kwargs=given.kwargs, **others), **process()}

    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            try:
                results.append(numbers(run(given)))
            except stabkit.StabkitError as refusal:
                refused = str(refusal)
                results.append(refused)
            except Exception as raised:
                error = f"{type(raised).__name__}: {str(raised)[:150]}"
            if len(results) == 1:
                middle = state()
                changed = differences(before, middle)
                torch.rand(5), random.random(), np.random.rand()  # noqa: NPY002
    if error:
        changed = differences({k: v for k, v in before.items() if "random" not in k}, state())
        changed = [c for c in changed if "random" not in c]
    return Cell(changed, len(results) == 2 and results[0] != results[1], refused, error, time.perf_counter() - began)


def numbers(result: Any) -> Any:
    """A result in a form that can be compared."""
    if isinstance(result, Tensor):
        return numbers(result.detach().tolist())
    if isinstance(result, np.ndarray):
        return numbers(result.tolist())
    if isinstance(result, dict):
        return {key: numbers(value) for key, value in result.items() if key != "seconds"}
    if isinstance(result, list | tuple):
        return [numbers(value) for value in result]
    return repr(result)


def main() -> int:
    """The table; the number of cells that failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.models.comes_back", description=__doc__)
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression on names of models")
    parser.add_argument("--analyzers", default="", metavar="PATTERN", help="regular expression on analyzers")
    parser.add_argument("--refusals", action="store_true", help="print refusals as well")
    wanted = parser.parse_args()
    names = [name for name in CASES if re.search(wanted.only, name)]
    chosen = [name for name in ANALYZERS if re.search(wanted.analyzers, name)]
    failed = total = refused = 0
    for name in names:
        for analyzer in chosen:
            found = cell(name, analyzer)
            total, failed, refused = total + 1, failed + found.failed, refused + bool(found.refused)
            if found.failed:
                print(f"FAIL {name:36s} {analyzer:18s} {found}", flush=True)
            elif wanted.refusals and found.refused:
                print(f"  no {name:36s} {analyzer:18s} {found.refused}", flush=True)
    print(f"{len(names)} models, {len(chosen)} analyzers: {failed} of {total} cells changed, {refused} refused")
    return failed


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
