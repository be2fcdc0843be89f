"""What stands around an addition: norms and rectifiers behind it, gates before its terms, branches drawn at random."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.chain import Link
from stabkit.identification.form.coefficients import Coefficient
from stabkit.identification.form.normal_form import NormalForm
from stabkit.identification.form.operations import MOVES, has_matrix
from stabkit.identification.names.step_size import NUMBER
from stabkit.identification.record import Identification
from stabkit.identification.steps.quotients import leaking_quotients
from stabkit.integrators import stochastic_depth
from stabkit.tracing.graph.graph import Element, Graph, element_of
from stabkit.tracing.graph.values import Value, meta_of
from stabkit.vocabulary import ActivationFacts, NormFacts, activation_of, operation

_STATISTICS = frozenset({"Mean", "Std", "Var", "VarMean", "LinalgVectorNorm"})
_SAME = 1e-4  # thresholds in single precision
GATED = 1e-3  # by how much the gates of the old state and of the new one may miss one


def with_projection(
    record: Identification,
    norms: int,
    sums: int,
    *,
    box: tuple[float, float] | None,
    threshold: tuple[float, float] | None = None,
    bends: bool = False,
    whole: bool = False,
    skips: Sequence[float] = (),
) -> Identification:
    """What follows an addition: norms, a projection on a ``box`` and nothing else, a soft threshold, or others.

    ``bends``: whether something else than norms is there beside norms. ``whole``: whether the record is one of several
    additions with a norm behind the last of them alone. ``skips``: what multiplies the state in each addition.
    """
    if not record.after:
        return record
    note = f"after the addition: {', '.join(record.after)}"
    if norms:
        why = f"the skip passes {norms} norm(s) after {sums} addition(s), so no single a describes it"
        numbers = ", ".join(dict.fromkeys(f"{a:.4g}" for a in skips))  # DeepNorm, nGPT
        scaled = (f"a = {numbers} before the norm",) if any(abs(a - 1) > _SAME for a in skips) else ()
        system = f"{record.system}, retracted to the sphere after each step"
        # of several additions, some followed by a norm and some by a bend, the one name says a part
        evidence = "measured" if bends else record.evidence
        name = f"{record.name}, then a norm (post-norm)" if whole else "projected Euler (post-norm)"
        return replace(record, name=name, skip=None, notes=(*scaled, why, note, *record.notes),
                       system=system, evidence=evidence)  # fmt: skip
    if box is not None and record.name in ("forward Euler", "forward Euler, parallel branches"):
        low, high = box
        system = "x' in f(x) - N(x), N the normal cone of the nonnegative states"
        name, where = "projected Euler (ReLU)", "x >= 0"
        if box != (0.0, math.inf):
            where = f"x >= {low:.4g}" if high == math.inf else f"x <= {high:.4g}" if low == -math.inf else (
                f"{low:.4g} <= x <= {high:.4g}")  # fmt: skip
            name, system = f"projected Euler ({where})", f"x' in f(x) - N(x), N the normal cone of {where}"
        why = f"a projection on {where} after the step; a proximal gradient step if f is a gradient"
        return replace(record, name=name, notes=(note, why, *record.notes), system=system)
    if threshold is not None and not record.name.startswith("unnamed"):
        low, high = threshold
        t = f"{low:.3g}" if high - low <= _SAME * high else f"{low:.3g} to {high:.3g}"
        why = f"the addition is followed by the soft threshold sign(x) max(|x| - t, 0), t = {t}: the prox of t |x|_1"
        return replace(record, name=f"{record.name}, then soft threshold (forward-backward)", evidence="measured",
                       notes=(why, note, *record.notes), system="x' in f(x) - d(t/h |x|_1)")  # fmt: skip
    name = f"{record.name}, then {', '.join(dict.fromkeys(record.after))}"
    return replace(record, name=name, notes=(note, *record.notes), system=f"{record.system}, and a map after each step")


def normalises(link: Link) -> bool:
    """Whether a norm is among what happens on a link."""
    return any(map(_normalises, link.elements))


def begins_as_it_ends(sums: Sequence[NormalForm], behind: Sequence[Link]) -> bool:
    """Whether all stages are one field that begins with the map behind the only sum: x' = P(b + S P(b + ...)).

    These are rounds of x -> P(S x + b), cut elsewhere: learned iterative thresholding, unrolled equilibria.
    """
    stages = [stage for form in sums for stage in form.stages]
    if len(sums) != 1 or len(behind) != 1 or len(stages) < 2 or len({stage.key for stage in stages}) > 1:
        return False
    last = _bends(behind[0].form.piece.nodes)
    return bool(last) and all(_bends(itertools.takewhile(lambda n: not has_matrix(n), s.nodes)) == last for s in stages)


def _bends(nodes: Iterable[Node]) -> Counter[str]:
    """The operations of a map, but for moves."""
    return Counter(name for name in map(operation, nodes) if name not in MOVES)


def norms_after(links: Sequence[Link]) -> int:
    """How many sums are followed by a norm."""
    count, open_sum = 0, False
    for link in links:
        if link.kind == "sum":
            open_sum = True
        elif link.kind == "weightless" and open_sum and normalises(link):
            count, open_sum = count + 1, False
    return count


def normalises_in(graph: Graph, nodes: Sequence[Node]) -> bool:
    """Whether a norm is among some operations."""
    return any(_normalises(element_of(graph, node) or node) for node in nodes)


def _normalises(part: Node | Element) -> bool:
    return isinstance(part.facts, NormFacts) if isinstance(part, Element) else operation(part) in _STATISTICS


def normalised_at_the_end(links: Sequence[Link]) -> bool:
    """Whether there are several sums, nothing but numbers between them, and norms behind the last of them alone."""
    sums = [i for i, link in enumerate(links) if link.kind == "sum"]
    between = [link for link in links[: sums[-1]] if link.kind not in ("sum", "scaling")]
    return len(sums) > 1 and not between and norms_after(links) == 1 and all(map(normalises, links[sums[-1] + 1 :]))


def box_behind(links: Sequence[Link]) -> tuple[float, float] | None:
    """The least and the largest value that links let pass which project on a box of these: ReLU, clamps; else None.

    A map of every entry is such a projection where it is the identity between its limits and constant beyond.
    """
    low, high = -math.inf, math.inf
    for part in (part for link in links for part in link.elements):
        facts = part.facts if isinstance(part, Element) else activation_of(part)
        if not isinstance(facts, ActivationFacts) or facts.function is None:
            return None
        below, above = facts.limits
        ends = [x for x in (below, above) if math.isfinite(x)]
        at = torch.tensor([x + d for x in ends for d in (-1.0, -1e-3, 0.0, 1e-3, 1.0)], dtype=torch.float64)
        if not ends or not torch.allclose(facts.function(at), at.clamp(below, above), rtol=0, atol=1e-9):
            return None
        low, high = max(low, below), min(high, above)
    return (low, high) if low < high and (low, high) != (-math.inf, math.inf) else None


def with_gates(record: Identification, kinds: set[str], sums: Sequence[NormalForm]) -> Identification:
    """A record that says what gates, and factors of single coordinates, make of it; ``kinds`` are those of the skip."""
    weighed = any(c.kind == "gate" for form in sums for a, c in form.forms[0].items() if a not in form.piece.ends)
    if weighed and "gate" not in kinds:
        record = replace(record, evidence="measured", notes=("stages are weighed by gates, held fixed", *record.notes))
        if record.name.startswith("unnamed"):
            return replace(record, name="unnamed (stages weighed by gates)", method=None, recorded=())
    if kinds == {"diagonal"}:
        return with_own_damping(record, [form.forms[0][a] for form in sums for a in form.sources if a in form.forms[0]])
    if "gate" not in kinds:
        return record
    gates = [c for form in sums for c in form.forms[0].values() if c.kind == "gate"]
    if not gates:  # the skip as a whole is a gate that no single sum shows
        return replace(record, name="gated skip", evidence="measured", method=None, recorded=())
    gated = [c for form in sums if (c := form.forms[0].get(form.sources[0])) is not None and c.kind == "gate"]
    told = gated or gates  # those of the skip; a branch may have the same with another sign
    low, high = min(c.low for c in told), max(c.high for c in told)
    of = "the old state is multiplied by" if gated else "what is added is multiplied by"
    notes = (f"{of} {low:.3g} to {high:.3g} here, held fixed in R(z)", *record.notes)
    numbers = ", ".join(f"{c.value:.3g}" for c in gated)
    repeated = len({tuple(stage.key for stage in form.stages) for form in sums}) == 1 == len({len(sums), len(gated)})
    leaks = [leaking_quotients(form) for form in sums]
    if all(leaks) and record.skip is not None and (len(sums) == 1 or repeated):
        many = f"{sum(leaks)} substeps of " if sum(leaks) > 1 else ""
        system = "x' = f(x) - w(x) x, the leak w at the new state and f at the old: a = 1 / (1 + h w)"
        told_of = numbers if len(sums) > 1 else f"{record.skip:.3g}"
        name = f"{many}semi-implicit Euler (mean a = {told_of})"
        return replace(record, name=name, notes=notes, evidence="measured", system=system)
    if repeated and len(sums) > 1 and record.skip is not None:
        name, system = f"{len(sums)} gated substeps (mean a = {numbers})", "x' = a(x) x + f(x) - x, with one gate"
        return replace(record, name=name, notes=notes, evidence="measured", system=system)
    if len(sums) > 1 and record.skip is not None:
        share = f"{len(sums)} gated steps" if len(gated) == len(sums) else f"{len(sums)} steps, {len(gated)} gated"
        system = "x' = a_i(x) x + f_i(x) - x, one after the other, each with a gate of its own"
        name = f"Lie splitting ({share}, mean a = {numbers})"
        convention = "none: every step has its own"  # the share of a gate is no number of the steps beside it
        if len(gated) == len(sums) and all(map(_is_convex, sums)):
            system = "x' = T_i(x) (f_i(x) - x), one after the other, each with a gate of its own"
            convention = "none for all: that of a step is its gate, T_i = 1 - a_i"
        if len(gated) < len(sums):
            system = "x' = a(x) x + f(x) - x where the old state is gated, one after the other with the rest"
        if record.method is not None:
            record.method.name = name
            if record.step_size is not None and abs(record.step_size - 1.0) > GATED:
                notes = (
                    f"what multiplies the fields in the tableau is told in units of {record.step_size:.3g}",
                    *notes,
                )
        record = replace(record, step_size=None, convention=convention)
        return replace(record, name=name, notes=notes, evidence="measured", system=system)
    if record.skip is None:  # a projection, or a map behind the addition, has named the step: no single a describes it
        return replace(record, evidence="measured", notes=(*record.notes, notes[0]))
    if abs((record.skip or 0.0) + (record.step_size or 0.0) - 1.0) > GATED:
        name, system = f"gated skip (mean a = {record.skip:.3g})", "x' = a(x) x + f(x) - x, the old state times a gate"
        if record.name.startswith("unnamed"):  # of stages that gates weigh no one number is a step size
            how = "none: the stages of the branch are weighed by numbers of their own"
            record = replace(record, method=None, recorded=(), step_size=None, convention=how, evidence="measured")
        if len(gates) > len(gated) and record.convention == NUMBER:
            record = replace(record, convention="h: the mean of what multiplies the branch, which depends on the state")
        return replace(record, name=name, system=system, notes=notes)
    return replace(
        record,
        name=f"gated Euler (mean a = {record.skip:.3g})",
        convention="h: the gate, which depends on the state; its mean is shown",
        system="x' = T(x) (f(x) - x), or the exponential step exp(-tau) = 1 - T",
        notes=notes,
    )


def _is_convex(form: NormalForm) -> bool:
    """Whether what a gate leaves of the state is what is added: the gates of both are one in sum."""
    gates = [c for c in form.forms[0].values() if c.kind == "gate"]
    ends = sum(c.value for c in gates), sum(c.low for c in gates[:1]) + sum(c.high for c in gates[1:])
    return len(gates) == len(form.forms[0]) == 2 and all(abs(end - 1) <= GATED for end in ends)


def with_own_damping(record: Identification, skips: Sequence[Coefficient]) -> Identification:
    """A record of skips with a number for each entry: it tells their range, and not the mean that the tableau holds."""
    entries = [c for c in skips if c.kind == "diagonal"]
    name, system = record.name, record.system
    if any(c.low < 0 or c.high > 1 for c in entries):
        told = [f"diagonal skip ({_ranges([c])[0]})" if c.kind == "diagonal" else
                "Euler step" if c.value == 1.0 else f"damped Euler (a = {c.value:.3g})" for c in skips]  # fmt: skip
        name, system = told[0], "x' = f(x) + (a - 1) x, a of either sign"
        if len(skips) > 1:
            name, system = f"Lie splitting ({', '.join(told)})", f"{system}, one after the other"
    for c, ends in zip(entries, _ranges(entries), strict=True):
        name = name.replace(f"a = {c.value:.3g}", ends)
    if record.skip is not None and len(skips) > 1:  # the product of several
        name = name.replace(f"a = {record.skip:.3g}", "a by entry")
    if record.method is not None:
        record.method.name = name
    why = f"every entry has a damping of its own ({'; '.join(_ranges(entries))}): the tableau holds their mean"
    return replace(record, name=name, system=system, notes=(why, *record.notes))


def _ranges(entries: Sequence[Coefficient]) -> list[str]:
    return [f"a from {c.low:.3g} to {c.high:.3g} by entry" for c in entries]


def scaled_by_entries(record: Identification, total: Coefficient) -> Identification:
    """A record of a state whose entries are multiplied by a number each, while nothing is added to it."""
    by = "gates" if total.kind == "gate" else "numbers"
    why = f"every entry is multiplied by a number of its own, from {total.low:.3g} to {total.high:.3g} here"
    name = f"state times {by} (a from {total.low:.3g} to {total.high:.3g} by entry), no branch"
    return replace(record, name=name, evidence="measured", system=f"x' = (a{'(x)' * (by == 'gates')} - 1) x",
                   notes=(why, *record.notes))  # fmt: skip


def masked(kinds: set[str], held: float = 0.0) -> tuple[str, ...]:
    """What is said of a mask among the kinds of a skip, or of one that keeps a share of the rows as they are."""
    if held:
        return (f"a mask keeps {held:.0%} of the rows of the state as they are: the step is that of the others",)
    return ("a mask sets some entries to zero: the step is that of the others",) if "masked" in kinds else ()


def _weighs_samples(node: Node) -> bool:
    """Whether an operation multiplies every sample by a constant of its own (shake-shake draws its weights so)."""
    known: Any = node
    saved = [getattr(known, name, None) for name in ("_saved_self", "_saved_other")] if operation(node) == "Mul" else []
    constant = [t for t in saved if isinstance(t, Tensor) and t.grad_fn is None and not t.requires_grad]
    laid_out = tuple(meta_of(Value(node, 0)).shape) if constant else ()  # batch first, and nothing else of one's own
    alike = [t for t in constant if 1 < t.dim() == len(laid_out) and t.numel() == t.shape[0] == laid_out[0]]
    own = [t.detach().flatten() for t in alike]
    return any(bool((t != t[:1]).any()) for t in own)


def with_randomness(record: Identification, sums: Sequence[NormalForm]) -> Identification:
    """Branches that are dropped for whole samples."""
    dropped = [c for form in sums for c in form.forms[0].values() if c.kind == "samples"]
    if not dropped:
        own = any(_weighs_samples(node) for form in sums for node in form.piece.nodes if form.piece.graph.draws)
        why = "numbers of each sample's own, which are not made of the state, multiply what is added: drawn, or given"
        return replace(record, notes=(why, *record.notes)) if own else record
    factor = max(c.sample or 0.0 for c in dropped)
    if factor <= 1.0:
        why = "whole samples skip the branch at random (stochastic depth); how often does not show in one pass"
        return replace(record, name=f"{record.name}, stochastic depth", notes=(why, *record.notes))
    survival = 1.0 / factor
    method = stochastic_depth(survival, rescaled=True) if len(sums) == 1 else None
    return replace(
        record,
        name=f"{record.name}, stochastic depth (p = {survival:.3g})",
        method=method,
        convention=f"{record.convention}; drawn 1/p with probability p and 0 otherwise: R is the mean square",
        system="a weak approximation of a stochastic differential equation",
        notes=("kept branches are divided by p", *record.notes),
    )
