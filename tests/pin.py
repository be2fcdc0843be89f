"""The numbers of every public analyzer on small models, written down and compared.

``python -m tests.pin write FILE`` stores them, ``python -m tests.pin compare FILE [--only NAME]`` measures again (or
takes them from ``--with OTHER``) and prints every field that differs; its exit code is 1 if any does. ``--only`` keeps
the models or analyzers whose name contains NAME.

What counts as equal:

- float64 models: 1e-12 of the larger of the number and the largest number of its field.
- float32 models: 1e-5 of it. Their products may be summed in another order when they are batched, which moves a
  result by the rounding unit (6e-8) times the square root of the numbers summed (20 layers of 64: 36), and a
  gradient that has come through all layers by a few times that.
- residuals and errors, which are rounding alone, where both are below 1e-9 (float64) or 1e-4 (float32) of one.
- eigenvalues are sets: they are matched before they are compared, and with them what belongs to each.
- numbers within texts are compared as numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

import stabkit
from tests.pin_comparison import compare, table
from tests.pin_models import MODELS, Residual, Subject

WRITTEN_OUT = 64  # numbers of a state up to which a Jacobian is stored whole
UNSTEADY = {"seconds", "versions", "time", "wall_time", "trained_seconds", "message_time"}


# ---------------------------------------------------------------- results as plain data


def plain(value: Any) -> Any:
    """A result as JSON data; what changes from run to run, such as times, is left out."""
    if value is None or isinstance(value, bool | int | float | str):
        if value in ("NaN", "Infinity", "-Infinity"):
            return float(value)
        return re.sub(r"0x[0-9a-f]+", "0x", value) if isinstance(value, str) else value
    if isinstance(value, complex):
        return [value.real, value.imag]
    if isinstance(value, Tensor):
        value = value.detach()
        return (torch.view_as_real(value) if value.is_complex() else value).tolist()
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if key not in UNSTEADY}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if dataclasses.is_dataclass(value):
        shown = [f.name for f in dataclasses.fields(value) if f.repr and not f.name.startswith("_")]
        return plain({name: getattr(value, name) for name in shown})
    return f"<{type(value).__name__}>"


def attempt(work: Callable[[], Any]) -> Any:
    """What some work gives, or the error that it ends with."""
    torch.manual_seed(0)
    try:
        return plain(work())
    except Exception as error:  # any error is a result here: it is pinned like a number
        return plain({"error": type(error).__name__, "says": (str(error).splitlines() or [""])[0]})


# ---------------------------------------------------------------- the analyzers

Flow = Any


def trace(subject: Subject, flow: Flow) -> Any:
    if not isinstance(flow, stabkit.Flow):
        return {"repr": repr(flow), "notes": flow.notes}
    return {
        "chain_error": flow.chain_error,
        "names": [step.name for step in flow.steps],
        "module_paths": [step.module_path for step in flow.steps],
        "kinds": [step.kind for step in flow.steps],
        "operations": [step.operations for step in flow.steps],
        "sample_shapes": [state.sample_shapes for state in flow.states],
        "notes": flow.notes,
    }


def chosen(flow: Flow) -> list[int]:
    """The first, the middle and the last step."""
    return sorted({0, len(flow.steps) // 2, len(flow.steps) - 1})


def jacobian(subject: Subject, flow: Flow) -> Any:
    found = {}
    for index in chosen(flow):
        J = flow.steps[index].jacobian()
        draw = torch.Generator().manual_seed(1)
        columns, rows = (
            torch.randn(J.shape[0], n, 2, generator=draw, dtype=torch.float64).to(subject.dtype) for n in J.shape[:0:-1]
        )
        products = {"shape": list(J.shape), "forward": (J @ columns), "backward": J.T @ rows}
        small = max(J.shape[1:]) <= WRITTEN_OUT
        found[f"step {index}"] = products | ({"dense": J.dense()} if small else {})
    whole = (lambda: flow.jacobian()) if callable(getattr(flow, "jacobian", None)) else None
    if whole and not subject.large and max(flow.states[0].size, flow.states[-1].size) <= WRITTEN_OUT:
        found["flow"] = {"dense": whole().dense()}
    if subject.large:  # sums show a change as well as the numbers do
        for parts in found.values():
            for way in ("forward", "backward"):
                parts[way] = {"norm": parts[way].norm(dim=1), "first": parts[way][:, :4]}
    return found


def middle(flow: Flow) -> Any:
    return flow.steps[len(flow.steps) // 2].jacobian()


def eigenvalues(subject: Subject, flow: Flow) -> Any:
    if subject.large:
        return {}
    found = {}
    for index in chosen(flow):
        J = flow.steps[index].jacobian()
        if J.shape[1] == J.shape[2]:
            found[f"step {index}"] = attempt(lambda J=J: stabkit.eigenvalues(J))
    found["krylov"] = attempt(lambda: stabkit.eigenvalues(middle(flow), 2, method="krylov-schur"))
    return found


def singular_values(subject: Subject, flow: Flow) -> Any:
    if subject.large:
        return {"last": attempt(lambda: stabkit.singular_values(flow.steps[-2].jacobian(), 2, tol=1e-3))}
    steps = {
        f"step {index}": attempt(lambda index=index: stabkit.singular_values(flow.steps[index].jacobian()))
        for index in chosen(flow)
    }
    return steps | {"krylov": attempt(lambda: stabkit.singular_values(middle(flow), 2, method="golub-kahan"))}


def non_normality(subject: Subject, flow: Flow) -> Any:
    return {} if subject.large else stabkit.non_normality(middle(flow))


def lyapunov_spectrum(subject: Subject, flow: Flow) -> Any:
    return stabkit.lyapunov_spectrum(flow, min(3, *(state.size for state in flow.states)))


def finite_time_exponents(subject: Subject, flow: Flow) -> Any:
    return stabkit.finite_time_exponents(flow, min(2, *(state.size for state in flow.states)))


def gradient_profile(subject: Subject, flow: Flow) -> Any:
    profile = stabkit.gradient_profile(flow, probes=3)
    return {"profile": profile, "interval": profile.interval(), "total_growth": profile.total_growth}


def gradient_profile_of_a_loss(subject: Subject, flow: Flow) -> Any:
    return stabkit.gradient_profile(flow, subject.loss) if subject.loss else {}


def identify(subject: Subject, flow: Flow) -> Any:
    return stabkit.identify(flow)


def attribute(subject: Subject, flow: Flow) -> Any:
    options = {"samples": 1, "probes": 4} if subject.large else {"samples": min(2, flow.batch)}
    return stabkit.attribute(flow, **options)


def attribute_to_a_loss(subject: Subject, flow: Flow) -> Any:
    if subject.loss is None or subject.large:
        return {}
    return stabkit.attribute(flow, subject.loss, samples=min(2, flow.batch))


def diagnose(subject: Subject, flow: Flow) -> Any:
    return stabkit.diagnose(flow)


def diagnose_a_loss(subject: Subject, flow: Flow) -> Any:
    return stabkit.diagnose(flow, subject.loss) if subject.loss else {}


def analyze(subject: Subject, flow: Flow) -> Any:
    if subject.call is None:
        return {}
    model, inputs, kwargs = subject.call
    return stabkit.analyze(model, *inputs, kwargs=kwargs, loss=subject.loss, **subject.options)


def mean_field(subject: Subject, flow: Flow) -> Any:
    if subject.call is None or subject.large:
        return {}
    model, inputs, kwargs = subject.call
    return stabkit.meanfield.at_initialisation(model, *inputs, **({"kwargs": kwargs} if kwargs else {}))


ANALYZERS: tuple[Callable[[Subject, Flow], Any], ...] = (
    trace,
    jacobian,
    eigenvalues,
    singular_values,
    non_normality,
    lyapunov_spectrum,
    finite_time_exponents,
    gradient_profile,
    gradient_profile_of_a_loss,
    identify,
    attribute,
    attribute_to_a_loss,
    diagnose,
    diagnose_a_loss,
    analyze,
    mean_field,
)


# ---------------------------------------------------------------- what has no model of the list


def integrators() -> Any:
    """The catalogue: how large its regions are, and where its methods sit."""
    points = np.array([-1.0, -0.5 + 0.5j, 0.3j, -2.5 + 1j, 0.1])
    found = {}
    for entry in stabkit.integrators.catalogue_entry():

        def numbers(name: str = entry.name) -> Any:
            method = stabkit.integrators.named(name)
            kept: dict[str, Any] = {}
            for of in ("real_interval", "imaginary_interval", "alpha", "order", "damping_at_infinity"):
                read = getattr(method, of, None)
                kept[of] = attempt(lambda read=read: read() if callable(read) else read)
            for of in ("is_A_stable", "is_L_stable", "is_explicit", "name"):
                read = getattr(method, of, None)
                kept[of] = attempt(lambda read=read: read() if callable(read) else read)
            kept["amplification"] = attempt(lambda: method.amplification(points))
            return kept

        found[entry.name] = {"family": entry.family, "source": entry.source} | attempt(numbers)
    return found


def mean_field_theory() -> Any:
    from stabkit import meanfield

    return {
        name: {sigma: attempt(lambda n=name, s=sigma: meanfield.critical_sigma_w(n, sigma_b=s)) for sigma in (0.0, 0.1)}
        for name in ("tanh", "erf", "relu", "gelu")
    }


def monitor() -> Any:
    """Records of twelve steps of training, the last of them with a spike."""
    model = nn.Sequential(nn.Linear(6, 6), *(Residual(6) for _ in range(3)), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with (
        tempfile.TemporaryDirectory() as folder,
        stabkit.Monitor(model, 1, optimizer=optimizer, directory=folder, probe_every=4) as watch,
    ):
        for step in range(12):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 6) * (1e4 if step == 11 else 1)).square().mean()
            loss.backward()
            watch.step(loss)
            optimizer.step()
        return {
            "records": [record.to_dict() for record in watch.records],
            "findings": [{"kind": f.kind, "severity": getattr(f, "severity", None)} for f in watch.findings],
        }


class Tower(nn.Module):
    """A small language model without attention, as it lies in a directory of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Residual(8) for _ in range(4))
        self.head = nn.Linear(8, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def streaming() -> Any:
    """A directory of weights, one block at a time."""
    from safetensors.torch import save_file

    weights = {name: tensor.clone() for name, tensor in Tower().state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, Path(folder) / "model.safetensors")
        return stabkit.streaming.analyze_files(
            folder, torch.arange(12).view(2, 6), model=Tower, probes=2, k=2, tol=1e-5, max_products=100
        )


def network() -> nn.Module:
    """The factory of `compare`."""
    return nn.Sequential(nn.Linear(5, 8), *(Residual(8) for _ in range(4)), nn.Linear(8, 3)).double()


def compare_checkpoints() -> Any:
    """Two checkpoints, side by side and over time."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for step in (1, 2):
            model = network()
            with torch.no_grad():
                model[2].f[0].weight.mul_(step)
            paths.append(f"{folder}/step{step}.pt")
            torch.save(model.state_dict(), paths[-1])
        x = torch.randn(3, 5, dtype=torch.float64)
        found = json.dumps(plain(stabkit.compare(paths, model=network, input=x)))
    return _without_hashes(json.loads(found.replace(folder, "FOLDER")))


def _without_hashes(value: Any) -> Any:
    """A file that torch saves is not the same to the last byte, so neither is what is hashed from it."""
    if isinstance(value, dict):
        return {key: _without_hashes(item) for key, item in value.items() if key != "content"}
    return [_without_hashes(item) for item in value] if isinstance(value, list) else value


ALONE: tuple[Callable[[], Any], ...] = (integrators, mean_field_theory, monitor, streaming, compare_checkpoints)
_SINGLE = {"monitor", "streaming"}  # whose models are float32


def measure(only: str = "") -> dict[str, Any]:
    """The numbers of all models, by model and analyzer."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # sums of several threads have another order
    with threadpool_limits(1):
        return _measure(only)


def _measure(only: str) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    every_analyzer = not any(only in analyzer.__name__ for analyzer in ANALYZERS)
    for name, make in MODELS.items():
        wanted = [a for a in ANALYZERS if only in name or (not every_analyzer and only in a.__name__)]
        if not wanted:
            continue
        began = time.process_time()
        torch.manual_seed(0)
        subject = make()
        flow = subject.flow()
        numbers[name] = {"dtype": str(subject.dtype).removeprefix("torch.")}
        for analyzer in wanted:
            numbers[name][analyzer.__name__] = attempt(lambda a=analyzer, s=subject, f=flow: a(s, f))
        print(f"{name}: {time.process_time() - began:.1f} s", file=sys.stderr, flush=True)
    for work in ALONE:
        if only in work.__name__:
            dtype = "float32" if work.__name__ in _SINGLE else "float64"
            began = time.process_time()
            numbers[work.__name__] = {"dtype": dtype, work.__name__: attempt(work)}
            print(f"{work.__name__}: {time.process_time() - began:.1f} s", file=sys.stderr, flush=True)
    return numbers


# ---------------------------------------------------------------- comparison


def main() -> int:
    """Write or compare."""
    parser = argparse.ArgumentParser(prog="python -m tests.pin", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["write", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="models or analyzers whose name contains this")
    parser.add_argument("--with", dest="other", type=Path, help="numbers that were written before, instead of new ones")
    given = parser.parse_args()
    if given.what == "write":
        given.file.write_text(json.dumps(measure(given.only), indent=0))
        return 0
    old = plain(json.loads(given.file.read_text()))
    new = plain(json.loads(given.other.read_text() if given.other else json.dumps(measure(given.only))))
    found = compare(old, new, everything=not given.only)
    print(table(found))
    print(f"{len(found)} differences in {len(new)} models, stabkit of {Path(stabkit.__file__).parent}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
