"""A checkpoint without its architecture, measured matrix by matrix."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabkit.arguments import accepts
from stabkit.checkpoints.training_progress import natural_order
from stabkit.errors import ArgumentError
from stabkit.meanfield import activation_names
from stabkit.report import encoding, files
from stabkit.report.formats import figures, middle, signed
from stabkit.results import Result
from stabkit.tables import aligned
from stabkit.text import printable
from stabkit.weights.matrices import MatrixReport, measure
from stabkit.weights.roles import role_of

SCHEMA = "stabkit.weights/1"
LABEL = (
    "Weights only, the weaker statement: nothing was run. Skip connections, normalisation and the order of the layers "
    "are not known, so growths may not be added up and there is no verdict. Give the architecture (--model) for one."
)

_SHORTEST_NAME = 16
_COLUMNS: tuple[tuple[str, Callable[[MatrixReport], str]], ...] = (
    ("kind", lambda m: m.kind),
    ("shape", lambda m: "x".join(map(str, m.shape))),
    ("scale", lambda m: figures(m.sigma_w)),
    ("sigma max", lambda m: ("" if m.converged or not m.finite else "~") + figures(m.largest_singular_value)),
    ("min", lambda m: figures(m.smallest_singular_value)),
    ("stable rank", lambda m: figures(m.stable_rank)),
    ("radius", lambda m: figures(m.spectral_radius)),
    ("growth", lambda m: "-" if m.expected_growth is None else signed(m.expected_growth)),
)


@dataclass(frozen=True)
class WeightsReport(Result):
    """What a set of weights says without an architecture.

    Attributes:
        name: what the weights are called.
        description: where they come from, one sentence a line.
        label: what these numbers can and cannot say.
        activation: the nonlinearity that ``expected_growth`` assumes.
        matrices: one record per matrix, by the natural order of names, which need not be that of depth.
        n_parameters: numbers in all tensors.
        others: how many tensors are no matrices (biases, norms, counters).
        non_finite: names of tensors, matrices or not, that hold NaN or infinity.
    """

    name: str
    description: str
    label: str
    activation: str
    matrices: tuple[MatrixReport, ...]
    n_parameters: int
    others: int
    non_finite: tuple[str, ...]

    def __str__(self) -> str:
        return plain(self)

    def _contents(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **super()._contents()}

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON, whole or not at all.

        Raises:
            ReportError: the file cannot be written.
        """
        return files.write(Path(path), encoding.lines(self.to_dict()).encode())


@accepts
def analyze_weights(
    tensors: Mapping[str, Tensor],
    *,
    name: str = "weights",
    description: str = "",
    activation: str = "relu",
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> WeightsReport:
    """Singular values, stable rank, recurrent eigenvalues and expected growth of every matrix among some tensors.

    Expected growth is that of mean field theory for random weights of the same scale (Schoenholz et al., "Deep
    information propagation", ICLR 2017); for relu it is half the log of fan-in times variance over 2. Trained weights
    are not random: it says what their scale alone would do.

    Args:
        tensors: by name; each is looked up once and let go.
        name: what the report calls them.
        description: where they come from.
        activation: the nonlinearity to assume, one of ``stabkit.meanfield.activation_names()``.
        seed: the seed of the iterations for large matrices.
        progress: called with (done, total, name).

    Raises:
        ArgumentError: the activation is unknown.

    Example:
        >>> import torch
        >>> report = analyze_weights({"layer.weight": 3 * torch.eye(4)}, activation="linear")
        >>> m = report.matrices[0]
        >>> m.largest_singular_value, m.stable_rank, round(m.expected_growth, 4)
        (3.0, 4.0, 1.0986)
    """
    if activation not in activation_names():
        raise ArgumentError(f"activation={activation!r}; accepted: {', '.join(activation_names())}")
    names = sorted(tensors, key=natural_order)
    matrices, bad, parameters = [], [], 0
    shapes: dict[str, tuple[int, ...]] = {}
    biases: dict[str, Tensor] = {}
    for key, tensor in _vectors(tensors, names):
        shapes[key], biases[key] = tuple(tensor.shape), tensor
    for index, key in enumerate(names):
        tensor = biases[key] if key in biases else tensors[key]
        parameters += tensor.numel()
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            continue  # counted among the others: it has no plain entries
        role = role_of(key, tensor, shapes)
        if role is not None:
            bias = biases.get(re.sub(r"weight(?=[^.]*$)", "bias", key))
            matrices.append(measure(key, tensor, role, bias, activation, seed))
            if not matrices[-1].finite:
                bad.append(key)
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach().float()).all()):
            bad.append(key)
        if progress is not None:
            progress(index + 1, len(names), key)
    return WeightsReport(
        name=name,
        description=description,
        label=LABEL,
        activation=activation,
        matrices=tuple(matrices),
        n_parameters=parameters,
        others=len(names) - len(matrices),
        non_finite=tuple(bad),
    )


def _vectors(tensors: Mapping[str, Tensor], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The biases, which are small: their shapes say how the matrices beside them are stored."""
    for name in names:
        if "bias" in name.rpartition(".")[2]:
            tensor = tensors[name]
            if tensor.dim() == 1:
                yield name, tensor


def rows(report: WeightsReport, width: int) -> list[list[str]]:
    """Titles, then one row per matrix; the names get what the other columns leave of ``width`` characters."""
    cells = [[cell(matrix) for _, cell in _COLUMNS] for matrix in report.matrices]
    titles = [title for title, _ in _COLUMNS]
    taken = sum(max(len(row[i]) for row in (titles, *cells)) + 1 for i in range(len(titles)))
    room = max(width - taken, _SHORTEST_NAME)
    named = [middle(printable(matrix.name), room) for matrix in report.matrices]
    return [["name", *titles], *([name, *row] for name, row in zip(named, cells, strict=True))]


def legend(report: WeightsReport) -> str:
    """What the columns mean."""
    return (
        "scale: root mean square of the entries times the root of the fan-in; sigma: singular values; stable rank: "
        "squared Frobenius norm over squared sigma max; radius: largest |eigenvalue| of a recurrent matrix's blocks; "
        f"growth: nats per layer expected of random weights of this scale with {report.activation}, by mean field "
        "theory. ~ marks a value that has not converged."
    )


def summary(report: WeightsReport) -> str:
    """The set of weights in a sentence or two."""
    said = f"{report.n_parameters:,} numbers in {len(report.matrices)} matrices and {report.others} other tensors."
    if report.non_finite:
        shown = ", ".join(printable(name) for name in report.non_finite[:5])
        more = f" and {len(report.non_finite) - 5} more" if len(report.non_finite) > 5 else ""
        said += f" NaN or infinity in {shown}{more}."
    known = [m for m in report.matrices if m.expected_growth is not None]
    if known:
        low = min(known, key=lambda m: m.expected_growth or 0.0)
        high = max(known, key=lambda m: m.expected_growth or 0.0)
        said += (
            f" Expected growth per layer from {signed(low.expected_growth or 0.0)} ({printable(low.name)}) to "
            f"{signed(high.expected_growth or 0.0)} ({printable(high.name)}) nats."
        )
    return said


def plain(report: WeightsReport, width: int = 110) -> str:
    """The report as text without colors, in lines of about ``width`` characters."""
    lines = aligned(rows(report, width), text=range(3))
    return "\n".join(
        [f"{printable(report.name)}: WEIGHTS ONLY", summary(report), report.label, "", *lines, "", legend(report)]
    )
