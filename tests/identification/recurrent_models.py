"""Networks over time: gated, leaky, oscillating; and fixed points."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .family import Built, Family, Step, constant, dense, stack


class Recurrent(nn.Module):
    """A cell called over time, with its states."""

    def __init__(self, cell: nn.Module, size: int = 5, states: int = 1, *, every: bool = True) -> None:
        super().__init__()
        self.cell, self.size, self.states, self.every = cell, size, states, every

    def forward(self, x: Tensor) -> Tensor:
        state: Any = tuple(x.new_zeros(len(x), self.size) for _ in range(self.states))
        state = state if self.states > 1 else state[0]
        outputs = []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outputs.append(state[0] if self.states > 1 else state)
        return torch.stack(outputs, dim=1) if self.every else outputs[-1]


def over_time(cell: Callable[[], nn.Module], states: int = 1, *, every: bool = True) -> Built:
    model = Recurrent(cell(), states=states, every=every).double()
    return model, (torch.randn(2, 6, 3, dtype=torch.float64),), {}


def leaky() -> nn.Module:
    return Step(
        lambda m, x, h: 0.9 * h + 0.1 * torch.tanh(m.parts[0](h) + m.parts[1](x)), nn.Linear(5, 5), nn.Linear(3, 5)
    )


def antisymmetric() -> nn.Module:
    def forward(m: Any, x: Tensor, h: Tensor) -> Tensor:
        skew = m.W - m.W.T - 0.1 * torch.eye(5, dtype=x.dtype)
        return h + 0.05 * torch.tanh(h @ skew.T + m.parts[0](x))

    return Step(forward, nn.Linear(3, 5), W=nn.Parameter(torch.randn(5, 5)))


def cornn() -> nn.Module:
    """Rusch and Mishra 2021: y'' = tanh(...) - gamma y - epsilon y'."""

    def forward(m: Any, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y, z = state
        z = z + 0.1 * (torch.tanh(m.parts[0](torch.cat([x, z, y], dim=1))) - 2.0 * y - 1.5 * z)
        return y + 0.1 * z, z

    return Step(forward, nn.Linear(13, 5))


def cornn_truth(a: complex, b: complex) -> list[list[complex]]:
    """States (z, y); a answers to z and b to y, as they stand in the concatenation."""
    z_row = [1 - 0.15 + 0.1 * a, -0.2 + 0.1 * b]
    return [z_row, [0.1 * z_row[0], 1 + 0.1 * z_row[1]]]


def lem() -> nn.Module:
    """Rusch et al. 2022."""

    def forward(m: Any, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y, z = state
        both = torch.cat([x, y], dim=1)
        slow, fast = torch.sigmoid(m.parts[0](both)), torch.sigmoid(m.parts[1](both))
        z = (1 - fast) * z + fast * torch.tanh(m.parts[2](both))
        return (1 - slow) * y + slow * torch.tanh(m.parts[3](torch.cat([x, z], dim=1))), z

    return Step(forward, *(nn.Linear(8, 5) for _ in range(4)))


def lem_truth(flow: Any, record: Any) -> Any:
    """The gates by the model's own layers, at the state of the step: the sequence, z and y."""
    cell, index = flow.model.cell, record.steps[0]
    sequence, _, y = flow.states[index].tensors
    both = torch.cat([sequence[:, index], y], dim=1)
    slow, fast = (torch.sigmoid(cell.parts[i](both)).mean().item() for i in (0, 1))

    def truth(a: complex, b: complex) -> list[list[complex]]:
        return [[1 - fast, fast * a], [slow * b * (1 - fast), 1 - slow + slow * b * fast * a]]

    return truth


def lstm_truth(flow: Any, record: Any) -> Any:
    """The forget gate from the weights of torch's cell; h' answers to h (its output gate) and to c'."""
    cell, index = flow.model.cell, record.steps[0]
    sequence, _, hidden = flow.states[index].tensors
    sums = sequence[:, index] @ cell.weight_ih.T + cell.bias_ih + hidden @ cell.weight_hh.T + cell.bias_hh
    forget = torch.sigmoid(sums)[:, 5:10].mean().item()

    def truth(a: complex, d: complex, b: complex) -> list[list[complex]]:
        return [[forget, a], [d * forget, b + d * a]]

    return truth


def highway() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        gate = torch.sigmoid(m.parts[1](x) - 1)
        return gate * m.parts[0](x) + (1 - gate) * x

    return Step(forward, dense(), nn.Linear(6, 6))


def highway_truth(flow: Any, record: Any) -> Any:
    """The gate by the model's own layers, at the state of the step."""
    index = record.steps[0]
    gate = torch.sigmoid(flow.model[index].parts[1](flow.states[index].tensors[0]) - 1).mean().item()
    return lambda z: 1 - gate + gate * z


def gru_truth(flow: Any, record: Any) -> Any:
    """The update gate of torch's GRU cell, from its weights."""
    cell, index = flow.model.cell, record.steps[0]
    sequence, hidden = flow.states[0].tensors[0], flow.states[index].tensors[-1]
    from_input = sequence[:, index] @ cell.weight_ih.T + cell.bias_ih
    from_state = hidden @ cell.weight_hh.T + cell.bias_hh
    keep = torch.sigmoid(from_input + from_state)[:, 5:10].mean().item()
    return lambda z: keep + (1 - keep) * z


class Equilibrium(nn.Module):
    """Bai et al. 2019: a fixed point found without gradients, and one step with them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.inject = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(80):
                z = torch.tanh(0.3 * self.inner(z) + self.inject(x))
        return torch.tanh(0.3 * self.inner(z) + self.inject(x))


def equilibrium() -> Built:
    return Equilibrium().double(), (torch.randn(2, 4, dtype=torch.float64),), {}


FAMILIES = (
    Family("Highway", "gated Euler (mean a = 0.736)", stack(highway), highway_truth),
    Family("GRU", "gated Euler (mean a = 0.517)", partial(over_time, lambda: nn.GRUCell(3, 5)), gru_truth, which=2),
    Family("LSTM", "gated memory cell (LSTM)",
           partial(over_time, lambda: nn.LSTMCell(3, 5), 2, every=False), lstm_truth, which=2),
    Family("leaky RNN", "damped Euler (a = 0.9)", partial(over_time, leaky),
           constant(lambda z: 0.9 + 0.1 * z), which=2),
    Family("leaky RNN, last output", "damped Euler (a = 0.9)", partial(over_time, leaky, every=False),
           constant(lambda z: 0.9 + 0.1 * z), which=2),
    Family("antisymmetric RNN", "forward Euler", partial(over_time, antisymmetric),
           constant(lambda z: 1 + 0.05 * z), which=2),
    Family("Elman RNN", "plain", partial(over_time, lambda: nn.RNNCell(3, 5)), constant(lambda z: z), which=2),
    Family("coRNN", "damped oscillator, symplectic Euler (coRNN)", partial(over_time, cornn, 2),
           constant(cornn_truth), which=2),
    Family("LEM", "gated Gauss-Seidel Euler of two states (LEM)",
           partial(over_time, lem, 2, every=False), lem_truth, which=2),
    Family("DEQ", "implicit (fixed point)", equilibrium, None),
)  # fmt: skip
