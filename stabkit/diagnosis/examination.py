"""`diagnose`: measure a flow, judge it, and say what is wrong: what was suspected, tried and confirmed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from stabkit.arguments import accepts
from stabkit.diagnosis.blocks.initialisation import known_initialisations, made_otherwise
from stabkit.diagnosis.blocks.small_matrices import with_small_matrices
from stabkit.diagnosis.causes import with_causes, with_lost_parameters
from stabkit.diagnosis.depth.without_harm import with_harmless_as_facts
from stabkit.diagnosis.finding import Action, Finding, serious, sound
from stabkit.diagnosis.losses.large import with_large_loss
from stabkit.diagnosis.non_finite.gradient_underflow import gradient_underflow
from stabkit.diagnosis.remedies.alternatives import candidates, scaled_skips
from stabkit.diagnosis.remedies.computed import Remedy
from stabkit.diagnosis.remedies.learning import left_by_a_constant
from stabkit.diagnosis.remedies.made_once import made_once
from stabkit.diagnosis.remedies.outer_causes import (
    is_unusual,
    larger_weights,
    matrices_of,
    median,
    outer_causes,
    smaller_weights,
)
from stabkit.diagnosis.remedies.short_training import (
    ShortTraining,
    clearly_better,
    falls,
    gains,
    helps,
    spoils,
    trained_with,
    undoes,
    worse,
)
from stabkit.diagnosis.remedies.trial import Trial, follows, is_stretch, tried
from stabkit.diagnosis.remedies.usual_training import RATES, adam, ends_of_adam, left_after
from stabkit.diagnosis.states.batch_statistics import with_statistics, without_statistics
from stabkit.diagnosis.suspects import Diagnosis, Settings, ordered, suspected
from stabkit.diagnosis.thresholds import Thresholds
from stabkit.diagnosis.told import (
    GROWS,
    IN_DOUBT,
    Cure,
    as_made,
    by_weight,
    is_of_units,
    of_no_help,
    of_no_use,
    of_same_stretch,
    told_of,
    with_mechanism,
)
from stabkit.diagnosis.verdict import judge, judged_without, not_judged
from stabkit.identification import Identification
from stabkit.jacobians.shared import SharedSpectra
from stabkit.parallel import SERIAL, Parallel
from stabkit.tracing import Flow, FlowLike
from stabkit.tracing.flow_checks import check_flow
from stabkit.tracing.recording.training_pass import training_pass
from stabkit.tracing.recording.untouched_model import walked_once

#: measurements that a diagnosis makes beside its own, at most; a healthy network asks for none
TRIALS = 6
UNTRIED = "none was tried: the trials of this diagnosis went to other suspects; cure those, and diagnose again"
_BY_INITIALISATION = ("vanishing", "exploding", "dead", "transient_growth", "rank_collapse", "overdamped")
_AS_IT_IS = Remedy("")
_OUT_OF_REACH = 1e3  # times what the best constant output leaves of a loss: as far as no factor of data or targets goes
_FAR_ABOVE = 2.0  # times the first loss of a model, from which skips of full strength make it begin too high
_MOVES = 0.98  # of the first loss, under which it has clearly moved
NO_HARM = "none was tried: it does no harm that was measured"


@accepts
def diagnose(
    flow: FlowLike,
    loss: object = None,
    *,
    thresholds: Thresholds | None = None,
    probes: int = 4,
    seed: int = 0,
) -> list[Finding]:
    """What is wrong with a network; of a healthy one, nothing at warning or above.

    What is suspected is tried: its remedy stands in the model for a while, and the same cotangents are pulled back
    again. A remedy is told when it brings the finding below a warning and makes no other; the model stays as it is.

    First stands what is at warning or above and lies in one or two steps, but for kinds that usually follow from
    another; then all else, by severity. Facts, which call for nothing, have the severity ``"info"``. Gradients that are
    zero for want of range are told before all.

    Nothing depends on the order of the batch, or on the units of the loss, but for what says that the usual optimizers
    are not made for these.

    A lesson with a picture: ``examples/deep_tanh_network.py``.

    Args:
        flow: a traced forward pass, or an iterated map. More samples make findings surer. Where the loss reads outputs
            that it does not lead to, ``flow.following(loss)`` is diagnosed; steps are then counted in that.
        loss: a callable on the model's output that returns a scalar. None pulls back random cotangents.
        thresholds: the limits behind the findings.
        probes: random cotangents per sample when there is no loss.
        seed: the seed of every random choice.

    Raises:
        ArgumentTypeError: ``flow`` is something else.
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


@accepts
def examine(
    flow: FlowLike,
    loss: object = None,
    *,
    thresholds: Thresholds | None = None,
    probes: int = 4,
    seed: int = 0,
    methods: Callable[[], Sequence[Identification]] | None = None,
    spectra: SharedSpectra | None = None,
    parallel: Parallel = SERIAL,
    trials: int = TRIALS,
    trained: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> Diagnosis:
    """The full result behind `diagnose`, which returns its findings alone: verdict, measurement and findings.

    Args:
        flow: the flow to examine, over depth or over time.
        loss: a callable on the model's output that returns a scalar; None pulls back random cotangents.
        thresholds: the limits behind the findings.
        probes: random cotangents per sample when there is no loss.
        seed: the seed of every random choice.
        methods: gives those of `stabkit.identify`, where others want them too; called if growth asks for a mechanism.
        spectra: matrices and eigenvalues of the steps by index, where others want them too.
        parallel: who measures what.
        trials: measurements that trying remedies may take, at most.
        trained: whether the weights are known to have been trained, so that no remedy of how they start is one.
        optimizer: that trains the model; what is said of optimizers is then tried with it, at its own settings.
    """
    check_flow(flow)
    settings = Settings(loss, thresholds or Thresholds(), probes, seed, parallel, trained, optimizer)
    with made_once(), walked_once():
        if isinstance(flow, Flow):
            flow = with_statistics(flow if loss is None else flow.following(loss))
            if (lost := gradient_underflow(flow, loss)) is not None:
                # what is zero for want of range says nothing of the layers: they are diagnosed with the loss scaled
                found = _examined(flow, replace(settings, loss=lost.loss), methods, spectra, trials)
                return replace(found, findings=(lost.finding, *found.findings))
        return _examined(flow, settings, methods, spectra, trials)


def _examined(
    flow: FlowLike,
    settings: Settings,
    methods: Callable[[], Sequence[Identification]] | None,
    spectra: SharedSpectra | None,
    trials: int,
) -> Diagnosis:
    """What is suspected, tried, and found besides."""
    found = suspected(flow, settings, methods, spectra)
    missing = without_statistics(flow) if isinstance(flow, Flow) else ""
    if missing and found.verdict.name != "non-finite":
        left = _confirmed(flow, found, settings, trials, _of_no_growth(found.findings))
        left = replace(left, verdict=not_judged(found.verdict, missing))
        return _fit_to_be_told(with_lost_parameters(flow, left, settings))
    tried_out = _confirmed(flow, found, settings, trials, found.findings)
    tried_out = with_harmless_as_facts(flow, tried_out, settings)
    tried_out = with_large_loss(flow, tried_out, found.findings, settings)
    return _fit_to_be_told(with_small_matrices(flow, with_causes(flow, tried_out, settings), settings))


def _fit_to_be_told(found: Diagnosis) -> Diagnosis:
    """A diagnosis without nonsense, whoever found it."""
    return replace(found, findings=tuple(finding for finding in map(sound, found.findings) if finding is not None))


def _of_no_growth(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Findings that rest on no size of states or gradients: where the gradient stops, the size of a weight itself."""
    known = set(_BY_INITIALISATION) | set(IN_DOUBT) | {"saturated", "chaotic", "precision_loss"}
    return tuple(finding for finding in findings if finding.kind not in known or by_weight(finding))


def _is_small_end(finding: Finding, count: int) -> bool:
    """Whether a finding is that of a last layer far smaller than its peers, as it may be on purpose."""
    return finding.kind == "vanishing" and finding.steps[-1] == count - 1 and by_weight(finding)


class _Trials:
    """The trials of one diagnosis: how many are left, and what they said."""

    def __init__(self, flow: FlowLike, found: Diagnosis, settings: Settings, left: int) -> None:
        self.flow, self.found, self.settings, self.left = flow, found, settings, left
        frozen = {
            path for path, p in (flow.model.named_parameters() if isinstance(flow, Flow) else ()) if not p.requires_grad
        }
        self.known = known_initialisations(found.measurement, frozen)
        self.refuted: dict[int, Cure] = {}
        self._without: Trial | None = None
        self._outer: list[Remedy] | None = None
        self.no_help: dict[int, list[Remedy]] = {}  # by suspect, what was taken away in vain
        self.undone: dict[int, ShortTraining] = {}  # with a remedy of these that undid what the model has learnt

    def of_initialisation(self, suspect: Finding) -> Trial | None:
        """What is left of a suspect without the known initialisations, if there are any; measured once for all."""
        if self.known is None or suspect.kind not in _BY_INITIALISATION:
            return None
        if self._without is None:
            if self.left < 1:
                return None
            self.left -= 1
            self._without = tried(self.flow, suspect, self.known.actions, self.found, self.settings)
        return replace(self._without, suspect=suspect)

    def cure(self, suspect: Finding, others: Sequence[Finding] = ()) -> Cure | None:
        """The remedy to tell: the first that cures; of those that cure a stretch, the one that serves best.

        With a loss that is the one that trains best, without one that which leaves fewest other suspects. What is
        suspected of the same stretch besides may be the cause, so its remedies are tried too. Dead units are judged
        by training as well.
        """
        found: list[Cure] = []
        # what killed units may have ruined more than their layer, which only training shows
        dead = suspect.kind == "dead" and callable(self.settings.loss)
        # numbers that one pass keeps finite may leave their range again after a few
        finite = suspect.kind == "non_finite" and callable(self.settings.loss)
        weighed = callable(self.settings.loss) and _is_small_end(suspect, len(self.found.measurement.steps))
        competing = is_stretch(suspect) or dead or finite or weighed
        tries = candidates(suspect, self.found.measurement, self.flow, of_same_stretch(suspect, others))
        every = self.of_all_weights(suspect)
        partial = suspect.kind in _BY_INITIALISATION and self._is_part(suspect, every)
        tries = [*self.outer(suspect), *every, *tries] if partial else [*self.outer(suspect), *tries, *every]
        for remedy in tries:
            if self.left < 1:
                break
            self.left -= 1
            trial = tried(self.flow, suspect, remedy, self.found, self.settings)
            if (weaker := scaled_skips(remedy)) is not None and self._is_too_strong(remedy, trial):
                tries.append(weaker)
            if trial.cured and trial.same_behind_first and is_of_units(suspect, unit := Cure(trial, remedy)):
                return unit  # no training minds it, so that none is to judge other remedies beside it
            if trial.cured:
                trains = self.training(remedy)
                if finite and trains is not None and (not math.isfinite(trains.last) or self._stays(remedy, trains)):
                    continue
                plain = self.training() if trains else None
                serves = helps(trains, plain) if competing or remedy.cause else not spoils(trains, plain)
                ends = (trains, plain) if trains is not None and plain is not None else None
                if serves and weighed and (of_none := self._without_gain(remedy, trains)) is not None:
                    serves, ends = False, of_none
                elif not serves:
                    ends = self._by_adam(suspect, remedy, trains)
                    serves = ends is not None
                if not serves:
                    self.no_help.setdefault(id(suspect), []).append(remedy)
                    if trains is not None and plain is not None and undoes(trains, plain):
                        self.undone[id(suspect)] = trains
                else:
                    found.append(Cure(trial, remedy, trains, ends))
                if weighed and not found:
                    self.refuted[id(suspect)] = Cure(trial, remedy, trains, ends)
                # where all weights were started so and training minds it not, those of the suspect alone come next
                refused = remedy.cause and not serves
                if not (competing or refused) or (weighed and found and not is_stretch(suspect)):
                    break
        best = min(found, key=lambda cure: cure.worth, default=None)
        outer = min((cure for cure in found if cure.outer), key=lambda cure: cure.worth, default=None)
        if outer is not None and best is not None and not worse(outer.trains, best.trains):
            return outer  # weights that make up for it leave it where it is
        whole = min((cure for cure in found if cure.whole), key=lambda cure: cure.worth, default=None)
        if partial and whole is not None and best is not None and not worse(whole.trains, best.trains):
            return whole  # some of the layers that were all started so are not the half of it
        if not dead or best is None:
            return best
        return next(cure for cure in found if not worse(cure.trains, best.trains))  # the mildest that is as good

    def _is_too_strong(self, remedy: Remedy, trial: Trial) -> bool:
        """Whether skips at full strength make another fault, or a loss that begins far above that of the model."""
        if not trial.cured:
            return True
        trains, plain = self.training(remedy), self.training()
        return trains is not None and plain is not None and trains.first > _FAR_ABOVE * abs(plain.first)

    def outer(self, suspect: Finding) -> list[Remedy]:
        """What may lie before the weights where something grows, or a first norm divides by the size of the data."""
        small = suspect.kind == "vanishing" and suspect.steps[0] == 0
        if not (_grows(suspect) or small):
            return []
        if self._outer is None:
            self._outer = outer_causes(self.flow, self.found.measurement) if isinstance(self.flow, Flow) else []
        return [each for each in self._outer if each.data is not None or not small]

    def _stays(self, remedy: Remedy, trains: ShortTraining) -> bool:
        """Whether numbers are finite with a change of the code, and the loss is out of reach of the usual steps.

        A loss that begins at 1e13 may fall a hundredfold and is no nearer to what a constant output leaves of it.
        """
        loss = self.settings.loss
        if remedy.actions or remedy.data is not None or not isinstance(self.flow, Flow):
            return False
        call = self.flow.forward_pass
        left = left_after(call, loss, [adam(rate) for rate in RATES], within=remedy.within)
        if left is None or not left < _MOVES:
            return left is not None
        floor = left_by_a_constant(loss, training_pass(call, loss, differentiate=False).output)
        return floor is not None and left * trains.first > _OUT_OF_REACH * floor

    def _by_adam(
        self, suspect: Finding, remedy: Remedy, treated: ShortTraining | None
    ) -> tuple[ShortTraining, ShortTraining] | None:
        """Steps of Adam with a change of the code, or of all weights, and without: blind to the size of gradients.

        None where those with it do not end clearly lower.
        """
        plain, loss = self.training(), self.settings.loss
        alone = suspect.kind != "copied_units" and not is_stretch(suspect)
        partial = bool(remedy.actions) and not remedy.cause and alone
        if partial or remedy.data is not None or not isinstance(self.flow, Flow):
            return None
        if plain is None or treated is None:
            return None
        ends = ends_of_adam(self.flow.forward_pass, loss, remedy, treated, plain)
        return ends if ends is not None and clearly_better(*ends) else None

    def _without_gain(
        self, remedy: Remedy, treated: ShortTraining | None
    ) -> tuple[ShortTraining, ShortTraining] | None:
        """Trainings with a last layer of usual size and without that gain nothing by it, of plain SGD or of Adam.

        Policies, values and detectors begin with small ones on purpose. Plain SGD moves what is before such a layer
        less at first; to Adam it makes no difference.
        """
        plain, loss = self.training(), self.settings.loss
        if plain is None or treated is None or not isinstance(self.flow, Flow):
            return None
        runs = ((treated, plain), ends_of_adam(self.flow.forward_pass, loss, remedy, treated, plain))
        return next((ends for ends in runs if ends is not None and not gains(*ends)), None)

    def of_all_weights(self, suspect: Finding) -> list[Remedy]:
        """All weights at their usual size, where they were started far from it and the suspect may come of that."""
        if self.settings.trained:
            return []
        if suspect.kind == "vanishing" and (is_stretch(suspect) or len(suspect.steps) > 1):
            return larger_weights(self.found.measurement)
        return smaller_weights(self.found.measurement) if _grows(suspect) or suspect.kind == "saturated" else []

    def _is_part(self, suspect: Finding, every: Sequence[Remedy]) -> bool:
        """Whether the weights of a suspect are some of those that were started far from the usual size, all alike."""
        own = _changed(suspect.actions)
        others = _changed(every[0].actions) - own if every else set()
        gains = [w.gains[0] for w in matrices_of(self.found.measurement) if w.path in others]
        return bool(own and gains) and is_unusual(median(gains))

    def training(self, remedy: Remedy = _AS_IT_IS) -> ShortTraining | None:
        """A short training with a remedy, where there is a loss."""
        loss = self.settings.loss
        return trained_with(self.flow, loss, remedy) if callable(loss) else None


def _confirmed(
    flow: FlowLike, found: Diagnosis, settings: Settings, limit: int, suspects: Sequence[Finding]
) -> Diagnosis:
    """Some suspects of a diagnosis after their remedies were tried, one cause with one remedy each."""
    trials = _Trials(flow, found, settings, limit)
    # copies are the cause of whatever else the layers of copies do
    waiting = sorted(filter(serious, suspects), key=lambda finding: finding.kind != "copied_units")
    told: dict[int, Finding] = {}
    untried: list[Finding] = []
    uncured: list[Finding] = []
    verdict = found.verdict
    while waiting:
        suspect = waiting.pop(0)
        made = trials.of_initialisation(suspect)
        if made is not None and made.gone([suspect]) and trials.known is not None:
            told[id(suspect)] = as_made(suspect, trials.known)
            if made.after is not None and is_stretch(suspect):
                verdict = judged_without(verdict, made.after.verdict, trials.known.words)
            continue
        if isinstance(flow, Flow) and (chosen := made_otherwise(flow.model, suspect)) is not None:
            told[id(suspect)] = chosen
            continue
        by_hand = not (suspect.actions or trials.of_all_weights(suspect) or trials.outer(suspect))
        if by_hand or any(action.get("action") == "convert" for action in suspect.actions):
            if suspect.kind in IN_DOUBT:
                told[id(suspect)] = replace(suspect, severity="info", remedy=NO_HARM)
            continue  # words alone, or another dtype, in which nothing can be measured on these inputs
        if trials.left < 1:
            untried.append(suspect)
            told[id(suspect)] = replace(suspect, remedy=UNTRIED, actions=())
            continue
        cure = trials.cure(suspect, [other for other in found.findings if other is not suspect])

        refuted = trials.refuted.get(id(suspect)) if cure is None else None
        if refuted is not None and refuted.trial.after is not None and (plain := trials.training()) and falls(plain):
            told[id(suspect)] = of_no_use(suspect, refuted.ends or (refuted.trains, plain))
            without = refuted.trial.after.verdict
            if without.name != verdict.name:
                verdict = judged_without(verdict, without, f"the size of weights at {suspect.module_path}")
            continue
        if cure is None and not suspect.actions:
            continue  # its words stand
        told[id(suspect)] = told_of(suspect, cure, settings.thresholds)
        if cure is None and id(suspect) in trials.no_help and (plain := trials.training()) is not None:
            told[id(suspect)] = of_no_help(suspect, plain, trials.no_help[id(suspect)], trials.undone.get(id(suspect)))
        if cure is not None and cure.trial.after is not None and is_of_units(suspect, cure):
            verdict = judged_without(verdict, cure.trial.after.verdict, "the unit of the data")
        if cure is not None:
            gone = cure.trial.gone(waiting)
            told[id(suspect)] = with_mechanism(told[id(suspect)], [*gone, *found.findings])
            for follower in gone:
                waiting.remove(follower)
                told[id(follower)] = follows(follower, suspect)
            for follower in cure.trial.gone(uncured):  # nothing of its own helped, since it was no cause
                told[id(follower)] = follows(follower, suspect)
        else:
            uncured.append(suspect)
    left = [told.get(id(finding)) or _of_no_harm(finding) for finding in suspects]
    if verdict.name == "transient growth" and not any(f.kind == "transient_growth" and serious(f) for f in left):
        verdict = judge(found.measurement.growth, found.measurement.kinds, settings.thresholds)
    kept = [finding for finding in map(sound, left) if finding is not None]
    return replace(found, verdict=verdict, findings=tuple(ordered(kept)), untried=tuple(untried))


def _changed(actions: Sequence[Action]) -> set[str]:
    """The parameters that a remedy changes."""
    return {str(action["parameter"]) for action in actions if "parameter" in action}


def _grows(suspect: Finding) -> bool:
    """Whether something becomes too large, by growth over depth or beyond the range of a dtype."""
    return suspect.kind in GROWS or (suspect.kind == "non_finite" and "range of" in suspect.evidence)


def _of_no_harm(finding: Finding) -> Finding:
    """What is below a warning is told without a remedy that nobody tried."""
    if serious(finding) or not finding.actions:
        return finding
    return replace(finding, remedy=NO_HARM, actions=())
