"""What `stabkit analyze` is told of training: a loss by its name, labels in a file, an optimizer by its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabkit.errors import StabkitError, did_you_mean

if TYPE_CHECKING:
    import torch
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
            _parsed(self.optimizer)

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

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer | None:
        """The optimizer, of all parameters, in its first update.

        Raises:
            StabkitError: its settings are not accepted.
        """
        if self.optimizer is None:
            return None
        kind, settings = _parsed(self.optimizer)
        try:
            return kind(model.parameters(), **settings)
        except (ValueError, TypeError) as error:
            raise StabkitError(f"--optimizer {self.optimizer}: {error}") from error


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


def _parsed(spec: str) -> tuple[type[torch.optim.Optimizer], Mapping[str, Any]]:
    """The class and the settings of ``NAME:key=value,...``."""
    import torch

    base = torch.optim.Optimizer
    kinds: dict[str, type[torch.optim.Optimizer]] = {
        name.lower(): kind
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, base) and kind is not base
    }
    name, _, rest = spec.partition(":")
    if name.lower() not in kinds:
        raise StabkitError(
            f"--optimizer {spec!r}: no optimizer of torch is called {name!r}; there are {', '.join(sorted(kinds))}"
            f"{did_you_mean(name.lower(), kinds)}"
        )
    kind = kinds[name.lower()]
    accepted = [key for key in inspect.signature(kind).parameters if key != "params"]
    settings: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        key, given, value = part.partition("=")
        if not given or key not in accepted:
            raise StabkitError(
                f"--optimizer {spec!r}: {part!r} is no setting of {name}; expected key=value with one of "
                f"{', '.join(accepted)}{did_you_mean(key, accepted)}"
            )
        settings[key] = _value(spec, part, value)
    if "lr" not in settings:
        raise StabkitError(f"--optimizer {spec!r} has no learning rate; write {name}:lr=0.1")
    return kind, settings


def _value(spec: str, part: str, text: str) -> Any:
    """A number, true or false, or several numbers with colons between them."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        numbers = [float(number) for number in text.split(":")]
    except ValueError:
        raise StabkitError(
            f"--optimizer {spec!r}: {part!r} has no number; write for example lr=1e-3, nesterov=true, betas=0.9:0.99"
        ) from None
    return numbers[0] if len(numbers) == 1 else tuple(numbers)
