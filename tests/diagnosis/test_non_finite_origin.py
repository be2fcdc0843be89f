"""The first operation that is not finite, forward or backward, is named with its module and its cause."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import Finding, examine, treat


class Inner(nn.Module):
    """A module without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Network(nn.Module):
    """A layer, a module without parameters, a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.inner, self.after = nn.Linear(4, 4), Inner(function), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x)))


def diagnosed(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> tuple[Finding, ...]:
    return examine(stabkit.trace(model, x, check=False, batch_dim=None), loss).findings


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (8, 4)), generator=torch.Generator().manual_seed(1))


KEYS_MASKED = torch.full((4,), -math.inf)

# what the inner module does, the operation and a part of the cause, a part of the remedy
BROKEN: dict[str, tuple[Callable[[Tensor], Tensor], str, str, str]] = {
    "root of negatives": (lambda h: h.sqrt(), "begins at sqrt", "root of negative numbers", "clamp"),
    "logarithm of zero": (lambda h: h.relu().log(), "begins at log", "logarithm of zero", "logits"),
    "logarithm of negatives": (lambda h: h.log(), "begins at log", "logarithm of negative", "positive"),
    "power": (lambda h: h**0.5, "begins at pow", "fractional power of negative", "clamp the base"),
    "division": (lambda h: h / h.relu(), "begins at div", "division by zero", "eps"),
    "zero over zero": (lambda h: h.relu() / h.relu(), "begins at div", "0 / 0", "eps"),
    "exp": (lambda h: (1000 * h).exp(), "begins at exp", "overflows float32 beyond 88.7", "clamp"),
    "every key masked": (lambda h: h * (h + KEYS_MASKED).softmax(1), "begins at softmax", "8 of 8 rows", "one key"),
    "zero times infinity": (
        lambda h: h + 0 * h.masked_fill(h > 0, math.inf),
        "begins at mul",
        "0 * inf",
        "large finite number",
    ),
    "deviation of one": (lambda h: h / h[:, :1].std(1, keepdim=True), "begins at std", "of one number", "unbiased"),
    "range": (lambda h: (1e30 * h) @ (1e30 * h.T) @ h, "begins at mm", "range of float32", "float64"),
    "written in place": (lambda h: h.clone().sub_(10.0).sqrt_(), "begins at sqrt", "negative numbers", "clamp"),
    "derivative of a root": (lambda h: (0 * h).sqrt(), "way back, is that of sqrt", "at zero is infinite", "eps"),
    "derivative of acos": (lambda h: (0 * h + 1).acos(), "way back, is that of acos", "at 1 or -1", "clamp"),
    "thrown away": (lambda h: torch.where(h > 9, (1e3 * h).exp(), h), "begins at exp", "exp of", "clamp"),
}


@pytest.mark.filterwarnings("ignore:std\\(\\)")
@pytest.mark.parametrize("name", BROKEN)
def test_the_operation_its_module_and_its_cause_are_named(name):
    function, place, cause, remedy = BROKEN[name]
    (found,) = diagnosed(Network(function), inputs())
    assert (found.kind, found.severity, found.module_path) == ("non_finite", "critical", "inner")
    assert place in found.evidence
    assert "in inner (Inner), test_non_finite_origin.py:" in found.evidence
    assert cause in found.evidence
    assert remedy in found.remedy


@pytest.mark.parametrize(
    "function",
    [
        lambda h: (h.square() + 1e-6).sqrt(),
        lambda h: (h + torch.tensor([0.0, 0.0, -math.inf, 0.0])).softmax(1),
        lambda h: h.clamp_max(5.0).exp(),
    ],
)
def test_masks_and_guarded_operations_are_no_finding(function):
    assert not [f for f in diagnosed(Network(function), inputs()) if f.kind == "non_finite"]


def test_the_range_of_float16_is_named_with_the_value_and_what_holds_it():
    network = Network(lambda h: 1e4 * h).half()
    (found,) = diagnosed(network, 100 * inputs().half())
    value = float((1e4 * network.before(100 * inputs().half()).detach().double()).abs().max())
    assert found.module_path == "inner"
    assert "range of float16: mul reaches" in found.evidence
    assert "65504" in found.evidence
    assert found.numbers["value"] == pytest.approx(value, rel=1e-3)
    assert "bfloat16 or float32" in found.remedy
    assert not [
        f for f in diagnosed(Network(lambda h: 1e4 * h).bfloat16(), 100 * inputs().bfloat16()) if f.kind == "non_finite"
    ]


def test_what_is_wrong_in_the_loss_is_said_of_the_loss():
    labels = torch.full((8,), -100)
    (found,) = diagnosed(Network(), inputs(), lambda out: nn.functional.cross_entropy(out, labels))
    assert found.module_path == "loss"
    assert "all 8 labels are -100" in found.evidence
    (found,) = diagnosed(Network(), inputs(), lambda out: -(0 * out).log().mean())
    assert found.module_path == "loss"
    assert "logarithm of zero" in found.evidence


def test_a_report_on_what_is_not_finite_takes_no_spectra_and_identifies_nothing():
    report = stabkit.analyze(Network(lambda h: (0 * h).sqrt()), inputs())
    assert report.verdict == "non-finite"
    assert {step.method for step in report.steps} == {"unknown"}
    assert all(step.spectrum_method == "none" for step in report.steps)
    assert report.findings[0].module_path == "inner"


class Beside(Network):
    """The chain of `Network`, and a number that is made of a parameter alone, as a log-determinant is."""

    def __init__(self, function: Callable[[Tensor], Tensor], start: Tensor) -> None:
        super().__init__()
        self.aside, self.made = nn.Parameter(start), Inner(function)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.made(self.aside)


FLIPPED = torch.diag(torch.tensor([-1.0, 1.0, 2.0]))
ASIDE: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, str]] = {
    "negative determinant": (torch.logdet, FLIPPED, "logdet in made (Inner)"),
    "singular": (lambda w: torch.linalg.slogdet(w)[1], torch.ones(3, 3), "determinant that is zero"),
    "logarithm": (lambda w: w.log().sum(), -torch.ones(3), "logarithm of negative numbers"),
    "pole": (lambda w: torch.lgamma(w).sum(), torch.zeros(3), "at a pole"),
    "only its derivative": (lambda w: w.square().sum().sqrt(), torch.zeros(3), "derivative of a root at zero"),
}


@pytest.mark.parametrize("name", ASIDE)
def test_no_verdict_stands_beside_a_loss_that_is_not_finite_however_it_is_made(name):
    """All states and their gradients are finite: what is not is a term of the loss that the chain does not lead to."""
    function, start, cause = ASIDE[name]
    report = stabkit.analyze(Beside(function, start), inputs(), loss=lambda out: out[0].square().mean() - out[1])
    (found,) = report.findings
    assert (report.verdict, found.kind, found.severity, found.module_path) == (
        "non-finite",
        "non_finite",
        "critical",
        "made",
    )
    assert cause in found.evidence
    healthy = Beside(torch.logdet, torch.eye(3) + 0.1)
    report = stabkit.analyze(healthy, inputs(), loss=lambda out: out[0].square().mean() + out[1].square())
    assert report.verdict != "non-finite"
    assert not report.findings


def test_an_output_that_is_not_finite_is_named_without_a_loss():
    report = stabkit.analyze(Beside(torch.logdet, FLIPPED), inputs())
    assert report.verdict == "non-finite"
    assert "negative determinant" in report.findings[0].evidence


def test_a_loss_that_no_watched_operation_spoils_is_said_all_the_same():
    (found,) = diagnosed(Network(), inputs(), lambda out: out.square().mean() * float("nan"))
    assert (found.kind, found.severity, found.module_path) == ("non_finite", "critical", "loss")


def test_every_place_in_which_one_line_goes_wrong_is_listed():
    torch.manual_seed(0)
    thrown = Inner(lambda h: torch.where(h > -99, h, (900 * h).exp()))
    model = nn.Sequential(nn.Linear(4, 4), thrown, nn.Linear(4, 4), Inner(thrown.function), nn.Linear(4, 4))
    (found,) = diagnosed(model, inputs())
    assert found.module_path == "1"
    assert "the same in 3" in found.evidence


ZERO_OVER_ZERO = {
    "a layer of zeros": (lambda m: nn.init.zeros_(m.weight), "in 4 of 4 rows", True),
    "a row of zeros": (lambda m: nn.init.zeros_(m.weight[1]), "in 1 of 4 rows", False),
}


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("name", ZERO_OVER_ZERO)
@pytest.mark.filterwarnings("ignore")
def test_zero_over_zero_inside_a_fused_operation_is_no_matter_of_range(name, wrap):
    spoil, where, drawn = ZERO_OVER_ZERO[name]
    model = Network()
    with torch.no_grad():
        spoil(model.after)
    model.after = wrap(model.after)
    (found,) = diagnosed(model, inputs(), lambda out: (out - 1).square().mean())
    assert (found.kind, found.severity) == ("non_finite", "critical")
    assert found.module_path.startswith("after")
    assert f"|v| = 0, which is 0 / 0: v is all zero {where}" in found.evidence
    assert "range" not in found.evidence + found.remedy
    assert bool(found.actions) is drawn  # rows that are not zero may be trained
    if wrap is nn.utils.weight_norm:
        return  # of which torch makes no copy once it ran
    done = treat(model, inputs(), loss=lambda out: (out - 1).square().mean(), batch_dim=None)
    assert done.silent is drawn
    assert ("left" in str(done)) is not drawn


def test_a_norm_of_equal_numbers_without_eps_is_zero_over_zero():
    (found,) = diagnosed(Network(lambda h: nn.functional.layer_norm(0 * h + 1, (4,), eps=0.0)), inputs())
    assert "a layer_norm of numbers that are all equal, 0 / 0" in found.evidence
    assert "1e-05" in found.remedy


SMALL = {
    "normalize": lambda h: nn.functional.normalize(0 * h.half(), dim=1).float() + h,
    "added": lambda h: ((0 * h).half() / ((0 * h).half().norm(dim=1, keepdim=True) + 1e-8)).float() + h,
    "under a root": lambda h: (h.half() * ((0 * h).half().square().mean(1, keepdim=True) + 1e-8).rsqrt()).float(),
}


@pytest.mark.parametrize("name", SMALL)
def test_an_eps_that_is_zero_in_its_dtype_is_named_and_one_that_holds_was_tried(name):
    (found,) = diagnosed(Network(SMALL[name]), inputs(), lambda out: out.square().mean())
    assert found.severity == "critical"
    assert "to keep it from zero is 0 in float16" in found.evidence
    assert "tried on a copy: with an eps of 0.0" in found.evidence
    assert "or compute it in float32" in found.remedy
    single = SMALL[name].__code__.co_consts
    assert any(isinstance(c, float) and c < 1e-7 for c in single) or name == "normalize"
    kept = Network(lambda h: (h / (h.norm(dim=1, keepdim=True) + 1e-8)).half().float())
    assert not diagnosed(kept, inputs(), lambda out: out.square().mean())


GUARDED = {
    "a branch that is not taken": (lambda h: torch.where(h > -99, h, (500 * h).exp()), "bound the argument"),
    "a softmax by hand": (lambda h: (300 * h).exp() / (300 * h).exp().sum(1, keepdim=True), "subtract the largest"),
    "squashed": (lambda h: 1 / (1 + (900 * h).exp()), "bound the argument and not the result"),
    "eigenvectors": (
        lambda h: h + torch.linalg.eigh(torch.eye(4) + 0 * h[:, :, None]).eigenvectors.sum(2),
        "a small diagonal",
    ),
    "root": (lambda h: h + (0 * h).sqrt(), "a small number under the root"),
}


@pytest.mark.parametrize("name", GUARDED)
def test_what_was_tried_at_the_operation_is_told_before_smaller_weights(name):
    function, first = GUARDED[name]
    model = Network(function)
    (found,) = diagnosed(model, inputs(), lambda out: out.square().mean())
    assert (found.severity, found.actions) == ("critical", ())
    assert "tried on a copy: with" in found.evidence
    assert "20 steps of plain SGD take the loss from" in found.evidence
    assert found.remedy.startswith(first) or first in found.remedy
    assert "multiply" not in found.remedy
    done = treat(model, inputs(), loss=lambda out: out.square().mean(), batch_dim=None)
    assert not done.silent
    assert not done.applied
    assert "left, to be done by hand: non_finite at inner" in str(done)


def test_code_of_the_model_itself_is_at_no_module():
    class Root(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).log()

    (found,) = diagnosed(Root(), inputs())
    assert found.module_path == ""
    assert "begins at log in the model" in found.evidence


@pytest.mark.parametrize(
    ("targets", "symbols", "frames", "said"),
    [
        ([[1, 2, 3, 4, 5, 6, 7]], [7], [6], "1 of 1 samples, so that no path gives it: sample 0 has 6 frames for 7"),
        (
            [[1, 1, 1, 1], [1, 2, 3, 4]],
            [4, 4],
            [6, 6],
            "sample 0 has 6 frames for 4 symbols and 3 blanks between",
        ),
        (
            [1, 2, 3, 2, 2, 2],
            [3, 3],
            [6, 4],
            "1 of 2 samples, so that no path gives it: sample 1 has 4 frames for 3",
        ),
    ],
)
def test_a_transcript_that_does_not_fit_into_its_frames_is_told_from_one_that_does(targets, symbols, frames, said):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 9, 1)), inputs(len(frames), 3, 6)

    def loss(out: Tensor, short: bool = True) -> Tensor:
        lengths = [length if short else 6 for length in frames]
        wanted = symbols if short else [min(3, length) for length in symbols]
        labels = torch.tensor(targets) if short else torch.tensor([1, 2, 3] * len(frames))
        return nn.functional.ctc_loss(out.permute(2, 0, 1).log_softmax(-1), labels, lengths, wanted)

    (found,) = (f for f in diagnosed(model, x, loss) if f.kind == "non_finite")
    assert said in found.evidence
    assert "zero_infinity" in found.remedy
    assert not [f for f in diagnosed(model, x, lambda out: loss(out, short=False)) if f.kind == "non_finite"]


def test_a_parameter_that_was_never_filled_is_named():
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.shift = nn.Linear(4, 4), nn.Parameter(torch.tensor([0.0, math.nan, 0.0, 1.0]))

        def forward(self, x: Tensor) -> Tensor:
            scores = torch.softmax(torch.tanh(self.layer(x) + self.shift), 1)
            return (scores * x).sum(1)

    (found,) = examine(stabkit.trace(Shift(), torch.randn(3, 4)), lambda out: out.square().mean()).findings
    assert "shift is NaN or infinite already" in found.evidence
    assert "start shift from numbers" in found.remedy


def test_targets_that_are_not_finite_are_those_of_the_loss():
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    target = torch.tensor([[-1.0, 1.0]] * 3).log()
    (found,) = examine(stabkit.trace(model, x), lambda out: (out - target).square().mean()).findings
    assert found.module_path == "loss"
    assert "that the loss is made of, such as its targets" in found.evidence
