"""Classes that users make known as activations and norms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stabkit.errors import ArgumentError, ArgumentTypeError
from stabkit.vocabulary.facts import ActivationFacts, Function, NormFacts
from stabkit.vocabulary.lookup import Rule, activation_names, activation_rules, norm_classes, norm_of, rule_like
from stabkit.vocabulary.measuring import measure

_AXES = ("batch", "positions", "group", "features")


class Registration:
    """A class that was made known; `remove` takes that back, and so does the end of a ``with`` block."""

    def __init__(self, cls: Any, table: dict[Any, Any], value: Any) -> None:
        if not isinstance(cls, type) or not issubclass(cls, nn.Module | torch.autograd.Function):
            raise ArgumentTypeError(f"cls={cls!r}; expected a class of modules, or an autograd.Function")
        if cls in table:
            raise ArgumentError(f"cls={cls.__name__} is known already; expected a new class, or remove() it first")
        self._cls, self._table = cls, table
        table[cls] = value

    def remove(self) -> None:
        """Forget the class again."""
        self._table.pop(self._cls, None)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def register_activation(
    cls: type,
    *,
    like: str | type | None = None,
    slope: tuple[float, float] | None = None,
    limits: tuple[float, float] | None = None,
    kinks: tuple[float, ...] = (),
    piecewise_linear: bool = False,
) -> Registration:
    """Make a class known as an activation: every analysis then reads each of its calls as one.

    Without ``like`` and other facts it is evaluated and measured.

    Args:
        cls: a module class, or an ``autograd.Function``. It takes one tensor and acts on every number of it alone.
        like: a known activation that it computes, as a name or a class. Parameters of that (``negative_slope``) are
            read from attributes of the module that are called the same.
        slope: least and largest derivative.
        limits: values far below and far above zero; NaN where there is none.
        kinks: points where it is not smooth.
        piecewise_linear: whether it is linear between its kinks.

    Returns:
        A handle that undoes it, and can be used in a ``with`` statement.

    Raises:
        ArgumentTypeError: ``cls`` is no such class.
        ArgumentError: it is known already; ``like`` is not known; facts are missing or contradict each other.

    Example:
        >>> from stabkit import vocabulary
        >>> class MyReLU(nn.Module):
        ...     def forward(self, x):
        ...         return x * (x > 0)
        >>> with register_activation(MyReLU, like=nn.ReLU):
        ...     vocabulary.activation_of(MyReLU()).name
        'relu'
    """
    return Registration(cls, activation_rules, _rule(cls, like, slope, limits, kinks, piecewise_linear))


def _rule(cls: Any, like: str | type | None, slope: Any, limits: Any, kinks: Any, piecewise_linear: bool) -> Rule:
    given = slope is not None or limits is not None or bool(kinks) or piecewise_linear
    if like is not None:
        known = None if given else rule_like(like)
        if known is None:
            beside = " beside other facts" if given else ""
            accepted = f"one of {', '.join(activation_names())}, the class of one, or facts in its place"
            raise ArgumentError(f"like={like!r}{beside}; expected {accepted}")
        return known
    if not given:
        return lambda module: measure(_computed(cls, module), cls.__name__)
    if slope is None or limits is None:
        raise ArgumentError(f"slope={slope}, limits={limits}; expected both, or like= a known activation")
    facts = ActivationFacts(cls.__name__, slope, limits, kinks, piecewise_linear)
    return lambda module: replace(facts, function=_computed(cls, module))


def _computed(cls: Any, module: nn.Module | None) -> Function:
    """The function of a module, or of the ``autograd.Function`` of a node."""
    return cls.apply if module is None else module.forward


def register_norm(
    cls: type,
    *,
    like: type | None = None,
    over: tuple[str, ...] | None = None,
    centred: bool | None = None,
    running: bool = False,
) -> Registration:
    """Make a class known as a normalisation: every analysis then reads each of its calls as one.

    Args:
        cls: a module class, or an ``autograd.Function``.
        like: the class of a known norm that it computes, such as ``nn.LayerNorm``.
        over: what its statistics are taken over, of ``"batch"``, ``"positions"``, ``"group"``, ``"features"``.
        centred: whether it takes the mean away.
        running: whether it can hold running statistics.

    Returns:
        A handle that undoes it, and can be used in a ``with`` statement.

    Raises:
        ArgumentTypeError: ``cls`` is no such class.
        ArgumentError: it is known already; ``like`` is not known; facts are missing, or given beside ``like``.

    Example:
        >>> class Standardised(nn.Module):
        ...     def forward(self, x):
        ...         return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
        >>> with register_norm(Standardised, like=nn.LayerNorm):
        ...     norm_of(Standardised()).name
        'layer_norm'
    """
    given = over is not None or centred is not None or running
    if like is not None:
        known = norm_of(like) if isinstance(like, type) and not given else None
        if known is None:
            beside = " beside other facts" if given else ""
            raise ArgumentError(f"like={like!r}{beside}; expected the class of a known norm, or facts in its place")
        return Registration(cls, norm_classes, known)
    if not over or set(over) - set(_AXES) or centred is None:
        raise ArgumentError(
            f"over={over}, centred={centred}; expected like= a known norm, or whether the mean is taken away and what "
            f"the statistics are taken over, of {', '.join(_AXES)}"
        )
    return Registration(cls, norm_classes, NormFacts(getattr(cls, "__name__", ""), tuple(over), centred, running))
