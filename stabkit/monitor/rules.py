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
        edge: ratio of the sharpness to the optimizer's threshold up to which a run is at the edge of stability, where
            training hovers by itself.
        rate: ratio from which the rate is reported at once.
        grown: factor by which the loss of the closure has grown from its least over the last ``warmup`` looks, to
            half of its first value or more, with which a ratio beyond ``edge`` is reported as well if it grows on.
    """

    warmup: int = 8
    history: int = 50
    deviations: float = 8.0
    jump: float = math.log(4.0)
    total_jump: float = math.log(20.0)
    certain: float = math.log(100.0)
    drift: float = math.log(100.0)
    overflows: int = 3
    # Of 16 runs that blow up by their rate (MLP, convolutions, transformer, LSTM; SGD, momentum, Adam; too high at
    # once, a jump, a climb), two draws each, all were told before the loss was ten times its start; of 27 healthy ones,
    # three draws each, none. Healthy runs at the edge reached 2.5 with a closure of 64 or 128 samples, whose sharpness
    # is above that of all data, and once a spike of the loss that came down again was three times its least.
    edge: float = 1.2
    rate: float = 3.0
    grown: float = 3.0
