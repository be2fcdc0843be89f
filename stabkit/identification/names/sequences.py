"""Steps of one state that are several additions one after the other, each called what it is by itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from stabkit.identification.fields.composites import as_one_field
from stabkit.identification.form.coefficients import Coefficient
from stabkit.identification.form.normal_form import NormalForm, Stage
from stabkit.identification.form.tableau import Blocks
from stabkit.identification.names.single import CLOSE, Name, name_one_state
from stabkit.tracing.graph.values import Value, meta_of

RESTART = "restart from a held state x_0"
_EULER = "forward Euler"


def name_sequence(parts: Sequence[tuple[NormalForm, Blocks]]) -> Name | None:
    """The name of several additions, one after the other; None where one of them has none.

    Args:
        parts: every addition, with its tableau.
    """
    scaled = _with_scalings(parts)
    named = [_named(*part) for part in scaled]
    told = [name for name in named if name is not None]
    if len(told) < len(named) or not told:
        return None
    driven = [name for name, (_, table, _) in zip(told, scaled, strict=True) if len(table.rows)]
    sizes = [name.h for name in driven]
    if not sizes:
        return None
    same = max(sizes) - min(sizes) <= CLOSE * max(map(abs, sizes))
    convention = f"h: {', '.join(f'{h:.3g}' for h in sizes)}, one after the other"
    convention = (
        next(n.convention for n, (_, t, _) in zip(told, scaled, strict=True) if len(t.rows)) if same else convention
    )
    if len(told) == 1:
        return replace(told[0], convention=convention)
    inside = _palindrome(parts, told)
    if inside is not None:
        system = "x' = f_1(x) + f_2(x) + ..., half steps around a whole one"
        return Name(f"Strang splitting ({inside} inside)", system, max(sizes), convention)
    listed = "" if same else f", h = {', '.join(f'{h:.3g}' for h in sizes)}"
    if all(name.name == _EULER for name in told):
        text = f"{len(told)} Euler steps{listed}"
    else:
        text = ", ".join(_run(name, len(list(group))) for name, group in itertools.groupby(name.name for name in told))
    return Name(f"Lie splitting ({text})", "x' = f_1(x) + f_2(x) + ..., one after the other", sizes[0], convention)


def _palindrome(parts: Sequence[tuple[NormalForm, Blocks]], told: Sequence[Name]) -> str | None:
    """The method of all parts, where half steps of some fields stand on both sides of a whole step of another."""
    keys = [tuple(dict.fromkeys(stage.key for stage in table.rows)) for _, table in parts]
    whole = told[len(told) // 2].h
    around = [name.h for i, name in enumerate(told) if i != len(told) // 2]
    halves = all(abs(2 * h - whole) <= CLOSE * abs(whole) for h in around)
    fits = len(told) == len(parts) > 1 and len(told) % 2 and keys == keys[::-1] and all(keys)
    if not fits or not halves or len(set(keys)) != len(keys) // 2 + 1 or len({name.name for name in told}) > 1:
        return None
    return told[0].name


def _run(name: str, count: int) -> str:
    if name == _EULER:
        return f"{count} Euler steps" if count > 1 else "Euler"
    return f"{count} times {name}" if count > 1 else name


def _with_scalings(parts: Sequence[tuple[NormalForm, Blocks]]) -> list[tuple[NormalForm, Blocks, float]]:
    """Additions with the numbers that multiply the state before them, and behind the last, which are no steps."""
    found: list[tuple[NormalForm, Blocks, float]] = []
    waiting: Blocks | None = None
    for form, table in parts:
        if len(table.rows) or form.merges:
            found.append((form, table if waiting is None else waiting.then(table), 1.0))
            waiting = None
        else:
            waiting = table if waiting is None else waiting.then(table)
    if waiting is not None and found:
        form, table, _ = found[-1]
        found[-1] = (form, table.then(waiting), float(waiting.V[0, 0]))
    return found


def _named(form: NormalForm, table: Blocks, behind: float) -> Name | None:
    """The name of one addition: of a state that is held to the state, of a field, and of a linear term besides."""
    terms = form.forms[0]
    kept = [terms[v] for v in form.sources if v in terms]
    if any(c.kind != "scalar" and not (_damps(c) and c.value == table.V[0, 0]) for c in kept):
        return None
    held = [c for atom, c in terms.items() if atom in form.piece.contexts]
    if held and (len(table.rows) or len(held) > 1 or held[0].kind != "scalar"):
        return None
    if held:
        a, b = float(table.V[0, 0]), held[0].value * behind
        text = f"{a:.3g} x {'-' if b < 0 else '+'} {abs(b):.3g} x_0"
        return Name(f"{RESTART} ({text})", "none: a state that is held is added", 1.0, "none")
    linear = [i for i, stage in enumerate(table.rows) if _is_linear_term(form, stage)]
    if linear and len(linear) < len(table.rows) and not table.A.any():
        rest = [i for i in range(len(table.rows)) if i not in linear]
        name = name_one_state(table.of_rows(rest))
        rank = min(_width(form, table.rows[i]) for i in linear)
        what = "a low-rank linear term" if rank < meta_of(form.sources[0]).numel else "a linear term"
        return replace(name, name=f"{name.name} with {what}") if name.is_known else None
    name = name_one_state(table)
    if not name.is_known and (one := as_one_field(table)) is not None:
        name = name_one_state(one)
    return name if name.is_known else None


def _damps(c: Coefficient) -> bool:
    """Whether every entry has a damping of its own."""
    return c.kind == "diagonal" and 0 <= c.low <= c.high <= 1


def _is_linear_term(form: NormalForm, stage: Stage) -> bool:
    """Whether a stage is a matrix times the state."""
    of_state = all(terms.keys() == set(form.sources) for terms in stage.inputs)
    return stage.is_affine and not stage.is_weightless and not stage.opaque and of_state


def says_less(name: Name, sums: Sequence[NormalForm]) -> bool:
    """Whether the name of all additions at once leaves out what one of them is by itself.

    A matrix times the state besides a field, where the skip is no identity; a relaxation towards a state that is held.
    """
    damped = name.name.startswith(("damped Euler", "scaled skip"))
    linear = [[_is_linear_term(form, stage) for stage in form.stages] for form in sums]
    beside = any(any(found) and not all(found) for found in linear)
    return damped and (beside or (len(sums) > 1 and any(map(_relaxes_to_held, sums))))


def _relaxes_to_held(form: NormalForm) -> bool:
    """Whether a state is multiplied by a number that is not one, and nothing but a held state is added."""
    terms = form.forms[0]
    kept = [c for atom, c in terms.items() if atom in form.sources]
    return terms.keys() <= form.piece.ends and len(terms) > 1 and any(c.value != 1.0 for c in kept)


def _width(form: NormalForm, stage: Stage) -> int:
    """How many entries the narrowest value inside a linear term has."""
    return min(meta_of(Value(node, 0)).numel for node in stage.nodes)
