"""Dense and sparse Jacobians and their products against the arithmetic they consist of, interleaved in one run.

Run with ``python tests/benchmarks/jacobians.py``. Times are CPU times on one thread, ratios medians over the rounds
with the smallest and largest beside them. The floor of a dense Jacobian is n times the multiplications of one forward
pass, at the rate at which this machine does the same matrix products or convolutions in the same run; that of a block
of products is the forward arithmetic of as many vectors. Peers are curvlinops (``pip install
curvlinops-for-pytorch``) and ``torch.autograd.functional.jacobian``. Peak memory is measured in processes of their own:
what the Jacobian takes beyond the recorded block.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stabkit.jacobians import Jacobian
from stabkit.tracing import trace

BLOCK = 16
Work = dict[str, Callable[[], Any]]
Times = dict[str, list[float]]


class Residual(nn.Module):
    """An MLP block of width 512."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Causal(nn.Module):
    """One block of GPT-2 small, on hidden states, with the mask that its model gives it."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        from transformers import GPT2Config
        from transformers.models.gpt2.modeling_gpt2 import GPT2Block

        config = GPT2Config(use_cache=False)
        config._attn_implementation = "eager"
        self.block = GPT2Block(config, layer_idx=0)
        self.register_buffer("mask", torch.full((1, 1, tokens, tokens), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x, attention_mask=self.mask)
        return out if isinstance(out, Tensor) else out[0]


def resnet(size: int) -> tuple[nn.Module, Tensor]:
    from torchvision.models.resnet import BasicBlock

    return BasicBlock(64, 64), torch.randn(1, 64, size, size)


BLOCKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "ResNet block 64x8x8": lambda: resnet(8),
    "ResNet block 64x28x28": lambda: resnet(28),
    "GPT-2 block, 16 tokens": lambda: (Causal(16), torch.randn(1, 16, 768)),
    "MLP block 512": lambda: (Residual(), torch.randn(1, 512)),
}


def make(name: str) -> tuple[nn.Module, Tensor, Jacobian]:
    torch.manual_seed(0)
    model, x = BLOCKS[name]()
    model.eval().requires_grad_(False)
    return model, x, trace(model, x).jacobian()


def convolutions(size: int, count: int, at_once: int) -> Callable[[], None]:
    """The forward arithmetic of ``count`` ResNet blocks."""
    weight, x = torch.randn(64, 64, 3, 3), torch.randn(at_once, 64, size, size)

    def run() -> None:
        for _ in range(2 * count // at_once):
            functional.conv2d(x, weight, padding=1)

    return run


def products(shapes: list[tuple[int, int]], rows: int, count: int) -> Callable[[], None]:
    """Matrix products of so many rows with matrices of some shapes, ``count`` times."""
    matrices = [(torch.randn(rows, m), torch.randn(m, n)) for m, n in shapes]

    def run() -> None:
        for _ in range(count):
            for a, b in matrices:
                torch.mm(a, b)

    return run


GPT2 = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    result = work()
    spent = time.process_time() - start
    del result
    return spent


def interleaved(work: Work, rounds: int) -> Times:
    times: Times = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            spent = seconds(run)
            if number or rounds == 1:  # the first warms up
                times[name].append(spent)
    return times


def row(label: str, what: str, times: Times, name: str, factor: float, target: str, note: str = "") -> str:
    """One line: the time as a multiple of the floor, which was measured as a part ``1 / factor`` of the whole."""
    values = sorted(a / (b * factor) for a, b in zip(times[name], times["floor"], strict=True))
    spent = statistics.median(times[name])
    spread = f"({values[0]:.2f} to {values[-1]:.2f})"
    return f"{label:24s} {what:34s} {spent:8.3f} s {statistics.median(values):6.2f} {spread:16s} {target:>7s}  {note}"


def dense_rows(name: str, floor: Callable[[], None], factor: float, rounds: int, targets: tuple[str, str]) -> list[str]:
    model, x, J = make(name)
    work: Work = {"floor": floor, "structure": J.dense, "plain": lambda: J.dense(structure=False)}
    if J.shape[2] < 10_000:
        one = x[0]
        work["functional"] = lambda: torch.autograd.functional.jacobian(
            lambda s: model(s[None])[0], one, vectorize=True
        )
    times = interleaved(work, rounds)
    how = J.dense(return_path=True)[1].split("; ")[-1]
    lines = [
        row(name, "dense", times, "structure", factor, targets[0], f"{peak(name, 'dense'):.0f} MB; {how}"),
        row(name, "dense, structure=False", times, "plain", factor, targets[1], f"{peak(name, 'plain'):.0f} MB"),
    ]
    if "functional" in work:
        lines.append(row(name, "functional.jacobian", times, "functional", factor, "", "vectorize=True"))
    return lines


def sparse_row(name: str) -> str:
    """The sparse Jacobian over the products it is made of; the first write to fresh memory is told apart."""
    _, _, J = make(name)
    count = int(J.sparse(return_path=True)[1].split("; ")[-1].split()[0])
    seeds = torch.randn(25, *J.shape[:2]).permute(1, 2, 0)
    times = interleaved(
        {"floor": lambda: [J.rmatmat(seeds) for _ in range(count // 25)] and None, "sparse": J.sparse}, 5
    )
    before = resource.getrusage(resource.RUSAGE_SELF)
    (matrix,) = J.sparse()
    after = resource.getrusage(resource.RUSAGE_SELF)
    system = after.ru_stime - before.ru_stime
    user = system + after.ru_utime - before.ru_utime
    note = f"{peak(name, 'sparse'):.0f} MB; {matrix.nnz:,} entries; {system / user:.0%} of it the system's page faults"
    return row(name, f"sparse over its {count} products", times, "sparse", 1, "1.5", note)


def product_rows(name: str, floor: Callable[[], None], repeats: int, targets: tuple[str, str]) -> list[str]:
    model, x, J = make(name)
    V, U = torch.randn(1, J.shape[2], BLOCK), torch.randn(1, J.shape[1], BLOCK)

    def repeated(run: Callable[[], Any]) -> Callable[[], None]:
        return lambda: [run() for _ in range(repeats)] and None

    work: Work = {"floor": floor, "J V": repeated(lambda: J @ V), "J^T U": repeated(lambda: J.T @ U)}
    forward, backward = peers(model, x)
    if forward is not None and backward is not None:
        assert torch.allclose(forward @ V[0], (J @ V)[0], rtol=1e-3, atol=1e-3)
        work["curvlinops J V"] = repeated(lambda: forward @ V[0])
        work["curvlinops J^T U"] = repeated(lambda: backward @ U[0])
    times = interleaved(work, 7)
    targets_of = {"J V": targets[0], "J^T U": targets[1]}
    lines = [row(name, f"{what}, {BLOCK} at once", times, what, 1, targets_of.get(what, "")) for what in list(work)[1:]]
    if forward is None:
        lines.append(f"{name:24s} curvlinops is not installed: no peer")
    return lines


def peers(model: nn.Module, x: Tensor) -> tuple[Any, Any]:
    """curvlinops' Jacobian with respect to the input, which has to be a parameter for it."""
    try:
        import curvlinops
    except ImportError:
        return None, None

    class OfInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(x.clone())
            self.model = [model]

        def forward(self, _: Tensor) -> Tensor:
            out: Tensor = self.model[0](self.x)
            return out.flatten(1)

    wrapped = OfInput()
    data = [(torch.zeros(1, 1), torch.zeros(1, 1))]
    kinds = curvlinops.JacobianLinearOperator, curvlinops.TransposedJacobianLinearOperator
    forward, backward = (kind(wrapped, [wrapped.x], data, check_deterministic=False) for kind in kinds)
    return forward, backward


def high_water_mark() -> float:
    """The most memory this process has held, in MB. (``ru_maxrss`` would include what its parent held.)"""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def peak(name: str, what: str) -> float:
    """Megabytes that a Jacobian takes at most, beyond the recorded block."""
    command = [sys.executable, __file__, "peak", name, what]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(name: str, what: str) -> None:
    torch.set_num_threads(1)
    _, _, J = make(name)
    before = high_water_mark()
    J.sparse() if what == "sparse" else J.dense(structure=what == "dense")
    print(high_water_mark() - before)


def rows() -> list[str]:
    """All lines of the table."""
    torch.set_num_threads(1)
    head = f"{'block':24s} {'what':34s} {'median':>10s} {'floor':>6s} {'spread':16s} {'target':>7s}  peak memory; how"
    gpt = "GPT-2 block, 16 tokens"
    return [
        head,
        *dense_rows("ResNet block 64x8x8", convolutions(8, 4096, 64), 1, 7, ("0.6", "1.15")),
        sparse_row("ResNet block 64x28x28"),
        *dense_rows(gpt, products(GPT2, 512, 12), 12_288 / (12 * 512 / 16), 2, ("0.4", "1.3")),
        *dense_rows("MLP block 512", products([(512, 2048), (2048, 512)], 512, 1), 1, 15, ("0.8", "1.5")),
        *product_rows("ResNet block 64x8x8", convolutions(8, 16 * BLOCK, BLOCK), 16, ("2.5", "1.0")),
        *product_rows(gpt, products(GPT2, 16 * BLOCK, 1), 1, ("1.2", "1.2")),
    ]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if sys.argv[1:2] == ["peak"]:
        print_peak(sys.argv[2], sys.argv[3])
    else:
        print("\n".join(rows()))
