"""The confusion table: ``python -m tests.diagnosis.confusion [--fast]``.

Healthy networks must raise nothing at warning or above, faulty ones must have their fault found, a local one at its
block and first; for three seeds, and for a loss in units of 1e-6, 1 and 1e6 with the same findings.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from stabkit.diagnosis import Diagnosis, examine
from tests.diagnosis.cases import GLOBAL, HEALTHY, LOCAL, Case

SCALES = (1e-6, 1.0, 1e6)


def loss_of(scale: float) -> Callable[[Any], torch.Tensor]:
    """A loss that sees every output, in other units."""

    def loss(out: Any) -> torch.Tensor:
        tensor = out[0] if isinstance(out, tuple) else out
        weights = torch.linspace(-1.0, 1.0, tensor[0].numel(), dtype=tensor.dtype).reshape(tensor[0].shape)
        return scale * (0.5 * tensor.square() + weights * tensor).mean()

    return loss


def serious(diagnosis: Diagnosis) -> list[Any]:
    return [finding for finding in diagnosis.findings if finding.severity != "info"]


def judged(case: Case, block: str, diagnosis: Diagnosis) -> str:
    """``""`` for a right answer, or what is wrong with it."""
    found = serious(diagnosis)
    if not case.kinds:
        return "" if not found else "false alarm: " + ", ".join(f"{f.kind} at {f.module_path}" for f in found)
    if not found:
        return "missed"
    first = found[0]
    if case.local and first.module_path != block:
        return f"named {first.module_path} ({first.kind}), not {block}"
    if case.local and len(first.steps) > 3 and first.kind != "non_finite":
        return f"named {len(first.steps)} steps, not one block"
    if not case.local and len(first.steps) < 3:
        return f"named {first.module_path} ({first.kind}), not the stretch"
    return "" if first.kind in case.kinds else f"found {first.kind}, not {' or '.join(sorted(case.kinds))}"


def answer(case: Case, seed: int, scale: float | None) -> tuple[str, str]:
    """What is wrong with the answer, and the answer as text; ``scale=None`` for random cotangents."""
    network, block = case.build(seed)
    diagnosis = examine(network.flow(), None if scale is None else loss_of(scale))
    listed = "; ".join(f"{f.severity} {f.kind} {f.module_path} {f.steps}" for f in serious(diagnosis))
    return judged(case, block, diagnosis), f"{diagnosis.verdict.name}: {listed or 'none'}"


def main(fast: bool) -> int:
    """Print the table; the number of wrong answers."""
    wrong = 0
    seeds = (0,) if fast else (0, 1, 2)
    for title, cases in (("healthy", HEALTHY), ("local fault", LOCAL), ("global fault", GLOBAL)):
        right = runs = 0
        print(f"\n{title}: {len(cases)} networks")
        for case in cases:
            began = time.process_time()
            faults, first = [], ""
            for seed in seeds:
                answers = [answer(case, seed, scale) for scale in (None, *SCALES)]
                first = first or answers[0][1]
                faults += [f"seed {seed}: {fault}" for fault, _ in answers if fault]
                if len({text for _, text in answers[1:]}) > 1:
                    faults.append(f"seed {seed}: the units of the loss change the findings: {answers[1:]}")
                runs += len(answers)
                right += sum(not fault for fault, _ in answers)
            wrong += len(faults)
            mark = "ok   " if not faults else "WRONG"
            print(f"  {mark} {case.name:30s} {time.process_time() - began:5.1f}s  {first[:110]}")
            for fault in dict.fromkeys(faults):
                print(f"        {fault}")
        print(f"  {right} of {runs} right")
    return wrong


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(1 if main("--fast" in sys.argv) else 0)
