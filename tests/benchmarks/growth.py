"""Lyapunov exponents against k forward passes in one batch, interleaved in one run.

Run with ``python tests/benchmarks/growth.py``. Numbers are CPU seconds of one thread, as multiples of the floor:
medians over the rounds, smallest and largest beside them. Over depth the floor is one forward pass without gradients
on a batch of k copies of the input; the peers are a loop of ``torch.func.jvp`` over the k vectors of every block, and
the dense Jacobian of every block times the frame. Over time the floor is the bare map, 1e5 times, for 64 initial
states.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import stabkit

ROUNDS = 7


class Residual(nn.Module):
    """A ResNet block on 16 channels of 16 x 16: a state of 4,096 numbers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.one = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.two = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.two(self.second(torch.relu(self.one(self.first(x))))))


def mlp() -> tuple[nn.Module, Tensor, list[Callable[[Tensor], Tensor]]]:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(24)])
    return model, torch.randn(1, 512), list(model)


def resnet() -> tuple[nn.Module, Tensor, list[Callable[[Tensor], Tensor]]]:
    model = nn.Sequential(*[Residual() for _ in range(8)])
    return model, torch.randn(1, 16, 16, 16), list(model)


def gpt2() -> tuple[nn.Module, Tensor, list[Callable[[Tensor], Tensor]]]:
    import transformers

    config = transformers.GPT2Config(use_cache=False, n_layer=6, n_embd=192, n_head=6, attn_implementation="eager")
    model = transformers.GPT2Model(config)
    mask = torch.full((64, 64), torch.finfo(torch.float32).min).triu(1)[None, None]

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = model.h

        def forward(self, x: Tensor) -> Tensor:
            for block in self.h:
                x = first(block(x, attention_mask=mask))
            return x

    def first(out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out

    blocks = [lambda x, block=block: first(block(x, attention_mask=mask)) for block in model.h]
    return Blocks(), torch.randn(1, 64, 192), blocks


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def interleaved(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            spent = seconds(run)
            if number:  # the first warms up
                times[name].append(spent)
    return times


def show(times: dict[str, list[float]], floor: str) -> None:
    for name in times:
        if name != floor:
            ratios = sorted(a / b for a, b in zip(times[name], times[floor], strict=True))
            print(f"  {name:28s} {statistics.median(ratios):7.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def loop_of_jvp(blocks: list[Callable[[Tensor], Tensor]], x: Tensor, k: int) -> None:
    frame = torch.linalg.qr(torch.randn(x.numel(), k))[0]
    for block in blocks:
        images = [torch.func.jvp(block, (x,), (v.reshape(x.shape),))[1].flatten() for v in frame.T]
        frame = torch.linalg.qr(torch.stack(images, 1))[0]
        with torch.no_grad():
            x = block(x)


def dense_times_frame(blocks: list[Callable[[Tensor], Tensor]], x: Tensor, k: int) -> None:
    frame = torch.linalg.qr(torch.randn(x.numel(), k))[0]
    for block in blocks:
        J = torch.func.jacrev(block, chunk_size=256)(x).reshape(x.numel(), x.numel())
        frame = torch.linalg.qr(J @ frame)[0]
        with torch.no_grad():
            x = block(x)


def over_depth(
    name: str, make: Callable[[], tuple[nn.Module, Tensor, list[Callable[[Tensor], Tensor]]]], ks: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model, x, blocks = make()
    model.eval()
    model.requires_grad_(False)
    flow = stabkit.trace(model, x)
    for k in ks:
        many = x.expand(k, *x.shape[1:]).contiguous()

        def forward(many: Tensor = many) -> None:
            with torch.no_grad():
                model(many)

        def traced(k: int = k) -> None:
            stabkit.lyapunov_spectrum(stabkit.trace(model, x), k)

        work: dict[str, Callable[[], Any]] = {
            "forward": forward,
            "adjoint": lambda k=k: stabkit.lyapunov_spectrum(flow, k, direction="adjoint"),
            "forward products": lambda k=k: stabkit.lyapunov_spectrum(flow, k, direction="forward"),
            "trace and adjoint": traced,
        }
        times = interleaved(work, ROUNDS)
        print(f"\n{name}, {len(flow)} steps, k = {k}: floor {statistics.median(times['forward']) * 1e3:.1f} ms")
        show(times, "forward")
        peers: dict[str, Callable[[], Any]] = {
            "forward": forward,
            "loop of torch.func.jvp": lambda k=k: loop_of_jvp(blocks, x, k),
        }
        if x.numel() <= 4096:
            peers["dense Jacobian times frame"] = lambda k=k: dense_times_frame(blocks, x, k)
        show(interleaved(peers, 1), "forward")


def henon(x: Tensor) -> Tensor:
    return torch.stack([1 - 1.4 * x[:, 0] ** 2 + x[:, 1], 0.3 * x[:, 0]], 1)


def over_time(steps: int = 100_000) -> None:
    x0 = 0.1 * torch.rand(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def bare() -> None:
        x = x0
        with torch.no_grad():
            for _ in range(steps):
                x = henon(x)

    def spectrum() -> None:
        stabkit.lyapunov_spectrum(stabkit.iterate(henon, x0, steps))

    times = interleaved({"bare": bare, "spectrum": spectrum}, 2)
    print(f"\nHenon, {steps} steps, 64 initial states: floor {statistics.median(times['bare']):.1f} s")
    show(times, "bare")


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = sys.argv[1:] or ["mlp", "resnet", "gpt2", "henon"]
    if "mlp" in chosen:
        over_depth("MLP, 24 x 512", mlp, (16,))
    if "resnet" in chosen:
        over_depth("ResNet, 8 blocks of 16 x 16 x 16", resnet, (16,))
    if "gpt2" in chosen:
        over_depth("GPT-2, 6 blocks, 64 x 192", gpt2, (8, 32))
    if "henon" in chosen:
        over_time()


if __name__ == "__main__":
    main()
