"""The words of a diagnosis: verdicts, severities and kinds of findings. Each is an entry here and nowhere else.

What checks, orders, colors or explains these words follows from the entries. A new one is one line in a table below,
and the rule that comes to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

#: What a word says of a network, from which terminal, page and pictures take their colors.
Tone = Literal["good", "grows", "shrinks", "broken", "unsure", "note"]


@dataclass(frozen=True)
class Word:
    """A word of the diagnosis.

    Attributes:
        meaning: what it says, in one line.
        tone: whether that is good news, and if not, of which sort.
        consequence: whether it usually follows from some other finding, so that the blocks at fault are told first.
    """

    meaning: str
    tone: Tone = "unsure"
    consequence: bool = False


VERDICTS: dict[str, Word] = {
    "stable": Word("gradients keep their size over the blocks", "good"),
    "drift": Word("gradients change over the blocks, within the limits"),
    "exploding": Word("gradients grow on their way back by more than the limit", "grows"),
    "vanishing": Word("gradients shrink on their way back by more than the limit", "shrinks"),
    "transient growth": Word("gradients grow over some of the blocks, and shrink again over others"),
    "chaotic": Word("nearby states part exponentially over the steps", "grows"),
    "inconclusive": Word("the samples disagree too much for a verdict; more of them are needed"),
    "not judged": Word("there is too little to judge, or it is not yet what it will be; the summary says what"),
    "non-finite": Word("states, gradients or weights hold NaN or infinity", "broken"),
}

#: In rising order.
SEVERITIES: dict[str, Word] = {
    "info": Word("a fact to know; nothing has to be done", "note"),
    "warning": Word("training may suffer"),
    "critical": Word("training will fail, or has failed", "broken"),
}

FINDINGS: dict[str, Word] = {
    "exploding": Word("a block, or the whole stretch of blocks, makes gradients grow", "grows"),
    "vanishing": Word("a block, or the whole stretch of blocks, makes gradients shrink", "shrinks"),
    "unstable_step": Word("eigenvalues lie outside the stability region because the step is too long", "grows"),
    "overdamped": Word("eigenvalues lie where the method damps what the equation would keep", "shrinks"),
    "dead": Word("units pass nothing for any sample", "shrinks"),
    "saturated": Word("activations work where their derivative is nearly zero", "shrinks"),
    "transient_growth": Word("gradients grow over some of the blocks, and shrink again over others", "grows"),
    "chaotic": Word("nearby states part exponentially over the steps", "grows"),
    "rank_collapse": Word("states no longer tell samples or tokens apart", "shrinks"),
    "non_finite": Word("a state, gradient or weight holds NaN or infinity", "broken"),
    "stale_statistics": Word("running statistics of a norm have not caught up with the weights"),
    "post_norm": Word("norms behind the additions keep a deep network from training", "shrinks"),
    "copied_units": Word("units of a layer are copies of each other, and stay so"),
    "no_gradient": Word("parameters that are to be trained get no gradient", "broken"),
    "wrong_derivative": Word("a backward that was written by hand is not the derivative of its forward", "broken"),
    "kept_graph": Word("a state that is kept between calls leads back into the call before", "broken"),
    "unregistered": Word("tensors get a gradient and are no parameters of the model: nothing moves them", "broken"),
    "mixed_samples": Word("what a model returns for a sample depends on which others are in its batch", "broken"),
    "axes": Word("a reshape cuts through axes that are to change places", "broken"),
    "dropout": Word("so much is dropped that little is learnt"),
    "mask": Word("a mask hides what is to be seen, or hides nothing", "broken"),
    "leak": Word("a model sees what it is to predict, or is asked for what it was given", "broken"),
    "order": Word(
        "the order of what a model is given does not reach its output, and its targets depend on it", "broken"
    ),
    "affine": Word("a whole model is one affine map of its input, however many matrices it has"),
    "input_scale": Word("inputs lie so that the first layer learns from few of their features, or none"),
    "spectral_bias": Word("targets vary faster over a few coordinates than a plain network learns"),
    "no_influence": Word("an input changes nothing that the model returns, though it should"),
    "no_fixed_point": Word("an iteration that is meant to settle does not", "grows"),
    "loss": Word("the loss has no gradient, or is taken of what it does not expect", "broken"),
    "unstable_update": Word("the optimizer's updates are too long for the curvature of the loss", "grows"),
    "idle_update": Word("the optimizer's updates learn nothing: they are far too short, or weight decay undoes them"),
    "diverging_logits": Word("logits of attention, or of the loss, grow without bound", "grows"),
    "precision_loss": Word("numbers are lost to the dtype by rounding or underflow", "unsure", consequence=True),
}


def rank(severity: str) -> int:
    """The place of a severity in rising order, from 0.

    Example:
        >>> rank("critical") > rank("warning") > rank("info")
        True
    """
    return list(SEVERITIES).index(severity)


def leading(verdict: str, findings: Sequence[Any]) -> Any | None:
    """The worst finding, where it is a warning or more and the verdict does not say it already.

    A verdict is of growth over the blocks alone: "stable" above a finding that says why nothing is learnt misleads
    whoever reads one line.

    Args:
        verdict: the word.
        findings: what was found, the first of equals counts.
    """
    worst = max(findings, key=lambda finding: rank(finding.severity), default=None)
    if worst is None or rank(worst.severity) < rank("warning") or verdict == "non-finite":
        return None
    said = any(f.kind.replace("_", " ") == verdict and f.severity == worst.severity for f in findings)
    return None if said else worst


def headline(verdict: str, findings: Sequence[Any]) -> str:
    """The first words on a network: the worst finding, and what holds in depth besides; the verdict where none is bad.

    Args:
        verdict: the word.
        findings: what was found.
    """
    worst = leading(verdict, findings)
    if worst is None:
        return verdict.upper()
    return f"{worst.severity.upper()}, {worst.kind.replace('_', ' ').upper()} (depth alone: {verdict})"


def headline_tone(verdict: str, findings: Sequence[Any]) -> Tone:
    """What the first words say, from which colors are taken."""
    worst = leading(verdict, findings)
    if worst is None:
        return VERDICTS[verdict].tone
    return FINDINGS[worst.kind].tone


def accused(word: str | None, kind: str, severity: str) -> bool:
    """Whether a word names the kind of a finding, or a severity that it reaches; False for None.

    Example:
        >>> accused("warning", "dead", "critical"), accused("non-finite", "non_finite", "critical")
        (True, True)
    """
    wanted = None if word is None else word.replace("-", "_")
    return rank(severity) >= rank(wanted) if wanted in SEVERITIES else wanted == kind
