"""Where gradients stop is named, with every parameter that gets none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import stabkit
from stabkit.diagnosis import Finding, examine
from stabkit.diagnosis.finding import serious
from stabkit.errors import TraceError
from stabkit.tracing.derivatives.lost_gradient import lost_gradient
from stabkit.tracing.recording.forward_pass import ForwardPass


def without_grad(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


# what becomes of the code that the encoder makes, and how the place is called
CUTS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "detach": (lambda enc, x: enc(x).detach(), "detach ("),
    "data": (lambda enc, x: enc(x).data, "detach ("),
    "no_grad": (without_grad, "no_grad in enc"),
    "argmax": (lambda enc, x: functional.one_hot(enc(x).argmax(1), 8).float(), "argmax ("),
    "comparison": (lambda enc, x: (enc(x) > 0).float(), "gt ("),
    "numpy": (lambda enc, x: torch.from_numpy(enc(x).detach().numpy()), "detach ("),
    "tolist": (lambda enc, x: torch.tensor(enc(x).tolist()), "tolist() ("),
}


class Net(nn.Module):
    """An encoder, something between, and a decoder that also sees the input."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor], also: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.side, self.dec = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        self.between, self.also = between, also

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(self.enc, x)
        return self.dec(h + self.side(x) if self.also else h)


def inputs() -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def said(model: nn.Module, loss: Callable[[Tensor], Tensor] | None = lambda out: out.square().mean()) -> list[Finding]:
    return [f for f in examine(stabkit.trace(model, inputs()), loss).findings if f.kind == "no_gradient"]


@pytest.mark.parametrize("name", CUTS)
def test_the_place_and_the_parameters_are_named(name):
    between, place = CUTS[name]
    (found,) = said(Net(between))
    assert (found.severity, found.numbers["parameters"]) == ("warning", 4)
    assert f"the gradient stops at {place}" in found.evidence
    assert "enc.0.weight, enc.0.bias, enc.2.weight, enc.2.bias" in found.evidence
    if name != "no_grad":
        assert (found.module_path, "test_lost_parameters.py:" in found.evidence) == ("enc.2", True)


@pytest.mark.parametrize("name", sorted(set(CUTS) - {"no_grad"}))  # which a trace looks through
def test_a_model_that_cannot_be_traced_for_it_says_where(name):
    between, place = CUTS[name]
    with pytest.raises(TraceError) as caught:
        stabkit.trace(Net(between, also=False), inputs())
    assert f"the gradient stops at {place}" in str(caught.value)
    assert "behind enc.2" in str(caught.value)
    assert "enc.0.weight" in str(caught.value)


def straight_through(enc: nn.Module, x: Tensor) -> Tensor:
    code = enc(x)
    return code + (code.round() - code).detach()


def logged(enc: nn.Module, x: Tensor) -> Tensor:
    code = enc(x)
    code.mean().item()
    return code * code.detach().norm().clamp_min(1.0)


@pytest.mark.parametrize("between", [lambda enc, x: enc(x), straight_through, logged])
def test_values_taken_off_the_graph_beside_the_gradient_are_no_finding(between):
    assert said(Net(between)) == []


def test_without_a_loss_nobody_knows_what_was_meant():
    (found,) = said(Net(CUTS["detach"][0]), None)
    assert found.severity == "info"


def test_what_never_runs_does_no_harm():
    (found,) = said(Net(lambda enc, x: torch.zeros(8, 8)))
    assert (found.severity, found.module_path) == ("info", "enc")
    assert "never runs" in found.evidence


def test_what_runs_for_nothing_weighs_by_its_size_and_the_mode():
    model = Net(lambda enc, x: 0 * x.new_zeros(enc(x).shape))
    (found,) = said(model)
    assert (found.severity, found.module_path) == ("warning", "enc")
    assert "nothing that counts is made" in found.evidence
    assert said(model.eval())[0].severity == "info"
    assert said(model.train(), None)[0].severity == "info"  # a way through it that this call did not ask for
    for parameter in model.enc.parameters():
        parameter.requires_grad_(False)
    assert said(model.train()) == []


class Maker(nn.Module):
    """Its weights are made by another layer, and made a parameter in some way."""

    def __init__(self, register: Callable[[nn.Linear, Tensor], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maker, self.lin, self.register = nn.Linear(6, 48), nn.Linear(6, 8), register

    def forward(self, x: Tensor) -> Tensor:
        self.register(self.lin, self.maker(x).mean(0).view(8, 6))
        return self.lin(x)


REGISTERED: dict[str, tuple[Callable[[nn.Linear, Tensor], None], str]] = {
    "a parameter": (lambda lin, w: setattr(lin, "weight", nn.Parameter(w)), "nn.Parameter(...)"),
    "a parameter of a product": (lambda lin, w: setattr(lin, "weight", nn.Parameter(2 * w)), "nn.Parameter(...)"),
    "data": (lambda lin, w: setattr(lin.weight, "data", w.data), "detach ("),
    "copied": (lambda lin, w: setattr(lin, "weight", nn.Parameter(w.clone().detach())), "detach ("),
}


@pytest.mark.parametrize("name", REGISTERED)
def test_weights_that_lose_their_history_when_they_are_registered(name):
    register, place = REGISTERED[name]
    found = [f for f in said(Maker(register)) if serious(f)]
    assert [f.module_path for f in found] == ["maker"]
    assert place in found[0].evidence


class Experts(nn.Module):
    """Of its experts one is used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[1](x)


def test_experts_that_no_sample_is_sent_to_are_no_fault():
    (found,) = said(Experts())
    assert (found.severity, found.numbers["parameters"]) == ("info", 6)


def test_all_parameters_reached_costs_one_look_and_says_nothing():
    found = lost_gradient(ForwardPass(model := Net(lambda enc, x: enc(x)), model, (inputs(),), {}, 0))
    assert (found.lost, found.cuts, found.unused) == ((), (), ())


class Checkpointed(nn.Module):
    """A stem, blocks under a checkpoint, a head."""

    def __init__(self, stem: nn.Module, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.how, self.head = stem.requires_grad_(False), how, nn.Linear(8, 2)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        if self.how == "asked for":
            h.requires_grad_()  # as enable_input_require_grads does
        if self.how == "sequential":
            return self.head(checkpoint_sequential(self.blocks, 2, h, use_reentrant=True))
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=self.how != "plain")
        return self.head(h)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("stem", [nn.Linear(6, 8), nn.Linear(6, 8, bias=False).double()])
@pytest.mark.parametrize("how", ["reentrant", "sequential"])
def test_a_reentrant_checkpoint_of_what_requires_no_grad_is_seen_although_a_trace_begins_there(stem, how):
    model = Checkpointed(stem, how).to(next(stem.parameters()).dtype)
    x = inputs().to(next(stem.parameters()).dtype)
    model(x).square().mean().backward()
    inside = len([p for p in model.blocks.parameters() if p.grad is None])  # as it trains
    assert inside == (4 if how == "sequential" else 8)  # the last segment runs as it is
    findings = examine(stabkit.trace(model, x), lambda y: y.square().mean()).findings
    (found,) = (f for f in findings if f.severity != "info")
    assert (found.kind, found.numbers["parameters"]) == ("no_gradient", inside)
    assert found.module_path.startswith("blocks")
    assert "checkpoint(use_reentrant=True)" in found.evidence
    assert f"{inside} of them get one" in found.evidence
    assert "use_reentrant=False" in found.remedy


@pytest.mark.parametrize("how", ["plain", "asked for"])
def test_a_checkpoint_that_passes_gradients_on_is_no_finding(how):
    model = Checkpointed(nn.Linear(6, 8), how)
    model(inputs()).square().mean().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())
    assert said(model) == []


def test_a_checkpoint_behind_a_layer_that_trains_is_no_finding():
    model = Checkpointed(nn.Linear(6, 8), "reentrant")
    model.stem.requires_grad_(True)
    assert said(model) == []
    model.stem.requires_grad_(False)
    asks = inputs().requires_grad_()
    flow = stabkit.trace(model, asks)
    assert not [f for f in examine(flow, lambda y: y.square().mean()).findings if f.kind == "no_gradient"]


@pytest.mark.parametrize("mended", [False, True], ids=["cut", "made to require grad"])
def test_a_loss_that_is_cut_off_from_the_output_is_said_of_the_loss(mended):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(16, 4)

    def loss(out):
        value = 1 - ((torch.sigmoid(out) > 0.5).float() * (x[:, :1] > 0)).mean()
        return value.requires_grad_(True) if mended else value

    report = stabkit.analyze(model, x, loss=loss)
    (found,) = report.findings
    assert (found.kind, found.severity) == ("no_gradient", "critical")
    assert "none of 4 parameters gets a gradient" in found.evidence
    assert ("requires_grad_" in found.evidence) == mended
    assert report.verdict == "not judged"
    assert not stabkit.diagnosis.treat(model, x, loss=loss).silent


class _Weighed(nn.Module):
    """Layers weighed by numbers of a list, the first of which is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.ks = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x)) * (self.ks[i] if i else 1.0)
        return x


def test_a_list_of_which_one_is_used_is_not_said_never_to_run():
    torch.manual_seed(0)
    report = stabkit.analyze(_Weighed(), torch.randn(8, 4), spectrum="none")
    (found,) = [f for f in report.findings if f.kind == "no_gradient"]
    assert "ks.0" in found.evidence
    assert "never runs" not in found.evidence
