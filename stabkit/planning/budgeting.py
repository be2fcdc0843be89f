"""`plan`: what an analysis will cost, before it is run, and what to leave out for less."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stabkit.arguments import a, accepts
from stabkit.errors import TraceError
from stabkit.planning import sizes
from stabkit.planning.machine_speed import Machine, calibrate
from stabkit.planning.measured_run import Trial, device_of, run_trial, weight_bytes
from stabkit.planning.predicted_cost import SPECTRA, Costs, Price, Settings
from stabkit.results import Result
from stabkit.tracing.cutting.boundaries import Depth
from stabkit.tracing.cutting.endpoints import Target
from stabkit.tracing.recording.batch_parts import Call
from stabkit.tracing.recording.wrappers import unwrap

_SECOND_TRIAL = 3.0  # seconds that the first trial may have taken
_SHARES = (0.5, 0.25, 0.1, 0.05)  # of the work on spectra that are tried, the steps that matter most first


@dataclass(frozen=True)
class Plan(Result):
    """The price of an analysis.

    Attributes:
        model: the class of the model.
        weight_bytes: the bytes of its parameters and buffers.
        samples_given: how many samples the input holds.
        steps: how many steps the model has.
        forward_flops: operations of one forward pass of one sample.
        product_flops: operations of one product with the transposed Jacobian of the whole model, one sample.
        settings: what the plan is for.
        price: what that costs.
        asked: the price of what was asked for; the same when nothing was given up.
        given_up: what was left out to stay within the budget, in sentences.
        fits: whether the price is within the budget.
        budget: seconds; None without a limit.
        memory: bytes; None without a limit.
        machine: what the estimate was calibrated on.
        tried: how many samples were analysed for it.
        trial_seconds: how long that took.
    """

    model: str
    weight_bytes: int
    samples_given: int
    steps: int
    forward_flops: float
    product_flops: float
    settings: Settings
    price: Price
    asked: Price
    given_up: tuple[str, ...]
    fits: bool
    budget: float | None
    memory: int | None
    machine: Machine
    tried: int
    trial_seconds: float

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``stabkit.analyze`` that follow the plan.

        The samples are chosen by the input: see `Plan.call`.
        """
        chosen = self.settings
        return {
            "probes": chosen.probes,
            "spectrum": chosen.spectrum,
            "spectrum_samples": chosen.spectrum_samples,
        }

    def call(
        self, *inputs: Any, kwargs: Mapping[str, Any] | None = None, batch_dim: int | None = 0
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments of the model with as many samples as the plan allows."""
        part = Call(inputs, dict(kwargs or {}), batch_dim).part(0, self.settings.samples)
        return part.inputs, dict(part.kwargs)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


@accepts
def plan(
    model: Any,
    *inputs: Any,
    loss: Callable[[Any], Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    depth: Depth = "auto",
    batch_dim: int | None = 0,
    source: str | None = None,
    target: Target = None,
    spectrum: str = "auto",
    spectrum_samples: int = 1,
    probes: int = 4,
    seed: int = 0,
    budget: str | float | None = None,
    memory: str | float | None = None,
) -> Plan:
    """What ``stabkit.analyze`` with the same arguments will cost, and what to leave out to stay within a budget.

    One sample, and two where that is quick, are analysed with one probe and without spectra; every part is timed, and
    products with every kind of step. The rest is arithmetic. The device is calibrated in a fifth of a second. Where a
    forward pass takes more than a second the model is only recorded, and parts are typical multiples of that pass.

    Args:
        model: the model; this and all arguments that are not explained here are those of ``stabkit.analyze``.
        *inputs: what the model is called with.
        loss: a callable on the model's output.
        kwargs: keyword arguments of the call.
        depth: where steps end.
        batch_dim: which dimension of the input counts samples.
        source: the input to start from.
        target: the output to end at.
        spectrum: how spectra are computed.
        spectrum_samples: how many samples' spectra are computed.
        probes: random cotangents per sample when there is no loss.
        seed: the seed of every random choice.
        budget: time that the analysis may take: seconds, or ``"10m"``.
        memory: what the process may use: bytes, or ``"8G"``.

    Returns:
        A `Plan`. With a budget that even the least does not meet, the least, and ``fits`` is False.

    Raises:
        StabkitError: the model cannot be traced, or an argument makes no sense.

    Example:
        >>> import torch
        >>> layers = [torch.nn.Linear(8, 8) for _ in range(4)]
        >>> found = plan(torch.nn.Sequential(*layers), torch.ones(3, 8), spectrum="none")
        >>> found.steps, found.settings.samples, found.fits, found.forward_flops
        (4, 3, True, 512.0)
    """
    if spectrum not in SPECTRA:
        raise TraceError(f"spectrum={spectrum!r}; expected one of {', '.join(SPECTRA)}")
    limit_seconds = None if budget is None else sizes.seconds(budget)
    limit_bytes = None if memory is None else sizes.n_bytes(memory)
    if not callable(model):
        raise TraceError(f"model is {a(type(model).__name__)}; expected a torch.nn.Module or a function of tensors")
    model = unwrap(model)
    call = Call(inputs, dict(kwargs or {}), batch_dim)
    options = {"depth": depth, "source": source, "target": target}
    costs = _costs(model, call, options, loss, seed, spectrum != "none")
    wanted = Settings(call.samples, 1 if loss is not None else probes, spectrum, spectrum_samples)
    asked = costs.price(wanted)
    choices = list(_lessened(wanted))
    fitting = [choice for choice in choices if _within(costs.price(choice[0]), limit_seconds, limit_bytes)]
    settings, given_up = fitting[0] if fitting else choices[-1]
    trials = [trial for trial in (costs.one, costs.two) if trial is not None]
    return Plan(
        model=type(model).__name__,
        weight_bytes=costs.weight_bytes,
        samples_given=call.samples,
        steps=len(costs.one.steps),
        forward_flops=costs.one.forward_flops / costs.one.samples,
        product_flops=sum(step.flops for step in costs.one.steps) / costs.one.samples,
        settings=settings,
        price=costs.price(settings),
        asked=asked,
        given_up=given_up,
        fits=bool(fitting),
        budget=limit_seconds,
        memory=limit_bytes,
        machine=costs.machine,
        tried=trials[-1].samples,
        trial_seconds=sum(trial.seconds for trial in trials),
    )


def _costs(model: Any, call: Call, options: Mapping[str, Any], loss: Any, seed: int, spectra: bool) -> Costs:
    def trial(count: int) -> Trial:
        return run_trial(model, call.part(0, count), options, loss, seed, spectra)

    machine = calibrate(device_of(model))
    try:
        one = trial(1)
    except TraceError:  # norms in training mode take no single sample
        if call.samples == 1:
            raise
        one = trial(2)
    two = trial(2) if one.samples == 1 < call.samples and one.seconds < _SECOND_TRIAL else None
    return Costs(machine, weight_bytes(model), one, two)


def _within(price: Price, seconds: float | None, n_bytes: int | None) -> bool:
    in_time = seconds is None or price.seconds <= seconds
    return in_time and (n_bytes is None or price.peak_bytes is None or price.peak_bytes <= n_bytes)


def _lessened(wanted: Settings) -> Iterator[tuple[Settings, tuple[str, ...]]]:
    """Settings from the ones wanted to the least, each with what was given up; what says most goes last."""
    now, lost = wanted, dict[str, str]()
    yield now, ()
    if now.spectrum_samples > 1:
        now = dataclasses.replace(now, spectrum_samples=1)
        lost["spectra"] = f"spectra of one sample instead of {wanted.spectrum_samples}"
        yield now, tuple(lost.values())
    if now.spectrum in ("dense", "auto", "full"):
        now = dataclasses.replace(now, spectrum="krylov")
        lost["spectrum"] = f"the largest eigenvalues of every step instead of {_all_of(wanted.spectrum)}"
        yield now, tuple(lost.values())
    while now.probes > 1:
        now = dataclasses.replace(now, probes=now.probes // 2)
        lost["probes"] = f"{_count(now.probes, 'probe')} per sample instead of {wanted.probes}: wider intervals"
        yield now, tuple(lost.values())
    for share in _SHARES if now.spectrum != "none" else ():
        now = dataclasses.replace(now, spectrum_share=share)
        lost["share"] = f"all but {share:.0%} of the work on spectra: those of the steps that matter most remain"
        yield now, tuple(lost.values())
    for spectrum in (wanted.spectrum, "none"):
        fewer = now if now.spectrum == spectrum else dataclasses.replace(now, spectrum="none", spectrum_share=1.0)
        if spectrum == "none" and wanted.spectrum != "none":
            lost["spectrum"] = "all spectra: no eigenvalues, no singular values"
            now = dataclasses.replace(fewer, samples=wanted.samples)
            lost.pop("samples", None)
            lost.pop("share", None)
            yield now, tuple(lost.values())
        while now.samples > 1:
            now = dataclasses.replace(now, samples=now.samples // 2)
            lost["samples"] = f"{_count(now.samples, 'sample')} instead of {wanted.samples}: a verdict less sure"
            yield now, tuple(lost.values())


def _all_of(spectrum: str) -> str:
    return "all of them" if spectrum == "dense" else "all of them where steps are small"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _lines(found: Plan) -> Iterator[str]:
    price, chosen = found.price, found.settings
    samples, probes = _count(chosen.samples, "sample"), _count(chosen.probes, "probe")
    yield f"{found.model}: {_count(found.steps, 'step')}, {samples}, {probes}, spectrum {chosen.spectrum}"
    yield f"  forward pass     {sizes.amount(found.forward_flops, 'FLOP')} a sample"
    yield f"  product          {sizes.amount(found.product_flops, 'FLOP')} a sample, through all steps"
    yield f"  products         {price.products} vectors times one step"
    yield f"  arithmetic       {sizes.amount(price.flops, 'FLOP')}"
    once = sizes.amount(found.weight_bytes, "B")
    yield f"  weights read     {sizes.amount(price.read_bytes, 'B')} ({once} at a time)"
    peak = "not known here" if price.peak_bytes is None else sizes.amount(price.peak_bytes, "B")
    yield f"  peak memory      {peak}" + ("" if found.memory is None else f" of {sizes.amount(found.memory, 'B')}")
    allowed = "" if found.budget is None else f" of {sizes.duration(found.budget)}"
    yield f"  time             {sizes.duration(price.seconds)}{allowed}"
    if found.given_up:
        before = found.asked
        peak = "" if before.peak_bytes is None else f" and {sizes.amount(before.peak_bytes, 'B')}"
        yield f"  given up         (what was asked for takes {sizes.duration(before.seconds)}{peak})"
        yield from (f"    - {words}" for words in found.given_up)
    if not found.fits:
        yield "  DOES NOT FIT: this is the least that an analysis takes; stream the weights, or use more ranks"
    machine, tried = found.machine, _count(found.tried, "sample")
    rates = f"{sizes.amount(machine.flops, 'FLOP/s')}, {sizes.amount(machine.bandwidth, 'B/s')}"
    yield f"  calibrated on    {machine.device}, {_count(machine.threads, 'thread')}: {rates}"
    took = sizes.duration(found.trial_seconds)
    yield f"                   load {machine.load:.1f} a core; {tried} with 1 probe and no spectra: {took}"
