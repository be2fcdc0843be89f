"""A step that is a chain of additions to one state: what its links give to the tableau, and what there is to say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from stabkit.identification.form.chain import Link
from stabkit.identification.form.flow_index import Surroundings
from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.tableau import Blocks
from stabkit.identification.names.step_size import NUMBER
from stabkit.identification.record import Identification

_SIZED = re.compile(r", Euler with h = \S+")


def last_sum(parts: Sequence[Link], tables: Sequence[Blocks]) -> Blocks:
    """The tableau of the last addition, with the scalings before it; one with norms around it has its own step size."""
    added = [i for i, part in enumerate(parts) if part.kind == "sum"]
    last = max([i for i in added if tables[i].rows] or added)  # what does not depend on the state is no branch
    first = max((i + 1 for i, part in enumerate(parts[:last]) if part.kind == "sum"), default=0)
    table, *others = tables[first : last + 1]
    for other in others:
        table = table.then(other)
    return table


def depends_on_input(form: NormalForm) -> bool:
    """Whether some coefficient of the tableau is a gate, drawn, or that of some entries: it holds for this pass.

    What is held fixed enters fields as their own argument: which slice of it does is no number of the method.
    """
    held = form.piece.contexts
    stages = [c for stage in form.stages for terms in stage.inputs for a, c in terms.items() if a not in held]
    ends = any(c.kind in ("gate", "noise") for c in form.forms[0].values())
    return ends or any(c.kind in ("gate", "noise", "part") for c in stages)


def linear_links(links: Sequence[Link]) -> list[Link]:
    """Sums and the scalings around them; one after a norm or an activation is a part of that."""
    found, after = [], False
    for link in links:
        after = link.kind == "weightless" or (after and link.kind == "scaling")
        if link.kind in ("sum", "scaling") and not after:
            found.append(link)
    return found


def notes_of_sums(around: Surroundings, sums: Sequence[NormalForm], table: Blocks) -> tuple[str, ...]:
    """What there is to say of some additions and their tableau."""
    notes = []
    count = sum(not _adds_noise(form) for form in sums)
    if count > 1:
        notes.append(f"{count} additions, each a step of its own" + (": a splitting" if table.n_fields > 1 else ""))
    learned = dict.fromkeys(text for form in sums for text in around.learned_factors(form.piece))
    if learned:
        notes.append(f"factors that are parameters: {', '.join(learned)}")
    branches = [(form, a, c) for form in sums for a, c in form.forms[0].items() if a not in form.piece.ends]
    coefficients = [c for *_, c in branches]
    for form, atom, c in branches:
        if c.kind == "diagonal":
            learned_ones = around.scales_channels(form.piece, atom)
            what = "every channel has a step of its own (LayerScale)" if learned_ones else (
                "entries of a branch are multiplied by different numbers")  # fmt: skip
            notes.append(f"{what}, {c.low:.3g} to {c.high:.3g}")
        if c.kind == "part":
            notes.append("the branch is added to some entries only")
        h_is_negative = table.shared and table.n_fields == 1  # then the sum of the weights is h
        if c.kind == "scalar" and c.value < 0 and len(coefficients) == 1 and not h_is_negative:
            notes.append("the branch is subtracted: f is minus what the code calls so")
        if c.kind == "dropout":
            notes.append("dropout after the branch counts as part of it")
        if c.kind == "scalar" and c.value == 0.0 and len(coefficients) == 1:
            moved = ": the step is the identity until training moves it" if learned else " for this input"
            notes.append(f"a branch is multiplied by zero{moved}")
    inner = [(form, terms) for form in sums for stage in form.stages for terms in stage.inputs if len(terms) > 1]
    own = [c for form, terms in inner for a, c in terms.items() if a in form.sources and c.kind == "diagonal"]
    if own:
        low, high = min(c.low for c in own), max(c.high for c in own)
        notes.append(f"a field reads the state times a number for each entry, {low:.3g} to {high:.3g}")
    if any(stage.opaque for form in sums for stage in form.stages):
        notes.append("the field is opaque: only the step around it was read")
    if any(map(_adds_held, sums)):
        notes.append("a value that is held from before is added to the state (input injection)")
    if table.guided:
        weights = " and ".join(f"{w:.3g}" for w in table.guided)
        notes.append(
            f"the field is {len(table.guided)} calls of one network at one point, with weights {weights} (guidance)"
        )
    if table.shared and len(table.rows) > 1:
        notes.append(f"{len(table.rows)} stages share weights")
    return tuple(dict.fromkeys(notes))


def without_mean(record: Identification) -> Identification:
    """A record without a step size where entries of a branch have numbers of their own, of which notes tell the range.

    What the tableau has for z is their mean.
    """
    if record.convention != NUMBER:
        return record
    told = "none for all: every entry has its own, and z is that of their mean"
    system = _SIZED.sub(", Euler with a step for each entry", record.system)
    return replace(record, step_size=None, convention=told, system=system)


def _adds_held(form: NormalForm) -> bool:
    """Whether what is held fixed is added to a state, as it is, and nothing else."""
    terms = form.forms[0].keys()
    held = len(terms) > 1 and terms <= form.piece.ends and not terms.isdisjoint(form.piece.contexts)
    return held and not _adds_noise(form)


def _adds_noise(form: NormalForm) -> bool:
    """Whether nothing but what drawn numbers multiply is added to a state."""
    added = [c.kind for atom, c in form.forms[0].items() if atom not in form.sources]
    return bool(added) and set(added) == {"noise"}
