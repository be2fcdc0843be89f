"""Reports and pictures to and from files; a file is written whole or not at all."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabkit.errors import ReportError
from stabkit.pictures import drawing
from stabkit.report import encoding, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stabkit.report.schema import ReportFields

PICTURES = (".png", ".svg", ".pdf")
SUFFIXES = (".html", ".json", ".csv", *PICTURES)


def save(report: ReportFields, path: str | os.PathLike[str]) -> Path:
    """Write a report in the format that the suffix of ``path`` names; see ``Report.save``."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        return write(path, encoding.lines(report.to_dict()).encode())
    if suffix == ".csv":
        return write(path, tables.csv_text(report).encode())
    if suffix in PICTURES:
        return write_figure(drawing("overview")(report), path)
    if suffix in (".html", ".htm"):
        from stabkit.report.page import report_page

        return write(path, report_page(report).encode())
    raise ReportError(f"{path}: unknown suffix {suffix!r}; accepted: {', '.join(SUFFIXES)}")


def save_all(report: ReportFields, folder: str | os.PathLike[str]) -> list[Path]:
    """``report.html``, ``report.json`` and up to three pictures in a folder, which is made if needed.

    Everything is drawn before anything is written.

    Raises:
        ReportError: the folder or a file in it cannot be written.
    """
    from stabkit.report.page import report_page

    folder = Path(folder)
    contents = {"report.html": report_page(report).encode()}
    contents["report.json"] = encoding.lines(report.to_dict()).encode()
    pictures = ["growth", "gradients"]
    if any(step.z is not None for step in report.steps):  # without eigenvalues a region is an empty frame
        pictures = ["region", *pictures]
    for name in pictures:
        contents[f"{name}.png"] = drawing("render")(drawing("figure_of")(drawing(name)(report)), "png")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"{folder}: the directory cannot be made: {error.strerror}") from error
    return [write(folder / name, content) for name, content in contents.items()]


def read_json(path: str | os.PathLike[str]) -> Any:
    """The data of a JSON file.

    Raises:
        ReportError: there is no such file, or it is not whole.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ReportError(f"{path}: no such file") from None
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ReportError(
            f"{path}: not a whole JSON file ({error}); save the report again with report.save('....json')"
        ) from error


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as ``.png``, ``.svg`` or ``.pdf``; the same figure gives the same bytes.

    Returns:
        The path that was written.

    Raises:
        ReportError: the suffix is another one, or the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in PICTURES:
        raise ReportError(f"{path}: unknown suffix {suffix!r} for a picture; accepted: {', '.join(PICTURES)}")
    return write(path, drawing("render")(figure, suffix.removeprefix(".")))


def write(path: Path, content: bytes) -> Path:
    """Write a file through a temporary neighbour, so that a reader never meets half of it.

    Returns:
        ``path``.

    Raises:
        ReportError: the directory does not exist or the file cannot be written.
    """
    # the rename must not turn a link into a file
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ReportError(f"{path}: the directory {target.parent} does not exist; create it first")
    if target.is_dir():
        raise ReportError(f"{path}: is a directory; name a file in it")
    temporary = target.with_name(f".stabkit-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
        temporary.replace(target)
    except OSError as error:
        raise ReportError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
