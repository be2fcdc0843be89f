from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from stabkit.identification import by_step, identify
from stabkit.tracing import trace


class Step(nn.Module):
    """A block of width 6 whose forward is given."""

    def __init__(self, function) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.g = nn.Sequential(nn.Linear(6, 6), nn.GELU())
        self.norm = nn.LayerNorm(6)
        self.project = nn.Linear(6, 6)
        self.damping = nn.Parameter(torch.tensor(0.225, dtype=torch.float64))
        self.scales = nn.Parameter(torch.linspace(0.1, 0.6, 6, dtype=torch.float64))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def read(function):
    torch.manual_seed(0)
    model = nn.Sequential(*[Step(function) for _ in range(3)]).double()
    found = identify(trace(model, torch.randn(2, 6, dtype=torch.float64)))
    assert len(found) == 3
    assert len({(f.name, f.evidence) for f in found}) == 1
    return found[1]


@pytest.mark.parametrize(
    ("function", "name", "skip", "evidence"),
    [
        (lambda m, x: x + m.f(x), "forward Euler", 1.0, "proven"),
        (lambda m, x: m.f(m.norm(x)) + x, "forward Euler", 1.0, "proven"),
        (lambda m, x: x - 0.1 * m.f(x), "forward Euler", 1.0, "proven"),
        (lambda m, x: x.clone().add_(m.f(x)), "forward Euler", 1.0, "proven"),
        (lambda m, x: torch.add(x, m.f(x), alpha=0.5), "forward Euler", 1.0, "proven"),
        (lambda m, x: x + m.scales * m.f(x), "forward Euler", 1.0, "proven"),
        (lambda m, x: m.f(x) + (1 - m.damping) * x, "damped Euler (a = 0.775)", 0.775, "proven"),
        (lambda m, x: (1 + m.damping) * m.f(x) + (1 - m.damping) * x, "damped Euler (a = 0.775)", 0.775, "proven"),
        (lambda m, x: torch.lerp(x, m.f(x), 0.25), "damped Euler (a = 0.75)", 0.75, "proven"),
        (lambda m, x: m.f(x), "plain", 0.0, "proven"),
        (lambda m, x: m.f(x) + m.project.bias, "plain", 0.0, "proven"),
        (lambda m, x: m.f(x) + m.g(x), "plain", 0.0, "proven"),
        (lambda m, x: m.project(x) + m.f(x), "linear skip", None, "proven"),
        (lambda m, x: 1.5 * x + m.f(x), "scaled skip (a = 1.5)", 1.5, "proven"),
        (lambda m, x: x + m.f(x) + x, "scaled skip (a = 2)", 2.0, "proven"),
        (lambda m, x: m.scales * x + m.f(x), "damped Euler (a from 0.1 to 0.6 by entry)", 0.35, "measured"),
        (lambda m, x: x.flip(1) + m.f(x), "not a step", None, "measured"),
    ],
)
def test_the_skip_is_read_off_the_code(function, name, skip, evidence):
    found = read(function)
    assert (found.name, found.evidence) == (name, evidence)
    assert found.skip == (skip if skip is None else pytest.approx(skip, abs=1e-12))
    assert skip is None or evidence != "proven" or found.residual < 1e-14


def test_the_method_has_the_region_of_the_skip():
    damped = read(lambda m, x: m.f(x) + (1 - m.damping) * x)
    z = torch.randn(50, dtype=torch.complex128).numpy()
    assert damped.method.amplification(z) == pytest.approx(abs(0.775 + z), abs=1e-12)
    assert read(lambda m, x: m.f(x)).method.amplification(z) == pytest.approx(abs(z), abs=1e-12)


@pytest.mark.parametrize(
    ("function", "name", "after"),
    [
        (lambda m, x: torch.relu(x + m.f(x)), "projected Euler (ReLU)", ("Relu",)),
        (lambda m, x: m.norm(x + m.f(x)), "projected Euler (post-norm)", ("NativeLayerNorm",)),
        (lambda m, x: torch.tanh(x + m.f(x)), "forward Euler, then Tanh", ("Tanh",)),
    ],
)
def test_what_follows_the_addition_is_named(function, name, after):
    found = read(function)
    assert (found.name, found.after) == (name, after)


def test_two_branches_in_a_row_are_a_splitting():
    def pre_norm(m, x):
        x = x + m.f(m.norm(x))
        return x + m.g(m.norm(x))

    found = read(pre_norm)
    assert (found.name, found.skip) == ("Lie splitting (2 Euler steps)", 1.0)
    assert "2 additions" in found.notes[0]
    assert found.shared_weights is None  # the norm is one


def test_a_post_norm_transformer_is_projected_after_each_half():
    def post_norm(m, x):
        x = m.norm(x + m.f(x))
        return m.norm(x + m.g(x))

    found = read(post_norm)
    assert (found.name, found.evidence, found.skip) == ("projected Euler (post-norm)", "proven", None)
    assert found.after == ("NativeLayerNorm",) * 2
    assert "2 norm(s) after 2 addition(s)" in found.notes[0]


def test_a_norm_without_a_skip_is_plain():
    assert read(lambda m, x: m.norm(m.f(x) + m.g(x))).name == "plain"
    assert read(lambda m, x: m.norm(m.f(m.norm(x)))).name == "plain"


def test_a_change_of_space_is_a_transition():
    found = identify(trace(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5)), torch.randn(2, 3)))
    assert [f.name for f in found] == ["transition", "plain"]
    assert found[0].method is None


def test_an_opaque_step_is_unknown_rather_than_plain():
    class Residual(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + x.tanh()

        @staticmethod
        def backward(ctx, g):
            return g

    found = read(lambda m, x: Residual.apply(m.project(x)))
    assert (found.name, found.method, found.evidence) == ("unknown", None, "unknown")


def test_learned_damping_is_traced_to_its_parameter():
    found = read(lambda m, x: m.f(x) + (1 - m.damping) * x)
    assert found.notes == ("factors that are parameters: 1 - 1.damping",)


@pytest.mark.parametrize(
    ("function", "h"),
    [
        (lambda m, x: x + m.f(x), 1.0),
        (lambda m, x: x - 0.1 * m.f(x), 0.1),
        (lambda m, x: torch.add(x, m.f(x), alpha=0.5), 0.5),
        (lambda m, x: x + m.scales * m.f(x), 1.0),
        (lambda m, x: x + 0.1 * (m.f(x) + m.g(x)), 0.1),
        (lambda m, x: x + 0.5 * (m.f(x) + m.f(x + m.f(x))), 1.0),
    ],
)
def test_the_step_size_is_the_number_before_the_branch(function, h):
    assert abs(read(function).step_size) == pytest.approx(h, abs=1e-12)


def test_the_commutator_of_a_splitting_is_that_of_the_dense_jacobians():
    torch.manual_seed(0)
    model = nn.Sequential(Step(lambda m, x: (y := x + m.f(x)) + m.g(y)), nn.Identity()).double()
    x = torch.randn(1, 6, dtype=torch.float64)
    block = model[0]
    y = x + block.f(x)
    F, G = (torch.autograd.functional.jacobian(f, at).reshape(6, 6) for f, at in ((block.f, x), (block.g, y)))
    truth = (F @ G - G @ F).norm() / (F.norm() * G.norm())
    (check,) = identify(trace(model, x, depth=["0"]))[0].checks
    assert check.name == "commutator"
    assert check.value == pytest.approx(float(truth), rel=0.7)  # two random vectors in six dimensions


def test_two_linear_fields_of_one_matrix_commute():
    torch.manual_seed(0)
    model = nn.Sequential(Step(lambda m, x: (y := x + m.project(x)) + m.project(m.project(y))), nn.Identity()).double()
    (check,) = identify(trace(model, torch.randn(1, 6, dtype=torch.float64), depth=["0"]))[0].checks
    assert check.value < 1e-14


def test_r_of_h_j_is_the_step_for_a_linear_field():
    torch.manual_seed(0)
    linear = nn.Sequential(Step(lambda m, x: x + m.project(x + 0.5 * m.project(x))), nn.Identity()).double()
    found = identify(trace(linear, torch.randn(2, 6, dtype=torch.float64)))[0]
    assert found.name == "midpoint"
    assert {check.name: check.value for check in found.checks}["defect of R(h J_f)"] < 1e-14
    curved = read(lambda m, x: x + m.f(x + 0.5 * m.f(x)))
    assert 1e-6 < {check.name: check.value for check in curved.checks}["defect of R(h J_f)"] < 1


def test_parts_of_a_method_have_no_method_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(*(Step(lambda m, x: x + m.f(x)) for _ in range(2))).double()
    flow = trace(model, torch.randn(2, 6, dtype=torch.float64), depth="modules")
    found = identify(flow)
    assert [r.steps for r in found] == [(0, 1, 2), (3, 4, 5)]
    assert {r.name for r in found} == {"forward Euler"}
    parts = by_step(found, len(flow.steps))
    assert [p.name for p in parts[:2]] == ["forward Euler, part 1 of 3", "forward Euler, part 2 of 3"]
    assert all(p.method is None and p.skip is None for p in parts)


def test_records_that_miss_a_step_are_refused():
    records = identify(trace(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(2, 3)))
    assert by_step(records, 2) == records
    with pytest.raises(ValueError, match="expected each of 0 to 2 once"):
        by_step(records, 3)
    with pytest.raises(ValueError, match="belongs to two records"):
        by_step((*records, records[0]), 2)


def test_a_record_is_plain_values():
    data = read(lambda m, x: x + 0.5 * (m.f(x) + m.f(x + m.f(x)))).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert (data["name"], data["tableau"]["A"]) == ("heun2", [[0, 0], [1, 0]])


def test_saved_tensors_that_were_forgotten_are_read_again():
    torch.manual_seed(0)
    model = nn.Sequential(*(Step(lambda m, x: x + m.scales * m.f(m.norm(x))) for _ in range(3))).double()
    x = torch.randn(2, 6, dtype=torch.float64)
    kept, recomputed = (identify(trace(model, x, memory=memory)) for memory in ("keep", "recompute"))
    assert [r.to_dict() for r in recomputed] == [r.to_dict() for r in kept]


def test_a_shift_is_no_step_of_euler():
    found = identify(trace(lambda x: x + 0.1, torch.randn(2, 6)))
    assert [f.name for f in found] == ["no branch"]


def test_dropout_in_eval_mode_is_seen_through():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x) + self.drop(torch.relu(self.f(x)))

    model = nn.Sequential(Block(), Block()).double().eval()
    assert [f.name for f in identify(trace(model, torch.randn(2, 6, dtype=torch.float64)))] == ["forward Euler"] * 2
