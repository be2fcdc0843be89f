"""The functions of torch that one line of code calls, given other arguments for a while.

The code of a model cannot be changed on a copy. What a change of it would do is seen all the same: the line runs as it
is written, and torch sees other numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stabkit.tracing.recording.function_calls import FunctionCalls, name_of
from stabkit.tracing.recording.training_pass import calling_line

Arguments = tuple[Any, ...]
#: name of the function, its arguments and its keyword arguments: those that it is given in their place
Change = Callable[[str, Arguments, dict[str, Any]], tuple[Arguments, dict[str, Any]]]


class OtherArguments(FunctionCalls):
    """Gives functions that one line of code calls other arguments.

    Args:
        names: the names of the functions, without underscores; empty means all.
        line: file and line, as `calling_line` gives them.
        change: what the arguments become.
    """

    def __init__(self, names: tuple[str, ...], line: str, change: Change) -> None:
        super().__init__()
        self.names, self.line, self.change = names, line, change
        self.applied = 0

    def _called(self, func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
        name = name_of(func)
        if (not self.names or name in self.names) and args and calling_line() == self.line:
            self.applied += 1
            args, kwargs = self.change(name, args, kwargs)
        return func(*args, **kwargs)
