"""Products with the Hessian of a loss in the parameters of a model, never the matrix.

One forward pass and one backward pass that is kept on the graph; every product is then one backward pass through both,
H v = d/dtheta (g . v) (B. A. Pearlmutter, Neural Computation 6 (1994) 147). Where several batches make up the loss,
each product walks through all of them, and only one is held at a time.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from stabkit.curvature.batches import Batch, Batches
from stabkit.curvature.setting_aside import (
    Casting,
    random_states,
    refuse_unusable,
    set_aside,
    without_hooks,
)
from stabkit.curvature.summing import ALONE, Summing, agreed
from stabkit.errors import ArgumentError, TraceError
from stabkit.tracing.cutting.endpoints import scalar_loss
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.randomness import seeded
from stabkit.tracing.recording.sharding import take_whole
from stabkit.tracing.recording.untouched_model import WhenCalled, unchanged

_END = "torch::autograd::Error"  # the node that stands for what may not be differentiated again


@dataclass(eq=False)
class Gradient:
    """The gradient of a batch, on the graph.

    Attributes:
        batch: of what.
        loss: the scalar.
        output: what the model returned.
        parameters: those that were differentiated in, whole copies where ranks hold parts.
        parts: for every parameter its gradient; None where the loss does not depend on it, and for all of them once
            they were let go of: products need the graph alone.
        ends: for every parameter where its gradient leaves the graph; None where its derivative is zero.
        cotangents: of the tensors of the output that the loss reads, with the gradient of the loss in them, on the
            graph: what is linear in the gradient passes through them.
        way_back: what code of the model's own runs in.
    """

    batch: Batch
    loss: Tensor
    output: Any
    parameters: list[nn.Parameter]
    parts: list[Tensor | None]
    ends: list[GradientEdge | None]
    cotangents: list[tuple[Tensor, Tensor]]
    way_back: contextlib.AbstractContextManager[None]

    def product(self, vectors: Sequence[Tensor], places: Sequence[Tensor | None] = ()) -> list[Tensor | None]:
        """H v, None where it is zero.

        Args:
            vectors: v, one tensor for every parameter.
            places: what to write the parts to as they are made, so that they are never all there twice; the parts that
                come back are then these. None for a part that cannot be written so.

        Raises:
            TraceError: an operation has no second derivative.
        """
        return self.pulled(vectors, self.parameters, places)

    def pulled(
        self, vectors: Sequence[Tensor], along: Sequence[Tensor], places: Sequence[Tensor | None] = ()
    ) -> list[Tensor | None]:
        """The derivative of gradient times v in some tensors of the graph, None where it is zero."""
        there = [(end, v) for end, v in zip(self.ends, vectors, strict=True) if end is not None]
        if not there:
            return [None] * len(along)
        ends, weights = zip(*there, strict=True)
        try:
            with self.way_back, without_hooks(self.parameters), _written_to(along, places):
                return list(torch.autograd.grad(ends, along, weights, retain_graph=True, allow_unused=True))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _not_twice(error) from error


@contextlib.contextmanager
def _written_to(along: Sequence[Tensor], places: Sequence[Tensor | None]) -> Iterator[None]:
    def writing(place: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda part: place.copy_(part.detach())

    hooked: list[tuple[Any, Tensor]] = [(t, at) for t, at in zip(along, places, strict=False) if at is not None]
    handles = [t.register_hook(writing(place)) for t, place in hooked]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
        draws: whether the model draws random numbers as it runs, once a pass was made.
        attends: whether it asks for attention that has fused kernels, which have no second derivative.
        by_hand: the name of an ``autograd.Function`` of the user's in the pass, if there is one; ``hooks``: or a hook.
        casting: the regions of autocast that it was made in, in which the model runs.
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
        self.by_hand, self.draws, self.attends, self.hooks = "", False, False, False
        self.casting = Casting.active(self.device)
        self.value: float | None = None
        self._kept: Gradient | None = None
        self._looked = False

    def gradient(self) -> Tensor:
        """The gradient of the loss, ``(n,)``."""
        total = torch.zeros(self.n, dtype=self.dtype, device=self.device)
        self.add(total, self.slopes()[1], 1.0)
        return total

    def matvec(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """H v for a vector ``(n,)``, into ``out`` where it is given.

        Raises:
            TraceError: the loss cannot be differentiated twice.
        """
        total = torch.empty_like(v) if out is None else out
        vectors = self.split(v)
        self.n_products += 1
        if len(self.batches) == 1:
            self.each_gradient(lambda _, found: self._write(found, vectors, total))
            return total
        total.zero_()
        self.each_gradient(lambda weight, found: self.add(total, found.product(vectors), weight))
        return self.ranks.sum(total)

    def each_gradient(self, work: Callable[[float, Gradient], None]) -> None:
        """Do work with the part in the loss, and the gradient on the graph, of every batch of this rank.

        That of a single batch is kept.
        """
        if self._kept is not None:
            work(1.0, self._kept)
            return
        value = 0.0

        def passed(batch: Batch) -> None:
            nonlocal value
            found = self._passed(batch)
            value += batch.weight * float(found.loss.detach())
            if len(self.batches) == 1:
                self._kept = found
            work(batch.weight, found)

        self.each_batch(passed)
        if self.value is None:
            self.value = self.sum_of(value)

    def each_batch(self, work: Callable[[Batch], None]) -> None:
        """Do work, with one pass of the model, for every batch of this rank; what fails on one rank fails on all."""
        own = self.own_batches()
        for _ in range(-(-len(self.batches) // self.ranks.count)):
            with agreed(self.ranks):
                batch = next(own, None)
                if batch is not None:
                    work(batch)
                else:  # the others put whole copies in the place of spread parameters, all together
                    with unchanged(self.module):
                        take_whole(self.module)

    def own_batches(self) -> Iterator[Batch]:
        """The batches that this rank goes through."""
        return itertools.islice(self.batches, self.ranks.rank, None, self.ranks.count)

    def sum_of(self, number: float) -> float:
        """The sum of a number over all ranks."""
        return float(self.ranks.sum(torch.tensor(number, dtype=torch.float64)))

    def loss(self) -> float:
        """The loss where the parameters stand, by a forward pass."""
        total = 0.0

        def passed(batch: Batch) -> None:
            nonlocal total
            with self.running(batch, graph=False) as (_, value):
                total += batch.weight * float(torch.as_tensor(value).detach())

        self.each_batch(passed)
        return self.sum_of(total)

    def slopes(self) -> tuple[float, list[Tensor | None]]:
        """The loss where the parameters stand and its gradient, off the graph; None for what the loss does not reach.

        A gradient that is kept is used.
        """
        value, total = 0.0, torch.zeros(self.n, dtype=self.dtype, device=self.device)
        reached = torch.zeros(len(self.parameters))

        def passed(weight: float, loss: Tensor, parts: Sequence[Tensor | None]) -> None:
            nonlocal value
            value += weight * float(loss.detach())
            self.add(total, parts, weight)
            reached.add_(torch.tensor([float(part is not None) for part in parts]))

        def passed_anew(batch: Batch) -> None:
            with self.running(batch) as (_, loss):
                parts = self._gradient(loss, self._running_parameters())
            passed(batch.weight, loss, parts)

        if self._kept is not None and any(part is not None for part in self._kept.parts):
            passed(1.0, self._kept.loss, self._kept.parts)
        else:
            self.each_batch(passed_anew)
        value, seen = self.sum_of(value), self.ranks.sum(reached).tolist()
        parts = zip(self.split(self.ranks.sum(total)), seen, strict=True)
        return value, [part if count else None for part, count in parts]

    def random_direction(self, seed: int) -> Tensor:
        """A vector of norm 1 in a random direction, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.empty(self.n, dtype=torch.float32).uniform_(-1.0, 1.0, generator=generator)
        drawn = drawn.to(self.device, self.dtype)
        return drawn.div_(torch.linalg.vector_norm(drawn))

    def part(self, kept: Sequence[int]) -> Hessian:
        """The diagonal block of some of the parameters, by products that go no further than to these."""
        found = copy.copy(self)
        found.parameters, found._names = [self.parameters[i] for i in kept], [self._names[i] for i in kept]
        found.sizes = [p.numel() for p in found.parameters]
        found.n, found.n_products = sum(found.sizes), 0
        if (whole := self._kept) is not None:
            found._kept = replace(
                whole,
                parameters=[whole.parameters[i] for i in kept],
                parts=[whole.parts[i] for i in kept],
                ends=[whole.ends[i] for i in kept],
            )
        return found

    def release(self) -> None:
        """Let go of the graph."""
        self._kept = None

    def forget_values(self) -> None:
        """Let go of the gradient that is kept, as large as the model, and keep its graph, which products need."""
        if self._kept is not None:
            self._kept.parts = [None] * len(self.parameters)

    def split(self, v: Tensor) -> list[Tensor]:
        """A vector of all parameters as one tensor for each, in its dtype and on its device."""
        parts = torch.split(v, self.sizes)
        return [part.view(p.shape).to(p.device, p.dtype) for part, p in zip(parts, self.parameters, strict=True)]

    def add(self, total: Tensor, parts: Sequence[Tensor | None], weight: float) -> None:
        """Add tensors of the shapes of the parameters, times a number, to a vector of all."""
        for place, part in zip(torch.split(total, self.sizes), parts, strict=True):
            if part is not None:
                place.add_(part.detach().reshape(-1).to(total.device, total.dtype), alpha=weight)

    def _write(self, found: Gradient, vectors: Sequence[Tensor], total: Tensor) -> None:
        """The product into one vector of all parameters, part by part as they are made."""
        flat = torch.split(total, self.sizes)
        places = [
            place.view(p.shape) if (place.dtype, place.device) == (p.dtype, p.device) else None
            for place, p in zip(flat, found.parameters, strict=True)
        ]
        for place, part in zip(flat, found.product(vectors, places), strict=True):
            if part is None:
                place.zero_()
            elif part.data_ptr() != place.data_ptr():
                place.copy_(part.detach().reshape(-1))

    def _passed(self, batch: Batch) -> Gradient:
        with self.running(batch) as (output, loss):
            parameters = self._running_parameters()
            read = list({id(t): t for _, t in named_tensors(output) if t.grad_fn is not None}.values())
            found = list(self._gradient(loss, parameters, read))
        parts, given = found[: len(parameters)], found[len(parameters) :]
        if all(part is None for part in parts):
            raise ArgumentError(
                "the loss depends on none of the parameters that are to be moved; is it that of another model?"
            )
        if not self._looked:  # the graph is the same for every batch
            self.by_hand = _looked_through(loss, parts)
            self._looked = True
        ends = [get_gradient_edge(part) if part is not None and part.grad_fn else None for part in parts]
        cotangents = [(tensor, u) for tensor, u in zip(read, given, strict=True) if u is not None]
        way_back = WhenCalled(self.module) if self.by_hand or self.hooks else contextlib.nullcontext()
        return Gradient(batch, loss, output, parameters, parts, ends, cotangents, way_back)

    def _gradient(
        self, loss: Tensor, parameters: list[nn.Parameter], further: Sequence[Tensor] | None = None
    ) -> tuple[Tensor | None, ...]:
        """The gradient in the parameters; on the graph, with that in further tensors behind it, where there are any."""
        try:
            with without_hooks(parameters):
                parts: tuple[Tensor | None, ...] = torch.autograd.grad(
                    loss, [*parameters, *(further or ())], create_graph=further is not None, allow_unused=True
                )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _not_once(error) from error
        for name, part in zip(self._names, parts, strict=False):
            if part is not None and part.layout != torch.strided:
                raise TraceError(
                    f"the gradient of {name} is sparse, which has no second derivative; look it up with sparse=False"
                )
        return parts

    def _running_parameters(self) -> list[nn.Parameter]:
        held = dict(self.module.named_parameters(remove_duplicate=False))
        for name in self._names:
            if name not in held:
                raise TraceError(f"the model removes its parameter {name!r} as it runs; let it keep what it trains")
        return [held[name] for name in self._names]

    @contextlib.contextmanager
    def running(self, batch: Batch, *, graph: bool = True) -> Iterator[tuple[Any, Tensor]]:
        """The output and the loss of a batch, while the model is put aside; it comes back as it was.

        Args:
            batch: the batch.
            graph: whether they are wanted on the graph; without, any scalar is a loss.
        """
        given = (batch.inputs, batch.kwargs)
        with set_aside(self.module, batch.loss, batch.call, given=given) as (safe, seen):
            take_whole(self.module)
            for parameter in self._running_parameters():
                parameter.requires_grad_()
            seeded(self.seed)
            begun = random_states(self.device)
            with torch.set_grad_enabled(graph):
                with self.casting.on(), safe.watching():
                    output = batch.output(self.module)
                    value = scalar_loss(batch.loss, output) if graph else batch.value(output)
                safe.refuse_other_threads()
                self.draws = self.draws or not all(map(torch.equal, random_states(self.device), begun))
                self.attends, self.hooks = self.attends or seen.attends, self.hooks or seen.hooks
                yield output, value


def refuse_randomness(hessian: Hessian, *, keep: bool = False) -> None:
    """A loss that is not the same again has no curvature: passes here draw the same random numbers.

    Args:
        hessian: of the loss.
        keep: whether a gradient will be wanted on the graph; that of a single batch is then the second pass.

    Raises:
        ArgumentError: the loss differs from one pass to the next, or is not finite.
    """
    first = _off_the_graph(hessian)
    with agreed(hessian.ranks):
        if not bool(first.isfinite().all()):
            raise ArgumentError(
                f"the loss is not finite ({float(first.sum())}) where the weights are, so that it has no "
                "curvature; see that the batch has samples, and that the weights and what the loss reads are finite"
            )
    if keep and len(hessian.batches) == 1:
        kept: list[Tensor] = []
        hessian.each_gradient(lambda _, found: kept.append(found.loss))
        if torch.equal(first, kept[0].detach().double().cpu().reshape(first.shape)):
            return
    again = _off_the_graph(hessian)  # on the graph other kernels may have run, which round differently
    with agreed(hessian.ranks):
        if not torch.equal(first, again):
            raise ArgumentError(
                f"the loss was {float(first):.9g} and then {float(again):.9g} for the same weights and random "
                "seed; give a loss that draws no new batches or masks: take them before, and close over them"
            )


def _off_the_graph(hessian: Hessian) -> Tensor:
    """The loss of one batch, which shows it: the first of this rank, or of all."""
    with agreed(hessian.ranks):
        batch = next(hessian.own_batches(), None) or next(iter(hessian.batches))
        with torch.no_grad(), hessian.running(batch, graph=False) as (_, loss):
            return torch.as_tensor(loss).detach().double().cpu()


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
    message = " ".join(str(error).split())[:300].rstrip(".")
    return TraceError(
        f"the loss cannot be differentiated twice, which curvature needs: {message}. Replace the operation by one with "
        "a second derivative (of attention, the math backend is used already)"
    )
