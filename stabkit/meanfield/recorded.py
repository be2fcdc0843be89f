"""Which activation a recorded operation is, with the parameters that the graph keeps of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.autograd.graph import Node

from stabkit.meanfield.activations import Activation, activation, elu, hardtanh, leaky_relu
from stabkit.meanfield.weights import UnknownError


def _leaky(node: Any) -> Activation:
    return leaky_relu(float(node._saved_negative_slope))


def _named(name: str) -> Callable[[Node], Activation]:
    return lambda node: activation(name)


def _gelu(node: Any) -> Activation:
    return activation("gelu_tanh" if node._saved_approximate == "tanh" else "gelu")


def _softplus(node: Any) -> Activation:
    beta = float(node._saved_beta)
    if beta == 1:
        return activation("softplus")
    return replace(activation(lambda h: torch.nn.functional.softplus(h, beta)), name=f"softplus({beta:g})")


def _elu(node: Any) -> Activation:
    if float(node._saved_input_scale) != 1:
        raise UnknownError("a CELU with a scaled input")
    return elu(float(node._saved_alpha), float(node._saved_scale))


ACTIVATIONS: dict[str, Callable[[Any], Activation]] = {
    "Elu": _elu,
    "Erf": _named("erf"),
    "Gelu": _gelu,
    "Hardsigmoid": _named("hardsigmoid"),
    "Hardswish": _named("hardswish"),
    "Hardtanh": lambda node: hardtanh(float(node._saved_min_val), float(node._saved_max_val)),
    "LeakyRelu": _leaky,
    "Mish": _named("mish"),
    "Relu": _named("relu"),
    "Sigmoid": _named("sigmoid"),
    "Silu": _named("silu"),
    "Sin": _named("sin"),
    "Softplus": _softplus,
    "Tanh": _named("tanh"),
}
