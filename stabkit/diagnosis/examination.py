"""`diagnose`: measure a flow, judge it, and say what is wrong: what was suspected, tried and confirmed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stabkit.diagnosis.alternatives import candidates
from stabkit.diagnosis.batch_statistics import TOO_FEW, with_statistics
from stabkit.diagnosis.finding import Finding, serious, sound
from stabkit.diagnosis.measurement import AnyFlow
from stabkit.diagnosis.remedies import Remedy
from stabkit.diagnosis.suspects import Diagnosis, Settings, ordered, suspected
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.diagnosis.trial import Trial, is_stretch, tried
from stabkit.diagnosis.verdict import not_judged
from stabkit.identification import Identification
from stabkit.parallel import SERIAL, Parallel
from stabkit.tracing import Flow

#: measurements that a diagnosis makes beside its own, at most; a healthy network asks for none
TRIALS = 6
NOTHING_HELPED = "nothing that was tried brings it below a warning"


def diagnose(
    flow: AnyFlow,
    loss: object = None,
    *,
    thresholds: Thresholds | None = None,
    probes: int = 4,
    seed: int = 0,
) -> list[Finding]:
    """What is wrong with a network, worst first; empty when it is healthy.

    What is suspected is tried: its remedy stands in the model for a while, and the same cotangents are pulled back
    again. A remedy is told when it brings the finding below a warning and makes no other; the model stays as it is.

    A block far from its peers is named before anything that concerns a whole stretch. Nothing depends on the units of
    the loss or on the order of the batch.

    A lesson with a picture: ``examples/deep_tanh_network.py``.

    Args:
        flow: a traced forward pass, or an iterated map. More samples make findings surer.
        loss: a callable on the model's output that returns a scalar. None pulls back random cotangents.
        thresholds: the limits behind the findings.
        probes: random cotangents per sample when there is no loss.
        seed: of every random choice.

    Raises:
        TraceError: the loss is not a differentiable scalar of the output that the flow leads to.

    Example:
        >>> import torch, stabkit
        >>> layers = [torch.nn.Linear(16, 16, bias=False) for _ in range(12)]
        >>> for layer in layers: _ = torch.nn.init.orthogonal_(layer.weight)
        >>> _ = layers[5].weight.data.mul_(0.05)
        >>> flow = stabkit.trace(torch.nn.Sequential(*layers), torch.randn(4, 16))
        >>> [(found.kind, found.severity, found.module_path) for found in stabkit.diagnose(flow)]
        [('vanishing', 'warning', '5')]
    """
    return list(examine(flow, loss, thresholds=thresholds, probes=probes, seed=seed).findings)


def examine(
    flow: AnyFlow,
    loss: object = None,
    *,
    thresholds: Thresholds | None = None,
    probes: int = 4,
    seed: int = 0,
    methods: Sequence[Identification] | None = None,
    parallel: Parallel = SERIAL,
    trials: int = TRIALS,
) -> Diagnosis:
    """The same as `diagnose`, with the verdict and the measurement.

    Args:
        flow: as for `diagnose`, like all that is not named here.
        loss: a callable on the model's output.
        thresholds: the limits behind the findings.
        probes: random cotangents per sample when there is no loss.
        seed: of every random choice.
        methods: those of `stabkit.identify`, where they are known.
        parallel: who measures what.
        trials: measurements that trying remedies may take, at most.
    """
    settings = Settings(loss, thresholds or Thresholds(), probes, seed, parallel)
    flow = with_statistics(flow)
    found = suspected(flow, settings, methods)
    if isinstance(flow, Flow) and TOO_FEW in flow.notes and found.verdict.name != "non-finite":
        return replace(found, verdict=not_judged(found.verdict, TOO_FEW), findings=())
    return _confirmed(flow, found, settings, trials)


def _confirmed(flow: AnyFlow, found: Diagnosis, settings: Settings, trials: int) -> Diagnosis:
    """The suspects after their remedies were tried, one cause with one remedy each."""
    waiting = [finding for finding in found.findings if serious(finding) and finding.actions]
    told: dict[int, Finding] = {}
    untried: list[Finding] = []
    while waiting:
        suspect = waiting.pop(0)
        options = candidates(suspect, found.measurement, flow)
        if len(options) > trials:
            untried.append(suspect)
            continue
        trial, remedy, used = _first_cure(flow, suspect, options, found, settings)
        trials -= used
        told[id(suspect)] = _told(suspect, trial, remedy)
        if trial is not None:
            for follower in trial.gone(waiting):
                waiting.remove(follower)
                told[id(follower)] = _follows(follower, suspect)
    left = (told.get(id(finding), finding) for finding in found.findings if finding not in untried)
    kept = [finding for finding in map(sound, left) if finding is not None]
    return replace(found, findings=tuple(ordered(kept)), untried=tuple(untried))


def _first_cure(
    flow: AnyFlow, suspect: Finding, options: Sequence[Remedy], found: Diagnosis, settings: Settings
) -> tuple[Trial | None, Remedy | None, int]:
    """The first remedy that cures a suspect, with its trial, and how many were tried."""
    for count, remedy in enumerate(options, 1):
        trial = tried(flow, suspect, remedy.actions, found, settings)
        if trial.cured:
            return trial, remedy, count
    return None, None, len(options)


def _told(suspect: Finding, trial: Trial | None, remedy: Remedy | None) -> Finding:
    """A suspect with what its trial says."""
    if trial is None or remedy is None:
        return replace(suspect, remedy=NOTHING_HELPED, actions=())
    return replace(
        suspect,
        confidence=trial.share if is_stretch(suspect) else suspect.confidence,
        evidence=f"{suspect.evidence}; tried on a copy: {trial.changes}",
        remedy=remedy.text,
        actions=remedy.actions,
    )


def _follows(follower: Finding, cause: Finding) -> Finding:
    """A suspect that went with the remedy of another."""
    where = cause.module_path or f"step {cause.steps[0]}"
    return replace(
        follower,
        severity="info",
        evidence=f"{follower.evidence}; it is gone with the remedy of {cause.kind} at {where}",
        remedy=f"that of {cause.kind} at {where}",
        actions=(),
    )
