"""Names and kinds of steps: what a person would call each piece of the depth axis."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from stabkit.tracing.depth import Piece


def names(pieces: Sequence[Piece]) -> list[str]:
    """A unique name for every piece: its module's path, or the first and last path when it spans several."""
    raw = [_name(piece, index == len(pieces) - 1) for index, piece in enumerate(pieces)]
    total, seen = Counter(raw), Counter[str]()
    unique = []
    for name in raw:
        seen[name] += 1
        unique.append(name if total[name] == 1 else f"{name}#{seen[name]}")
    return unique


def _name(piece: Piece, is_last: bool) -> str:
    if not piece.calls:
        return "input" if piece.start == 0 else "output" if is_last else "operations"
    main = piece.main
    if piece.shape == "block" and main is not None:
        return main.path or type(main.module).__name__
    first, last = piece.calls[0], piece.calls[-1]
    label = [call.path or type(call.module).__name__ for call in (first, last)]
    return label[0] if label[0] == label[1] else f"{label[0]} .. {label[1]}"


def families(pieces: Sequence[Piece]) -> list[str]:
    """The repeated pattern that each piece belongs to; ``""`` for pieces that stand alone."""
    patterns = [re.sub(r"\d+", "#", piece.main.path) if piece.main else "" for piece in pieces]
    blocks = Counter(p for p, piece in zip(patterns, pieces, strict=True) if p and piece.shape == "block")
    counts = blocks if blocks and max(blocks.values()) >= 2 else Counter(p for p in patterns if p)
    modules = Counter(id(piece.main.module) for piece in pieces if piece.main)
    return [
        p if counts[p] >= 2 or (piece.main and modules[id(piece.main.module)] >= 2) else ""
        for p, piece in zip(patterns, pieces, strict=True)
    ]


def kinds(pieces: Sequence[Piece], same_space: Sequence[bool]) -> list[str]:
    """``"step"`` where the space stays the same; what comes before or after all repeated blocks is a transition."""
    repeated = [i for i, family in enumerate(families(pieces)) if family]
    first, last = (repeated[0], repeated[-1]) if repeated else (0, len(pieces) - 1)
    return ["step" if same and first <= i <= last else "transition" for i, same in enumerate(same_space)]
