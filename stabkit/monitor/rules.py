"""When a change is an alert."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class AlertRules:
    """When a recorded quantity counts as a spike or a drift.

    All quantities are logs of ratios, so that scaling the loss by a constant changes nothing.

    Attributes:
        warmup: number of records before anything is judged, and between two findings about the same quantity.
        history: number of past records that a new one is compared with.
        deviations: least distance of a spike from the median of the history, in robust standard deviations (1.4826
            times the median absolute deviation). At least a quarter of that distance must come in one record.
        jump: least distance of a spike from the median of the history, in nats.
        total_jump: the same limit for the norm of all gradients together, in nats. It is wider than ``jump`` because
            this norm is no ratio and varies more from batch to batch; and the norm must be so far beyond the largest
            before, too.
        certain: a change of gradient growth below this limit, in nats, is reported only if the next record confirms
            it: in recurrent networks single batches stand out without harm.
        drift: distance between the median of the first ``warmup`` records and that of the newest ``warmup`` records
            from which a quantity has drifted, in nats.
        overflows: number of successive records with non-finite gradients after which they are reported when a loss
            scaler is used; a scaler causes single ones on purpose.
        edge: ratio of the sharpness to the optimizer's threshold beyond which updates are tried on copies. At the edge
            of stability training hovers about 1 by itself, and no ratio alone is a finding.
        lost: the loss of the closure, over its first value, that a rate is reported with if trial updates leave it
            there.
    """

    warmup: int = 8
    history: int = 50
    deviations: float = 8.0
    jump: float = math.log(4.0)
    total_jump: float = math.log(20.0)
    certain: float = math.log(100.0)
    drift: float = math.log(100.0)
    overflows: int = 3
    edge: float = 1.0
    lost: float = 1.5
