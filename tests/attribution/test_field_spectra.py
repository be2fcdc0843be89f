"""The tie against known truth: linear fields, whose z is known, under methods whose regions are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit import integrators
from stabkit.attribution import Mechanism, mechanisms
from stabkit.attribution.field_spectra import rebuild
from tests.attribution.networks import normal_input

Field = Callable[[Tensor], Tensor]


def euler(f: Field, x: Tensor) -> Tensor:
    return x + f(x)


def midpoint(f: Field, x: Tensor) -> Tensor:
    return x + f(x + f(x) / 2)


def heun(f: Field, x: Tensor) -> Tensor:
    k = f(x)
    return x + (k + f(x + k)) / 2


def rk4(f: Field, x: Tensor) -> Tensor:
    k1 = f(x)
    k2 = f(x + k1 / 2)
    k3 = f(x + k2 / 2)
    k4 = f(x + k3)
    return x + (k1 + 2 * k2 + 2 * k3 + k4) / 6


def ssp33(f: Field, x: Tensor) -> Tensor:
    """In the form of Shu and Osher, as code spells it."""
    u = x + f(x)
    v = 0.75 * x + 0.25 * (u + f(u))
    return x / 3 + 2 / 3 * (v + f(v))


METHODS = {"forward_euler": euler, "midpoint": midpoint, "heun2": heun, "rk4": rk4, "ssp33": ssp33}


class Step(nn.Module):
    """One step of a method for x' = activation(A x)."""

    def __init__(self, method: Callable[[Field, Tensor], Tensor], A: Tensor, activation: Field | None = None) -> None:
        super().__init__()
        self.method, self.activation = method, activation
        self.linear = nn.Linear(len(A), len(A), bias=False, dtype=torch.float64)
        self.linear.weight.data = A

    def field(self, x: Tensor) -> Tensor:
        return self.linear(x) if self.activation is None else self.activation(self.linear(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.method(self.field, x)


class Splitting(nn.Module):
    """A step of x' = F x + G x: Euler steps of the two in turn."""

    def __init__(self, F: Tensor, G: Tensor, *, strang: bool = False) -> None:
        super().__init__()
        self.strang = strang
        self.f, self.g = (nn.Linear(len(A), len(A), bias=False, dtype=torch.float64) for A in (F, G))
        self.f.weight.data, self.g.weight.data = F, G

    def forward(self, x: Tensor) -> Tensor:
        if not self.strang:
            x = x + self.f(x)
            return x + self.g(x)
        x = x + self.f(x) / 2
        x = x + self.g(x)
        return x + self.f(x) / 2


def blocks(_path: str, module: nn.Module) -> bool:
    return isinstance(module, Step | Splitting | Kick)


def first(*layers: nn.Module, size: int) -> Mechanism:
    return mechanisms(stabkit.trace(nn.Sequential(*layers), normal_input(2, size), depth=blocks))[0]


def with_modes(*z: complex) -> Tensor:
    """A real matrix, not a normal one, with these eigenvalues and the conjugates of the complex ones."""
    blocks = [[[v.real, v.imag], [-v.imag, v.real]] if v.imag else [[v.real]] for v in map(complex, z)]
    D = torch.block_diag(*(torch.tensor(block, dtype=torch.float64) for block in blocks))
    X = torch.eye(len(D), dtype=torch.float64) + 0.1 * normal_input(len(D), len(D))
    return X @ D @ torch.linalg.inv(X)


POINTS = [-3.2, -2.7, -1.5, -0.4, 0.3, 3.0j, 2.7j, 1.9j, 0.8j, -0.4 + 2.9j, -1 + 1.8j, -0.5 + 0.6j, 0.2 + 0.7j]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_z_membership_mechanism_and_factor_of_a_linear_field(name, point):
    point = complex(point)
    A = with_modes(point)
    method, layer = integrators.named(name), Step(METHODS[name], A)
    found = first(layer, layer, size=len(A))
    for z in found.z:
        assert np.abs(z - point).min() <= 1e-9
        assert max(np.abs(z - point).min(), np.abs(z - point.conjugate()).min()) <= 1e-9
    radius = float(method.amplification(np.array(point)))
    assert found.radius == pytest.approx(radius, rel=1e-9)
    assert found.defect == pytest.approx(0, abs=1e-12)
    unstable = radius > 1 + found.tolerance
    assert (found.modes.unstable == 1) == unstable
    assert (found.margin < 0) == unstable
    if unstable:
        assert found.modes.continuous == float(point.real > 0)
    # the factor: along the ray to the boundary; none where the field grows itself
    if point.real > 0:
        assert found.largest_step_factor is None
        return
    on_axis = float(method.imaginary_interval()) if point.real == 0 else None
    if on_axis is not None:
        assert found.largest_step_factor == pytest.approx(on_axis / abs(point), rel=1e-4, abs=1e-9)
    else:
        s = found.largest_step_factor
        assert float(method.amplification(np.array(0.999 * s * point))) <= 1 + 1e-9
        assert float(method.amplification(np.array(1.001 * s * point))) > 1


def test_the_numbers_of_rk4_at_minus_three():
    layer = Step(rk4, -3.0 * torch.eye(2, dtype=torch.float64))
    found = first(layer, layer, size=2)
    assert found.z == pytest.approx(np.full((2, 2), -3.0 + 0j))
    assert found.largest_step_factor == pytest.approx(2.785293563405282 / 3, rel=1e-8)
    assert found.energy.discretisation == 1
    assert found.margin == pytest.approx(2.785293563405282 - 3, abs=1e-6)


COMMUTING = [(-2.5, -2.5), (-0.5, -1.2), (0.3, -0.1), (-1.7, -0.3)]


@pytest.mark.parametrize("strang", [False, True])
@pytest.mark.parametrize("pair", COMMUTING)
def test_a_splitting_has_a_pair_of_z_for_every_mode(pair, strang):
    # two more modes, so that X tells which z belong together
    F, G = ([pair[i], -0.2 - 0.3 * i, -0.6 + 0.5 * i] for i in range(2))
    X = torch.eye(3, dtype=torch.float64) + 0.2 * normal_input(3, 3)
    make = lambda d: X @ torch.diag(torch.tensor(d, dtype=torch.float64)) @ torch.linalg.inv(X)  # noqa: E731
    layer = Splitting(make(F), make(G), strang=strang)
    found = first(layer, layer, size=3)
    pairs = sorted(zip(found.field_z[0][0].real, found.field_z[1][0].real, strict=True))
    np.testing.assert_allclose(pairs, sorted(zip(F, G, strict=True)), atol=1e-9)
    R = [(1 + f / 2) ** 2 * (1 + g) if strang else (1 + f) * (1 + g) for f, g in zip(F, G, strict=True)]
    assert found.radius == pytest.approx(max(map(abs, R)), rel=1e-9)
    assert found.commutator == 0
    assert found.defect == pytest.approx(0, abs=1e-12)
    bad = [abs(r) > 1 + 1e-4 for r in R]
    assert found.modes.unstable == pytest.approx(sum(bad) / 3)
    assert found.modes.continuous == pytest.approx(sum(b and f + g > 0 for b, f, g in zip(bad, F, G, strict=True)) / 3)
    assert (found.margin < 0) == any(bad)


def test_the_factor_of_a_splitting_is_that_of_the_pair():
    layer = Splitting(-2.5 * torch.eye(2, dtype=torch.float64), -2.5 * torch.eye(2, dtype=torch.float64))
    found = first(layer, layer, size=2)
    assert found.largest_step_factor == pytest.approx(2 / 2.5, rel=1e-8)  # (1 - 2.5 s)^2 = 1
    assert found.modes.discretisation == 1


def test_fields_that_do_not_commute_are_said_to():
    layer = Splitting(0.8 * normal_input(4, 4), 0.8 * normal_input(5, 5)[1:, 1:])
    found = first(layer, layer, size=4)
    J = layer(torch.eye(4, dtype=torch.float64)).T.detach().numpy()
    assert found.radius == pytest.approx(np.abs(np.linalg.eigvals(J)).max(), rel=1e-9)
    assert found.commutator > 0.01
    assert any("do not commute" in note for note in found.notes)


class Kick(nn.Module):
    """Symplectic Euler for p' = -w q, q' = w p."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.f, self.g = (nn.Linear(2, 2, bias=False, dtype=torch.float64) for _ in range(2))
        self.f.weight.data = -w * torch.eye(2, dtype=torch.float64)
        self.g.weight.data = w * torch.eye(2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        p, q = x.chunk(2, dim=-1)
        p = p + self.f(q)
        q = q + self.g(p)
        return torch.cat([p, q], dim=-1)


@pytest.mark.parametrize("w", [0.5, 1.5, 2.5])
def test_a_partitioned_method_is_stable_up_to_two(w):
    found = first(Kick(w), Kick(w), size=4)
    np.testing.assert_allclose(found.z, 1j * w, atol=1e-9)
    assert found.largest_step_factor == pytest.approx(2 / w, rel=1e-6)
    assert (found.modes.discretisation > 0) == (w > 2)
    assert found.modes.continuous == 0


@pytest.mark.parametrize("method", [euler, midpoint, heun, rk4, ssp33])
def test_a_gradient_flow_that_grows_is_blamed_on_its_step(method):
    torch.manual_seed(1)

    def gradient(_seed: int) -> Step:
        Q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
        curvature = torch.linspace(0.3, 3.2, 6, dtype=torch.float64)
        return Step(method, -Q @ torch.diag(curvature) @ Q.T)

    found = mechanisms(stabkit.trace(nn.Sequential(*map(gradient, range(6))), normal_input(2, 6), depth=blocks))
    for step in found:
        assert step.excess.continuous == 0
        assert step.excess.discretisation > 0
        assert 0 < step.largest_step_factor < 1


@pytest.mark.parametrize("method", [euler, midpoint, heun, rk4, ssp33])
def test_a_skew_field_cannot_grow_but_by_its_step(method):
    S = normal_input(6, 6)
    S = 3.3 * (S - S.T) / torch.linalg.matrix_norm(S - S.T, 2)
    layer = Step(method, S)
    for step in mechanisms(stabkit.trace(nn.Sequential(layer, layer), normal_input(2, 6), depth=blocks)):
        assert step.excess.continuous == 0
        assert step.excess.discretisation > 0


def test_unequal_stages_leave_a_defect_and_a_spread():
    layer = Step(rk4, 1.5 * normal_input(4, 4), torch.tanh)
    found = first(layer, layer, size=4)
    assert found.defect > 1e-3
    assert found.spread > 1e-2
    assert any("between the stages" in note for note in found.notes)


def test_stages_make_the_step_again():
    for name in ("rk4", "heun2", "radau_iia2", "backward_euler"):
        method = integrators.named(name)
        A = 0.4 * np.random.default_rng(2).normal(size=(2, 5, 5))
        values, X = np.linalg.eig(A)
        J = np.real((X * method.stability_matrix(values)[..., 0, 0][:, None, :]) @ np.linalg.inv(X))
        np.testing.assert_allclose(rebuild(method, np.stack([A] * method.stages)), J, atol=1e-12)


def test_an_analysis_says_that_the_step_is_too_long():
    torch.manual_seed(0)
    layers = [Step(rk4, -3.2 * torch.eye(6, dtype=torch.float64)) for _ in range(12)]
    report = stabkit.analyze(nn.Sequential(*layers), normal_input(3, 6), depth=blocks)
    # one trouble, one warning: the step that is too long is told as the reason of the explosion
    assert [finding.kind for finding in report.findings if finding.severity != "info"] == ["exploding"]
    (found,) = (finding for finding in report.findings if finding.kind == "unstable_step")
    assert found.steps == tuple(range(12))
    assert "it is gone with the remedy of exploding" in found.evidence
    assert "The step is too long for its method: a step 0.87 times as long" in str(report)
    assert report.steps[0].step_factor == pytest.approx(2.785293563405282 / 3.2, rel=1e-6)
    assert math.isclose(min(z.real for z in report.steps[0].field_z[0]), -3.2)
    assert report.steps[0].mechanism["discretisation"] == 1


class InSinglePrecision(nn.Module):
    """Two fields, one of which is computed in float32: a cast that norms of language models make."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(torch.tanh(x.to(torch.float32).to(x.dtype)))
        return x + self.b(torch.tanh(x))


def test_a_field_with_a_cast_inside_has_its_jacobian():
    torch.manual_seed(0)
    model = nn.Sequential(*[InSinglePrecision() for _ in range(3)]).double()
    report = stabkit.analyze(model, torch.randn(4, 4, dtype=torch.float64))
    assert len(report.steps) == 3
