"""Faults of one matrix planted into stock models: ``python -m tests.diagnosis.planted [--only PATTERN]``.

A matrix of one block is made twenty times as large or as small, in eval and in train mode. The fault is found when
something at warning or above names the matrix, its module or its block, and first when nothing else is named before.
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections import Counter

import torch
from torch import nn

from stabkit.diagnosis import Finding, examine
from stabkit.diagnosis.finding import serious
from stabkit.tracing import trace
from tests.diagnosis.silence import MODES, named, stock
from tests.models.zoo import Subject

FACTORS = (20.0, 0.05)
QUICK = (
    r"^transformers (bert|distilbert|electra|deberta_v2|mpnet|gpt2|gpt_neox|gptj|opt|bloom|llama|mistral|qwen2|qwen3)$"
    r"|^transformers (phi|t5 encoder|vit|dinov2|siglip vision|convnextv2|clip text)$"
    r"|^timm (test_(vit|convnext|resnet|efficientnet)|deit_tiny.*|eva02_tiny.*|fasternet_t0)$"
    r"|^torchvision (resnet18|shufflenet.*)$"
)


def places(model: nn.Module, count: int) -> list[str]:
    """Matrices of numbered blocks, spread over depth and over the roles that they have."""
    found = [
        name
        for name, p in model.named_parameters()
        if p.dim() > 1 and name.endswith("weight") and re.search(r"\.\d+\.", name) and "embed" not in name
    ]
    return found[len(found) // (2 * count) :: max(1, len(found) // count)][:count]


def names(finding: Finding, path: str) -> bool:
    """Whether a finding is about this matrix: its module, the block that it is in, or an action upon it."""
    touched = {str(action.get("parameter", "")) for action in finding.actions}
    inside = bool(finding.module_path) and path.startswith(f"{finding.module_path}.")
    return len(finding.steps) < 4 and (inside or path in touched or path in finding.evidence)


def answer(subject: Subject, mode: str, place: int, factor: float, count: int) -> str:
    """``"first"``, ``"found"``, ``"other"`` where something else was said, or ``"missed"``."""
    torch.manual_seed(0)
    model, args, kwargs = subject.build()
    path = places(model.train(mode == "train"), count)[place]
    with torch.no_grad():
        model.get_parameter(path).mul_(factor)
    flow = trace(model, *args, kwargs=kwargs, target=subject.target, check=False, **subject.options)
    said = [finding for finding in examine(flow).findings if serious(finding)]
    right = [names(finding, path) for finding in said]
    return "first" if right[:1] == [True] else "found" if any(right) else "other" if said else "missed"


def main() -> None:
    """One line per model: what became of its faults."""
    parser = argparse.ArgumentParser(prog="python -m tests.diagnosis.planted", description=__doc__)
    parser.add_argument("--only", default=QUICK, metavar="PATTERN", help="regular expression on family and name")
    parser.add_argument("--places", type=int, default=3)
    wanted = parser.parse_args()
    warnings.simplefilter("ignore")
    total = Counter[str]()
    for subject in stock():
        if not re.search(wanted.only, f"{subject.family} {subject.name}"):
            continue
        began, counts = time.process_time(), Counter[str]()
        for mode in MODES:
            for place in range(len(places(subject.build()[0], wanted.places))):
                counts += Counter(answer(subject, mode, place, by, wanted.places) for by in FACTORS)
        total += counts
        print(f"{time.process_time() - began:6.1f}s {named(subject):45s} {dict(counts)}", flush=True)
    print(f"{sum(total.values())} faults: {dict(total)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
