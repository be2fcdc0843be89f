"""What is easily misread: each case says what it looks like and what it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from stabkit.errors import ArgumentTypeError
from stabkit.hashing import raw
from stabkit.identification import identify
from stabkit.tracing import trace

from .family import Step, conv, dense, stack


def read(make, shape=(2, 6), depth=("0", "1", "2"), *, train=False):
    torch.manual_seed(0)
    model, inputs, _ = stack(make, shape, train=train)()
    found = identify(trace(model, *inputs, depth=list(depth)))
    assert len(found) == 3
    return found[1]


def amplification(record, z=0.3 + 0.4j):
    return complex(record.method.stability_matrix(record.step_size * z)[0, 0])


def test_a_bias_is_no_skip():
    found = read(lambda: Step(lambda m, x: m.parts[0](x) + m.b, dense(), b=nn.Parameter(torch.randn(6))))
    assert (found.name, found.skip) == ("plain", 0.0)


def test_a_residual_inside_a_branch_belongs_to_the_branch():
    def forward(m, x):
        u = m.parts[0](x)
        return x + m.parts[1](u + torch.relu(u))

    found = read(lambda: Step(forward, nn.Linear(6, 6), nn.Linear(6, 6)))
    assert (found.name, found.method.stages) == ("forward Euler", 1)


def test_a_residual_inside_a_layer_without_a_skip_is_plain():
    def forward(m, x):
        u = m.parts[0](x)
        return m.parts[1](u + torch.relu(m.parts[2](u)))

    found = read(lambda: Step(forward, *(nn.Linear(6, 6) for _ in range(3))))
    assert (found.name, found.skip) == ("plain", 0.0)
    assert "no skip leads around" in found.notes[0]


def test_a_branch_that_reads_the_sum_before_it_is_a_second_stage():
    found = read(lambda: Step(lambda m, x: x + m.parts[1](x + m.parts[0](x)), dense(), dense()))
    z, w = 0.3 + 0.4j, -0.2 + 0.1j
    assert found.name == "unnamed (2 stages of different fields)"
    assert complex(found.method.stability_matrix(z, w)[0, 0]) == pytest.approx(1 + w * (1 + z))


def test_a_concatenated_skip_that_is_mixed_is_none():
    found = read(lambda: Step(lambda m, x: m.parts[1](torch.cat([x, m.parts[0](x)], 1)), dense(), nn.Linear(12, 6)))
    assert (found.name, found.skip) == ("plain", 0.0)
    assert "several projections" in found.notes[0]


def test_a_module_called_twice_in_a_row_is_two_steps_of_one_field():
    found = read(lambda: Step(lambda m, x: (y := x + m.parts[0](x)) + m.parts[0](y), dense()))
    z = 0.3 + 0.4j
    assert (found.name, found.shared_weights) == ("2 steps of forward Euler", True)
    assert amplification(found, z) == pytest.approx((1 + z) ** 2)


def test_a_module_called_twice_at_one_point_is_one_step_of_twice_the_size():
    found = read(lambda: Step(lambda m, x: x + m.parts[0](x) + m.parts[0](x), dense()))
    assert (found.name, found.step_size) == ("forward Euler", 2.0)


def test_equal_weights_are_no_shared_weights():
    def make():
        first, second = dense(), dense()
        second.load_state_dict(first.state_dict())
        return Step(lambda m, x: (y := x + m.parts[0](x)) + m.parts[1](y), first, second)

    found = read(make)
    assert (found.name, found.shared_weights) == ("Lie splitting (2 Euler steps)", False)


def test_a_shared_norm_makes_no_shared_field():
    def forward(m, x):
        x = x + m.parts[0](m.parts[2](x))
        return x + m.parts[1](m.parts[2](x))

    found = read(lambda: Step(forward, dense(), dense(), nn.LayerNorm(6)))
    assert (found.name, found.shared_weights) == ("Lie splitting (2 Euler steps)", None)


def test_a_skip_that_begins_after_a_norm_and_relu_is_transformed():
    def forward(m, x):
        y = torch.relu(m.parts[1](x))
        return y + m.parts[0](y)

    found = read(lambda: Step(forward, conv(), nn.BatchNorm2d(4)), (2, 4, 5, 5))
    assert (found.name, found.method) == ("transformed skip", None)
    assert "NativeBatchNorm, Relu" in found.notes[0]


def test_a_state_that_is_only_gated_has_no_branch():
    found = read(lambda: Step(lambda m, x: x * torch.sigmoid(m.parts[0](x)), dense()))
    assert found.name.startswith("state times gates")
    assert found.name.endswith("no branch")
    assert (found.method, found.evidence) == (None, "measured")


def test_a_gate_in_lerp_is_a_gate():
    gates = Step(lambda m, x: torch.lerp(x, m.parts[0](x), torch.sigmoid(m.parts[1](x))), dense(), dense())
    found = read(lambda: gates)
    assert found.name.startswith("gated Euler")
    assert found.evidence == "measured"


def test_addcmul_is_a_sum():
    found = read(lambda: Step(lambda m, x: torch.addcmul(x, m.g, m.parts[0](x), value=2.0), dense(),
                              g=nn.Parameter(torch.full((6,), 0.25))))  # fmt: skip
    assert (found.name, found.step_size) == ("forward Euler", 0.5)


class OptionA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + self.second(torch.relu(self.first(x)))


class OptionB(OptionA):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2), nn.BatchNorm2d(8))

    def forward(self, x):
        return torch.relu(self.project(x) + self.second(torch.relu(self.first(x))))


@pytest.mark.parametrize(("block", "note"), [(OptionA, "takes or pads entries"), (OptionB, "projection")])
def test_downsampling_is_a_transition_and_says_how_the_shortcut_goes(block, note):
    (found,) = identify(trace(nn.Sequential(block()).double().eval(), torch.randn(2, 4, 6, 6, dtype=torch.float64)))
    assert (found.name, found.method) == ("transition", None)
    assert note in found.notes[0]


def test_an_opaque_field_between_a_visible_skip_is_euler_with_a_note():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.tanh()

        @staticmethod
        def backward(ctx, g):
            return g

    found = read(lambda: Step(lambda m, x: x + Opaque.apply(m.parts[0](x)), dense()))
    assert found.name == "forward Euler"
    assert any("opaque" in note for note in found.notes)
    hidden = read(lambda: Step(lambda m, x: Opaque.apply(m.parts[0](x)), dense()))
    assert (hidden.name, hidden.method, hidden.evidence) == ("unknown", None, "unknown")


def test_batch_norm_in_training_mode_is_still_euler():
    torch.manual_seed(0)
    model, inputs, _ = stack(lambda: Step(lambda m, x: x + m.parts[0](x), conv()), (3, 4, 5, 5), train=True)()
    flow = trace(model, *inputs)
    assert flow.batch == 1
    assert {found.name for found in identify(flow)} == {"forward Euler"}


def test_half_precision_is_read_with_its_own_rounding():
    model, inputs, _ = stack(lambda: Step(lambda m, x: 0.9 * x + 0.1 * m.parts[0](x), dense()))()
    found = identify(trace(model.bfloat16(), inputs[0].bfloat16()))
    assert [f.name for f in found] == ["damped Euler (a = 0.898)"] * 3


def test_a_norm_or_an_activation_on_the_skip_beside_a_branch():
    found = read(lambda: Step(lambda m, x: torch.tanh(x) + m.parts[0](x), dense()))
    assert (found.name, found.method) == ("transformed skip", None)
    assert "Tanh" in found.notes[0]


def test_a_linear_system_that_is_solved_for_the_state_is_backward_euler():
    M = 1.5 * torch.eye(6, dtype=torch.float64) - 0.5 * torch.softmax(torch.randn(6, 6, dtype=torch.float64), -1)
    found = read(lambda: Step(lambda m, x: torch.linalg.solve(M, x.T).T))
    assert (found.name, found.step_size, found.evidence) == ("backward_euler", 1.0, "proven")
    assert amplification(found) == pytest.approx(1 / (1 - 0.3 - 0.4j))


def test_a_linear_system_with_a_field_on_its_other_side_is_semi_implicit():
    M = 2 * torch.eye(6, dtype=torch.float64)
    found = read(lambda: Step(lambda m, x: torch.linalg.solve(M, (x + m.parts[0](x)).T).T, dense()))
    assert (found.name, found.method) == ("semi-implicit (linear solve)", None)


def test_padding_that_widens_beside_a_linear_branch_is_option_a():
    model = nn.Sequential(Step(lambda m, x: functional.pad(x, (0, 2)) + m.parts[0](x), nn.Linear(4, 6)))
    found = identify(trace(model, torch.randn(3, 4)))[0]
    assert found.name == "transition"
    assert "option A" in found.notes[0]


def test_a_branch_that_is_added_to_a_slice_says_so():
    def forward(m, x):
        x = x.clone()
        x[:, :3] += m.parts[0](x)[:, :3]
        return x

    found = read(lambda: Step(forward, dense()))
    assert (found.name, found.skip) == ("forward Euler", 1.0)
    assert "the branch is added to some entries only" in found.notes


def test_the_last_step_of_a_loop_is_read_whole():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.fields = nn.ModuleList(dense() for _ in range(3))

        def forward(self, x):
            for field in self.fields:
                x = (3 * x + field(x)) / 3
            return x

    found = identify(trace(Loop().double(), torch.randn(2, 6, dtype=torch.float64)))
    assert [record.name for record in found] == ["forward Euler"] * 3
    assert found[-1].step_size == pytest.approx(1 / 3)


def test_a_record_is_one_line_and_other_things_are_refused():
    found = read(lambda: Step(lambda m, x: x + 0.5 * m.parts[0](x), dense()))
    assert str(found) == (
        "step 1: forward Euler, h = 0.5 (the number that multiplies the branch), proven, residual 0; x' = f(x)"
    )
    with pytest.raises(ArgumentTypeError, match=r"flow=3 is an int; expected what stabkit.trace"):
        identify(3)


@pytest.mark.parametrize("kind", ["dense", "sparse", "by edges", "attention"])
def test_a_step_towards_the_mean_of_the_neighbours_is_diffusion(kind):
    nodes = 5
    A = torch.softmax(torch.randn(nodes, nodes, dtype=torch.float64), -1)
    source, target = (index.flatten() for index in torch.meshgrid(*[torch.arange(nodes)] * 2, indexing="ij"))

    def neighbours(m, x):
        if kind == "attention":
            return torch.softmax(m.parts[0](x) @ m.parts[1](x).T, -1) @ x
        if kind == "by edges":
            return torch.zeros_like(x).index_add(0, target, A[target, source, None] * x[source])
        return torch.sparse.mm(A.to_sparse(), x) if kind == "sparse" else A @ x

    make = lambda: Step(lambda m, x: x + 0.5 * (neighbours(m, x) - x), nn.Linear(6, 6), nn.Linear(6, 6))  # noqa: E731
    model, inputs, _ = stack(make, (nodes, 6))()
    found = identify(trace(model, *inputs, batch_dim=None, depth=["0", "1", "2"]))[1]
    assert (found.name, found.step_size) == ("damped Euler (a = 0.5)", 0.5)
    assert found.system.startswith("x' = A x - x, diffusion")


def test_a_leaky_unit_is_no_diffusion():
    found = read(lambda: Step(lambda m, x: 0.5 * x + 0.5 * m.parts[0](x), nn.Linear(6, 6)))
    assert "diffusion" not in found.system


@pytest.mark.parametrize("kept", [(1, 1), (1, 0), (0, 0)], ids=["none dropped", "one dropped", "all dropped"])
def test_stochastic_depth_shows_whatever_was_drawn(kept):
    chances = torch.tensor(kept, dtype=torch.float64)[:, None]
    scale = nn.Parameter(torch.full((6,), 0.5))

    def step(m, x):
        return x + m.scale * m.parts[0](x) * (chances.bernoulli() / 0.8)

    found = read(lambda: Step(step, dense(), scale=scale), train=True)
    p = " (p = 0.8)" if any(kept) else ""
    assert found.name == f"forward Euler, stochastic depth{p}"
    if any(kept):
        assert found.step_size == pytest.approx(0.5)


@pytest.mark.parametrize("draw", [[1.0, 1.0], [1.0, 0.0]], ids=["none dropped", "one dropped"])
def test_a_draw_of_ones_beside_a_division(draw):
    chances = torch.tensor(draw, dtype=torch.float64)[:, None]
    found = read(
        lambda: Step(lambda m, x: x + m.parts[0](x).div(0.8) * (torch.rand(2, 1) < chances).double(), dense()),
        train=True,
    )
    assert (found.name, found.step_size) == ("forward Euler, stochastic depth (p = 0.8)", 1.0)


def test_a_draw_that_chooses_between_a_branch_and_zero():
    def step(m, x):
        y = m.parts[0](x) / 0.5
        return x + torch.where(torch.rand(len(x), 1) < 0.5, y, torch.zeros_like(y))

    torch.manual_seed(0)
    model = nn.Sequential(*(Step(step, dense()) for _ in range(3)))
    found = identify(trace(model.train(), torch.randn(8, 6)))
    assert {record.name for record in found} == {"forward Euler, stochastic depth (p = 0.5)"}


def test_one_number_for_each_sample_is_no_draw():
    for size in (0.3, 1.25, 86.0):
        sizes = torch.tensor([size, size], dtype=torch.float64)[:, None]
        found = read(lambda: Step(lambda m, x: x + m.parts[0](x) * sizes, dense()), train=True)  # noqa: B023
        assert (found.name, found.step_size) == ("forward Euler", pytest.approx(size))


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("shape", [(6, 1), (1, 6)])
def test_a_weight_of_one_row_or_column_that_every_call_makes_anew_is_read(wrap, shape):
    """Such a tensor is contiguous whatever its strides are."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, shape[0]), nn.Tanh(), wrap(nn.Linear(*shape)), nn.Tanh(), wrap(nn.Linear(shape[1], 2))
    )
    assert len(identify(trace(model, torch.randn(3, 6)))) == len(trace(model, torch.randn(3, 6)).steps)


@pytest.mark.parametrize("piece", [torch.arange(25.0)[3:4:24], torch.arange(5.0)[None].T, torch.arange(6.0)[::2]])
def test_the_bytes_of_a_tensor_do_not_depend_on_its_strides(piece):
    assert bytes(raw(piece)) == piece.numpy().tobytes()
