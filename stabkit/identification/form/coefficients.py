"""The coefficient between two values that a linear path joins: a number, a diagonal, a gate, a mask, or a move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.identification.form.operations import ADDS, PRODUCTS
from stabkit.identification.form.pieces import ADDED, Piece
from stabkit.results import Result
from stabkit.tracing.graph.values import Value, meta_of, operation, outputs_of, standard_normal
from stabkit.vocabulary import moves

_FEWEST_OF_A_ROW = 2  # entries: a gate that is one at all of them by chance is that at one
_ROUNDINGS = 8.0
_RESHAPED, _PERMUTED = moves("reshape"), moves("permute")


@dataclass(frozen=True)
class Coefficient(Result):
    """What multiplies an atom in a linear combination.

    Attributes:
        kind: ``"scalar"``; ``"diagonal"`` (a constant for each entry, such as LayerScale); ``"gate"`` (a diagonal that
            depends on the state); ``"dropout"`` (entries kept or dropped at random); ``"samples"`` (whole samples kept
            or dropped: stochastic depth); ``"part"`` (some entries only: padding, slices); ``"masked"``
            (as a number, but some entries of the sum are set to zero); ``"noise"`` (normal numbers that this pass drew,
            and no others); ``"moved"`` (entries change places) or ``"mixed"``.
        value: the number; the mean of a diagonal or gate; the factor of what is kept by dropout; 0 of noise.
        low: smallest entry.
        high: largest entry.
        residual: relative deviation from ``kind`` and ``value`` on random cotangents; 0 where the code leaves no room.
        sample: the first entry of a diagonal; the factor of the samples that are kept; None for other kinds.
        held: share of the rows that a mask keeps as they are; all numbers are those of the others.
    """

    kind: str
    value: float
    low: float
    high: float
    residual: float
    sample: float | None = None
    held: float = 0.0


class LinearCombination:
    """A value as a linear combination of the atoms that linear paths join it with.

    Cotangents that are pulled back arrive at all atoms at once, so each is pulled once, however many atoms there are: a
    run of an adaptive solver has hundreds.

    Attributes:
        piece: the stretch of the graph.
        value: what is combined.
        atoms: what it is combined of, in order.
        path: the linear nodes between.
    """

    def __init__(self, piece: Piece, value: Value) -> None:
        self.piece = piece
        self.value = value
        self.atoms, self.path = piece.expand(value)

    def coefficients(self) -> dict[Value, Coefficient]:
        """The coefficients of the atoms of which something arrives."""
        found = {atom: self.coefficient(atom) for atom in self.atoms}
        return {atom: coefficient for atom, coefficient in found.items() if coefficient is not None}

    def coefficient(self, atom: Value) -> Coefficient | None:
        """The coefficient of an atom; None where nothing of it arrives.

        A cotangent of ones shows the factors whatever the moves. For a source, two random cotangents show besides
        whether its entries keep their places.
        """
        factors, meta = self.factors.get(atom), meta_of(self.value)
        is_stage = atom not in self.piece.ends
        if factors is None:
            noise = self._noise.get(atom)
            return None if noise is None else Coefficient("noise", 0.0, float(noise.min()), float(noise.max()), 0.0)
        if is_stage and self._survival is not None:
            drawn = _of_samples(factors, self._survival, self._dtype)
            if drawn is not None:
                return drawn
        if factors.is_complex():
            return Coefficient("mixed", float(factors.abs().mean()), 0.0, float(factors.abs().max()), 1.0)
        if is_stage and (total := _of_copies(factors, meta.shape, self._dtype)) is not None:
            return total
        if not any(factors.stride()):
            factors = factors.reshape(-1)[:1]  # where nothing but moves and sums lies between: one number, expanded
            if factors.numel() and (found := self._of_one(atom, float(factors))) is not None:
                return found if is_stage else self._certified(atom, found)
        nothing = not bool(factors.any())
        if is_stage and (nothing or not _is_constant(factors, self._rounding)) and self._adds_entries(atom, factors):
            return Coefficient("scalar", 1.0, float(factors.min()), float(factors.max()), 0.0)
        if nothing:
            # a factor that is zero now (ReZero at its start) is a coefficient; a path that selects nothing is none
            return Coefficient("scalar", 0.0, 0.0, 0.0, 0.0) if is_stage else None
        if self._spreads_inside or atom in self._spread:
            factors = factors * (meta_of(atom).numel / meta.numel)
            if is_stage and self._spreads_by_weights(atom, factors):
                return Coefficient("scalar", 1.0, float(factors.min()), float(factors.max()), 0.0)
        rows = self._held_rows
        if rows is not None and factors.shape[:-1] == rows.shape:
            if not is_stage:
                return self._past_mask(atom, rows)
            factors = factors[~rows]
        kind, number = _kind(factors, meta.numel, self._rounding, gated=atom in self._gated, masked=self._is_masked)
        low, high = float(factors.min()), float(factors.max())
        sample = float(factors.reshape(-1)[0]) if kind == "diagonal" else None
        found = Coefficient(kind, number, low, high, 0.0, sample)
        return found if is_stage else self._certified(atom, found)

    def _past_mask(self, atom: Value, rows: Tensor) -> Coefficient:
        """The coefficient of a state in the rows that a mask lets pass."""
        passed = self.factors[atom][~rows]
        kind, number = ("gate", float(passed.mean())) if bool(passed.any()) else ("scalar", 0.0)
        held = float(rows.double().mean())
        return Coefficient(kind, number, float(passed.min()), float(passed.max()), 0.0, held=held)

    @cached_property
    def _held_rows(self) -> Tensor | None:
        """The rows of a state that a mask keeps as they are; None where it has none, or all.

        Those are rows along the last axis that are multiplied by one at every entry, and to which nothing is added.
        """
        shape = meta_of(self.value).shape
        for atom in self.piece.sources if len(shape) > 1 and shape[-1] >= _FEWEST_OF_A_ROW else ():
            factors = self.factors.get(atom)
            if factors is None or factors.shape != shape or not any(factors.stride()):
                continue
            rows = (factors == 1).all(dim=-1)
            if not bool(rows.any()) or bool(rows.all()) or not self._is_all_of(rows, atom):
                continue
            moved = [float((arrived[atom].cpu() - factors.cpu() * w).norm() / w.norm()) for w, arrived in self._drawn]
            if max(moved) <= self._rounding:  # every entry stays in its place
                return rows
        return None

    def _is_all_of(self, rows: Tensor, atom: Value) -> bool:
        """Whether nothing but an atom arrives in some rows: others are not passed on there, or are zero."""
        others = {a: t for a, t in self.factors.items() if a != atom and a in self.atoms}
        return bool(others) and all(
            t.shape[:-1] == rows.shape and (not bool(t[rows].any()) or _is_zero_in(a, rows)) for a, t in others.items()
        )

    def _of_one(self, atom: Value, factor: float) -> Coefficient | None:
        """The coefficient where one number, which is neither zero nor infinite, multiplies all entries."""
        if factor == 0.0 or not math.isfinite(factor) or self._spreads_inside or atom in self._spread:
            return None
        gated = atom in self._gated
        return Coefficient(
            "gate" if gated else "scalar", factor if gated else _rounded(factor, self._rounding), factor, factor, 0.0
        )

    def _adds_entries(self, atom: Value, factors: Tensor) -> bool:
        """Whether entries of a stage are added to each other: that map belongs to the field.

        What a cotangent of ones shows of g_(i+1) - 2 g_i + g_(i-1), which is 0, is no number before the field. Where
        every entry goes to one place, random signs arrive with the sizes that ones arrive with.
        """
        if self._spreads_inside or atom in self._spread or not factors.is_floating_point():
            return False
        arrived = self._signs[atom]
        away = float((arrived.abs() - factors.abs()).abs().max())
        return away > _tolerance(self._dtype) * float(torch.maximum(arrived.abs().max(), factors.abs().max()))

    def _spreads_by_weights(self, atom: Value, factors: Tensor) -> bool:
        """Whether one entry of a stage is given to several with a weight for each: in u tanh(w.x) u is of the field."""
        meta, given = meta_of(self.value), meta_of(atom).shape
        fits = len(given) == len(meta.shape) and all(a in (1, b) for a, b in zip(given, meta.shape, strict=True))
        if not fits or not factors.is_floating_point():
            return False
        w, arrived = self._drawn[0][0], self._drawn[0][1][atom].cpu()
        alike = factors.cpu() * w.sum_to_size(given)
        largest = float(w.abs().sum()) * float(factors.abs().max())
        return float((arrived - alike).abs().max()) > _tolerance(self._dtype) * largest

    def _pulled(self, cotangent: Tensor) -> dict[Value, Tensor]:
        return self.piece.pull(self._fixed, {self.value: cotangent})

    @cached_property
    def factors(self) -> dict[Value, Tensor]:
        """What a cotangent of ones shows: the factor of every entry of every atom, wherever it goes; without noise."""
        return self._pulled(self._ones)

    @cached_property
    def _signs(self) -> dict[Value, Tensor]:
        """What arrives of random signs."""
        meta = meta_of(self.value)
        return self._pulled(standard_normal(meta.shape, 1).sign().to(dtype=meta.dtype, device=meta.device))

    @cached_property
    def _noise(self) -> dict[Value, Tensor]:
        """The factors of atoms of which nothing arrives but what drawn numbers multiply."""
        whole = self.piece.pull(self.path, {self.value: self._ones}) if self.path - self._fixed else {}
        return {atom: t for atom, t in whole.items() if atom in self.atoms and not t.is_complex()}

    @cached_property
    def _ones(self) -> Tensor:
        meta = meta_of(self.value)
        return torch.ones((), dtype=meta.dtype, device=meta.device).expand(meta.shape)

    @cached_property
    def _fixed(self) -> set[Node]:
        """The nodes of the path without products with numbers that the pass drew."""
        return {n for n in self.path if operation(n) not in PRODUCTS or not self.piece.is_noisy(n)}

    @cached_property
    def _dtype(self) -> torch.dtype:
        """The coarsest precision on the path: a state in double precision may pass a network in single."""
        known = [meta_of(v).dtype for v in (self.value, *(Value(node, 0) for node in self.path))]
        floats = [dtype for dtype in known if dtype.is_floating_point or dtype.is_complex]
        return max(floats, key=lambda dtype: torch.finfo(dtype).eps)

    @cached_property
    def _rounding(self) -> float:
        """By how much a number may miss itself, relative: a rounding for each operation, as interpolations cancel."""
        return torch.finfo(self._dtype).eps * max(_ROUNDINGS, len(self.path))

    @cached_property
    def _drawn(self) -> list[tuple[Tensor, dict[Value, Tensor]]]:
        """Two random cotangents, and what arrives of each."""
        meta = meta_of(self.value)
        drawn = [w.to(meta.dtype) for w in standard_normal((2, *meta.shape), 0)]
        return [(w, self._pulled(w.to(meta.device))) for w in drawn]

    @cached_property
    def _survival(self) -> float | None:
        """The factor of the samples that a draw keeps; None where no uniform number was drawn.

        A zero may be an entry of a table, or mask a sample, and one number for all samples is a coefficient.
        """
        drawn: list[Any] = [n for n in self.path if n._sequence_nr() in self.piece.graph.dropped]
        masks = [n._saved_condition.detach().float() for n in drawn if operation(n) == "Where"]
        masks += _constants_of([n for n in drawn if operation(n) in PRODUCTS])
        return next((m for m in map(_kept_samples, masks) if m is not None), None)

    @cached_property
    def _is_masked(self) -> bool:
        drawn = [
            n for n in self.path if n._sequence_nr() in self.piece.graph.dropped or operation(n) == "NativeDropout"
        ]
        return any(t.dim() and not bool((t != 0).all()) for t in _constants_of(drawn))  # 0 * k_1 is a weight, no mask

    @cached_property
    def _gated(self) -> set[Value]:
        """The atoms of which something arrives past a product with what depends on the state."""
        found, after = set[Value](), set[Value]()
        for node in reversed(self.piece.nodes) if self.piece.is_gated(self.path) else ():
            if node not in self.path:
                continue
            gated = self.piece.is_gated({node}) or any(v in after for v in outputs_of(node))
            if gated:
                after.update(self.piece.linear[node])
                found.add(Value(node, ADDED))
        return after | found

    @cached_property
    def _spread(self) -> set[Value]:
        """What is given to several entries of a node on the path, so that a cotangent of ones counts it as often."""
        found: set[Value] = set()
        for node in self.path:
            if operation(node) in ADDS | PRODUCTS or operation(node) in ("Expand", "Where"):
                whole = meta_of(Value(node, 0)).numel
                found.update(v for v in self.piece.linear[node] if meta_of(v).numel < whole)
        return found

    @cached_property
    def _spreads_inside(self) -> bool:
        return any(v.node in self.path for v in self._spread)

    def _keeps_places(self) -> bool:
        """Whether the path leads through nothing but additions of equal shapes, and changes of shape alone."""
        for node in self.path:
            metas = [meta_of(value) for value in (Value(node, 0), *self.piece.linear[node])]
            name = operation(node)
            if name not in _RESHAPED and (name != "Add" or len({meta.shape for meta in metas}) > 1):
                return False
            if len({meta.numel for meta in metas}) > 1:
                return False
        return True

    def _only_moves(self) -> bool:
        """Whether a path of coefficients of one carries every entry to some place, and the places can be counted."""
        return meta_of(self.value).numel < 1 / torch.finfo(self._dtype).eps and all(map(self._moves, self.path))

    def _moves(self, node: Node) -> bool:
        """Whether an operation carries entries to other places; sums add up to one only where each comes once."""
        name, given = operation(node), self.piece.linear[node]
        if name in _RESHAPED | _PERMUTED:
            return len(given) == 1
        known: Any = node
        sizes = {meta_of(value).numel for value in (Value(node, 0), *given)}
        return len(sizes) == 1 and (name == "Expand" or (name == "Add" and known._saved_alpha == 1))

    def _masks_all(self, atom: Value) -> bool:
        """Whether nothing at all arrives of the entries to which this atom gives nothing: they are set to zero."""
        dropped = (self.factors[atom] == 0).reshape(meta_of(self.value).shape).to(meta_of(self.value).dtype)
        return not any(bool(cotangent.any()) for cotangent in self._pulled(dropped).values())

    def _certified(self, atom: Value, guess: Coefficient) -> Coefficient:
        before, after = meta_of(atom), meta_of(self.value)
        if before.numel != after.numel:
            return Coefficient("part", guess.value, guess.low, guess.high, 0.0)
        if guess.kind == "scalar" and guess.low == guess.high == 1.0:
            if self._keeps_places():
                return guess  # every entry arrives once, in its place: random cotangents could not tell otherwise
            if self._only_moves():
                places = torch.arange(after.numel, dtype=after.dtype, device=after.device)
                came = self._pulled(places.view(after.shape))[atom].reshape(-1)
                kept = float((came == places).double().mean())
                # a permutation with a share of fixed places is that multiple of the identity, and this far from it
                return guess if kept == 1.0 else replace(guess, kind="moved", residual=math.sqrt(1 - kept * kept))
        w = torch.stack([_real(c) for c, _ in self._drawn]).double()
        s = torch.stack([_real(arrived[atom]) for _, arrived in self._drawn]).double().cpu()
        coefficient = float((w * s).sum() / (w * w).sum())
        residual = float((s - coefficient * w).norm() / w.norm()) / max(1.0, abs(coefficient))
        if residual <= self._rounding:
            number = guess.value if guess.kind == "scalar" else coefficient
            return Coefficient("gate" if guess.kind == "gate" else "scalar", number, guess.low, guess.high, residual)
        ratios = s / w
        if bool(torch.allclose(ratios[0], ratios[1], rtol=1e-3, atol=1e-4)):
            deviation = float((ratios[0] - ratios[1]).abs().max())
            kind = guess.kind if guess.kind != "scalar" else "diagonal"
            kind = "masked" if kind == "part" and self._masks_all(atom) else kind
            return Coefficient(kind, guess.value, guess.low, guess.high, deviation, guess.sample)
        # numpy's sort: torch's keeps the places as well, and takes ten times as long
        sizes = [np.sort(t.abs().numpy(), axis=1) for t in (s, w)]
        moved = float(np.linalg.norm(sizes[0] - sizes[1]) / w.norm()) <= _tolerance(self._dtype)
        return Coefficient("moved" if moved else "mixed", guess.value, guess.low, guess.high, residual)


def _constants_of(nodes: Sequence[Any]) -> list[Tensor]:
    """What some operations hold that is on no graph."""
    names = ("_saved_other", "_saved_self", "_saved_result1", "_saved_mask")
    saved = [getattr(node, name, None) for node in nodes for name in names]
    return [t.detach() for t in saved if isinstance(t, Tensor) and t.grad_fn is None]


def _is_zero_in(atom: Value, rows: Tensor) -> bool:
    """Whether an atom is a product with zeros in some rows, such as a mask that is an input of the model."""
    saved = [getattr(atom.node, name, None) for name in ("_saved_self", "_saved_other")]
    masks = (
        [t for t in saved if isinstance(t, Tensor) and t.dim() == rows.dim() + 1]
        if operation(atom.node) == "Mul"
        else []
    )
    return any(not bool(t.expand(*rows.shape, t.shape[-1])[rows].any()) for t in masks if t.shape[:-1] == rows.shape)


def _real(values: Tensor) -> Tensor:
    """Entries one after the other, of complex ones their real parts, which numbers multiply alike."""
    return (values.real if values.is_complex() else values).reshape(-1)


def _of_copies(factors: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Coefficient | None:
    """The coefficient of a field that several copies of a batch are given to at once, and that is their combination.

    Copies come one after the other along the batch (classifier-free guidance), each with one weight; what multiplies
    the field is the sum of these. Where the weights differ, entries may be laid out otherwise (rows, patches): equal
    ones are those of a sum over entries. None where there are no copies, or the weights cancel.
    """
    numel = math.prod(shape)
    copies, rest = divmod(factors.numel(), numel) if numel else (0, 0)
    if copies < 2 or rest or not factors.dim() or factors.shape[0] % copies:
        return None
    along_batch = factors.dim() == len(shape) and factors.shape[1:] == torch.Size(shape[1:])
    rows = factors.detach().double().cpu().reshape(copies, -1)
    total, largest = float(rows[:, 0].sum()), float(rows.abs().max())
    slack = _tolerance(dtype) * largest
    differ = along_batch or float(rows.max() - rows.min()) > slack
    if not differ or float((rows - rows[:, :1]).abs().max()) > slack or abs(total) <= slack:
        return None
    return Coefficient(
        "scalar", _number(torch.tensor([total]), _tolerance(dtype)), float(rows.min()), float(rows.max()), 0.0
    )


def _of_samples(factors: Tensor, kept: float, dtype: torch.dtype) -> Coefficient | None:
    """The coefficient of a branch that whole samples skip: what it is without the draw, and the factor of the kept.

    A draw of zeros and ones may stand beside a division by p; ones alone, without it, are no draw.
    """
    flat = factors.detach().double().reshape(-1).cpu()
    present = flat[flat != 0]
    if not kept and present.numel():
        return None  # the zeros are those of another term, such as the last number of a schedule before the state
    base = _number((present / kept).mean()[None], _tolerance(dtype)) if kept and present.numel() else 1.0
    if kept == 1.0 and base > 1.0:
        kept, base = base, 1.0
    elif kept == 1.0 and present.numel() == flat.numel():
        return None
    return Coefficient("samples", base, float(flat.min()), float(flat.max()), 0.0, kept)


def _kind(factors: Tensor, numel: int, rounding: float, *, gated: bool, masked: bool) -> tuple[str, float]:
    flat = factors.detach().double().reshape(-1).cpu()
    mean = float(flat.mean())
    if gated:  # also where it is one number at this input, as what clamps does as long as nothing is clamped
        return "gate", mean
    if _is_constant(factors, rounding):
        return "scalar", _number(flat, rounding)
    kept = flat[flat != 0]
    if kept.numel() == flat.numel() or bool((kept - kept[0]).abs().max() > rounding * kept[0].abs()):
        return "diagonal", mean
    number = _number(kept, rounding)
    if masked and number != 1.0:  # dropout divides what it keeps; a mask of ones is a choice of entries
        return "dropout", number
    # entries of a stage that are cut off again (padding) are no choice of entries of the state
    return "part" if flat.numel() == numel else "scalar", number


def _number(flat: Tensor, rounding: float) -> float:
    return _rounded(float(flat[0]), rounding)


def _rounded(number: float, rounding: float) -> float:
    exact = round(number)
    return float(exact) if abs(number - exact) <= rounding else number


def _kept_samples(mask: Tensor) -> float | None:
    """The factor of kept samples, when a constant is a draw that drops whole samples: 0 where it dropped them all.

    Such a draw is one number a sample, 0 or one other.
    """
    if mask.dim() < 2 or len(mask) < 2:
        return None
    rows = mask.reshape(len(mask), -1)
    kept = rows[rows != 0]
    if not bool((rows == rows[:, :1]).all()) or (kept.numel() and not bool((kept == kept[0]).all())):
        return None
    if rows.shape[1] > 1 and kept.numel() in (0, rows.numel()):
        return None  # one number for all, laid out as the state: a coefficient
    if kept.numel() == rows.numel() and float(kept[0]) < 1.0:
        return None
    return float(kept[0]) if kept.numel() else 0.0


def _is_constant(factors: Tensor, rounding: float) -> bool:
    spread = float(factors.max() - factors.min())
    return spread <= rounding * float(factors.abs().max())


def _tolerance(dtype: torch.dtype) -> float:
    return _ROUNDINGS * torch.finfo(dtype).eps
