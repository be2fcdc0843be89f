"""What `stabkit analyze` is told of training: a loss, labels, an optimizer and its schedule, by their names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabkit.cli.specs import optimizer_of, schedule_of
from stabkit.errors import StabkitError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    Loss = Callable[[Any], Tensor]

LOSSES = ("cross_entropy", "mse", "bce_with_logits", "nll")
_OF_CLASSES = ("cross_entropy", "nll")
_IGNORED = -100  # the class number that torch leaves out


@dataclass(frozen=True)
class Training:
    """The loss that the model is trained on, and with what."""

    loss: Annotated[
        str | None,
        typer.Option(help=f"The loss of the output and --labels: {', '.join(LOSSES)}.", metavar="NAME"),
    ] = None
    labels: Annotated[
        Path | None,
        typer.Option(help="What --loss holds the output against: a .npy, .npz, .pt or .csv file.", metavar="FILE"),
    ] = None
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="An optimizer of torch, whose coming updates are measured on the loss: sgd:lr=0.1,momentum=0.9, "
            "adam:lr=1e-3,betas=0.9:0.99. It has no state yet: of Adam and its like only the critical rate is had.",
            metavar="SPEC",
        ),
    ] = None
    schedule: Annotated[
        str | None,
        typer.Option(
            help="A schedule of torch.optim.lr_scheduler for the rate of --optimizer, from its first step; the largest "
            "rate to come is told beside what is stable: onecycle:max_lr=0.1,total_steps=1000, "
            "cosineannealing:T_max=100, multistep:milestones=30:80.",
            metavar="SPEC",
        ),
    ] = None

    def check(self) -> None:
        """Say before a model is loaded what is spelt wrong or missing.

        Raises:
            StabkitError: something is.
        """
        if self.loss is not None and self.loss not in LOSSES:
            raise StabkitError(
                f"--loss {self.loss!r}: no such loss; there are {', '.join(LOSSES)}{did_you_mean(self.loss, LOSSES)}"
            )
        if (self.loss is None) != (self.labels is None):
            have, missing = ("--labels", "--loss") if self.loss is None else ("--loss", "--labels")
            what = f"one of {', '.join(LOSSES)}" if self.loss is None else "a .npy, .npz, .pt or .csv file"
            raise StabkitError(
                f"{have} without {missing}: a loss holds the output against labels; add {missing} {what}"
            )
        if self.optimizer is not None:
            optimizer_of(self.optimizer)
        if self.schedule is not None:
            schedule_of(self.schedule)
            if self.optimizer is None:
                raise StabkitError(
                    f"--schedule {self.schedule} without --optimizer: a schedule sets the rate of an optimizer; add "
                    "--optimizer SPEC, e.g. sgd:lr=0.1"
                )

    def loss_of(self, saved: Loss | None) -> Loss | None:
        """The loss that is named, or one that was saved with the model.

        Raises:
            StabkitError: there is an optimizer and no loss.
            CheckpointError: the labels cannot be read.
        """
        if self.loss is not None and self.labels is not None:
            return named_loss(self.loss, _read(self.labels), f"--labels {self.labels}")
        if saved is None and self.optimizer is not None:
            raise StabkitError(
                f"--optimizer {self.optimizer} without --loss: whether updates are stable is a question of the loss "
                f"that they lower; add --loss (one of {', '.join(LOSSES)}) and --labels FILE"
            )
        return saved

    def updates_of(self, model: nn.Module) -> dict[str, Any]:
        """The arguments of ``analyze`` that say how the model is trained.

        They are the optimizer, of all parameters, in its first update, and its schedule in its first step.

        Raises:
            StabkitError: their settings are not accepted.
        """
        if self.optimizer is None:
            return {}
        kind, settings = optimizer_of(self.optimizer)
        with _accepted("--optimizer", self.optimizer):
            optimizer = kind(model.parameters(), **settings)
        if self.schedule is None:
            return {"optimizer": optimizer}
        kind_of_schedule, settings = schedule_of(self.schedule)
        with _accepted("--schedule", self.schedule):
            return {"optimizer": optimizer, "scheduler": kind_of_schedule(optimizer, **settings)}


@contextlib.contextmanager
def _accepted(option: str, spec: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, ArithmeticError) as error:  # what torch's classes raise of settings
        raise StabkitError(f"{option} {spec}: {' '.join(str(error).split())}") from error


def named_loss(name: str, labels: Tensor, called: str = "labels") -> Loss:
    """A loss of a model's output by its name.

    Args:
        name: one of `LOSSES`.
        labels: what the output is held against.
        called: what they are called in an error.

    Raises:
        StabkitError: when it is called with an output that the labels do not fit.
    """
    from torch.nn import functional

    functions: dict[str, Callable[..., Tensor]] = {
        "cross_entropy": functional.cross_entropy,
        "mse": functional.mse_loss,
        "bce_with_logits": functional.binary_cross_entropy_with_logits,
        "nll": functional.nll_loss,
    }
    fitted = _classes if name in _OF_CLASSES else _numbers

    def loss(output: Any) -> Tensor:
        try:
            return functions[name](*fitted(name, _predicted(output), labels))
        except StabkitError as error:
            raise StabkitError(f"{called}: {error}") from None

    loss.__name__ = name
    return loss


def _predicted(output: Any) -> Tensor:
    """The logits of an output that names them, or else its first tensor of floats."""
    from stabkit.tracing.recording.containers import named_tensors

    found = [(path, t) for path, t in named_tensors(output) if t.is_floating_point()]
    if not found:
        raise StabkitError(f"the output is a {type(output).__name__} without a tensor of floats")
    return next((t for path, t in found if path == "logits"), found[0][1])


def _classes(name: str, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Class numbers as torch takes them, whether the classes lie in the second or in the last dimension."""
    labels = labels.to(output.device)
    if name == "cross_entropy" and labels.shape == output.shape and labels.is_floating_point():
        return output, labels.to(output.dtype)  # probabilities
    if labels.is_floating_point():
        if not bool((labels == labels.round()).all()):
            raise StabkitError(f"{name} takes class numbers, and these are no whole numbers")
        labels = labels.long()
    second, last = (*output.shape[:1], *output.shape[2:]), tuple(output.shape[:-1])
    if labels.dim() > 1 and labels.shape[-1] == 1 and tuple(labels.shape) not in (second, last):
        labels = labels.squeeze(-1)
    if tuple(labels.shape) == second:
        axis = min(1, output.dim() - 1)
    elif tuple(labels.shape) == last:
        axis, output = 1, output.movedim(-1, 1)
    else:
        accepted = " or ".join(dict.fromkeys(map(str, (second, last))))
        raise StabkitError(
            f"shape {tuple(labels.shape)} does not fit the output {tuple(output.shape)}: {name} takes class numbers of "
            f"shape {accepted}"
        )
    count, known = output.shape[axis], labels[labels != _IGNORED]
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < count:
        raise StabkitError(
            f"class numbers from {int(known.min())} to {int(known.max())}, and the output has {count} classes, 0 to "
            f"{count - 1}"
        )
    return output, labels.long()


def _numbers(name: str, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the shape of the output, but for dimensions of size 1."""
    if [n for n in labels.shape if n > 1] != [n for n in output.shape if n > 1]:
        raise StabkitError(
            f"shape {tuple(labels.shape)} does not fit the output {tuple(output.shape)}: {name} takes numbers of the "
            "same shape"
        )
    labels = labels.reshape(output.shape).to(output.device, output.dtype)
    if name == "bce_with_logits" and not 0 <= float(labels.min()) <= float(labels.max()) <= 1:
        raise StabkitError(
            f"numbers from {float(labels.min()):.4g} to {float(labels.max()):.4g}: {name} takes probabilities, 0 to 1"
        )
    return output, labels


def _read(path: Path) -> Tensor:
    from stabkit.checkpoints.input_files import read_input_file

    tensors = read_input_file(path.expanduser(), what="labels").tensors
    if len(tensors) != 1:
        raise StabkitError(f"--labels {path} holds {len(tensors)} tensors ({', '.join(tensors)}); save one")
    return next(iter(tensors.values()))
