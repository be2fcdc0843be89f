"""Hand-made and adversarial cases: what tracers usually break on."""

from __future__ import annotations

import dataclasses

from . import hard_architectures, hard_calls, hard_functions, hard_layers

SUBJECTS = [
    dataclasses.replace(subject, family=family)
    for family, group in (
        ("torch.nn", hard_layers.SUBJECTS),
        ("architectures", hard_architectures.SUBJECTS),
        ("calls", hard_calls.SUBJECTS),
        ("autograd", hard_functions.SUBJECTS),
    )
    for subject in group
]

# the step that holds what autograd does not (truly) know, by the beginning of its module path, and words of its note
NOTED = {
    "straight-through Function": ("middle", "hand-written backward Binarise"),
    "straight-through detach": ("middle", "without gradient"),
    "gate under no_grad": ("middle", "without gradient"),
    "numpy forward and backward": ("middle", "hand-written backward NumpySine"),
    "once_differentiable": ("middle", "hand-written backward OnceSquare"),
    "reversible blocks that recompute": ("", "hand-written backward _ReversibleFunction"),
    "gradient reversal": ("middle", "hand-written backward GradientReversal"),
    "Function with several outputs": ("middle", "hand-written backward NewStyle"),
    "Function that writes in place": ("middle", "hand-written backward InPlaceFunction"),
    "dynamic quantisation": ("middle", "without a derivative"),
    "CrossMapLRN2d": ("", "hand-written backward CrossMapLRN2d"),
    "pooling": ("", "piecewise constant operation Sign"),  # in LPPool
    "odeint, dopri5": ("", "hand-written backward _UncheckedAssign"),
    "odeint_adjoint, dopri5": ("", "hand-written backward OdeintAdjointMethod"),
    "tensor hook that scales gradients": ("net", "a tensor hook"),
    "DEQ, one phantom step": ("", "without gradient"),
    "DEQ, implicit hook": ("", "without gradient"),
}

# how many steps there are in all, where no module says what a block is
TOTALS = {
    "torch.jit.script": 3,
    "torch.jit.trace": 5,
    "plain function": 1,
    "Fourier layers, complex weights": 3,
    "odeint, rk4": 6,  # the last selects the end of the solution
    "odeint, euler": 6,
    "class with its own __call__": 3,
}
