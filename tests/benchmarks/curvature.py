"""The largest curvature of a loss against its peers, interleaved: ``python -m tests.benchmarks.curvature [rounds]``.

Peers: ``pip install curvlinops-for-pytorch hessian-eigenthings pyhessian``; curvlinops is used with
``scipy.sparse.linalg.eigsh``. All look for the largest eigenvalue to 1e-3, on the same model, batch and loss, with the
threads that the environment gives; of each peer the loosest tolerance is taken with which it gets there, and one that
never does is no peer of that model. Of the largest model, each product of which takes seconds, and each row of a basis
500 MB, there is one round, and a peer that has taken 1.5 times as long as stabkit is stopped: its row then says more
than how much (``>``), and the ratio less than how much (``<``).
Printed are medians of wall time in training steps (forward and backward on the same batch) with the smallest and
largest, the same in processor time (with one thread, OMP_NUM_THREADS=1, that is the figure where other work runs beside
it), products of each, and the ratio to the fastest peer within a round.
``memory NAME`` instead prints the peak of resident memory of a process that makes one training step, and of one that
asks for the sharpness.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from stabkit.curvature import sharpness

TOL = 1e-3
LARGE = 10**8  # parameters
LONGER = 1.5  # times the processor time of stabkit that a peer may take of such a model: 1 / 1.5 is below the goal
GOAL = 0.7
Answer = tuple[float, int]  # the eigenvalue and the products


class Logits(nn.Module):
    """A language model that returns its logits, one row a token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)


class TooLongError(Exception):
    """A peer was stopped."""


@dataclass
class Allowance:
    """What a peer may take: it is asked before every product.

    Attributes:
        until: the processor time at which it is stopped.
        made: how many products there were.
    """

    until: float = math.inf
    made: int = 0

    def __call__(self) -> None:
        if time.process_time() > self.until:
            raise TooLongError
        self.made += 1


NO_END = Allowance()


@dataclass
class Case:
    model: nn.Module
    x: Tensor
    y: Tensor

    def loss(self, output: Tensor) -> Tensor:
        return functional.cross_entropy(output, self.y)

    def step(self) -> None:
        self.loss(self.model(self.x)).backward()
        self.model.zero_grad()

    def adam(self) -> None:
        optimizer = torch.optim.Adam(self.model.parameters(), foreach=False)
        self.loss(self.model(self.x)).backward()
        optimizer.step()


def mlp() -> Case:
    layers = [m for _ in range(6) for m in (nn.Linear(128, 128), nn.Tanh())]
    return Case(nn.Sequential(*layers, nn.Linear(128, 10)), torch.randn(256, 128), torch.randint(10, (256,)))


def resnet18() -> Case:
    import torchvision

    model = torchvision.models.resnet18(weights=None, num_classes=10)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    return Case(model.eval(), torch.randn(8, 3, 64, 64), torch.randint(10, (8,)))


def gpt2() -> Case:
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(attn_implementation="eager")
    tokens = torch.randint(3, 50000, (1, 129))
    return Case(Logits(transformers.GPT2LMHeadModel(config)).eval(), tokens[:, :-1], tokens[0, 1:])


def ours(case: Case, tol: float = TOL, _: Allowance = NO_END) -> Answer:
    found = sharpness(case.model, case.x, loss=case.loss, tol=tol, own=0)
    return float(found.values[0]), found.n_products


def curvlinops(case: Case, tol: float, asked: Allowance) -> Answer:
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import LinearOperator, eigsh

    parameters = [p for p in case.model.parameters() if p.requires_grad]
    operator = HessianLinearOperator(
        case.model, nn.CrossEntropyLoss(), parameters, [(case.x, case.y)], check_deterministic=False
    ).to_scipy()

    def product(v: np.ndarray) -> np.ndarray:
        asked()
        return operator @ v

    start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(np.float32)
    counted = LinearOperator(operator.shape, matvec=product, dtype=np.float32)
    return float(eigsh(counted, 1, which="LA", tol=tol, v0=start, return_eigenvectors=False)[0]), asked.made


def eigenthings(case: Case, tol: float, asked: Allowance) -> Answer:
    import hessian_eigenthings as peer

    class Counted(peer.HessianOperator):  # type: ignore[misc,name-defined]
        def matvec(self, v: Tensor) -> Tensor:
            asked()
            found: Tensor = super().matvec(v)
            return found

    operator = Counted(case.model, [(case.x, case.y)], peer.supervised_loss(nn.CrossEntropyLoss()))
    most = {TOL: 10, 1e-4: 20, 1e-5: 50, 1e-6: 100}[tol]  # by itself it stops after two
    found = peer.lanczos(operator, k=1, which="LA", tol=tol, seed=0, max_iter=most)
    return float(found.eigenvalues[0]), asked.made


def pyhessian(case: Case, tol: float, asked: Allowance) -> Answer:
    import pyhessian as peer

    module: Any = sys.modules["pyhessian.hessian"]
    inner = module.hessian_vector_product

    def product(*arguments: Any) -> Any:
        asked()
        return inner(*arguments)

    try:
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(module, "hessian_vector_product", product):
            operator = peer.hessian(case.model, nn.CrossEntropyLoss(), data=(case.x, case.y), cuda=False)
            value = operator.eigenvalues(maxIter=100, tol=tol, top_n=1)[0][0]
    finally:
        case.model.zero_grad()
    return float(value), asked.made


CASES = {"mlp": mlp, "resnet18": resnet18, "gpt2": gpt2}
Way = Callable[[Case, float, Allowance], Answer]
WAYS: dict[str, Way] = {
    "stabkit": ours,
    "curvlinops + eigsh": curvlinops,
    "hessian-eigenthings": eigenthings,
    "pyhessian": pyhessian,
}


def seconds(work: Callable[[], Any]) -> tuple[np.ndarray, Any]:
    """Wall and processor time."""
    began = np.array([time.perf_counter(), time.process_time()])
    found = work()
    return np.array([time.perf_counter(), time.process_time()]) - began, found


def timed(work: Way, case: Case, tol: float, most: float) -> tuple[np.ndarray, Answer]:
    """Seconds and the answer, NaN where it was stopped after so many seconds of processor time."""
    asked = Allowance(time.process_time() + most)

    def answer() -> Answer:
        try:
            return work(case, tol, asked)
        except TooLongError:
            return math.nan, asked.made

    return seconds(answer)


def tolerance(work: Way, case: Case, truth: float, most: float) -> tuple[float, np.ndarray, Answer]:
    """The loosest one with which the answer is right to 1e-3, or the tightest that is tried; time and answer of it.

    One with which it was stopped is the last: a tighter one takes longer.
    """
    for tol in (TOL, 1e-4, 1e-5, 1e-6):
        taken, answer = timed(work, case, tol, most)
        if abs(answer[0] / truth - 1) <= TOL or math.isnan(answer[0]):
            break
    return tol, taken, answer


def compare(name: str, rounds: int) -> None:
    """One row; the first round is that in which the tolerances were found, so that one round is cheap."""
    for package in ("curvlinops", "scipy.sparse.linalg", "hessian_eigenthings", "pyhessian"):
        importlib.import_module(package)  # which takes no part of the time
    torch.manual_seed(0)
    case = CASES[name]()
    count = sum(p.numel() for p in case.model.parameters())
    large = count > LARGE
    rounds = 1 if large else rounds
    for _ in range(2):
        case.step()
    truth = ours(case, 1e-4 if large else 1e-5)[0]
    times: dict[str, list[np.ndarray]] = {way: [] for way in WAYS}
    tolerances: dict[str, float] = {}
    answers: dict[str, Answer] = {}
    for number in range(rounds):
        unit = np.median([seconds(case.step)[0] for _ in range(3)], axis=0)
        most = math.inf
        for way, work in WAYS.items():
            if number == 0:
                tolerances[way], taken, answers[way] = tolerance(work, case, truth, most)
            else:
                taken, answers[way] = timed(work, case, tolerances[way], most)
            times[way].append(taken / unit)
            if large and way == "stabkit":
                most = LONGER * taken[1]
    print(f"{name}: {count:,} parameters, {rounds} round{'s' * (rounds > 1)}")
    for way, (value, products) in answers.items():
        stopped = math.isnan(value)
        more, of = ("> ", f"stopped after {products} products") if stopped else ("", f"{products} products")
        wall, processor = np.transpose(times[way])
        print(
            f"  {way:20} {more}{np.median(wall):.1f} steps ({wall.min():.1f} to {wall.max():.1f}), of processor time "
            f"{more}{np.median(processor):.1f}, {of}, tolerance {tolerances[way]:.0e}"
            + ("" if stopped else f", error {abs(value / truth - 1):.0e}")
        )
    right = [way for way in WAYS if way != "stabkit" and not abs(answers[way][0] / truth - 1) > TOL]
    finished = [way for way in right if not math.isnan(answers[way][0])]
    if right:
        best, less = np.min([times[way] for way in finished or right], axis=0), "" if finished else "< "
        wall, processor = np.transpose(np.array(times["stabkit"]) / best)
        spread = f"({wall.min():.2f} to {wall.max():.2f})"
        told = f"{less}{np.median(wall):.2f} {spread}, by processor time {less}{np.median(processor):.2f}"
        print(f"  over the fastest peer: {told}; goal {GOAL}", flush=True)


def memory(name: str) -> None:
    code = (
        "import torch; from tests.benchmarks import curvature as c; torch.manual_seed(0); case = c.CASES[{name!r}]();"
        "c.{work}; print(c.peak())"
    )
    found = []
    for work in ("seconds(lambda: None)", "seconds(case.step)", "seconds(case.adam)", "ours(case)"):
        command = [sys.executable, "-c", code.format(name=name, work=work)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(int(done.stdout.split()[-1]) / 1024)
    base, step, adam, mine = found
    weights = sum(p.numel() * p.element_size() for p in CASES[name]().model.parameters()) / 2**20
    of_step, of_adam, of_ours = (weights + each - base for each in (step, adam, mine))
    print(f"{name}: weights {weights:.0f} MB; a training step {of_step:.0f} MB, one of Adam {of_adam:.0f} MB")
    print(f"  the sharpness {of_ours:.0f} MB: {of_ours / of_step:.2f} and {of_ours / of_adam:.2f} times that")


def peak() -> int:
    """Kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    if sys.argv[1:2] == ["memory"]:
        for each in sys.argv[2:] or CASES:
            memory(each)
    else:
        count = int(sys.argv[1]) if sys.argv[1:] else 5
        for each in sys.argv[2:] or CASES:
            compare(each, count)
