"""Gradient norms across depth, with the samples and the probes shared out over ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabkit.arguments import accepts
from stabkit.distributed.ranks import Ranks, current
from stabkit.errors import TraceError
from stabkit.growth import GradientProfile
from stabkit.growth import gradient_profile as profile_of
from stabkit.hashing import content_key, has_entries
from stabkit.parallel import runs
from stabkit.tracing import Flow, trace
from stabkit.tracing.cutting.boundaries import Depth
from stabkit.tracing.cutting.endpoints import Target, scalar_loss
from stabkit.tracing.cutting.samples import Layout
from stabkit.tracing.graph.values import meta_of
from stabkit.tracing.recording.batch_parts import Call
from stabkit.tracing.recording.containers import map_tensors, named_tensors
from stabkit.tracing.recording.sharding import is_tensor_parallel, whole_parameters
from stabkit.tracing.recording.wrappers import modules_behind, unwrap
from stabkit.walk import PROBE

_ENTRIES = 64  # of every parameter, evenly spread, that are compared


@dataclass(frozen=True)
class Part:
    """The samples and the probes of one rank.

    Attributes:
        samples: first sample, and the one after the last.
        probes: first probe, and the one after the last.
    """

    samples: tuple[int, int]
    probes: tuple[int, int]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return self.samples[0] == self.samples[1] or self.probes[0] == self.probes[1]


def parts(samples: int, probes: int, ranks: int) -> tuple[Part, ...]:
    """What each rank does: samples are shared out first, since each brings its own memory; then probes.

    Example:
        >>> [(p.samples, p.probes) for p in parts(3, 4, 2)]
        [((0, 2), (0, 4)), ((2, 3), (0, 4))]
        >>> [(p.samples, p.probes) for p in parts(1, 4, 2)]
        [((0, 1), (0, 2)), ((0, 1), (2, 4))]
    """
    groups = max(n for n in range(1, ranks + 1) if ranks % n == 0 and n <= samples)
    rows, columns = runs(samples, groups), runs(probes, ranks // groups)
    return tuple(Part(row, column) for row in rows for column in columns)


@accepts
def gradient_profile(
    model: Any,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    depth: Depth = "auto",
    batch_dim: int | None = 0,
    source: str | None = None,
    target: Target = None,
    memory: str = "keep",
    probes: int = 1,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> GradientProfile:
    """The profile of the whole batch, on every rank; each records and pulls back its own samples and probes only.

    Every rank makes this call with the same model and the whole batch. Random cotangents are drawn for the whole batch
    and cut, a loss is differentiated on the outputs of all samples: the result is that of one process, to rounding.
    A model in training mode draws its own random numbers, or lets samples meet in its norms; then, and where samples
    influence each other otherwise, only probes are shared.

    Args:
        model: a module, or a function of tensors; the same weights on every rank.
        *inputs: what it is called with, all samples.
        loss: a callable on the model's output for the whole batch; None pulls back random cotangents.
        kwargs: keyword arguments of the call.
        depth: where steps end, see ``stabkit.trace``.
        batch_dim: which dimension counts samples; None makes the whole batch one state.
        source: the input to start from.
        target: the output to end at.
        memory: ``"keep"`` or ``"recompute"``, see ``stabkit.trace``.
        probes: how many random cotangents, when there is no loss.
        seed: the seed of the first cotangent.
        ranks: who takes part; by default all ranks of the process group that runs.

    Returns:
        What ``stabkit.gradient_profile`` returns; the gradients of parameters are not measured.

    Raises:
        RankError: a rank failed or is gone.
        TraceError: the model cannot be traced, or an argument makes no sense.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4, bias=False) for _ in range(3)]).eval()
        >>> for layer in model: _ = torch.nn.init.eye_(layer.weight).data.mul_(0.5)
        >>> gradient_profile(model, torch.ones(2, 4)).log_growth.shape
        torch.Size([3, 2])
    """
    if loss is not None and probes > 1:
        raise TraceError(f"probes={probes} with a loss; a loss has one gradient, so leave one of them out")
    ranks = current() if ranks is None else ranks
    model = unwrap(model)
    call = Call(inputs, dict(kwargs or {}), batch_dim)
    options = {"depth": depth, "source": source, "target": target, "memory": memory}
    work = _Work(model, call, loss, probes, seed, options, ranks)
    if is_tensor_parallel(model):  # every product is collective: all ranks do all of them together
        return dataclasses.replace(work, ranks=Ranks()).best()
    with whole_parameters(model):
        return work.best()


@dataclass(frozen=True)
class _Work:
    model: Any
    call: Call
    loss: Callable[[Any], Tensor] | None
    probes: int
    seed: int
    options: Mapping[str, Any]
    ranks: Ranks

    def best(self) -> GradientProfile:
        """With the samples shared out where that gives the same result, else the probes alone."""
        if not any(module.training for module in modules_behind(self.model).modules()):
            found = self.run(parts(self.call.samples, self.probes, self.ranks.count))
            if found is not None:
                return found
        whole = self.run(parts(1, self.probes, self.ranks.count), whole=True)
        if whole is None:
            raise TraceError("the samples could not be kept apart")  # a whole batch has no parts
        return whole

    def run(self, shares: tuple[Part, ...], *, whole: bool = False) -> GradientProfile | None:
        """Every rank does its part; None where samples turn out to influence each other, or cotangents end midway."""
        samples = self.call.samples
        if whole:
            shares = tuple(Part((0, samples), share.probes) for share in shares)
        mine = shares[self.ranks.rank]
        flow = self.ranks.together(lambda: self._flow(mine.samples))
        layouts = self.ranks.together(lambda: self._layouts(flow, mine))
        apart = all(self.ranks.gather(layouts is not None))
        if not (apart or whole):
            return None
        given = None
        if self.loss is not None:
            given = self._loss_cotangent(flow, mine, shares)
        done = self.ranks.together(lambda: None if mine.empty else self._profile(flow, mine, layouts or (), given))
        found = [profile for profile in self.ranks.gather(done) if profile is not None]
        if not whole and any(profile.restarts for profile in found):
            return None  # fresh cotangents were drawn for a part of the batch
        filled = [share for share in shares if not share.empty]
        return _put_together(found, filled, samples if apart else 1)

    def _flow(self, samples: tuple[int, int]) -> Flow:
        part = self.call.part(*samples)
        return trace(
            self.model,
            *part.inputs,
            kwargs=part.kwargs,
            batch_dim=self.call.batch_dim,
            seed=self.seed,
            **self.options,
        )

    def _layouts(self, flow: Flow, mine: Part) -> tuple[Layout, ...] | None:
        """Where samples lie in the last state; None where they influence each other.

        A single sample is traced once more beside a neighbour: alone it shows neither.
        """
        low, high = mine.samples
        if self.call.batch_dim is None:
            return None
        if high - low == 1 and self.call.samples > 1:
            low, high = (low - 1, high) if low else (low, high + 1)
            flow = self._flow((low, high))
        return flow.states[-1].layouts if flow.batch == high - low else None

    def _loss_cotangent(self, flow: Flow, mine: Part, shares: tuple[Part, ...]) -> list[Tensor]:
        """The part of the loss gradient that belongs to the samples of this rank, at the last state of their flow.

        The outputs of all ranks are put together on every one of them, and the loss is differentiated there.
        """
        if self.loss is None or mine.samples == (0, self.call.samples):
            return flow.cotangent(self.loss)
        low, high = mine.samples
        dim = self.call.batch_dim or 0
        here = [(path, tensor) for path, tensor in named_tensors(flow.output) if tensor.requires_grad]
        ragged = [path or "output" for path, tensor in here if tensor.dim() <= dim or tensor.shape[dim] != high - low]
        told = self.ranks.gather(([tensor.detach().cpu() for _, tensor in here], ragged))
        if any(bad for _, bad in told):
            raise TraceError(
                f"the outputs {', '.join(ragged)} do not hold one entry per sample along dimension {dim}, so they "
                "cannot be put together from several ranks: leave them out of what the model returns"
            )
        holders = [rank for rank, share in enumerate(shares) if share.probes[0] == 0]
        whole = [torch.cat(pieces, dim) for pieces in zip(*(told[rank][0] for rank in holders), strict=True)]
        leaves = [piece.to(tensor.device).requires_grad_() for piece, (_, tensor) in zip(whole, here, strict=True)]
        places = {id(tensor): leaf for (_, tensor), leaf in zip(here, leaves, strict=True)}
        scalar = scalar_loss(self.loss, map_tensors(flow.output, lambda tensor: places.get(id(tensor), tensor)))
        gradients = torch.autograd.grad(scalar, leaves, allow_unused=True)
        used = [
            (tensor, gradient.narrow(dim, low, high - low))
            for (_, tensor), gradient in zip(here, gradients, strict=True)
            if gradient is not None
        ]
        return flow.cotangent(lambda _: torch.stack([(part.conj() * tensor).real.sum() for tensor, part in used]).sum())

    def _profile(
        self, flow: Flow, mine: Part, layouts: tuple[Layout, ...], given: list[Tensor] | None
    ) -> GradientProfile:
        part = _PartOfBatch(
            **{field.name: getattr(flow, field.name) for field in dataclasses.fields(flow)},
            samples=mine.samples,
            whole_batch=self.call.samples,
            sample_layouts=layouts,
            given=given,
        )
        first, last = mine.probes
        return profile_of(
            part,
            self.loss,
            probes=last - first,
            parameters=False,
            seed=self.seed + PROBE * first,
        )


@dataclass(frozen=True, eq=False, repr=False)
class _PartOfBatch(Flow):
    """A flow of some of the samples, whose cotangents are those of the whole batch."""

    samples: tuple[int, int]
    whole_batch: int
    sample_layouts: tuple[Layout, ...]
    given: list[Tensor] | None

    def cotangent(self, loss: Any = None, *, seed: int = 0) -> list[Tensor]:
        """The part of the whole batch's cotangent that belongs to these samples."""
        if loss is not None and self.given is not None:
            return self.given
        state, (low, high) = self.states[-1], self.samples
        if high - low == self.whole_batch:
            return super().cotangent(loss, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        tensors = []
        for value, layout in zip(state.values, self.sample_layouts, strict=True):
            shape, dtype, device = meta_of(value)
            axis = layout.axis or 0
            whole = (*shape[:axis], shape[axis] // (high - low) * self.whole_batch, *shape[axis + 1 :])
            drawn = torch.randn(whole, generator=generator, dtype=torch.float64)
            if dtype.is_complex:
                drawn = torch.complex(drawn, torch.randn(whole, generator=generator, dtype=torch.float64))
            columns = dataclasses.replace(layout, batch=self.whole_batch).columns(drawn, whole)[low:high]
            tensors.append(dataclasses.replace(layout, batch=high - low).tensor(columns, shape).to(device, dtype))
        return tensors


def _put_together(found: list[GradientProfile], shares: list[Part], samples: int) -> GradientProfile:
    """One profile from those of the parts, in the order of samples and probes whoever measured them."""
    order = sorted(range(len(shares)), key=lambda i: (shares[i].samples, shares[i].probes))
    groups: dict[tuple[int, int], list[GradientProfile]] = {}
    for index in order:
        groups.setdefault(shares[index].samples, []).append(found[index])
    rows = list(groups.values())
    growth = torch.cat([torch.cat([p.all_log_growth for p in row]) for row in rows], dim=2)
    count = len(growth)
    logs = torch.cat(
        [torch.stack([p.log_gradient_norms * len(p.all_log_growth) for p in row]).sum(0) / count for row in rows], dim=1
    )
    first = found[order[0]]
    below = first.below
    if below is not None:
        small = [row[0].below or {} for row in rows]
        below = {name: torch.cat([share[name] for share in small], dim=1) for name in below}
    return GradientProfile(
        gradient_norms=logs.exp(),
        log_gradient_norms=logs,
        state_norms=torch.cat([row[0].state_norms for row in rows], dim=1),
        log_growth=growth.mean(0),
        restarts=tuple(sorted({index for p in found for index in p.restarts})),
        loss=f"{count} standard normal cotangents" if count > 1 else first.loss,
        seed=first.seed,
        batch=samples,
        all_log_growth=growth,
        below=below,
        parameters=None,
        notes=first.notes,
    )


def fingerprint(model: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """A hash of a call: the input, names and shapes of the parameters, and some entries of each that is whole here.

    Example:
        >>> import torch
        >>> one, two = (torch.nn.Linear(2, 2) for _ in range(2))
        >>> fingerprint(one, (torch.ones(1, 2),), {}) == fingerprint(one, (torch.ones(1, 2),), {})
        True
        >>> fingerprint(one, (torch.ones(1, 2),), {}) == fingerprint(two, (torch.ones(1, 2),), {})
        False
    """
    parameters = {
        name: (tuple(parameter.shape), _some_entries(parameter))
        for name, parameter in modules_behind(model).named_parameters()
    }
    return content_key(dict(named_tensors([inputs, dict(kwargs)])), parameters)


def _some_entries(parameter: Tensor) -> Tensor:
    """Evenly spread ones; the parameter itself where they do not all lie here."""
    if not has_entries(parameter):
        return parameter
    return parameter.detach().reshape(-1)[:: max(1, parameter.numel() // _ENTRIES)]
