"""Steps in a row that use the same weights: of tied steps the stability region decides what gradients do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from stabkit.identification.fields.shared import constants
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.operations import has_matrix
from stabkit.identification.record import Identification
from stabkit.identification.steps.forks_and_joins import kind_of


def with_same_weights(records: Sequence[Identification], around: Surroundings) -> list[Identification]:
    """Records that say of runs of one method, of two steps or more, that all use the same matrices and kernels."""
    found: list[Identification] = []
    used = [_matrices(around, record) for record in records]
    pairs = list(zip(records, used, strict=True))
    for (_, matrices), run in itertools.groupby(pairs, key=lambda pair: (kind_of(pair[0]), pair[1])):
        alike = [record for record, _ in run]
        if matrices and len(alike) > 1:
            why = f"steps {alike[0].steps[0]} to {alike[-1].steps[-1]} use the same weight matrices"
            alike = [replace(record, notes=(*record.notes, why)) for record in alike]
        found += alike
    return found


def _matrices(around: Surroundings, record: Identification) -> frozenset[tuple[str, tuple[int, ...]]] | None:
    """The parameters that the operations of a step multiply by; None where other matrices are among them."""
    if record.method is None and record.step_size is None:
        return None
    found = set()
    for node in around.nodes(record.steps[0], record.steps[-1] + 1):
        given = constants(node) if has_matrix(node) else ()
        if any(address not in around.names for _, address, *_ in given):
            return None
        found |= {(around.names[address], shape) for _, address, shape, _ in given}
    return frozenset(found)
