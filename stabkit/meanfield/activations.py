"""Activation functions as mean field theory needs them: value, derivative, kinks and known Gaussian moments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from stabkit.arguments import accepts
from stabkit.errors import ArgumentError
from stabkit.meanfield.closed_forms import ERF, GELU, LINEAR, SIN, UNKNOWN, ClosedForms, leaky
from stabkit.meanfield.gaussian import Array, Function, density
from stabkit.vocabulary import ActivationFacts, activation_names, activation_of


@dataclass(frozen=True)
class Activation:
    """A scalar function that acts on every unit alone.

    Attributes:
        name: what it is called.
        function: takes and returns float64 arrays.
        derivative: the same for its derivative.
        kinks: points where function or derivative is not smooth.
        closed: the Gaussian moments that are known in closed form.
        log_derivative: log of the absolute derivative, where it would underflow; None computes it from the derivative.
    """

    name: str
    function: Function
    derivative: Function
    kinks: tuple[float, ...] = ()
    closed: ClosedForms = UNKNOWN
    log_derivative: Function | None = None

    def log_slope(self, h: Array) -> Array:
        """Log of the absolute derivative; -inf where it is zero or underflows."""
        if self.log_derivative is not None:
            return self.log_derivative(h)
        with np.errstate(divide="ignore"):
            return np.log(np.abs(self.derivative(h)))


def activation(source: str | nn.Module | Activation | Callable[..., Any], kinks: tuple[float, ...] = ()) -> Activation:
    """An activation from its name, its torch module, or any scalar function of a torch tensor.

    Args:
        source: one of `activation_names()`; a module such as ``nn.LeakyReLU(0.2)``; or a function that maps a float64
            tensor element by element. The derivative of a function comes from autograd.
        kinks: points where a function that is given is not smooth; quadrature splits there.

    Raises:
        ArgumentError: the name is not known, or the function does not act element by element on tensors.

    Example:
        >>> import torch
        >>> activation("tanh").name, activation(torch.nn.LeakyReLU(0.2)).name
        ('tanh', 'leaky_relu(0.2)')
        >>> float(activation(lambda h: h**3).derivative(np.array([2.0]))[0])
        12.0
    """
    if isinstance(source, Activation):
        return source
    if isinstance(source, str) and source not in activation_names():
        raise ArgumentError(
            f"activation={source!r}; expected one of {', '.join(activation_names())}, a module or a function"
        )
    facts = activation_of(source)
    if facts is not None:
        return of_facts(facts)
    return _of_function(source, kinks, getattr(source, "__name__", type(source).__name__))  # type: ignore[arg-type]


def of_facts(facts: ActivationFacts) -> Activation:
    """The activation with these facts: by its formula where there is one, else by evaluating its function.

    Raises:
        ArgumentError: there is no function, or it does not act element by element.
    """
    known = _formulas[facts.name](**facts.parameters) if facts.name in _formulas else None
    if known is not None:
        return known
    numbers = [f"{value:g}" for value in facts.parameters.values() if isinstance(value, float | int)]
    name = f"{facts.name}({', '.join(numbers)})" if numbers else facts.name
    if facts.function is None:
        raise ArgumentError(f"activation={name}: its function is not known")
    return _of_function(facts.function, facts.kinks, name)


@accepts
def leaky_relu(slope: float = 0.01) -> Activation:
    """``max(h, 0) + slope * min(h, 0)``; slope 0 is the ReLU, slope 1 linear, slope -1 the absolute value.

    Example:
        >>> leaky_relu(0.2).function(np.array([-1.0, 1.0])).tolist()
        [-0.2, 1.0]
    """
    return Activation(
        f"leaky_relu({slope:g})" if slope else "relu",
        lambda h: np.where(h > 0, h, slope * h),
        lambda h: np.where(h > 0, 1.0, slope),
        (0.0,),
        leaky(slope),
    )


@accepts
def hardtanh(low: float = -1.0, high: float = 1.0) -> Activation:
    """``min(max(h, low), high)``.

    Example:
        >>> hardtanh().function(np.array([-3.0, 0.5])).tolist()
        [-1.0, 0.5]
    """
    name = "hardtanh" if (low, high) == (-1.0, 1.0) else f"hardtanh({low:g}, {high:g})"
    return Activation(
        name, lambda h: np.clip(h, low, high), lambda h: ((h > low) & (h < high)).astype(float), (low, high)
    )


@accepts
def elu(alpha: float = 1.0, scale: float = 1.0) -> Activation:
    """``scale * (max(h, 0) + alpha * (exp(min(h, 0)) - 1))``.

    Example:
        >>> elu().function(np.array([0.0, 2.0])).tolist()
        [0.0, 2.0]
    """
    name = "elu" if (alpha, scale) == (1.0, 1.0) else f"elu({alpha:g}, {scale:g})"
    return Activation(
        name,
        lambda h: scale * np.where(h > 0, h, alpha * np.expm1(np.minimum(h, 0))),
        lambda h: scale * np.where(h > 0, 1.0, alpha * np.exp(np.minimum(h, 0))),
        (0.0,),
    )


def _erf(h: Array) -> Array:
    from scipy.special import erf

    return np.asarray(erf(h), dtype=float)


def _normal_cdf(h: Array) -> Array:
    return 0.5 * (1 + _erf(h / math.sqrt(2)))


def _sigmoid(h: Array) -> Array:
    from scipy.special import expit

    return np.asarray(expit(h), dtype=float)


def _log_sech_squared(h: Array) -> Array:
    size = np.abs(h)
    return np.asarray(2 * (math.log(2) - size - np.log1p(np.exp(-2 * size))))


def _tanh_slope(h: Array) -> Array:
    """1 - tanh^2 without cancellation: it is 0 in float64 from h = 19 on when written that way."""
    return np.exp(_log_sech_squared(h))


def _silu_slope(h: Array) -> Array:
    s = _sigmoid(h)
    return s * (1 + h * (1 - s))


def _of_function(source: Callable[..., Any], kinks: tuple[float, ...], name: str) -> Activation:
    def function(h: Array) -> Array:
        with torch.no_grad():
            return np.asarray(source(torch.from_numpy(np.ascontiguousarray(h))).double().numpy())

    def derivative(h: Array) -> Array:
        with torch.enable_grad():
            x = torch.from_numpy(np.ascontiguousarray(h)).requires_grad_()
            out = source(x)
            if not out.requires_grad:
                return np.zeros_like(h)
            return np.asarray(torch.autograd.grad(out.sum(), x)[0].double().numpy())

    points = np.linspace(-2.0, 2.0, 7)
    try:
        values, reverse = function(points), function(points[::-1])
        derivative(points)
    except Exception as error:
        raise ArgumentError(
            f"activation={name}: it fails on a float64 tensor ({type(error).__name__}: {error}); "
            "expected a function of torch tensors such as torch.tanh"
        ) from error
    if values.shape != points.shape or not np.allclose(values, reverse[::-1], equal_nan=True):
        raise ArgumentError(
            f"activation={name} does not act element by element; expected a scalar function like torch.tanh"
        )
    return Activation(name, function, derivative, kinks)


# formulas for activations of the vocabulary, by their name there; each takes their parameters, None: none for these
_Formula = Callable[..., Activation | None]
_formulas: dict[str, _Formula] = {}


def _formula(name: str) -> Callable[[_Formula], _Formula]:
    def keep(formula: _Formula) -> _Formula:
        _formulas[name] = formula
        return formula

    return keep


@_formula("linear")
def _linear() -> Activation:
    return Activation("linear", lambda h: h, np.ones_like, (), LINEAR)


@_formula("relu")
def _relu() -> Activation:
    return leaky_relu(0.0)


@_formula("leaky_relu")
def _leaky_relu(negative_slope: float) -> Activation:
    return leaky_relu(negative_slope)


@_formula("prelu")
def _prelu(weight: torch.Tensor) -> Activation | None:
    return leaky_relu(float(weight.detach())) if weight.numel() == 1 else None


@_formula("hardtanh")
def _hardtanh(min_val: float, max_val: float) -> Activation:
    return hardtanh(min_val, max_val)


@_formula("elu")
def _elu(alpha: float, scale: float, input_scale: float) -> Activation | None:
    return elu(alpha, scale) if input_scale == 1 else None


@_formula("tanh")
def _tanh() -> Activation:
    return Activation("tanh", np.tanh, _tanh_slope, (), UNKNOWN, _log_sech_squared)


@_formula("erf")
def _error_function() -> Activation:
    return Activation("erf", _erf, lambda h: 2 / math.sqrt(math.pi) * np.exp(-h * h), (), ERF)


@_formula("gelu")
def _gelu(approximate: str) -> Activation | None:
    if approximate == "tanh":
        return replace(_of_function(nn.GELU(approximate="tanh"), (), ""), name="gelu_tanh")
    return Activation("gelu", lambda h: h * _normal_cdf(h), lambda h: _normal_cdf(h) + h * density(h), (), GELU)


@_formula("silu")
def _silu() -> Activation:
    return Activation("silu", lambda h: h * _sigmoid(h), _silu_slope)


@_formula("sigmoid")
def _logistic() -> Activation:
    return Activation("sigmoid", _sigmoid, lambda h: _sigmoid(h) * _sigmoid(-h))


@_formula("softplus")
def _softplus(beta: float, threshold: float) -> Activation | None:
    return Activation("softplus", lambda h: np.logaddexp(0.0, h), _sigmoid) if beta == 1 else None


@_formula("sin")
def _sin() -> Activation:
    return Activation("sin", np.sin, np.cos, (), SIN)
