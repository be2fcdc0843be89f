"""Odd arguments are refused by name: a call of a public function returns, or raises a `StabkitError`.

Two thousand calls are drawn: a function, and one or two of its arguments with values that people give by mistake.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import stabkit
from stabkit import curvature, diagnosis, growth, integrators, jacobians, meanfield, plotting
from stabkit.arguments import BOUNDS, accepts
from stabkit.errors import ArgumentError, ArgumentTypeError, StabkitError
from stabkit.planning.budgeting import plan

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
Call = tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]


def squares(output: Tensor) -> Tensor:
    return output.square().mean()


@cache
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])


@cache
def flow() -> stabkit.Flow:
    return stabkit.trace(model(), X)


@cache
def matrix() -> Tensor:
    return flow().steps[1].jacobian().dense()


CALLS: dict[str, Callable[[], Call]] = {
    "trace": lambda: (stabkit.trace, (model(), X), {}),
    "analyze": lambda: (stabkit.analyze, (model(), X), {"spectrum": "none"}),
    "identify": lambda: (stabkit.identify, (flow(),), {}),
    "attribute": lambda: (stabkit.attribute, (flow(),), {}),
    "plan": lambda: (plan, (model(), X), {}),
    "diagnose": lambda: (stabkit.diagnose, (flow(),), {}),
    "gradient_profile": lambda: (stabkit.gradient_profile, (flow(),), {}),
    "lyapunov_spectrum": lambda: (stabkit.lyapunov_spectrum, (flow(),), {}),
    "finite_time_exponents": lambda: (stabkit.finite_time_exponents, (flow(),), {}),
    "eigenvalues": lambda: (stabkit.eigenvalues, (matrix(),), {}),
    "singular_values": lambda: (stabkit.singular_values, (matrix(),), {}),
    "non_normality": lambda: (stabkit.non_normality, (matrix(),), {}),
    "iterate": lambda: (stabkit.iterate, (torch.tanh, X, 5), {}),
    "recurrent_flow": lambda: (stabkit.recurrent_flow, (nn.RNN(4, 4), torch.ones(3, 2, 4)), {}),
    "sharpness": lambda: (stabkit.sharpness, (model(), X), {"loss": squares}),
    "load": lambda: (stabkit.load, ("/nowhere/model.pt",), {}),
    "compare": lambda: (stabkit.compare, (["/nowhere/a.pt", "/nowhere/b.pt"],), {}),
    "treat": lambda: (diagnosis.treat, (model(), X), {"rounds": 1}),
    "covariant_vectors": lambda: (growth.covariant_vectors, (flow(),), {}),
    "alignment_index": lambda: (growth.alignment_index, (flow(),), {}),
    "log_abs_det": lambda: (jacobians.log_abs_det, (matrix(),), {}),
    "jacobian_trace": lambda: (jacobians.trace, (matrix(),), {}),
    "density": lambda: (jacobians.singular_value_density, (matrix(),), {}),
    "critical_rate": lambda: (
        curvature.critical_rate,
        (model(), X),
        {"loss": squares, "optimizer": torch.optim.SGD(model().parameters(), lr=0.1)},
    ),
    "at_initialisation": lambda: (meanfield.at_initialisation, (model(), X), {}),
    "critical_sigma_w": lambda: (meanfield.critical_sigma_w, ("tanh",), {}),
    "residual_profile": lambda: (meanfield.residual_profile, ("tanh", 3), {"sigma_w": 1.0}),
    "fixed_point": lambda: (meanfield.fixed_point, ("tanh",), {"sigma_w": 1.0}),
    "named": lambda: (integrators.named, ("rk4",), {}),
    "bdf": lambda: (integrators.bdf, (2,), {}),
    "rkc1": lambda: (integrators.rkc1, (3,), {}),
    "growth_plot": lambda: (plotting.growth, (stabkit.gradient_profile(flow()),), {}),
    "spectrum_plot": lambda: (plotting.spectrum, (stabkit.eigenvalues(matrix()),), {}),
    "method_plot": lambda: (plotting.method, (integrators.named("rk4"),), {}),
    "flow_map_plot": lambda: (plotting.flow_map, (flow(),), {}),
    "training_plot": lambda: (plotting.training, ([],), {}),
}
ODD: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 2, 3, 2.5, -0.5, float("nan"), float("inf"), 1e-3, "3", "", "auto", "nonsense", b"x", 1j),
    *(np.int64(2), np.float32(0.5), torch.tensor(2), torch.tensor(0.5), np.array([1, 2]), torch.ones(2)),
    *((), [], {}, {"a": 1}, {1: 2}, [1, 2], ["0"], object(), int, len, X, X.int(), X.to(torch.complex64)),
    *(torch.empty(0, 4), torch.empty(3, 4, device="meta"), X.to_sparse(), nn.Linear(4, 4), nn.LazyLinear(4)),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=2000 // len(CALLS) + 1, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_raw_error(name: str, data: st.DataObject) -> None:
    function, args, kwargs = CALLS[name]()
    parameters = [one for one in inspect.signature(function).parameters.values() if one.kind != one.VAR_KEYWORD]
    odd = st.sampled_from(ODD)
    given_args, given_kwargs = list(args), dict(kwargs)
    for parameter in data.draw(st.lists(st.sampled_from(parameters), min_size=1, max_size=2, unique=True), "which"):
        value = data.draw(odd, parameter.name)
        place = parameters.index(parameter)
        if place < len(given_args):
            given_args[place] = value
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            given_kwargs[parameter.name] = value
        else:
            given_args.append(value)
    with warnings.catch_warnings(), contextlib.suppress(StabkitError):
        warnings.simplefilter("ignore")
        function(*given_args, **given_kwargs)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.EmbeddingBag(10, 4, sparse=True), nn.Linear(4, 4)

    def forward(self, indices: Tensor) -> Tensor:
        return self.layer(self.table(indices))  # type: ignore[no-any-return]


def fails(_output: Tensor) -> Tensor:
    raise ValueError("of the loss's own")


COMPLEX = nn.Linear(4, 4, dtype=torch.complex64), torch.ones(3, 4, dtype=torch.complex64)
INDICES = torch.arange(15).view(3, 5) % 10
PLAUSIBLE: dict[str, tuple[str, Callable[[], Any]]] = {
    "another shape in a budget": ("shapes cannot be", lambda: stabkit.analyze(nn.Linear(5, 5), X, budget=5.0)),
    "no samples in a budget": ("no samples", lambda: stabkit.analyze(model(), X[:0], budget=5.0)),
    "no samples": ("no samples", lambda: stabkit.analyze(model(), X[:0])),
    "a program": ("ExportedProgram", lambda: stabkit.analyze(torch.export.export(model(), (X,)), X)),
    "complex numbers": ("", lambda: stabkit.analyze(*COMPLEX)),
    "a complex loss": ("is complex", lambda: stabkit.gradient_profile(flow(), lambda y: y.sum() * 1j)),
    "sparse gradients": (
        "sparse=False",
        lambda: stabkit.gradient_profile(stabkit.trace(Bag(), INDICES), torch.sum, parameters=True),
    ),
    "an iterated map": ("iterated map", lambda: stabkit.attribute(stabkit.iterate(torch.tanh, X, 5), torch.sum)),
    "a ragged tensor": ("nested", lambda: stabkit.analyze(model(), torch.nested.nested_tensor([X, X[:2]]))),
    "a drawing of nothing": ("ax=3", lambda: plotting.figure_of(3)),  # type: ignore[arg-type]
    "a loss that raises, profile": ("of the loss's own", lambda: stabkit.gradient_profile(flow(), fails)),
    "a loss that raises, parameters": (
        "of the loss's own",
        lambda: stabkit.gradient_profile(flow(), fails, parameters=True),
    ),
    "a loss that raises, analyze": ("of the loss's own", lambda: stabkit.analyze(model(), X, loss=fails)),
    "a loss that raises, diagnose": ("of the loss's own", lambda: stabkit.diagnose(flow(), fails)),
    "a loss that raises, attribute": ("of the loss's own", lambda: stabkit.attribute(flow(), fails)),
    "a loss that raises, sharpness": ("of the loss's own", lambda: stabkit.sharpness(model(), X, loss=fails)),
    "a loss that raises, plan": ("of the loss's own", lambda: plan(model(), X, loss=fails)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PLAUSIBLE)
def test_what_people_call_it_with(name: str) -> None:
    words, call = PLAUSIBLE[name]
    if not words:
        call()
        return
    with pytest.raises(StabkitError, match=re.escape(words)):
        call()


def test_numbers_of_numpy_are_numbers() -> None:
    @accepts
    def take(seed: int = 0, confidence: float = 0.9, check: bool = True) -> list[type]:
        return [type(value) for value in (seed, confidence, check)]

    assert take(np.int64(3), np.float32(0.5), np.bool_(False)) == [int, float, bool]
    assert take(torch.tensor(3), torch.tensor(0.5)) == [int, float, bool]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"probes": "3"}, ArgumentTypeError, "probes='3' is a str; expected a whole number, at least 1"),
        ({"probes": 0}, ArgumentError, "probes=0; expected a whole number, at least 1"),
        ({"probes": True}, ArgumentTypeError, "probes=True is a bool"),
        ({"confidence": float("nan")}, ArgumentError, "confidence=nan; expected a number, more than 0 and less than 1"),
        ({"prober": 1}, ArgumentTypeError, "did you mean probes"),
        ({"kwargs": {1: 2}}, ArgumentTypeError, "kwargs is a dict; expected a mapping of names"),
        ({"loss": 3}, ArgumentTypeError, "loss=3 is an int; expected a function of the model"),
    ],
)
def test_what_is_said_of_it(given: dict[str, Any], error: type[Exception], words: str) -> None:
    @accepts
    def take(
        probes: int = 4,
        confidence: float = 0.95,
        kwargs: Mapping[str, Any] | None = None,
        loss: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        raise AssertionError("it ran")

    with pytest.raises(error, match=re.escape(words)):
        take(**given)


def test_bounds_are_those_of_arguments_that_there_are() -> None:
    named = {name for call in CALLS.values() for name in inspect.signature(call()[0]).parameters}
    others = {"width", "pairs", "along", "panels", "resolution", "chunk", "trials", "kept"}
    assert set(BOUNDS) <= named | others
