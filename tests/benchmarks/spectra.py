"""Spectra against curvlinops with scipy, and dense decompositions against LAPACK's other ways, interleaved in one run.

Run with ``OMP_NUM_THREADS=1 python -m tests.benchmarks.spectra [rounds]``. Times are seconds of processor time of one
thread, medians over the rounds; ratios are taken within a round, smallest and largest beside their median. The peer is
``pip install curvlinops-for-pytorch`` (its input must be wrapped as a parameter) with ``scipy.sparse.linalg.svds`` and
``eigs``: every setting that asks for the accuracy, the fastest of which is "best". ``crossover`` instead of the number
of rounds prints from which sizes on an iteration beats LAPACK.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch
from torch import Tensor, nn

from stabkit.jacobians import Jacobian, Spectrum, eigenvalues, singular_values
from stabkit.tracing import trace

Work = dict[str, Callable[[], np.ndarray]]
Case = tuple[nn.Module, Tensor]


def resnet_block(channels: int = 64, size: int = 8) -> Case:
    import torchvision

    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock(channels, channels)
    for _ in range(3):  # running statistics of a network that has seen data
        block(torch.randn(16, channels, size, size))
    return block.eval(), torch.randn(1, channels, size, size)


class First(nn.Module):
    """A block that returns a tensor or a tuple that starts with one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        return out[0] if isinstance(out, tuple) else out


def gpt2_block() -> Case:
    import transformers

    torch.manual_seed(0)
    # flash attention has no forward derivative, which the peer needs
    config = transformers.GPT2Config(use_cache=False, n_layer=1, attn_implementation="eager")
    model = transformers.GPT2Model(config).eval()
    return First(model.h[0]), torch.randn(1, 16, 768)


def jacobian(case: Case) -> Jacobian:
    return trace(*case, check=False).jacobian()


class Wrapped(nn.Module):
    """The model as a function of its input, which is a parameter."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.model = model
        self.x = nn.Parameter(x.clone())

    def forward(self, _: Tensor) -> Tensor:
        return self.model(self.x)


def peer(case: Case) -> scipy.sparse.linalg.LinearOperator | None:
    if importlib.util.find_spec("curvlinops") is None:
        print("curvlinops is not installed: no peer")
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from curvlinops import JacobianLinearOperator
    model, x = case
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    wrapped = Wrapped(model, x)
    data = [(torch.zeros(len(x), 1), torch.zeros(len(x), 1))]
    return JacobianLinearOperator(wrapped, [wrapped.x], data, check_deterministic=False).to_scipy()


def interleaved(work: Work, rounds: int) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    times: dict[str, list[float]] = {name: [] for name in work}
    answers: dict[str, np.ndarray] = {}
    for turn in range(rounds + 1):
        for name, run in work.items():
            start = time.process_time()
            answers[name] = run()
            if turn:  # the first warms up
                times[name].append(time.process_time() - start)
    return times, answers


def report(
    title: str, work: Work, truth: np.ndarray, target: str, rounds: int, against: str = "peer", share: int = 1
) -> None:
    """Print medians, errors beyond the truth, and the ratio of each of our ways to the best of the others.

    Args:
        title: of the row.
        work: the ways, ours first; names of the others start with ``against``.
        truth: the values, best first; errors are in units of the largest.
        target: what the ratio should reach.
        rounds: repetitions.
        against: what the ratio is taken to.
        share: samples in one call of ours.
    """
    times, answers = interleaved(work, rounds)
    others = [name for name in work if name.startswith(against) and "(loose)" not in name]
    best = min(others, key=lambda name: statistics.median(times[name])) if others else ""
    print(f"\n{title}")
    for name in work:
        ours = not name.startswith(against)
        spent = [t / (share if ours else 1) for t in times[name]]
        error = np.abs(answers[name] - truth).max() / np.abs(truth).max()
        line = f"  {name:44s}{statistics.median(spent):8.3f} s   error {error:.0e}"
        if ours and best:
            ratios = sorted(a / b for a, b in zip(spent, times[best], strict=True))
            line += f"   {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) of {best}; {target}"
        print(line, flush=True)


def first_sample(spectrum: Spectrum) -> np.ndarray:
    assert bool(spectrum.converged.all()), "not converged"
    values: np.ndarray = spectrum.values[0].numpy()
    return values


def largest_singular_values(name: str, make: Callable[[], Case], rounds: int) -> None:
    operator, J = peer(make()), jacobian(make())
    model, x = make()
    others = torch.randn(7, *x.shape[1:], generator=torch.Generator().manual_seed(1))
    many = jacobian((model, torch.cat([x, others])))
    in_float64 = jacobian((copy.deepcopy(model).double(), x.double())).to_scipy()
    truth = np.sort(scipy.sparse.linalg.svds(in_float64, 8, tol=1e-10, return_singular_vectors=False))[::-1]

    def arpack(tol: float, ncv: int | None) -> Callable[[], np.ndarray]:
        def run() -> np.ndarray:
            values = scipy.sparse.linalg.svds(operator, 8, tol=tol, ncv=ncv, return_singular_vectors=False)
            return np.sort(values)[::-1]

        return run

    ways: Work = {"stabkit": lambda: first_sample(singular_values(J, 8, tol=2e-6))}
    if operator is not None:
        ways |= {
            "peer, tol 2e-6": arpack(2e-6, None),
            "peer, tol 2e-6, ncv 40": arpack(2e-6, 40),
            "peer, tol 1e-2, ncv 40 (loose)": arpack(1e-2, 40),
        }
    report(f"8 largest singular values to 2e-6, {name}", ways, truth, "goal .30", rounds)
    ways = {"stabkit, 8 samples, each": lambda: first_sample(singular_values(many, 8, tol=2e-6))}
    if operator is not None:
        ways |= {"peer, one sample, tol 2e-6": arpack(2e-6, None), "peer, one sample, ncv 40": arpack(2e-6, 40)}
    report(f"the same for 8 samples in lock-step, {name}", ways, truth, "goal .20", max(rounds // 2, 1), share=8)


def rightmost_eigenvalues(rounds: int) -> None:
    operator, J = peer(resnet_block()), jacobian(resnet_block())
    everything = np.linalg.eigvals(J.dense()[0].double().numpy())
    truth = np.sort(everything.real)[::-1][:6]

    def arpack(k: int, ncv: int | None) -> Callable[[], np.ndarray]:
        def run() -> np.ndarray:
            values = scipy.sparse.linalg.eigs(operator, k, which="LR", ncv=ncv, tol=1e-5, return_eigenvectors=False)
            return np.sort(values.real)[::-1][:6]

        return run

    def ours(two_sided: bool) -> Callable[[], np.ndarray]:
        return lambda: first_sample(eigenvalues(J, 6, "LR", tol=1e-5, two_sided=two_sided)).real

    ways: Work = {
        "stabkit, two_sided=False": ours(False),
        "stabkit, with condition numbers": ours(True),
    }
    if operator is not None:
        ways |= {
            "peer, ncv 60": arpack(6, 60),
            "peer, ncv 60, k = 10": arpack(10, 60),
            "peer, default ncv (loose)": arpack(6, None),
        }
    report("6 rightmost eigenvalues to 1e-5, ResNet block", ways, truth, "goal .35", rounds)


def all_singular_values(rounds: int, n: int = 2048) -> None:
    A = torch.from_numpy(np.random.default_rng(0).standard_normal((n, n)) / np.sqrt(n)).float()
    A64 = A.double().numpy()
    truth = scipy.linalg.svdvals(A64)
    ways: Work = {
        "stabkit, tol 2e-6": lambda: first_sample(singular_values(A, tol=2e-6)),
        "lapack, float64 Gram and eigvalsh": lambda: np.sqrt(scipy.linalg.eigvalsh(A64.T @ A64)[::-1]),
        "lapack, float32 svdvals": lambda: scipy.linalg.svdvals(A.numpy()),
        "lapack, float64 svdvals (loose)": lambda: scipy.linalg.svdvals(A64),
    }
    report(f"all singular values of a float32 matrix, n = {n}", ways, truth, "goal 1.0", rounds, against="lapack")


def crossover() -> None:
    """Seconds of LAPACK and of the iteration, products included, for 8 values of ResNet blocks of several sizes."""

    def seconds(run: Callable[[], Spectrum]) -> float:
        spent = []
        for _ in range(3):
            start = time.process_time()
            run()
            spent.append(time.process_time() - start)
        return statistics.median(spent)

    print(f"{'n':>6s}{'svd':>9s}{'golub-kahan':>13s}{'eig':>9s}{'krylov-schur':>14s}")
    for channels, size in ((16, 4), (32, 4), (48, 4), (64, 4), (20, 8), (32, 8)):
        J = jacobian(resnet_block(channels, size))
        found = [
            seconds(lambda J=J: singular_values(J, 8, method="dense")),
            seconds(lambda J=J: singular_values(J, 8, method="golub-kahan")),
            seconds(lambda J=J: eigenvalues(J, 8, "LR", method="dense")),
            seconds(lambda J=J: eigenvalues(J, 8, "LR", method="krylov-schur")),
        ]
        print(f"{J.shape[1]:6d}{found[0]:9.2f}{found[1]:13.2f}{found[2]:9.2f}{found[3]:14.2f}", flush=True)


MEMORY: dict[str, Callable[[Jacobian], Any]] = {
    "8 largest singular values": lambda J: singular_values(J, 8, tol=2e-6),
    "6 rightmost eigenvalues": lambda J: eigenvalues(J, 6, "LR", tol=1e-5),
}


def peak(name: str) -> None:
    """Print the megabytes that one call takes beyond the operator; run in a process of its own."""
    J = jacobian(resnet_block())
    J.matmat(J.rmatmat(torch.ones(1, J.shape[1], 1)))
    before = high_water_mark()
    MEMORY[name](J)
    print(high_water_mark() - before)


def high_water_mark() -> float:
    """The most memory this process has held, in MB. (``ru_maxrss`` would include what its parent held.)"""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def main(rounds: int = 5) -> None:
    warnings.simplefilter("ignore")  # of the peers
    torch.set_num_threads(1)
    if importlib.util.find_spec("tests.benchmarks.jacobians") is not None:
        from tests.benchmarks.jacobians import rows

        for line in rows():
            print(line)
    largest_singular_values("ResNet block, n = 4096", resnet_block, rounds)
    largest_singular_values("GPT-2 block, n = 12288", gpt2_block, max(rounds // 2, 1))
    rightmost_eigenvalues(rounds)
    all_singular_values(rounds)
    print("\npeak memory, ResNet block")
    for name in MEMORY:
        command = [sys.executable, "-m", "tests.benchmarks.spectra", "peak", name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(f"  {name:44s}{float(out.split()[-1]):8.0f} MB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2])
    elif sys.argv[1:2] == ["crossover"]:
        torch.set_num_threads(1)
        crossover()
    else:
        main(*(int(a) for a in sys.argv[1:]))
