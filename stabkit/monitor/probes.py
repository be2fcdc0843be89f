"""What presets above economy measure now and then: the model as a flow, on a few samples of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis import Finding
from stabkit.errors import StabkitError
from stabkit.growth import gradient_profile
from stabkit.jacobians import singular_values
from stabkit.monitor.guard import Guard
from stabkit.monitor.inputs import Captured
from stabkit.monitor.parameters import is_sharded
from stabkit.tracing import Flow, trace
from stabkit.tracing.recording.containers import map_tensors
from stabkit.tracing.recording.untouched_model import unchanged

SAMPLES = 4  # of the batch, at most
BLOCKS = 3  # whose largest singular value is taken
PRODUCTS = 40  # Jacobian products behind each


class Probe:
    """Traces the model on the batch that a monitor holds and measures growth and singular values.

    The model, its gradients and the random state come back as they were, so that the training goes on bit for bit.
    """

    def __init__(self, model: nn.Module, preset: str, every: int, seed: int, guard: Guard) -> None:
        self._model = model
        self._full = preset == "full"
        self._every = every
        self._seed = seed
        self._standing: set[tuple[str, str]] = set()  # found by the last probe, and said already
        self._guard, self._off = guard, False

    def take(self, count: int, captured: Sequence[Captured]) -> tuple[dict[str, Any], list[Finding]]:
        """What `measure` gives for the newest batch of a record; after an error nothing more is measured.

        Args:
            count: number of records so far.
            captured: the batches of the step.
        """
        if self._off or not captured:
            return {}, []
        try:
            return self.measure(count, captured[-1])
        except Exception as error:
            self._guard.warn("the probes", error)
            self._off = True
            return {"skipped": f"{type(error).__name__}: {error}"}, []

    def measure(self, count: int, captured: Captured) -> tuple[dict[str, Any], list[Finding]]:
        """Measurements by name, and findings when the preset is full; nothing on records between two probes.

        Args:
            count: number of records so far.
            captured: the batch.
        """
        if count % self._every:
            return {}, []
        if is_sharded(self._model.parameters()):
            return {"skipped": "the parameters are spread over processes"}, []
        with unchanged(self._model):
            try:
                flow = self._flow(captured)
            except StabkitError as error:
                # a model that cannot be traced is a fact about the model; the norms go on
                return {"skipped": str(error).splitlines()[0]}, []
            profile = gradient_profile(flow, seed=self._seed)
            found: dict[str, Any] = {
                "steps": [step.name for step in flow.steps],
                "growth": profile.log_growth.mean(1).tolist(),
                "largest_singular_values": self._singular_values(flow),
            }
            findings = self._findings(flow)
        news = [f for f in findings if f.severity != "info" and (f.kind, f.module_path) not in self._standing]
        self._standing = {(f.kind, f.module_path) for f in findings}
        return found, news

    def _findings(self, flow: Flow) -> list[Finding]:
        if not self._full:
            return []
        from stabkit.diagnosis import diagnose

        return diagnose(flow, seed=self._seed)

    def _flow(self, captured: Captured) -> Flow:
        batch = _batch_size(captured)

        def few(tensor: Tensor) -> Tensor:
            return tensor[:SAMPLES] if tensor.dim() and tensor.shape[0] == batch else tensor

        args = map_tensors(captured.args, few)
        return trace(self._model, *args, kwargs=map_tensors(captured.kwargs, few), seed=self._seed, check=False)

    def _singular_values(self, flow: Flow) -> dict[str, float]:
        blocks = [step for step in flow.steps if step.kind == "step"]
        picks = {round(i * (len(blocks) - 1) / max(BLOCKS - 1, 1)) for i in range(BLOCKS)} if blocks else set()
        found = {}
        for index in sorted(picks):
            step = blocks[index]
            spectrum = singular_values(step.jacobian(), 1, tol=1e-2, seed=self._seed, max_products=PRODUCTS)
            found[step.name] = float(spectrum.values.max())
            step.segment.release()
        return found


def _batch_size(captured: Captured) -> int:
    for item in (*captured.args, *captured.kwargs.values()):
        if isinstance(item, torch.Tensor) and item.dim():
            return int(item.shape[0])
    return -1
