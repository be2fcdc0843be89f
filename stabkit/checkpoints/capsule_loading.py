"""A capsule -> the model as it was at that step, ready to run the same forward and backward pass again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.checkpoints.capsules import Capsule, RecordedCall, read_capsule
from stabkit.checkpoints.files import read_file
from stabkit.checkpoints.matching import fill
from stabkit.checkpoints.model_names import Model, build_model
from stabkit.checkpoints.opened import Opened
from stabkit.checkpoints.randomness import restore_random
from stabkit.errors import CheckpointError, StabkitError
from stabkit.tracing.recording.containers import named_tensors
from stabkit.tracing.recording.untouched_model import aside

MOST_MOVED = 3  # weights that are named
_EVEN, _HALF = 4, 0.5  # samples of which one that carries so much of the gradient stands out
MOST_OUTPUTS = 8  # tensors of an output whose gradients are kept


def load_capsule(
    path: str | os.PathLike[str],
    model: Model | None = None,
    *,
    factory_args: Mapping[str, Any] | None = None,
    seed: int = 0,
    weights: str = "raw",
) -> Opened:
    """The model of a capsule, the last batch of its step, and the loss as its gradient at the output.

    A capsule that was written because of trouble has the last good weights beside those of its step, which trouble has
    harmed already: they are taken, so that what is measured is what met the batch, and the notes say what changed.

    Every forward call of the module sets the random generators, and autocast, to what they were before the call of the
    step, so that dropout drops the same.

    Args:
        path: the directory.
        model: the architecture: a name, a module (which is changed) or a callable; None takes the factory that the
            monitor was told, if that is a library's.
        factory_args: keyword arguments of the factory.
        seed: the seed of a factory that draws random weights, which are then replaced.
        weights: ``"step"`` for those of the step itself.

    Raises:
        CheckpointError: it is no readable capsule, or the model does not fit its weights.
    """
    capsule = read_capsule(path)
    if not capsule.calls:
        raise CheckpointError(f"{capsule.path} holds no call of the model")
    module, name = build(capsule, model, factory_args=factory_args, seed=seed)
    good = capsule.weights_before if weights != "step" and _is_trouble(capsule) else {}
    if good:
        fill(module, good)
    call, step = capsule.calls[-1], capsule.step
    if good and capsule.blamed is not None:
        step, call = capsule.blamed
    set_buffers(module, call)
    remembered(module, call, capsule.autocast)
    try:
        with aside(module, given=(call.args, call.kwargs)):
            gradients = outer_gradients(module(*call.args, **call.kwargs), call, capsule.scale)
    except StabkitError:
        raise
    except Exception as error:  # the model is the user's code
        raise CheckpointError(
            f"{capsule.path}: {name} does not run on the batch of its step: {type(error).__name__}: {error}"
        ) from error
    usable = all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    gradients = gradients if usable else {}
    why = "loss: none was seen" if usable else "loss: left out, its gradient at the output was not finite"
    carried = carriers(capsule.calls[-1].gradients) if step == capsule.step else ()
    told = (*_told(capsule), *_since(capsule, good, step), *carried)
    mode = "training" if capsule.training else "evaluation"
    notes = (
        *told,
        f"format: capsule of training step {capsule.step}, written because: {capsule.reason}",
        f"input: that of the last of {len(capsule.calls)} calls, in {mode} mode"
        if step == capsule.step
        else f"input: the batch of training step {step}, in {mode} mode",
        "loss: the gradient that the loss of the run had at the output" if gradients else why,
    )

    def loss(output: Any) -> Tensor:
        tensors = output_tensors(output)
        return torch.stack([(g.conj() * tensors[number]).real.sum() for number, g in gradients.items()]).sum()

    return Opened(
        module,
        name,
        notes,
        inputs=call.args,
        kwargs=dict(call.kwargs),
        loss=loss if gradients else None,
        as_saved=True,
        step=("step", capsule.step),
    )


def _told(capsule: Capsule) -> Iterator[str]:
    """What the monitor knew, in sentences: what it said first, and with which optimizer."""
    for finding in capsule.findings[:2]:
        yield f"the monitor said: {finding.get('evidence', '')}"
        yield f"remedy: {finding.get('remedy', '')}"
    for optimizer in capsule.known.get("optimizers", ()):
        rates = ", ".join(f"{float(group['lr']):.4g}" for group in optimizer["groups"] if "lr" in group)
        yield f"optimizer: {optimizer['class']} at the learning rate {rates}"
    measured = capsule.known.get("curvature_along_updates", ())
    if measured:
        ratios = ", ".join(f"{float(one['ratio']):.3g} at step {one['step']}" for one in measured[-3:])
        yield f"curvature along its last updates over the threshold: {ratios}"


def carriers(gradients: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Which sample of a batch, and which position in it, carries the gradient of the loss at an output, in sentences.

    One is told where it carries half of the squares or more, which of four samples or more none does in an even batch.

    Example:
        >>> g = torch.full((8, 5, 3), 1e-3)
        >>> g[2, 4] = 1.0
        >>> carriers({"0": g})
        ('gradient at the output: sample 2 of 8 carries 100 % of its squares, position 4 of 5 in it 100 %',)
        >>> carriers({"0": torch.ones(8, 3)})
        ()
    """
    told = []
    for gradient in gradients.values():
        if gradient.dim() < 2 or len(gradient) < _EVEN:
            continue
        squares = gradient.detach().to(torch.complex128 if gradient.is_complex() else torch.float64).abs().square()
        rows = squares.flatten(1).sum(1)
        broken = (~rows.isfinite()).nonzero().flatten().tolist()
        if broken:
            many = (
                f"sample {broken[0]}" if len(broken) == 1 else f"{len(broken)} samples, the first of them {broken[0]},"
            )
            told.append(f"gradient at the output: that of {many} of {len(rows)} is not finite")
            continue
        worst, share = _largest(rows)
        if share < _HALF:
            continue
        said = f"gradient at the output: sample {worst} of {len(rows)} carries {100 * share:.3g} % of its squares"
        if gradient.dim() > 2 and gradient.shape[1] >= _EVEN:
            place, part = _largest(squares[worst].flatten(1).sum(1))
            said += f", position {place} of {gradient.shape[1]} in it {100 * part:.3g} %" if part >= _HALF else ""
        told.append(said)
    return tuple(told)


def _largest(values: Tensor) -> tuple[int, float]:
    """Where the largest of some numbers is, and its share of all."""
    place = int(values.argmax())
    return place, float(values[place] / values.sum().clamp_min(1e-300))


def _is_trouble(capsule: Capsule) -> bool:
    """Whether a capsule was written because the monitor found something, and not because somebody asked."""
    return any(finding.get("kind") == capsule.reason for finding in capsule.findings)


def _since(capsule: Capsule, good: Mapping[str, Tensor], step: int) -> Iterator[str]:
    """What changed between the last good state and the step, in sentences."""
    before = capsule.before
    if not good:
        if _is_trouble(capsule) and "why_none" in before:
            yield f"weights: those of the step itself; of a good state before it there is none: {before['why_none']}"
        return
    loss = "" if before.get("loss") is None else f" (loss {float(before['loss']):.4g})"
    yield (
        f"weights: the last good ones, of training step {before['step']}{loss}, on the batch of step {step}; "
        "weights='step' takes those of the step itself"
    )
    rates = [float(g["lr"]) for one in capsule.known.get("optimizers", ()) for g in one["groups"] if "lr" in g]
    pairs = zip(before.get("learning_rates", ()), rates, strict=False)
    changed = list(dict.fromkeys(f"{float(a):.4g} -> {b:.4g}" for a, b in pairs if a is not None and float(a) != b))
    if changed:
        yield f"since then the learning rate changed: {', '.join(changed)}"
    yield f"since then {_moved(good, read_file(capsule.weights).content)}"


def _moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    """Which weights moved most, relative to their size, and which are not finite any more."""
    ratios, broken = {}, []
    for name, old in before.items():
        new = after.get(name)
        if new is None or new.shape != old.shape or not old.is_floating_point():
            continue
        old, new = old.double(), new.double()
        if not bool(new.isfinite().all()):
            broken.append(name)
        elif float(old.norm()) > 0:
            ratios[name] = float((new - old).norm() / old.norm())
    most = sorted(ratios, key=lambda name: -ratios[name])[:MOST_MOVED]
    told = [f"{name} by {ratios[name]:.3g} times its size" for name in most if ratios[name] > 0]
    said = f"the weights moved, most of all {', '.join(told)}" if told else "the weights that are finite did not move"
    return f"{said}; {len(broken)} tensors are not finite any more" if broken else said


def build(
    capsule: Capsule, model: Model | None, *, factory_args: Mapping[str, Any] | None = None, seed: int = 0
) -> tuple[nn.Module, str]:
    """The module of a capsule with its weights and modes, and its name.

    Raises:
        CheckpointError: nothing says how to build it, only the capsule names code that does, or it does not fit.
    """
    module, name = build_model(_chosen(capsule, model), factory_args=factory_args, seed=seed)
    weights = read_file(capsule.weights).content
    try:
        fill(module, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{capsule.path}: {error}") from error
    module.train(capsule.training)
    parts = dict(module.named_modules())
    for path in capsule.unlike:
        if path not in parts:
            raise CheckpointError(f"{capsule.path}: {name} has no module {path!r}, whose mode the capsule holds")
        parts[path].training = not capsule.training
    return module, name


def _chosen(capsule: Capsule, model: Model | None) -> Model:
    """The architecture that the caller names; of those that a capsule names, only such as run no code of its choice."""
    if model is not None:
        return model
    named = capsule.model_factory
    if named is None:
        raise CheckpointError(f"{capsule.path} does not say how to build its model; give --model pkg.mod:factory")
    if not named.startswith(("torchvision:", "timm:")):
        raise CheckpointError(
            f"{capsule.path} names {named} as what builds its model, which is code and is not run because a file says "
            f"so; if it is yours, say so yourself: --model {named}"
        )
    return named


def set_buffers(module: nn.Module, call: RecordedCall) -> None:
    """Set the buffers that a call changed to what they were before it."""
    known = dict(module.named_buffers())
    with torch.no_grad():
        for name, value in call.buffers.items():
            if name in known:
                known[name].copy_(value)


def remembered(module: nn.Module, call: RecordedCall, autocast: Mapping[str, str]) -> Callable[[], None]:
    """Make every forward call of a module draw the random numbers of ``call``, under its autocast; returns the undo."""
    active: list[Any] = []

    def before(_: nn.Module, args: Any) -> None:
        if call.random:
            restore_random(call.random)
        for device, dtype in autocast.items():
            context: Any = torch.autocast(device, getattr(torch, dtype))
            context.__enter__()
            active.append(context)

    def after(_: nn.Module, args: Any, output: Any) -> None:
        while active:
            active.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def output_tensors(output: Any) -> dict[str, Tensor]:
    """The tensors of an output that can carry a gradient, by their number, the first few of them."""
    listed = {id(t): t for _, t in named_tensors(output, 3) if t.is_floating_point() or t.is_complex()}.values()
    return {str(number): t for number, t in enumerate(list(listed)[:MOST_OUTPUTS]) if t.requires_grad}


def outer_gradients(output: Any, call: RecordedCall, scale: float = 1.0) -> dict[str, Tensor]:
    """The gradient of the loss that enters at each tensor of an output from outside of the model.

    What was seen in the run is the whole gradient at each of them; where one output depends on another (logits and the
    loss that a model returns) a part of it came through the other, which is taken away here.

    Args:
        output: the output of the same call, with its graph.
        call: what was seen.
        scale: the loss scale of AMP, by which to divide.
    """
    tensors = output_tensors(output)
    left = {n: call.gradients[n].to(t.device, t.dtype) / scale for n, t in tensors.items() if n in call.gradients}
    behind = {number: _nodes_behind(tensors[number]) for number in left}
    outer: dict[str, Tensor] = {}
    while left:
        last = next(n for n in left if not any(m != n and tensors[n].grad_fn in behind[m] for m in left))
        gradient = left.pop(last)
        if outer:
            (inner,) = torch.autograd.grad(
                [tensors[n] for n in outer], [tensors[last]], list(outer.values()), retain_graph=True, allow_unused=True
            )
            gradient = gradient if inner is None else gradient - inner
        outer[last] = gradient
    return outer


def _nodes_behind(tensor: Tensor) -> set[Any]:
    """The operations that a tensor was computed from, without the one that made it."""
    found: set[Any] = set()
    stack = [] if tensor.grad_fn is None else [node for node, _ in tensor.grad_fn.next_functions]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.add(node)
            stack += [following for following, _ in node.next_functions]
    return found
