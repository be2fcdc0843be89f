"""What is wrong with a model and its loss as they are called in training, whatever its gradients are like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stabkit.diagnosis.depth.affine_models import affine_findings
from stabkit.diagnosis.finding import Finding, serious
from stabkit.diagnosis.inputs.coordinates import coordinate_findings
from stabkit.diagnosis.inputs.lost_order import lost_order_findings
from stabkit.diagnosis.inputs.padded_ends import padded_end_findings
from stabkit.diagnosis.inputs.read_positions import read_position_findings
from stabkit.diagnosis.losses.domains import loss_domain_findings
from stabkit.diagnosis.losses.last_dropout import last_dropout_findings
from stabkit.diagnosis.no_gradient.made_anew import made_anew_findings
from stabkit.diagnosis.states.cut_axes import cut_axes_findings
from stabkit.diagnosis.states.heavy_dropout import heavy_dropout_findings
from stabkit.tracing import Flow
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.training_pass import TrainingPass

_NOT_TRAINED = frozenset({"loss", "no_gradient", "unregistered", "non_finite", "exploding", "leak", "copied_units"})


def call_findings(
    flow: Flow, loss: Any, call: ForwardPass, done: TrainingPass, others: Sequence[Finding]
) -> list[Finding]:
    """Parameters that are made anew, dropout of predictions, unfit losses, affine models, lost order.

    Args:
        flow: the traced pass.
        loss: a callable on the output that returns a scalar.
        call: the pass as training makes it.
        done: its loss, on the graph.
        others: what else was found: a loss that is known to be taken of something else is said once.
    """
    found = [*made_anew_findings(flow, loss, call, done), *last_dropout_findings(flow, loss, call, done)]
    if not any(finding.kind == "loss" and serious(finding) for finding in others):
        found += loss_domain_findings(flow, loss, call, done)
    # where nothing trains for another reason, training tells nothing of these
    if not any(finding.kind in _NOT_TRAINED and serious(finding) for finding in (*others, *found)):
        found += affine_findings(flow, loss, call, done) or lost_order_findings(flow, loss, call, done)
        found += padded_end_findings(loss, call, done) or read_position_findings(flow, loss, call, done)
        found += cut_axes_findings(flow, loss, call, done, others)
        found += coordinate_findings(flow, loss, call, done)
        found += heavy_dropout_findings(flow, loss, call, done, [*others, *found])
    return found
