"""Two states that move by turns, each scaled and driven by a field of the other, and mixed or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stabkit


class _ByTurns(nn.Module):
    """A scaled x plus b f(y), then the same of y at the new x, then a mixing with rows that sum to one."""

    def __init__(self, numbers: list[tuple[float, float]], p: float, one_field: bool, mix_new: bool) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.g = self.f if one_field else nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.numbers, self.p, self.mix_new = numbers, p, mix_new

    def forward(self, x: Tensor) -> Tensor:
        y = 0.5 * x.flip(0)
        for a, b in self.numbers:
            x = a * x + b * self.f(y)
            y = a * y + b * self.g(x)
            if self.p < 1:
                mixed = self.p * x + (1 - self.p) * y
                y = self.p * y + (1 - self.p) * (mixed if self.mix_new else x)
                x = mixed
        return x + 2 * y


@pytest.mark.parametrize(
    ("p", "one_field", "mix_new", "told"),
    [
        (0.93, True, True, "then linear mixing by (0.93, 0.07; 0.0651, 0.935)"),
        (0.8, False, False, "then linear mixing by (0.8, 0.2; 0.2, 0.8)"),
        (1.0, False, True, ""),
    ],
)
def test_alternating_affine_steps(p: float, one_field: bool, mix_new: bool, told: str) -> None:
    """Numbers of every round are told, and no branch is lost among values that are held fixed."""
    torch.manual_seed(0)
    numbers = [(1.5, -0.6), (1.3, -0.5), (1.2, -0.4), (1.1, -0.3)]
    model = _ByTurns(numbers, p, one_field, mix_new)
    found = stabkit.identify(stabkit.trace(model, _x()))
    known = [r for r in found if r.name.startswith("alternating")]
    for record, (a, b) in zip(known, numbers, strict=False):
        assert f"(a = {a}, b = {b if one_field else -b})" in record.name  # the sign of a field used once is its own
        assert record.name.endswith(told)
        assert (record.evidence, round(record.step_size or 0.0, 6)) == ("proven", abs(b))
    assert len(known) >= 3
    assert not any("no branch" in r.name for r in found if len(r.steps) > 1)


def test_one_field_by_turns_is_a_loop_of_half_rounds() -> None:
    """Without mixing every half of a round is s_(n+1) = a s_(n-1) + b f(s_n), with numbers of its own."""
    torch.manual_seed(0)
    found = stabkit.identify(stabkit.trace(_ByTurns([(1.5, -0.6), (0.9, -0.5), (1.2, -0.4)], 1.0, True, True), _x()))
    names = [r.name for r in found if r.name.startswith("alternating")]
    told = [f"alternating affine steps of two states, half a round ({n})" for n in
            ("a = 1.5, b = 0.6", "a = 0.9, b = 0.5", "a = 1.2, b = 0.4")]  # fmt: skip
    assert set(names) == set(told)
    assert not any("no branch" in r.name for r in found)


def _x() -> Tensor:
    return torch.randn(3, 4)


def test_scaled_states_that_others_drive_have_a_branch() -> None:
    """x' = a x + F(y) beside y' = y + F(x'): x is a sum of what y gives it, and not a scaled state alone."""

    class Driven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            y, z = x.flip(0), 2 * x
            for f, g in zip(self.f[::2], self.f[1::2], strict=True):
                z = 1.2 * z + f(x) + f(y)
                x, y = x + g(y), 1.5 * y + f(x)
            return x + 2 * y + 3 * z

    torch.manual_seed(0)
    found = stabkit.identify(stabkit.trace(Driven(), torch.randn(3, 4)))
    assert not any("no branch" in r.name for r in found if "coupled" in r.name)
