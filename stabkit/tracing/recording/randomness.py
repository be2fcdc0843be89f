"""The random generators of the process and of a model: how they stand, and how to make them stand so again."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch


def state_of(generator: Any) -> Any:
    """How a generator of torch, Python or numpy stands."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.state


def set_state(generator: Any, state: Any) -> None:
    """Make it stand so again."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.state = state


class RandomStates:
    """How the generators of the process stand, and further ones."""

    def __init__(self, generators: Iterable[Any] = ()) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - it is the one that models draw from
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self.own = [  # the machine's own numbers have no state
            (generator, state_of(generator))
            for generator in generators
            if not isinstance(generator, random.SystemRandom)
        ]

    def restore(self) -> None:
        """Make them stand so again."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        self.wind_back()

    def wind_back(self) -> None:
        """Those beside the ones of the process."""
        for generator, state in self.own:
            set_state(generator, state)


@contextlib.contextmanager
def unchanged_randomness() -> Iterator[None]:
    """Restore the generators of Python, numpy and torch, on the CPU and on every CUDA device in use."""
    states = RandomStates()
    try:
        yield
    finally:
        states.restore()


def seeded(seed: int) -> None:
    """Seed the generators of Python, numpy and torch, from which a model may draw.

    Where there is no accelerator torch notes the stack of every `torch.manual_seed` for one that may come later: 0.15
    ms in a script, 1 ms below the sixty frames of a test, once a step of every short training. None is used here then.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
