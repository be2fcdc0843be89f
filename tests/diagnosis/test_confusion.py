from __future__ import annotations

import pytest

from stabkit.diagnosis import examine
from tests.diagnosis.cases import GLOBAL, HEALTHY, LOCAL, Case
from tests.diagnosis.confusion import SCALES, answer, judged, loss_of, serious


def named(cases: list[Case], step: int = 1) -> list[object]:
    return [pytest.param(case, id=case.name) for case in cases[::step]]


def test_the_table_is_large_enough():
    assert len(HEALTHY) >= 12
    assert len(LOCAL) + len(GLOBAL) >= 24


@pytest.mark.parametrize("case", named(HEALTHY + LOCAL + GLOBAL))
def test_right_with_random_cotangents(case: Case):
    wrong, _ = answer(case, 0, None)
    assert not wrong


@pytest.mark.parametrize("case", named(HEALTHY + LOCAL + GLOBAL, 7))
def test_the_units_of_the_loss_change_nothing(case: Case):
    network, block = case.build(1)
    flow = network.flow()
    diagnoses = [examine(flow, loss_of(scale)) for scale in SCALES]
    assert not judged(case, block, diagnoses[0])
    told = [(d.verdict.name, [(f.kind, f.severity, f.steps, f.module_path) for f in serious(d)]) for d in diagnoses]
    assert told[0] == told[1] == told[2]
