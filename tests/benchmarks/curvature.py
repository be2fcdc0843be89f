"""The largest curvature of a loss against its peers, interleaved: ``python -m tests.benchmarks.curvature [rounds]``.

Peers: ``pip install curvlinops-for-pytorch hessian-eigenthings pyhessian``; curvlinops is used with
``scipy.sparse.linalg.eigsh``. All look for the largest eigenvalue to 1e-3, on the same model, batch and loss, with the
threads that the environment gives; of each peer the loosest tolerance is taken with which it gets there, and one that
never does is no peer of that model. A peer that would take hundreds of products of the largest model is stopped before.
Printed are medians of wall time in training steps (forward and backward on the same batch) with the smallest and
largest, the same in processor time (with one thread, OMP_NUM_THREADS=1, that is the figure where other work runs beside
it), products of each, and the ratio to the fastest peer within a round.
``memory NAME`` instead prints the peak of resident memory of a process that makes one training step, and of one that
asks for the sharpness.
"""

from __future__ import annotations

import contextlib
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
MOST = 60  # products of a peer that may go on for hundreds, each of them seconds of the largest model
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


def ours(case: Case, tol: float = TOL) -> Answer:
    found = sharpness(case.model, case.x, loss=case.loss, tol=tol, own=0)
    return float(found.values[0]), found.n_products


def curvlinops(case: Case, tol: float) -> Answer:
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import LinearOperator, eigsh

    parameters = [p for p in case.model.parameters() if p.requires_grad]
    operator = HessianLinearOperator(
        case.model, nn.CrossEntropyLoss(), parameters, [(case.x, case.y)], check_deterministic=False
    ).to_scipy()
    made = 0

    def product(v: np.ndarray) -> np.ndarray:
        nonlocal made
        made += 1
        if made > MOST and operator.shape[0] > 10**8:
            raise TooLongError
        return operator @ v

    start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(np.float32)
    counted = LinearOperator(operator.shape, matvec=product, dtype=np.float32)
    return float(eigsh(counted, 1, which="LA", tol=tol, v0=start, return_eigenvectors=False)[0]), made


def eigenthings(case: Case, tol: float) -> Answer:
    import hessian_eigenthings as peer

    operator = peer.HessianOperator(case.model, [(case.x, case.y)], peer.supervised_loss(nn.CrossEntropyLoss()))
    most = {TOL: 10, 1e-4: 20, 1e-5: 50, 1e-6: 100}[tol]  # by itself it stops after two
    found = peer.lanczos(operator, k=1, which="LA", tol=tol, seed=0, max_iter=most)
    return float(found.eigenvalues[0]), int(getattr(found, "iterations", 0))


def pyhessian(case: Case, tol: float) -> Answer:
    import pyhessian as peer

    module: Any = sys.modules["pyhessian.hessian"]
    counted = mock.Mock(wraps=module.hessian_vector_product)
    with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(module, "hessian_vector_product", counted):
        operator = peer.hessian(case.model, nn.CrossEntropyLoss(), data=(case.x, case.y), cuda=False)
        value = operator.eigenvalues(maxIter=100, tol=tol, top_n=1)[0][0]
    case.model.zero_grad()
    return float(value), counted.call_count


CASES = {"mlp": mlp, "resnet18": resnet18, "gpt2": gpt2}
WAYS: dict[str, Callable[[Case, float], Answer]] = {
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


def timed(work: Callable[[Case, float], Answer], case: Case, tol: float) -> tuple[np.ndarray, Answer]:
    """Seconds and the answer; both are infinite where it was stopped."""
    try:
        return seconds(lambda: work(case, tol))
    except TooLongError:
        return np.full(2, np.inf), (math.inf, MOST)


def tolerance(work: Callable[[Case, float], Answer], case: Case, truth: float) -> tuple[float, np.ndarray, Answer]:
    """The loosest one with which the answer is right to 1e-3, or the tightest that is tried; time and answer of it."""
    for tol in (TOL, 1e-4, 1e-5, 1e-6):
        taken, answer = timed(work, case, tol)
        if abs(answer[0] / truth - 1) <= TOL or math.isinf(answer[0]):
            break
    return tol, taken, answer


def compare(name: str, rounds: int) -> None:
    """One row; the first round is that in which the tolerances were found, so that one round is cheap."""
    torch.manual_seed(0)
    case = CASES[name]()
    for _ in range(2):
        case.step()
    truth = ours(case, 1e-5)[0]
    times: dict[str, list[np.ndarray]] = {way: [] for way in WAYS}
    tolerances: dict[str, float] = {}
    answers: dict[str, Answer] = {}
    for number in range(rounds):
        unit = np.median([seconds(case.step)[0] for _ in range(3)], axis=0)
        for way, work in WAYS.items():
            if number == 0:
                tolerances[way], taken, answers[way] = tolerance(work, case, truth)
            elif math.isfinite(answers[way][0]):
                taken, answers[way] = timed(work, case, tolerances[way])
            else:
                taken = np.full(2, np.inf)
            times[way].append(taken / unit)
    print(f"{name}: {sum(p.numel() for p in case.model.parameters()):,} parameters, {rounds} rounds")
    for way, (value, products) in answers.items():
        if math.isinf(value):
            print(f"  {way:20} stopped after {products} products")
            continue
        wall, processor = np.transpose(times[way])
        print(
            f"  {way:20} {np.median(wall):7.1f} steps ({wall.min():.1f} to {wall.max():.1f}), of processor time "
            f"{np.median(processor):.1f}, {products or 'uncounted'} products, tolerance {tolerances[way]:.0e}, error "
            f"{abs(value / truth - 1):.0e}"
        )
    right = [way for way in WAYS if way != "stabkit" and abs(answers[way][0] / truth - 1) <= TOL]
    if right:
        best = np.min([times[way] for way in right], axis=0)
        wall, processor = np.transpose(np.array(times["stabkit"]) / best)
        spread = f"({wall.min():.2f} to {wall.max():.2f})"
        told = f"{np.median(wall):.2f} {spread}, by processor time {np.median(processor):.2f}"
        print(f"  over the fastest peer: {told}; goal .7", flush=True)


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
