"""What one block does to cotangents, measured while its weights are there."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.identification import identify
from stabkit.jacobians import Jacobian, singular_values
from stabkit.streaming.profile import Method
from stabkit.streaming.stack import Block
from stabkit.streaming.weights import StreamedWeights
from stabkit.tracing import Flow, trace
from stabkit.walk import Observer, Passage, probe_seeds, random_columns, walk_back


@dataclass(frozen=True)
class BlockSettings:
    """What the results of a block depend on beside its weights and its input.

    Attributes:
        first: number of the first probe.
        probes: how many, from that one on; none when there are more ranks than probes.
        k: singular values.
        tol: the tolerance of these singular values.
        max_products: that they may take.
        seed: the seed of the first of all probes and of the start vectors.
    """

    first: int
    probes: int
    k: int
    tol: float
    max_products: int
    seed: int


class _Source(Observer):
    """Keeps what comes back to the first state."""

    def passed(self, passage: Passage, pulled: Tensor | None) -> None:
        self.cotangents = passage.leaving


def measure_block(
    block: Block,
    weights: StreamedWeights,
    state: Tensor,
    cotangents: Tensor | None,
    powers: Tensor | None,
    settings: BlockSettings,
) -> dict[str, Tensor]:
    """What one block does to the cotangents of the state after it, and its singular values."""
    with weights.present(block.module.modules()):
        flow = trace(block.step(), state, depth=["module"], seed=settings.seed)
        batch, probes, end = flow.batch, settings.probes, flow.states[-1]
        if cotangents is None or powers is None:
            seeds = probe_seeds(settings.seed, probes, settings.first)
            cotangents, powers = random_columns(flow, seeds), torch.zeros(batch, probes, dtype=torch.float64)
        # two fresh cotangents go along, whose mean growth is that of the Frobenius norm
        generator = torch.Generator().manual_seed(settings.seed + block.index)
        fresh = torch.randn(batch, end.size, 2, generator=generator, dtype=torch.float64)
        columns = torch.cat([cotangents.to(end.space.device), fresh.to(end.space.device, end.space.dtype)], 2)
        source = _Source()
        walk = walk_back(
            flow, columns, observers=[source], powers=torch.cat([powers, torch.zeros(batch, 2, dtype=torch.float64)], 1)
        )
        before, after = walk.log_norms[0], walk.log_norms[-1]
        leaving = source.cotangents
        found = {
            # laid out as it is read back, so that a resumed run adds alike
            "cotangents": leaving.columns[..., :probes].cpu().contiguous(),
            "powers": leaving.powers[:, :probes].contiguous(),
            "log_after": after[:, :probes],
            "log_before": before[:, :probes],
            "state_before": torch.linalg.vector_norm(flow.states[0].flatten().double(), dim=1),
            "state_after": torch.linalg.vector_norm(end.flatten().double(), dim=1),
            "gain": 0.5 * (torch.logsumexp(2 * before[:, probes:], 1) - torch.logsumexp(2 * after[:, probes:], 1)),
            "chain_error": torch.tensor([flow.chain_error if flow.chain_error is not None else math.nan]),
            "method": _as_tensor(_method(flow)),
        }
        if settings.k:
            found.update(_singular(flow.jacobian(), settings))
        for step in flow.steps:
            step.segment.release()
        return found


def _method(flow: Flow) -> Method:
    """What the block is as a whole; in words of its parts where it was cut in several."""
    found = identify(flow, checks=False)
    first = found[0]
    if len(found) == 1:
        return Method(first.name, first.skip, first.evidence, first.residual)
    return Method(", ".join(one.name for one in found), None, "unknown", None)


def _as_tensor(method: Method) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(vars(method)).encode()), dtype=torch.uint8)


def as_method(tensor: Tensor) -> Method:
    """The method that was kept as a tensor of bytes."""
    return Method(**json.loads(bytes(tensor.numpy().tobytes())))


def _singular(J: Jacobian, settings: BlockSettings) -> dict[str, Tensor]:
    k = min(settings.k, *J.shape[1:])
    found = singular_values(
        J, k, tol=settings.tol, max_products=settings.max_products, seed=settings.seed, method="golub-kahan"
    )
    return {
        "singular_values": found.values,
        "residuals": found.residuals,
        "converged": found.converged,
    }
