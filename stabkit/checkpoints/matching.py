"""The names in a file -> the names in a model, and the weights put in place."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit.errors import CheckpointError
from stabkit.tracing.recording.sharding import copy_own_part, own_part

# names that wrappers put between a module and its own children
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module", "module")
_COUNTER = "num_batches_tracked"  # unused outside of training
_SHOWN = 8
_LARGE = 2**10  # tensors of fewer numbers are not worth freeing


@dataclass(frozen=True)
class Match:
    """How the names of a file fit those of a model.

    Attributes:
        renamed: name in the file -> name in the model.
        missing: names of the model that the file lacks.
        unexpected: names of the file that the model lacks.
        how: what was stripped, in words; empty when nothing was.
    """

    renamed: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    how: str = ""

    @property
    def exact(self) -> bool:
        """Every name on one side has its partner on the other."""
        return not self.missing and not self.unexpected


@dataclass(frozen=True)
class Filled:
    """What happened when the weights were put in place.

    Attributes:
        notes: sentences for the reader.
        non_finite: names of the model's tensors that hold NaN or infinity.
    """

    notes: tuple[str, ...]
    non_finite: tuple[str, ...]


def match_names(file_names: Iterable[str], model_names: Iterable[str]) -> Match:
    """Pair the names of a file with those of a model, stripping wrappers and common prefixes, all or none.

    Wrapper names (``module``, ``_orig_mod``, ...) go at any depth; a leading component goes only when every
    name has it, and only when more names match for it. The model's own names may be wrapped as well.

    Example:
        >>> match_names(["_orig_mod.module.fc.weight"], ["fc.weight"]).renamed
        {'_orig_mod.module.fc.weight': 'fc.weight'}
    """
    file_names, model_names = list(file_names), list(model_names)
    best: Match | None = None
    for file_how, ours in _variants(file_names):
        for model_how, theirs in _variants(model_names):
            back = {short: full for full, short in theirs.items()}
            renamed = {full: back[short] for full, short in ours.items() if short in back}
            if best is None or len(renamed) > len(best.renamed):
                matched = set(renamed.values())
                how = f"{file_how} stripped from the file's names" if file_how else ""
                how += " and " * bool(file_how and model_how)
                how += f"{model_how} of the model's names added" if model_how else ""
                best = Match(
                    renamed,
                    tuple(n for n in model_names if n not in matched),
                    tuple(n for n in file_names if n not in renamed),
                    how,
                )
                if best.exact:
                    return best
    return best if best is not None else Match({}, (), ())


def fill(model: nn.Module, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> Filled:
    """Put the weights of a file into a model, without a second copy; on an error the model is as it was.

    Args:
        model: changed in place. Parameters stay the same objects, so ties and references hold.
        tensors: name in the file -> tensor.
        metadata: torch's module versions, as ``state_dict()._metadata`` holds them.

    Returns:
        What was renamed, cast or left out.

    Raises:
        CheckpointError: names are missing or unexpected, shapes differ, or a tensor cannot be used.
    """
    slots = model.state_dict(keep_vars=True)
    expected = {name: slot for name, slot in slots.items() if isinstance(slot, Tensor)}
    notes: list[str] = []
    match = match_names(tensors, expected)
    if match.how:
        notes.append(match.how)
    state = {}
    for name, tensor in tensors.items():  # one is whole in memory at a time, where ranks have a part of each
        target = match.renamed.get(name, name)
        state[target] = own_part(tensor, expected.get(target))
    state = _drop_recomputed(model, state, match.unexpected, notes)
    _check_shapes(state, expected, match.missing)
    state = {name: _converted(name, tensor, expected.get(name), notes) for name, tensor in state.items()}
    _check_ties(state, expected)
    tied = _assign(model, _with_versions(state, match, metadata))
    if tied:
        notes.append(f"absent from the file and tied to a loaded tensor: {_listed(tied)}")
    notes.insert(0, f"{len(state)} tensors loaded")
    return Filled(tuple(notes), non_finite(model))


def release_parameters(model: nn.Module) -> None:
    """Free the memory of a model's weights: shapes and dtypes stay, with a single zero behind each large tensor.

    Example:
        >>> layer = nn.Linear(64, 64)
        >>> release_parameters(layer)
        >>> layer.weight.shape, layer.weight.untyped_storage().nbytes()
        (torch.Size([64, 64]), 4)
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor) and tensor.numel() >= _LARGE and not nn.parameter.is_lazy(tensor):
            tensor.data = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def non_finite(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters and buffers that hold NaN or infinity.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.bias.data.fill_(float("nan"))
        >>> non_finite(layer)
        ('bias',)
    """
    state = model.state_dict()
    return tuple(name for name, value in state.items() if isinstance(value, Tensor) and not _finite(value))


def _finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype.itemsize == 1:  # float8 has no reductions
        tensor = tensor.float()
    # the extremes carry NaN and infinity along, and need no temporary of the tensor's size
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def _variants(names: list[str]) -> list[tuple[str, dict[str, str]]]:
    """``(what was taken away, {name: shorter name})``, the gentlest first."""
    found: list[tuple[str, dict[str, str]]] = []
    for wrappers in ((), _WRAPPERS[:-1], _WRAPPERS):
        short = {name: ".".join(p for p in name.split(".") if p not in wrappers) for name in names}
        dropped = sorted({p for name in names for p in name.split(".") if p in wrappers})
        taken = [repr(p + ".") for p in dropped]
        if len(set(short.values())) < len(short) or (wrappers and not dropped):
            continue  # two names became one, or there was nothing to drop
        found.append((", ".join(taken), short))
        while short and len(heads := {name.partition(".")[0] for name in short.values()}) == 1:
            if not all("." in name for name in short.values()):
                break
            taken = [*taken, repr(f"{heads.pop()}.")]
            short = {name: rest.partition(".")[2] for name, rest in short.items()}
            found.append((", ".join(taken), short))
    return found


def _drop_recomputed(
    model: nn.Module, state: dict[str, Tensor], unexpected: tuple[str, ...], notes: list[str]
) -> dict[str, Tensor]:
    """Leave out what the model does not store: its non-persistent buffers, the counter of an averaged model."""
    buffers = dict(model.named_buffers())
    ignored = [
        name
        for name in unexpected
        if name == "n_averaged" or (name in buffers and buffers[name].shape == state[name].shape)
    ]
    if ignored:
        notes.append(f"ignored, because the model computes them itself: {_listed(ignored)}")
    return {name: tensor for name, tensor in state.items() if name not in ignored}


def _check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], missing: Sequence[str]) -> None:
    wrong = {
        name: (tensor.shape, expected[name].shape)
        for name, tensor in state.items()
        if name in expected and not nn.parameter.is_lazy(expected[name]) and tensor.shape != expected[name].shape
    }
    if wrong:
        said = [
            f"{name}: {_shape(ours)} in the file, {_shape(theirs)} in the model"
            for name, (ours, theirs) in wrong.items()
        ]
        unknown = [name for name in state if name not in expected]
        names = f"{misfit(list(missing), unknown)}. Beside that, " if unknown else ""
        raise CheckpointError(
            f"{names}{len(wrong)} tensors have another shape than the model's: {_listed(said, '; ')}. "
            "Build the model with the sizes of this checkpoint: factory_args (--factory-args '{\"name\": value}')"
            f"{_classes(list(wrong.values()))}"
        )


def _classes(wrong: Sequence[tuple[torch.Size, torch.Size]]) -> str:
    """The advice on a head of another number of outputs, where that is all that differs."""
    counts = {(ours[:1], theirs[:1]) for ours, theirs in wrong}
    if len(counts) > 1 or any(not ours or ours[1:] != theirs[1:] for ours, theirs in wrong):
        return ""
    return f"; for a head of so many classes timm and torchvision take '{{\"num_classes\": {wrong[0][0][0]}}}'"


def _converted(name: str, tensor: Tensor, slot: Tensor | None, notes: list[str]) -> Tensor:
    if tensor.is_meta:
        raise CheckpointError(f"{name} is a meta tensor: the file was saved without its data; save it again")
    if tensor.is_quantized or tensor.layout != torch.strided:
        raise CheckpointError(
            f"{name} is stored as {tensor.layout if not tensor.is_quantized else tensor.dtype}; "
            "expected a dense tensor: save dense weights (tensor.to_dense(), tensor.dequantize())"
        )
    if slot is None or slot.dtype == tensor.dtype:
        return tensor.to(slot.device) if slot is not None else tensor
    if slot.is_floating_point() != tensor.is_floating_point() or slot.is_complex() != tensor.is_complex():
        raise CheckpointError(
            f"{name} is {_dtype(tensor)} in the file and {_dtype(slot)} in the model; quantised weights have no "
            "derivative: save the weights in floating point"
        )
    note = f"cast from {_dtype(tensor)} to the model's {_dtype(slot)}"
    if note not in notes:
        notes.append(note)
    return tensor.to(device=slot.device, dtype=slot.dtype)


def _check_ties(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    first: dict[int, str] = {}
    for name in state:
        if name not in expected:
            continue
        other = first.setdefault(id(expected[name]), name)
        if other != name and not torch.equal(state[name], state[other]):
            raise CheckpointError(
                f"{other} and {name} are one parameter in the model, but differ in the file; "
                "build the model without tying them"
            )


def _with_versions(state: dict[str, Tensor], match: Match, metadata: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Carry torch's module versions over to the model's names; old layouts are upgraded by them."""
    out: Any = type("StateDict", (dict,), {})(state)
    if metadata:
        moved = {a.rpartition(".")[0]: b.rpartition(".")[0] for a, b in match.renamed.items()}
        out._metadata = {moved.get(name, name): dict(value) for name, value in metadata.items()}
    result: dict[str, Tensor] = out
    return result


def _assign(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """``load_state_dict(assign=True)``, then the old parameter objects back, holding the new data.

    Returns the names that the file lacks and that are tied to a tensor it has.
    """
    before = [
        (module, name, tensor)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        _restore(before)
        raise CheckpointError(f"the model does not accept the weights: {error}") from error
    missing = [n for n in missing if not n.endswith(_COUNTER)]
    tied = _tied_names(model, before)
    if unexpected or any(name not in tied for name in missing):
        _restore(before)
        raise CheckpointError(misfit(missing, unexpected))
    _keep_identity(before)
    return missing


def _tied_names(model: nn.Module, before: list[tuple[nn.Module, str, Tensor]]) -> set[str]:
    """Names of slots whose old tensor also stood in another slot, which has been loaded."""
    loaded = {id(old) for module, name, old in before if getattr(module, name) is not old}
    prefix = {id(module): path for path, module in model.named_modules()}
    return {f"{prefix[id(module)]}.{name}".lstrip(".") for module, name, old in before if id(old) in loaded}


def _keep_identity(before: list[tuple[nn.Module, str, Tensor]]) -> None:
    owners: dict[int, Tensor] = {}
    for module, name, old in before:
        new = getattr(module, name)
        if new is old or nn.parameter.is_lazy(old):
            continue
        if copy_own_part(new, old):
            setattr(module, name, old)
            continue
        data = new.detach()
        # two parameters that share memory in the file, but not in the model, must not move together
        if owners.setdefault(data.data_ptr(), old) is not old and data.numel():
            data = data.clone()
        old.data = data
        setattr(module, name, old)


def _restore(before: list[tuple[nn.Module, str, Tensor]]) -> None:
    for module, name, old in before:
        setattr(module, name, old)


def misfit(missing: list[str], unexpected: list[str]) -> str:
    """The message on names that found no partner, with the nearest name of the other side."""
    lines = []
    if missing:
        shown = [f"{name}{_near(name, unexpected)}" for name in missing[:_SHOWN]]
        lines.append(f"{len(missing)} missing from the file: {_listed(shown, total=len(missing))}")
    if unexpected:
        shown = [f"{name}{_near(name, missing)}" for name in unexpected[:_SHOWN]]
        lines.append(f"{len(unexpected)} unknown to the model: {_listed(shown, total=len(unexpected))}")
    part = _fitting_part(missing, unexpected)
    advice = (
        f"What lies below {part!r} fits: take that part of the file (--key {part})"
        if part
        else "Give the architecture that was saved (--model, --factory-args), or the part of the file that belongs to "
        "it (--key)"
    )
    return f"the names in the file do not fit the model: {'; '.join(lines)}. {advice}"


def _fitting_part(missing: list[str], unexpected: list[str]) -> str:
    """The prefix below which the file has just the names that the model misses; empty when there is none."""
    wanted = set(missing)
    end = "." + max(missing, key=len, default="")
    prefixes = [name.removesuffix(end) for name in unexpected if name.endswith(end)]
    for prefix in sorted(prefixes, key=len)[:_SHOWN]:
        inside = {name.removeprefix(f"{prefix}.") for name in unexpected if name.startswith(f"{prefix}.")}
        if wanted <= inside and all(name.endswith(_COUNTER) for name in inside - wanted):
            return prefix
    return ""


def _near(name: str, others: list[str]) -> str:
    found = difflib.get_close_matches(name, others[:500], n=1, cutoff=0.75)
    ends = {other: _common_end(name, other) for other in others} if not found else {}
    found += [other for other, count in ends.items() if count >= 2 and count == max(ends.values())]
    return f" (near {found[0]})" if found else ""


def _common_end(name: str, other: str) -> int:
    """How many parts two names have in common, from the last on."""
    pairs = zip(reversed(name.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _listed(names: list[str], separator: str = ", ", total: int | None = None) -> str:
    count = len(names) if total is None else total
    more = f"{separator}and {count - _SHOWN} more" if count > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
