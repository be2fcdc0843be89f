"""Models, losses and optimizers that are made to break it: the right number or a refusal, and nothing is changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from stabkit.curvature import critical_rate, sharpness
from stabkit.errors import StabkitError

X = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(0))


def entropy(output):
    return functional.cross_entropy(output, Y)


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def _joined(parts, parameters):
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(parts, parameters, strict=True)]
    )


def dense(model, x, loss=entropy, parameters=None):
    """Eigenvalues of the whole matrix, row by row, descending."""
    parameters = parameters or [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss(model(x)), parameters, create_graph=True, allow_unused=True)
    flat = torch.cat(
        [(g if g is not None else torch.zeros_like(p)).reshape(-1) for g, p in zip(grads, parameters, strict=True)]
    )
    rows = []
    for entry in flat:
        found = (
            torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
            if entry.requires_grad
            else [None] * len(parameters)
        )
        rows.append(
            torch.cat(
                [
                    (g if g is not None else torch.zeros_like(p)).reshape(-1)
                    for g, p in zip(found, parameters, strict=True)
                ]
            )
        )
    return torch.linalg.eigvalsh(torch.stack(rows).detach().double()).flip(0).numpy()


def state(model, optimizer=None):
    """All that may not change, as text and bytes."""
    tensors = [
        (n, p.detach().clone(), None if p.grad is None else p.grad.to_dense().clone())
        for n, p in model.named_parameters()
        if not p.is_meta
    ]
    return (
        str([(n, p.tolist(), None if g is None else g.tolist()) for n, p, g in tensors]),
        str([(n, b.tolist()) for n, b in model.named_buffers()]),
        str([(p.requires_grad, p.dtype, p.is_meta) for p in model.parameters()]),
        str(None if optimizer is None else optimizer.state_dict()),
        str([(sorted(vars(m)), m.training) for m in model.modules()]),
        str([len(m._backward_hooks) + len(m._forward_hooks) for m in model.modules()]),
        torch.get_rng_state().tolist(),
        str(np.random.get_state()),  # noqa: NPY002
    )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = mlp(), reentrant

    def forward(self, x):
        x = x.detach().requires_grad_()
        return self.inner[2](checkpoint(lambda z: torch.tanh(self.inner[0](z)), x, use_reentrant=self.reentrant))


class Lookup(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(9, 4, sparse=sparse).double(), nn.Linear(4, 3).double()

    def forward(self, indices):
        return self.head(torch.tanh(self.table(indices)))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.spare, self.empty = mlp(), nn.Linear(3, 3).double(), nn.Parameter(torch.empty(0).double())

    def forward(self, x):
        return self.inner(x) + self.empty.sum()


def frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


def with_gradients():
    model = mlp()
    entropy(model(X)).backward()
    return model


def compiled_in_place():
    model = mlp()
    model.compile(backend="eager")
    return model


def made_in_inference_mode():
    with torch.inference_mode():
        return mlp()


INDICES = torch.randint(9, (12,), generator=torch.Generator().manual_seed(1))
RIGHT = {
    "frozen": (frozen, X, frozen),
    "tied": (Tied, X, Tied),
    "spread": (lambda: nn.DataParallel(mlp()), X, mlp),
    "compiled": (lambda: torch.compile(mlp(), backend="eager"), X, mlp),
    "compiled in place": (compiled_in_place, X, mlp),
    "made in inference mode": (made_in_inference_mode, X, mlp),
    "checkpointed, reentrant": (lambda: Checkpointed(True), X, mlp),
    "checkpointed": (lambda: Checkpointed(False), X, mlp),
    "sparse": (lambda: Lookup(True), INDICES, lambda: Lookup(False)),
    "unused": (Unused, X, Unused),
    "in place": (
        lambda: nn.Sequential(mlp()[0], nn.ReLU(inplace=True), mlp()[2]), X,
        lambda: nn.Sequential(mlp()[0], nn.ReLU(), mlp()[2]),
    ),
    "gradients": (with_gradients, X, mlp),
    "batch norm": (
        lambda: nn.Sequential(mlp()[0], nn.BatchNorm1d(5).double(), mlp()[2]), X,
        lambda: nn.Sequential(mlp()[0], nn.BatchNorm1d(5).double(), mlp()[2]),
    ),
    "half": (lambda: mlp(torch.float16), X.half(), mlp),
    "bfloat16": (lambda: mlp(torch.bfloat16), X.bfloat16(), mlp),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_the_right_number_and_nothing_is_changed(name):
    build, x, plain = RIGHT[name]
    model = build()
    before = state(model)
    found = sharpness(model, x, loss=entropy, tol=1e-5)
    assert state(model) == before
    truth = dense(plain(), x.double() if x.is_floating_point() else x)
    assert found.values[0] == pytest.approx(truth[0], rel=0.02 if "16" in name or name == "half" else 1e-4)


@pytest.mark.parametrize(
    "name", ["frozen", "tied", "spread", "compiled", "sparse", "checkpointed", "gradients", "half"]
)
def test_the_critical_rate_changes_nothing_either(name):
    build, x, _ = RIGHT[name]
    model = build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    before = state(model, optimizer)
    assert critical_rate(model, x, loss=entropy, optimizer=optimizer).factor > 1
    assert state(model, optimizer) == before


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_it_is_measured_in_any_mode(mode):
    model = mlp()
    truth = dense(model, X)[0]
    with mode():
        found = sharpness(model, X.clone(), loss=entropy)
    assert found.values[0] == pytest.approx(truth, rel=1e-3)


def test_weights_that_are_normalised_have_their_second_derivative():
    """That of torch's own operation is wrong: it fails ``gradgradcheck``."""
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    found = sharpness(model, X, loss=entropy, tol=1e-8)
    parameters = list(model.parameters())

    def composed(x):
        g, v = (getattr(model[0].parametrizations.weight, name) for name in ("original0", "original1"))
        return model[2](torch.tanh(functional.linear(x, v * (g / v.norm(dim=1, keepdim=True)), model[0].bias)))

    assert found.values[0] == pytest.approx(dense(composed, X, parameters=parameters)[0], rel=1e-6)
    assert found.notes == ()


class Drops(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.inner, self.generator, self.own = mlp(), torch.Generator().manual_seed(3), own

    def forward(self, x):
        h = torch.tanh(self.inner[0](x))
        if self.own:
            mask = torch.rand(h.shape, generator=self.generator) > 0.5
        else:
            mask = torch.from_numpy(np.random.rand(*h.shape) > 0.5)  # noqa: NPY002
        return self.inner[2](h * mask)


@pytest.mark.parametrize("own", [True, False])
def test_masks_of_other_generators_are_held_fixed(own):
    model = Drops(own)
    before, drawn = state(model), model.generator.get_state()
    first = sharpness(model, X, loss=entropy)
    assert sharpness(model, X, loss=entropy).values.tolist() == first.values.tolist()
    assert state(model) == before
    assert torch.equal(drawn, model.generator.get_state())


def test_hooks_of_the_way_back_do_not_run():
    model, seen = mlp(), []
    truth = dense(model, X)[0]
    model[2].register_full_backward_hook(lambda *given: seen.append("module"))
    handle = model[0].weight.register_hook(lambda grad: seen.append("parameter") or 0.5 * grad)
    assert sharpness(model, X, loss=entropy).values[0] == pytest.approx(truth, rel=1e-3)
    assert seen == []
    entropy(model(X)).backward()
    assert sorted(seen) == ["module", "parameter"]
    handle.remove()
    entropy(model(X)).backward()
    assert seen.count("parameter") == 1


@pytest.mark.parametrize("factor", [1e25, 1e-25])
def test_a_loss_of_any_size_in_float32(factor):
    found = sharpness(mlp(torch.float32), X.float(), loss=lambda out: factor * entropy(out))
    assert found.values[0] == pytest.approx(factor * dense(mlp(), X)[0], rel=1e-3)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Detaching(Square):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * grad


class InNumpy(Square):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.detach().numpy() * grad.detach().numpy())


class Once(Square):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Squaring(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.inner, self.function = mlp(), function

    def forward(self, x):
        return self.inner[2](self.function.apply(self.inner[0](x)))


def test_a_backward_by_hand_that_is_differentiable_is_used():
    model = Squaring(Square)
    assert sharpness(model, X, loss=entropy, tol=1e-6).values[0] == pytest.approx(dense(model, X)[0], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_healthy_backward_by_hand_passes_beside_kinks(dtype):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 5)]
    model = nn.Sequential(*layers, Squaring(Square).inner[1], nn.Linear(5, 3))
    model[3] = type("Own", (nn.Module,), {"forward": lambda self, x: Square.apply(x)})()
    for seed in range(4):
        torch.manual_seed(seed)
        x, y = torch.randn(64, 6, dtype=dtype), torch.randint(3, (64,))
        found = sharpness(model.to(dtype), x, loss=lambda out, y=y: functional.cross_entropy(out, y))
        assert found.values[0] > 0


@pytest.mark.parametrize("function", [Detaching, InNumpy, Once])
def test_a_backward_by_hand_that_is_not_differentiable_is_refused(function):
    model = Squaring(function)
    with pytest.raises(StabkitError, match=r"not differentiable as it is written|once_differentiable"):
        sharpness(model, X, loss=entropy)


class One(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(1, 2, n, dtype=torch.float64))

    def forward(self, x):
        return self.theta * x


@pytest.mark.parametrize(
    ("n", "k", "loss", "expected"),
    [
        (2, 5, lambda out: out.square().sum(), [2.0, 2.0]),
        (1, 1, lambda out: out.square().sum(), [2.0]),
        (4, 2, lambda out: out.sum(), [0.0, 0.0]),
        (4, 2, lambda out: -(torch.arange(1, 5) * out.square()).sum(), [-2.0, -4.0]),
    ],
)
def test_few_parameters_no_curvature_and_negative_curvature(n, k, loss, expected):
    model = One(n)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    found = sharpness(model, torch.ones(()).double(), loss=loss, optimizer=sgd, k=k)
    assert found.values == pytest.approx(expected)
    assert found.largest_stable_lr == (10 * 0.1 if expected[0] > 0 else np.inf)


def lazy():
    return nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3)).double()


def raising(output):
    raise KeyError("mine")


REFUSED = {
    "lazy": (lazy, entropy, "call it once on a batch"),
    "meta": (lambda: nn.Linear(6, 3, device="meta").double(), entropy, "hold no numbers"),
    "no entries": (lambda: One(0), entropy, "have no entries"),
    "per sample": (mlp, lambda out: out.sum(1), "expected a scalar"),
    "a number": (mlp, lambda out: 3.0, "expected a scalar"),
    "NaN": (mlp, lambda out: entropy(out) * float("nan"), "not finite"),
    "infinite": (mlp, lambda out: entropy(out) / 0.0, "not finite"),
    "constant": (mlp, lambda out: torch.tensor(1.0), "does not depend on the model's output"),
    "detached": (mlp, lambda out: entropy(out.detach()), "does not depend on the model's output"),
    "complex": (mlp, lambda out: entropy(out) + 0j, "real scalar"),
    "raising": (mlp, raising, "the loss failed on the model's output: KeyError"),
    "of another shape": (lambda: nn.Linear(7, 3).double(), entropy, "the model failed on what it was called with"),
    "frozen as a whole": (lambda: mlp().requires_grad_(False), entropy, "requires? grad"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("measure", [sharpness, critical_rate])
def test_what_cannot_be_measured_is_refused(name, measure):
    build, loss, told = REFUSED[name]
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = None if name == "lazy" else state(model, optimizer)
    told = f"{told}|the loss is nan|trains no parameter"
    options = {} if measure is sharpness else {"optimizer": optimizer}
    with pytest.raises(StabkitError, match=told):
        measure(model, X, loss=loss, **options)
    assert name == "lazy" or state(model, optimizer) == before


def test_a_loss_that_draws_is_refused():
    targets = iter(torch.utils.data.DataLoader(torch.randint(3, (9, 12))))
    with pytest.raises(StabkitError, match="draws no new batches"):
        sharpness(mlp(), X, loss=lambda out: functional.cross_entropy(out, next(targets)[0]))


def test_an_iterator_that_a_loss_closes_over_is_where_it_was():
    every = list(torch.randint(3, (9, 12)))
    targets, model = iter(every), mlp()
    found = sharpness(model, X, loss=lambda out: functional.cross_entropy(out, next(targets)))
    same = sharpness(model, X, loss=lambda out: functional.cross_entropy(out, every[0]))
    assert found.values.tolist() == same.values.tolist()
    assert next(targets) is every[0]


def test_complex_parameters():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128))

        def forward(self, x):
            return self.w * x

    model = Complex()
    with pytest.raises(StabkitError, match="complex"):
        sharpness(model, torch.ones(2).double(), loss=lambda out: out.abs().square().sum())


def test_gradients_that_are_there_are_no_sign_of_another_training():
    model = mlp()
    entropy(model(X)).backward()
    kept = [p.grad for p in model.parameters()]
    truth = sharpness(mlp(), X, loss=entropy).values.tolist()
    assert sharpness(model, X, loss=entropy).values.tolist() == truth
    assert all(p.grad is grad for p, grad in zip(model.parameters(), kept, strict=True))
