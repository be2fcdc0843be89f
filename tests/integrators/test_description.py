import json
import math

import pytest

from stabkit import integrators


def test_description_of_rk4():
    about = integrators.describe(integrators.named("rk4"))
    assert (about.stages, about.states, about.order, about.explicit, about.exact) == (4, 1, 4, True, True)
    assert about.real_interval == about.real_interval_strict == pytest.approx(2.785293563405282)
    assert about.stability_polynomials == (("1", "1", "1/2", "1/6", "1/24"), ("1",))
    assert (about.A_stable, about.L_stable, about.alpha, about.ssp_coefficient) == (False, False, 0.0, 0.0)
    assert json.loads(json.dumps(about.to_dict()))["name"] == "rk4"


def test_description_of_an_exponential_step_leaves_open_what_does_not_apply():
    about = integrators.describe(integrators.named("zero_order_hold"))
    assert about.stages is None
    assert about.A_stable is None
    assert about.real_interval == math.inf


def test_maximum_internal_amplification_is_for_bounded_regions():
    assert integrators.describe(integrators.named("backward_euler")).maximum_internal_amplification is None
    # midpoint: Q = z, so the largest |z| with |1 + z + z^2/2| = 1; w = 1 + z has |w^2 + 1| = 2
    found = integrators.describe(integrators.named("midpoint")).maximum_internal_amplification
    largest = max(
        abs(w - 1)
        for k in range(20000)
        for w in [complex(0, 1) * (1 - 2 * complex(math.cos(k * math.pi / 1e4), math.sin(k * math.pi / 1e4))) ** 0.5]
        for w in (w, -w)
    )
    assert found == pytest.approx(largest, rel=1e-6)
