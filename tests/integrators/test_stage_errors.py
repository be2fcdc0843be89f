import math

import pytest

from stabkit import integrators


def test_maximum_internal_amplification_is_for_bounded_regions():
    assert integrators.maximum_internal_amplification(integrators.named("backward_euler")) is None
    # midpoint: Q = z, so the largest |z| with |1 + z + z^2/2| = 1; w = 1 + z has |w^2 + 1| = 2
    found = integrators.maximum_internal_amplification(integrators.named("midpoint"))
    largest = max(
        abs(w - 1)
        for k in range(20000)
        for w in [complex(0, 1) * (1 - 2 * complex(math.cos(k * math.pi / 1e4), math.sin(k * math.pi / 1e4))) ** 0.5]
        for w in (w, -w)
    )
    assert found == pytest.approx(largest, rel=1e-6)
