"""What an analysis of some samples, probes and spectra costs, from trials on one and two samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stabkit.attribution.measure import EXPLAINED
from stabkit.jacobians.method_choice import DENSE_SIZE, LARGEST_DENSE, krylov_products
from stabkit.planning.machine_speed import Machine
from stabkit.planning.measured_run import Trial
from stabkit.results import Result

SPECTRA = ("auto", "full", "dense", "krylov", "none")
TRAINING_STEPS = 25.0  # that all Krylov spectra of a default report may cost together
_WALKS = 3.0  # through the whole model that cost as much as a training step
# measured by tests/benchmarks/scale.py on ResNet-50, MiniLM and GPT-2 small, CPU, one thread
_MARGINAL = 0.65  # seconds of one more sample over those of the first, where only one was tried
_CHAIN_WALKS = 3  # walks back through all steps that check the chain
_GAIN_WALKS = 4  # that measure steps and their branches, whatever the number of probes
_SINGULAR_SHARE = 0.8  # of the products allowed that the largest singular value takes
_PASSES = 4  # over the basis that make one new vector orthogonal to it, twice
_LAPACK_RATE = 1 / 40  # of the rate of a float32 matrix product: n^3 operations of an eigenvalue decomposition
_LAPACK_COPIES = 6  # of a dense matrix in float64
_BATCHED = 0.6  # seconds a vector of a dense Jacobian's large blocks over those of blocks of two


@dataclass(frozen=True)
class Settings:
    """What of an analysis can be had for less.

    Attributes:
        samples: how many of the batch are analysed.
        probes: random cotangents per sample; 1 with a loss.
        spectrum: one of ``SPECTRA``.
        spectrum_samples: how many samples' spectra are computed.
        spectrum_share: part of the work of the spectra that is done, for the steps that matter most.
    """

    samples: int
    probes: int
    spectrum: str
    spectrum_samples: int
    spectrum_share: float = 1.0


@dataclass(frozen=True)
class Price(Result):
    """What an analysis costs.

    Attributes:
        seconds: how long it takes.
        peak_bytes: the most that the process holds at once; None where the system does not say what a trial took.
        products: vectors multiplied with the Jacobian of a step or its transpose, over all steps, per sample.
        flops: floating-point operations of the forward passes and products.
        read_bytes: the bytes of weights that the forward passes and products read from memory.
    """

    seconds: float
    peak_bytes: int | None
    products: int
    flops: float
    read_bytes: float


@dataclass(frozen=True)
class Costs:
    """What was found out about a model.

    Attributes:
        machine: that it runs on.
        weight_bytes: the bytes of its parameters and buffers.
        one: the trial on one sample; on two where the model does not take one alone.
        two: the trial on two; None where there is one sample, or one took long.
    """

    machine: Machine
    weight_bytes: int
    one: Trial
    two: Trial | None = None

    def price(self, settings: Settings) -> Price:
        """What an analysis costs with these settings."""
        steps, samples = self.one.steps, settings.samples
        walk = self._grown(lambda trial: trial.probe, samples)
        seconds = self._grown(lambda trial: trial.seconds, samples) + (settings.probes - 1) * walk
        if settings.spectrum != "none":
            seconds += self._grown(lambda trial: trial.explaining, min(samples, EXPLAINED))
        walks = _CHAIN_WALKS + _GAIN_WALKS + settings.probes
        spectra = [self._spectrum(index, settings) for index in range(len(steps))]
        share = self._share(spectra, walk, settings)
        flops = walks * sum(step.flops for step in steps)
        flops += share * sum(one.products * step.flops for one, step in zip(spectra, steps, strict=True))
        reads = 1 + walks + share * sum(one.reads for one in spectra) / max(len(steps), 1)
        return Price(
            seconds=seconds + share * sum(one.seconds for one in spectra),
            peak_bytes=self._peak(samples, max((one.bytes for one in spectra), default=0)),
            products=walks * len(steps) + sum(int(share * one.products) for one in spectra),
            flops=(self.one.forward_flops / self.one.samples + flops) * samples,
            read_bytes=reads * self.weight_bytes,
        )

    def _share(self, spectra: Sequence[_Spectrum], walk: float, settings: Settings) -> float:
        """How much of the work of all spectra is done."""
        if settings.spectrum != "auto":
            return settings.spectrum_share
        whole = sum(one.seconds for one in spectra)
        sizes = [max(step.source, step.target) for step in self.one.steps]
        dense = sum(one.seconds for one, size in zip(spectra, sizes, strict=True) if size <= DENSE_SIZE)
        allowed = dense + min(whole - dense, TRAINING_STEPS * _WALKS * walk)
        return settings.spectrum_share * (allowed / whole if whole > 0 else 1.0)

    def _grown(self, cost: Callable[[Trial], float], samples: int) -> float:
        """A cost that grows by the same for every sample."""
        one = cost(self.one)
        marginal = _MARGINAL * one if self.two is None else max(cost(self.two) - one, 0.0)
        return one + (samples - 1) * marginal

    def _peak(self, samples: int, basis: int) -> int | None:
        """The trial's own peak grows with the samples; a basis comes on top of the recorded graph."""
        if self.one.peak is None:
            return None
        if self.two is not None and self.two.peak is not None:
            return int(self._grown(lambda trial: trial.peak or 0, samples)) + basis
        return self.one.peak + (samples - 1) * max(self.one.graph_bytes, 0) + basis

    def _spectrum(self, index: int, settings: Settings) -> _Spectrum:
        if settings.spectrum == "none":
            return _Spectrum()
        step = self.one.steps[index]
        size = max(step.source, step.target)
        dense = settings.spectrum == "dense" or (settings.spectrum in ("auto", "full") and size <= DENSE_SIZE)
        backward = self._grown(lambda trial: trial.steps[index].backward, settings.samples)
        forward = self._grown(lambda trial: trial.steps[index].forward, settings.samples)
        if dense and size > LARGEST_DENSE:
            return _Spectrum()  # refused
        kept = settings.spectrum_samples
        if dense:
            lapack = kept * size**3 / (self.machine.flops * _LAPACK_RATE)
            copies = _LAPACK_COPIES * kept * 8 * step.source * step.target
            return _Spectrum(step.target, 1, _BATCHED * step.target * backward + lapack, copies)
        allowed = krylov_products(size)
        pairs = int(_SINGULAR_SHARE * allowed) // 2  # of a product and one with the transpose
        seconds = pairs * (forward + backward)
        basis = kept * pairs * 8 * (step.source + step.target)
        traffic = pairs**2 / 2 * 8 * (step.source + step.target)
        products = 2 * pairs
        if step.square:
            seconds += allowed * forward
            products += allowed
            basis = max(basis, kept * allowed * 8 * size)
            traffic += allowed**2 / 2 * 8 * size
        seconds += kept * _PASSES * traffic / self.machine.bandwidth
        return _Spectrum(products, products / 2, seconds, basis)


@dataclass(frozen=True)
class _Spectrum:
    """Cost of one step's spectra: products, readings of its weights, seconds, bytes of the basis."""

    products: int = 0
    reads: float = 0.0
    seconds: float = 0.0
    bytes: int = 0
