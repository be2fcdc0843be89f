"""Losses that fall without end, and those that look like them and do not, as people write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Beta, Categorical, Normal, TanhTransform, TransformedDistribution
from torch.nn import functional as F  # noqa: N812

from tests.diagnosis.models_without_end import VAE, ActNorm, Autoencoder, Density, Flow, MultiTask, Pixels, mlp

Subject = tuple[nn.Module, Tensor, Callable[[Any], Tensor]]
Make = Callable[[], Subject]
BROKEN: dict[str, Make] = {}
HEALTHY: dict[str, Make] = {}


def in_table(
    table: dict[str, Make], name: str, *args: Any
) -> Callable[[Callable[..., Subject]], Callable[..., Subject]]:
    """Enter what makes a subject under a name."""

    def enter(make: Callable[..., Subject]) -> Callable[..., Subject]:
        def seeded() -> Subject:
            torch.manual_seed(0)
            return make(*args)

        table[name] = seeded
        return make

    return enter


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


AGE, KIND = drawn(32, 1, seed=2), torch.arange(32) % 5


@in_table(BROKEN, "free weights of tasks", lambda w, one, two: w[0] * one + w[1] * two, 1.0)
@in_table(
    BROKEN, "weights by exp(-s) without s", lambda s, one, two: (torch.exp(-s) * torch.stack([one, two])).sum(), 0.0
)
@in_table(
    HEALTHY,
    "uncertainty weights with their logarithm",
    lambda s, a, b: (s.neg().exp() * torch.stack([a, b]) + s).sum(),
    0.0,
)
@in_table(
    HEALTHY,
    "Kendall with sigma squared",
    lambda s, a, b: 0.5 * a / s[0] ** 2 + b / s[1] ** 2 + s.abs().log().sum(),
    1.0,
)
@in_table(
    HEALTHY,
    "Liebel with log(1 + s^2)",
    lambda s, a, b: (torch.stack([a, b]) / (2 * s**2)).sum() + torch.log(1 + s**2).sum(),
    1.0,
)
@in_table(HEALTHY, "weights by a softmax", lambda s, a, b: (s.softmax(0) * torch.stack([a, b])).sum(), 0.0)
def multi_task(total: Callable[..., Tensor], start: float) -> Subject:
    def loss(out: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        age, kind, weights = out
        return total(weights, F.mse_loss(age, AGE), F.cross_entropy(kind, KIND))

    return MultiTask(start), drawn(32, 12), loss


@in_table(BROKEN, "a VAE with the KL subtracted", -1.0, 1.0)
@in_table(BROKEN, "a VAE with the KL subtracted a little", -0.1, 1.0)
@in_table(HEALTHY, "a VAE", 1.0, 1.0)
@in_table(HEALTHY, "a beta-VAE of means", 4.0, 1 / 32)
def vae(sign: float, by: float) -> Subject:
    x = drawn(32, 36).sigmoid()

    def loss(out: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        recon, mu, logvar = out
        bce = F.binary_cross_entropy(recon, x, reduction="sum")
        kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return by * (bce + sign * kld)

    return VAE(), x, loss


@in_table(BROKEN, "a flow with its log-determinant subtracted", -1.0)
@in_table(HEALTHY, "a flow", 1.0)
def flow(sign: float) -> Subject:
    def loss(out: tuple[Tensor, Tensor]) -> Tensor:
        z, log_det = out
        log_p = Normal(0.0, 1.0).log_prob(z).sum(-1)
        return -(log_p + sign * log_det).mean()

    return Flow(), 2 + drawn(64, 4), loss


@in_table(BROKEN, "a log_prob with its log-determinant subtracted", -1.0)
@in_table(HEALTHY, "a log_prob", 1.0)
def density(sign: float) -> Subject:
    return Density(sign), 2 + drawn(64, 4), lambda out: -out.mean()


MASK = (drawn(8, 1, 12, 12, seed=3) > 0.8).float()


def segmenter(*last: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 1, 1),
        *last,
    )


def dice(p: Tensor, smooth: float = 1.0) -> Tensor:
    inter = (p * MASK).sum()
    return 1 - (2.0 * inter + smooth) / (p.sum() + MASK.sum() + smooth)


def iou(p: Tensor) -> Tensor:
    p, t = p.flatten(1), MASK.flatten(1)
    inter = (p * t).sum(1)
    return (1 - (inter + 1e-6) / (p.sum(1) + t.sum(1) - inter + 1e-6)).mean()


@in_table(BROKEN, "dice of logits", dice)
@in_table(BROKEN, "IoU of logits", iou)
@in_table(
    BROKEN, "cross entropy and dice of logits", lambda out: F.binary_cross_entropy_with_logits(out, MASK) + dice(out)
)
@in_table(HEALTHY, "dice of probabilities", lambda out: dice(out.sigmoid()))
@in_table(
    HEALTHY, "cross entropy and dice", lambda out: F.binary_cross_entropy_with_logits(out, MASK) + dice(out.sigmoid())
)
@in_table(HEALTHY, "minus the dice coefficient", lambda out: dice(out.sigmoid()) - 1)
@in_table(HEALTHY, "log of dice", lambda out: -torch.log(1 - dice(out.sigmoid())))
def segmentation(loss: Callable[[Tensor], Tensor]) -> Subject:
    return segmenter(), MASK + 0.5 * drawn(8, 1, 12, 12), loss


LABELS = torch.arange(32) % 4
TARGETS = drawn(32, 4, seed=5)
PLUS = (LABELS[:, None] == torch.arange(4)).float()
ADVANTAGES = drawn(32, seed=6)
ADVANTAGES = (ADVANTAGES - ADVANTAGES.mean()) / ADVANTAGES.std()


@in_table(BROKEN, "a mean squared error maximised", lambda out: -F.mse_loss(out, TARGETS))
@in_table(BROKEN, "a log-likelihood that is minimised", lambda out: (PLUS * out.log_softmax(-1)).sum(-1).mean())
@in_table(BROKEN, "log_prob of labels that is minimised", lambda out: Categorical(logits=out).log_prob(LABELS).mean())
@in_table(BROKEN, "spread that is maximised", lambda out: F.cross_entropy(out, LABELS) - 0.1 * out.pow(2).mean())
@in_table(HEALTHY, "REINFORCE", lambda out: -(Categorical(logits=out).log_prob(LABELS) * ADVANTAGES).mean())
@in_table(
    HEALTHY, "REINFORCE of costs", lambda out: (Categorical(logits=out).log_prob(LABELS) * (2 + ADVANTAGES.abs())).sum()
)
@in_table(
    HEALTHY,
    "A2C with an entropy bonus",
    lambda out: (
        -(Categorical(logits=out[:, :3]).log_prob(LABELS % 3) * ADVANTAGES).mean()
        + 0.5 * F.mse_loss(out[:, 3], TARGETS[:, 0])
        - 0.01 * Categorical(logits=out[:, :3]).entropy().mean()
    ),
)
@in_table(
    HEALTHY,
    "PPO",
    lambda out: (
        -torch.min(
            (r := (Categorical(logits=out).log_prob(LABELS) + 1.386).exp()) * ADVANTAGES, r.clamp(0.8, 1.2) * ADVANTAGES
        ).mean()
    ),
)
@in_table(HEALTHY, "a score that is maximised", lambda out: -out.mean())
@in_table(HEALTHY, "negative cosines", lambda out: -F.cosine_similarity(out, TARGETS).mean())
@in_table(HEALTHY, "cross entropy by hand", lambda out: -(PLUS * out.log_softmax(-1)).sum(-1).mean())
@in_table(
    HEALTHY,
    "cross entropy less its entropy",
    lambda out: F.cross_entropy(out, LABELS) - 0.1 * Categorical(logits=out).entropy().mean(),
)
@in_table(HEALTHY, "a critic of two halves", lambda out: out[:16].mean() - out[16:].mean())
@in_table(HEALTHY, "a critic with a hinge", lambda out: F.relu(1 - out[:16]).mean() + F.relu(1 + out[16:]).mean())
@in_table(HEALTHY, "a mutual information", lambda out: -(out[:16].mean() - out[16:].exp().mean().log()))
@in_table(
    HEALTHY,
    "soft dice of a softmax",
    lambda out: 1 - (2 * out.softmax(-1) * PLUS).sum() / (out.softmax(-1) + PLUS).sum(),
)
def classifier(loss: Callable[[Tensor], Tensor]) -> Subject:
    return mlp(12, 64, 64, 4), drawn(32, 12), loss


@in_table(BROKEN, "triplets without a hinge", lambda a, p, n: (a - p).pow(2).sum(-1) - (a - n).pow(2).sum(-1))
@in_table(
    BROKEN,
    "triplets of distances without a hinge",
    lambda a, p, n: F.pairwise_distance(a, p) - F.pairwise_distance(a, n) + 1.0,
)
@in_table(
    BROKEN,
    "negatives that are pushed away without end",
    lambda a, p, n: (a - p).pow(2).sum(-1) + -0.5 * (a - n).pow(2).sum(-1),
)
@in_table(HEALTHY, "triplets", lambda a, p, n: F.relu((a - p).pow(2).sum(-1) - (a - n).pow(2).sum(-1) + 1.0))
@in_table(
    HEALTHY,
    "triplets of normalised embeddings",
    lambda a, p, n: (
        (F.normalize(a, dim=-1) - F.normalize(p, dim=-1)).pow(2).sum(-1)
        - (F.normalize(a, dim=-1) - F.normalize(n, dim=-1)).pow(2).sum(-1)
    ),
)
@in_table(HEALTHY, "triplets by a softplus", lambda a, p, n: F.softplus((a * n).sum(-1) - (a * p).sum(-1)))
@in_table(
    HEALTHY,
    "contrastive",
    lambda a, p, n: F.cross_entropy(F.normalize(a, dim=-1) @ F.normalize(p, dim=-1).T / 0.1, torch.arange(16)),
)
def triplets(each: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Subject:
    x = drawn(16, 12)
    given = torch.cat([x, x + 0.3 * drawn(16, 12, seed=8), drawn(16, 12, seed=9)])
    return mlp(12, 64, 16), given, lambda out: each(*out.chunk(3)).mean()


@in_table(
    BROKEN,
    "an entropy that is maximised",
    lambda mean, log_std: F.mse_loss(mean, TARGETS) - 0.1 * Normal(mean, log_std.exp()).entropy().mean(),
)
@in_table(
    BROKEN,
    "Gaussian likelihood with the wrong sign",
    lambda mean, log_std: Normal(mean, log_std.exp()).log_prob(TARGETS).mean(),
)
@in_table(
    BROKEN,
    "Gaussian likelihood with the log of its scale subtracted",
    lambda m, s: (0.5 * ((TARGETS - m) ** 2) * torch.exp(-s) - 0.5 * s).mean(),
)
@in_table(HEALTHY, "Gaussian likelihood", lambda mean, log_std: -Normal(mean, log_std.exp()).log_prob(TARGETS).mean())
@in_table(
    HEALTHY, "Gaussian likelihood by hand", lambda m, s: (0.5 * ((TARGETS - m) ** 2) * torch.exp(-s) + 0.5 * s).mean()
)
@in_table(
    HEALTHY,
    "Gaussian likelihood of what is learnt exactly",
    lambda m, s: (0.5 * (m - 3.0) ** 2 * torch.exp(-s) + 0.5 * s).mean(),
)
@in_table(HEALTHY, "gaussian_nll_loss", lambda m, s: F.gaussian_nll_loss(m, TARGETS, F.softplus(s)))
@in_table(
    HEALTHY,
    "beta-NLL",
    lambda m, s: (F.gaussian_nll_loss(m, TARGETS, s.exp(), reduction="none") * s.exp().detach() ** 0.5).mean(),
)
@in_table(HEALTHY, "Laplace likelihood", lambda m, s: ((TARGETS - m).abs() * torch.exp(-s) + s).mean())
@in_table(HEALTHY, "Beta likelihood", lambda m, s: -Beta(m.exp(), s.exp()).log_prob(TARGETS.sigmoid()).mean())
@in_table(
    HEALTHY,
    "soft actor-critic's log_prob",
    lambda m, s: (
        0.2
        * TransformedDistribution(Normal(m, s.clamp(-20, 2).exp()), [TanhTransform(cache_size=1)])
        .log_prob(torch.tanh(m.detach() + 0.1))
        .sum(-1)
        + (torch.tanh(m) - TARGETS).pow(2).sum(-1)
    ).mean(),
)
@in_table(
    HEALTHY,
    "REINFORCE of a Gaussian policy",
    lambda m, s: (
        -(Normal(m, s.clamp(-5, 2).exp()).log_prob(TARGETS).sum(-1) * ADVANTAGES).mean() - 0.01 * s.clamp(-5, 2).mean()
    ),
)
def gaussian(each: Callable[[Tensor, Tensor], Tensor]) -> Subject:
    return mlp(12, 64, 64, 8), drawn(32, 12), lambda out: each(*out.chunk(2, -1))


@in_table(
    HEALTHY,
    "a learnt temperature",
    lambda a, b, s: F.cross_entropy(s.exp() * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T, torch.arange(32)),
)
@in_table(
    HEALTHY,
    "a learnt bias and scale of sigmoids",
    lambda a, b, s: (
        -F.logsigmoid(
            (2 * torch.eye(32) - 1) * (s.exp() * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T - 10)
        ).sum()
        / 32
    ),
)
def pairs(each: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Subject:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.size = mlp(12, 32, 16), mlp(12, 32, 16), nn.Parameter(torch.tensor(2.66))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.one(x), self.two(x), self.size

    return Pairs(), drawn(32, 12), lambda out: each(*out)


@in_table(HEALTHY, "a chain of labels")
def chain() -> Subject:
    class CRF(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.transitions = mlp(6, 32, 4), nn.Parameter(torch.zeros(4, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x), self.transitions

    tags = torch.arange(80).reshape(8, 10) % 4

    def loss(out: tuple[Tensor, Tensor]) -> Tensor:
        emissions, transitions = out
        score = emissions.gather(-1, tags[..., None]).sum((1, 2)) + transitions[tags[:, :-1], tags[:, 1:]].sum(1)
        alpha = emissions[:, 0]
        for i in range(1, 10):
            alpha = torch.logsumexp(alpha[:, :, None] + transitions, 1) + emissions[:, i]
        return (torch.logsumexp(alpha, 1) - score).mean()

    return CRF(), drawn(8, 10, 6), loss


@in_table(HEALTHY, "a generator before a critic")
def generator() -> Subject:
    critic = mlp(6, 32, 1).requires_grad_(False)
    return mlp(8, 32, 6), drawn(32, 8), lambda out: -critic(out).mean()


@in_table(HEALTHY, "an actor before a critic, with its log_prob")
def actor() -> Subject:
    critic = mlp(2, 32, 1)

    def loss(out: Tensor) -> Tensor:
        mean, log_std = out.chunk(2, -1)
        normal = Normal(mean, log_std.clamp(-20, 2).exp())
        raw = normal.rsample()
        action = torch.tanh(raw)
        log_p = (normal.log_prob(raw) - torch.log(1 - action.pow(2) + 1e-6)).sum(-1)
        return (0.2 * log_p - critic(action).squeeze(-1)).mean()

    return mlp(8, 32, 4), drawn(32, 8), loss


@in_table(HEALTHY, "domains that are to be confused, by a net of another optimizer")
def confusion() -> Subject:
    domain = mlp(16, 32, 2)
    head = nn.Linear(16, 4)

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = mlp(12, 32, 16), head

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            f = self.body(x)
            return f, self.head(f)

    return (
        Features(),
        drawn(32, 12),
        lambda out: F.cross_entropy(out[1], LABELS) - 0.3 * F.cross_entropy(domain(out[0]), LABELS % 2),
    )


@in_table(HEALTHY, "a mixture of Gaussians")
def mixture() -> Subject:
    def loss(out: Tensor) -> Tensor:
        logits, mean, log_std = out.chunk(3, -1)
        each = Normal(mean, log_std.exp()).log_prob(TARGETS[:, :1])
        return -torch.logsumexp(logits.log_softmax(-1) + each, -1).mean()

    return mlp(12, 64, 64, 15), drawn(32, 12), loss


@in_table(BROKEN, "weights that the loss holds itself")
def weights_of_the_loss() -> Subject:
    class Weighed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.ones(2))

        def forward(self, out: Tensor) -> Tensor:
            return self.weights[0] * F.mse_loss(out, TARGETS) + self.weights[1] * F.l1_loss(out, TARGETS)

    return mlp(12, 64, 4), drawn(32, 12), Weighed()


@in_table(BROKEN, "a VAE that returns its loss without the minus", 1.0)
@in_table(HEALTHY, "a VAE that returns its loss", -1.0)
def autoencoder(sign: float) -> Subject:
    return Autoencoder(sign), drawn(16, 1, 12, 12), lambda loss: loss


@in_table(HEALTHY, "scales of a flow", -1.0, 1.0)
@in_table(HEALTHY, "a flow of data in units of 0.1", -1.0, 0.1)
def scales(sign: float, unit: float) -> Subject:
    return ActNorm(6), unit * (3 * drawn(40, 6) + 1), lambda o: (0.5 * o[0].square().sum(1) + sign * o[1]).mean()


@in_table(HEALTHY, "uncertainty weights of tiny losses", 1e-3)
def tiny(unit: float) -> Subject:
    def loss(out: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        made, _, s = out
        one, two = F.mse_loss(unit * made, unit * AGE), F.l1_loss(unit * made, unit * AGE)
        return s.neg().exp()[0] * one + s[0] + s.neg().exp()[1] * two + s[1]

    return MultiTask(0.0), drawn(32, 12), loss


@in_table(HEALTHY, "a temperature of soft actor-critic, which rises against the policy")
def temperature() -> Subject:
    def loss(out: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        mean, kind, log_alpha = out
        log_p = Normal(mean, 1.0).log_prob(AGE).sum(-1)
        return -(log_alpha[0] * (log_p.detach() + 2)).mean() + F.mse_loss(mean, AGE) + F.cross_entropy(kind, KIND)

    return MultiTask(0.0), drawn(32, 12), loss


@in_table(HEALTHY, "a flow of pixels")
def pixels() -> Subject:
    return Pixels(), drawn(40, 16).sigmoid() / 2, lambda o: (-Normal(0.0, 1.0).log_prob(o[0]).sum(1) - o[1]).mean()
