"""Expected statistics pushed through the operations of a recorded forward pass, and squared gradients pulled back.

Every rule is a theorem of mean field theory for fresh, centred weights. An operation without one ends the expectation:
its results are NaN, and so is what follows until the next measured state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd.graph import Node

from stabkit.errors import ArgumentError
from stabkit.meanfield.activations import Activation, of_facts
from stabkit.meanfield.closed_forms import Moment
from stabkit.meanfield.gaussian import Array, Function, mean
from stabkit.meanfield.maps import product_moment
from stabkit.meanfield.weights import LINEAR, LayerStatistics, LinearLayer, UnknownError, WeightTable
from stabkit.tracing import Step
from stabkit.tracing.graph.graph import Element
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of
from stabkit.tracing.products.node_derivatives import signed
from stabkit.vocabulary import ActivationFacts, NormFacts, activation_of, is_python_node, moves, norm_of

# entries change places, and nothing else
_MOVES = moves("reshape", "permute", "copy")
_EVEN = 1e-3  # spread of a factor over units up to which a Gaussian stays one


@dataclass(frozen=True)
class Moments:
    """Expected statistics of one value, per sample and per pair of samples.

    Attributes:
        pairs: ``(pairs, 2)``, the samples that are compared.
        q: ``(batch,)``, mean square of the units.
        mean: ``(batch,)``, mean of the units.
        k: ``(pairs,)``, mean product of the units of two samples.
        gaussian: whether the units are Gaussian with mean zero, over the weights.
        sources: the weights (and measured states) that the value depends on linearly; values that share none are
            uncorrelated.
    """

    pairs: NDArray[np.int64]
    q: Array
    mean: Array
    k: Array
    gaussian: bool = False
    sources: frozenset[object] = frozenset()

    def unknown(self) -> Moments:
        """The same without numbers."""
        return Moments(self.pairs, self.q * np.nan, self.mean * np.nan, self.k * np.nan)

    def across(self, first: Array, second: Array) -> Array:
        """Products of one number per sample over the pairs, both ways, halved."""
        a, b = self.pairs[:, 0], self.pairs[:, 1]
        return np.asarray(first[a] * second[b] + first[b] * second[a]) / 2


@dataclass(frozen=True)
class Energy:
    """Expected sum of squares of a gradient, per sample, and the variance over weights of its log."""

    total: Array
    variance: float


class Propagation:
    """Expected statistics of every value of a flow, step by step.

    Args:
        weights: the parameters of the model.
        batch: samples.
    """

    def __init__(self, weights: WeightTable, batch: int) -> None:
        self.weights, self.batch = weights, batch
        self.moments: dict[Value, Moments] = {}
        self.layers: dict[Node, LinearLayer] = {}
        self.activations: dict[Node, Activation] = {}
        self.reasons: dict[int, str] = {}
        self._unknown: set[Node] = set()
        self._absorbed: dict[Node, Value] = {}
        self._hidden: set[Node] = set()
        self._whole: dict[Node, Element] = {}
        self._seen: set[int] = set()
        self.shared: set[int] = set()

    def forward(self, step: Step) -> None:
        """Push the moments of the step's source, which are known, to its target."""
        self._find_rms_norms(step)
        self._find_composites(step)
        for node in step.segment.nodes:
            inputs = list(step.segment.graph.inputs[node])
            for value in outputs_of(node):
                try:
                    found = self._rule(node, inputs)
                except UnknownError as error:
                    self.reasons.setdefault(step.index, f"{operation(node)}: {error}")
                    self._unknown.add(node)
                    found = self.moments[inputs[0]].unknown()
                self.moments[value] = found

    def backward(self, step: Step, energies: dict[Value, Energy]) -> dict[Value, Energy]:
        """Pull the energies of the target's gradients back to the source."""
        energies = dict(energies)
        for node in reversed(step.segment.nodes):
            given = energies.pop(Value(node, 0), None)
            if given is None or node in self._hidden:
                continue
            inputs = list(step.segment.graph.inputs[node])
            for value, energy in zip(*self._pulled(node, inputs, given), strict=True):
                energies[value] = _joined(energies[value], energy, self._size(value)) if value in energies else energy
        return {value: energies[value] for value in step.source.values if value in energies}

    def statistics(self, step: Step) -> list[LayerStatistics]:
        """Of the linear layers in a step."""
        return [self.layers[node].statistics for node in step.segment.nodes if node in self.layers]

    def names(self, step: Step) -> list[str]:
        """Of the activations in a step."""
        return [self.activations[node].name for node in step.segment.nodes if node in self.activations]

    def _size(self, value: Value) -> int:
        return meta_of(value).numel // self.batch

    def _rule(self, node: Node, inputs: Sequence[Value]) -> Moments:
        name = operation(node)
        given = [self.moments[value] for value in inputs]
        if node in self._hidden:
            return given[0].unknown()
        if node in self._absorbed:
            return _normalised(self.moments[self._absorbed[node]], centred=False)
        if node in self._whole:
            return self._composite(self._whole[node])
        if name in LINEAR:
            return self._linear(node, inputs, given[0])
        if name in _MOVES and len(inputs) == 1:
            return given[0]
        facts = activation_of(node)
        if facts is not None:
            return self._activated(node, of_facts(facts), given[0])
        if name in ("Add", "Sub"):
            return _sum(node, given, -1.0 if name == "Sub" else 1.0)
        if name in ("Mul", "Div", "Neg") and len(inputs) == 1:
            return _scaled(given[0], _factor(node))
        norm = _norm_of_samples(node)
        if norm is not None:
            weight, bias = self.weights.affine(node)
            return _affine_moments(_normalised(given[0], centred=norm.centred is True), weight, bias)
        if name == "NativeBatchNorm":
            return _batch_normalised(node, given[0], *self.weights.affine(node))
        raise UnknownError("no mean field rule for this operation")

    def _composite(self, whole: Element) -> Moments:
        """The statistics after a call of a module that is an activation or a norm."""
        given = self.moments[whole.source]
        if isinstance(whole.facts, ActivationFacts):
            try:
                phi = of_facts(whole.facts)
            except ArgumentError as error:
                raise UnknownError(str(error)) from error
            return self._activated(whole.nodes[-1], phi, given)
        return _affine_moments(_normalised(given, centred=whole.facts.centred is True), *_affine(whole))

    def _linear(self, node: Node, inputs: Sequence[Value], given: Moments) -> Moments:
        if len(inputs) != 1:
            raise UnknownError("a product of two values that both depend on the input")
        layer = self.weights.layer(node, inputs[0], self.batch)
        self.layers[node] = layer
        if layer.token in self._seen:
            self.shared.add(layer.token)
        self._seen.add(layer.token)
        bias = layer.statistics.sigma_b_squared
        return replace(
            given,
            q=layer.gain * given.q + bias,
            mean=np.zeros_like(given.mean),
            k=layer.gain * given.k + bias,
            gaussian=True,
            sources=frozenset([layer.token]),
        )

    def _activated(self, node: Node, phi: Activation, given: Moments) -> Moments:
        self.activations[node] = phi
        if not given.gaussian:
            raise UnknownError("its input is not Gaussian: no random weights stand directly before it")
        first, second = given.q[given.pairs[:, 0]], given.q[given.pairs[:, 1]]
        products = [_pair(phi, float(a), float(b), float(k)) for a, b, k in zip(first, second, given.k, strict=True)]
        return replace(
            given,
            q=_each(phi, given.q, lambda h: phi.function(h) ** 2, phi.closed.square),
            mean=_each(phi, given.q, phi.function),
            k=np.array(products),
            gaussian=False,
        )

    def _pulled(self, node: Node, inputs: list[Value], given: Energy) -> tuple[list[Value], list[Energy]]:
        """The energies that a node passes to its inputs."""
        if node in self._absorbed:
            source = self._absorbed[node]
            width = meta_of(source).shape[-1]
            return [source], [replace(given, total=given.total * (1 - 1 / width) / self.moments[source].q)]
        whole = self._whole.get(node)
        inputs = inputs if whole is None else [whole.source]
        name, value = operation(node), inputs[0]
        moments = self.moments[value]
        if node in self._unknown:
            return inputs, [Energy(given.total * np.nan, np.nan) for _ in inputs]
        if node in self.layers:
            layer = self.layers[node]
            noise = 2 * layer.statistics.spread / layer.statistics.fan_in if layer.positions == 1 else np.nan
            return [value], [Energy(given.total * layer.gain, given.variance + noise)]
        if node in self.activations:
            phi = self.activations[node]
            second = _each(phi, moments.q, lambda h: phi.derivative(h) ** 2, phi.closed.slope_square)
            fourth = _each(phi, moments.q, lambda h: phi.derivative(h) ** 4)
            noise = float(np.mean(3 * (fourth / second**2 - 1))) / self._size(value)
            return [value], [Energy(given.total * second, given.variance + noise)]
        norm = _norm_of_samples(node) if whole is None else whole.facts
        if isinstance(norm, NormFacts):
            weight = self.weights.affine(node)[0] if whole is None else _affine(whole)[0]
            width = _norm_width(node) if whole is None else meta_of(value).shape[-1]
            spread, lost = (moments.q - moments.mean**2, 2) if norm.centred else (moments.q, 1)
            gain = float(weight.square().mean()) * (1 - lost / width) / spread
            return [value], [replace(given, total=given.total * gain)]
        if name == "NativeBatchNorm":
            return [value], [replace(given, total=given.total * _batch_norm_gain(node, self.weights.affine(node)[0]))]
        if name in ("Mul", "Div", "Neg"):
            return [value], [replace(given, total=given.total * float(_factor(node).square().mean()))]
        return inputs, [given for _ in inputs]

    def _find_composites(self, step: Step) -> None:
        """Find calls of modules that are activations, or norms over features, as a whole."""
        inside = set(step.segment.nodes)
        for whole in dict.fromkeys(step.segment.graph.composites.get(node) for node in step.segment.nodes):
            if whole is None or not inside.issuperset(whole.nodes) or self._absorbed.keys() & set(whole.nodes):
                continue
            if isinstance(whole.facts, ActivationFacts) or whole.facts.over == ("features",):
                self._whole[whole.target.node] = whole
                self._hidden.update(set(whole.nodes) - {whole.target.node})

    def _find_rms_norms(self, step: Step) -> None:
        """Find products x * rsqrt(mean(x^2) + eps), as which most builds of torch record an RMS norm."""
        inputs = step.segment.graph.inputs
        inside = set(step.segment.nodes)
        for node in step.segment.nodes:
            if operation(node) != "Mul" or len(set(inputs[node])) != 2:
                continue
            for x, scale in (inputs[node], inputs[node][::-1]):
                chain: list[Node] = []
                value = scale
                for expected in ("Rsqrt", "Add", "Mean", "Pow"):
                    if value.node not in inside or operation(value.node) != expected or len(inputs[value.node]) != 1:
                        break
                    chain.append(value.node)
                    value = inputs[value.node][0]
                last_axis = len(chain) == 4 and _is_last_axis(chain[2], meta_of(value).shape)
                if last_axis and value == x and getattr(chain[3], "_saved_exponent", None) == 2:
                    self._absorbed[node] = x
                    self._hidden.update(chain)


def _is_last_axis(node: Node, shape: tuple[int, ...]) -> bool:
    axes: tuple[int, ...] = getattr(node, "_saved_dim", ())
    return len(axes) == 1 and signed(axes)[0] in (-1, len(shape) - 1)


def _each(phi: Activation, q: Array, f: Function, closed: Moment | None = None) -> Array:
    """The mean of a function at every variance; one quadrature for all of them where there is no closed form."""
    if not np.isfinite(q).all():
        return np.full_like(q, np.nan)
    return mean(f, q, phi.kinks)[0] if closed is None else np.array([closed(float(x)) for x in q])


def _pair(phi: Activation, first: float, second: float, k: float) -> float:
    if not np.isfinite([first, second, k]).all() or first <= 0 or second <= 0:
        return float("nan")
    c = float(np.clip(k / np.sqrt(first * second), -1, 1))
    return product_moment(phi, (first, second), c).value


def _sum(node: Node, given: list[Moments], sign: float) -> Moments:
    if len(given) != 2:
        raise UnknownError("adds a constant that is out of sight")
    first, second = given
    factor = float(getattr(node, "_saved_alpha", 1)) * sign
    if factor not in (1.0, -1.0):
        raise UnknownError("adds with a factor")
    if first.sources & second.sources:
        raise UnknownError("adds values that depend on the same weights")
    if np.isnan(first.q).any() or np.isnan(second.q).any():
        return first.unknown()
    return Moments(
        pairs=first.pairs,
        q=first.q + second.q + 2 * factor * first.mean * second.mean,
        mean=first.mean + factor * second.mean,
        k=first.k + second.k + 2 * factor * first.across(first.mean, second.mean),
        gaussian=first.gaussian and second.gaussian,
        sources=first.sources | second.sources,
    )


def _factor(node: Node) -> torch.Tensor:
    """The constant that a value is multiplied with."""
    name = operation(node)
    if name == "Neg":
        return -torch.ones(1, dtype=torch.float64)
    dependent = [parent is not None for parent, _ in node.next_functions]
    other: Any = getattr(node, "_saved_other" if dependent[0] else "_saved_self", None)
    if name == "Div" and not dependent[0]:
        raise UnknownError("divides by a value that depends on the input")
    if other is None:
        raise UnknownError("a factor out of sight")
    factor = torch.as_tensor(other).detach().double().cpu()
    whole = meta_of(Value(node, 0)).shape
    if factor.numel() > 1 and factor.dim() >= len(whole) and factor.shape[0] != 1:
        raise UnknownError("a factor that differs between samples")
    return 1 / factor if name == "Div" else factor


def _scaled(given: Moments, scale: torch.Tensor) -> Moments:
    uneven = scale.numel() > 1 and float(scale.std()) > _EVEN * float(scale.abs().mean())
    moved = _affine_moments(given, scale, torch.zeros(1, dtype=torch.float64))
    return replace(moved, gaussian=given.gaussian and not uneven)


def _affine_moments(given: Moments, scale: torch.Tensor, shift: torch.Tensor) -> Moments:
    """Statistics after every unit was multiplied and shifted by numbers of its own."""
    a, b = float(scale.mean()), float(shift.mean())
    aa, ab, bb = float(scale.square().mean()), float((scale * shift).mean()), float(shift.square().mean())
    return replace(
        given,
        q=aa * given.q + 2 * ab * given.mean + bb,
        mean=a * given.mean + b,
        k=aa * given.k + 2 * ab * given.across(given.mean, np.ones_like(given.mean)) + bb,
        gaussian=given.gaussian and bb <= _EVEN * aa,
    )


def _normalised(given: Moments, *, centred: bool) -> Moments:
    """Each sample divided by its deviation (layer norm) or its root mean square."""
    shift = given.mean if centred else np.zeros_like(given.mean)
    size = np.sqrt(given.q - shift**2)
    if not (size > 0).all():
        return given.unknown()
    return replace(
        given,
        q=np.ones_like(given.q),
        mean=(given.mean - shift) / size,
        k=(given.k - given.across(shift, shift)) / given.across(size, size),
    )


def _affine(whole: Element) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the module of a norm; one that it lacks is 1 or 0."""
    found = [getattr(whole.module, name, None) for name in ("weight", "bias")]
    weight, bias = (p.detach().double().cpu() if isinstance(p, torch.Tensor) else None for p in found)
    one = torch.ones(1, dtype=torch.float64)
    return one if weight is None else weight, 0 * one if bias is None else bias


def _norm_of_samples(node: Node) -> NormFacts | None:
    """The norm that an operation of torch is, if it normalises every sample by itself."""
    norm = None if is_python_node(node) else norm_of(node)
    return norm if norm is not None and norm.per_sample else None


def _norm_width(node: Any) -> int:
    if hasattr(node, "_saved_normalized_shape"):
        return int(np.prod(node._saved_normalized_shape))
    return int(node._saved_C // node._saved_group * node._saved_HxW)


def _batch_normalised(node: Any, given: Moments, weight: torch.Tensor, bias: torch.Tensor) -> Moments:
    if node._saved_training:
        ones = replace(given, q=np.ones_like(given.q), mean=np.zeros_like(given.mean), k=given.k * np.nan)
        return _affine_moments(ones, weight, bias)
    scale = weight / (node._saved_running_var.double().cpu() + node._saved_eps).sqrt()
    return _affine_moments(given, scale, bias - scale * node._saved_running_mean.double().cpu())


def _batch_norm_gain(node: Any, weight: torch.Tensor) -> float:
    if not node._saved_training:
        scale = weight / (node._saved_running_var.double().cpu() + node._saved_eps).sqrt()
        return float(scale.square().mean())
    shape = meta_of(Value(node, 0)).shape
    shared = int(np.prod(shape)) // shape[1]  # numbers that are normalised together: two directions are lost
    scale = weight * node._saved_result2.double().cpu()
    return float(scale.square().mean()) * (1 - 2 / shared)


def _joined(first: Energy, second: Energy, size: int) -> Energy:
    """Two gradients that meet: uncorrelated, so energies add; their product fluctuates with the number of units."""
    total = first.total + second.total
    with np.errstate(invalid="ignore", divide="ignore"):
        share = float(np.mean(first.total / total))
    variance = share**2 * first.variance + (1 - share) ** 2 * second.variance + 4 * share * (1 - share) / size
    return Energy(total, variance)
