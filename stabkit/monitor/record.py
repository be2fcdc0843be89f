"""What one recorded training step says: plain numbers, on the host."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from stabkit.curvature import Secant, TrackedSharpness
from stabkit.results import Result

Array = np.ndarray[Any, np.dtype[Any]]

SHARPNESS = ("sharpness", "sharpness_ratio", "learning_rate", "largest_stable_lr")  # as they are logged
ALONG = ("curvature_along_update", "ratio_along_update")
OF_LOSS = ("log_z", "output_logit")
_WORST = {"attention_logit": "largest", "attention_entropy": "smallest", "epsilon_share": "largest"}
_OF_BLOCKS = ("smallest", "median", "largest")
INSIDE = ("attention_logit", "attention_entropy", "epsilon_share")  # of blocks
PARTS = ("output", "gradient", "parameter_gradient")  # of a block, that may hold NaN or infinity


@dataclass(frozen=True, kw_only=True)
class BlockRecord:
    """One block at one training step. A number that was not measured is NaN.

    Attributes:
        name: path of the module.
        activation_norm: Euclidean norm of its output over the whole batch.
        gradient_norm: Euclidean norm of the loss gradient with respect to that output, unscaled under AMP.
        growth: log of the gradient norm at the output of the block before over that at this block's output, in nats:
            what the gradient gains on its way back through the block. NaN for the first block.
        parameter_norm: Euclidean norm of its parameters, measured at most 10 training steps before.
        parameter_gradient_norm: Euclidean norm of their gradients, unscaled, before clipping.
        update_ratio: norm of the last update of its parameters over their norm, from up to 256 entries of each
            tensor; NaN between two measurements, which are at least 10 training steps apart.
        calls: how often it was called in the step (micro-batches and weight sharing; the mean over processes).
        non_finite: which of ``output``, ``gradient`` and ``parameter_gradient`` have no finite norm.
        attention_logit: the largest logit that its attention gives to a key, above the mean of its row, in a sample of
            heads, queries and keys; looked at every 10 training steps, or more often where it grows.
        attention_entropy: entropy of these rows over that of equal weights, the mean; of several attentions the least.
        epsilon_share: share of the entries of its parameters whose gradients Adam, by the root of their mean square,
            knows to be smaller than its epsilon; looked at every 100 training steps.
    """

    name: str
    activation_norm: float = math.nan
    gradient_norm: float = math.nan
    growth: float = math.nan
    parameter_norm: float = math.nan
    parameter_gradient_norm: float = math.nan
    update_ratio: float = math.nan
    calls: float = 0
    non_finite: tuple[str, ...] = ()
    attention_logit: float = math.nan
    attention_entropy: float = math.nan
    epsilon_share: float = math.nan


class Blocks(Sequence[BlockRecord]):
    """The blocks of a record in the order of their first call: a sequence, kept as columns.

    Attributes:
        names: paths of the modules.
        norms: ``(5, blocks)``, norms of outputs, their gradients, parameters, parameter gradients; update ratios.
        inside: ``(3, blocks)``, attention logits, attention entropies, epsilon shares; None where nothing was seen.
        calls: how often each was called; ``(blocks,)``.
        entries: how many numbers its outputs had; ``(blocks,)``.
        bad: which of `PARTS` are not finite; ``(3, blocks)``.
    """

    __slots__ = ("bad", "calls", "entries", "inside", "names", "norms")

    def __init__(
        self,
        names: tuple[str, ...],
        norms: Array,
        calls: Array,
        entries: Array,
        bad: Array,
        inside: Array | None = None,
    ) -> None:
        self.names = names
        self.norms = norms
        self.calls = calls
        self.entries = entries
        self.bad = bad
        self.inside = inside

    def sharing(self, other: Blocks) -> Blocks:
        """The same, with those columns of another that are equal: thousands of records then take little memory."""
        mine = (self.names, self.calls, self.entries, self.bad)
        theirs = (other.names, other.calls, other.entries, other.bad)
        same = [b if a is b or np.array_equal(a, b) else a for a, b in zip(mine[1:], theirs[1:], strict=True)]
        calls, entries, bad = same
        names = theirs[0] if mine[0] == theirs[0] else mine[0]
        return Blocks(names, self.norms, calls, entries, bad, self.inside)

    def with_inside(self, order: Sequence[str], inside: Array) -> Blocks:
        """The same with what was seen inside of the blocks.

        Args:
            order: the names of blocks that the columns are of.
            inside: as the attribute.
        """
        place = {name: index for index, name in enumerate(order)}
        columns = inside[:, [place[name] for name in self.names]]
        return Blocks(self.names, self.norms, self.calls, self.entries, self.bad, columns)

    @property
    def growth(self) -> Array:
        """Log growth of the gradient back through every block, nats; ``(blocks,)``."""
        logs = _log(self.norms[1])
        found = np.full(len(logs), math.nan)
        found[1:] = logs[:-1] - logs[1:]
        return found

    @property
    def gain(self) -> Array:
        """Log of the ratio of every output's norm to that of the block before, nats; ``(blocks,)``.

        For the first block that of the root mean square of its output.
        """
        logs = _log(self.norms[0])
        found = logs.copy()
        found[1:] -= logs[:-1]
        found[:1] -= 0.5 * _log(self.entries[:1])
        return found

    def columns(self) -> dict[str, Array]:
        """Every quantity of the blocks by its name, ``(blocks,)``."""
        activation, gradient, parameter, parameter_gradient, ratio = self.norms
        return {
            "activation_norm": activation,
            "gradient_norm": gradient,
            "growth": self.growth,
            "parameter_norm": parameter,
            "parameter_gradient_norm": parameter_gradient,
            "update_ratio": ratio,
            **dict(zip(INSIDE, self._inside(), strict=True)),
        }

    def _inside(self) -> Array:
        return np.full((len(INSIDE), len(self)), math.nan) if self.inside is None else self.inside

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> BlockRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[BlockRecord]: ...
    def __getitem__(self, index: int | slice) -> BlockRecord | Sequence[BlockRecord]:
        listed = tuple(self)
        return listed[index]

    def __iter__(self) -> Iterator[BlockRecord]:
        inside = self._inside().T.tolist()
        columns = zip(self.names, self.growth.tolist(), self.calls.tolist(), self.norms.T.tolist(), strict=True)
        for i, (name, growth, calls, (activation, gradient, parameter, parameter_gradient, ratio)) in enumerate(
            columns
        ):
            yield BlockRecord(
                name=name,
                activation_norm=activation,
                gradient_norm=gradient,
                growth=growth,
                parameter_norm=parameter,
                parameter_gradient_norm=parameter_gradient,
                update_ratio=ratio,
                calls=calls,
                non_finite=tuple(part for part, bad in zip(PARTS, self.bad[:, i], strict=True) if bad),
                **dict(zip(INSIDE, inside[i], strict=True)),
            )


@dataclass(frozen=True)
class Look(Result):
    """A measurement of the sharpness.

    Attributes:
        step: the training step.
        found: what was measured.
        shortened: the part of its length that the gradient had at ``monitor.step``, such as by clipping before it; 1
            where it was whole, or where that was not looked at.
    """

    step: int
    found: TrackedSharpness
    shortened: float = 1.0

    @property
    def ratio(self) -> float:
        """The ratio of an update that is so much shorter."""
        return self.found.ratio * self.shortened

    def _contents(self) -> dict[str, Any]:
        return {"step": self.step, "shortened": self.shortened, **vars(self.found)}

    def scalars(self) -> dict[str, float]:
        """The numbers that are logged beside those of a record."""
        found = self.found
        numbers = (found.sharpness, found.ratio, found.learning_rate, found.largest_stable_lr)
        return dict(zip(SHARPNESS, numbers, strict=True))


@dataclass(frozen=True)
class Along(Result):
    """A curvature along an update, measured from two successive gradients and so without a closure.

    Attributes:
        step: the training step whose gradient is the second of the two.
        found: what was measured; it is noisy, since the batches differ.
    """

    step: int
    found: Secant

    def _contents(self) -> dict[str, Any]:
        return {"step": self.step, **vars(self.found)}

    def scalars(self) -> dict[str, float]:
        """The numbers that are logged beside those of a record."""
        return dict(zip(ALONG, (self.found.curvature, self.found.ratio), strict=True))


@dataclass(frozen=True, kw_only=True)
class Record(Result):
    """One training step.

    Attributes:
        step: number of the step, counted by calls of ``monitor.step`` from 0.
        time: seconds since the epoch.
        loss: value of the loss; NaN when it was not given.
        gradient_norm: norm of all parameter gradients, unscaled, before clipping.
        clipped_norm: the same after ``monitor.clip_grad_norm_``; NaN when nothing was clipped.
        non_finite: how many losses, outputs, output gradients and parameter gradients of blocks are not finite.
        blocks: the blocks, in the order in which they were called.
        probes: what presets above ``economy`` measured at this step, by name.
        findings: kinds of the findings raised at this step.
        loss_is_broken: whether a loss was given and is not finite.
        look: the newest measurement of the sharpness since the record before; None where none was made.
        along: the newest curvature along an update, from two gradients, since the record before; None likewise.
        skipped: how many training steps before it were found not healthy when the loop asked, see `Monitor.step`.
        broken_weights: blocks whose weights are not finite, looked at where an output is not.
        handed: a block whose output is the first that is not finite, where what it was given is not either.
        log_z: mean log of the normaliser of the softmax in the loss, the log of the sum of the exponentials of its
            logits, over some of its rows; NaN where it was not seen, or not since the record before.
        output_logit: the largest modulus of these logits.
    """

    step: int
    time: float
    loss: float
    gradient_norm: float
    clipped_norm: float
    non_finite: int
    blocks: Blocks
    probes: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[str, ...] = ()

    loss_is_broken: bool = False
    look: Look | None = None
    along: Along | None = None
    broken_weights: tuple[str, ...] = ()
    skipped: int = 0
    handed: str = ""
    log_z: float = math.nan
    output_logit: float = math.nan

    def _contents(self) -> dict[str, Any]:
        blocks = tuple(self.blocks)
        parts = {"blocks": blocks, "probes": self.probes, "findings": self.findings}
        return {**self.totals(), **parts, "sharpness": self.look, "curvature_along_update": self.along}

    def totals(self) -> dict[str, Any]:
        """The numbers of the whole model by name."""
        names = ("step", "time", "loss", "gradient_norm", "clipped_norm", "non_finite", "skipped", *OF_LOSS)
        return {name: getattr(self, name) for name in names}

    def scalars(self) -> dict[str, float]:
        """The numbers by a flat name for logging tools, as many for any depth; what was not measured is left out.

        Names are ``loss``, ``gradient_norm``, ``clipped_norm``, ``non_finite``, ``findings`` (how many were raised),
        with a closure ``sharpness``, ``sharpness_ratio``, ``learning_rate`` and ``largest_stable_lr``, without one now
        and then ``curvature_along_update`` and ``ratio_along_update``, ``log_z`` and ``output_logit`` of the loss, and
        ``QUANTITY/smallest``, ``QUANTITY/median`` and ``QUANTITY/largest`` over the blocks; of attention and epsilon
        the worst alone.
        """
        top = {name: float(value) for name, value in self.totals().items() if name not in ("step", "time")}
        top["findings"] = float(len(self.findings))
        if self.along is not None:
            top |= self.along.scalars()
        if self.look is not None:
            top |= self.look.scalars()
        for name, values in self.blocks.columns().items():
            known = values[~np.isnan(values)]
            if len(known):
                of_blocks = (known.min(), np.median(known), known.max())
                found = {f"{name}/{which}": float(x) for which, x in zip(_OF_BLOCKS, of_blocks, strict=True)}
                top |= {key: x for key, x in found.items() if name not in _WORST or key == f"{name}/{_WORST[name]}"}
        return {name: value for name, value in top.items() if not math.isnan(value)}


def _log(values: Array) -> Array:
    """Logarithm of what is positive and finite, NaN elsewhere."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.log(values)
    found[~np.isfinite(found)] = math.nan
    return found
