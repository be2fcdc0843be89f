"""The monitor: what goes on inside a model while it trains, at the price of a few norms."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stabkit.diagnosis import Finding
from stabkit.diagnosis.finding import serious
from stabkit.errors import ArgumentError
from stabkit.monitor.alerts import Alerts
from stabkit.monitor.arguments import Callback, callbacks, check_counts, check_kinds, check_model, named_modules
from stabkit.monitor.arguments import optimizers as as_optimizers
from stabkit.monitor.batches import Batches
from stabkit.monitor.blocks import choose_blocks, visible
from stabkit.monitor.bystander import Bystander
from stabkit.monitor.capsule import CapsuleStore
from stabkit.monitor.clipping import Clipped, clip
from stabkit.monitor.collection import AFTER, SCALE, TRAINED, Collector, Sums, finish
from stabkit.monitor.foresight import Foresight
from stabkit.monitor.guard import Guard
from stabkit.monitor.health import Health, Seen
from stabkit.monitor.inputs import RecordedInputs
from stabkit.monitor.insides import Insides
from stabkit.monitor.measurement import Hooks, StepNorms
from stabkit.monitor.no_gradient import Silence
from stabkit.monitor.outlets import Outlets
from stabkit.monitor.parameters import Parameters
from stabkit.monitor.probes import Probe
from stabkit.monitor.ranks import TrainingRanks
from stabkit.monitor.rates import RateWatch
from stabkit.monitor.record import Look, Record
from stabkit.monitor.rules import AlertRules
from stabkit.monitor.scaling import gradient_scale, is_unscaled, unscaled_by
from stabkit.monitor.sentences import summary
from stabkit.monitor.snapshots import Snapshots
from stabkit.monitor.updates import UpdateSampler
from stabkit.monitor.writers import open_writers
from stabkit.tracing.recording.wrappers import unwrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Monitor:
    """Watches a model in its training loop: gradient growth by block, alerts, and a capsule of what went wrong.

    Call ``monitor.step(loss)`` after ``loss.backward()`` and before ``optimizer.step()``. Every ``every``-th step is
    recorded; on the steps between, one hook holds on to the batch, and the loss and the rates are watched: from the
    first jump on every step is recorded, and a finding says what changed before. Training with a monitor gives the same
    weights, bit for bit, as training without. An error inside the monitor warns once and switches off what failed: it
    never stops a run.

    Blocks are the repeated modules of the model (``blocks`` overrides), in the order in which they are called. A
    quantity of a block sums over the whole batch, over micro-batches and over repeated calls (root of the sum of
    squares), and over processes when the model given is wrapped by ``DistributedDataParallel`` or ``fully_shard``: then
    all numbers are those of the whole batch and the whole model, and every process must have the monitor. Inside a
    region compiled as one by ``torch.compile`` blocks are not seen, only their parameters; compile block by block to
    see them.

    A lesson with a picture: ``examples/diverging_training.py``.

    Args:
        model: the model being trained, as it is called, wrapped or not.
        every: record each so many-th call of `step`, beginning with the first.
        preset: ``"economy"`` (norms), ``"standard"`` (and, every ``probe_every`` records, gradient growth from a random
            cotangent and the largest singular values of a few blocks) or ``"full"`` (and ``stabkit.diagnose``).
        writers: where records go: paths (``.jsonl`` or ``.csv``), ``"tensorboard"``, ``"wandb"`` or ``"mlflow"``,
            writers of ``stabkit.monitor.writers``, or callables that take a record; one or several. None writes
            ``records.jsonl`` into ``directory``, or nothing when there is none.
        directory: where capsules, and records by default, are kept; None keeps everything in memory.
        optimizer: one or several, to measure update ratios.
        closure: returns the loss of a fixed batch, ``lambda: cross_entropy(model(x), y)``, without ``backward``; with
            it and one optimizer the sharpness is measured, and a rate that it does not bear is an alert before the loss
            blows up. The model and its random state are left as they are. Some 100 samples will do; without a closure
            the curvature along updates is measured now and then, from two gradients of two batches, and so noisy. That
            gradients are clipped before `step` is seen; what is done to them after it is not.
        sharpness_every: training steps between two measurements, each of at most 4 products with the Hessian (on a CPU
            11 to 15 times the price of a gradient on the closure's batch), every 10th of 10 to 40, and 12 updates on
            copies where it is beyond the edge of stability; more often only at first and where the rate is raised.
        scaler: the ``torch.amp.GradScaler``, so that gradients are reported unscaled.
        blocks: paths of the modules to watch instead of those found.
        on_alert: called with every finding; one callable or several.
        rules: when a change is an alert.
        history: records kept in memory.
        capsules: at most so many capsules on disk, the oldest beyond that are removed; 0 for none.
        snapshot_memory: bytes on the host for the last good states (weights, buffers, optimizers, random state), which
            take about a hundredth of the time; a capsule gets the newest from before the trouble. 0 for none.
        probe_every: a probe comes every so many records.
        model_factory: what builds the model, written into capsules: ``"torchvision:NAME"`` and ``"timm:NAME"`` are all
            that ``stabkit analyze CAPSULE`` needs; ``"pkg.mod:factory"`` and ``"file.py:factory"`` are code, which it
            asks you to confirm by ``--model``.
        distributed: whether the processes of ``torch.distributed`` train this one model together, each with a monitor;
            None asks the wrapper of the model.
        seed: the seed of random cotangents.

    Raises:
        ArgumentError: an argument makes no sense.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Monitor(model, every=1, optimizer=optimizer) as monitor:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         loss = model(torch.ones(2, 4)).square().mean()
        ...         loss.backward()
        ...         if monitor.step(loss).healthy:
        ...             optimizer.step()
        >>> [block.name for block in monitor.records[0].blocks], len(monitor.records)
        (['0', '2'], 3)
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 10,
        preset: str = "economy",
        writers: Any = None,
        *,
        directory: str | os.PathLike[str] | None = None,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        closure: Callable[[], Tensor] | None = None,
        sharpness_every: int = 100,
        scaler: Any = None,
        blocks: Sequence[str] | None = None,
        on_alert: Callback | Sequence[Callback] | None = None,
        rules: AlertRules | None = None,
        history: int = 400,
        capsules: int = 3,
        snapshot_memory: int = 2**30,
        probe_every: int = 10,
        model_factory: str | None = None,
        distributed: bool | None = None,
        seed: int = 0,
    ) -> None:
        check_model(model, preset)
        check_counts(every=(every, 1), history=(history, 1), capsules=(capsules, 0), probe_every=(probe_every, 1))
        check_counts(sharpness_every=(sharpness_every, 1), snapshot_memory=(snapshot_memory, 0))
        check_kinds(directory, scaler, rules, model_factory)
        self.every = every
        self.preset = preset
        self.directory = None if directory is None else Path(directory)
        self.records: deque[Record] = deque(maxlen=history)
        self.findings: list[Finding] = []
        inner = unwrap(model)
        chosen = choose_blocks(inner) if blocks is None else named_modules(inner, blocks)
        self.blocks = tuple(chosen)
        self._guard = Guard()
        self._scaler = scaler
        self._alerts = Alerts(rules, scaled=scaler is not None)
        self._silence = Silence(inner)
        parameters = Parameters(inner, self.blocks)
        self._collector = Collector(parameters, len(chosen))
        blocks_seen = visible(model, chosen.values())
        self._hooks = Hooks(blocks_seen, self._fail)
        optimizers = as_optimizers(optimizer)
        self._updates = UpdateSampler(optimizers, parameters, self._fail)
        self._ranks = TrainingRanks(model, parameters.tensors, distributed)
        opened = open_writers(writers, self.directory) if self._ranks.first else []
        self._outlets = Outlets(opened, callbacks(on_alert), self._guard.part, logs=self._ranks.first)
        self._capsules = CapsuleStore(self.directory, capsules, inner, model_factory, self._ranks)
        kept = snapshot_memory if self._capsules.enabled and self._ranks.first else 0
        self._snapshots = Snapshots(inner, optimizers, kept, sharded=self._ranks.sharded)
        probing = preset != "economy" and self._ranks.first
        self._rates = self._insides = None
        self._foresight: Foresight | Bystander = Bystander(Batches(model), rules)
        if closure is not None:
            beside = self._ranks.together
            self._rates = RateWatch(model, optimizers, closure, sharpness_every, rules, seed, together=beside)
        if self._ranks.first:
            seen = (Batches(model), self.records, self._rates)
            self._foresight = Foresight(inner, optimizers, rules, *seen, self._between_records, self._fail)
            within = (model, blocks_seen, self.blocks, optimizers, parameters, scaler)
            self._insides = Insides(*within, self._foresight, rules, self._fail)
        else:
            self._rates = None
        self._health = Health(inner, parameters, rules, self._ranks, self._between_records, scaler)
        self._look: Look | None = None
        self._unrecorded: list[Finding] = []  # found since the last record
        self._probe = Probe(inner, preset, probe_every, seed, self._guard) if probing else None
        self._inputs = RecordedInputs(model, inner, self._fail, enabled=probing or self._capsules.enabled)
        self._requested: str | None = None
        self._clipped: list[Clipped] = []
        self._off = self._recording = self._closed = self._told = False
        self._count, self._agreed = 0, -1  # records; the last step whose sums were exchanged
        self.attach()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def attach(self) -> None:
        """Start watching (again); a new monitor is attached already."""
        self._off = False
        if self._due(self._guard.step):
            self._switch_on(self._guard.step)
        for part in self._parts:
            part.attach(self._guard.step)

    def detach(self) -> None:
        """Stop watching: no hook stays behind. `attach` starts again."""
        self._off = True
        self._switch_off()
        for part in self._parts:
            part.detach()

    def close(self) -> None:
        """Detach and close the writers; what was recorded stays readable."""
        self.detach()
        if not self._closed:
            self._closed = True
            left_out = self._health.skipped
            told = summary(self._guard.step, self._count, self.findings, self.capsules, left_out)
            self._outlets.close(told, quiet=not left_out and not any(map(serious, self.findings)))

    def step(self, loss: Tensor | float | None = None) -> Seen:
        """Say that a training step's backward pass is done; call it before ``optimizer.step()``.

        Returns what was seen. ``if monitor.step(loss).healthy: optimizer.step()`` leaves out the updates of batches
        whose loss or gradient is not finite, or far larger than all before; records count them as ``skipped``. Do not
        call `clip_grad_norm_` before it then: a clipped gradient is no larger than others.

        Args:
            loss: the loss, watched at every step; one on a device is read a step late, and not waited for.
        """
        step, told = self._guard.step, len(self.findings)
        if self._off:
            return Seen(step)
        try:
            self._take(loss)
        except Exception as error:
            self._fail(error)
            if self._agreed != self._guard.step:
                self._tell()
        self._clipped.clear()
        self._guard.step += 1
        if self._guard.failed:
            return Seen(step)
        found = tuple(self.findings[told:])
        return Seen(step, found, partial(self._health.judge, step, loss, found, gradient_scale(self._scaler)))

    def clip_grad_norm_(
        self,
        parameters: Iterable[Tensor] | Tensor,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` with the same result, whose norms the record then gets for nothing.

        Call it before `step`; the record has the norms before clipping, and ``clipped_norm``. Returns the total norm
        before clipping.
        """
        listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        recording = self._hooks.measurement is not None
        if not self._off:
            self._foresight.before_clipping(gradient_scale(self._scaler))
        total, clipped = clip(listed, max_norm, norm_type, error_if_nonfinite, foreach, recording=recording)
        if clipped is not None:
            self._clipped.append(clipped)
        return total

    def capsule(self, reason: str = "asked for") -> None:
        """Ask for a capsule of the next whole training step, which is recorded whatever its number.

        The capsule holds weights, batch, random state and records; its directory is then in ``monitor.capsules``. When
        several processes train together it is of the next step whose turn it is.

        Raises:
            ArgumentError: the monitor has no directory to write to, or keeps no capsules.
        """
        if not self._capsules.enabled:
            raise ArgumentError("capsule() needs Monitor(..., directory=DIR) and capsules of at least 1")
        self._requested = reason

    @property
    def _parts(self) -> list[Any]:
        """What watches beside the records."""
        return [part for part in (self._foresight, self._insides, self._rates) if part is not None]

    @property
    def capsules(self) -> tuple[Path, ...]:
        """The capsules on disk, the oldest first."""
        return self._capsules.paths

    def plot(self, ax: Axes | None = None, *, quantity: str = "growth") -> Axes:
        """The Axes of a heat map of one quantity of every block over the steps; see ``stabkit.plotting.training``."""
        from stabkit import plotting

        return plotting.training(self.records, ax, quantity=quantity)

    def _due(self, step: int) -> bool:
        asked = self._requested is not None or self._foresight.suspicious
        return step % self.every == 0 or (asked and not self._ranks.together)

    def _take(self, loss: Tensor | float | None) -> None:
        measurement = self._hooks.measurement
        self._recording = measurement is not None
        if self._guard.failed:
            if self._due(self._guard.step):
                self._tell()
            return
        if measurement is not None:
            # what follows may run the model itself
            self._hooks.measurement = None
            if self._probe is not None:
                self._inputs.pause()
        self._run("_foresight", "watching the loss", partial(self._look_ahead, loss))
        self._run("_insides", "looking inside the blocks", partial(self._look_inside, loss))
        self._run("_rates", "the sharpness", self._look_at_rates)
        told = len(self.findings)
        if measurement is not None:
            self._record(measurement, loss)
        calm = len(self.findings) == told and not (self.records and self.records[-1].non_finite)
        if self._foresight.calm and calm:
            look = partial(self._snapshots.look, self._guard.step, self._foresight.loss)
            self._guard.part("keeping the last good state", look, self._snapshots.stop)
        done = partial(self._foresight.done, self._guard.step, loss, seen=calm and self._recording)
        self._guard.part("watching the batches", done, self._foresight.detach)
        on = not (self._guard.failed or self._off)
        if on and self._insides is not None:
            self._insides.attach(self._guard.step + 1)
        if on and self._due(self._guard.step + 1):
            self._switch_on(self._guard.step + 1)
        else:
            self._switch_off()

    def _run(self, name: str, what: str, look: Callable[[], object]) -> None:
        """Let one of the parts that the rest can do without look at a step; one that fails is there no more."""
        part = getattr(self, name)
        if part is not None and not self._guard.part(what, look):
            part.detach()
            setattr(self, name, Bystander() if part is self._foresight else None)

    def _look_ahead(self, loss: Tensor | float | None) -> None:
        scales = gradient_scale(self._scaler), self._recording, getattr(self._scaler, "_scale", None)
        self._between_records(self._foresight.look(self._guard.step, loss, *scales))

    def _look_inside(self, loss: Tensor | float | None) -> None:
        assert self._insides is not None
        found = self._insides.look(self._guard.step, loss, wait=self._recording, told=self._alerts.broken)
        self._between_records(found)

    def _look_at_rates(self) -> None:
        assert self._rates is not None
        look, findings = self._rates.look(self._guard.step, unscaled_by(self._scaler))
        self._look = look or self._look
        self._between_records(findings)

    def _between_records(self, findings: list[Finding]) -> None:
        self._unrecorded += findings
        self._say(findings)
        if findings and self._capsules.enabled:
            self._requested = findings[0].kind

    def _record(self, measurement: StepNorms, loss: Tensor | float | None) -> None:
        sums = self._collector.collect(
            self._guard.step,
            measurement,
            loss=loss,
            scale=getattr(self._scaler, "_scale", None),
            unscaled=is_unscaled(self._scaler),
            clipped=self._clipped,
            updates=self._updates.take(),
        )
        asked = self._ranks.reduce(sums, sums.rows.shape, self._requested is not None)
        self._agreed = self._guard.step
        if asked.stopped:
            self._told = True
            raise RuntimeError("the monitor of another process stopped")
        before = self.records[-1].blocks if self.records else None
        record = finish(sums, self.blocks, self._ranks.count, before, measurement.handed)
        began = self._alerts.first is None
        findings = self._alerts.judge(record)
        ask = self._ranks.together and (findings or asked.requested)  # in all processes or in none
        odds = self._ranks.gather(self._foresight.odd(record.step)) if ask else [None]
        findings = self._foresight.explained(findings, odds, self._alerts.began(record.step), record.step)
        reason = next((f.kind for f in findings if began or f.kind == "non_finite"), None)
        if asked.requested:
            reason, self._requested = reason or self._requested or "asked for", None
        probes, more = ({}, []) if self._probe is None else self._probe.take(self._count, self._inputs.captured)
        findings += [*self._silence.judge(record), *more]
        kinds = tuple(finding.kind for finding in (*self._unrecorded, *findings))
        beside: dict[str, Any] = {"look": self._look, "along": self._foresight.take(), "skipped": self._health.skipped}
        inside = {} if self._insides is None else self._insides.into(record)
        record = replace(record, **inside, **beside, probes=probes, findings=kinds)
        self._look, self._unrecorded = None, []
        self.records.append(record)
        if self._count == 0 and not measurement.called and sums.rows[TRAINED].any():
            self._hooks.drop()
            self._guard.warn_of_blocks()
        self._count += 1
        if reason is not None and self._capsules.enabled:
            self._keep(reason, record, measurement, sums, findings)
        self._outlets.publish(record)
        self._say(findings)

    def _keep(self, reason: str, record: Record, measurement: StepNorms, sums: Sums, findings: list[Finding]) -> None:
        """Write a capsule; its first half is collective and must not fail in one process alone."""
        kept = self._capsules.gather(self._inputs)
        first = self._foresight.first_sign(self._alerts.began(self._guard.step))
        self._guard.part(
            "writing capsules",
            lambda: self._capsules.write(
                reason,
                record,
                kept,
                self.records,
                scale=float(sums.scalars[SCALE]),
                known=self._foresight.known(),
                findings=[*self.findings, *findings],
                before=self._snapshots.before(first),
                blamed=self._foresight.blamed(self._guard.step),
                why_none=self._snapshots.why_none,
                autocast=measurement.autocast or {},
            ),
        )

    def _say(self, findings: list[Finding]) -> None:
        self.findings.extend(findings)
        self._outlets.say(findings, self._guard.step)

    def _switch_on(self, step: int) -> None:
        if self._guard.failed:
            return
        self._hooks.on(wide=self._foresight.suspicious)
        self._inputs.on()
        watch = self._updates.on if self._collector.weights_due(step) else self._updates.off
        watch()

    def _switch_off(self) -> None:
        self._hooks.off()
        self._inputs.off()
        self._updates.off()

    def _fail(self, error: Exception) -> None:
        """Warn once and go quiet, so that the training goes on."""
        if self._guard.stop(error):
            self._switch_off()
            for part in self._parts:
                part.detach()

    def _tell(self) -> None:
        """Let the other processes know, who wait for this one's part of the record."""
        if self._ranks.together and not self._told:
            self._told = True
            self._ranks.reduce(None, (AFTER + 1, len(self.blocks) + 1), requested=False)
