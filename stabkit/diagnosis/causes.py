"""What is found once, after the trials: causes behind what the states show, time inside depth, lost parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from stabkit.diagnosis.depth.affine_models import affine_findings
from stabkit.diagnosis.depth.findings import with_slopes, with_softmaxes
from stabkit.diagnosis.depth.post_norm import post_norm_findings
from stabkit.diagnosis.depth.unsettled import unsettled_findings
from stabkit.diagnosis.finding import LEARNT, Finding, as_fact, serious
from stabkit.diagnosis.inputs.alike_rows import alike_row_findings
from stabkit.diagnosis.inputs.attention_masks import mask_findings
from stabkit.diagnosis.inputs.coordinates import coordinate_findings
from stabkit.diagnosis.inputs.feature_scales import feature_scale_findings
from stabkit.diagnosis.inputs.lost_order import lost_order_findings
from stabkit.diagnosis.inputs.padding import padded_end_findings
from stabkit.diagnosis.inputs.read_positions import read_position_findings
from stabkit.diagnosis.inputs.scale import with_input_scale, with_small_inputs
from stabkit.diagnosis.inputs.unused import unused_input_findings
from stabkit.diagnosis.losses.domains import loss_domain_findings
from stabkit.diagnosis.losses.drowned_terms import drowned_term_findings
from stabkit.diagnosis.losses.floor import loss_floor_findings
from stabkit.diagnosis.losses.ignored_class import ignored_class_findings
from stabkit.diagnosis.losses.last_dropout import last_dropout_findings
from stabkit.diagnosis.losses.loud_logits import loud_logits_findings
from stabkit.diagnosis.losses.mixed_samples import mixed_sample_findings
from stabkit.diagnosis.losses.next_tokens import OF_SOFTMAX, next_token_findings
from stabkit.diagnosis.losses.saturating import saturating_findings
from stabkit.diagnosis.losses.unequal_classes import unequal_class_findings
from stabkit.diagnosis.losses.units import unit_findings
from stabkit.diagnosis.losses.without_end import without_end_findings
from stabkit.diagnosis.no_gradient.closed_operations import closed_findings
from stabkit.diagnosis.no_gradient.hidden_cuts import cut_by_a_draw, drawn_on_the_graph, hidden_cut_findings
from stabkit.diagnosis.no_gradient.kept_graphs import kept_graph_findings
from stabkit.diagnosis.no_gradient.lost_parameters import lost_parameter_findings
from stabkit.diagnosis.no_gradient.made_anew import made_anew_findings
from stabkit.diagnosis.no_gradient.passed_through import passed_through_findings
from stabkit.diagnosis.no_gradient.shares_of_one import share_findings
from stabkit.diagnosis.no_gradient.unregistered import unregistered_findings
from stabkit.diagnosis.no_gradient.wrong_derivatives import wrong_derivative_findings
from stabkit.diagnosis.no_gradient.zero_gradients import zero_gradient_findings, zeros_of
from stabkit.diagnosis.non_finite.findings import non_finite_findings
from stabkit.diagnosis.non_finite.half_weights import half_weight_findings
from stabkit.diagnosis.over_time.cut_states import CUT, cut_state_findings
from stabkit.diagnosis.over_time.findings import NOTHING, time_findings
from stabkit.diagnosis.over_time.verdict import judged_over_time
from stabkit.diagnosis.remedies.given_optimizer import climbs
from stabkit.diagnosis.remedies.trial import follows, tried
from stabkit.diagnosis.states.batch_places import batch_place_findings
from stabkit.diagnosis.states.cut_axes import cut_axes_findings
from stabkit.diagnosis.states.dropout_in_evaluation import dropping_in_evaluation
from stabkit.diagnosis.states.empty_nodes import empty_node_findings
from stabkit.diagnosis.states.heavy_dropout import heavy_dropout_findings
from stabkit.diagnosis.states.neighbours import with_neighbours
from stabkit.diagnosis.states.running_statistics import statistics_findings
from stabkit.diagnosis.states.samples_apart import mixed_batch_findings
from stabkit.diagnosis.states.softmax_axes import softmax_axis_findings
from stabkit.diagnosis.suspects import Diagnosis, Settings, broken_verdict, ordered, suspected
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.diagnosis.verdict import judged_without
from stabkit.tracing import Flow, FlowLike
from stabkit.tracing.recording.training_pass import training_pass

#: what states show that forget, or blow up, over time
_OF_STATES = ("rank_collapse", "saturated", "vanishing", "exploding", "chaotic", "transient_growth")
_LEARNS = 0.5  # of what a short training leaves without a remedy, below which it must come with it
_OF_DEPTH = ("exploding", "vanishing", "non-finite")  # verdicts that stand whatever else is found
_NOT_TRAINED = frozenset({"loss", "no_gradient", "unregistered", "non_finite", "exploding", "leak", "copied_units"})


def with_causes(flow: FlowLike, found: Diagnosis, settings: Settings) -> Diagnosis:
    """A diagnosis with what else is wrong; a memory that vanishes over time is the verdict where depth is in order."""
    if not isinstance(flow, Flow):
        return found
    if masks := mask_findings(flow, settings.loss):  # of which NaN comes where a row has no key left
        found = replace(found, findings=(*masks, *found.findings))
    if found.verdict.name == "non-finite":
        return found
    if unsettled := unsettled_findings(flow):  # what comes after a state that is no fixed point may follow from it
        found = replace(found, findings=tuple(ordered([*unsettled, *found.findings])))
    if function := mixed_batch_findings(flow) or batch_place_findings(flow):
        kept = [
            f for f in found.findings if "softmax_axis" not in f.numbers
        ]  # that of a softmax over samples, as it is
        found = replace(found, findings=tuple(ordered([*kept, *function])))
    before, found = found, with_lost_parameters(flow, found, settings)
    if found.verdict.name == "non-finite":  # of a parameter alone
        return found
    found = with_small_inputs(flow, _of_one_cause(flow, before, found, settings), settings)
    named = [with_slopes(each, found.measurement) for each in with_input_scale(flow, found, settings)]
    named = [with_softmaxes(each, flow, found.measurement) for each in named]
    named = [with_neighbours(flow, each, settings.loss) if each.kind == "rank_collapse" else each for each in named]
    others = statistics_findings(flow, settings.loss)
    if not any(serious(finding) for finding in named):
        others += post_norm_findings(flow, found.measurement, settings.loss)
    found = replace(found, findings=tuple(ordered([*named, *others])) if others else tuple(named))
    over_time = [_cut_off(each, found) for each in time_findings(flow, settings.loss, settings.thresholds)]
    learnt = [f for f in found.findings if serious(f) and f.numbers.get(LEARNT, math.inf) < _LEARNS]
    for cause in learnt[:1]:  # what a model learns with all the same is no second fault
        over_time = [_beside(cause, each) for each in over_time]
        found = replace(found, findings=tuple(ordered([_beside(cause, each) for each in found.findings])))
    verdict = found.verdict
    worst = next((finding for finding in over_time if serious(finding)), None)
    if worst is None:
        verdict = judged_over_time(flow, verdict, settings.loss, settings.thresholds)
    elif verdict.name not in _OF_DEPTH:
        verdict = replace(verdict, name=worst.kind, summary=f"{worst.kind.capitalize()}: {worst.evidence}.")
    over_depth = [_the_same(finding, over_time, flow) for finding in found.findings]
    for cause in over_time:
        over_depth = _without_followers(flow, found, over_depth, cause, settings)
    return replace(found, verdict=verdict, findings=tuple(ordered([*over_depth, *over_time])))


def _cut_off(finding: Finding, found: Diagnosis) -> Finding:
    """A memory of which nothing at all comes back, where the states are taken off the graph, which says it already."""
    cut = next((other for other in found.findings if CUT in other.numbers), None)
    if cut is None or not finding.numbers.get("growth_over_time", 0.0) <= NOTHING:
        return finding
    return as_fact(finding, "its states are taken off the graph", f"that of {cut.kind} at {cut.module_path}")


def _beside(cause: Finding, other: Finding) -> Finding:
    """A finding on states or gradients, as a fact beside a cause without which the model learns as it is otherwise."""
    if other is cause or not serious(other) or other.kind not in _OF_STATES:
        return other
    return follows(other, cause, "no harm that keeps the model from learning")


def _of_one_cause(flow: Flow, before: Diagnosis, found: Diagnosis, settings: Settings) -> Diagnosis:
    """What nothing of its own cured, told as what follows where it goes with the remedy of a cause that came after.

    Args:
        flow: the traced pass.
        before: the diagnosis without the causes that parameters and the loss show.
        found: the same with them.
        settings: how suspects are looked for.
    """
    known = {id(finding) for finding in before.findings}
    for cause in [f for f in found.findings if id(f) not in known and serious(f) and f.actions]:
        loose = [f for f in found.findings if id(f) in known and serious(f) and not f.actions]
        if not loose:
            break
        trial = tried(flow, loose[0], cause.actions, before, settings)
        gone = {id(finding) for finding in trial.gone(loose)}
        if not gone or trial.after is None:
            continue
        told = [follows(f, cause) if id(f) in gone else f for f in found.findings]
        verdict = found.verdict
        if any(id(f) in gone and f.kind == verdict.name for f in loose):
            verdict = judged_without(
                verdict, trial.after.verdict, f"{cause.kind} at {cause.module_path or 'the model'}"
            )
        found = replace(found, verdict=verdict, findings=tuple(ordered(told)))
    return found


def _without_followers(
    flow: Flow, found: Diagnosis, findings: list[Finding], cause: Finding, settings: Settings
) -> list[Finding]:
    """Findings on the states of a recurrent module, those that go with its remedy over time told as what follows."""
    whole = not cause.module_path  # a loop in the code of the model itself
    inside = [f for f in findings if whole or _runs_in(f.module_path, cause.module_path)]
    suspects = [f for f in inside if serious(f) and f.kind in _OF_STATES]
    if not suspects or not serious(cause) or not cause.actions:
        return findings
    trial = tried(flow, suspects[0], cause.actions, found, settings)
    gone = trial.gone(suspects)
    less = [f for f in suspects if f not in gone and trial.after is not None and _lessened(f, trial.after)]
    told = {id(f): follows(f, cause) for f in gone} | {id(f): follows(f, cause, "mostly gone") for f in less}
    return [told.get(id(finding), finding) for finding in findings]


def _lessened(finding: Finding, after: Diagnosis) -> bool:
    """Whether what tells samples apart falls by less than half as many decades as it did."""
    left = [f for f in after.findings if f.kind == finding.kind == "rank_collapse"]
    return bool(left) and max(map(_decades, left)) < _decades(finding) / 2


def _decades(collapse: Finding) -> float:
    before, after = collapse.numbers["before"], collapse.numbers["after"]
    return math.log10(before / after) if after > 0 else math.inf


def _the_same(finding: Finding, over_time: Sequence[Finding], flow: Flow) -> Finding:
    """A finding on a stretch whose steps are those of a loop over time, said once and with the remedy over time.

    That nearby states part is what gradients say that explode over time.
    """
    for other in over_time:
        inside = [i for i in finding.steps if _runs_in(flow.steps[i].module_path, other.module_path)]
        same = finding.kind == other.kind or (finding.kind, other.kind) == ("chaotic", "exploding")
        if serious(finding) and same and 2 * len(inside) > len(finding.steps):
            words = f"this is what is found over time at {other.module_path}"
            return as_fact(finding, words, f"that of {other.kind} over time at {other.module_path}")
    return finding


def _runs_in(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def with_lost_parameters(flow: FlowLike, found: Diagnosis, settings: Settings) -> Diagnosis:
    """A diagnosis with the parameters that get no gradient: a pass of its own, which no trial of a remedy repeats."""
    if not isinstance(flow, Flow):
        return found
    call, loss = replace(flow.forward_pass, through_no_grad=False), settings.loss
    done = training_pass(call, loss, differentiate=callable(loss))
    if any(g is not None and not _finite(g) for g in done.gradients.values()):
        broken = non_finite_findings(flow, found.measurement, settings.thresholds, loss)
        if broken:
            return replace(found, verdict=broken_verdict(found.verdict), findings=tuple(broken))
    lost = lost_parameter_findings(call, (len(flow.steps) - 1,), loss, done)
    if not callable(loss) and any(_nothing_passes(finding, found) for finding in found.findings):
        asked = training_pass(call)  # a random combination of the outputs shows where it stops as well as a loss
        lost += closed_findings(TrainingRun(flow, None, call, asked), zeros_of(asked))[0]
    lost += (hidden := hidden_cut_findings(flow, loss, call, done))
    if cut_by_a_draw(hidden):
        found = _but_for_draws(flow, found, hidden[0], settings)
    if callable(loss) and done.loss is not None and bool(done.loss.detach().isfinite()):
        lost += _of_training_pass(TrainingRun(flow, loss, call, done, settings.optimizer), [*found.findings, *lost])
    if not lost and not any(map(_closed, found.findings)):
        return found
    kept = [_behind_closed(finding, found, lost) for finding in found.findings]
    return replace(found, findings=tuple(ordered([*kept, *lost])))


def _nothing_passes(finding: Finding, found: Diagnosis) -> bool:
    """Whether it says that nothing at all comes back over the stretch of blocks."""
    return finding.kind == "vanishing" and serious(finding) and found.verdict.growth == -math.inf


def _behind_closed(finding: Finding, found: Diagnosis, lost: Sequence[Finding]) -> Finding:
    """What an operation that lets nothing through looks like from elsewhere, which is one cause, said once.

    Nothing comes back over the stretch before it, and its own units are dead or saturated.
    """
    closed = next((other for other in (*lost, *found.findings) if serious(other) and _closed(other)), None)
    if closed is None or closed is finding or not serious(finding) or finding.actions:
        return finding
    units = finding.kind in ("dead", "saturated") and f" {_closed(closed)} " in finding.evidence.lower()
    if not units and not _nothing_passes(finding, found):
        return finding
    where = closed.module_path or "the code of the model"
    return as_fact(
        finding, f"this is what {_closed(closed)} in {where} lets through", f"that of {closed.kind} at {where}"
    )


def _closed(finding: Finding) -> str:
    """The operation that lets nothing through, where a finding is of such."""
    names = [name.partition(":")[2] for name in finding.numbers if name.startswith("closed:")]
    return names[0] if names else ""


def _finite(gradient: Tensor) -> bool:
    entries = gradient.coalesce().values() if gradient.is_sparse else gradient
    return bool(entries.isfinite().all())


def _but_for_draws(flow: Flow, found: Diagnosis, cause: Finding, settings: Settings) -> Diagnosis:
    """A diagnosis in which what goes with a gradient through the draws follows from them."""
    with drawn_on_the_graph():
        again = suspected(flow.again(), settings)
    left = {finding.kind for finding in again.findings if serious(finding)}
    place = cause.module_path or "the draw"

    def told(finding: Finding) -> Finding:
        if not serious(finding) or finding.kind in left:
            return finding
        words = f"it is gone with a gradient through the draw behind {place}"
        return as_fact(finding, words, f"that of {cause.kind} at {place}")

    verdict = found.verdict
    if verdict.name != again.verdict.name:
        verdict = judged_without(verdict, again.verdict, "a draw that passes nothing back")
    return replace(found, verdict=verdict, findings=tuple(ordered([told(finding) for finding in found.findings])))


def _of_training_pass(run: TrainingRun, others: Sequence[Finding]) -> list[Finding]:
    """What a pass as training makes it says of the parameters and of the loss."""
    found = [*zero_gradient_findings(run, others), *unregistered_findings(run)]
    found += [*kept_graph_findings(run.flow, run.loss, run.call), *cut_state_findings(run)]
    found += share_findings(run, [*others, *found])
    found += [*mixed_sample_findings(run), *next_token_findings(run)]
    found += unused_input_findings(run)
    found += _of_call(run, others)
    found += [] if climbs(run.optimizer) else without_end_findings(run, [*others, *found])  # a reward has none
    found += saturating_findings(run, [*others, *found])
    found += wrong_derivative_findings(run)
    found += loud_logits_findings(run, [*others, *found])
    found += loss_floor_findings(run, [*others, *found])
    found += drowned_term_findings(run, [*others, *found])
    found += unequal_class_findings(run, [*others, *found])
    found += [*half_weight_findings(run), *ignored_class_findings(run)]
    found += passed_through_findings(run)
    found = [_of_softmax(each, [*others, *found]) for each in found]
    # units are asked after only where nothing else is wrong: a broken network does not train in any
    broken = any(serious(finding) for finding in (*others, *found))
    if broken:
        return found
    return [*found, *(unit_findings(run) or feature_scale_findings(run))]


def _of_softmax(finding: Finding, others: Sequence[Finding]) -> Finding:
    """A leak that goes with a softmax along the wrong axis, where that is told already."""
    cause = next((f for f in others if serious(f) and ("softmax_axis" in f.numbers or f.kind == "axes")), None)
    return finding if cause is None or OF_SOFTMAX not in finding.numbers else follows(finding, cause)


def _of_call(run: TrainingRun, others: Sequence[Finding]) -> list[Finding]:
    """What is wrong with a model and its loss as they are called in training, whatever its gradients are like."""
    found = [*made_anew_findings(run), *last_dropout_findings(run), *dropping_in_evaluation(run)]
    if not any(finding.kind == "loss" and serious(finding) for finding in others):
        found += loss_domain_findings(run)
    # where nothing trains for another reason, training tells nothing of these
    if not any(finding.kind in _NOT_TRAINED and serious(finding) for finding in (*others, *found)):
        found += alike_row_findings(run) or affine_findings(run) or lost_order_findings(run)
        found += empty_node_findings(run)
        found += padded_end_findings(run) or read_position_findings(run)
        found += cut_axes_findings(run, others) + softmax_axis_findings(run, others)
        found += coordinate_findings(run)
        found += heavy_dropout_findings(run, [*others, *found])
    return found
