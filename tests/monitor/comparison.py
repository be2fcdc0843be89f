"""The monitor beside other tools, on the same failing runs: python -m tests.monitor.comparison [FILE]

The others are transformers' ``DebugUnderflowOverflow``, diagnostics such as icefall's (written out here from their
public description) and ignite's ``GradsScalarHandler`` with ``TerminateOnNan``. A small network on digits, and one of
attention, are trained; in the middle, at training step N, something is done to them. A row tells when a tool first
spoke and what it said, whether that names the cause and the place, and when its numbers show it to who reads them.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.monitor.other_tools import EVERY, TOOLS, Heard, Tool, installed
from tests.monitor.stories import AT, OPTIMIZERS, SPOIL, STEPS, Attends, Batches, Network, schedule

SEEN = 10.0  # a number shows a fault where it is so many times the largest before; a choice, the same for every tool


def overflow(model: nn.Module) -> Any:
    """What makes the outputs of the third layer 100 000 times as large, so that they are infinite in float16."""
    calls = [0]

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls[0] += 1
        return output * 1e5 if calls[0] > AT else output

    return model.layers[2].register_forward_hook(after)


SPOILED = {**SPOIL, "half": overflow}


NOTHING = r"(?!)"


@dataclass(frozen=True)
class Story:
    """A run, what is done to it, and the words that name it (in place of those of a remedy)."""

    title: str
    fault: str
    optimizer: str
    cause: str = NOTHING
    place: str = NOTHING
    sample: int = 3  # the one that is spoiled


INPUT = r"\binput\b|layers\.0\.0\.output"
STORIES = (
    Story("learning rate x100, SGD", "rate", "SGD", "learning rate jumped"),
    Story("learning rate x100, Adam", "rate", "Adam", "learning rate jumped"),
    Story("one sample x10^6, SGD", "sample", "SGD", "batch is out of range", INPUT),
    Story("one sample x10^6, Adam", "sample", "Adam", "batch is out of range", INPUT, 4),
    Story("one sample x10^6 that does no harm, Adam", "sample", "Adam", "batch is out of range", INPUT),
    Story("a NaN in the data, Adam", "nan", "Adam", r"batch holds a number|\binput\[0\] has nans", INPUT),
    Story("growing attention logits, Adam", "attention", "Adam", "attention logit", r"layers\.1\b"),
    Story("float16 gradients overflow, Adam", "scaler", "Adam", r"gradient.*(infinite|not finite)", r"layers\.2\b"),
    Story("float16 activations overflow, Adam", "half", "Adam", r"layers\.2.*(has infs|not finite)", r"layers\.2\b"),
    Story("healthy, SGD", "", "SGD"),
    Story("healthy, Adam", "", "Adam"),
    Story("healthy attention, Adam", "calm attention", "Adam"),
)


@dataclass(frozen=True)
class Row:
    """What became of a run under a tool; steps count from the fault, None where it never came."""

    said: int | None
    early: int  # steps before the fault at which it spoke
    words: str
    cause: bool
    place: int | None
    lines: int
    shown: int | None
    losses: tuple[float, ...]


def told(story: Story, tool: type[Tool]) -> Row:
    """One run under one tool."""
    fault = story.fault
    model = Attends() if "attention" in fault else Network()
    if fault in SPOILED:
        SPOILED[fault](model)
    data = Batches(fault)
    if fault == "sample":
        data.x[AT * 32 + story.sample] *= 1e6
    optimizer = OPTIMIZERS[story.optimizer](model.parameters())
    rates, half = schedule(optimizer, fault), fault in ("scaler", "half")
    scaler = torch.amp.GradScaler("cpu", enabled=half, growth_interval=20)
    heard, losses = Heard(), []

    def step(batch: Any) -> float:
        heard.step = len(losses)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = model(**batch)["loss"]
        scaler.scale(loss).backward()
        watching.watch(loss)
        scaler.step(optimizer)
        scaler.update()
        rates.step()
        losses.append(loss.item())
        return losses[-1]

    with warnings.catch_warnings(), contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        watching = tool(model, optimizer, scaler, heard)
        watching.drive(step, torch.utils.data.DataLoader(data, 32))
        watching.close()
    return judged(story, watching, losses)


def judged(story: Story, tool: Tool, losses: list[float]) -> Row:
    """What was heard of a run, and what its numbers show."""
    said: dict[int, list[str]] = {}
    for step in sorted(tool.heard.by_step):
        lines = tool.heard.lines(step)
        found = [match for match in (re.search(tool.alarm, line) for line in lines) if match]
        if found:
            # the module that the last frame of DebugUnderflowOverflow is about stands on a line of its own
            modules = [line.strip() for line in lines if re.fullmatch(r" {18}\S+ \w+", line)]
            words = [match["words"] for match in found]
            said[step] = [f"{modules[-1]}: {words[0]}", *words[1:]] if modules else words
    early, said = sum(step < AT for step in said), {step: words for step, words in said.items() if step >= AT}
    first = min(said, default=None)
    evidence = {step: " ".join(line.split("What to do")[0] for line in lines) for step, lines in said.items()}
    place = next((step for step in said if re.search(story.place, evidence[step])), None)
    shown = loud(tool.numbers)
    return Row(
        said=None if first is None else first - AT,
        early=early,
        words="" if first is None else said[first][0],
        cause=first is not None and re.search(story.cause, evidence[first]) is not None,
        place=None if place is None else place - AT,
        lines=sum(len(tool.heard.lines(step)) for step in list(tool.heard.by_step)),
        shown=None if shown is None else shown - AT,
        losses=tuple(losses),
    )


def loud(numbers: dict[int, dict[str, float]]) -> int | None:
    """The first step from the fault on with a number that is not finite, or ``SEEN`` times outside its range."""
    range_of: dict[str, tuple[float, float]] = {}
    for step in sorted(numbers):
        for name, value in numbers[step].items():
            low, high = range_of.get(name, (0.0, math.inf))
            if step >= AT and not (math.isfinite(value) and low / SEEN <= abs(value) <= SEEN * high):
                return step
            if math.isfinite(value):
                ends = (abs(value), *(range_of.get(name, ())))
                range_of[name] = min(ends), max(ends)
    return None


NOTES = """## What each is better for

**stabkit.Monitor.** Alone of the four it looks at the rate and the batch beside the network, so that it can say why and
not only that. It does not look within its blocks: of what becomes infinite it names the block or the two blocks between
which it does, and not the module in them. Attention logits that grow by a factor at every step it tells on their way,
three steps after, and those that grow slowly where they come to 200. It leaves a run going unless the loop asks
`monitor.step(loss).healthy`.

**DebugUnderflowOverflow.** Better for where a forward pass breaks: it names the module, and which of its weights,
inputs and outputs is not finite, with the sizes in the 21 frames before, and stops there; of float16 activations it is
the best answer of the four. It sees no gradients, no loss and nothing that stays finite; its documentation has it for
the rerun of a run that broke.

**icefall-like diagnostics.** Better for looking at a network as a whole: levels of all modules, both ways, by channel,
and of the four the only one that names the layer whose gradient overflows first. It judges nothing but what is not
finite, also an overflow that a scaler mends by itself, prints most, and its tables have to be read side by side
(icefall prints one and ends; here they go on).

**ignite.** Better for charts in a loop that is ignite's: the gradient of every parameter at every training step, which
shows most of these faults to who looks, within a step of the monitor's records, and a stop where the loss is NaN. It
names neither cause nor place, and speaks only at the end.
"""


def at(step: int | None) -> str:
    return "never" if step is None else f"N + {step}"


def became(losses: tuple[float, ...]) -> str:
    """What became of a run that nothing watched."""
    broken = next((step for step, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if broken is not None:
        return f"not finite at {at(broken - AT)}"
    return f"{np.median(losses[AT - 10 : AT]):.2g} to {np.median(losses[-10:]):.2g}"


def cells(story: Story, row: Row) -> list[str]:
    """A row of the table, from when a tool spoke to when its numbers show it."""
    words = row.words if len(row.words) <= 150 else row.words[:147].rsplit(" ", 1)[0] + " ..."
    before = f", and at {row.early} before" if row.early else ""
    if row.said is None:
        return [f"never{before}", "", "", "", str(row.lines), at(row.shown)]
    if story.place == NOTHING:
        place = ""
    elif row.place is not None:
        place = "yes" if row.place == row.said else f"at {at(row.place)}"
    else:
        place = "another" if re.search(r"layers\.\d|head", row.words) else "no"
    return [
        at(row.said) + before,
        words.replace("|", "/"),
        "yes" if row.cause else "no",
        place,
        str(row.lines),
        at(row.shown),
    ]


def page(stories: tuple[Story, ...] = STORIES) -> str:
    """The comparison in Markdown."""
    lines = [
        "# The monitor beside other tools",
        "",
        f"The same runs under four ways of watching, {STEPS} training steps each; something is done to them at",
        f"training step N = {AT}. Made by `python -m tests.monitor.comparison examples/monitors_compared.md`.",
        "",
        "*said*: the training step of the first warning. *cause*, *place*: whether what it said until then names what",
        "was done, and the module (or the input) where; advice does not count. *lines*: printed in all. *shows*: the",
        f"first step at which a number that it logs or prints is not finite or {SEEN:.0f} times outside of the range",
        f"before, for one who reads them. The monitor records every {EVERY}th step, the diagnostics print a table as",
        "often. *loss*: of the run that nothing watches, the median of ten steps before N and of the last ten.",
        "",
        "| run | loss | tool | said | words | cause | place | lines | shows |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for story in stories:
        title, loss = story.title, became(told(story, Tool).losses)
        for tool in TOOLS:
            found = cells(story, told(story, tool)) if installed(tool) else ["not installed", *[""] * 5]
            lines.append("| " + " | ".join([title, loss, tool.name, *found]) + " |")
            title = loss = ""
    lines += [
        "",
        "The one sample under Adam is one that the network takes for another digit; one that it gets right is the run",
        "after it, where silence is right.",
    ]
    return "\n".join([*lines, "", NOTES])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", help="where the page goes too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = page()
    print(text, end="")
    if options.file:
        Path(options.file).write_text(text)


if __name__ == "__main__":
    main()
