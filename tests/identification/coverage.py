"""The coverage table: families of architectures, and which method is read of each, with what evidence.

    python -m tests.identification.coverage examples/architectures.md

Each architecture is written as its paper's repository writes it (`tests.identification.paper_models`), traced and read
without a hint. The table is made of what was read, whether right or not.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

from tests.identification.paper import Paper
from tests.identification.paper_models import PAPERS

FAMILIES: dict[str, str] = {  # patterns of names of rows; the first that fits counts
    "samplers and solvers": r"ODENet|torchdiffeq|Neural CDE|van der Pol|Lotka|HNN|AB2|ETD1|BDF2|SDE-Net",
    "implicit layers": r"implicit|Crank|DEQ|monDEQ",
    "reversible and Hamiltonian": r"RevNet|RealNVP|NICE|Glow|H1-DNN|H2-DNN|leapfrog",
    "graph networks": r"PDE-GCN|GRAND|GraphCON|APPNP",
    "state-space models and linear attention": r"S4|LRU|Mamba|RetNet|DeltaNet|linear attention",
    "recurrent cells": r"RNN|coRNN|UnICORNN|LEM|CfC|LTC|GRUCell",
    "residual streams that are mixed": r"DenseFormer|hyper|ResFormer|nanogpt|LAuReL",
    "transformer layers": r"Macaron|Conformer|norm|NeoX|Gemma|DiT|MoE|MoD|nGPT|Transformer|Monarch|looped",
    "residual and plain networks": r"",
}
_WORDS = {"R": "", "P": " (a part of it)", "U": ", not read", "W": ", WRONG"}


def family_of(paper: Paper) -> str:
    """The family of an architecture."""
    return next(family for family, pattern in FAMILIES.items() if re.search(pattern, paper.name))


def table() -> str:
    """The table in Markdown."""
    rows: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for paper in PAPERS:
        record = paper.record()
        verdict = paper.verdict(record)
        method = "-" if verdict == "U" else re.sub(r" = -?[\d.e-]+", "", record.name)
        evidence = "unknown" if verdict == "U" else record.evidence
        rows[family_of(paper)][f"{method} | {evidence}"].append(f"{paper.name}{_WORDS[verdict]}")
    lines = ["| family | architectures | method | evidence |", "|---|---|---|---|"]
    for family in FAMILIES:
        for reading, names in sorted(rows[family].items(), key=lambda item: (item[0].startswith("-"), item[0])):
            lines.append(f"| {family} | {'; '.join(names)} | {reading} |")
    return "\n".join(lines)


def page() -> str:
    """The table with what it says."""
    return f"""# Which method is read of which architecture

{len(PAPERS)} architectures as their repositories write them, traced and read without a hint. "proven" holds for every
input, "measured" for the one at hand; where nothing was read the reading says "unknown". Made by
`python -m tests.identification.coverage examples/architectures.md`.

{table()}
"""


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page())
    else:
        print(page())
