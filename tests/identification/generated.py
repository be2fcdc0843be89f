"""Programs of known method, drawn by the hundred, and how many of them are read right.

``python -m tests.identification.generated --seeds 0:200`` prints the table.
"""

from __future__ import annotations

import argparse
import signal
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

import stabkit
from tests.identification.generated_programs import Program, draw
from tests.identification.generated_text import source
from tests.identification.generated_verdict import Outcome, judge

MARKS = ("right", "part", "unread", "wrong")
LIMIT = 120  # seconds for a program


def build(program: Program) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """The model of a program and its inputs."""
    scope: dict[str, Any] = {"__name__": f"seed_{program.seed}"}
    exec(compile(source(program), f"<seed {program.seed}>", "exec"), scope)
    model, inputs, _ = scope["build"]()
    return model, inputs


def readings_of(program: Program) -> Any:
    """What is told of a program when a user asks."""
    model, inputs = build(program)
    if program.entry == "recurrent_flow":
        return stabkit.identify(stabkit.recurrent_flow(model, *inputs))
    return stabkit.identify(stabkit.trace(model, *inputs, batch_dim=1 if program.order == "time first" else 0))


def read(seed: int) -> Outcome:
    """The outcome of one seed; an error of the reader counts as unread, one of the program is raised."""
    program = draw(seed)
    model, inputs = build(program)
    model(*inputs).sum().backward()
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(LIMIT)
    try:
        readings = readings_of(program)
    except Exception as error:
        return Outcome(program, "unread", f"{type(error).__name__}: {str(error)[:300]}", ())
    finally:
        signal.alarm(0)
    return judge(program, readings)


def _stop(*_: Any) -> None:
    raise TimeoutError(f"no result within {LIMIT} s")


def table(outcomes: list[Outcome]) -> str:
    """How many were right, by every choice, the worst first."""
    groups: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for outcome in outcomes:
        for choice, value in {"all": "all", "runs over": outcome.program.tag, **outcome.program.choices}.items():
            groups[choice][value][outcome.verdict] += 1
    lines = []
    for choice, values in groups.items():
        lines.append(f"{choice:32} {'n':>5} " + " ".join(f"{mark:>7}" for mark in MARKS))
        worst_first = sorted(values.items(), key=lambda item: item[1]["right"] / item[1].total())
        for value, counts in worst_first:
            lines.append(f"  {value:30} {counts.total():5} " + " ".join(f"{counts[mark]:7}" for mark in MARKS))
    return "\n".join(lines)


def main() -> None:
    """Print the table of some seeds."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", default="0:100", help="first:stop")
    parser.add_argument("--show", action="store_true", help="print what was told of every program that is not right")
    parser.add_argument("--write", type=Path, help="a directory for the programs that are not right")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    outcomes = []
    for seed in range(*(int(x) for x in given.seeds.split(":"))):
        began = time.perf_counter()
        outcome = read(seed)
        outcomes.append(outcome)
        if outcome.verdict == "right":
            continue
        if given.show:
            p, took = outcome.program, time.perf_counter() - began
            print(f"{seed} {outcome.verdict} {took:.1f} s [{p.tag}] {p.choices}\n    {outcome.why}")
            print(*outcome.told, sep="\n", flush=True)
        if given.write:
            (given.write / f"seed_{seed}.py").write_text(source(outcome.program))
    print(table(outcomes))


if __name__ == "__main__":
    main()
