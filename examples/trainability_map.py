"""How deep a tanh network may be and still train: known from its initial weights, before any training.

Networks of many depths and weight scales learn handwritten digits for the same short time. What to see in the picture:
those that learn (bright) lie under the white curve, six times the depth scale over which a random network forgets its
input, computed without any network (Schoenholz et al., "Deep information propagation", ICLR 2017). Left of the edge of
chaos (dotted) gradients vanish over depth, right of it they explode. At the edge the depth scale is infinite; what
limits depth there is width and training time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from stabkit import demo, meanfield

WIDTH, CLASSES = 80, 10
BIAS_VARIANCE = 0.05
DEPTHS = (4, 8, 14, 20, 28, 36, 46, 56)
WEIGHT_VARIANCES = (0.8, 1.0, 1.2, 1.4, 1.6, 1.76, 2.0, 2.4, 2.8, 3.4, 4.0)
UPDATES, BATCH, LEARNING_RATE, MOMENTUM = 150, 64, 2e-3, 0.9


def networks(depth: int, generator: torch.Generator) -> list[Tensor]:
    """Weights and biases of one network per weight scale, stacked along the first dimension; the head comes last."""
    scales = torch.tensor(WEIGHT_VARIANCES).sqrt()[:, None, None]
    parameters = []
    for fan_in in (64, *[WIDTH] * (depth - 1)):
        drawn = torch.randn(1, fan_in, WIDTH, generator=generator) * (scales / fan_in**0.5)
        biases = torch.randn(1, 1, WIDTH, generator=generator) * BIAS_VARIANCE**0.5
        parameters += [drawn, biases.repeat(len(scales), 1, 1)]
    head = torch.randn(1, WIDTH, CLASSES, generator=generator) / WIDTH**0.5
    return [p.requires_grad_() for p in (*parameters, head.repeat(len(scales), 1, 1))]


def outputs(parameters: list[Tensor], images: Tensor) -> Tensor:
    """``(scales, images, classes)``: every network on the same images."""
    x = images.expand(len(WEIGHT_VARIANCES), *images.shape)
    for weights, biases in zip(parameters[:-1:2], parameters[1::2], strict=True):
        x = torch.tanh(torch.baddbmm(biases, x, weights))
    return x @ parameters[-1]


def accuracies(depth: int, data: demo.Digits) -> Tensor:
    """``(scales,)``: the share of test images that is right after training, for every weight scale."""
    generator = torch.Generator().manual_seed(depth)
    parameters = networks(depth, generator)
    mean, deviation = data.train[0].mean(0), data.train[0].std()
    images, classes = (data.train[0] - mean) / deviation, data.train[1]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)
    for _ in range(UPDATES):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        found = outputs(parameters, images[chosen]).reshape(-1, CLASSES)
        loss = nn.functional.cross_entropy(found, classes[chosen].repeat(len(WEIGHT_VARIANCES)), reduction="sum")
        optimizer.zero_grad()
        (loss / BATCH).backward()
        optimizer.step()
    with torch.no_grad():
        guessed = outputs(parameters, (data.test[0] - mean) / deviation).argmax(-1)
    return (guessed == data.test[1]).float().mean(1)


def boundary(sigmas: np.ndarray) -> np.ndarray:
    """Six depth scales for every sigma_w."""
    points = [meanfield.fixed_point("tanh", sigma_w=float(s), sigma_b=BIAS_VARIANCE**0.5) for s in sigmas]
    return np.array([6 * point.xi_c for point in points])


def main(out: Path) -> None:
    """Train the networks and draw the map; the picture goes to ``out``."""
    torch.set_num_threads(1)  # the matrices are small: more threads stand in each other's way
    data = demo.digits(seed=0)
    shares = np.stack([accuracies(depth, data).numpy() for depth in DEPTHS])
    trained = np.array(WEIGHT_VARIANCES) ** 0.5
    sigmas = np.linspace(trained[0], trained[-1], 120)
    edge = meanfield.critical_sigma_w("tanh", BIAS_VARIANCE**0.5)
    limits = boundary(sigmas)

    figure = Figure(figsize=(6.2, 4.2), dpi=150, layout="constrained")
    ax = figure.subplots()
    colors = ax.pcolormesh(trained, DEPTHS, shares, shading="nearest", cmap="viridis", vmin=0.1, vmax=1)
    figure.colorbar(colors, label="test accuracy after training (chance: 0.1)")
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())
    ax.plot(sigmas, limits, color="white", linewidth=2.5, label=r"predicted boundary, $6\,\xi$")
    ax.axvline(edge, color="white", linestyle=":", linewidth=1.5, label=rf"edge of chaos, $\sigma_w$ = {edge:.3f}")
    ax.set(xlabel=r"$\sigma_w$ of the initial weights", ylabel="depth (layers)", title="Which tanh networks train")
    figure.legend(loc="outside lower center", ncols=2, facecolor="#303050", labelcolor="white", fontsize=9)
    figure.savefig(out)

    inside = np.array(DEPTHS)[:, None] <= boundary(trained)
    print(f"edge of chaos at sigma_w = {edge:.4f} for biases of variance {BIAS_VARIANCE}")
    print(f"mean accuracy under the predicted boundary {shares[inside].mean():.2f}, above {shares[~inside].mean():.2f}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("trainability_map.png"))
