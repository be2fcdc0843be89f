"""Cuts that another way round hides: parameters that get a gradient from a part of the loss, where all of it was meant.

Many tensors are taken off the graph on purpose: targets, codes that are passed straight through, baselines. Told is
what nobody takes off on purpose and then puts into a loss that it should train: a draw by ``sample()`` of a
distribution that has ``rsample()``, ``torch.normal`` of tensors, whose derivative torch sets to zero, and a derivative
that was taken without ``create_graph``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from stabkit.tracing.derivatives.lost_gradient import DRAW, FIRST_ORDER, Cut, Event, Exits, Use
from stabkit.tracing.graph.values import operation
from stabkit.tracing.recording.containers import map_tensors
from stabkit.tracing.recording.forward_pass import ForwardPass
from stabkit.tracing.recording.inputs import differentiable
from stabkit.tracing.recording.training_pass import TrainingPass, nodes_above, nodes_from, path_of, training_pass

NORMAL = "torch.normal"


def partial_cuts(call: ForwardPass, loss: Any, done: TrainingPass) -> list[Cut]:
    """The places, each with the parameters that get a gradient from the rest of the loss alone.

    Args:
        call: the model and what it is called with.
        loss: a callable on the output that returns a scalar.
        done: a training pass of this call and loss; where nothing ran off the graph in it, no other is made.

    Raises:
        TraceError: the model or the loss fails.
    """
    if done.loss is None:
        return []
    cuts = _normal_draws(done)
    if not done.without_graph:
        return cuts
    watch = Exits()
    done = training_pass(call, loss, watch, differentiate=False)
    if done.loss is None:
        return cuts
    above = nodes_above(done.loss)
    numbers = {node._sequence_nr() for node in above}
    trained = {id(node.variable) for node in above if hasattr(node, "variable")}
    names = {id(p): path for path, p in done.parameters.items() if id(p) in trained}
    read: list[Event] | None = None
    for event in watch.events:
        draw, derivative = event.cut.operation.endswith(DRAW), event.cut.operation == FIRST_ORDER
        leaves = event.leaves() & names.keys() if draw or derivative else set()
        if not leaves:
            continue
        uses = [use for use in event.uses if use.number in numbers]
        hidden = any(not _made_of(use, leaves) for use in uses)
        if any(_made_of(use, leaves) for use in uses) and draw:
            continue  # it meets what it was drawn with, as in the logarithm of its density
        if derivative:
            read = _silent_outputs(watch, loss, done) if read is None else read
            hidden |= event in read or any(use.part == "loss" and _is_scalar(use) for use in uses)
        if hidden:
            paths = tuple(path for each, path in names.items() if each in leaves)
            cuts.append(replace(event.cut, parameters=paths))
    return cuts


def _normal_draws(done: TrainingPass) -> list[Cut]:
    """Draws by ``torch.normal`` from tensors that train, which pass back zeros."""
    assert done.loss is not None
    above, cuts = nodes_above(done.loss), []
    names = {id(p): path for path, p in done.parameters.items()}
    for node in above:
        if operation(node) != "Normal":
            continue
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        leaves = set().union(*(_leaves(parent) for parent in parents)) & names.keys()
        users = [other for other in above if any(parent is node for parent, _ in other.next_functions)]
        met = [p for other in users for p, _ in other.next_functions if p is not None and p is not node]
        if leaves and not any(_leaves(parent) & leaves for parent in met):
            paths = tuple(path for each, path in names.items() if each in leaves)
            cuts.append(Cut(NORMAL, path_of(done, node), "", path_of(done, parents[0]), paths))
    return cuts


def _leaves(node: Node) -> set[int]:
    return {id(each.variable) for each in nodes_from(node) if hasattr(each, "variable")}


def _made_of(use: Use, leaves: set[int]) -> bool:
    """Whether what is on the graph is made of some leaves."""
    made: set[Node] = {node for t in use.attached if t.grad_fn is not None for node in nodes_above(t)}
    found = {id(node.variable) for node in made if hasattr(node, "variable")}
    return bool(leaves & (found | set(map(id, use.attached))))


def _is_scalar(use: Use) -> bool:
    """Whether it is a term of the loss that it meets, and not a weight."""
    return all(t.numel() == 1 and t.grad_fn is not None for t in use.attached)


def _silent_outputs(watch: Exits, loss: Any, done: TrainingPass) -> list[Event]:
    """Where outputs left the graph that carry no gradient and that the loss depends on by its own operations."""
    leaves: dict[int, tuple[Tensor, Tensor]] = {}

    def leaf(tensor: Tensor) -> Tensor:
        if not differentiable(tensor):
            return tensor
        fresh = tensor.detach().requires_grad_(True)
        return leaves.setdefault(id(tensor), (tensor, fresh))[1]

    with torch.enable_grad():
        scalar = loss(map_tensors(done.output, leaf))
    if not scalar.requires_grad:
        return []
    silent = [(given, fresh) for given, fresh in leaves.values() if not given.requires_grad]
    found = torch.autograd.grad(scalar, [fresh for _, fresh in silent], allow_unused=True) if silent else ()
    read = [given for (given, _), g in zip(silent, found, strict=True) if g is not None and bool((g != 0).any())]
    return [event for given in read if (event := watch.event_of(given)) is not None]
