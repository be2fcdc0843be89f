"""Solvers written as loops: their rounds are the steps, and no part of a round is called a method."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import stabkit
from stabkit.attribution.field_spectra import field_jacobians, rebuild
from stabkit.identification import Identification

from . import samplers as s

_SAID_OF_NO_METHOD = re.compile(r"fork|join|transition|plain|unnamed|unknown|part of")


def read(model: nn.Module, **options: object) -> tuple[Identification, ...]:
    torch.manual_seed(0)
    flow = stabkit.trace(model.double(), torch.randn(3, s.WIDTH, dtype=torch.float64), **options)
    return stabkit.identify(flow, checks=False)


def methods(records: tuple[Identification, ...]) -> list[str]:
    """The names of records that claim a method."""
    claimed = [r for r in records if r.evidence in ("proven", "measured")]
    return [r.name for r in claimed if not _SAID_OF_NO_METHOD.match(r.name)]


@pytest.mark.parametrize("field", s.FIELDS)
@pytest.mark.parametrize(("step", "name"), [(s.heun, "heun2"), (s.midpoint, "midpoint"), (s.rk4, "rk4")])
def test_a_round_is_the_step_whatever_is_added_to_the_field(step: Callable[..., object], name: str, field: str):
    found = read(s.Loop(lambda m, x, i: step(s.FIELDS[field](m), x, i * s.H)))
    assert [r.name for r in found] == [name] * 4
    assert [r.step_size for r in found] == pytest.approx([s.H] * 4)
    assert {r.evidence for r in found} == {"proven"}


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("net", [s.Net, s.Beside, s.Preconditioned])
def test_the_heun_steps_of_edm(net: Callable[[], nn.Module], noise: float):
    found = read(s.Loop(lambda m, x, i: s.edm_heun(m, x, i, noise), net))
    t = s.sigmas(5)
    assert [r.name for r in found] == ["heun2"] * 4
    expected = (t[1:] - t[:-1] * (1 + noise)).tolist()
    assert [r.step_size for r in found] == pytest.approx(expected)


def damped_rk4(m: s.Loop, x: torch.Tensor, i: int) -> torch.Tensor:
    return s.rk4(s.FIELDS["damped more and more"](m), x, i * s.H)


@pytest.mark.parametrize("step", [s.edm_heun, damped_rk4])
def test_the_tableau_and_the_fields_make_up_the_step(step: Callable[..., torch.Tensor]):
    model = s.Loop(step)
    torch.manual_seed(0)
    flow = stabkit.trace(model.double(), torch.randn(3, s.WIDTH, dtype=torch.float64))
    for step, record in zip(flow.steps, stabkit.identify(flow, checks=False), strict=True):
        J = step.jacobian().dense().numpy()
        found = field_jacobians(step, record, len(J), J)
        assert not isinstance(found, str), found
        assert np.linalg.norm(J - rebuild(found.method, found.stages)) < 1e-12 * np.linalg.norm(J)


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("kind", ["condition", "source", "damped source", "drive"])
@pytest.mark.parametrize(("step", "name"), [(s.heun, "heun2"), (s.midpoint, "midpoint"), (s.rk4, "rk4")])
def test_what_is_read_of_the_input_is_no_state(step: Callable[..., object], name: str, kind: str, begins: bool):
    found = read(s.WithInput(kind, step, begins))
    assert methods(found) == [name] * 4
    assert [r.step_size for r in found if r.name == name] == pytest.approx([s.H] * 4)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("kind", ["condition", "source", "drive"])
@pytest.mark.parametrize(("step", "name"), [(s.heun, "heun2"), (s.midpoint, "midpoint"), (s.rk4, "rk4")])
def test_stages_of_a_few_rounds_are_no_steps(
    step: Callable[..., object], name: str, kind: str, begins: bool, rounds: int
):
    found = read(s.WithInput(kind, step, begins, rounds))
    assert set(methods(found)) <= {name}


@pytest.mark.parametrize("field", ["time", "source", "damped", "damped more and more"])
@pytest.mark.parametrize(("weights", "name"), [((1.5, -0.5), "ab2"), ((23 / 12, -16 / 12, 5 / 12), "ab3")])
def test_multistep_methods_remember_values_of_the_whole_field(weights: tuple[float, ...], name: str, field: str):
    found = read(s.Adams(weights, field))
    begin, *rest = methods(found)
    assert "Euler" in begin  # the values to remember are made by steps of order one
    assert rest == [name] * (7 - len(weights))  # and the last remembers nothing, but is the same step
    assert [r.step_size for r in found if r.name == name] == pytest.approx([s.H] * len(rest))


def test_steps_of_a_multistep_method_may_be_negative():
    model = s.LMS()
    found = [r for r in read(model) if r.method is not None]
    assert [r.name for r in found] == ["ab3"] * 5
    sigma = s.sigmas(9)
    assert [r.step_size for r in found] == pytest.approx((sigma[3:8] - sigma[2:7]).tolist())


def test_dpm_solver_plus_plus_is_a_two_step_method():
    model = s.DPMSolverPlusPlus()
    found = read(model)
    lam = model.lam
    ratios = ((lam[2:] - lam[1:-1]) / (lam[1:-1] - lam[:-2])).tolist()
    shown = [r for r in found if r.name.startswith("Adams-Bashforth type, two steps")]
    assert len(shown) == 5  # the first step is Euler's, and the last remembers nothing, but is the same step
    for record, ratio, a in zip(shown, ratios, (lam[1:-1] - lam[2:]).exp().tolist(), strict=False):
        assert f"(a = {a:.3g}, step ratio {ratio:.3g})" in record.name


@pytest.mark.parametrize("source", [True, False])
def test_leapfrog_rounds_are_steps_of_stormer_and_verlet(source: bool):
    assert set(methods(read(s.Leapfrog(source=source)))) == {"stormer_verlet"}


def test_friction_in_both_kicks_is_no_momentum():
    loss = (1 - 0.3 * s.H / 2) ** 2
    assert set(methods(read(s.Leapfrog(friction=0.3)))) == {f"damped stormer_verlet (a = {loss:.3g})"}


def test_solvers_of_one_evaluation_stay_as_they_are():
    found = read(s.Loop(s.ddim))
    assert len(found) == 4
    assert all(r.name.startswith("scaled skip") for r in found)
    euler = s.Loop(lambda m, x, i: x + s.H * s.FIELDS["source"](m)(x, i * s.H))
    assert [r.name for r in read(euler)] == ["forward Euler"] * 4


def test_an_exponential_step_of_two_stages_is_a_midpoint_step():
    found = read(s.Loop(s.dpm_solver_2s))
    assert len(found) == 4
    assert all(name.startswith("exponential midpoint") for name in methods(found))


def test_a_stochastic_step_of_heun():
    assert [r.name for r in read(s.Loop(s.sde_heun))] == ["heun2"] * 4


@pytest.mark.parametrize("depth", [["net"], "modules"])
@pytest.mark.parametrize("field", ["time", "damped"])
@pytest.mark.parametrize(("step", "name"), [(s.heun, "heun2"), (s.midpoint, "midpoint"), (s.rk4, "rk4")])
def test_a_round_that_was_cut_between_its_stages_is_read_whole(
    step: Callable[..., object], name: str, field: str, depth: object
):
    found = read(s.Loop(lambda m, x, i: step(s.FIELDS[field](m), x, i * s.H)), depth=depth)
    assert [r.name for r in found] == [name] * 4


def test_parts_of_rounds_are_no_methods():
    assert set(methods(read(s.WithInput("condition", s.heun, begins=False), depth=["net"]))) == {"4 steps of heun2"}
    shifted = read(s.Leapfrog(), depth=["net"])  # cut after the drift, and so half a round off
    assert set(methods(shifted)) == {
        "symplectic Euler (position, velocity)",
        "additive coupling (half of a reversible step)",  # half a kick at the end
    }
    assert [r.evidence for r in shifted if r.name == "part of a step"] == ["unknown"]


def splitting(weights: tuple[float, float, float]) -> s.Loop:
    def step(m: s.Loop, x: torch.Tensor, i: int) -> torch.Tensor:
        for net, weight in zip((m.net, m.other, m.net), weights, strict=True):
            x = x + s.H * weight * net(x, 0.0)
        return x

    model = s.Loop(step)
    model.other = s.Net()
    return model


def test_the_parts_of_a_round_are_joined_where_their_order_is_that_of_strang():
    assert [r.name for r in read(splitting((0.5, 1.0, 0.5)))] == ["Strang-ordered splitting (Macaron)"] * 4
    assert [r.name for r in read(splitting((0.3, 1.0, 0.7)))] == ["forward Euler"] * 12


def test_a_predictor_and_a_corrector_of_adams():
    found = read(s.PredictorCorrector())
    assert methods(found) == ["predictor-corrector (ab2, trapezoid), PECE"] * 5
    assert [r.step_size for r in found if r.method is not None] == pytest.approx([s.H] * 4)


def test_pcformer_predicts_and_corrects():
    found = read(s.PCFormer())
    assert set(methods(found)) == {"predictor-corrector (3 stages, 2 values kept)"}
    middle = found[len(found) // 2]
    assert middle.step_size == pytest.approx(0.5 * (1 + 0.5 + 0.25))
    assert middle.shared_weights


def test_a_proximal_gradient_step_on_nonnegative_states():
    found = read(nn.Sequential(s.Ista(), s.Ista(), s.Ista()))
    assert [r.name for r in found] == ["projected Euler (ReLU)"] * 3
    assert any("proximal gradient" in note for note in found[0].notes)
