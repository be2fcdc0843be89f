"""Networks trained to good accuracy must raise nothing: ``python -m tests.diagnosis.trained [--only PATTERN]``.

One row per kind of network and seed: what it learned, what was said of it fresh and trained, and how long that took.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
import warnings
from collections import Counter

import torch
from torch import nn

from stabkit.diagnosis import Diagnosis, examine
from stabkit.diagnosis.finding import serious
from stabkit.tracing import trace
from tests.diagnosis import further_learners, learners
from tests.diagnosis.learners import Task, data
from tests.diagnosis.soundness import unsound

TASKS = {**learners.TASKS, **further_learners.TASKS}


def trained(task: Task, seed: int = 0) -> tuple[nn.Module, float, Diagnosis, Diagnosis]:
    """The network after training, its score, and what is said of it fresh and trained, in eval mode."""
    torch.manual_seed(seed)
    model, (x, y) = task.make(), data(task.data)
    few, some = x[:16], y[:16]

    def said() -> Diagnosis:
        return examine(trace(model.eval(), few), lambda out: task.loss(out, some))

    fresh = said()
    optimizer = torch.optim.Adam(model.parameters(), task.rate)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(task.steps):
        chosen = torch.randint(0, len(x), (128,), generator=generator)
        optimizer.zero_grad()
        task.loss(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        score = task.good(model(x), y)
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
    parser.add_argument("--seeds", type=int, default=1)
    wanted = parser.parse_args()
    warnings.simplefilter("ignore")
    learned = Counter[str]()
    for seed in range(wanted.seeds):
        for name, task in TASKS.items():
            if re.search(wanted.only, name):
                learned += row(name, task, seed)
    counts = ", ".join(f"{learned[what]} {what}" for what in ("learned", "alarmed fresh", "alarmed trained", "unsound"))
    print(counts)
    return learned["alarmed fresh"] + learned["alarmed trained"] + learned["unsound"]


def row(name: str, task: Task, seed: int) -> Counter[str]:
    """Train and diagnose one network, and print what came of it; only one that learned counts."""
    began = time.process_time()
    _, score, fresh, after = trained(task, seed)
    offences = [*unsound(fresh), *unsound(after)]
    alarms = [[f for f in said.findings if serious(f)] for said in (fresh, after)]
    good = score >= task.least
    mark = "unlearned" if not good else "ALARM" if any(alarms) or offences else "ok"
    seconds = time.process_time() - began
    print(f"{mark:9s} {name:32s} {seed} {score:5.2f} {seconds:5.1f}s  fresh {line(fresh)} | trained {line(after)}")
    for finding in (*alarms[0], *alarms[1]):
        print(f"          {finding.evidence} | {finding.remedy}")
    for offence in offences:
        print(f"          UNSOUND {offence}")
    sys.stdout.flush()
    if not good:
        return Counter()
    return Counter(
        {"learned": 1, "alarmed fresh": bool(alarms[0]), "alarmed trained": bool(alarms[1]), "unsound": len(offences)}
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(min(main(), 1))
