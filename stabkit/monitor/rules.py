"""When a change is an alert."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class AlertRules:
    """When a recorded quantity counts as a spike or a drift.

    All quantities are logs of ratios, so that scaling the loss by a constant changes nothing.

    Attributes:
        warmup: records before anything is judged, and between two findings on the same quantity.
        history: records that a new one is compared with.
        deviations: how many robust deviations (1.4826 median absolute deviations) a spike lies from the median of the
            history at least; a quarter of the way must be made in one record.
        jump: how far a spike lies from the median of the history at least, in nats.
        total_jump: the same for the norm of all gradients, which no ratio steadies, in nats.
        certain: gradient growth that moved less far than this has to stay there for a second record: in recurrent
            networks single batches stand out without harm.
        drift: the median of the newest ``warmup`` records lies this far, in nats, from that of the first ones.
        overflows: with a loss scaler, non-finite gradients are reported after so many records of them in a row.
    """

    warmup: int = 8
    history: int = 50
    deviations: float = 8.0
    jump: float = math.log(4.0)
    total_jump: float = math.log(20.0)
    certain: float = math.log(100.0)
    drift: float = math.log(100.0)
    overflows: int = 3
