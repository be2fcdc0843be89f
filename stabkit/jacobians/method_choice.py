"""Whether LAPACK on the dense matrix or an iteration on products is cheaper, from measured costs.

The costs were measured on one core; ``python -m tests.benchmarks.spectra crossover`` measures them again. They, and not
a clock at run time, decide, so that the same call takes the same path and gives the same numbers every time.
"""

from __future__ import annotations

from dataclasses import dataclass

from stabkit.errors import ArgumentError

# Up to these sizes LAPACK, with the products that build the matrix, takes less time than an iteration for 8 values of
# a ResNet block does; and up to the second ones it takes over where an iteration fails. Seconds in float64 on one core:
# eigenvalues with both eigenvectors 2e-9 n^3, singular triples .5e-9 n^3, singular values alone .3e-9 n^3. The smallest
# singular values converge too slowly for an iteration to pay at all while a dense matrix can be had.
_CHEAPER = {"LM eigenvalues": 768, "LM singular values": 512, "SM singular values": 4096}
_RESCUE = {"eigenvalues": 2048, "singular values": 4096}
_ITERATED_PART = 6  # more than this part of all values is found sooner by LAPACK
_LARGEST_DENSE = 20_000
# In a report, where every step's spectrum is wanted:
DENSE_SIZE = 512  # up to here all eigenvalues are cheaper than a dozen by Krylov, and say more
LARGEST_DENSE = 8192  # beyond, a matrix and its factors no longer fit beside a model, and take hours
_WORK = 5_000_000  # numbers that all products of one Krylov spectrum may pass, a bound on its time


def krylov_products(size: int) -> int:
    """How many products a Krylov spectrum may spend: fewer on larger steps, where each costs more.

    Example:
        >>> krylov_products(2048), krylov_products(100_000)
        (400, 60)
    """
    return min(400, max(60, _WORK // size))


@dataclass(frozen=True)
class MethodChoice:
    """``method`` and the ``reason`` for it; ``limit``, products before LAPACK takes over where ``rescue`` allows it."""

    method: str
    reason: str
    limit: int | None = None
    rescue: bool = False


def choose_method(
    kind: str, iteration: str, k: int, shape: tuple[int, int, int], which: str, method: str, max_products: int | None
) -> MethodChoice:
    """How ``k`` values of an operator ``shape`` are found.

    Args:
        kind: ``"eigenvalues"`` or ``"singular values"``.
        iteration: the name of the iterative method.
        k: how many.
        shape: ``(batch, m, n)``.
        which: the part of the spectrum.
        method: what the caller asked for: ``"auto"``, ``"dense"`` or ``iteration``.
        max_products: the caller's budget.

    Raises:
        ArgumentError: an unknown method, or one that does not fit the budget or the size.
    """
    if method not in ("auto", "dense", iteration):
        raise ArgumentError(f"method={method!r}; expected 'auto', 'dense' or {iteration!r}")
    if method == iteration:
        return MethodChoice(method, f"method={method!r} was asked for", max_products)
    size = min(shape[1:])
    affordable = max_products is None or max_products >= size
    if method == "dense" and not affordable:
        raise ArgumentError(
            f"max_products={max_products}, but method='dense' needs {size} products: raise it, or use {iteration!r}"
        )
    small = _CHEAPER.get(f"{which} {kind}", _CHEAPER[f"LM {kind}"])
    if method == "dense":
        reason = "method='dense' was asked for"
    elif size <= small:
        reason = f"n = {size} is at most {small}, up to which LAPACK is cheaper"
    else:
        reason = f"k = {k} is more than 1/{_ITERATED_PART} of n = {size}"
    if method == "dense" or size <= small or _ITERATED_PART * k >= size:
        if size > _LARGEST_DENSE:
            raise ArgumentError(
                f"J has shape ({shape[1]}, {shape[2]}): a dense decomposition for k={k} is out of reach; "
                f"ask for k below {size // _ITERATED_PART}"
            )
        if affordable:
            return MethodChoice("dense", reason)
        return MethodChoice(iteration, f"max_products = {max_products} is too few for the dense matrix", max_products)
    rescue = size <= _RESCUE[kind]
    limit = min(size, size if max_products is None else max_products) if rescue else max_products
    return MethodChoice(iteration, f"n = {size} is more than {small}, from which iterating is cheaper", limit, rescue)
