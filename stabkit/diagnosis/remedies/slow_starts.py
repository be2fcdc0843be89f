"""Whether a model that few steps bring nowhere begins slowly and learns, or does not learn at the usual rates.

Sparse rows that sum to 1, and other small or uneven inputs, hold the first steps back; after some dozens more Adam has
moved the weights as far as it takes, and the model ends as good as one whose inputs are standardised. Large ones that
saturate the first tanh leave the signs of features, of which many tell samples apart.

Held against full trainings (200 to 800 steps of Adam, two seeds, accuracy or R^2 of samples held out) of 20 models on
inputs of .003 to 300 times unit size (perceptrons of ReLU and tanh, recurrent layers, bags of words, two to four layers
of graph convolution): 10 end worse than with inputs of size 1, by .02 to .5, and 10 do not. Of these 10 one is warned
of, with the optimizer given: a tanh network on inputs of size 300 that ends .016 worse. Of the others 8 are with the
optimizer given, and 4 without it, since the rest learn at the larger of the usual rates. Missed are a tanh network that
loses .04, and four layers of graph convolution that learn their few labels by heart and little of the rest, by weight
decay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stabkit.diagnosis.remedies.given_optimizer import named_settings
from stabkit.diagnosis.remedies.learning import beside_a_constant
from stabkit.diagnosis.remedies.usual_training import RATES, Update, adam, left_on_the_way, sgd
from stabkit.tracing.recording.forward_pass import ForwardPass

_STEPS = 100
_LEARNT = 0.05  # of what the best constant output leaves, below which all is learnt as it is: .095 was not yet
_LEARNS = 0.25  # the same, below which it learns if it goes on
#: of what three quarters of the steps leave, below which it goes on: sparse rows of which 40 to 100 steps learn had .6
#: at most, and features to which a model stays deaf beside others .94
_GOES_ON = 0.8
_AS_MUCH = 1.5  # by how much it may learn less, and leave more, than with the remedy: the rest may be noise
_MOST_MOMENTUM = 0.99
SLOWLY = "none is needed: it learns as it is; with inputs of size 1 it would begin faster"

Treated = Callable[[Sequence[Update], int], float | None]


@dataclass(frozen=True)
class MoreSteps:
    """What more steps leave of a loss as it is.

    Attributes:
        left: over what it was at first; None where not tried.
        slow: whether it learns by then.
        given: whether at the rates of the optimizer that is given.
    """

    left: float | None
    slow: bool
    given: bool

    def __str__(self) -> str:
        if self.left is None:
            return ""
        rate = " at the rate of the optimizer" if self.given else ""
        words = ": it begins slowly, and learns" if self.slow else ""
        return f"; {_STEPS} steps{rate} leave {self.left:.2g} of it as it is{words}"


def more_steps(
    call: ForwardPass,
    loss: Any,
    treated: Treated,
    optimizer: torch.optim.Optimizer | None,
    *,
    going_on: bool = True,
) -> MoreSteps:
    """What more steps do to a model as it is, and whether that is learning.

    Args:
        call: the pass as training makes it.
        loss: a callable on the output that returns a scalar.
        treated: what some updates leave of the loss with the remedy after a number of steps, over what it was.
        optimizer: that trains the model, whose rates count; the better of the usual ones of Adam where it is not known.
        going_on: whether a loss that is falling still counts as learning, and not only one that is nearly gone or as
            low as with the remedy. Behind a first layer that is lost, the layers after it learn by heart what it draws.
    """
    updates, now = _updates(optimizer), beside_a_constant(call, loss)
    run = left_on_the_way(call, loss, updates, steps=_STEPS)
    if run is None:
        return MoreSteps(None, False, optimizer is not None)
    left = min(run[_STEPS], run[9 * _STEPS // 10])  # since of a loss behind dropout the last value is one draw
    beside = left * (1.0 if now is None else now)
    falls = going_on and beside < _LEARNS and left < _GOES_ON * run[3 * _STEPS // 4]
    slow = beside < _LEARNT or falls
    if not slow and (cured := treated(updates, _STEPS)) is not None:
        slow = beside < _AS_MUCH * cured and _AS_MUCH * (1.0 - beside) > 1.0 - cured > 0
    return MoreSteps(left, slow, optimizer is not None)


def _updates(optimizer: torch.optim.Optimizer | None) -> list[Update]:
    rates = [rate for rate in named_settings(optimizer, "lr") if rate > 0] if optimizer is not None else []
    if optimizer is None or not rates:
        return [adam(rate) for rate in RATES]
    if any("betas" in group for group in optimizer.param_groups):
        return [adam(rate) for rate in rates]
    momentum = min(max(named_settings(optimizer, "momentum"), default=0.0), _MOST_MOMENTUM)
    return [sgd(rate / (1.0 - momentum)) for rate in rates]
