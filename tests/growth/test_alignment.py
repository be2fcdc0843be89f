from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

import stabkit
from stabkit.errors import TraceError
from stabkit.growth import alignment_index, lyapunov_spectrum
from tests.growth import systems
from tests.growth.systems import DOUBLE


def standard_map(x: Tensor) -> Tensor:
    p = x[:, 1] + 1.5 * torch.sin(x[:, 0])
    return torch.stack([x[:, 0] + p, p], 1)


def test_a_regular_orbit_is_told_from_a_chaotic_one():
    # beside the elliptic point (pi, 0), and in the chaotic layer around the hyperbolic one (0, 0)
    start = torch.tensor([[3.0, 0.1], [1e-4, 0.0]], dtype=DOUBLE)
    found = alignment_index(stabkit.iterate(standard_map, start, 2000))
    assert found.chaotic.tolist() == [False, True]
    assert found.laws[0].law == "power"
    assert -3 < found.laws[0].exponent < -1.3  # areas stay, both vectors grow like t: 1/t^2


@pytest.mark.parametrize("steps", [200, 500, 2000])
def test_regular_orbits_are_not_chaotic_however_their_volume_falls_at_first(steps):
    # all around the elliptic point of the standard map with K = 0.5, and one in the layer of its separatrix
    regular = [[3.0, 0.0], [2.5, 0.0], [3.14, 0.3], [1.0, 2.5], [1.0, 1.5]]
    start = torch.tensor([*regular, [0.1, 0.05]], dtype=DOUBLE)

    def weaker_map(x: Tensor) -> Tensor:
        p = x[:, 1] + 0.5 * torch.sin(x[:, 0])
        return torch.stack([x[:, 0] + p, p], 1)

    found = alignment_index(stabkit.iterate(weaker_map, start, steps))
    assert found.chaotic.tolist() == [False] * len(regular) + [True]


def test_the_volume_is_that_of_normalised_deviation_vectors():
    flow = systems.henon(25, 3)
    found = alignment_index(flow)
    frame = torch.eye(2, dtype=DOUBLE).expand(3, 2, 2)
    for step in range(6):
        points = flow.states[step].tensors[0]
        J = torch.stack([jacobian(lambda x: systems.henon_step(x.unsqueeze(0))[0], x) for x in points])
        frame = J @ frame
        unit = frame / frame.norm(dim=1, keepdim=True)
        volume = torch.linalg.det(unit).abs().log()
        torch.testing.assert_close(found.log_volume[step + 1], volume, rtol=0, atol=1e-8)


def test_in_chaos_the_volume_falls_with_the_gaps_of_the_spectrum():
    flow = systems.henon(3000, 2)
    exponents = lyapunov_spectrum(flow, discard=0).exponents
    slope = alignment_index(flow).log_volume[-1] / len(flow)
    torch.testing.assert_close(slope, exponents[:, 1] - exponents[:, 0], rtol=0.02, atol=0)


def test_one_vector_spans_no_volume():
    with pytest.raises(TraceError, match="k=1"):
        alignment_index(systems.henon(50, 1), 1)
