"""What to change, computed: which weight by which factor, which bias, where a norm goes, which damping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from stabkit.diagnosis.finding import Action
from stabkit.diagnosis.inputs.sizes import Sizes

if TYPE_CHECKING:
    from stabkit.diagnosis.blocks.weight_faults import WeightFault
    from stabkit.diagnosis.blocks.weights import Weight
    from stabkit.diagnosis.measurement import StepMeasurement

_SATURATED = 0.3  # mean share of saturated outputs from which growth is that of large pre-activations
_LOW = 0.5  # mean of a bias, over its size and below zero, from which it can switch units off


@dataclass(frozen=True)
class Remedy:
    """A remedy in words and as data.

    Attributes:
        text: for people.
        actions: for `stabkit.diagnosis.apply`.
        cause: what lies before the blocks that show the fault, in words; empty where it is they that are changed.
        place: the module that a cause is in.
        within: makes what the model's code runs in while a change of it is tried.
        data: the inputs that are divided by their size while it is tried; None for none.
    """

    text: str
    actions: tuple[Action, ...] = ()
    cause: str = ""
    place: str = ""
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    data: Sizes | None = None


def scale(parameter: str, by: float) -> Action:
    """Multiply a parameter."""
    return {"action": "scale", "parameter": parameter, "factor": by}


def shift(parameter: str, by: float) -> Action:
    """Add a number to every entry of a parameter."""
    return {"action": "shift", "parameter": parameter, "amount": by}


def clip(parameter: str, low: float, high: float) -> Action:
    """Bring every entry of a parameter within a range."""
    return {"action": "clip", "parameter": parameter, "low": low, "high": high}


def redraw(parameter: str, rms: float) -> Action:
    """Draw a parameter anew, normal with this root mean square."""
    return {"action": "redraw", "parameter": parameter, "rms": rms}


def for_block(
    step: StepMeasurement,
    kind: str,
    weights: Sequence[WeightFault],
    size: float,
    branches: Sequence[tuple[str, float]] = (),
) -> Remedy:
    """The remedy of one block: bring its weights to the size of the peers, or else its last matrices.

    Args:
        step: the block.
        kind: the kind of the finding.
        weights: those far from their peers.
        size: deviation of the block, nats.
        branches: where its branches at fault end, with the deviation of each.
    """
    if weights:
        return to_peers(weights)
    low = low_biases(step)
    if low and kind == "dead":
        return lift(low)
    factors = {path: math.exp(-far) for module, far in branches if (path := last_matrix(step, module)) is not None}
    last = last_matrix(step)
    if not factors and last is not None and math.isfinite(size):
        factors = {last: math.exp(-size)}
    if not factors:
        return Remedy(f"look into {step.module_path or step.name}: compare its code and settings with its peers'")
    texts = " and ".join(f"{path} and its bias by {by:.3g}" for path, by in factors.items())
    text = f"take out what scales the block, or multiply {texts}, which brings it to its peers"
    biases = {w.module_path: w.path for w in step.weights if w.kind == "bias"}
    owned = {path: [path, biases.get(path.rpartition(".")[0])] for path in factors}
    return Remedy(text, tuple(scale(p, factors[path]) for path, paths in owned.items() for p in paths if p is not None))


def to_peers(weights: Sequence[WeightFault]) -> Remedy:
    """Every weight brought to the size that it has in the peers."""
    actions: list[Action] = []
    texts = []
    for found in weights:
        path, far = found.weight.path, found.deviation
        if far.value == -math.inf:
            rms = math.exp(far.typical) / found.weight.unit
            texts.append(f"draw {path} anew with standard deviation {rms:.3g}, as in its peers")
            actions.append(redraw(path, rms))
        else:
            by = math.exp(-far.size)
            texts.append(f"multiply {path} by {by:.3g}")
            actions.append(scale(path, by))
    return Remedy("; ".join(texts), tuple(actions))


def low_biases(step: StepMeasurement) -> list[Weight]:
    """Biases of which nearly all entries push their units below zero, by more than weights of size 1 bring back."""
    biases = [weight for weight in step.weights if weight.kind == "bias"]
    return [b for b in biases if b.mean < -_LOW and b.mean < -_LOW * math.exp(min(b.gains[0], 50.0))]


def lift(biases: Sequence[Weight]) -> Remedy:
    """Biases set back to zero."""
    text = "; ".join(f"set {bias.path} to zero (its mean is {bias.mean:.3g})" for bias in biases)
    return Remedy(text, tuple(fill(bias.path, 0.0) for bias in biases))


def last_matrix(step: StepMeasurement, module: str | None = None) -> str | None:
    """Path of the last matrix of a step, or of one of its modules: it scales the branch, whatever lies before it."""
    held = [weight for weight in step.weights if weight.kind == "matrix"]
    matrices = [weight.path for weight in held if module is None or weight.module_path == module]
    return matrices[-1] if matrices else None


def fill(parameter: str, value: float, part: tuple[int, int] | None = None) -> Action:
    """Set every entry of a parameter, or those from one index of its first axis up to another."""
    span = {} if part is None else {"start": part[0], "stop": part[1]}
    return {"action": "fill", "parameter": parameter, "value": value, **span}


def add_skip(module: str, through: str | None = None) -> Action:
    """Replace a module f, or all from it through a later one of the same Sequential, by x + f(x)."""
    alone = through is None or through == module
    return {"action": "add_skip", "module": module} | ({} if alone else {"through": through})


def scale_input(module: str, by: float) -> Action:
    """Multiply what a module is given."""
    return {"action": "scale_input", "module": module, "factor": by}


def activate(module: str, by: str) -> Action:
    """Put another activation of torch in the place of one."""
    return {"action": "activate", "module": module, "by": by}


def activate_after(module: str, by: str) -> Action:
    """Put an activation of torch behind a module."""
    return {"action": "activate_after", "module": module, "by": by}


def fourier_features(module: str, frequency: float) -> Action:
    """Give a linear layer sines and cosines of its inputs beside these, of normal frequencies of this size."""
    return {"action": "fourier_features", "module": module, "frequency": frequency}


def insert_norm(module: str, like: str) -> Action:
    """Put a fresh copy of another module's norm in the place of a module."""
    return {"action": "insert_norm", "module": module, "like": like}


def orthogonalise(parameter: str, gain: float, blocks: int = 1) -> Action:
    """Replace a matrix, or each of the blocks that it stacks, by this multiple of the nearest orthogonal one."""
    stacked = {"blocks": blocks} if blocks > 1 else {}
    return {"action": "orthogonalise", "parameter": parameter, "gain": gain, **stacked}


def reset_statistics(module: str) -> Action:
    """Forget the running statistics of a batch norm; the batches seen next in training mode are averaged."""
    return {"action": "reset_statistics", "module": module}


def set_option(module: str, option: str, value: bool | float) -> Action:
    """Give an option of a module another value, such as ``norm_first`` or ``num_groups``."""
    return {"action": "set_option", "module": module, "option": option, "value": value}


def convert(dtype: str) -> Action:
    """Run the model in another dtype."""
    return {"action": "convert", "dtype": dtype}


def branch_matrices(steps: Sequence[StepMeasurement]) -> list[tuple[str, float]]:
    """The last matrix of every branch, with the gain of the branch in nats."""
    found = []
    for step in steps:
        for merge in step.merges:
            inside = [w for w in step.weights if w.kind == "matrix" and w.module_path == merge.module_path]
            if inside and math.isfinite(merge.gain):
                found.append((inside[-1].path, merge.gain))
    return found


def branches_beside(steps: Sequence[StepMeasurement], every: Sequence[StepMeasurement]) -> list[str]:
    """The last matrices of branches outside a stretch that have the role of those inside.

    A block at an end of a stretch changes the space where a longer skip begins or ends, and is no step of the stretch.
    What is done to every block is done to it as well: left as it is, it would be the one unlike its peers.
    """
    inside = {path for path, _ in branch_matrices(steps)}
    roles = {w.role for step in steps for w in step.weights if w.path in inside}
    outside = [step for step in every if all(step is not other for other in steps)]
    held = {w.path: w.role for step in outside for w in step.weights}
    return [path for path, _ in branch_matrices(outside) if path not in inside and held[path] in roles]


def branch_factor(gains: Sequence[float], budget: float) -> float:
    """The s for which branches of these gains, scaled by s, grow a random gradient by ``budget`` nats in all.

    Solves sum 1/2 log(1 + s^2 exp(2 gain)) = budget by bisection.
    """
    low, high = 0.0, 1.0

    def total(s: float) -> float:
        return sum(0.5 * math.log1p(s * s * math.exp(2 * min(gain, 300.0))) for gain in gains)

    if total(high) <= budget:
        return 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= budget else (low, middle)
    return low


def for_passing(
    steps: Sequence[StepMeasurement], total: float, growth: float, stable: float, beside: Sequence[str] = ()
) -> Remedy:
    """What takes away growth that does not last: branches that are scaled, or matrices made normal.

    A multiple of an orthogonal matrix amplifies nothing that it does not keep, so a plain stretch of such has the
    growth of the whole and no more on the way.
    """
    if 2 * sum(bool(step.merges) for step in steps) >= len(steps):
        return for_stretch(steps, growth, stable, beside=beside)
    paths = list(dict.fromkeys(path for path in (last_matrix(step) for step in steps) if path is not None))
    gain = math.exp(total / max(len(paths), 1))
    text = (
        f"make the weights of these {len(paths)} layers normal: {gain:.3g} times an orthogonal matrix has the same "
        "growth over the whole and none on the way"
    )
    return Remedy(text, tuple(orthogonalise(path, gain) for path in paths))


def _on_the_skip(steps: Sequence[StepMeasurement]) -> str:
    """What to do about a skip that loses gradient, by what there is in the steps."""
    there = {"norms": any(step.norms for step in steps), "activations": any(step.activities for step in steps)}
    found = [name for name, present in there.items() if present]
    number = "multiply the old state by a number nearer to 1"
    return f"{number}, and move {' and '.join(found)} that follow an addition into its branch" if found else number


def preactivation_scale(saturated: float) -> float:
    """Standard deviation of normal pre-activations of which this share has a tanh' below 1/20 (beyond 2.18)."""
    inside = min(max(1.0 - saturated, 1e-3), 1.0 - 1e-9)
    return 2.178 / NormalDist().inv_cdf(0.5 + inside / 2)


def for_stretch(
    steps: Sequence[StepMeasurement],
    growth: float,
    stable: float,
    tied: Mapping[str, float] | None = None,
    beside: Sequence[str] = (),
) -> Remedy:
    """What brings a stretch of steps back to a growth near zero.

    Residual stretches: the branches are scaled so that they grow a gradient by no more than half of what counts as
    stable. Plain ones: the last matrix of every layer is scaled by what a layer grows too much, or so that its
    pre-activations are of size 1 where most are saturated. ``tied`` are the matrices that every step uses, with the log
    of their gain, where steps do not tell their own; ``beside`` are the last matrices of like branches outside.
    """
    branches = branch_matrices(steps)
    if len(branches) >= len(steps) / 2 and branches:
        by = branch_factor([gain for _, gain in branches], stable / 2)
        if by < 0.999:
            text = (
                f"scale the branches: multiply the last matrix of each by {by:.2g} (1/sqrt(depth) would be "
                f"{len(branches) ** -0.5:.2g}), or start it at zero; or damp the skip: (1 - lambda) x + f(x)"
            )
            paths = [*(path for path, _ in branches), *beside]
            return Remedy(text, tuple(scale(path, by) for path in paths))
        return Remedy(f"the skip itself loses gradient: {_on_the_skip(steps)}")
    uses = [path for path in (last_matrix(step) for step in steps) if path is not None] or list(tied or {}) * len(steps)
    layers = list(dict.fromkeys(uses))
    if not math.isfinite(growth):
        return Remedy("none was computed: no factor brings back what is lost altogether")
    if not layers:
        by = math.exp(-growth / max(len(steps), 1))
        return Remedy(f"every step changes the gradient by {1 / by:.3g}: scale what it multiplies by about {by:.3g}")
    by = math.exp(-growth / len(uses))
    shares = [a.saturated for step in steps for a in step.activities if a.saturated > 0.0 and not a.gate]
    if growth > 0 and shares and sum(shares) / len(shares) > _SATURATED:
        by = min(by, 1.0 / preactivation_scale(sum(shares) / len(shares)))
    if growth > 0 and tied:
        by = min(by, math.exp(-max(tied.values())))
    what = (
        f"the weights of each of these {len(layers)} layers" if len(layers) > 1 else f"{layers[0]}, used at every step,"
    )
    text = f"multiply {what} by about {by:.3g} (an initialisation of gain 1), or give them a skip: x + f(x)"
    return Remedy(text, tuple(scale(path, by) for path in layers))
