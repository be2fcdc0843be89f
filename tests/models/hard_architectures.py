"""Hard cases: solvers, wide state spaces, weights and modules in unusual places."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from . import hard_dynamics as dynamics
from . import hard_models as models
from .building import THREE_BLOCKS, built, chain, on
from .hard_models import Residual, Stack, Wrapped
from .zoo import Subject

_ODE = built(lambda: dynamics.NeuralODE("dopri5"), on(2, 4))


def _graph_input() -> Tensor:
    return torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 4]])


def _adjacency() -> Tensor:
    return (torch.eye(5) + torch.eye(5).roll(1, 0)).to_sparse()


def _parametrised(register: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Stack()
        for block in model.blocks:
            register(block.inner)
        return model

    return make


SUBJECTS = [
    Subject("odeint, rk4", built(lambda: dynamics.NeuralODE("rk4"), on(2, 4)), 5, "field", fast=True),
    Subject("odeint, euler", built(lambda: dynamics.NeuralODE("euler"), on(2, 4)), 5, "field"),
    Subject("odeint, dopri5", _ODE, options={"batch_dim": None}),
    Subject(
        "odeint_adjoint, dopri5",
        built(lambda: dynamics.NeuralODE("dopri5", adjoint=True), on(2, 4)),
        options={"batch_dim": None},
        note="the solver's own Function: its backward is the adjoint ODE",
    ),
    Subject("DEQ, one phantom step", built(lambda: dynamics.Equilibrium(hook=False), on(2, 4))),
    Subject("DEQ, implicit hook", built(lambda: dynamics.Equilibrium(hook=True), on(2, 4)), fast=True),
    Subject("Hamiltonian, autograd inside", built(dynamics.Hamiltonian, on(2, 6))),
    Subject("reversible pairs in a loop", built(dynamics.Reversible, on(2, 6)), fast=True),
    Subject("RevNet of modules on pairs", built(dynamics.RevNet, on(2, 6)), 5, "CouplingBlock"),
    Subject("momentum net", built(dynamics.Momentum, on(2, 6)), 6, r"layers\.\d", fast=True),
    Subject("two-step midpoint net", built(dynamics.Midpoint, on(2, 6)), 6, r"layers\.\d"),
    Subject("densely connected", built(dynamics.Dense, on(2, 4, 6)), 5, r"layers\.\d"),
    Subject("U-Net", built(dynamics.UNet, on(2, 2, 8, 8)), 7, r"(down|up)\.\d|bottom"),
    Subject("hypernetwork", built(models.Hyper, on(2, 4)), 3, r"makers\.\d"),
    Subject(
        "graph network",
        built(models.GraphNetwork, on(5, 4), _graph_input),
        3,
        "GraphLayer",
        options={"batch_dim": None},
    ),
    Subject(
        "graph network, sparse adjacency",
        built(models.SparseGraphNetwork, on(5, 4), _adjacency),
        3,
        r"layers\.\d",
        options={"batch_dim": None, "source": "0"},
    ),
    Subject("Fourier layers, complex weights", built(models.Fourier, on(2, 8)), fast=True),
    Subject("mixture of experts", built(models.Experts, on(6, 4))),
    Subject("early exit", built(models.EarlyExit, on(2, 4)), 5, "Residual", fast=True),
    Subject("__getattr__ and self-reference", built(models.Dynamic, on(2, 4)), 3, "Residual"),
    Subject("hidden state as an attribute", built(models.Stateful, on(2, 5, 4)), 5, "cell"),
    Subject("scan into a buffer", built(models.Scan, on(2, 6, 4))),
    Subject("tied autoencoder", built(models.TiedAutoencoder, on(2, 6))),
    Subject(
        "tied language model, embeddings in place",
        built(models.TiedLanguageModel, lambda: torch.randint(11, (2, 5))),
        **THREE_BLOCKS,
        fast=True,
    ),
    Subject(
        "one block for all depths",
        built(lambda: Wrapped(lambda m, x: m(m(m(m(x)))), Residual(4)), on(2, 4)),
        4,
        "Residual",
    ),
    Subject(
        "whole net called twice",
        built(lambda: Wrapped(lambda m, x: m(m(x)), chain(*[lambda: Residual(4)] * 3)()), on(2, 4)),
        6,
        "Residual",
    ),
    Subject("weight_norm", built(_parametrised(parametrizations.weight_norm), on(2, 4)), **THREE_BLOCKS),
    Subject("weight_norm, by hooks", built(_parametrised(nn.utils.weight_norm), on(2, 4)), **THREE_BLOCKS),
    Subject(
        "spectral_norm, train",
        built(_parametrised(parametrizations.spectral_norm), on(2, 4), train=True),
        **THREE_BLOCKS,
        fast=True,
    ),
    Subject(
        "spectral_norm, by hooks, train",
        built(_parametrised(nn.utils.spectral_norm), on(2, 4), train=True),
        **THREE_BLOCKS,
    ),
    Subject("orthogonal", built(_parametrised(parametrizations.orthogonal), on(2, 4)), **THREE_BLOCKS),
]
