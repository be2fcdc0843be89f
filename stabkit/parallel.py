"""Who does independent pieces of work: this process, or several processes that share them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

_Result = TypeVar("_Result")


class Parallel(Protocol):
    """Does pieces of work that do not depend on one another; whoever does them, every process gets all results."""

    @property
    def count(self) -> int:
        """How many processes there are."""
        ...

    def share(self, work: Callable[[int], _Result], costs: Sequence[float], *, name: str = "piece") -> list[_Result]:
        """The results of all pieces, in order.

        Args:
            work: does the piece of this number.
            costs: the cost of every piece, in any unit.
            name: what a message calls a piece.
        """
        ...


@dataclass(frozen=True)
class Serial:
    """This process does everything itself.

    Example:
        >>> Serial().share(lambda piece: piece**2, [1.0, 1.0, 1.0])
        [0, 1, 4]
    """

    count: int = 1

    def share(self, work: Callable[[int], _Result], costs: Sequence[float], *, name: str = "piece") -> list[_Result]:
        """The results of all pieces, one after the other."""
        return [work(piece) for piece in range(len(costs))]


SERIAL = Serial()


def runs(count: int, among: int) -> list[tuple[int, int]]:
    """``count`` things in a row cut into ``among`` runs of about the same length: first, and one after last.

    Example:
        >>> runs(5, 2), runs(1, 3)
        ([(0, 3), (3, 5)], [(0, 1), (1, 1), (1, 1)])
    """
    ends = [-(-count * i // among) for i in range(among + 1)]
    return list(itertools.pairwise(ends))
