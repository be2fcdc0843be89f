"""Products with the Hessian of a loss in the parameters of a model, never the matrix.

One forward pass and one backward pass that is kept on the graph; every product is then one backward pass through both,
H v = d/dtheta (g . v) (B. A. Pearlmutter, Neural Computation 6 (1994) 147). Where several batches make up the loss,
each product walks through all of them, and only one is held at a time.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from stabkit.curvature.batches import Batch, Batches
from stabkit.curvature.setting_aside import refuse_unusable, seed_everything, set_aside, without_hooks
from stabkit.errors import ArgumentError, TraceError
from stabkit.tracing.cutting.endpoints import scalar_loss
from stabkit.tracing.recording.sharding import take_whole
from stabkit.tracing.recording.transparency import transparent
from stabkit.tracing.recording.untouched_model import unchanged

_END = "torch::autograd::Error"  # the node that stands for what may not be differentiated again


class Summing(Protocol):
    """Several processes that share the batches, or this one alone."""

    @property
    def rank(self) -> int:
        """The number of this process."""

    @property
    def count(self) -> int:
        """How many there are."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all of them, in its place; every one must ask for it."""


@dataclass(frozen=True)
class _Alone:
    rank: int = 0
    count: int = 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


ALONE = _Alone()


@dataclass(eq=False)
class Gradient:
    """The gradient of a batch, on the graph.

    Attributes:
        batch: of what.
        loss: the scalar.
        output: what the model returned.
        parameters: those that were differentiated in, whole copies where ranks hold parts.
        parts: for every parameter its gradient; None where the loss does not depend on it.
    """

    batch: Batch
    loss: Tensor
    output: Any
    parameters: list[nn.Parameter]
    parts: list[Tensor | None]

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor | None]:
        """H v, None where it is zero.

        Raises:
            TraceError: an operation has no second derivative.
        """
        there = [(part, v) for part, v in zip(self.parts, vectors, strict=True) if part is not None and part.grad_fn]
        if not there:
            return [None] * len(self.parameters)
        outputs, weights = zip(*there, strict=True)
        try:
            with without_hooks(self.parameters):
                return list(
                    torch.autograd.grad(outputs, self.parameters, weights, retain_graph=True, allow_unused=True)
                )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _not_twice(error) from error


class Hessian:
    """The Hessian of a mean loss over batches, by products, as a symmetric map of vectors of all parameters.

    Args:
        module: the model.
        parameters: in which the loss is differentiated; one vector holds them all, one after the other.
        batches: what the loss is taken over.
        seed: of what the model draws, the same for every product.
        ranks: who shares the batches; each rank goes through every so-manyth one, and sums are taken over all ranks.

    Attributes:
        n: how many parameters there are.
        dtype: of the vectors, the widest of the parameters and at least float32.
        device: of the vectors.
        n_products: how many were made.
        value: the loss, once a pass was made.
        by_hand: the name of an ``autograd.Function`` of the user's in the pass, if there is one.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        batches: Batches | Sequence[Batch],
        seed: int,
        ranks: Summing = ALONE,
    ) -> None:
        self.ranks = ranks if len(batches) > 1 else ALONE  # one batch is the same on all
        refuse_unusable(parameters)
        self.module, self.parameters, self.batches, self.seed = module, list(parameters), batches, seed
        names = {id(p): name for name, p in module.named_parameters()}
        self._names = [names[id(p)] for p in self.parameters]
        self.sizes = [p.numel() for p in self.parameters]
        self.n = sum(self.sizes)
        self.device = self.parameters[0].device
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in self.parameters) else torch.float32
        self.n_products = 0
        self.by_hand = ""
        self.value: float | None = None
        self._kept: Gradient | None = None
        self._looked = False

    def gradient(self) -> Tensor:
        """The gradient of the loss, ``(n,)``."""
        total = torch.zeros(self.n, dtype=self.dtype, device=self.device)
        for weight, found in self.gradients():
            self.add(total, found.parts, weight)
        return self.ranks.sum(total)

    def matvec(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """H v for a vector ``(n,)``, into ``out`` where it is given.

        Raises:
            TraceError: the loss cannot be differentiated twice.
        """
        total = torch.empty_like(v) if out is None else out
        vectors = self.split(v)
        self.n_products += 1
        if len(self.batches) == 1:
            ((_, found),) = self.gradients()
            return self._joined(found.product(vectors), total)
        total.zero_()
        for weight, found in self.gradients():
            self.add(total, found.product(vectors), weight)
        return self.ranks.sum(total)

    def gradients(self) -> Iterator[tuple[float, Gradient]]:
        """The part in the loss, and the gradient on the graph, of every batch of this rank; a single one is kept."""
        if self._kept is not None:
            yield 1.0, self._kept
            return
        value = 0.0
        for batch in self.own_batches():
            found = self._passed(batch)
            value += batch.weight * float(found.loss.detach())
            if len(self.batches) == 1:
                self._kept = found
            yield batch.weight, found
        if self.value is None:
            self.value = float(self.ranks.sum(torch.tensor(value, dtype=torch.float64)))

    def own_batches(self) -> Iterator[Batch]:
        """The batches that this rank goes through."""
        return itertools.islice(self.batches, self.ranks.rank, None, self.ranks.count)

    def loss(self) -> float:
        """The loss where the parameters stand, by a forward pass."""
        total = 0.0
        for batch in self.own_batches():
            with self.running(batch, graph=False) as (_, value):
                total += batch.weight * float(torch.as_tensor(value).detach())
        return float(self.ranks.sum(torch.tensor(total, dtype=torch.float64)))

    def slopes(self) -> tuple[float, list[Tensor | None]]:
        """The loss where the parameters stand and its gradient, off the graph; None for what the loss does not reach.

        A gradient that is kept is used.
        """
        value, total = 0.0, torch.zeros(self.n, dtype=self.dtype, device=self.device)
        reached = torch.zeros(len(self.parameters))
        for weight, loss, parts in self._slopes():
            value += weight * loss
            self.add(total, parts, weight)
            reached += torch.tensor([float(part is not None) for part in parts])
        value, total = float(self.ranks.sum(torch.tensor(value, dtype=torch.float64))), self.ranks.sum(total)
        seen = self.ranks.sum(reached).tolist()
        return value, [part if count else None for part, count in zip(self.split(total), seen, strict=True)]

    def _slopes(self) -> Iterator[tuple[float, float, Sequence[Tensor | None]]]:
        if self._kept is not None:
            yield 1.0, float(self._kept.loss.detach()), self._kept.parts
            return
        for batch in self.own_batches():
            with self.running(batch) as (_, loss):
                parts = self._gradient(loss, self._running_parameters())
            yield batch.weight, float(loss.detach()), parts

    def random_direction(self, seed: int) -> Tensor:
        """A vector of norm 1 in a random direction, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.n, generator=generator, dtype=torch.float32).to(self.device, self.dtype)
        return drawn.div_(torch.linalg.vector_norm(drawn))

    def release(self) -> None:
        """Let go of the graph."""
        self._kept = None

    def split(self, v: Tensor) -> list[Tensor]:
        """A vector of all parameters as one tensor for each, in its dtype and on its device."""
        parts = torch.split(v, self.sizes)
        return [part.view(p.shape).to(p.device, p.dtype) for part, p in zip(parts, self.parameters, strict=True)]

    def add(self, total: Tensor, parts: Sequence[Tensor | None], weight: float) -> None:
        """Add tensors of the shapes of the parameters, times a number, to a vector of all."""
        for place, part in zip(torch.split(total, self.sizes), parts, strict=True):
            if part is not None:
                place.add_(part.detach().reshape(-1).to(total.device, total.dtype), alpha=weight)

    def _joined(self, parts: Sequence[Tensor | None], total: Tensor) -> Tensor:
        """One vector of parts, in a single pass over memory; zero where there is none."""
        there = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, self.parameters, strict=True)]
        flat = [g.detach().reshape(-1).to(total.device, total.dtype) for g in there]
        return torch.cat(flat, out=total)

    def _passed(self, batch: Batch) -> Gradient:
        with self.running(batch) as (output, loss):
            parameters = self._running_parameters()
            parts = self._gradient(loss, parameters, create_graph=True)
        if not self._looked:  # the graph is the same for every batch
            self.by_hand = _looked_through(loss, parts)
            self._looked = True
        return Gradient(batch, loss, output, parameters, list(parts))

    def _gradient(
        self, loss: Tensor, parameters: list[nn.Parameter], *, create_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        try:
            with without_hooks(parameters):
                parts: tuple[Tensor | None, ...] = torch.autograd.grad(
                    loss, parameters, create_graph=create_graph, allow_unused=True
                )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _not_once(error) from error
        for name, part in zip(self._names, parts, strict=True):
            if part is not None and part.layout != torch.strided:
                raise TraceError(
                    f"the gradient of {name} is sparse, which has no second derivative; look it up with sparse=False"
                )
        return parts

    def _running_parameters(self) -> list[nn.Parameter]:
        return [self.module.get_parameter(name) for name in self._names]

    @contextlib.contextmanager
    def running(self, batch: Batch, *, graph: bool = True) -> Iterator[tuple[Any, Tensor]]:
        """The output and the loss of a batch, while the model is put aside; it comes back as it was.

        Args:
            batch: the batch.
            graph: whether they are wanted on the graph; without, any scalar is a loss.
        """
        with torch.inference_mode(False), unchanged(self.module) as safe, transparent(), set_aside(self.module):
            safe.copy_buffers()
            take_whole(self.module)
            for parameter in self._running_parameters():
                parameter.requires_grad_()
            seed_everything(self.seed)
            with torch.set_grad_enabled(graph):
                output = batch.output(self.module)
                yield output, scalar_loss(batch.loss, output) if graph else batch.value(output)


@dataclass(eq=False)
class Preconditioned:
    """P^-1/2 (H + W) P^-1/2 with diagonal P and W: symmetric, with the eigenvalues of P^-1 (H + W).

    Attributes:
        hessian: H.
        roots: ``(n,)``, P^-1/2; None for the identity.
        shift: ``(n,)`` or a number, W.
    """

    hessian: Hessian
    roots: Tensor | None = None
    shift: Tensor | float = 0.0
    _scratch: Tensor | None = field(default=None, repr=False)

    def matvec(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """The product with a vector ``(n,)``."""
        inner = v if self.roots is None else self._scaled(v)
        total = self.hessian.matvec(inner, out)
        if isinstance(self.shift, Tensor) or self.shift:
            total.addcmul_(inner, torch.as_tensor(self.shift, dtype=total.dtype, device=total.device))
        return total if self.roots is None else total.mul_(self.roots)

    def _scaled(self, v: Tensor) -> Tensor:
        if self._scratch is None:
            self._scratch = torch.empty_like(v)
        assert self.roots is not None
        return torch.mul(v, self.roots, out=self._scratch)


def refuse_randomness(hessian: Hessian) -> None:
    """A loss that is not the same again has no curvature: both passes below draw the same random numbers.

    Raises:
        ArgumentError: the loss differs from one pass to the next.
    """
    for batch in hessian.own_batches():
        values = []
        for _ in range(2):
            with torch.no_grad(), hessian.running(batch, graph=False) as (_, loss):
                values.append(torch.as_tensor(loss).detach().double().cpu())
        if not torch.equal(values[0], values[1]) and not bool((values[0] - values[1]).abs().max().isnan()):
            raise ArgumentError(
                f"the loss was {float(values[0]):.9g} and then {float(values[1]):.9g} for the same weights and random "
                "seed; give a loss that draws no new batches or masks: take them before, and close over them"
            )
        break  # one batch shows it


def _not_once(error: RuntimeError) -> TraceError:
    message = " ".join(str(error).split())[:300]
    if "second time" in message or "have already been freed" in message:
        return TraceError("the loss comes with its graph freed; return it without backward() having been called")
    return TraceError(f"the loss cannot be differentiated in the parameters: {message}")


_BY_HAND: Any = torch.autograd.function.BackwardCFunction


def _looked_through(loss: Tensor, parts: Sequence[Tensor | None]) -> str:
    """The name of a backward that was written by hand, if there is one.

    One that is once_differentiable ends the graph of the gradient: what lies behind would count as zero.
    """
    seen: set[Node] = set()
    ends = (loss, *(part for part in parts if part is not None))
    stack = [tensor.grad_fn for tensor in ends if tensor.grad_fn is not None]
    by_hand = ""
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == _END:
            raise _not_twice("a custom autograd.Function has a backward that is marked once_differentiable")
        if isinstance(node, _BY_HAND):
            by_hand = node.name().removesuffix("Backward")
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return by_hand


def _not_twice(error: RuntimeError | str) -> TraceError:
    message = " ".join(str(error).split())[:300]
    return TraceError(
        f"the loss cannot be differentiated twice, which curvature needs: {message}. Replace the operation by one with "
        "a second derivative (of attention, the math backend is used already)"
    )
