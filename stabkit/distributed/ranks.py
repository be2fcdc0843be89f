"""The processes that share one analysis: who does what, what came of it, and what if one of them is gone."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stabkit.errors import StabkitError
from stabkit.report import encoding, files
from stabkit.results import encode

_Result = TypeVar("_Result")

_LOG = logging.getLogger("stabkit")
_PATIENCE = 15.0  # seconds of waiting for other ranks, before it is said
_TIMEOUT = datetime.timedelta(minutes=30)  # for the slowest rank to finish its part


class RankError(StabkitError):
    """A rank failed or is gone; ``finished`` holds what this one has done, by the number of the piece.

    Attributes:
        finished: results of this rank, by the number of the piece.
    """

    def __init__(self, message: str, finished: dict[int, Any]) -> None:
        super().__init__(message)
        self.finished = finished


@dataclass(frozen=True)
class _Failure:
    """What a rank reports in place of results."""

    rank: int
    message: str


@dataclass(frozen=True)
class _Raised:
    """In place of a result: what the piece raised."""

    error: Exception


@dataclass(frozen=True)
class Ranks:
    """The ranks of a process group, or this process alone.

    Attributes:
        rank: the rank of this process.
        count: how many there are.
        group: the process group; None for the default one.
        keep: where a rank writes what it had finished when another one failed; None: nowhere.
    """

    rank: int = 0
    count: int = 1
    group: Any = None
    keep: Path | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that reports."""
        return self.rank == 0

    def share(
        self,
        work: Callable[[int], _Result],
        costs: Sequence[float],
        *,
        name: str = "piece",
    ) -> list[_Result]:
        """Do independent pieces of work, each on one rank, and return all results, in order, on every rank.

        Which rank does which piece depends on the costs alone, and a piece does not see who does it: the results are
        those of one process, to the last bit.

        Args:
            work: does the piece of this number.
            costs: the cost of every piece, in any unit.
            name: what a message calls a piece.

        Raises:
            RankError: a rank failed, which is told on all of them, or is gone.
            StabkitError: or an arithmetic error, where a piece raised one: on every rank, as one process would.
        """
        if self.count == 1:
            return [work(piece) for piece in range(len(costs))]
        mine = [piece for piece, owner in enumerate(assigned(costs, self.count)) if owner == self.rank]
        finished: dict[int, Any] = {}
        failure: _Failure | None = None
        piece = -1
        try:
            for piece in mine:
                finished[piece] = work(piece)
        except RankError as error:  # told to stop by a signal
            raise self._lost(str(error), finished, name) from error
        except (StabkitError, ArithmeticError) as error:  # a fact about the model, not about this rank
            finished[piece] = _Raised(error)
        except Exception as error:
            failure = _Failure(self.rank, f"{type(error).__name__}: {error}")
        parts = self.gather(failure or finished, finished, name)
        results = {piece: result for part in parts for piece, result in part.items()}
        raised = [results[piece] for piece in sorted(results) if isinstance(results[piece], _Raised)]
        if raised:
            raise raised[0].error
        return [results[piece] for piece in range(len(costs))]

    def meet(self, name: str, token: Callable[[], str]) -> None:
        """Wait for the other ranks to make the same call; says so after a while, since some may never make it.

        Args:
            name: the name of the call.
            token: what the call is about; the same on all ranks.

        Raises:
            RankError: it is not, or a rank did not come.
        """
        if self.count == 1:
            return
        waiting = threading.Timer(
            _PATIENCE,
            lambda: _LOG.warning(
                "rank %d of %d waits for the others to call %s too; to call it on one rank only, give "
                "distributed=False",
                self.rank,
                self.count,
                name,
            ),
        )
        waiting.daemon = True
        waiting.start()
        try:
            told = self.gather(token())
        finally:
            waiting.cancel()
        others = [rank for rank, other in enumerate(told) if other != told[0]]
        if others:
            raise RankError(
                f"{name} on rank {', '.join(map(str, others))} was given another model or input than on rank 0; give "
                "every rank the same, or distributed=False to let each work by itself",
                {},
            )

    def together(self, work: Callable[[], _Result]) -> _Result:
        """Do this rank's own part of something; where it fails on any rank, all of them say so.

        Raises:
            RankError: another rank failed; what failed here is raised as it is.
        """
        failure: _Failure | None = None
        try:
            result = work()
        except RankError:
            raise
        except Exception as error:
            if self.count == 1:
                raise
            failure = _Failure(self.rank, f"{type(error).__name__}: {error}")
        self.gather(failure)
        return result

    def gather(self, item: Any, finished: dict[int, Any] | None = None, name: str = "piece") -> list[Any]:
        """The item of every rank, in the order of ranks, on every rank.

        Raises:
            RankError: a rank reported a failure instead, or did not answer.
        """
        if self.count == 1:
            return [item]
        finished = {} if finished is None else finished
        found: list[Any] = [None] * self.count
        began = time.monotonic()
        try:
            dist.all_gather_object(found, item, group=self.group)
        except RankError as error:
            raise self._lost(str(error), finished, name) from error
        except (RuntimeError, ValueError) as error:  # what the backends raise on a closed connection and on a timeout
            waited = time.monotonic() - began
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            message = f"another of the {self.count} ranks is gone or did not answer within {waited:.0f} s ({reason})"
            raise self._lost(message, finished, name) from error
        failures = [part for part in found if isinstance(part, _Failure)]
        if failures:
            told = "; ".join(f"rank {one.rank} of {self.count} failed: {one.message}" for one in failures)
            raise self._lost(told, finished, name)
        return found

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, in its place; every rank must ask for it.

        Raises:
            RankError: a rank did not answer.
        """
        if self.count == 1:
            return tensor
        try:
            dist.all_reduce(tensor, group=self.group)
        except RuntimeError as error:
            raise self._lost(
                f"another of the {self.count} ranks is gone ({str(error).splitlines()[0]})", {}, "sum"
            ) from error
        return tensor

    def _lost(self, reason: str, finished: dict[int, Any], name: str) -> RankError:
        finished = {piece: result for piece, result in finished.items() if not isinstance(result, _Raised)}
        if not finished:
            return RankError(f"rank {self.rank}: {reason}. Nothing was finished here", finished)
        pieces = f"{name} {', '.join(map(str, sorted(finished)))}"
        if self.keep is None:
            return RankError(f"rank {self.rank}: {reason}. Finished here: {pieces}", finished)
        self.keep.mkdir(parents=True, exist_ok=True)
        path = self.keep / f"{name}s-of-rank-{self.rank}-of-{self.count}.json"
        data = {"rank": self.rank, "ranks": self.count, name: encode(finished, repr)}
        files.write(path, encoding.lines(data).encode())
        return RankError(f"rank {self.rank}: {reason}. Finished here: {pieces}; kept in {path}", finished)


def assigned(costs: Sequence[float], ranks: int) -> list[int]:
    """Which rank does each piece: the dearest first, each to the rank that has least to do.

    Example:
        >>> assigned([5.0, 1.0, 1.0, 3.0], 2)
        [0, 1, 1, 1]
    """
    load = [0.0] * ranks
    owners = [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda piece: (-costs[piece], piece)):
        owners[piece] = load.index(min(load))
        load[owners[piece]] += costs[piece]
    return owners


def current(group: Any = None, *, keep: Path | None = None) -> Ranks:
    """The ranks of the process group that runs; this process alone when none does.

    Example:
        >>> current()
        Ranks(rank=0, count=1, group=None, keep=None)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks(keep=keep)
    return Ranks(dist.get_rank(group), dist.get_world_size(group), group, keep)


def launched() -> bool:
    """Whether ``torchrun`` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ


@contextlib.contextmanager
def session(*, keep: Path | None = None, timeout: datetime.timedelta = _TIMEOUT) -> Iterator[Ranks]:
    """The ranks that ``torchrun`` started, joined in a group: nccl where every rank has a CUDA device, gloo elsewhere.

    A group that runs already is used as it is. ``torchrun`` ends all ranks when one of them dies; what this one had
    finished by then is not lost.

    Args:
        keep: where a rank writes what it had finished when another one failed.
        timeout: how long a rank waits for the others.
    """
    if dist.is_available() and dist.is_initialized():
        yield current(keep=keep)
        return
    if not launched():
        yield Ranks(keep=keep)
        return
    local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    on_gpus = devices >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")) and dist.is_nccl_available()
    if on_gpus:
        torch.cuda.set_device(local)
    with told_to_stop():  # from before the first moment at which another rank can fail
        dist.init_process_group("nccl" if on_gpus else "gloo", timeout=timeout)
        try:
            yield current(keep=keep)
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def told_to_stop() -> Iterator[None]:
    """The signal by which torchrun ends the ranks becomes an error, so that what was finished can be kept and told."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise RankError("told to stop, because another rank has failed", {})

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
