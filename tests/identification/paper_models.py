"""Architectures in the idiom of their papers' repositories, and what is read off them.

``python -m tests.identification.paper_models`` prints a row for each: R right, P partly, W wrong though proven or
measured, U an honest unknown.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections import Counter

from . import paper_depth_models, paper_sequence_models, paper_transformers
from .paper import Paper

PAPERS: tuple[Paper, ...] = (*paper_depth_models.ROWS, *paper_sequence_models.ROWS, *paper_transformers.ROWS)


def main(pattern: str = "") -> int:
    """Print the table; 1 when a row is wrong though proven or measured."""
    verdicts: Counter[str] = Counter()
    for paper in PAPERS:
        if not re.search(pattern, paper.name):
            continue
        try:
            found = paper.record()
        except Exception as error:  # a crash is a row of the table
            verdicts["W"] += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f"W {paper.name:28s} {type(error).__name__}: {str(error)[:60]} ({where.name}:{where.lineno})")
            continue
        verdict = paper.verdict(found)
        verdicts[verdict] += 1
        h = "-" if found.step_size is None else f"{found.step_size:.3g}"
        print(f"{verdict} {paper.name:28s} {found.name[:58]:58s} {h:>6s} {found.evidence}", flush=True)
    print(", ".join(f"{verdict} {count}" for verdict, count in sorted(verdicts.items())))
    return int(verdicts["W"] > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
