"""Networks of coordinates whose targets vary faster than a plain network learns: spectral bias.

A map from a few coordinates to a value, by layers of ReLU or tanh, learns slow variations first, and fast ones after
thousands of steps. Sines and cosines of the coordinates, of several frequencies, bring the fast ones within reach. They
are tried on a copy, for the samples between those that are trained on; noise is predicted no better with them. What
they bring is measured against the variance of the targets: of the little that a trained network has left, any new
feature takes nearly all away.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stabkit.diagnosis.finding import Finding, of_module
from stabkit.diagnosis.losses.regressions import regressions
from stabkit.diagnosis.remedies import computed as remedies
from stabkit.diagnosis.remedies.held_out import learnt
from stabkit.diagnosis.remedies.usual_training import ADAM
from stabkit.diagnosis.training_run import TrainingRun
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.training_pass import nodes_above

_MOST_AXES = 3  # of coordinates
_FEWEST = 64  # samples between which variation shows
_MOST = 4096  # samples that are compared with each other
_SMOOTH = 0.6  # of the variance of the targets: what neighbours may differ by where there is something to learn
_PLAIN = 0.5  # of the loss of samples between: a network that learns as much needs no help
#: of the variance of the targets: what features must bring for samples between. Where less is left nothing is tried: of
#: the little that a trained network leaves, any new feature takes nearly all. What it costs is fine detail of images at
#: an R^2 above 0.7; sin(15 x) over -1 to 1, which a ReLU network learns by itself within 1,500 steps, is told at 100
_FALL = 0.3
_USUAL = (0.05, 5.0)  # the standard deviation of coordinates that lie within -1 to 1, or were standardised
_STEPS = 100  # of every trial
_ANCHORS, _BINS = 256, 128  # samples whose distances to all are looked at, and parts of these by their size
_FREQUENCIES = (2.0, 6.0, 16.0)  # standard deviations, in radians over the standard deviation of a coordinate
_REFERENCE = "Tancik et al., Fourier features let networks learn high frequency functions, 2020; Sitzmann et al., 2020"


def coordinate_findings(run: TrainingRun) -> list[Finding]:
    """A finding where features of sines learn far more of targets that vary fast over a few coordinates."""
    given = [t for _, t in run.call.given]
    first = _first_layer(run, given[0]) if len(given) == 1 else ""
    if not first:
        return []
    x = given[0].detach().double()
    spread = float(x.std(0).mean())
    if not _USUAL[0] < spread < _USUAL[1]:
        return []  # their size comes first
    held = next((r for r in regressions(run.done) if len(r.targets) == len(x)), None)
    if held is None:
        return []
    outputs, targets = (t.detach().double().reshape(len(x), -1) for t in (held.output, held.targets))
    if not _between_neighbours(x, targets) < _SMOOTH:
        return []
    left = float((outputs - targets).square().mean() / (targets - targets.mean(0)).square().mean())
    if left < _FALL:
        return []
    plain = learnt(run.call, run.loss, _STEPS)
    if plain is None or plain.other > _PLAIN:
        return []
    for frequency in _FREQUENCIES:
        action = remedies.fourier_features(first, frequency / spread)
        treated = learnt(run.call, run.loss, _STEPS, [action])
        if treated is None or not treated.beats(plain):
            continue
        if min(left, 1) * (treated.other - max(plain.other, 0)) > _FALL:
            break
    else:
        return []
    evidence = (
        f"{first} takes {x.shape[1]} coordinates, and targets already differ by half as much as any two of them do "
        f"where these are {_length(x, targets):.2g} of their extent apart; the network leaves {min(left, 9.99):.0%} "
        f"of their variance; tried on a copy: up to {_STEPS} steps of {ADAM} on every other sample take "
        f"{max(plain.other, 0):.0%} of the loss of those between away as it is, {treated.other:.0%} with sines and "
        f"cosines of the coordinates, of frequencies of {frequency / spread:.3g} radians a unit, beside them"
    )
    sines = "" if _has_sines(run) else ", or take sines for activations, as SIREN does"
    return [
        of_module(
            run.flow,
            "spectral_bias",
            "warning",
            first,
            evidence=evidence,
            remedy=f"give {first} Fourier features of the coordinates (sin and cos of B x, B normal of standard "
            f"deviation {frequency / spread:.3g}){sines}",
            reference=_REFERENCE,
            numbers={
                "left": left,
                "learnt": plain.other,
                "learnt_with_features": treated.other,
                "frequency": frequency / spread,
            },
            actions=(action,),
        )
    ]


def _first_layer(run: TrainingRun, x: Tensor) -> str:
    """The linear layer that takes coordinates as they are given; empty where a model does not begin so."""
    if x.dim() != 2 or not x.is_floating_point() or x.shape[1] > _MOST_AXES or not _FEWEST <= len(x) <= _MOST:
        return ""
    modules = dict(run.call.module.named_modules())
    ran = [modules[each.path] for each in run.done.calls if each.path in modules]
    leaves = [m for m in ran if not any(True for _ in m.children())]
    first = leaves[0] if leaves else None
    if not isinstance(first, nn.Linear) or first.in_features != x.shape[1]:
        return ""
    return str(next(path for path, module in modules.items() if module is first))


def _between_neighbours(x: Tensor, targets: Tensor) -> float:
    """The mean square by which targets of nearest neighbours differ, over that of any two."""
    distances = torch.cdist(x, x).fill_diagonal_(math.inf)
    change = (targets - targets[distances.argmin(1)]).square().mean()
    whole = 2 * (targets - targets.mean(0)).square().mean()
    return float(change / whole) if float(whole) > 0 else math.nan


def _length(x: Tensor, targets: Tensor) -> float:
    """The distance, of the extent of coordinates, at which targets differ by half of what any two of them do."""
    some = slice(None, None, -(-len(x) // _ANCHORS))
    apart, order = torch.cdist(x[some], x).flatten().sort()
    change = torch.cdist(targets[some], targets).square().flatten()[order]
    bins = [(float(a.mean()), float(c.mean())) for a, c in zip(apart.chunk(_BINS), change.chunk(_BINS), strict=True)]
    whole = 2 * float((targets - targets.mean(0)).square().sum(1).mean())
    extent = float((x.amax(0) - x.amin(0)).norm())
    return next((distance for distance, mean in bins if mean >= whole / 2), bins[-1][0]) / extent


def _has_sines(run: TrainingRun) -> bool:
    """Whether the pass takes sines of what it computes."""
    assert run.done.loss is not None
    return any(operation(node) in ("Sin", "Cos") for node in nodes_above(run.done.loss))
