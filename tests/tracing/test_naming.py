from __future__ import annotations

from torch import nn

from stabkit.tracing.cutting.boundaries import Span
from stabkit.tracing.cutting.naming import families, kinds, names
from stabkit.tracing.graph.intervals import Interval


def call(path: str, start: int, stop: int, module: nn.Module | None = None) -> Interval:
    return Interval(start, -1, path, module or nn.Linear(2, 2), start, stop)


def piece(*calls: Interval, shape: str = "block") -> Span:
    return Span(calls[0].start, calls[-1].stop, calls, shape)


def test_a_piece_is_named_by_its_module_or_by_the_first_and_the_last():
    pieces = [
        piece(call("stem", 0, 1), shape="layer"),
        piece(call("h.0", 1, 4)),
        piece(call("norm", 4, 5, nn.LayerNorm(2)), call("head", 5, 6), shape="layer"),
    ]
    assert names(pieces) == ["stem", "h.0", "norm .. head"]


def test_a_module_without_a_path_goes_by_its_class():
    assert names([piece(call("", 0, 1), shape="layer")]) == ["Linear"]


def test_names_are_unique_when_a_module_is_called_again():
    cell = nn.Linear(2, 2)
    pieces = [piece(call("cell", i, i + 1, cell)) for i in range(3)]
    assert names(pieces) == ["cell#1", "cell#2", "cell#3"]
    assert families(pieces) == ["cell"] * 3


def test_pieces_without_modules_are_named_by_their_place():
    pieces = [Span(0, 1, ()), Span(1, 2, ()), Span(2, 3, ())]
    assert names(pieces) == ["input", "operations", "output"]


def test_blocks_that_repeat_by_number_are_a_family():
    pieces = [piece(call("stem", 0, 1), shape="layer"), *(piece(call(f"h.{i}.block", i, i + 1)) for i in (1, 2))]
    assert families(pieces) == ["", "h.#.block", "h.#.block"]


def test_what_stands_outside_the_repeated_blocks_or_changes_the_space_is_a_transition():
    paths = ["stem", "h.0", "h.1", "down", "h.2", "norm"]
    pieces = [piece(call(path, i, i + 1), shape="block" if "h." in path else "layer") for i, path in enumerate(paths)]
    same = [True, True, True, False, True, True]
    assert kinds(pieces, same) == ["transition", "step", "step", "transition", "step", "transition"]


def test_without_repeats_every_map_within_one_space_is_a_step():
    pieces = [piece(call(path, i, i + 1), shape="layer") for i, path in enumerate("abc")]
    assert kinds(pieces, [False, True, True]) == ["transition", "step", "step"]


def test_main_is_the_call_that_does_most_of_the_work_with_weights():
    both = piece(call("act", 0, 9, nn.Tanh()), call("fc", 9, 10))
    assert both.main.path == "fc"
    assert Span(0, 1, ()).main is None
