"""Measured statistics of the weights behind the linear operations of a recorded forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from stabkit.results import Result
from stabkit.tracing.graph.values import Value, meta_of, operation

LINEAR = frozenset({"Addmm", "Mm", "Linear", "Convolution"})
_MEAN_LIMIT = 5.0  # standard errors by which the mean of weights may differ from zero


class UnknownError(Exception):
    """Why there is no expectation for an operation."""


@dataclass(frozen=True)
class LayerStatistics(Result):
    """What a linear layer's weights are like, as far as mean field theory asks.

    Attributes:
        path: path of its module, ``""`` where the weight is not a parameter of one.
        fan_in: inputs of one output unit.
        fan_out: outputs.
        sigma_w_squared: mean square of the weights times the fan-in.
        sigma_b_squared: mean square of the biases.
        spread: 1 for independent weights, 0 for orthogonal ones: the variance of the squared singular values of W over
            that of a Gaussian matrix of its shape; NaN for convolutions.
        taps: how many pairs of positions a convolution joins, per output position; 1 for a linear layer.
    """

    path: str
    fan_in: int
    fan_out: int
    sigma_w_squared: float
    sigma_b_squared: float
    spread: float
    taps: float


@dataclass(frozen=True)
class LinearLayer:
    """A linear operation: its statistics, its gain, and what tells its weights from others.

    Attributes:
        statistics: what is known of the weights and biases.
        gain: mean square of the outputs over that of the inputs, without biases; also the sum of squares of the
            gradient at the inputs over that at the outputs.
        token: identity of the weights.
        positions: output positions that share the weights, per sample.
    """

    statistics: LayerStatistics
    gain: float
    token: int
    positions: int


class WeightTable:
    """The parameters of a model by their storage."""

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[int, tuple[str, nn.Module]] = {}
        for path, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(parameter.data_ptr(), (path, module))

    def layer(self, node: Node, taken: Value, batch: int) -> LinearLayer:
        """Statistics of a linear node.

        Args:
            node: one of the operations `LINEAR`.
            taken: its input that depends on the source.
            batch: samples.

        Raises:
            UnknownError: its weights or biases are out of sight, or not centred.
        """
        name, record = operation(node), _saved(node)
        if name == "Convolution":
            if record("transposed"):
                raise UnknownError("a transposed convolution")
            weight, has_bias = record("weight"), sum(record("bias_sym_sizes_opt") or ()) > 0
        else:
            if name == "Addmm" and (record("alpha") != 1 or record("beta") != 1):
                raise UnknownError("addmm with factors")
            weight, has_bias = _matrix(node, name, taken), name != "Mm"
        if weight is None:
            raise UnknownError("a product of two values that both depend on the input")
        path, module = self._owners.get(weight.data_ptr(), ("", None))
        data = weight.detach().double()
        _refuse_mean(data, "weights")
        bias = getattr(module, "bias", None) if has_bias and module is not None else None
        bias = bias if isinstance(bias, Tensor) else None  # in recurrent layers it says whether there are some
        if has_bias and bias is None and (name != "Linear" or module is None):
            raise UnknownError("biases out of sight (the weight is computed, not a parameter)")
        sigma_b = 0.0 if bias is None else float(bias.detach().double().square().mean())
        if bias is not None and sigma_b > 0:
            _refuse_mean(bias.detach().double(), "biases")
        if name == "Convolution":
            return self._convolution(node, taken, data, sigma_b, path, weight.data_ptr())
        fan_out, fan_in = data.shape
        total = float(data.square().sum())
        statistics = LayerStatistics(path, fan_in, fan_out, total / fan_out, sigma_b, _spread(data), 1.0)
        positions = meta_of(Value(node, 0)).numel // (fan_out * batch)
        return LinearLayer(statistics, total / fan_out, weight.data_ptr(), positions)

    def affine(self, node: Node) -> tuple[Tensor, Tensor]:
        """Weight and bias of a norm; one that it lacks is 1 or 0.

        Raises:
            UnknownError: the bias is out of sight.
        """
        weight: Tensor | None = _saved(node)("weight")
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        if weight is None:
            return one, zero
        _, module = self._owners.get(weight.data_ptr(), ("", None))
        if module is None:
            raise UnknownError("a norm whose weight is not a parameter")
        bias = getattr(module, "bias", None)
        return weight.detach().double().cpu(), zero if bias is None else bias.detach().double().cpu()

    def _convolution(
        self, node: Node, taken: Value, weight: Tensor, sigma_b: float, path: str, token: int
    ) -> LinearLayer:
        record = _saved(node)
        source, target = meta_of(taken).shape[2:], meta_of(Value(node, 0)).shape[2:]
        joined = 1
        geometry = zip(
            source, target, weight.shape[2:], record("stride"), record("padding"), record("dilation"), strict=True
        )
        for inside, outside, size, stride, padding, dilation in geometry:
            joined *= sum(
                0 <= o * stride - padding + k * dilation < inside for o in range(outside) for k in range(size)
            )
        out, per_group = weight.shape[:2]
        square = float(weight.square().mean())
        taps = joined / math.prod(target)
        fan_in = per_group * math.prod(weight.shape[2:])
        statistics = LayerStatistics(path, fan_in, out, square * fan_in, sigma_b, math.nan, taps)
        return LinearLayer(statistics, square * per_group * taps, token, math.prod(target))


def _saved(node: Node) -> Any:
    return lambda name: getattr(node, f"_saved_{name}")


def _matrix(node: Node, name: str, taken: Value) -> Tensor | None:
    """The weight as (outputs, inputs), whichever factor of the product it is."""
    record: Any = _saved(node)
    if name == "Linear":
        found: Tensor | None = record("weight")
        return found
    first, second = (1, 2) if name == "Addmm" else (0, 1)
    parents = [parent for parent, _ in node.next_functions]
    if parents[first] is taken.node and parents[second] is not taken.node:
        right: Tensor | None = record("mat2")
        return None if right is None else right.t()
    if name == "Mm" and parents[second] is taken.node and parents[first] is not taken.node:
        left: Tensor | None = record("self")
        return left
    return None


def _spread(weight: Tensor) -> float:
    rows, columns = weight.shape
    gram = weight @ weight.t() if rows <= columns else weight.t() @ weight
    small, large = min(rows, columns), max(rows, columns)
    trace = float(gram.trace())
    if trace == 0 or small < 2:
        return math.nan
    excess = float(gram.square().sum()) * small / trace**2 - 1
    return excess / (small / large)


def _refuse_mean(data: Tensor, what: str) -> None:
    """Raise where numbers are not centred: a common mean adds a direction that theory does not know."""
    if data.numel() < 2:
        return
    deviation = float(data.std())
    average = float(data.mean())
    if abs(average) > _MEAN_LIMIT * deviation / math.sqrt(data.numel()):
        raise UnknownError(f"{what} with a mean of {average:.2g} (deviation {deviation:.2g}), not centred")
