"""Tracing against one forward pass, and the chain of steps against the model's own backward, interleaved in one run.

Run with ``python tests/benchmarks/tracing.py``; ratios are medians over the rounds, smallest and largest beside them.
The floor is the forward pass without gradients; the peer is TorchLens (``pip install torchlens``), which logs values
and no derivatives. Peak memory is measured in processes of their own: what a run takes beyond the model and its input.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stabkit.tracing import trace
from stabkit.tracing.flow import engine_vjp

ROUNDS = 7


def resnet50() -> tuple[nn.Module, torch.Tensor]:
    import torchvision

    return torchvision.models.resnet50(), torch.randn(4, 3, 128, 128)


def vit_b_16() -> tuple[nn.Module, torch.Tensor]:
    import torchvision

    return torchvision.models.vit_b_16(), torch.randn(1, 3, 224, 224)


def gpt2_small() -> tuple[nn.Module, torch.Tensor]:
    import transformers

    config = transformers.GPT2Config(use_cache=False, n_layer=12)
    return transformers.GPT2Model(config), torch.randint(0, 50_000, (1, 256))


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "resnet50, 4 x 128 px": resnet50,
    "vit_b_16, 1 x 224 px": vit_b_16,
    "gpt2 small, 1 x 256": gpt2_small,
}


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = work()
    spent = time.perf_counter() - start
    del result
    return spent


def ratios(times: dict[str, list[float]], name: str, floor: str) -> str:
    values = sorted(a / b for a, b in zip(times[name], times[floor], strict=True))
    return f"{statistics.median(values):5.2f} ({values[0]:.2f} to {values[-1]:.2f})"


def interleaved(work: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in work}
    for round_number in range(ROUNDS + 1):
        for name, run in work.items():
            spent = seconds(run)
            if round_number:  # the first warms up
                times[name].append(spent)
    return times


def tracing(model: nn.Module, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def forward() -> Any:
        with torch.no_grad():
            return model(x)

    work: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "forward with gradients": lambda: model(x),
        "trace, check=False": lambda: trace(model, x, check=False),
        "trace": lambda: trace(model, x),
    }
    try:
        import torchlens
    except ImportError:
        print("torchlens is not installed: no peer")
    else:
        warnings.simplefilter("ignore", category=UserWarning)  # it warns of every scalar that leaves a tensor
        work["torchlens"] = lambda: torchlens.trace(model, x)
    return work


def backward(model: nn.Module, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    flow = trace(model, x)
    cotangents = flow.cotangent()

    def chain() -> Any:
        pulled = cotangents
        for step in reversed(flow.steps):
            pulled = step.vjp(pulled)
        return pulled

    return {
        "own backward": lambda: engine_vjp(flow.states[-1].values, flow.states[0].values, cotangents),
        "chain of VJPs": chain,
    }


def high_water_mark() -> float:
    """The most memory this process has held, in MB. (``ru_maxrss`` would include what its parent held.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak(name: str, memory: str) -> None:
    """Print the megabytes that tracing and one gradient profile take beyond the model; run in a process of its own."""
    from stabkit.growth import gradient_profile

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model.eval()
    before = high_water_mark()
    if memory == "forward":
        model(x)
    else:
        gradient_profile(trace(model, x, check=False, memory=memory))
    print(high_water_mark() - before)


def main() -> None:
    torch.set_num_threads(1)
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, x = make()
        model.eval()
        times = interleaved(tracing(model, x))
        print(f"\n{name}: forward {statistics.median(times['forward']) * 1e3:.0f} ms; multiples of it")
        for label in list(times)[1:]:
            print(f"  {label:24s} {ratios(times, label, 'forward')}")
        times = interleaved(backward(model, x))
        print(f"  {'chain / own backward':24s} {ratios(times, 'chain of VJPs', 'own backward')}")
        for memory in ("forward", "keep", "recompute"):
            command = [sys.executable, __file__, "peak", name, memory]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            print(f"  peak memory, {memory:11s} {float(out.split()[-1]):7.0f} MB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2], sys.argv[3])
    else:
        main()
