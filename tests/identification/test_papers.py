from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from stabkit.errors import TraceError
from stabkit.identification import Identification, identify
from stabkit.tracing import trace

from .families import FAMILIES
from .paper import Paper
from .paper_models import PAPERS
from .paper_transformers import HyperConnections, tokens

BY_NAME = {paper.name: paper for paper in PAPERS}
assert len(BY_NAME) == len(PAPERS)


@cache
def record(name: str, scale: float, dtype: torch.dtype, seed: int) -> Identification:
    """What is read of a paper; made once for all tests."""
    return BY_NAME[name].record(scale, dtype, seed)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_no_architecture_is_misread_though_proven_or_measured(paper):
    assert paper.verdict(record(paper.name, 1.0, torch.float32, 0)) != "W"


def tableau(record: Identification) -> str:
    """The tableau of a reading, to the rounding of single precision."""
    blocks = [getattr(record.method, block).round(4).tolist() for block in "AUBV" if hasattr(record.method, block)]
    return str(blocks).replace("-0.0", "0.0")


def agree(records: list[Identification]) -> bool:
    """Whether readings of one step at several inputs have one tableau, and one name where they call it proven.

    A name that was measured may say more than one that is proven: a reversible step whose fields are gradients at this
    input is Hamiltonian there.
    """
    names = {record.name for record in records if record.evidence == "proven"}
    return len(names) == 1 and len({tableau(record) for record in records}) == 1


def readings(paper: Paper, seed: int) -> list[Identification]:
    """What is read at several sizes of the input, but for those at which the model itself leaves every bound."""
    found = [_read_where_finite(paper, scale, seed) for scale in (0.01, 100.0)]
    return [record(paper.name, 1.0, torch.float32, seed), *(one for one in found if one is not None)]


def _read_where_finite(paper: Paper, scale: float, seed: int) -> Identification | None:
    try:
        return paper.record(scale, torch.float32, seed)
    except TraceError as error:
        if "not finite" not in str(error):
            raise
        return None


def proven(records: list[Identification]) -> bool:
    """Whether one of the readings of a step names a method, and calls it proven."""
    return any(r.evidence == "proven" and r.name not in ("fork", "join", "transition") for r in records)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_what_is_proven_of_a_paper_holds_for_every_input(paper):
    for seed in range(2):
        records = readings(paper, seed)
        assert not proven(records) or agree(records)
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
    assert not proven(found) or agree(found)


def test_the_streams_of_hyper_connections_are_those_of_the_code():
    torch.manual_seed(0)
    model = HyperConnections().double()
    record = identify(trace(model, tokens().double()))[2]
    a, M, b = (getattr(model, name)[1].detach().numpy() for name in ("read", "mix", "write"))
    np.testing.assert_allclose(record.method.V, M, atol=1e-10)
    np.testing.assert_allclose(record.method.U[0], a / a.max(), atol=1e-8)
    np.testing.assert_allclose(record.method.B[:, 0], b / b.max(), atol=1e-8)
