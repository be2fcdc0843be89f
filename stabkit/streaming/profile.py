"""What is known of a stack of blocks after it was streamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from stabkit.results import Result
from stabkit.streaming.report import report_of

if TYPE_CHECKING:
    from stabkit.report import Report


@dataclass(frozen=True)
class Method:
    """What `stabkit.identify` says of a block.

    Attributes:
        name: the name of the integrator.
        skip: a of x' = a x + f(x); None when no such form was read.
        evidence: how sure that is.
        residual: the residual of the numerical test behind it.
    """

    name: str
    skip: float | None
    evidence: str
    residual: float | None


@dataclass(frozen=True)
class StreamedProfile(Result):
    """What is known of a stack of blocks, per sample.

    Attributes:
        model: the class of the model.
        names: module paths of the blocks.
        gradient_norms: ``(states, batch)``, geometric mean over the probes of the norm of the cotangent at a state.
        state_norms: ``(states, batch)``.
        log_growth: ``(steps, batch)``, nats: log of the norm before a block over that after it, mean over the probes.
        all_log_growth: ``(probes, steps, batch)``.
        singular_values: ``(steps, batch, k)``, descending; None when none were asked for.
        residuals: the residuals of the singular values, as `stabkit.singular_values` gives them.
        converged: whether they have converged.
        seed: the seed of the first probe.
        reused: blocks whose results were in ``out`` already, forward and back.
        weight_bytes: the size of the weight files in bytes.
        notes: what was held fixed.
        gains: ``(steps, batch)``, 1/2 log(|J|_F^2 / m) estimated from two fresh random cotangents, nats.
        methods: what integrator each block is.
        state_shape: the shape of one sample's state.
        block_class: the class of the blocks.
        n_parameters: the number of parameters of the whole model.
        dtype: the dtype of the weights and states while they were used.
        device: where they were.
        chain_error: the largest over the blocks of the relative distance of a step VJP from autograd's.
        seconds: that this run took, without what it found on disk.
    """

    model: str
    names: tuple[str, ...]
    gradient_norms: Tensor
    state_norms: Tensor
    log_growth: Tensor
    all_log_growth: Tensor
    singular_values: Tensor | None
    residuals: Tensor | None
    converged: Tensor | None
    seed: int
    reused: int
    weight_bytes: int
    notes: tuple[str, ...]
    gains: Tensor
    methods: tuple[Method, ...]
    state_shape: tuple[int, ...]
    block_class: str
    n_parameters: int
    dtype: str
    device: str
    chain_error: float
    seconds: float

    @property
    def description(self) -> str:
        """What was read, in a sentence."""
        again = f"; {self.reused} results were there already" if self.reused else ""
        return (
            f"{self.model}: {len(self.names)} blocks streamed from {self.weight_bytes / 1e9:.3g} GB of weights{again}"
        )

    def report(self) -> Report:
        """The same as a report that can be printed, saved, drawn and compared like that of `stabkit.analyze`."""
        return report_of(self)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.names)} blocks, {self.weight_bytes / 1e9:.2f} GB of weights"]
        for i, name in enumerate(self.names):
            norm = "" if self.singular_values is None else f"  |J| {float(self.singular_values[i].max()):.4g}"
            lines.append(f"  {name:32s} growth {float(self.log_growth[i].mean()):+.4f} nats{norm}")
        lines.append(f"  in all {float(self.log_growth.sum(0).mean()):+.4f} nats over {len(self.names)} blocks")
        return "\n".join(lines)
