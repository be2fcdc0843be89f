from __future__ import annotations

import math

import pytest
import torch

import stabkit
from stabkit.attribution.explained_share import compare
from tests.attribution.networks import gaussian_steps, linear_steps, normal_input

DEPTH, SIZE, H = 20, 100, 0.5
# edge of the spectrum of I + h A as the size grows: circular law, and semicircles on the imaginary and the real axis
FROZEN = {"iid": math.log(1 + H), "antisymmetric": 0.5 * math.log(1 + 4 * H**2), "symmetric": math.log(1 + 2 * H)}
ISOTROPIC = 0.5 * math.log(1 + H**2)
KINDS = list(FROZEN)


def attribution(kind: str, cosine: float) -> stabkit.attribution.Attribution:
    model = gaussian_steps(kind, cosine=cosine, size=SIZE, depth=DEPTH, h=H)
    return stabkit.attribute(stabkit.trace(model, normal_input(2, SIZE), check=False))


def rate(found: stabkit.attribution.Attribution, name: str) -> float:
    return found.predictions[name].predicted / DEPTH


@pytest.mark.parametrize("kind", KINDS)
def test_independent_steps_grow_at_the_isotropic_rate_normal_or_not(kind):
    found = attribution(kind, cosine=0.0)
    assert found.applies == "isotropic"
    assert abs(found.persistence.mean) < 0.02
    assert rate(found, "isotropic") == pytest.approx(ISOTROPIC, abs=0.01)
    assert rate(found, "frozen") == pytest.approx(FROZEN[kind], abs=0.04)
    assert float(found.growth.mean()) == pytest.approx(ISOTROPIC, abs=0.025)
    assert found.persistence.straightness < 0.5
    iid = kind == "iid"  # half of the mean square of a Gaussian matrix is in its spectrum
    expected = 0.5 * math.log(1 + H**2 / 2) if iid else ISOTROPIC
    assert rate(found, "spectral") == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("kind", KINDS)
def test_tied_steps_grow_at_the_rate_of_the_leading_eigenvalue(kind):
    found = attribution(kind, cosine=1.0)
    assert found.applies == "frozen"
    assert found.persistence.mean == pytest.approx(1, abs=1e-12)
    settled = float(found.growth[: DEPTH // 2].mean())  # the cotangent needs a while to find the leading mode
    assert settled == pytest.approx(rate(found, "frozen"), abs=0.07)
    assert settled > rate(found, "isotropic") + 0.15
    predicted = found.predictions["persistent"].per_step
    assert float((found.growth.mean(1) - predicted).abs().mean()) < 0.04  # at every step: also before it has settled


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cosine", [0.25, 0.5, 0.75])
def test_partly_tied_steps_lie_where_the_carried_modes_put_them(kind, cosine):
    found = attribution(kind, cosine=cosine)
    assert found.applies == "between"
    assert found.persistence.mean == pytest.approx(cosine, abs=0.05)
    measured = found.growth.mean(1)
    errors = {
        name: float((found.predictions[name].per_step - measured).abs().mean())
        for name in ("persistent", "isotropic", "frozen")
    }
    assert errors["persistent"] < 0.05
    assert min(errors, key=lambda name: errors[name]) == "persistent"


@pytest.mark.parametrize("tied", [True, False])
def test_a_damping_of_all_modes_makes_steps_no_more_alike(tied):
    torch.manual_seed(0)
    matrices = [torch.randn(40, 40, dtype=torch.float64) / math.sqrt(40) for _ in range(1 if tied else 12)]
    steps = [-0.3 * W @ W.T for W in matrices] * (12 if tied else 1)
    found = stabkit.attribute(stabkit.trace(linear_steps(*steps), normal_input(2, 40)))
    assert found.applies == ("frozen" if tied else "isotropic")
    assert found.applicable.name == "persistent"
    assert found.applicable.share == pytest.approx(1, abs=0.1)
    assert found.predictions["eigenvalues"].share == pytest.approx(1, abs=0.1)
    assert (found.predictions["isotropic"].share > 2) == tied


def test_the_outer_eigenvalues_do_nearly_as_well_as_all():
    found = {}
    for limit in (512, 0):
        torch.manual_seed(0)
        model = gaussian_steps("symmetric", cosine=1.0, size=SIZE, depth=DEPTH, h=H)
        flow = stabkit.trace(model, normal_input(2, SIZE), check=False)
        found[limit] = stabkit.attribute(flow, dense_limit=limit, krylov=12, probes=64).predictions["persistent"]
    assert found[0].predicted == pytest.approx(found[512].predicted, rel=0.25)
    assert found[0].share == pytest.approx(1, abs=0.35)


def test_a_smooth_path_is_straight_and_its_fields_persist():
    A = 0.02 * torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    found = stabkit.attribute(stabkit.trace(linear_steps(*[A] * 10), normal_input(2, 2)))
    assert found.persistence.straightness == pytest.approx(1, abs=1e-2)
    assert float(found.persistence.field_cosine[:-1].min()) == pytest.approx(math.cos(0.02), abs=1e-3)
    assert found.persistence.run == (0, 9)


def test_a_scaled_isometry_is_explained_in_full():
    Q = torch.linalg.qr(normal_input(5, 5))[0]
    found = stabkit.attribute(stabkit.trace(linear_steps(*[1.3 * Q] * 4, a=0.0), normal_input(2, 5)))
    assert found.explained == pytest.approx(1, abs=1e-12)
    for name in ("spectral", "isotropic", "frozen", "persistent", "eigenvalues"):
        assert found.predictions[name].share == pytest.approx(1, abs=1e-12)
        assert found.predictions[name].explained_variation == pytest.approx(1, abs=1e-12)


def test_growth_that_cancels_has_no_share():
    found = stabkit.attribute(
        stabkit.trace(linear_steps(2 * torch.eye(3), 0.5 * torch.eye(3), a=0.0), torch.ones(1, 3).double())
    )
    assert found.explained is None
    assert found.predictions["spectral"].explained_variation == pytest.approx(1, abs=1e-12)


def test_steps_that_are_not_finite_are_left_out():
    found = compare("spectral", torch.tensor([[0.1], [math.nan], [0.3]]), torch.tensor([[0.1], [1.0], [-math.inf]]))
    assert found.steps == 1
    assert found.share == pytest.approx(1)


def test_steps_in_different_spaces_are_not_compared():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3))
    found = stabkit.attribute(stabkit.trace(model, torch.ones(1, 3)))
    assert found.applies == "unknown"
    assert found.explained is None
    assert math.isnan(found.persistence.straightness)
