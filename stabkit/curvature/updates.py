"""What the next update of a torch optimizer does on a mode of given curvature, read from its settings and its state."""

from __future__ import annotations

import copy
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.errors import ArgumentError, ArgumentTypeError
from stabkit.integrators import GeneralLinearMethod, optimizers
from stabkit.tracing.recording.sharding import whole

Group = Mapping[str, Any]
State = Mapping[Any, Any]
_YOUNG = 32  # updates
# A monitor asks for the same methods again and again, and each finds its intervals by exact arithmetic, once. Exact
# numbers and floats that equal them are told apart.
adam, heavy_ball, nadam, nesterov = (
    lru_cache(maxsize=64, typed=True)(build)
    for build in (optimizers.adam, optimizers.heavy_ball, optimizers.nadam, optimizers.nesterov)
)


class NoThresholdError(ArgumentError):
    """An optimizer has no threshold in curvature, or none yet.

    Args:
        why: says so.
        advice: what to do about it.
    """

    def __init__(self, why: str, advice: str) -> None:
        super().__init__(f"{why}{advice}")
        self.why = why


class NotYetError(NoThresholdError):
    """An optimizer has no threshold yet: its rate is 0, or it has made no update and has no preconditioner."""


@dataclass(frozen=True, eq=False)
class Update:
    """The next update of the parameters that an optimizer trains.

    Attributes:
        build: the method at a rate; what decoupled decay takes of the weights depends on it.
        rate: the rate of the group with the largest one.
        parameters: those that are trained, in the order of the optimizer.
        scales: for every one the diagonal of P, a tensor or a number; the rate of its group is in it, relative to
            `rate`.
        decays: for every one the coupled weight decay, which adds to the curvature.
        name: the class of the optimizer.
        ascends: whether it climbs (``maximize=True``), so that curvature is that of minus the loss.
        idle: of how many parameters there is no state, since they have had no gradient: nothing moves them, so that
            their P is infinite.
        young: whether it has a P of few gradients, less than 32 updates old.
        correction: of the first updates, by which the rate is multiplied.
        uncorrected: as ``build``, without that; None where it is no factor of the rate.
    """

    build: Callable[[float], GeneralLinearMethod]
    rate: float
    parameters: tuple[nn.Parameter, ...]
    scales: tuple[Tensor | float, ...]
    decays: tuple[float, ...]
    name: str
    ascends: bool = False
    idle: int = 0
    young: bool = False
    correction: float = 1.0
    uncorrected: Callable[[float], GeneralLinearMethod] | None = None

    @property
    def method(self) -> GeneralLinearMethod:
        """The method at the present rate."""
        return self.build(self.rate)

    @property
    def is_plain(self) -> bool:
        """Whether P is the identity and the weight decay one number, so that curvature is that of the loss alone."""
        return all(not isinstance(s, Tensor) and s == 1.0 for s in self.scales) and len(set(self.decays)) == 1

    def interval(self, rate: float) -> float:
        """The largest ``rate * curvature`` at which updates stay bounded."""
        if self.uncorrected is not None:  # is found once, where the corrections of early updates differ in every one
            return float(self.uncorrected(rate).real_interval()) / self.correction
        return float(self.build(rate).real_interval())


def plain_update(parameters: Iterable[nn.Parameter]) -> tuple[nn.Parameter, ...]:
    """The parameters that would be trained without an optimizer: those that require grad."""
    return tuple(p for p in parameters if p.requires_grad)


def trained_by(optimizer: Any, model: nn.Module) -> tuple[nn.Parameter, ...]:
    """The parameters that an optimizer trains, all of them the model's, in its order.

    Raises:
        ArgumentTypeError: it is no torch optimizer.
        ArgumentError: it trains other parameters, or none.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentTypeError(f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer or None")
    name = type(optimizer).__name__
    own = {id(p): path for path, p in model.named_parameters()}
    trained = tuple(p for g in optimizer.param_groups for p in plain_update(g["params"]))
    if not trained:
        raise ArgumentError(f"optimizer {name} trains no parameter that requires grad")
    foreign = sum(id(p) not in own for p in trained)
    if foreign:
        held = {id(p) for p in trained}
        left = [path for key, path in own.items() if key not in held]
        names = f", and not {', '.join(left[:4])}{' and others' * (len(left) > 4)} of the model" if left else ""
        raise ArgumentError(
            f"optimizer {name} trains {foreign} parameters that are not the model's (of {len(trained)}){names}: these "
            "never move; give the optimizer that was made with this model's parameters() after it was moved or "
            "wrapped, or after a layer of it was replaced"
        )
    return trained


def read_update(optimizer: Any, model: nn.Module, *, first: bool = False, state: State | None = None) -> Update:
    """How an optimizer moves the parameters of a model in its next update.

    Args:
        optimizer: SGD (momentum, dampening, Nesterov), Adam, AdamW, NAdam, Adamax, RMSprop or Adagrad of torch.
        model: whose parameters it trains.
        first: whether the preconditioner before the first update is that which this update will have, by the gradients
            that the parameters hold.
        state: what is read in place of the optimizer's state, such as a part of the entries of its tensors.

    Raises:
        ArgumentTypeError: it is no torch optimizer.
        ArgumentError: it trains other parameters, none, or groups with different momentum; or its update has no
            threshold in curvature.
        NotYetError: it has made no update and so has no preconditioner.
    """
    trained = trained_by(optimizer, model)
    name = type(optimizer).__name__
    groups = [g for g in optimizer.param_groups if any(p.requires_grad for p in g["params"])]
    kind = next((kind for kind in _READERS if isinstance(optimizer, kind)), None)
    if kind is None or not (_inherits(optimizer, kind) or _steps_as(optimizer, kind)):
        known = ", ".join(kind.__name__ for kind in _READERS)
        whose = "torch's own" if kind is None else f"updates that are those of {kind.__name__}, which its are not"
        raise NoThresholdError(
            f"no threshold in curvature is known for {name}",
            f"; known are {known} ({whose}). Leave optimizer= out for the curvature of the loss alone, or take "
            "stabkit.curvature.critical_rate, which asks any optimizer for its update",
        )
    reader = _READERS[kind]
    rates = [as_number(g["lr"]) for g in groups]
    rate = max(rates)
    if rate == 0.0:
        raise NotYetError(
            f"optimizer {name} has the learning rate 0, with which nothing moves",
            "; ask when a schedule has raised it, or leave optimizer= out for the curvature of the loss alone",
        )
    if not (math.isfinite(rate) and rate > 0):
        raise ArgumentError(f"optimizer {name} has the learning rate {rate}; at a rate that is positive it has a step")
    state = optimizer.state if state is None else state
    if first and not any(_has_moved(state, p) for p in trained) and any(p.grad is not None for p in trained):
        state = _FirstState(groups)
    begun = reader is not _sgd and any(p in state for p in trained)
    read = [reader(g, state, name) for g in groups]
    if len({r.kind for r in read}) > 1:
        raise ArgumentError(
            f"the groups of optimizer {name} differ in momentum or in how many updates they have had; no single "
            "stability region belongs to such updates. Give all groups the same betas and momentum"
        )
    if len({bool(g.get("maximize", False)) for g in groups}) > 1:
        raise ArgumentError(f"some groups of optimizer {name} maximize and others do not; their step is no descent")
    leading = read[0]
    # groups often differ in decay: that of the largest is taken, which makes the interval too small by at most rate
    # times decay in relative terms, 1e-4 or less at usual settings
    decay = max(as_number(g.get("weight_decay", 0)) if r.decoupled else 0.0 for g, r in zip(groups, read, strict=True))
    scales: list[Tensor | float] = []
    decays, idle = [], 0
    for group, of, own_rate in zip(groups, read, rates, strict=True):
        ratio = rate / own_rate if own_rate else math.inf
        for p in (p for p in group["params"] if p.requires_grad):
            still = begun and p.grad is None and not _has_moved(state, p)
            scale = math.inf if still else of.scale(p)
            idle += isinstance(scale, float) and math.isinf(scale)
            # a group that was thawed later is corrected more: the method has that of the leading one
            scales.append(scale * (ratio * of.slowing * leading.correction / of.correction))
            decays.append(0.0 if of.decoupled else as_number(group.get("weight_decay", 0)))
    return Update(
        build=lambda at: leading.build(at * decay),
        correction=leading.correction,
        uncorrected=None if leading.uncorrected is None else lambda at: leading.uncorrected(at * decay),  # type: ignore[misc]
        rate=rate,
        parameters=trained,
        scales=tuple(scales),
        decays=tuple(decays),
        name=name,
        ascends=bool(groups[0].get("maximize", False)),
        idle=idle,
        young=reader is not _sgd and max((_made(state, p) for p in trained), default=0.0) < _YOUNG,
    )


@dataclass(frozen=True, eq=False)
class _Read:
    """A group: how its update is built at a decay, what tells it from others, and P."""

    build: Callable[[float], GeneralLinearMethod]
    kind: tuple[Any, ...]
    scale: Callable[[nn.Parameter], Tensor | float]
    decoupled: bool = False
    slowing: float = 1.0  # what the rate is divided by, by now
    correction: float = 1.0  # of the first updates, by which the rate is multiplied
    uncorrected: Callable[[float], GeneralLinearMethod] | None = None  # as ``build``, without that


def as_number(value: Any) -> float:
    """A setting of an optimizer, which may be a tensor, as a float.

    Raises:
        ArgumentTypeError: it is no number.
    """
    if not isinstance(value, Tensor | int | float):
        raise ArgumentTypeError(
            f"a setting of the optimizer is a {type(value).__name__} ({value!r}); expected a number"
        )
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _state_of(state: State, p: nn.Parameter, key: str, name: str) -> Tensor:
    found: Tensor | None = state.get(p, {}).get(key)
    if found is None:
        raise NotYetError(
            f"optimizer {name} has made no update of a parameter of shape {tuple(p.shape)}, so that it has no "
            "preconditioner for it",
            "; ask after some updates, or leave optimizer= out",
        )
    return whole(found.detach()).double()


def _has_moved(state: State, p: nn.Parameter) -> bool:
    """Whether a parameter was updated; Adagrad gives all of them a state before that."""
    return _made(state, p) > 0


def _made(state: State, p: nn.Parameter) -> float:
    return as_number(state[p].get("step", 1)) if p in state and not isinstance(state, _FirstState) else 0.0


def _updates(state: State, group: Group, name: str) -> int:
    """How many updates were made, the same for all parameters of a group."""
    if isinstance(state, _FirstState):
        return 0
    made = [state[p]["step"] for p in group["params"] if p in state and "step" in state[p]]
    counts = {int(as_number(step)) for step in made}
    if not counts or max(counts) == 0:
        raise NotYetError(
            f"optimizer {name} has made no update, so that it has no preconditioner",
            "; ask after some updates, or leave optimizer= out for the curvature of the loss alone",
        )
    return max(counts)


class _FirstState(Mapping[Any, Any]):
    """What an optimizer keeps of the gradients at hand when it makes its first update, of parameters that have one."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = {p: group for group in groups for p in group["params"] if p.grad is not None}

    def __getitem__(self, p: Any) -> Mapping[str, Any]:
        group = self._groups[p]
        slope = whole((p.grad if p.grad.layout == torch.strided else p.grad.to_dense()).detach()).double()
        decay = 0.0 if _is_decoupled(group) else as_number(group.get("weight_decay", 0))
        if decay:
            slope = (-slope if group.get("maximize", False) else slope) + decay * whole(p.detach())
        part = 1 - as_number(group["betas"][1] if "betas" in group else group.get("alpha", 0.0))
        mean = part * slope.square()
        return {
            "exp_avg_sq": mean,
            "max_exp_avg_sq": mean,
            "square_avg": mean,
            "grad_avg": part * slope,
            "sum": slope.square() + as_number(group.get("initial_accumulator_value", 0.0)),
            "exp_inf": slope.abs() + as_number(group.get("eps", 0.0)),
            "mu_product": 1.0,
        }

    def __contains__(self, p: object) -> bool:
        return p in self._groups

    def __iter__(self) -> Iterator[Any]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)


def _is_decoupled(group: Group) -> bool:
    return bool(group.get("decoupled_weight_decay", False))


def _sgd(group: Group, _state: State, _name: str) -> _Read:
    b, d = as_number(group["momentum"]), as_number(group["dampening"])
    build = (lambda w: nesterov(b, w)) if group["nesterov"] and b else (lambda w: heavy_ball(b, d if b else 0.0, w))
    return _Read(build, (b, d if b else 0.0, bool(group["nesterov"])), lambda p: 1.0)


def _adam_like(group: Group, state: State, name: str) -> _Read:
    (b1, b2), made, eps = map(as_number, group["betas"]), _updates(state, group, name), as_number(group["eps"])
    amsgrad = bool(group.get("amsgrad", False))

    def scale(p: nn.Parameter) -> Tensor:
        v = _state_of(state, p, "max_exp_avg_sq" if amsgrad else "exp_avg_sq", name)
        return (v / (1 - b2 ** max(made, 1))).sqrt() + eps

    return _corrected(b1, made, scale, _is_decoupled(group))


def _nadam(group: Group, state: State, name: str) -> _Read:
    (b1, b2), made, eps = map(as_number, group["betas"]), _updates(state, group, name), as_number(group["eps"])
    psi, t = as_number(group["momentum_decay"]), made + 1
    now, then = (b1 * (1 - 0.5 * 0.96 ** (at * psi)) for at in (t, t + 1))
    past = as_number(next(state[p]["mu_product"] for p in group["params"] if p in state))
    own, moment = (1 - now) / (1 - past * now), then / (1 - past * now * then)

    def scale(p: nn.Parameter) -> Tensor:
        return (_state_of(state, p, "exp_avg_sq", name) / (1 - b2 ** max(made, 1))).sqrt() + eps

    return _Read(lambda w: nadam(b1, w, own, moment), (b1, made, psi), scale, _is_decoupled(group))


def _adamax(group: Group, state: State, name: str) -> _Read:
    (b1, _), made = map(as_number, group["betas"]), _updates(state, group, name)
    return _corrected(b1, made, lambda p: _state_of(state, p, "exp_inf", name))


def _corrected(b1: float, made: int, scale: Callable[[nn.Parameter], Tensor | float], decoupled: bool = False) -> _Read:
    """A group of Adam or its like, whose first moment is divided by what it lacks."""
    c = 1 / (1 - b1 ** (made + 1))
    uncorrected = partial(adam, b1)
    return _Read(lambda w: adam(b1, w, c), (b1,), scale, decoupled, correction=c, uncorrected=uncorrected)


def _rmsprop(group: Group, state: State, name: str) -> _Read:
    b, eps = as_number(group["momentum"]), as_number(group["eps"])

    def scale(p: nn.Parameter) -> Tensor:
        v = _state_of(state, p, "square_avg", name)
        if group["centered"]:
            v = v - _state_of(state, p, "grad_avg", name).square()
        return v.clamp_min(0.0).sqrt() + eps

    return _Read(lambda w: heavy_ball(b, 0.0, w), (b,), scale)


def _adagrad(group: Group, state: State, name: str) -> _Read:
    made = _updates(state, group, name)
    slowing = 1 + made * as_number(group["lr_decay"])
    return _Read(lambda w: heavy_ball(0, 0, w), (), lambda p: _state_of(state, p, "sum", name).sqrt()
                 + as_number(group["eps"]), slowing=slowing)  # fmt: skip


_READERS: dict[type[torch.optim.Optimizer], Callable[[Group, State, str], _Read]] = {  # a class before its base
    torch.optim.SGD: _sgd,
    torch.optim.AdamW: _adam_like,
    torch.optim.Adam: _adam_like,
    torch.optim.NAdam: _nadam,
    torch.optim.Adamax: _adamax,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
}


def _inherits(optimizer: torch.optim.Optimizer, kind: type[torch.optim.Optimizer]) -> bool:
    """Whether it makes its updates by the method of the class, below what torch wraps around it."""
    return inspect.unwrap(type(optimizer).step) is inspect.unwrap(kind.step)


def _steps_as(optimizer: torch.optim.Optimizer, kind: type[torch.optim.Optimizer]) -> bool:
    """Whether a class of one's own moves two numbers as the class that it derives from does, three times over."""
    moved = []
    for own in (True, False):
        stand_in = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        memo: dict[int, Any] = {id(p): stand_in for group in optimizer.param_groups for p in group["params"]}
        memo[id(optimizer.state)] = defaultdict(dict)
        try:
            twin = copied(optimizer, memo)
            twin.param_groups = [{**group, "params": [stand_in]} for group in twin.param_groups[:1]]
            if not own:
                twin.__class__ = kind
            for slope in ((3.0, 0.1), (-0.2, 0.1), (0.5, -4.0)):
                stand_in.grad = torch.tensor(slope, dtype=torch.float64)
                twin.step()
        except Exception:  # whatever a class of one's own raises: it is not known to be the same then
            return False
        moved.append(stand_in.detach())
    return torch.equal(*moved)


def copied(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    """A copy with all that it keeps; ``memo`` says, by `id`, what stands for what."""
    twin = copy.deepcopy(optimizer, memo)
    for name, value in vars(optimizer).items():  # what a class of one's own keeps beside the state
        if name not in vars(twin) and name not in ("step", "zero_grad"):
            setattr(twin, name, copy.deepcopy(value, memo))
    return twin


def flat(values: Sequence[Tensor | float], parameters: Sequence[nn.Parameter], like: Tensor) -> Tensor:
    """Numbers or tensors for parameters as one vector of the dtype and device of another."""
    vector = torch.empty_like(like)
    for place, value in zip(torch.split(vector, [p.numel() for p in parameters]), values, strict=True):
        place.copy_(value.reshape(-1)) if isinstance(value, Tensor) else place.fill_(value)
    return vector
