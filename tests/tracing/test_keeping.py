"""Threads, processes, generators: what a pass changes of the process, and what others do meanwhile."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stabkit
from stabkit.errors import TraceError
from tests.models.awkward import CASES
from tests.models.deep_fingerprint import differences, process

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore")
def test_four_threads_that_trace_leave_the_process_as_it_was():
    made = [CASES[name]() for name in list(CASES)[:40]]
    before = process()
    done: list = []

    def work(part: list) -> None:
        for one in part:
            with contextlib.suppress(stabkit.StabkitError):
                stabkit.trace(one.model, *one.args, kwargs=one.kwargs)
            done.append(one)

    threads = [threading.Thread(target=work, args=(made[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 40
    assert differences(before, process()) == []


class Elsewhere(nn.Module):
    """While it runs, something happens in another thread."""

    def __init__(self, happens: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.body, self.happens = nn.Linear(4, 4), happens

    def forward(self, x: Tensor) -> Tensor:
        thread = threading.Thread(target=self.happens, args=(self,))
        thread.start()
        thread.join()
        return self.body(x).tanh()


def updated(model: nn.Module) -> None:
    with torch.no_grad():
        model.body.weight.add_(1)


def differentiated(model: nn.Module) -> None:
    model.body.weight.grad = torch.ones(4, 4)


@pytest.mark.parametrize("happens", [updated, differentiated])
def test_a_model_that_is_trained_in_another_thread_is_refused_and_keeps_what_that_did(happens):
    model = Elsewhere(happens)
    expected = model.body.weight.detach() + (happens is updated)
    with pytest.raises(TraceError, match="trained by another thread"):
        stabkit.trace(model, X)
    torch.testing.assert_close(model.body.weight.detach(), expected)
    assert (model.body.weight.grad is not None) == (happens is differentiated)
    assert model.body.weight.requires_grad


def test_another_thread_sees_the_functions_of_torch_as_they_are():
    seen: queue.Queue[str] = queue.Queue()  # a list would be what it was before

    def checkpointed(_: nn.Module) -> None:
        x = torch.ones(1, requires_grad=True)
        seen.put(torch.utils.checkpoint.checkpoint(lambda x: x.sin(), x, use_reentrant=True).grad_fn.name())

    stabkit.trace(Elsewhere(checkpointed), X)
    assert seen.get_nowait() == "CheckpointFunctionBackward"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_is_forked_during_a_pass_of_another_thread_is_free():
    begun, go_on = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            begun.set()
            go_on.wait(20)
            return x.sin()

    before = process()["patches"]
    thread = threading.Thread(target=stabkit.trace, args=(Waiting(), X))
    thread.start()
    assert begun.wait(20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads and fork
        child = os.fork()
    if child == 0:
        found = 1
        try:
            free = process()["patches"] == before
            found = 0 if free and len(stabkit.trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), X)) == 2 else 2
        finally:
            os._exit(found)
    _, status = os.waitpid(child, 0)
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
    assert process()["patches"] == before


def test_what_a_generator_of_the_model_drew_is_drawn_again():
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.rng = nn.Linear(4, 4), {"own": torch.Generator().manual_seed(1)}

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x).tanh() * torch.rand(4, generator=self.rng["own"])

    model = Drops()
    flow = stabkit.trace(model, X)

    def norms() -> list[float]:
        return stabkit.gradient_profile(flow, lambda out: out.square().sum(), parameters=True).parameters.norms.tolist()

    first = norms()
    for _ in range(3):
        model(X)
    drawn = model.rng["own"].get_state()
    assert norms() == first
    assert torch.equal(model.rng["own"].get_state(), drawn)
