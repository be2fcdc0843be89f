"""What one block does to cotangents, measured while its weights are there."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.identification import identify
from stabkit.jacobians import Jacobian, singular_values
from stabkit.streaming.meta_model import Weights
from stabkit.streaming.profile import Method
from stabkit.streaming.stack import Block
from stabkit.tracing import Flow, trace
from stabkit.walk import PROBE


@dataclass(frozen=True)
class Settings:
    """What the results of a block depend on beside its weights and its input.

    Attributes:
        first: number of the first probe.
        probes: how many, from that one on; none when there are more ranks than probes.
        k: singular values.
        tol: of them.
        max_products: that they may take.
        seed: of the first of all probes and of the start vectors.
    """

    first: int
    probes: int
    k: int
    tol: float
    max_products: int
    seed: int


def measure_block(
    block: Block,
    weights: Weights,
    state: Tensor,
    cotangents: Tensor | None,
    powers: Tensor | None,
    settings: Settings,
) -> dict[str, Tensor]:
    """What one block does to the cotangents of the state after it, and its singular values."""
    with weights.present(block.module.modules()):
        flow = trace(block.step(), state, depth=["module"], seed=settings.seed)
        J = flow.jacobian()
        if cotangents is None or powers is None:
            cotangents = _drawn(flow, settings)
            powers = torch.zeros(J.shape[0], settings.probes, dtype=torch.float64)
        pulled = J.rmatmat(cotangents.to(J.device)) if settings.probes else cotangents
        arriving = cotangents.cpu()
        scaled, exponents = _rescaled(pulled, powers)
        found = {
            "cotangents": scaled.cpu().contiguous(),  # laid out as it is read back, so that a resumed run adds alike
            "powers": exponents,
            "log_after": _log_norms(arriving, powers),
            "log_before": _log_norms(pulled, powers),
            "state_before": torch.linalg.vector_norm(flow.states[0].flatten().double(), dim=1),
            "state_after": torch.linalg.vector_norm(flow.states[-1].flatten().double(), dim=1),
            "gain": _gain(J, settings.seed + block.index),
            "chain_error": torch.tensor([flow.chain_error if flow.chain_error is not None else math.nan]),
            "method": _as_tensor(_method(flow)),
        }
        if settings.k:
            found.update(_singular(J, settings))
        for step in flow.steps:
            step.segment.release()
        return found


def _gain(J: Jacobian, seed: int) -> Tensor:
    """1/2 log(|J|_F^2 / m) per sample, from two random cotangents."""
    batch, m, _ = J.shape
    sent = torch.randn(batch, m, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pulled = J.rmatmat(sent.to(J.device, J.dtype)).double().cpu()
    return 0.5 * (pulled.square().sum((1, 2)) / sent.square().sum((1, 2))).log()


def _method(flow: Flow) -> Method:
    """What the block is as a whole; in words of its parts where it was cut in several."""
    found = identify(flow)
    first = found[0]
    if len(found) == 1:
        return Method(first.name, first.skip, first.evidence, first.residual)
    return Method(", ".join(one.name for one in found), None, "unknown", None)


def _as_tensor(method: Method) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(vars(method)).encode()), dtype=torch.uint8)


def as_method(tensor: Tensor) -> Method:
    """The method that was kept as a tensor of bytes."""
    return Method(**json.loads(bytes(tensor.numpy().tobytes())))


def _drawn(flow: Flow, settings: Settings) -> Tensor:
    """Standard normal columns ``(batch, size, probes)``, those of ``stabkit.gradient_profile``."""
    numbers = range(settings.first, settings.first + settings.probes)
    drawn = [flow.cotangent(seed=settings.seed + PROBE * i) for i in numbers]
    space = flow.states[-1].space
    if not drawn:
        return torch.zeros(space.batch, space.size, 0, dtype=space.dtype)
    stacked = [torch.stack([tensor.detach() for tensor in parts]) for parts in zip(*drawn, strict=True)]
    return space.flatten(stacked)


def _log_norms(columns: Tensor, powers: Tensor) -> Tensor:
    """Logs of the norms ``(batch, probes)`` of columns that stand for 2^powers times themselves."""
    norms: Tensor = torch.linalg.vector_norm(columns.double(), dim=1).cpu()
    return norms.log() + math.log(2) * powers


def _rescaled(columns: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
    """Columns brought to about unit length by powers of two, which is exact, and the powers that make up for it."""
    norms = torch.linalg.vector_norm(columns.double(), dim=1).cpu()
    usable = norms.isfinite() & (norms > 0)
    shift = torch.where(usable, norms.clamp_min(torch.finfo(torch.float64).tiny).log2().round(), 0.0)
    return columns * torch.exp2(-shift).to(columns).unsqueeze(1), powers + shift


def _singular(J: Jacobian, settings: Settings) -> dict[str, Tensor]:
    k = min(settings.k, *J.shape[1:])
    found = singular_values(
        J, k, tol=settings.tol, max_products=settings.max_products, seed=settings.seed, method="golub-kahan"
    )
    return {
        "singular_values": found.values,
        "residuals": found.residuals,
        "converged": found.converged,
    }
