"""What a module or a recorded operation is: found by its class or name, by what it inherits, or by what it does."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node

from stabkit.errors import ArgumentError
from stabkit.vocabulary.catalogue import FAMILIES, MOVES, NORMALISATIONS, SETTINGS, Family
from stabkit.vocabulary.facts import ActivationFacts, Function, NormFacts
from stabkit.vocabulary.measuring import measure

Rule = Callable[[Any], ActivationFacts | None]  # of a module, which has its own parameters, or of None


def _rule(family: Family, settings: Mapping[str, Any]) -> Rule:
    def rule(module: Any) -> ActivationFacts:
        return family.of({**settings, **{n: getattr(module, n) for n in family.defaults if hasattr(module, n)}})

    return rule


_HANDWRITTEN = torch.autograd.function.BackwardCFunction
_BY_FAMILY = {family.name: family for family in FAMILIES}
_BY_NAME: dict[str, tuple[Family, Mapping[str, Any]]] = {name: (family, {}) for name, family in _BY_FAMILY.items()}
_BY_NAME.update((name, (_BY_FAMILY[family], parameters)) for name, (family, parameters, _) in SETTINGS.items())
_BY_OPERATION = {name: family for family in FAMILIES for name in family.operations}
_NORM_BY_OPERATION = {name: facts for facts, names, _ in NORMALISATIONS for name in names}
#: Operations that are activations.
ACTIVATIONS = frozenset(_BY_OPERATION)
#: Activations whose derivative takes longer to compute than to multiply with.
COSTLY = frozenset(name for name, family in _BY_OPERATION.items() if family.costly)
#: Operations that are norms.
NORMS = frozenset(_NORM_BY_OPERATION)

# what is known by class or function; what users register is added
activation_rules: dict[Any, Rule] = {source: _rule(family, {}) for family in FAMILIES for source in family.sources}
activation_rules |= {source: _rule(*_BY_NAME[name]) for name, (*_, sources) in SETTINGS.items() for source in sources}
norm_classes: dict[Any, NormFacts] = {cls: facts for facts, _, classes in NORMALISATIONS for cls in classes}
_evaluated: weakref.WeakKeyDictionary[type, dict[str, ActivationFacts | None]] = weakref.WeakKeyDictionary()


def operation(node: Node) -> str:
    """The operation behind an autograd node: ``"Addmm"`` for ``AddmmBackward0``."""
    return _operation(type(node))


@lru_cache(maxsize=4096)
def _operation(node_class: type[Node]) -> str:
    # the derivative of a derivative, ThresholdBackwardBackward0, is an operation of its own
    return node_class.__name__.rpartition("Backward")[0] or node_class.__name__


def is_python_node(node: Node) -> bool:
    """Whether the node belongs to a custom ``torch.autograd.Function``."""
    return isinstance(node, _HANDWRITTEN)


def moves(*kinds: str) -> frozenset[str]:
    """Operations that move, copy or cast numbers and leave them what they are: all, or those of some kinds.

    Args:
        kinds: which of ``"reshape"``, ``"permute"``, ``"copy"``, ``"select"`` (a part), ``"gather"`` (by indices),
            ``"join"`` (several tensors side by side), ``"expand"``, ``"pad"``, ``"write"`` (into a part of another).

    Raises:
        ArgumentError: there is no such kind.

    Example:
        >>> sorted(moves("join"))
        ['Cat', 'Stack']
    """
    unknown = [kind for kind in kinds if kind not in MOVES]
    if unknown:
        raise ArgumentError(f"kinds={unknown}; expected of {', '.join(MOVES)}")
    return frozenset(name for kind in kinds or MOVES for name in MOVES[kind])


def rule_like(source: str | type) -> Rule | None:
    """How the facts of a module are found that computes a known activation; None where that is none."""
    known = activation_of(source)
    if known is None or known.name not in _BY_FAMILY:
        return None if known is None else lambda module: known
    return _rule(_BY_FAMILY[known.name], known.parameters)


def activation_names() -> list[str]:
    """The names that `activation_of` knows."""
    return list(_BY_NAME)


def is_activation(node: Node) -> bool:
    """Whether a recorded operation is an activation; of a hand-written backward, whether it was registered as one."""
    return (_function(node) in activation_rules) if is_python_node(node) else operation(node) in ACTIVATIONS


def activation_of(source: str | Node | nn.Module | type | Function) -> ActivationFacts | None:
    """What is known of an activation; None where the source is none.

    A module is looked up by its class, and then by what that inherits from, as long as it inherits ``forward`` too.
    Another one without parts, parameters and buffers is copied and evaluated: if it acts on every number alone it is an
    activation, and it is one of those known by name if it computes the same.

    Args:
        source: a name such as ``"tanh"``; a recorded operation or its name, ``"Tanh"``; a module or its class; a
            function such as ``torch.tanh``.

    Example:
        >>> facts = activation_of(nn.LeakyReLU(0.2))
        >>> facts.slope, facts.limits, facts.flat_side
        ((0.2, 1.0), (-inf, inf), 'none')
        >>> class QuickGELU(nn.Module):
        ...     def forward(self, x):
        ...         return x * torch.sigmoid(1.702 * x)
        >>> activation_of(QuickGELU()).flat_side
        'below'
    """
    if isinstance(source, str):
        family, parameters = _BY_NAME.get(source) or (_BY_OPERATION.get(source), {})
        return None if family is None else family.of(parameters)
    if isinstance(source, Node):
        if is_python_node(source):
            rule = activation_rules.get(_function(source))
            return None if rule is None else rule(None)
        family = _BY_OPERATION.get(operation(source))
        names = () if family is None else [name for name in family.defaults if hasattr(source, f"_saved_{name}")]
        return None if family is None else family.of({name: getattr(source, f"_saved_{name}") for name in names})
    module = source if isinstance(source, nn.Module) else None
    if module is None and not isinstance(source, type):
        return activation_rules[source](None) if source in activation_rules else None
    cls: Any = source if module is None else type(module)
    known = _nearest(cls, activation_rules)
    if known is not None and getattr(cls, "forward", None) is getattr(known, "forward", None):
        return activation_rules[known](module)
    return None if module is None else _by_values(module)


def norm_of(source: Node | nn.Module | type) -> NormFacts | None:
    """What is known of a normalisation; None where the source is none.

    A module is looked up by its class, and then by what that inherits from. A foreign one is a norm if its class is
    called one and it has no parts and no matrices; all that is known then is its name.

    Example:
        >>> norm_of(nn.RMSNorm(4)).centred, norm_of(nn.BatchNorm2d(4)).running, norm_of(nn.Linear(4, 4))
        (False, True, None)
    """
    if isinstance(source, Node):
        known = norm_classes.get(_function(source)) if is_python_node(source) else None
        return known if is_python_node(source) else _NORM_BY_OPERATION.get(operation(source))
    cls = source if isinstance(source, type) else type(source)
    base = _nearest(cls, norm_classes)
    if base is not None:
        return norm_classes[base]
    if isinstance(source, type) or "norm" not in cls.__name__.lower() or cls.__module__.startswith("torch."):
        return None
    matrices = any(sum(size > 1 for size in p.shape) > 1 for p in source.parameters())
    if matrices or next(source.children(), None) is not None:
        return None
    return NormFacts(cls.__name__, ("batch", "positions") if "batch" in cls.__name__.lower() else (), None)


def _function(node: Any) -> Any:
    """The ``autograd.Function`` behind a hand-written node."""
    return getattr(type(node), "_forward_cls", None)


def _nearest(cls: type, table: Mapping[Any, Any]) -> Any:
    """The nearest class in a table that this one is, or inherits from."""
    return next((base for base in cls.__mro__ if base in table), None)


def _by_values(module: nn.Module) -> ActivationFacts | None:
    """The facts of a foreign module, if it has no state and acts on every number alone."""
    stateful = any(True for parts in (module.children(), module.parameters(), module.buffers()) for _ in parts)
    if stateful or type(module).__module__.startswith("torch."):
        return None
    settings = repr({name: value for name, value in vars(module).items() if not name.startswith("_")})
    found = _evaluated.setdefault(type(module), {})
    if settings not in found:
        try:
            function = copy.deepcopy(module).forward  # the module itself may count its calls
        except Exception:  # what cannot be copied is not tried: it holds something that must not change
            return None
        found[settings] = measure(function, type(module).__name__, every_activation())
    return found[settings]


def every_activation() -> list[ActivationFacts]:
    """All activations that have a name, with the parameters that torch gives them."""
    return [family.of(parameters) for name, (family, parameters) in _BY_NAME.items() if name != "rrelu"]
