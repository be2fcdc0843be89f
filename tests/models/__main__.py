"""``python -m tests.models [--only PATTERN] [--steps]``: examine the zoo and print its table."""

from __future__ import annotations

import argparse
import importlib
import re

from .zoo import Result, Subject, examine, table

COLLECTIONS = ("vision", "language", "perception", "hard_cases")


def subjects() -> list[Subject]:
    """Every subject of every collection that is there."""
    return [subject for name in COLLECTIONS for subject in importlib.import_module(f".{name}", __package__).SUBJECTS]


def line(result: Result) -> str:
    """One subject on one line."""
    steps = f"{result.blocks}/{'-' if result.expected is None else result.expected} of {result.n_steps} steps"
    errors = f"{result.chain_error:.0e} {result.independent_error:.0e} {result.replay_error:.0e}"
    verdict = "ok  " if result.passed else "FAIL"
    return f"{verdict} {result.subject.name:34s} {steps:18s} {errors:24s} {result.seconds:5.1f}s {result.failure}"


def main() -> int:
    """Run what was asked for; the number of failures."""
    parser = argparse.ArgumentParser(prog="python -m tests.models", description=__doc__)
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression on family and name")
    parser.add_argument("--fast", action="store_true", help="only the fast subset")
    wanted = parser.parse_args()
    chosen = [s for s in subjects() if re.search(wanted.only, f"{s.family} {s.name}") and (s.fast or not wanted.fast)]
    results = []
    for subject in chosen:
        results.append(examine(subject))
        print(line(results[-1]), flush=True)
    print(f"\n{table(results)}")
    return sum(not result.passed for result in results)


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
