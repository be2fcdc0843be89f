"""Every fact of the vocabulary against the function that it is about, and that readers ask nobody else."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import stabkit
from stabkit import meanfield, vocabulary
from stabkit.attribution.after_addition import tail_of
from stabkit.diagnosis.blocks.weights import norms_in
from stabkit.diagnosis.states.activity import activities
from stabkit.errors import ArgumentError, ArgumentTypeError
from stabkit.meanfield.activations import of_facts
from stabkit.vocabulary.catalogue import FAMILIES
from stabkit.vocabulary.lookup import activation_rules, every_activation
from stabkit.vocabulary.measuring import measure

PACKAGE = Path(__file__).parent.parent / "stabkit"
OTHER_PARAMETERS = {
    "leaky_relu": {"negative_slope": -0.3},
    "prelu": {"weight": torch.tensor([1.5])},
    "elu": {"alpha": 2.0, "scale": 0.7, "input_scale": 0.5},
    "celu": {"alpha": 2.0},
    "softplus": {"beta": 3.0, "threshold": 20.0},
    "hardtanh": {"min_val": 0.5, "max_val": 2.0},
    "threshold": {"threshold": 0.3, "value": -2.0},
    "softshrink": {"lambd": 0.25},
    "hardshrink": {"lambd": 1.0},
}
FACTS = [*every_activation(), *(f.of(OTHER_PARAMETERS[f.name]) for f in FAMILIES if f.name in OTHER_PARAMETERS)]
FACTS += [
    vocabulary.activation_of(torch.ones(3, requires_grad=True).clamp(*bounds).grad_fn) for bounds in ((-1, 2), (0, 6))
]


@pytest.mark.parametrize("facts", FACTS, ids=lambda facts: f"{facts.name}-{dict(facts.parameters)}")
def test_every_fact_is_true_of_the_function(facts: vocabulary.ActivationFacts):
    measured = measure(facts.function, "measured")
    assert measured is not None, "it does not act on every number alone"
    assert measured.slope == pytest.approx(facts.slope, abs=1e-8)
    assert measured.limits == pytest.approx(facts.limits, abs=1e-6, nan_ok=True)
    assert measured.piecewise_linear == facts.piecewise_linear
    if facts.piecewise_linear:
        assert measured.kinks == pytest.approx(facts.kinks)
    assert (measured.flat_side, measured.rectifies) == (facts.flat_side, facts.rectifies)


@pytest.mark.parametrize("facts", FACTS, ids=lambda facts: facts.name)
def test_no_derivative_lies_outside_of_its_bounds(facts: vocabulary.ActivationFacts):
    x = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).mul(4).requires_grad_()
    (slopes,) = torch.autograd.grad(facts.function(x).sum(), x)
    low, high = facts.slope
    assert low - 1e-7 <= float(slopes.min())
    assert float(slopes.max()) <= high + 1e-7  # torch computes 1 / 6 in float32


@pytest.mark.parametrize("facts", FACTS, ids=lambda facts: facts.name)
def test_away_from_its_kinks_it_is_smooth(facts: vocabulary.ActivationFacts):
    """The derivative has no jump, and no bend, between points a hundredth apart that hold no kink."""
    x = torch.linspace(-8, 8, 160_001, dtype=torch.float64).requires_grad_()
    (slopes,) = torch.autograd.grad(facts.function(x).sum(), x)
    bends = slopes.diff().diff().abs() > 1e-5  # 1e-8 times the third derivative, where there is one
    near = torch.zeros_like(bends)
    for kink in facts.kinks:
        near |= (x.detach()[1:-1] - kink).abs() < 3e-4
    assert not bool((bends & ~near).any())


@pytest.mark.parametrize("facts", FACTS, ids=lambda facts: facts.name)
def test_gain_keeps_the_mean_square(facts: vocabulary.ActivationFacts):
    z = torch.randn(1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float((facts.gain * facts.function(z)).square().mean()) == pytest.approx(1.0, rel=0.02)


def _recorded(function) -> torch.autograd.graph.Node:
    return function(torch.linspace(-2, 2, 24).reshape(4, 6).requires_grad_()).grad_fn


@pytest.mark.parametrize(
    "cls", sorted({cls for f in FAMILIES for cls in f.sources if isinstance(cls, type)}, key=lambda cls: cls.__name__)
)
def test_a_module_and_its_recording_say_the_same(cls: type[nn.Module]):
    required = {nn.Threshold: (0.2, -1.0)}
    module = cls(*required.get(cls, ())).eval()
    facts, node = vocabulary.activation_of(module), _recorded(module)
    assert facts is not None
    if vocabulary.operation(node) in vocabulary.ACTIVATIONS:
        recorded = vocabulary.activation_of(node)
        assert (recorded.slope, recorded.flat_side) == (facts.slope, facts.flat_side)


def test_every_elementwise_activation_of_torch_is_known():
    mixing = {"GLU", "MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax"}
    missing = {
        name
        for name in nn.modules.activation.__all__
        if name not in mixing and vocabulary.activation_of(getattr(nn, name)) is None
    }
    assert missing == set()


def test_every_norm_of_torch_is_known_and_normalises():
    scaled = {"LocalResponseNorm", "CrossMapLRN2d"}  # their results change with the scale of the input
    names = {n for n in dir(nn) if "Norm" in n and isinstance(getattr(nn, n), type)} - scaled
    assert {n for n in names if vocabulary.norm_of(getattr(nn, n)) is None} == set()


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.RMSNorm(6, eps=1e-12), nn.InstanceNorm1d(6), nn.BatchNorm1d(6)]
)
def test_facts_of_norms(norm: nn.Module):
    facts = vocabulary.norm_of(norm)
    norm = norm.double().train()
    norm.eps = 1e-12
    shape = (5, 6) if facts.over == ("features",) else (5, 6, 7)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = norm(x)
    torch.testing.assert_close(norm(3 * x), y)
    assert torch.allclose(norm(x + 2), y, atol=1e-6) == facts.centred
    others = torch.cat([x[:1], x[1:] * torch.arange(2.0, 6.0).reshape(-1, *[1] * (x.dim() - 1))])
    assert torch.allclose(norm(others)[:1], y[:1], atol=1e-6) == facts.per_sample
    assert hasattr(norm, "running_mean") == facts.running


def test_moves_only_move():
    """Ones pulled back through a move: every entry of the input is counted a whole number of times."""
    x = torch.ones(2, 4, 4, requires_grad=True)
    made = {
        "reshape": [x.view(8, 4), x.squeeze(), x.unsqueeze(0), x[:, :1].squeeze(1)],
        "permute": [x.permute(2, 0, 1), x.transpose(0, 1), x.flip(0), x.roll(1), x[0].t()],
        "copy": [x.clone(), x.double()],
        "select": [x[0], x[:, :2], *x.split(1)[:1], *x.unbind(0)[:1], x.as_strided((2, 2), (1, 2))],
        "gather": [x[[0, 0]], x.index_select(1, torch.tensor([1])), x.gather(1, torch.zeros(2, 1, 4, dtype=int))],
        "join": [torch.cat([x, x]), torch.stack([x, x])],
        "expand": [x.unsqueeze(0).expand(3, 2, 4, 4)],
        "pad": [nn.functional.pad(x, (1, 1))],
        "write": [x.slice_scatter(torch.ones(2, 1, 4), 1, 0, 1), x.select_scatter(torch.ones(4, 4), 0, 0)],
    }
    for kind, tensors in made.items():
        for tensor in tensors:
            assert vocabulary.operation(tensor.grad_fn) in vocabulary.moves(kind), (kind, tensor.grad_fn)
            (counts,) = torch.autograd.grad(tensor.sum(), x, retain_graph=True)
            assert torch.equal(counts, counts.round())
    with pytest.raises(ArgumentError, match="expected of reshape"):
        vocabulary.moves("turn")


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x > 0)


class Handmade(nn.Module):
    def forward(self, x):
        return Twice.apply(x)


class Sharp(nn.Module):
    """With a parameter, so that it is not recognised by itself."""

    def __init__(self):
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return torch.tanh(self.sharpness * x)


class Renamed(nn.LayerNorm):
    pass


class Rescale(nn.Module):
    def forward(self, x):
        return x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()


def test_what_inherits_is_known_and_what_overrides_is_evaluated():
    class Quiet(nn.ReLU):
        pass

    class Cubed(nn.ReLU):
        def forward(self, x):
            return x**3

    assert vocabulary.activation_of(Quiet()).name == "relu"
    facts = vocabulary.activation_of(Cubed())
    assert facts.name == "Cubed"
    assert facts.slope == pytest.approx((0.0, math.inf))
    assert vocabulary.norm_of(Renamed(3)).name == "layer_norm"


def test_foreign_activations_are_known_by_what_they_compute():
    activations = pytest.importorskip("transformers.activations")
    assert vocabulary.activation_of(activations.NewGELUActivation()).parameters == {"approximate": "tanh"}
    assert vocabulary.activation_of(activations.QuickGELUActivation()).flat_side == "below"
    assert vocabulary.activation_of(nn.Dropout()) is None
    assert vocabulary.activation_of(nn.Softmax(-1)) is None


def test_foreign_norms_are_known_by_name_if_they_have_no_matrix_and_no_parts():
    class LlamaRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    class NormedLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

    class PreNorm(nn.Sequential):
        pass

    assert vocabulary.norm_of(LlamaRMSNorm()) is not None
    assert vocabulary.norm_of(NormedLinear()) is None
    assert vocabulary.norm_of(PreNorm(nn.LayerNorm(3), nn.Linear(3, 3))) is None


def test_evaluating_leaves_the_module_and_the_random_state_alone():
    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x + torch.rand(())

    module, before = Counting(), torch.get_rng_state()
    vocabulary.activation_of(module)
    assert module.calls == 0
    assert torch.equal(before, torch.get_rng_state())


def test_a_registration_can_be_undone():
    before = dict(activation_rules)
    with vocabulary.register_activation(Sharp, like=nn.Tanh):
        assert vocabulary.activation_of(Sharp()).name == "tanh"
    assert vocabulary.activation_of(Sharp()) is None
    assert activation_rules == before
    with vocabulary.register_activation(Sharp):
        assert vocabulary.activation_of(Sharp()).slope == pytest.approx((0.0, 2.0))
    with vocabulary.register_norm(Rescale, over=("features",), centred=False):
        assert vocabulary.norm_of(Rescale()).per_sample


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"like": "tanf"}, "expected one of"),
        ({"like": nn.Linear}, "expected one of"),
        ({"like": nn.Tanh, "slope": (0, 1)}, "beside other facts"),
        ({"slope": (0, 1)}, "expected both"),
        ({"slope": (1, 0), "limits": (0, 1)}, "least derivative first"),
        ({"slope": (0, 1), "limits": (1, 0)}, "contradicts"),
        ({"slope": (0.5, 1), "limits": (0, 1)}, "contradicts"),
    ],
)
def test_contradicting_facts_are_refused(arguments: dict, words: str):
    with pytest.raises(ArgumentError, match=words):
        vocabulary.register_activation(Sharp, **arguments)
    assert vocabulary.activation_of(Sharp()) is None


def test_what_is_no_class_or_known_is_refused():
    for register, known in ((vocabulary.register_activation, nn.ReLU), (vocabulary.register_norm, nn.LayerNorm)):
        for wrong in (torch.tanh, "tanh", int, known(3) if known is nn.LayerNorm else known()):
            with pytest.raises(ArgumentTypeError, match="expected a class of modules"):
                register(wrong, like=known)
        with pytest.raises(ArgumentError, match="known already"):
            register(known, like=known)
    with pytest.raises(ArgumentError, match="class of a known norm"):
        vocabulary.register_norm(Rescale, like=nn.Linear)
    with pytest.raises(ArgumentError, match="expected like="):
        vocabulary.register_norm(Rescale, over=("rows",), centred=True)


# ---------------------------------------------------------------- what is registered changes what every reader says


class Layer(nn.Module):
    """x + W x behind an activation or a norm that only its author knows."""

    def __init__(self, behind: nn.Module, skip: bool, width: int = 16):
        super().__init__()
        self.linear, self.behind, self.skip = nn.Linear(width, width), behind, skip

    def forward(self, x):
        return self.behind(x + self.linear(x) if self.skip else self.linear(x))


def _network(make, *, skip: bool) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(make(), skip) for _ in range(3))), torch.randn(4, 16)


def _traced(make, *, skip: bool) -> stabkit.Flow:
    return stabkit.trace(*_network(make, skip=skip))


def _activities(flow: stabkit.Flow) -> list:
    step = flow.steps[1]
    step.vjp([torch.ones_like(t) for t in step.target.tensors])
    return list(activities(flow, step))


class Gated(nn.Module):
    """max(x, 0), as a product with a mask that has a parameter."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.one * x * (x > 0)


class Standard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x / x.square().mean(-1, keepdim=True).sqrt()
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        return (gradient - y * (gradient * y).mean(-1, keepdim=True)) / x.square().mean(-1, keepdim=True).sqrt()


class Fused(nn.Module):
    """An RMS norm with a hand-written backward, by a name that does not say so."""

    def forward(self, x):
        return Standard.apply(x)


def test_diagnosis_sees_a_registered_activation():
    assert _activities(_traced(Gated, skip=False)) == []
    with vocabulary.register_activation(Gated, like=nn.ReLU):
        (found,) = _activities(_traced(Gated, skip=False))
    (known,) = _activities(_traced(nn.ReLU, skip=False))
    assert (found.operation, found.facts.name) == ("Gated", "relu")
    assert (found.dead, found.units) == (known.dead, known.units)


def test_diagnosis_sees_a_registered_norm():
    flow = _traced(Fused, skip=True)
    assert [norms_in(flow, step) for step in flow.steps] == [0, 0, 0]
    with vocabulary.register_norm(Fused, like=nn.RMSNorm):
        assert [norms_in(flow, step) for step in flow.steps] == [1, 1, 1]


def test_attribution_parts_off_what_is_registered():
    assert tail_of(_traced(Fused, skip=True).steps[1]) is None
    with vocabulary.register_norm(Fused, like=nn.RMSNorm):
        tail = tail_of(_traced(Fused, skip=True).steps[1])
        assert not tail.is_diagonal
        frame = stabkit.attribute(_traced(Fused, skip=True)).to_dataframe()
    assert bool((frame["norm"] != 0).all())
    with vocabulary.register_activation(Gated, like="relu"):
        frame = stabkit.attribute(_traced(Gated, skip=True)).to_dataframe()
    known = stabkit.attribute(_traced(nn.ReLU, skip=True)).to_dataframe()
    assert frame["mask"].to_list() == pytest.approx(known["mask"].to_list())


def test_identification_reads_a_registered_projection():
    assert stabkit.identify(_traced(Fused, skip=True))[1].name == "unknown"
    with vocabulary.register_norm(Fused, like=nn.RMSNorm):
        assert stabkit.identify(_traced(Fused, skip=True))[1].name == "projected Euler (post-norm)"
    with vocabulary.register_activation(Gated, like="relu"):
        record = stabkit.identify(_traced(Gated, skip=True))[1]
    assert (record.name, record.after) == ("projected Euler (ReLU)", ("Gated",))


def test_mean_field_expects_a_registered_activation():
    assert meanfield.at_initialisation(*_network(Gated, skip=False)).steps[1].activations == ()
    with vocabulary.register_activation(Gated, like=nn.ReLU):
        found = meanfield.at_initialisation(*_network(Gated, skip=False))
    known = meanfield.at_initialisation(*_network(nn.ReLU, skip=False))
    assert found.steps[1].activations == known.steps[1].activations
    assert found.steps[1].q_expected == pytest.approx(known.steps[1].q_expected)
    assert found.steps[1].log_chi_expected == pytest.approx(known.steps[1].log_chi_expected)


LEAVES_NO_NODE = ("linear", "clamp")  # as they are by default


@pytest.mark.parametrize(
    "facts", [facts for facts in every_activation() if facts.name not in LEAVES_NO_NODE], ids=lambda facts: facts.name
)
def test_an_entry_is_all_that_readers_need(facts: vocabulary.ActivationFacts):
    """A family in the catalogue, with its autograd nodes, is one that every reader knows what to do with."""

    class Plain(nn.Module):
        def forward(self, x):
            return facts.function(x)

    flow = _traced(Plain, skip=True)
    (element,) = tail_of(flow.steps[1]).elements
    assert element.facts.slope == pytest.approx(facts.slope)
    assert len(_activities(flow)) == (facts.flat_side != "above")
    theory = of_facts(facts)
    x = torch.linspace(-3, 3, 64, dtype=torch.float64)
    torch.testing.assert_close(torch.from_numpy(theory.function(x.numpy())), facts.function(x), rtol=1e-6, atol=1e-12)


# ---------------------------------------------------------------- nobody else keeps such a list
