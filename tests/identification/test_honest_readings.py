"""Kinds of steps of which too much was once said: what stands behind an addition, streams, scalings, linear parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stabkit.identification import Identification, identify
from stabkit.tracing import trace

D = 8
Step = Callable[[nn.Module, Tensor], Tensor]


class Block(nn.Module):
    """A block whose forward is a function of it and the state, with a field and two matrices."""

    def __init__(self, step: Step, width: int = D) -> None:
        super().__init__()
        self.step, self.width = step, width
        self.f = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.g = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        S = torch.randn(width, width) / width**0.5
        self.register_buffer("A", S @ S.T / 2 + 0.1 * torch.eye(width))  # of a dissipative field -A x
        self.W = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def read(step: Step, shape: tuple[int, ...] = (2, D), depth: int = 3) -> Identification:
    """What is read off the middle one of some blocks in double precision."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(step, shape[-1]) for _ in range(depth))).double()
    found = identify(trace(model, torch.randn(*shape, dtype=torch.float64)))
    return next(r for r in found if depth // 2 in r.steps)


def test_a_gate_before_a_norm_names_a_projected_step():
    """Kuramoto oscillators on spheres: x' = P(x + h (f(x) - (x . f(x)) x))."""

    def step(m, x):
        y = m.f(x)
        return functional.normalize(x + 0.5 * (y - (x * y).sum(-1, keepdim=True) * x), dim=-1)

    found = read(step)
    assert (found.name, found.step_size, found.evidence) == ("projected Euler (post-norm)", 0.5, "measured")


@pytest.mark.parametrize("a", [4.0, -1.5])
def test_a_scaling_alone_has_no_step_size(a):
    found = identify(trace(lambda x: a * x, torch.randn(2, D)))[0]
    assert (found.name, found.step_size, found.skip) == (f"scaled state (a = {a:.3g}), no branch", None, a)
    assert "h =" not in str(found)


def test_what_is_added_last_from_outside_is_no_branch():
    """A sum with a constant after the norms sets no step size."""

    def step(m, x):
        return functional.layer_norm(x + 0.25 * m.f(x), (D,)) + m.W[0]

    found = read(step)
    assert (found.name, found.step_size) == ("projected Euler (post-norm)", 0.25)


def sinkhorn(logits: Tensor) -> Tensor:
    """A doubly stochastic matrix."""
    P = logits.exp()
    for _ in range(20):
        P = P / P.sum(-1, keepdim=True)
        P = P / P.sum(-2, keepdim=True)
    return P


def mixed(how: str) -> Step:
    """Two streams, mixed by a matrix that depends on them."""

    def step(m, x):
        streams = x.unflatten(-1, (2, -1))
        M = sinkhorn(m.f(x)[..., :4].unflatten(-1, (2, 2)))
        if how == "product":
            new = M @ streams
        elif how == "einsum":
            new = torch.einsum("bij,bjd->bid", M, streams)
        else:
            new = (M[..., None] * streams[..., None, :, :]).sum(-2)
        return (new + 0.5 * m.g(x).unflatten(-1, (2, -1))).flatten(-2)

    return step


@pytest.mark.parametrize("how", ["product", "einsum", "by hand"])
def test_a_matrix_of_the_state_on_the_skip_is_no_map_without_one(how):
    found = read(mixed(how))
    assert (found.name, found.evidence, found.method) == ("skip by a matrix of the state", "measured", None)
    if how != "by hand":
        assert "doubly stochastic" in found.notes[0]


def test_attention_with_values_that_pass_weights_is_still_plain():
    found = read(lambda m, x: torch.softmax(x @ m.W @ x.mT, -1) @ m.f(x), (2, 4, D))
    assert (found.name, found.evidence) == ("plain", "proven")


def test_the_line_shows_the_first_note_in_short():
    found = read(lambda m, x: functional.layer_norm(x + m.f(x), (D,)))
    assert str(found).endswith("; the skip passes 1 norm(s) after 1 addition(s), so no single a describes it")


def eye(m: nn.Module) -> Tensor:
    """The identity of the width of a block."""
    return torch.eye(m.width, dtype=m.A.dtype)


def solved(M: Tensor, x: Tensor) -> Tensor:
    """M^-1 on the last axis."""
    return torch.linalg.solve(M, x.T).T


def inverted(M: Tensor, x: Tensor) -> Tensor:
    """M^-1 on the last axis, as a matrix that is made beforehand."""
    return x @ torch.linalg.inv(M).T


def by_cholesky(M: Tensor, x: Tensor) -> Tensor:
    """M^-1 on the last axis by the factors of M."""
    return torch.cholesky_solve(x.T, torch.linalg.cholesky(M)).T


SOLVERS = {"solve": solved, "inverse": inverted, "cholesky": by_cholesky}


@pytest.mark.parametrize("how", SOLVERS)
def test_an_operator_behind_the_addition_is_no_forward_euler(how):
    found = read(lambda m, x: SOLVERS[how](eye(m) + 0.3 * m.A, x + 0.3 * m.f(x)))
    assert found.name.startswith("semi-implicit")
    assert found.step_size == pytest.approx(0.3, rel=1e-9)
    assert found.method is None
    assert found.skip is None


@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize("real", [False, True])
def test_an_operator_in_fourier_space_behind_the_addition_is_semi_implicit(real, divides):
    def step(m, x):
        k = torch.arange(D, dtype=x.dtype)
        rates = 1 + 0.25 * torch.minimum(k, D - k) ** 2

        def solved(u, rates):
            return u / rates if divides else u * (1 / rates)

        y = x + 0.25 * m.f(x)
        if real:
            return torch.fft.irfft(solved(torch.fft.rfft(y), rates[: D // 2 + 1]), n=D)
        return torch.fft.ifft(solved(torch.fft.fft(y), rates)).real

    found = read(step)
    assert found.name == f"semi-implicit {'Euler (linear solve)' if divides else '(linear map behind the addition)'}"
    assert found.step_size == pytest.approx(0.25)


def test_a_spectral_layer_behind_the_addition_is_a_linear_map():
    def step(m, x):
        return torch.fft.ifft(torch.fft.fft(x + 0.25 * m.f(x)) * m.W[0]).real

    assert read(step).name == "linear map behind the addition"


@pytest.mark.parametrize("theta", [0.5, 0.7])
@pytest.mark.parametrize("how", SOLVERS)
def test_theta_is_read_where_an_operator_stands_on_both_sides(how, theta):
    def step(m, x):
        M, N = eye(m) + 0.4 * theta * m.A, eye(m) - 0.4 * (1 - theta) * m.A
        return SOLVERS[how](M, x @ N.T + 0.4 * m.f(x))

    found = read(step)
    linear = "Crank-Nicolson" if theta == 0.5 else "theta = 0.7"
    assert found.name == f"implicit-explicit Euler ({linear} for the linear part)"
    assert found.step_size == pytest.approx(0.4, rel=1e-6)


def test_an_operator_that_the_skip_undoes_leaves_the_state_as_it_is():
    """(1 + h L) x' = x + h L x + h f(x), the formula of IMEXnet."""
    found = read(lambda m, x: solved(eye(m) + 0.2 * m.A, x + 0.2 * x @ m.A.T + 0.2 * m.f(x)))
    assert (found.name, found.step_size) == ("semi-implicit (stabilised by a linear operator)", pytest.approx(0.2))


@pytest.mark.parametrize("turning", [False, True])
def test_the_exponential_euler_step_is_known_by_its_two_matrices(turning):
    def step(m, x):
        L = -m.A + (m.W - m.W.T if turning else 0.0)
        E = torch.linalg.matrix_exp(0.5 * L)
        phi = torch.linalg.solve(0.5 * L, E - eye(m))
        return x @ E.T + 0.5 * m.f(x) @ phi.T

    found = read(step)
    assert (found.name, found.step_size) == ("exponential Euler (matrix)", pytest.approx(0.5))
    assert found.evidence == "proven"


def test_a_matrix_on_the_skip_is_named_as_that():
    found = read(lambda m, x: x @ m.W + m.f(x))
    assert (found.name, found.method, found.step_size) == ("linear skip", None, None)
    assert "space" not in found.system


def test_euler_steps_around_a_solve_are_a_splitting():
    def step(m, x):
        x = x + 0.2 * m.f(x)
        x = solved(eye(m) + 0.2 * m.A, x)
        return x + 0.2 * m.g(x)

    found = read(step)
    assert (found.name, found.step_size) == ("Lie splitting (Euler, backward Euler, Euler)", 0.2)


def newton(m: nn.Module, x: Tensor, theta: float, iterations: int, how: str = "solve") -> Tensor:
    """X' = x + h (theta f(x') + (1 - theta) f(x)) by Newton's method, f(y) = W tanh(A y)."""
    h, y = 0.5, x
    explicit = 0.0 if theta == 1.0 else h * (1 - theta) * (torch.tanh(x @ m.A.T) @ m.W.T)
    for _ in range(iterations):
        s = torch.tanh(y @ m.A.T)
        F = y - x - h * theta * (s @ m.W.T) - explicit
        J = eye(m) - h * theta * m.W @ ((1 - s**2).unsqueeze(-1) * m.A)
        J = J.detach() if how == "chord" else J
        update = torch.linalg.inv(J) @ F.unsqueeze(-1) if how == "inverse" else torch.linalg.solve(J, F.unsqueeze(-1))
        y = y - update.squeeze(-1)
    return y


@pytest.mark.parametrize(("theta", "name"), [(1.0, "backward_euler"), (0.5, "trapezoid"), (0.7, "theta method")])
@pytest.mark.parametrize("how", ["solve", "inverse", "chord"])
def test_a_step_whose_equation_is_solved_by_newton_is_implicit(theta, name, how):
    found = read(lambda m, x: newton(m, x, theta, 8, how))
    assert (found.name.startswith(name), found.evidence) == (True, "measured")
    assert found.step_size == pytest.approx(0.5)
    assert found.residual < 1e-2


def test_a_newton_iteration_that_has_not_ended_is_no_implicit_step():
    def step(m, x):
        return newton(m, 3 * x, 1.0, 2)

    found = read(step)
    assert found.evidence == "unknown"


def test_one_linear_system_with_the_jacobian_of_the_field_is_linearly_implicit():
    def step(m, x):
        s = torch.tanh(x @ m.A.T)
        J = m.W @ ((1 - s**2).unsqueeze(-1) * m.A)
        return x + torch.linalg.solve(eye(m) - 0.5 * J, 0.5 * (s @ m.W.T).unsqueeze(-1)).squeeze(-1)

    found = read(step)
    assert (found.name, found.step_size) == ("linearly implicit Euler (Rosenbrock)", pytest.approx(0.5))


def test_numbers_inside_of_the_fields_of_an_implicit_step_are_not_taken_for_the_same():
    """Where theta multiplies inside the field it is not seen, and no theta is claimed."""

    def step(m, x):
        y = x
        for _ in range(8):
            s = torch.tanh(y @ m.A.T)
            F = y - x - (0.35 * s) @ m.W.T - (0.15 * torch.tanh(x @ m.A.T)) @ m.W.T
            J = eye(m) - 0.35 * m.W @ ((1 - s**2).unsqueeze(-1) * m.A)
            y = y - torch.linalg.solve(J, F.unsqueeze(-1)).squeeze(-1)
        return y

    assert read(step).evidence == "unknown"


SHRINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "sign and relu": lambda y: torch.sign(y) * torch.relu(y.abs() - 0.3),
    "softshrink": lambda y: functional.softshrink(y, 0.3),
    "maximum": lambda y: torch.sign(y) * torch.maximum(y.abs() - 0.3, torch.zeros_like(y)),
    "clamp": lambda y: (y.abs() - 0.3).clamp(min=0.0) * y.sign(),
}


@pytest.mark.parametrize("spelling", SHRINKS)
def test_a_soft_threshold_behind_the_addition_is_a_proximal_step(spelling):
    found = read(lambda m, x: SHRINKS[spelling](x - 0.25 * (x @ m.A.T)), (4, D))
    assert (found.name, found.step_size) == ("forward Euler, then soft threshold (forward-backward)", 0.25)
    assert "t = 0.3:" in found.notes[0]


@pytest.mark.parametrize(
    "other", [lambda y: functional.hardshrink(y, 0.3), lambda y: y.abs(), functional.gelu, lambda y: torch.sin(y)]
)
def test_what_else_follows_the_addition_is_in_the_name(other):
    found = read(lambda m, x: other(x + 0.25 * m.f(x)), (4, D))
    assert found.name.startswith("forward Euler, then ")


def test_a_matrix_that_is_no_implicit_part_makes_no_splitting():
    found = read(lambda m, x: (lambda y: y + 0.2 * m.f(y))(x @ m.W))
    assert "splitting" not in found.name


def test_a_number_before_a_sum_of_branches_is_the_step_size_of_each():
    """h (f(x) + L x) with norms inside f."""

    def step(m, x):
        rhs = x + 0.2 * (m.f(functional.layer_norm(x, (D,))) + x @ m.A.T)
        return solved(eye(m) + 0.2 * m.A, rhs)

    found = read(step)
    assert (found.name, found.step_size) == ("semi-implicit (stabilised by a linear operator)", pytest.approx(0.2))


def test_a_skip_that_grows_is_an_exponential_step_and_the_sign_of_its_branch_is_told():
    found = read(lambda m, x: 1.25 * x - 0.5 * m.f(x))
    assert (found.name, found.skip, found.step_size) == ("scaled skip (a = 1.25)", 1.25, 0.5)
    assert "exponential Euler" in str(found)
    assert any("subtracted" in note for note in found.notes)
    assert not any("subtracted" in note for note in read(lambda m, x: 1.25 * x + 0.5 * m.f(x)).notes)


class TwoStates(nn.Module):
    """Blocks that hand on two tensors, three to six of them."""

    def __init__(self, block: Callable[[], nn.Module], depth: int, *, joined: bool) -> None:
        super().__init__()
        self.first, self.joined = nn.Linear(D, 2 * D), joined
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, dim=-1)
        for block in self.blocks:
            a, b = block(a, b)
        return torch.cat([a, b], -1) if self.joined else b


class Pair(nn.Module):
    """One such block."""

    def __init__(self, step: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.step = step
        self.f = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        self.g = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.step(self, a, b)


def reversible(m, a, b):
    a = a + m.f(b)
    return a, b + m.g(a)


def nesterov(m, x, v):
    for field in (m.f, m.g):
        v = 0.8 * v + field(x + 0.8 * v)
        x = x + v
    return x, v


def summing(m, x, s):
    y = m.f(x)
    return (x + 0.5 * y) / 2**0.5, s + m.g(y)


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (reversible, "reversible (two-stream symplectic Euler)"),
        (nesterov, "Lie splitting (2 steps of Nesterov momentum (gamma = 0.8))"),
        (summing, "damped Euler (a = 0.707), beside a sum of outputs"),
    ],
)
@pytest.mark.parametrize("depth", [3, 4, 6])
@pytest.mark.parametrize("joined", [False, True])
def test_two_tensors_handed_on_between_like_blocks_are_two_states(step, name, depth, joined):
    torch.manual_seed(0)
    model = TwoStates(lambda: Pair(step), depth, joined=joined).double()
    found = identify(trace(model, torch.randn(2, D, dtype=torch.float64)))
    assert found[depth // 2 + 1 if depth == 3 else depth // 2].name == name


def test_branches_that_are_added_up_are_no_states_between_blocks():
    """Experts side by side, each added to a sum: nothing but the sum is made anew."""

    def step(m, x):
        total = torch.zeros_like(x)
        for field in (m.f, nn.Sequential(m.f, m.g), m.g):
            total = total + field(x)
        return x + total

    found = read(step)
    assert found.name == "forward Euler, parallel branches"


def test_a_loop_that_begins_at_a_constant_inside_a_map_claims_no_step_size():
    """NAIS-Net: x' = x + h tanh(A x + B u) from x = 0, with the input u held."""

    def step(m, u):
        x = torch.zeros_like(u)
        for _ in range(5):
            x = x + 0.1 * torch.tanh(x @ m.A + m.f(u))
        return x

    found = read(step)
    assert (found.name, found.step_size, found.evidence) == ("plain", None, "measured")
    assert "loop" in found.notes[0]


def test_a_norm_at_the_beginning_of_like_steps_is_that_of_a_projected_one():
    """The norm of x' = P(x + h f(x)) where the cut lies before it, as a loop that normalises first is cut."""

    def step(m, x):
        x = functional.normalize(x, dim=-1)
        return x + 0.5 * m.f(x)

    found = read(step)
    assert (found.name, found.step_size, found.skip) == ("projected Euler (post-norm)", 0.5, None)
    first = read(lambda m, x: step(m, x) if m.A[0, 0] < 0 else functional.normalize(x, dim=-1).relu() + m.f(x))
    assert first.name == "transformed skip"
