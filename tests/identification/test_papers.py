from __future__ import annotations

import numpy as np
import pytest
import torch

from stabkit.identification import Identification, identify
from stabkit.tracing import trace

from .families import FAMILIES
from .paper_models import PAPERS
from .paper_transformers import HyperConnections, tokens


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_no_architecture_is_misread_though_proven_or_measured(paper):
    assert paper.verdict(paper.record()) != "W"


def said(record: Identification) -> tuple[object, ...]:
    """What a reading says of a step: its name and its tableau, to the rounding of single precision."""
    blocks = [getattr(record.method, block).round(4).tolist() for block in "AUBV" if hasattr(record.method, block)]
    return record.name, str(blocks).replace("-0.0", "0.0")


def proven(records: list[Identification]) -> bool:
    """Whether one of the readings of a step names a method, and calls it proven."""
    return any(r.evidence == "proven" and r.name not in ("fork", "join", "transition") for r in records)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_what_is_proven_of_a_paper_holds_for_every_input(paper):
    for seed in range(2):
        records = [paper.record(scale, torch.float32, seed) for scale in (1.0, 0.01, 100.0)]
        assert not proven(records) or len({said(record) for record in records}) == 1
    records = [paper.record(1.0, dtype, seed=2) for dtype in (torch.float32, torch.float64)]
    assert not proven(records) or len({record.name for record in records}) == 1


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_is_proven_of_a_family_holds_for_every_input(family):
    found = []
    for scale in (1.0, 0.01, 100.0):
        torch.manual_seed(0)
        model, (x, *rest), kwargs = family.build()
        x = x * scale if x.is_floating_point() else x
        found.append(identify(trace(model, x, *rest, **kwargs))[family.which])
    assert not proven(found) or len({said(record) for record in found}) == 1


def test_the_streams_of_hyper_connections_are_those_of_the_code():
    torch.manual_seed(0)
    model = HyperConnections().double()
    record = identify(trace(model, tokens().double()))[2]
    a, M, b = (getattr(model, name)[1].detach().numpy() for name in ("read", "mix", "write"))
    np.testing.assert_allclose(record.method.V, M, atol=1e-10)
    np.testing.assert_allclose(record.method.U[0], a / a.max(), atol=1e-8)
    np.testing.assert_allclose(record.method.B[:, 0], b / b.max(), atol=1e-8)
