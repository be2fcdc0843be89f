"""What an analysis costs beside what was foretold, two ranks beside one, and a model streamed from disk.

Run with ``python -m tests.benchmarks.scale [plan] [ranks] [stream]``. Each measurement has a process of its own with
one thread. Times of single processes are CPU seconds, so that neighbours on the machine do not count; times of ranks
are wall seconds, interleaved, medians over the rounds with the smallest and largest beside them, and the load of the
machine is printed. ``stream`` writes 4 GB to the temporary directory, block by block, and removes them afterwards.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parent.parent.parent
ROUNDS = 5
CASES = {  # model, samples, tokens or pixels, spectrum
    "resnet50": (4, 224, "none"),
    "minilm": (2, 64, "auto"),
    "gpt2": (4, 64, "none"),
}
WIDTH, DEPTH, VOCABULARY = 2560, 25, 32_000  # 25 x 12 x 2560^2 and an embedding: 2.05 billion numbers


def build(name: str, samples: int, size: int) -> tuple[nn.Module, torch.Tensor]:
    """A model with random weights, and an input for it."""
    torch.manual_seed(0)
    if name == "resnet50":
        from torchvision.models import resnet50

        return resnet50().eval(), torch.randn(samples, 3, size, size)
    import transformers

    if name == "minilm":
        config = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
        return transformers.BertModel(config).eval(), torch.randint(30_000, (samples, size))
    config = transformers.GPT2Config(use_cache=False)
    return transformers.GPT2LMHeadModel(config).eval(), torch.randint(50_000, (samples, size))


def foretell(name: str) -> dict[str, float]:
    """What the plan says, in a process of its own."""
    from stabkit.planning import plan

    samples, size, spectrum = CASES[name]
    model, x = build(name, samples, size)
    began = time.process_time()
    found = plan(model, x, spectrum=spectrum)
    spent = time.process_time() - began
    return {"seconds": found.price.seconds, "peak": float(found.price.peak_bytes or 0), "spent": spent}


def measure(name: str) -> dict[str, float]:
    """What the analysis takes, in a process of its own."""
    import stabkit

    samples, size, spectrum = CASES[name]
    model, x = build(name, samples, size)
    began = time.process_time()
    stabkit.analyze(model, x, spectrum=spectrum)
    return {"seconds": time.process_time() - began, "peak": peak()}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def ranked(name: str) -> dict[str, float]:
    """Seconds of a profile on the ranks of this program: samples of ResNet-50, probes of MiniLM."""
    from stabkit import distributed

    model, x = build(name, *((8, 128) if name == "resnet50" else (1, 128)))
    cotangents = 8 if name == "resnet50" else 64
    with distributed.session():
        distributed.gradient_profile(model, x, probes=1)  # kernels are made, memory is touched
        began = time.perf_counter()
        distributed.gradient_profile(model, x, probes=cotangents)
        return {"seconds": time.perf_counter() - began}


def write_tower(folder: Path) -> float:
    """Random bf16 weights of a GPT-2 of two billion parameters, a shard a block; how many numbers."""
    import transformers
    from safetensors.torch import save_file

    config = transformers.GPT2Config(
        n_layer=DEPTH, n_embd=WIDTH, n_head=WIDTH // 128, n_positions=64, vocab_size=VOCABULARY
    )
    config.architectures = ["GPT2LMHeadModel"]
    folder.joinpath("config.json").write_text(config.to_json_string())
    placed, total = {}, 0
    shapes = {
        "ln_1.weight": (WIDTH,),
        "ln_1.bias": (WIDTH,),
        "attn.c_attn.weight": (WIDTH, 3 * WIDTH),
        "attn.c_attn.bias": (3 * WIDTH,),
        "attn.c_proj.weight": (WIDTH, WIDTH),
        "attn.c_proj.bias": (WIDTH,),
        "ln_2.weight": (WIDTH,),
        "ln_2.bias": (WIDTH,),
        "mlp.c_fc.weight": (WIDTH, 4 * WIDTH),
        "mlp.c_fc.bias": (4 * WIDTH,),
        "mlp.c_proj.weight": (4 * WIDTH, WIDTH),
        "mlp.c_proj.bias": (WIDTH,),
    }
    parts = {f"{i}": {f"transformer.h.{i}.{name}": shape for name, shape in shapes.items()} for i in range(DEPTH)}
    parts["rest"] = {
        "transformer.wte.weight": (VOCABULARY, WIDTH),
        "transformer.wpe.weight": (64, WIDTH),
        "transformer.ln_f.weight": (WIDTH,),
        "transformer.ln_f.bias": (WIDTH,),
    }
    for part, inside in parts.items():
        file = f"model-{part}.safetensors"
        tensors = {
            name: 0.02 * torch.randn(shape) + float("ln_" in name and "weight" in name)
            for name, shape in inside.items()
        }
        total += sum(tensor.numel() for tensor in tensors.values())
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / file)
        placed.update(dict.fromkeys(inside, file))
    index = {"metadata": {}, "weight_map": placed}
    folder.joinpath("model.safetensors.index.json").write_text(json.dumps(index))
    return float(total)


def streamed(folder: str) -> dict[str, float]:
    """The streamed analysis, in a process of its own."""
    from stabkit.streaming import analyze_files

    began = time.perf_counter(), time.process_time()
    words = torch.randint(VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(0))
    found = analyze_files(folder, words, probes=4, k=1, tol=1e-2, max_products=100, out=Path(folder) / "out")
    return {
        "wall": time.perf_counter() - began[0],
        "seconds": time.process_time() - began[1],
        "peak": peak(),
        "reused": float(found.reused),
        "converged": float((found.converged is not None) and found.converged.double().mean()),
        "growth": float(found.log_growth.sum()),
    }


def in_process(part: str, argument: str, rank: int = 0, ranks: int = 1, port: int = 29_577) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    if ranks > 1:
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.benchmarks.scale", "--part", part, argument]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str]) -> dict[str, float]:
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a part of the benchmark failed with code {process.returncode}")
    found: dict[str, float] = json.loads(out.strip().splitlines()[-1])
    return found


def print_plans() -> None:
    print("plan against analysis: CPU seconds and peak resident memory, one thread")
    for name in CASES:
        foretold, found = told(in_process("foretell", name)), told(in_process("measure", name))
        seconds, memory = (foretold[key] / found[key] - 1 for key in ("seconds", "peak"))
        print(
            f"  {name:9s} {foretold['seconds']:6.1f} s for {found['seconds']:6.1f} s ({seconds:+.0%})"
            f"   {foretold['peak'] / 1e9:.2f} GB for {found['peak'] / 1e9:.2f} GB ({memory:+.0%})"
            f"   the plan itself took {foretold['spent']:.1f} s",
            flush=True,
        )


def print_ranks(rounds: int) -> None:
    print(f"two ranks with a thread each against one: wall seconds, medians of {rounds}, interleaved")
    for name in ("resnet50", "minilm"):
        times: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(rounds):
            for ranks in times:
                running = [in_process("ranked", name, rank, ranks, 29_600 + turn) for rank in range(ranks)]
                times[ranks].append(max(told(process)["seconds"] for process in running))
        one, two = (statistics.median(times[ranks]) for ranks in (1, 2))
        spread = ", ".join(f"{min(times[ranks]):.1f} to {max(times[ranks]):.1f}" for ranks in times)
        print(f"  {name:9s} {one:6.1f} s / {two:6.1f} s = {one / two:.2f}   ({spread})   load {os.getloadavg()[0]:.1f}")


def print_streaming() -> None:
    with tempfile.TemporaryDirectory() as folder:
        total = write_tower(Path(folder))
        found = told(in_process("streamed", folder))
        print(
            f"streamed: {total / 1e9:.2f} billion parameters in bf16, 4 probes, largest singular value of each block\n"
            f"  {found['wall']:.0f} s, {found['seconds']:.0f} s of one core, peak {found['peak'] / 1e9:.2f} GB, "
            f"{found['converged']:.0%} converged to 1e-2, growth {found['growth']:+.2f} nats",
            flush=True,
        )
        again = told(in_process("streamed", folder))
        print(f"  again, from what is on disk: {again['wall']:.0f} s, {again['reused']:.0f} results found")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--part"]:
        torch.set_num_threads(1)
        parts: dict[str, Any] = {"foretell": foretell, "measure": measure, "ranked": ranked, "streamed": streamed}
        print(json.dumps(parts[arguments[1]](arguments[2])))
        return
    wanted = arguments or ["plan", "ranks", "stream"]
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    if "plan" in wanted:
        print_plans()
    if "ranks" in wanted:
        print_ranks(ROUNDS)
    if "stream" in wanted:
        print_streaming()


if __name__ == "__main__":
    main(sys.argv[1:])
