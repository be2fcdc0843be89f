"""How many vectors an operator multiplies at once: as many as suit the caches and the memory."""

from __future__ import annotations

from stabkit.errors import ArgumentError
from stabkit.operators.linear_map import LinearMap
from stabkit.operators.memory import budget, readable

_CACHED = 2**22  # bytes of the widest tensor on the way, for all products of a chunk
_CHUNKS = 32, 512


def products_at_once(J: LinearMap, chunk: int | None, memory: int | None, result: int) -> int:
    """How many products are made at once: as many as suit the caches and the memory.

    Raises:
        ArgumentError: the result and one product do not fit.
    """
    room = budget(memory, J.device)
    batch, m, n = J.shape
    one = 2 * batch * (m + n) * J.dtype.itemsize
    widest = max(m, n) * batch * J.dtype.itemsize
    if J.origin is not None:
        live, widest = J.origin.footprint()
        one += 2 * live
    if room is not None and result + one > room:
        given = "memory=" if memory is not None else "the free memory, of which "
        raise ArgumentError(
            f"the Jacobian of shape {J.shape} takes {readable(result)} and {readable(one)} for the work on it, but "
            f"{given}{readable(room)} is all there is: multiply with it (J @ V, J.T @ U), take a block "
            "(J.restrict(...)), or its sparse form if it has one (J.sparse())"
        )
    fitting = (room - result) // one if room is not None else _CHUNKS[1]
    wanted = chunk if chunk is not None else min(max(_CACHED // max(widest, 1), _CHUNKS[0]), _CHUNKS[1])
    return int(max(min(wanted, fitting), 1))
