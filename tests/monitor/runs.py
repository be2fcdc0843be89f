"""Small trainings that are healthy, and some that their learning rate ends, watched by a monitor without a closure."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.monitor import Monitor
from tests.monitor.divergences import CharacterGPT, CharacterLSTM, Digits, characters, digits

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
MOMENTUM = partial(SGD, momentum=0.9)
NESTEROV = partial(SGD, momentum=0.9, nesterov=True)
RMSPROP = torch.optim.RMSprop


class Flat(nn.Sequential):
    """A network of matrices on images of digits."""

    def __init__(self, act: type[nn.Module] = nn.Tanh, dropout: float = 0.0, width: int = 48) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(64, width), act(), nn.Dropout(dropout), nn.Linear(width, width), act(),
            nn.Linear(width, 10),
        )  # fmt: skip


def constant(rate: float) -> Callable[[int], float]:
    return lambda step: rate


def jump(low: float, high: float, at: int = 30) -> Callable[[int], float]:
    return lambda step: low if step < at else high


def climb(low: float, high: float, over: int = 60) -> Callable[[int], float]:
    return lambda step: low * (high / low) ** (min(step, over) / over)


def warm_up(rate: float, over: int = 20) -> Callable[[int], float]:
    return lambda step: rate * min(1.0, (step + 1) / over)


def stairs(low: float, high: float, at: int = 40) -> Callable[[int], float]:
    """A warm-up of two levels."""
    return lambda step: low if step < at else high


def one_cycle(rate: float, steps: int = 120) -> Callable[[int], float]:
    return lambda step: rate * (0.04 + 0.96 * math.sin(math.pi * min(1.0, step / steps)) ** 2)


def restarts(rate: float, period: int = 30) -> Callable[[int], float]:
    return lambda step: rate * 0.5 * (1 + math.cos(math.pi * (step % period) / period)) + 1e-5


gpt, lstm = partial(CharacterGPT, 24, 2), partial(CharacterLSTM, 24, 2)


def small_batches(size: int) -> Callable[[], Callable[[], tuple[Tensor, Tensor]]]:
    def draws() -> Callable[[], tuple[Tensor, Tensor]]:
        whole = digits()

        def draw() -> tuple[Tensor, Tensor]:
            x, y = whole()
            return x[:size], y[:size]

        return draw

    return draws


def all_digits() -> Callable[[], tuple[Tensor, Tensor]]:
    data = importlib.import_module("sklearn.datasets").load_digits()
    x, y = torch.tensor(data.images[:256, None], dtype=torch.float32) / 16, torch.tensor(data.target[:256])
    return lambda: (x, y)


def heavy_tails() -> Callable[[], tuple[Tensor, Tensor]]:
    """Regression on four samples a batch, some of them far out."""

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(4, 1, 8, 8)
        noise = torch.distributions.StudentT(2.5).sample((4, 10))
        return x, x.flatten(1)[:, :10] + 0.5 * noise

    return draw


def noisy_line() -> Callable[[], tuple[Tensor, Tensor]]:
    """Linear regression under much noise."""

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(4, 1, 8, 8)
        return x, x.flatten(1)[:, :10] + 2.0 * torch.randn(4, 10)

    return draw


def from_zero() -> nn.Module:
    last = nn.Linear(64, 10)
    nn.init.zeros_(last.weight)
    return nn.Sequential(nn.Flatten(), last)


def fine_tuned() -> nn.Module:
    """A network that has learnt its digits."""
    model, draw = Flat(nn.ReLU), digits()
    adam = ADAM(model.parameters(), lr=5e-3)
    for _ in range(150):
        x, y = draw()
        adam.zero_grad()
        loss_of(model(x), y).backward()  # type: ignore[no-untyped-call]
        adam.step()
    return model


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    if target.is_floating_point():
        return nn.functional.mse_loss(output, target)
    return nn.functional.cross_entropy(output, target)


HEALTHY: dict[str, tuple[Any, Any, Any, Callable[[int], float]]] = {
    "MLP, SGD": (Flat, digits, SGD, constant(0.2)),
    "MLP, momentum": (Flat, digits, MOMENTUM, constant(0.05)),
    "CNN, Adam": (Digits, digits, ADAM, constant(2e-3)),
    "CNN, Nesterov, one cycle": (Digits, digits, NESTEROV, one_cycle(0.05)),
    "transformer, AdamW, warm-up": (gpt, characters, ADAMW, warm_up(3e-3)),
    "transformer, Adam at once": (gpt, characters, ADAM, constant(3e-3)),
    "LSTM, Adam": (lstm, characters, ADAM, constant(5e-3)),
    "RMSprop": (Flat, digits, RMSPROP, constant(1e-3)),
    "restarts": (partial(Flat, nn.ReLU), digits, MOMENTUM, restarts(0.05)),
    "restarts of Adam": (partial(Flat, nn.ReLU), digits, ADAM, restarts(5e-3)),
    "a warm-up by a step of ten": (Flat, digits, MOMENTUM, stairs(0.005, 0.05)),
    "single samples": (Flat, small_batches(1), SGD, constant(0.02)),
    "two samples, Adam": (partial(Flat, nn.ReLU, 0.3), small_batches(2), ADAM, constant(1e-3)),
    "heavy tails": (Flat, heavy_tails, SGD, constant(0.05)),
    "heavy tails, Adam": (Flat, heavy_tails, ADAM, constant(2e-3)),
    "linear, from zero": (from_zero, noisy_line, SGD, constant(0.05)),
    "linear, from zero, Adam": (from_zero, noisy_line, ADAM, constant(0.01)),
    "fine-tuning": (fine_tuned, small_batches(4), SGD, constant(0.02)),
    "fine-tuning, Adam": (fine_tuned, small_batches(4), ADAM, constant(1e-3)),
    "edge of stability": (partial(Flat, nn.ReLU), all_digits, SGD, constant(0.4)),
    "edge of stability, momentum": (Flat, all_digits, MOMENTUM, constant(0.3)),
}

# model, data, optimizer, rate, the step whose update is the first one at fault
BLOW_UPS: dict[str, tuple[Any, Any, Any, Callable[[int], float], int]] = {
    "MLP, SGD, x100": (partial(Flat, nn.ReLU), digits, SGD, jump(0.1, 10.0), 30),
    "MLP, momentum, x100": (Flat, digits, MOMENTUM, jump(0.05, 5.0), 30),
    "MLP, Adam, x100": (partial(Flat, nn.ReLU), digits, ADAM, jump(2e-3, 0.2), 30),
    "CNN, SGD, x100": (Digits, digits, SGD, jump(0.1, 10.0), 30),
    "CNN, momentum, x100": (Digits, digits, MOMENTUM, jump(0.02, 2.0), 30),
    "CNN, Adam, x100": (Digits, digits, ADAM, jump(2e-3, 0.2), 30),
    "transformer, AdamW, x100": (gpt, characters, ADAMW, jump(3e-3, 0.3), 30),
    "LSTM, Adam, x100": (lstm, characters, ADAM, jump(5e-3, 0.5), 30),
    "MLP, SGD, at once": (partial(Flat, nn.ReLU), digits, SGD, constant(10.0), 0),
    "MLP, momentum, at once": (partial(Flat, nn.ReLU), digits, MOMENTUM, constant(2.0), 0),
    "MLP, Adam, at once": (partial(Flat, nn.ReLU), digits, ADAM, constant(0.5), 0),
    "CNN, momentum, a climb": (Digits, digits, MOMENTUM, climb(0.005, 20.0), 0),
    "MLP, SGD, a climb": (partial(Flat, nn.ReLU), digits, SGD, climb(0.05, 50.0), 0),
    "transformer, Adam, a climb": (gpt, characters, ADAM, climb(1e-3, 3.0), 0),
}


def watched(
    build: Any, data: Any, kind: Any, rate: Callable[[int], float], *, steps: int, every: int, seed: int = 0,
    **options: Any,
) -> tuple[Monitor, list[float]]:  # fmt: skip
    """A training under a monitor, with the losses."""
    torch.manual_seed(seed)
    model, draw = build(), data()
    optimizer = kind(model.parameters(), lr=rate(0))
    losses = []
    with Monitor(model, every, optimizer=optimizer, **options) as monitor:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            x, y = draw()
            optimizer.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            monitor.step(loss)
            optimizer.step()
            losses.append(loss.item())
    return monitor, losses


def adversaries(every: int, seed: int = 0, steps: int = 120) -> list[Monitor]:
    """A generator and a discriminator that take turns, under one monitor of both and one of each."""
    torch.manual_seed(seed)
    generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 64))
    judge = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    draw, criterion = digits(), nn.BCEWithLogitsLoss()
    optimizers = [ADAM(part.parameters(), lr=1e-3, betas=(0.5, 0.999)) for part in (generator, judge)]
    both = Monitor(nn.ModuleList([generator, judge]), every, optimizer=optimizers)
    own = [Monitor(part, every, optimizer=one) for part, one in zip((generator, judge), optimizers, strict=True)]
    ones, zeros = torch.ones(32, 1), torch.zeros(32, 1)
    for step in range(2 * steps):
        turn = 1 - step % 2  # the discriminator goes first
        optimizers[turn].zero_grad()
        fake = generator(torch.randn(32, 8))
        if turn:
            loss = criterion(judge(draw()[0].flatten(1)), ones) + criterion(judge(fake.detach()), zeros)
        else:
            loss = criterion(judge(fake), ones)
        loss.backward()
        own[turn].step(loss)
        both.step(loss)
        optimizers[turn].step()
    for monitor in (both, *own):
        monitor.close()
    return [both, *own]
