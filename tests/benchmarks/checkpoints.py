"""Time and memory of loading a large checkpoint, beside torch's own way: python -m tests.benchmarks.checkpoints

Every run is a process of its own, the ways take turns. Time is CPU time from the start of building the model to the
end of its first forward pass; memory is the peak of the resident set above that of the process before it, as a
multiple of the weights. The last lines give the same peak through a whole analysis, and for each checkpoint of a sweep.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

WIDTH = 2048
FORMATS = ("safetensors", "zip", "dcp")


class Block(nn.Module):
    """A residual layer: one step of the analysis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * torch.tanh(self.layer(x))


def build(megabytes: int) -> nn.Module:
    """A residual network with about that many megabytes of float32 weights."""
    return nn.Sequential(*[Block(WIDTH) for _ in range(max(1, round(megabytes * 2**20 / (4 * WIDTH**2))))])


def path_of(folder: Path, kind: str) -> Path:
    return folder / {"safetensors": "model.safetensors", "zip": "model.pt", "dcp": "dcp"}[kind]


def write(folder: Path, megabytes: int) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = build(megabytes).state_dict()
    save_file(state, path_of(folder, "safetensors"))
    torch.save({"model": state, "epoch": 3}, path_of(folder, "zip"))
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": state}, checkpoint_id=str(path_of(folder, "dcp")))


def read_by_torch(path: Path, kind: str, megabytes: int) -> nn.Module:
    """What a person would write."""
    model = build(megabytes)
    if kind == "safetensors":
        from safetensors.torch import load_file

        model.load_state_dict(load_file(path))
    elif kind == "zip":
        model.load_state_dict(torch.load(path, mmap=True, weights_only=True)["model"])
    else:
        import torch.distributed.checkpoint as dcp

        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id=str(path))
    return model.eval()


def peak() -> int:
    """Largest resident set of this program so far, bytes; getrusage would count what the parent held as well."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure(way: str, kind: str, folder: Path, megabytes: int) -> dict[str, float]:
    """One way in this process."""
    import safetensors.torch  # noqa: F401 - neither way pays for an import

    import stabkit

    torch.set_num_threads(1)
    path = path_of(folder, kind)
    if way != "torch":
        _ = stabkit.load, stabkit.analyze
    if kind == "dcp":
        importlib.import_module("torch.distributed.checkpoint")
    x = torch.randn(4, WIDTH)
    before, start = peak(), time.process_time()
    if way == "torch":
        model = read_by_torch(path, kind, megabytes)
    else:
        model = stabkit.load(path, model=lambda: build(megabytes), input=x).model
    if way == "analyze":
        stabkit.analyze(model, x, spectrum="none", probes=1)
    else:
        with torch.no_grad():
            model(x)
    seconds = time.process_time() - start
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"seconds": seconds, "memory": (peak() - before) / size}


def analyze_alone(megabytes: int) -> dict[str, float]:
    """The analysis of the same model without any file."""
    import stabkit

    torch.set_num_threads(1)
    _ = stabkit.analyze
    model, x = build(megabytes).eval(), torch.randn(4, WIDTH)
    before, start = peak(), time.process_time()
    stabkit.analyze(model, x, spectrum="none", probes=1)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"seconds": time.process_time() - start, "memory": (peak() - before) / size}


def sweep(folder: Path, megabytes: int, count: int) -> dict[str, float]:
    """The peak of a sweep over that many checkpoints, as a multiple of the weights of one."""
    from stabkit.comparison import compare

    torch.set_num_threads(1)
    before, start = peak(), time.process_time()
    compare(
        [path_of(folder, "safetensors")] * count,
        model=lambda: build(megabytes),
        input=torch.randn(4, WIDTH),
        spectrum="none",
    )
    return {"seconds": time.process_time() - start, "memory": (peak() - before) / (megabytes * 2**20)}


def in_a_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.checkpoints", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):7.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=3, metavar=("WAY", "FORMAT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, kind, folder = options.one
        if way == "sweep":
            found = sweep(Path(folder), options.megabytes, int(kind))
        elif way == "alone":
            found = analyze_alone(options.megabytes)
        else:
            found = measure(way, kind, Path(folder), options.megabytes)
        print(json.dumps(found))
        return
    size = ["--megabytes", str(options.megabytes)]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.megabytes)
        for kind in FORMATS:
            runs = [
                {way: in_a_process("--one", way, kind, folder, *size) for way in ("torch", "stabkit")}
                for _ in range(options.repeats)
            ]
            ratios = [run["stabkit"]["seconds"] / run["torch"]["seconds"] for run in runs]
            for way in ("torch", "stabkit"):
                seconds = spread([run[way]["seconds"] for run in runs])
                memory = spread([run[way]["memory"] for run in runs])
                print(f"{kind:12} {way:8} CPU s {seconds}   peak / weights {memory}", flush=True)
            print(f"{kind:12} stabkit / torch, CPU time {spread(ratios)}", flush=True)
        alone = in_a_process("--one", "alone", "-", folder, *size)["memory"]
        whole = in_a_process("--one", "analyze", "safetensors", folder, *size)["memory"]
        print(f"analysis of a model in memory: peak / weights {alone:.2f}; loading and analysis: {whole:.2f}")
        for count in (1, 3):
            found = in_a_process("--one", "sweep", str(count), folder, *size)
            print(f"sweep over {count} checkpoints: peak / weights {found['memory']:.2f}")


if __name__ == "__main__":
    main()
