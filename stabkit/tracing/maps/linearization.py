"""The derivative of a step function at given states, many states at once, without tracing each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.errors import TraceError
from stabkit.tracing.cutting.samples import Layout
from stabkit.tracing.graph.values import Meta
from stabkit.tracing.products.step_products import Space
from stabkit.tracing.recording.transparency import transparent

Tensors = tuple[Tensor, ...]
_SLACK = 1e4  # multiple of the rounding unit by which another batch size or kernel may change a step
_TRUSTED = 1e3  # multiple of the rounding unit by which the two sides of <w, J u> = <J^T w, u> may differ


@dataclass(frozen=True)
class StepFunction:
    """A map from a state, and what drives it at that time, to the next state.

    Attributes:
        call: state and driving tensors to the next state.
        axes: which dimension of each state tensor counts samples; None when the whole batch is one state.
    """

    call: Callable[[Tensors, Tensors], Tensors]
    axes: tuple[int | None, ...]

    def apply(self, state: Tensors, drive: Tensors) -> Tensors:
        """The next state.

        Raises:
            TraceError: the call failed, with the shapes that it was given.
        """
        try:
            return self.call(state, drive)
        except TraceError:
            raise
        except Exception as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (*state, *drive))
            raise TraceError(
                f"step_fn failed on tensors of shape {shapes}: {type(error).__name__}: {error}. It is called on any "
                "number of samples at once, (samples, ...): several times and copies are put into one batch"
            ) from error

    @property
    def joins(self) -> bool:
        """Whether several states can be put into one batch."""
        return None not in self.axes

    def space(self, state: Tensors) -> Space:
        """Flat coordinates of a state."""
        metas = [Meta(tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in state]
        sizes = zip(state, self.axes, strict=True)
        return Space(metas, [Layout(1, None) if a is None else Layout(t.shape[a], a) for t, a in sizes])

    def joined(self, states: Sequence[Tensors]) -> Tensors:
        """Several states as one batch, one after the other."""
        if len(states) == 1:
            return states[0]
        parts = zip(zip(*states, strict=True), self.axes, strict=True)
        return tuple(torch.cat(tensors, dim=axis or 0) for tensors, axis in parts)

    def record(self, state: Tensors, drive: Tensors, expected: Tensors | None = None) -> tuple[Tensors, Tensors]:
        """The state as leaves, and the next state on the graph above them.

        Raises:
            TraceError: the next state carries no derivative, or is not what it was before.
        """
        with torch.inference_mode(False), transparent():
            leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in state)
            after = self.apply(tuple(leaf.view_as(leaf) for leaf in leaves), drive)
        if not any(tensor.requires_grad for tensor in after):
            raise TraceError(
                "the next state does not depend differentiably on the state: step_fn detaches it, runs under no_grad "
                "or computes outside torch"
            )
        if expected is not None:
            _refuse_difference(after, expected)
        return leaves, after


def _refuse_difference(found: Tensors, expected: Tensors) -> None:
    for a, b in zip(found, expected, strict=True):
        difference, scale = (a.detach() - b).abs().max(), b.abs().max()
        if bool(difference > _SLACK * torch.finfo(a.dtype).eps * scale):
            raise TraceError(
                f"step_fn gave another result when it was called again at the same state (off by "
                f"{float(difference):.1e}): it draws random numbers, counts its calls or depends on how many samples "
                "there are. Draw noise beforehand and give it as inputs=; put modules in eval mode"
            )


def jacobians(function: StepFunction, states: Sequence[Tensors], drive: Tensors) -> Tensor:
    """The Jacobians ``(steps, batch, n, n)`` of the steps between consecutive states, in the dtype of the state.

    Time is put into the batch: a row of every Jacobian is pulled back through all steps at once.

    Args:
        function: the step.
        states: one more than there are steps.
        drive: what drives the steps, each tensor ``(steps, batch, ...)``.
    """
    steps = len(states) - 1
    if steps > 1 and not function.joins:
        each = [jacobians(function, states[i : i + 2], tuple(part[i : i + 1] for part in drive)) for i in range(steps)]
        return torch.cat(each)
    flat = tuple(part.flatten(0, 1) for part in drive)
    leaves, after = function.record(function.joined(states[:-1]), flat, function.joined(states[1:]))
    space = function.space(leaves)
    J = torch.empty(space.batch, space.size, space.size, dtype=space.dtype, device=space.device)
    unit = torch.zeros(space.batch, space.size, 1, dtype=space.dtype, device=space.device)
    for row in range(space.size):
        unit[:, row] = 1
        J[:, row] = space.flatten(pulled(leaves, after, space.unflatten(unit)))[..., 0]
        unit[:, row] = 0
    return J.reshape(steps, -1, space.size, space.size)


def pulled(leaves: Tensors, after: Tensors, stacked: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """One cotangent, stacked as ``(1, *shape)``, pulled back; the graph is kept."""
    pairs = [(tensor, part[0]) for tensor, part in zip(after, stacked, strict=True) if tensor.requires_grad]
    try:
        grads = torch.autograd.grad(
            [tensor for tensor, _ in pairs],
            leaves,
            [part for _, part in pairs],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _no_way_back(error) from error
    return [
        (torch.zeros_like(leaf) if grad is None else grad).unsqueeze(0)
        for leaf, grad in zip(leaves, grads, strict=True)
    ]


def _no_way_back(error: RuntimeError) -> TraceError:
    if "modified by an inplace operation" in str(error):
        return TraceError(
            "the step writes the weights that it was differentiated with each time it runs, by clamping or "
            "renormalising them: apply that change beforehand"
        )
    return TraceError(f"the derivative of the step failed: {' '.join(str(error).split())[:300]}")


class RecordedStep:
    """Products with the Jacobian of one step at one state, for blocks of up to ``copies`` vectors in one pass.

    The step is recorded on so many copies of the state, put side by side in its batch.

    Args:
        function: the step.
        before: the state.
        drive: what drives the step.
        after: the next state, to compare with.
        copies: how many vectors are multiplied at once.
    """

    def __init__(self, function: StepFunction, before: Tensors, drive: Tensors, after: Tensors, copies: int) -> None:
        self.copies = copies if function.joins else 1
        many = (function.joined([state] * self.copies) for state in (before, after))
        drive = tuple(part.repeat(self.copies, *[1] * (part.dim() - 1)) for part in drive)
        self._leaves, self._after = function.record(next(many), drive, next(many))
        self._space = function.space(self._leaves)
        self._transposed: tuple[list[Tensor], list[Tensor]] | None = None

    def pull(self, columns: Tensor) -> Tensor:
        """J^T U: ``(batch, n, k) -> (batch, n, k)``."""
        return self._blocks(columns, self._pull_copies)

    def push(self, columns: Tensor) -> Tensor:
        """J V: ``(batch, n, k) -> (batch, n, k)``, as the derivative of J^T U with respect to U.

        Raises:
            TraceError: some operation of the step has no second derivative.
        """
        return self._blocks(columns, self._push_copies)

    def _blocks(self, columns: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        batch, size, wanted = columns.shape
        blocks = []
        for block in torch.split(columns, self.copies, dim=2):
            width = block.shape[2]
            if width < self.copies:
                block = torch.cat([block, block.new_zeros(batch, size, self.copies - width)], dim=2)
            side_by_side = block.permute(2, 0, 1).reshape(-1, size, 1)
            result = product(side_by_side).reshape(self.copies, batch, size).permute(1, 2, 0)
            blocks.append(result[..., :width])
        return torch.cat(blocks, dim=2) if wanted > self.copies else blocks[0]

    def _pull_copies(self, columns: Tensor) -> Tensor:
        return self._space.flatten(pulled(self._leaves, self._after, self._space.unflatten(columns)))

    def _push_copies(self, columns: Tensor) -> Tensor:
        if self._transposed is None:
            zeros = self._space.unflatten(torch.zeros_like(columns))
            seeds = [part.detach().clone().requires_grad_() for part in zeros]
            with torch.enable_grad():
                self._transposed = seeds, pulled(self._leaves, self._after, seeds, create_graph=True)
        seeds, back = self._transposed
        pairs = [
            (grad, part) for grad, part in zip(back, self._space.unflatten(columns), strict=True) if grad.requires_grad
        ]
        pushed = torch.autograd.grad(
            [grad for grad, _ in pairs], seeds, [part for _, part in pairs], retain_graph=True, allow_unused=True
        )
        return self._space.flatten(
            [torch.zeros_like(s) if p is None else p for s, p in zip(seeds, pushed, strict=True)]
        )

    def certify(self, batch: int) -> None:
        """Hold J V against J^T U on a random pair.

        Raises:
            TraceError: they are not each other's transposes, so some operation has a wrong second derivative.
        """
        generator = torch.Generator().manual_seed(0)
        shape = (batch, self._space.size, 1)
        u, w = (torch.randn(shape, generator=generator).to(self._space.device, self._space.dtype) for _ in range(2))
        try:
            ju = self.push(u)
        except RuntimeError as error:
            raise TraceError(f"J V of this step is not available ({error}); use direction='adjoint'") from error
        jw = self.pull(w)
        left, right = (w * ju).sum(1), (u * jw).sum(1)
        scale = torch.maximum(w.norm(dim=1) * ju.norm(dim=1), u.norm(dim=1) * jw.norm(dim=1))
        if bool(((left - right).abs() > _TRUSTED * torch.finfo(left.dtype).eps * scale).any()):
            raise TraceError(
                "J V and J^T U of this step are not each other's transposes: an operation of step_fn has a wrong "
                "second derivative; use direction='adjoint'"
            )
