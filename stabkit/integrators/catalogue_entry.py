"""What a catalogue entry is: a name, how to build the method, and where it is from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stabkit.integrators.linear_stability import LinearStability


@dataclass(frozen=True)
class Entry:
    """One method, or one family of methods with parameters.

    Attributes:
        name: the name that resolves to it.
        build: makes the method; takes the parameters as keywords.
        source: where the coefficients or the reading are from.
        aliases: other names.
        defaults: the parameters and their default values.
        family: the heading under which it is listed.
    """

    name: str
    build: Callable[..., LinearStability]
    source: str
    aliases: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""
