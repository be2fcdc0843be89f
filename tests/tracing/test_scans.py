"""Recurrences over time found in recorded graphs by repetition."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.tracing.graph.scans import Scan, scans_between
from stabkit.tracing.graph.values import operation
from stabkit.tracing.maps.scan_flow import over_scan, scans_of

WIDTH = 5


class Written(nn.Module):
    """A residual layer around a loop over time that is given as a function of the layer and its input."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.w, self.u = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.a = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.function(self, x)


def found(function: Callable[..., Tensor], times: int = 12) -> tuple[Scan, ...]:
    x = torch.randn(2, times, WIDTH, generator=torch.Generator().manual_seed(1))
    flow = stabkit.trace(Written(function), x, depth=lambda path, _: path == "", check=False)
    return tuple(scan for i in range(len(flow.steps)) for scan in scans_of(flow, i, i + 1))


def indexed(m: Written, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = m.a * h + x[:, t]
        out.append(h)
    return torch.stack(out, 1)


def sliced(m: Written, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, :1]), []
    for t in range(x.shape[1]):
        h = m.a * h + x[:, t : t + 1]
        out.append(h)
    return torch.cat(out, 1)


def unbound(m: Written, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, 0]), []
    for u in x.unbind(1):
        h = m.a * h + u
        out.append(h)
    return torch.stack(out, 1)


def listed(m: Written, x: Tensor) -> Tensor:
    pieces = [x[:, t] for t in range(x.shape[1])]
    h, out = torch.zeros_like(x[:, 0]), []
    for u in pieces:
        h = m.a * h + u
        out.append(h)
    return torch.stack(out, 1)


def backwards(m: Written, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, 0]), []
    for t in reversed(range(x.shape[1])):
        h = m.a * h + x[:, t]
        out.append(h)
    return torch.stack(out[::-1], 1)


def buffered(m: Written, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, 0]), torch.zeros_like(x)
    for t in range(x.shape[1]):
        h = m.a * h + x[:, t]
        out[:, t] = h
    return out


def last(m: Written, x: Tensor) -> Tensor:
    return indexed(m, x)[:, -1:]


def projected(m: Written, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.tanh(m.w(x[:, t]) + m.u(h))
        out.append(h)
    return torch.stack(out, 1)


def with_a_first_state(m: Written, x: Tensor) -> Tensor:
    h, out = x.mean(1), []
    for t in range(x.shape[1]):
        h = m.a * h + x[:, t]
        out.append(h)
    return torch.stack(out, 1)


def two_steps(m: Written, x: Tensor) -> Tensor:
    before, h, out = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        before, h = h, 0.5 * h - 0.2 * before + x[:, t]
        out.append(h)
    return torch.stack(out, 1)


def increments(m: Written, x: Tensor) -> Tensor:
    h, out = x[:, 0], [x[:, 0]]
    for t in range(1, x.shape[1]):
        h = h + torch.tanh(m.u(h)) * (x[:, t] - x[:, t - 1])
        out.append(h)
    return torch.stack(out, 1)


def inner_steps(m: Written, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        for _ in range(3):
            h = h + 0.1 * torch.tanh(m.u(h) + x[:, t])
        out.append(h)
    return torch.stack(out, 1)


@pytest.mark.parametrize(
    ("function", "cycle"),
    [
        *((f, ["Add", "Mul"]) for f in (indexed, sliced, unbound, listed, backwards, buffered, last)),
        (with_a_first_state, ["Add", "Mul"]),
        (projected, ["Add", "Addmm", "Tanh"]),
        (two_steps, ["Add", "Mul", "Mul", "Sub"]),
        (increments, ["Add", "Addmm", "Mul", "Tanh"]),
        (inner_steps, ["Add", "Add", "Addmm", "Mul", "Tanh"] * 3),
    ],
)
def test_a_loop_over_slices_is_found_however_it_is_written(function, cycle):
    (scan,) = found(function)
    assert sorted(map(operation, scan.cycle)) == sorted(cycle)
    assert len(scan.drives) >= 1
    assert 7 <= len(scan) <= 12
    assert scan.n_steps == {increments: 11}.get(function, 12)


def from_the_first_slice(m: Written, x: Tensor) -> Tensor:
    h = x[:, 0]
    out = [h]
    for t in range(1, x.shape[1]):
        h = m.a * h + (1 - m.a) * x[:, t]
        out.append(h)
    return torch.stack(out, 1)


def from_a_layer(m: Written, x: Tensor) -> Tensor:
    h, out = m.w(x[:, 0]), [x[:, 0]]
    for t in range(1, x.shape[1]):
        h = m.a * h + x[:, t]
        out.append(h)
    return torch.stack(out, 1)


def teacher(m: Written, x: Tensor) -> Tensor:
    """Outputs meet the input of the next time, which is no time step of the state."""
    h, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1] - 1):
        h = m.a * h + x[:, t]
        out.append(h * x[:, t + 1])
    return torch.stack([*out, h], 1)


@pytest.mark.parametrize("times", [8, 12, 17])
@pytest.mark.parametrize("function", [from_the_first_slice, from_a_layer, teacher])
def test_steps_are_counted_from_the_state_that_the_first_begins_with(function, times):
    (scan,) = found(function, times)
    assert scan.n_steps == times - 1


def test_a_state_of_two_times_is_carried_whole():
    (scan,) = found(two_steps)
    assert {len(state) for state in scan.states} == {2}
    assert scan.states[3][1] == scan.states[4][0]


def nothing_carried(m: Written, x: Tensor) -> Tensor:
    return torch.stack([torch.tanh(m.w(x[:, t])) for t in range(x.shape[1])], 1)


def written_only(m: Written, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        out[:, t] = torch.tanh(m.w(x[:, t]))
    return out


def over_depth(m: Written, x: Tensor) -> Tensor:
    h = x
    for _ in range(12):
        h = torch.tanh(m.u(h) + x)
    return h


def same_slice(m: Written, x: Tensor) -> Tensor:
    h = torch.zeros_like(x[:, 0])
    for _ in range(12):
        h = torch.tanh(m.u(h) + x[:, 0])
    return h.unsqueeze(1)


def chosen_entries(m: Written, x: Tensor) -> Tensor:
    """Experts on rows that data choose, added one after another."""
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        rows = torch.tensor([(5 * t) % 12, (5 * t + 1) % 12])
        out = out.index_add(1, rows, torch.tanh(m.w(x[:, rows])))
    return out


@pytest.mark.parametrize("function", [nothing_carried, written_only, over_depth, same_slice, chosen_entries])
def test_other_repetitions_are_none(function):
    assert found(function) == ()


def test_short_sequences_are_spoken_of_where_each_round_multiplies_its_state():
    def fed(m: Written, x: Tensor) -> Tensor:
        h, out = torch.zeros_like(x[:, 0]), []
        a = torch.sigmoid(m.u(x))
        for t in range(x.shape[1]):
            h = a[:, t] * h + x[:, t]
            out.append(h)
        return torch.stack(out, 1)

    def added(m: Written, x: Tensor) -> Tensor:
        h, out, u = torch.zeros_like(x[:, 0]), [], m.u(x)
        for t in range(x.shape[1]):
            h = torch.tanh(h + u[:, t])
            out.append(h)
        return torch.stack(out, 1)

    assert len(found(indexed, times=5)) == 1
    assert found(indexed, times=2) == ()
    assert len(found(fed)) == 1
    assert len(found(fed, times=5)) == 1
    assert len(found(added)) == 1
    assert found(added, times=7) == ()


def test_recurrent_modules_of_torch_are_left_to_their_own_reader():
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(WIDTH, WIDTH, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.rnn(x)[0]

    flow = stabkit.trace(Inside(), torch.randn(2, 16, WIDTH), depth=lambda path, _: path == "", check=False)
    assert scans_of(flow, 0, len(flow.steps)) == ()


def test_a_loop_over_what_a_recurrent_module_returned_is_found():
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)
            self.loop = Written(indexed)

        def forward(self, x: Tensor) -> Tensor:
            return self.loop(self.rnn(x)[0])

    flow = stabkit.trace(Behind(), torch.randn(2, 16, WIDTH), depth=lambda path, _: path == "", check=False)
    (scan,) = scans_of(flow, 0, len(flow.steps))
    assert flow.recorded.path_of(scan.cycle[0]) == "loop"
    assert scan.period == found(indexed)[0].period


def test_the_flow_over_a_scan_has_the_derivative_of_its_formula():
    model, x = Written(indexed).double(), torch.randn(2, 12, WIDTH, dtype=torch.float64)
    flow = stabkit.trace(model, x, depth=lambda path, _: path == "", check=False)
    (scan,) = scans_of(flow, 0, len(flow.steps))
    over = over_scan(flow, scan)
    assert len(over) == len(scan)
    exact = torch.diag((model.a.detach() ** len(scan)).repeat(2))
    torch.testing.assert_close(over.jacobian().dense()[0], exact)


class Counted(list):
    """Counts how often its entries are looked at."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.count = 0

    def __getitem__(self, key):
        self.count += 1
        return super().__getitem__(key)


def test_the_work_of_finding_grows_with_the_length_of_the_sequence():
    looks = []
    for times in (128, 512):
        x = torch.randn(2, times, WIDTH)
        flow = stabkit.trace(Written(projected), x, depth=lambda path, _: path == "", check=False)
        nodes = flow.recorded.graph.nodes = Counted(flow.recorded.graph.nodes)
        scans_of(flow, 0, len(flow.steps))
        looks.append(nodes.count)
    assert looks[1] <= 4.2 * looks[0]


def test_steps_without_a_recurrence_do_not_read_the_parameters_of_all_others():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    flow = stabkit.trace(model, torch.randn(2, 5, 8))
    read: list[Tensor] = []

    def parameters() -> Iterator[Tensor]:
        for parameter in model.parameters():
            read.append(parameter)
            yield parameter

    for before, after in itertools.pairwise(flow.states):  # the heads and the rows of a layer repeat in each
        assert not scans_between(flow.recorded.graph, before.position, after.position, parameters())
    assert not read
