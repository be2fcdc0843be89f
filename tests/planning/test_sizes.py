from __future__ import annotations

import pytest

from stabkit.errors import StabkitError
from stabkit.planning import sizes


@pytest.mark.parametrize(
    ("given", "expected"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("2d", 172800), (0.5, 0.5), ("10 min", 600)]
)
def test_durations_are_read_in_their_units(given, expected):
    assert sizes.seconds(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"), [("512M", 2**29), ("8G", 2**33), ("8GiB", 2**33), ("1kb", 1024), (7, 7)]
)
def test_amounts_of_memory_are_read_in_units_of_1024(given, expected):
    assert sizes.n_bytes(given) == expected


@pytest.mark.parametrize("given", ["", "ten", "-5m", "10 parsecs", 0, -1, True, float("nan"), "1e3"])
def test_a_budget_that_is_no_duration_is_refused_with_what_is_accepted(given):
    with pytest.raises(StabkitError, match=r"budget=.*90s, 10m, 1\.5h"):
        sizes.seconds(given)


@pytest.mark.parametrize("given", ["", "8X", "-1G", 0, None])
def test_memory_that_is_no_amount_is_refused(given):
    with pytest.raises(StabkitError, match=r"memory=.*512M, 8G"):
        sizes.n_bytes(given)
