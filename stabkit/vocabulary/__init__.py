"""What counts as an activation, a norm, and an operation that only moves numbers; every reader of a model asks here.

`activation_of` and `norm_of` say what a module or a recorded operation is. A class that torch does not have is known by
what it inherits from; an activation also by what it computes, a norm by its name. What none of this tells,
`register_activation` and `register_norm` do.
"""

from stabkit.vocabulary.facts import ActivationFacts, NormFacts
from stabkit.vocabulary.lookup import (
    ACTIVATIONS,
    COSTLY,
    NORMS,
    activation_names,
    activation_of,
    is_activation,
    is_python_node,
    moves,
    norm_of,
    operation,
)
from stabkit.vocabulary.registration import Registration, register_activation, register_norm

__all__ = [
    "ACTIVATIONS",
    "COSTLY",
    "NORMS",
    "ActivationFacts",
    "NormFacts",
    "Registration",
    "activation_names",
    "activation_of",
    "is_activation",
    "is_python_node",
    "moves",
    "norm_of",
    "operation",
    "register_activation",
    "register_norm",
]
