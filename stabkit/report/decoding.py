"""A report read back from its JSON data, field by field, with the place of anything that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stabkit.diagnosis import Finding
from stabkit.errors import ReportError
from stabkit.report import encoding
from stabkit.report.schema import SCHEMA, Exponents, Report, StepReport

Decoder = Callable[[Any], Any]


def report(data: Any, origin: str) -> Report:
    """A report from the data of its JSON file.

    Args:
        data: what ``json.loads`` returned.
        origin: where it came from, for the messages.

    Raises:
        ReportError: another schema, a missing key, or a value of the wrong type.
    """
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        found = f"schema {schema!r}" if schema else "no schema"
        raise ReportError(
            f"{origin}: not a report that this version reads: found {found}, expected {SCHEMA!r}; "
            "analyse the model again, or read it with the version of stabkit that wrote it"
        )
    read: Report = _record(data, Report, _REPORT, origin)
    return read


def _record(data: Any, cls: Callable[..., Any], decoders: Mapping[str, Decoder], place: str) -> Any:
    """``cls`` from an object with one decoder per key; keys without a decoder are from a later minor version."""
    values: dict[str, Any] = {}
    for key, decode in decoders.items():
        where = f"{place}: {key}"
        if not isinstance(data, dict):
            raise ReportError(f"{place}: expected an object, found {encoding.shorten(data)}")
        if key not in data and key in _LATER:
            continue
        if key not in data:
            raise ReportError(f"{where} is missing; the file is not a whole {SCHEMA}")
        try:
            values[key] = decode(data[key])
        except (TypeError, OverflowError) as error:
            raise ReportError(f"{where}: {error}") from error
        except ReportError as error:
            raise ReportError(f"{where}{error}") from error
    try:
        return cls(**values)
    except ValueError as error:
        raise ReportError(f"{place}: {error}") from error


def _optional(decode: Decoder) -> Decoder:
    return lambda value: None if value is None else decode(value)


def _tuple_of(decode: Decoder) -> Decoder:
    return lambda value: tuple(decode(item) for item in encoding.listing(value))


def _records(cls: Callable[..., Any], decoders: Mapping[str, Decoder]) -> Decoder:
    def decode(value: Any) -> tuple[Any, ...]:
        items = enumerate(encoding.listing(value))
        return tuple(_record(item, cls, decoders, f"[{index}]") for index, item in items)

    return decode


def _numbers(value: Any) -> dict[str, float]:
    return {name: encoding.number(item) for name, item in encoding.mapping(value).items()}


def _plain(value: Any) -> dict[str, Any]:
    return dict(encoding.mapping(value))


def _blocks(value: Any) -> dict[str, Any]:
    rows = _tuple_of(_tuple_of(encoding.number))
    return {name: rows(block) for name, block in encoding.mapping(value).items()}


_strings = _tuple_of(encoding.text)
_shapes = _tuple_of(_tuple_of(encoding.integer))

_STEP: dict[str, Decoder] = {
    "index": encoding.integer,
    "name": encoding.text,
    "module_path": encoding.text,
    "kind": encoding.text,
    "source_shapes": _shapes,
    "target_shapes": _shapes,
    "source_size": encoding.integer,
    "target_size": encoding.integer,
    "method": encoding.text,
    "skip": _optional(encoding.number),
    "evidence": encoding.text,
    "residual": _optional(encoding.number),
    "z": _optional(_tuple_of(encoding.complex_number)),
    "field_z": _optional(_tuple_of(_tuple_of(encoding.complex_number))),
    "numerical_range": _optional(_tuple_of(encoding.complex_number)),
    "spectral_radius": _optional(encoding.number),
    "largest_singular_value": _optional(encoding.number),
    "outside_share": _optional(encoding.number),
    "spectrum_method": encoding.text,
    "spectrum_converged": encoding.boolean,
    "growth": encoding.number,
    "growth_interval": encoding.interval,
    "gradient_norm": encoding.number,
    "state_norm": encoding.number,
    "gradient_norm_interval": _optional(encoding.interval),
    "state_norm_interval": _optional(encoding.interval),
    "parameter_gradient_norm": _optional(encoding.number),
    "step_size": _optional(encoding.number),
    "convention": encoding.text,
    "after": _strings,
    "tableau": _optional(_blocks),
    "stage_fields": _tuple_of(encoding.integer),
    "attribution": _optional(_numbers),
    "mechanism": _optional(_numbers),
    "margin": _optional(encoding.number),
    "step_factor": _optional(encoding.number),
    "operations": _strings,
    "notes": _strings,
}

_EXPONENTS: dict[str, Decoder] = {
    "exponents": _tuple_of(_tuple_of(encoding.number)),
    "standard_errors": _tuple_of(_tuple_of(encoding.number)),
    "converged": _tuple_of(_tuple_of(encoding.boolean)),
    "local_growth": _tuple_of(_tuple_of(_tuple_of(encoding.number))),
}

_FINDING: dict[str, Decoder] = {
    "kind": encoding.text,
    "severity": encoding.text,
    "steps": _tuple_of(encoding.integer),
    "module_path": encoding.text,
    "confidence": encoding.number,
    "evidence": encoding.text,
    "remedy": encoding.text,
    "reference": encoding.text,
    "numbers": _plain,
    "actions": _tuple_of(_plain),
}

_REPORT: dict[str, Decoder] = {
    "model": encoding.text,
    "verdict": encoding.text,
    "summary": encoding.text,
    "findings": _records(Finding, _FINDING),
    "steps": _records(StepReport, _STEP),
    "total_growth": encoding.number,
    "total_growth_interval": encoding.interval,
    "chain_error": encoding.number,
    "n_parameters": encoding.integer,
    "dtype": encoding.text,
    "device": encoding.text,
    "mode": encoding.text,
    "loss": encoding.text,
    "seed": encoding.integer,
    "seconds": encoding.number,
    "thresholds": _plain,
    "explained": _plain,
    "rate_law": _plain,
    "lyapunov": _optional(lambda value: _record(value, Exponents, _EXPONENTS, "")),
    "output_gradient_norm": _optional(encoding.number),
    "output_gradient_norm_interval": _optional(encoding.interval),
    "output_state_norm": _optional(encoding.number),
    "output_state_norm_interval": _optional(encoding.interval),
    "notes": _strings,
    "versions": _plain,
}

# keys that reports of the same schema written earlier do not have
_LATER = {
    *("parameter_gradient_norm", "step_size", "convention", "after", "attribution", "mechanism", "margin"),
    *(
        "step_factor",
        "operations",
        "explained",
        "rate_law",
        "numbers",
        "actions",
        "numerical_range",
        "field_z",
        "tableau",
    ),
    "lyapunov",
    *("stage_fields", "gradient_norm_interval", "state_norm_interval"),
    *("output_gradient_norm", "output_gradient_norm_interval", "output_state_norm", "output_state_norm_interval"),
}
