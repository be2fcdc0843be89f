"""Names and kinds of steps: what a person would call each piece of the depth axis."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from stabkit.tracing.cutting.boundaries import Span


def names(pieces: Sequence[Span]) -> list[str]:
    """A unique name for every piece: its module's path, or the first and last path when it spans several."""
    raw = [_name(piece, index == len(pieces) - 1) for index, piece in enumerate(pieces)]
    total, seen = Counter(raw), Counter[str]()
    unique = []
    for name in raw:
        seen[name] += 1
        unique.append(name if total[name] == 1 else f"{name}#{seen[name]}")
    return unique


def _name(piece: Span, is_last: bool) -> str:
    if not piece.calls:
        return "input" if piece.start == 0 else "output" if is_last else "operations"
    main = piece.main
    if piece.shape == "block" and main is not None:
        return main.path or type(main.module).__name__
    first, last = piece.calls[0], piece.calls[-1]
    label = [call.path or type(call.module).__name__ for call in (first, last)]
    return label[0] if label[0] == label[1] else f"{label[0]} .. {label[1]}"


def families(pieces: Sequence[Span]) -> list[str]:
    """What each piece has in common with others like it; ``""`` for pieces that stand alone.

    Blocks are alike by the pattern of their paths, or else by their class, or because they are calls of one module.
    """
    patterns = [re.sub(r"\d+", "#", piece.main.path) if piece.main else "" for piece in pieces]
    classes = [type(piece.main.module).__name__ if piece.main else "" for piece in pieces]
    modules = Counter(id(piece.main.module) for piece in pieces if piece.main)
    among = [piece.shape == "block" for piece in pieces]
    by_class = Counter(c for c, block in zip(classes, among, strict=True) if block)
    if sum(among) < 2 or max(by_class.values()) < 2:
        among = [True] * len(pieces)  # plain layers only
        by_class = Counter()
    by_pattern = Counter(p for p, block in zip(patterns, among, strict=True) if block and p)
    found = []
    for piece, pattern, name, block in zip(pieces, patterns, classes, among, strict=True):
        if block and by_pattern[pattern] >= 2:
            found.append(pattern)
        elif block and by_class[name] >= 2:
            found.append(name)
        else:
            found.append(pattern if piece.main and modules[id(piece.main.module)] >= 2 else "")
    return found


def stacks(pieces: Sequence[Span]) -> list[str]:
    """The stack of blocks that each piece belongs to (``"encoder.layers"``); ``""`` for pieces that stand alone."""
    found = []
    for piece, family in zip(pieces, families(pieces), strict=True):
        name = family.split("#")[0].rstrip("._-")
        found.append(name or (type(piece.main.module).__name__ if family and piece.main else ""))
    return found


def kinds(pieces: Sequence[Span], same_space: Sequence[bool]) -> list[str]:
    """``"step"`` where the space stays the same; what comes before or after all repeated blocks is a transition."""
    family = families(pieces)
    repeated = [i for i, name in enumerate(family) if name]
    first, last = (repeated[0], repeated[-1]) if repeated else (0, len(pieces) - 1)

    def is_step(i: int) -> bool:
        alone = not family[i] and bool(repeated) and pieces[i].shape == "glue"  # the norm between two stacks
        return same_space[i] and first <= i <= last and not alone

    return ["step" if is_step(i) else "transition" for i in range(len(pieces))]
